"""Asynchronous step time over the longer of sampling and learning, each measured alone in a synchronous run.

1.0 means that the shorter of the two costs nothing. On a machine with few cores sampler and learner compete for them,
so a second workload spends its sampling time waiting: it shows what the loop itself allows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.alternation import Ratio
from benchmarks.command_run import train, train_steps
from benchmarks.quickstart import CONFIG
from benchmarks.results import Aim, Row
from benchmarks.scale import Scale

AIM = 1.15
STEPS_LEFT_OUT = 3
TIMEOUT_S = 150.0
JUDGE_S = 0.04
"""For one group; two reward workers share those of a step."""
REWARD = Path(__file__).with_name("waiting_reward.py")
# A wider policy, longer prompts and fewer rollouts than the quickstart's: sampler and learner are about equally busy.
WORK = [
    "model.hidden_size=256",
    "model.num_layers=2",
    "model.max_position_embeddings=128",
    "task.args={min_terms: 16, max_terms: 16, min_digits: 1, max_digits: 1}",
    "rollout.prompts_per_step=16",
    "rollout.sampling.max_tokens=10",
    "learner.learning_rate=1.0e-5",
    # vLLM's CPU engine fails when it cuts a prompt of a request with a seed in two.
    "sampler.engine_args.max_num_batched_tokens=65536",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What the runs have in common besides the quickstart's settings."""

    name: str
    overrides: tuple[str, ...]
    meaning: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """Median seconds of a synchronous step's two halves, in each of which the other side is idle."""

    sample: float
    """Sampling and scoring."""
    learn: float
    """Learning and weight sync."""

    @property
    def longer(self) -> float:
        return max(self.sample, self.learn)


def workloads() -> list[Workload]:
    return [
        Workload(
            name="sampler and learner compute, one thread each",
            overrides=(*WORK, _judged(0.0)),
            meaning="includes what they take from each other where there are no more cores than they use",
        ),
        Workload(
            name="sampling mostly waits for a judge",
            overrides=(*WORK, _judged(JUDGE_S)),
            meaning="what the loop itself allows; below 1 the waits of several steps run side by side",
        ),
    ]


def _judged(seconds: float) -> str:
    return f"rewards=[{{name: '{REWARD}:judge', args: {{seconds: {seconds}}}}}]"


def measure(scale: Scale, folder: Path) -> list[Row]:
    """A row per workload and max_lag."""
    return [row for index, work in enumerate(workloads()) for row in _measure(work, scale, folder / str(index))]


def _measure(work: Workload, scale: Scale, folder: Path) -> list[Row]:
    folder.mkdir()
    num_steps = 8 if scale.quick else 16
    stages = stages_of(_steps(work, 0, num_steps, folder))
    lags = (1,) if scale.quick else (1, 2)
    return [_row(work, stages, max_lag, _steps(work, max_lag, num_steps, folder)) for max_lag in lags]


def stages_of(steps: Sequence[Mapping[str, float]]) -> Stages:
    """From the metrics of a synchronous run."""
    return Stages(
        sample=Ratio.of([step["seconds/sample"] + step.get("seconds/score", 0.0) for step in steps]).median,
        learn=Ratio.of([step["seconds/learn"] + step["seconds/sync"] for step in steps]).median,
    )


def step_seconds(step: Mapping[str, float]) -> float:
    """Of a step without its evaluation and the checkpoint before it."""
    return step["seconds/step"] - step.get("seconds/eval", 0.0) - step.get("seconds/checkpoint", 0.0)


def _row(work: Workload, stages: Stages, max_lag: int, steps: Sequence[Mapping[str, float]]) -> Row:
    seconds = Ratio.of([step_seconds(step) for step in steps])
    return Row(
        benchmark="overlap",
        case=f"{work.name}; sample {stages.sample:.3g} s, learn {stages.learn:.3g} s alone",
        quantity=f"seconds of a step, max_lag {max_lag}",
        ours=seconds.median,
        baseline=stages.longer,
        baseline_name="the longer of the two",
        ratio=Ratio.of([value / stages.longer for value in seconds.values]),
        aim=Aim(kind="at most", value=AIM),
        note=work.meaning,
    )


def _steps(work: Workload, max_lag: int, num_steps: int, folder: Path) -> list[dict[str, float]]:
    run_dir = folder / f"lag-{max_lag}"
    overrides = [
        f"rollout.max_lag={max_lag}",
        f"num_steps={num_steps}",
        "warm_start.num_steps=2",
        "eval.every=0",
        "eval.num_prompts=1",
        "checkpoint.every=0",
        "learner.num_threads=1",
        "sampler.num_threads=1",
        *work.overrides,
    ]
    train(CONFIG, run_dir, overrides, TIMEOUT_S)
    # The last steps find nothing left to sample.
    return train_steps(run_dir)[STEPS_LEFT_OUT : -max_lag - 1]
