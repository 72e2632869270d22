"""From a `task:` section to a `Task`, in any process. It knows no tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from weaver_rl.errors import TaskError
from weaver_rl.tasks.config import CustomTask, ReasoningGymTask, TaskConfig
from weaver_rl.tasks.task import Scorer, Task
from weaver_rl.types import Rollout


def load_task(config: TaskConfig, base_dir: Path, seed: int) -> Task:
    """The task that the section describes; files are relative to `base_dir`. Bad input is a TaskError."""
    if isinstance(config, ReasoningGymTask):
        from weaver_rl.tasks.procedural import ProceduralTask

        return ProceduralTask(config, seed)
    if isinstance(config, CustomTask):
        from weaver_rl.tasks.custom import load_custom_task

        return load_custom_task(config, base_dir)
    from weaver_rl.tasks.files import FileRowsTask

    return FileRowsTask(config, base_dir)


@dataclass
class TaskScorer:
    """The task's own judge as something that travels: it carries the section and builds the scorer where it is used.

    Example:
        scorer = load_scorer(config, base_dir, load_task(config, base_dir, seed))
        pickle.loads(pickle.dumps(scorer))(rollout)
    """

    config: TaskConfig
    base_dir: Path
    _scorer: Scorer | None = field(default=None, init=False, repr=False, compare=False)

    def load(self) -> None:
        if self._scorer is None:
            self._scorer = load_task(self.config, self.base_dir, seed=0).scorer()
        if self._scorer is None:
            raise TaskError(f"task {self.config.name} has no scorer of its own; name another reward")

    def __call__(self, rollout: Rollout) -> float:
        self.load()
        assert self._scorer is not None
        return self._scorer(rollout)

    def __getstate__(self) -> dict[str, object]:
        return {"config": self.config, "base_dir": self.base_dir, "_scorer": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        # Here and not at the first call: a worker unpickles before the first rollout's deadline starts to run.
        self.load()


def load_scorer(config: TaskConfig, base_dir: Path, task: Task) -> TaskScorer | None:
    """The travelling scorer, or None when the task has none."""
    return None if task.scorer() is None else TaskScorer(config, base_dir)
