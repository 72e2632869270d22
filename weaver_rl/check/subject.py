"""The run that is checked: its configuration, and what several checks need of it, each made once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from weaver_rl.check.given import Given
from weaver_rl.check.model_source import FoundModel, find_model
from weaver_rl.check.policy_shape import PolicyShape, shape_of
from weaver_rl.check.resources import ClusterFacts
from weaver_rl.config import RunConfig
from weaver_rl.tasks.load import load_task
from weaver_rl.tasks.prompts import sample_texts
from weaver_rl.tasks.task import Problem, Task

NUM_SAMPLE_PROMPTS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class RunUnderCheck:
    """What is needed is made at the first question.

    Example:
        run = RunUnderCheck.of(load_config(Path("configs/quickstart.yaml")), cluster=this_machine)
        run.model.get().where
    """

    config: RunConfig
    base_dir: Path
    task: Given[Task]
    model: Given[FoundModel]
    tokenizer: Given[Any]
    shape: Given[PolicyShape]
    cluster: Given[ClusterFacts]
    gpu_memory_gb: float | None
    """Memory of each GPU as the user gives it; None: as it is found."""
    on_head: bool
    """It will be a job of the cluster: its driver, its folder and its disk are not of this machine."""

    @staticmethod
    def of(
        config: RunConfig,
        *,
        cluster: Callable[[], ClusterFacts],
        gpu_memory_gb: float | None = None,
        on_head: bool = False,
    ) -> RunUnderCheck:
        base_dir = config.base_dir or Path.cwd()
        task = Given("the task", lambda: load_task(config.task, base_dir, config.seed))
        model = Given(
            "the model",
            lambda: find_model(
                config.model,
                base_dir,
                partial(_texts, task, config),
            ),
        )
        return RunUnderCheck(
            config=config,
            base_dir=base_dir,
            task=task,
            model=model,
            tokenizer=Given("the tokenizer", lambda: model.needed().tokenizer()),
            shape=Given("the model's sizes", lambda: shape_of(model.needed().config)),
            cluster=Given("the cluster", cluster),
            gpu_memory_gb=gpu_memory_gb,
            on_head=on_head,
        )

    def max_length(self) -> int:
        """Longest sequence that engine and model take, in tokens."""
        longest = self.model.needed().max_length()
        return min(longest, int(self.config.sampler.engine_args.get("max_model_len", longest)))


def _texts(task: Given[Task], config: RunConfig) -> Any:
    return sample_texts(task.needed(), config.task)


def sample_problems(task: Task, num: int) -> list[Problem]:
    """Training problems, spread over the whole of a finite task."""
    total = task.num_problems
    if total is None:
        return [task.problem(index) for index in range(num)]
    step = max(1, total // num)
    return [task.problem(index) for index in islice(range(0, total, step), num)]
