"""Every metric of a step by name; the writer of metrics.jsonl. It does not know how values are measured."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, Self, get_args

from weaver_rl.errors import UserError, WeaverRLError
from weaver_rl.metrics_sinks import MetricsSink, TensorBoardEvents
from weaver_rl.run_folder import RunFolder, write_atomically
from weaver_rl.whole_lines import whole_lines

Phase = Literal["warm_start", "train"]

STAGES = ("sample", "score", "learn", "sync", "wait", "eval", "checkpoint")
"""Where a step's time can go. Each has a metric `seconds/<stage>`; they do not overlap, what is left is `other`."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. `<label>` in a name stands for a reward's label, `<lag>` for a number of versions."""

    name: str
    meaning: str
    unit: str = "1"
    timed: bool = False
    """Depends on the clock or the machine, so two equal runs differ in it."""


METRICS: tuple[Metric, ...] = (
    Metric("eval/accuracy", "share of held-out problems solved by greedy sampling"),
    Metric("eval/num_prompts", "held-out problems evaluated", "prompts"),
    Metric("eval/missing_fraction", "share of held-out problems whose deciding reward is missing"),
    Metric("eval/reward_mean", "mean task reward over the held-out problems", "reward"),
    Metric("eval/length_mean", "mean completion length in the evaluation", "tokens"),
    Metric("reward/mean", "mean reward of the scored rollouts", "reward"),
    Metric("reward/std", "standard deviation of the reward over the scored rollouts", "reward"),
    Metric("reward/min", "lowest reward of the step", "reward"),
    Metric("reward/max", "highest reward of the step", "reward"),
    Metric("reward/missing_fraction", "share of rollouts whose reward is missing"),
    Metric("reward/<label>/mean", "mean of one component, before its weight", "reward"),
    Metric("reward/<label>/std", "standard deviation of one component", "reward"),
    Metric("reward/<label>/missing_fraction", "share of rollouts in which this component is missing"),
    Metric("reward/<label>/seconds", "mean time of one call of this component", "s", timed=True),
    Metric("advantage/mean", "mean advantage of the trained rollouts"),
    Metric("advantage/std", "standard deviation of the advantage of the trained rollouts"),
    Metric("groups/trained", "groups in the batch", "groups"),
    Metric("groups/dropped", "groups left out: fewer than two scored rollouts, or too old", "groups"),
    Metric("groups/in_flight", "groups being sampled or scored ahead of the next step", "groups"),
    Metric("groups/finished", "groups scored and waiting for a later step", "groups"),
    Metric("groups/zero_advantage_fraction", "share of groups in which every advantage is zero: nothing to learn"),
    Metric("rollout/count", "rollouts of the step", "rollouts"),
    Metric("rollout/length_mean", "mean completion length", "tokens"),
    Metric("rollout/length_max", "longest completion", "tokens"),
    Metric("rollout/truncated_fraction", "share of completions that ended at the length limit"),
    Metric(
        "rollout/logprob_mean", "mean log-probability of a sampled token; its negative estimates the entropy", "nat"
    ),
    Metric("importance_weights/mean", "mean importance weight over the trained tokens"),
    Metric("importance_weights/abs_mean", "mean magnitude of the importance weights"),
    Metric("importance_weights/clipped_fraction", "share of trained tokens whose importance weight the loss clips"),
    Metric("correction/mean", "mean behaviour correction over the trained tokens"),
    Metric("correction/capped_fraction", "share of trained tokens whose behaviour correction (tis) hit its cap"),
    Metric("correction/masked_fraction", "share of trained tokens whose behaviour correction (mis) is 0"),
    Metric("ratio/ess", "effective sample size of the trained tokens under the ratio learner/sampler, as a share"),
    Metric("ratio/ess_sequence", "the same of the trained rollouts under the product of their tokens' ratios"),
    Metric("loss", "loss of the batch, normalised by the sum of weights"),
    Metric("loss/sum_weights", "the normaliser: sum of weights over the batch"),
    Metric("grad_norm", "global L2 norm of the gradient before clipping"),
    Metric("learning_rate", "learning rate of the update"),
    Metric("learner/num_tokens", "input tokens that went through the learner", "tokens"),
    Metric("learner/num_microbatches", "micro-batches that each rank of the learner ran", "micro-batches"),
    Metric("learner/tokens_per_s", "input tokens through the learner per second of learning", "tokens/s", timed=True),
    Metric("logprob_gap/mean", "mean |learner - sampler| log-probability of the tokens of lag 0", "nat"),
    Metric("logprob_gap/max", "largest |learner - sampler| log-probability of a token of lag 0", "nat"),
    Metric("logprob_gap/kl", "estimated KL from the sampler's distribution to the learner's at lag 0", "nat"),
    Metric("logprob_gap/ess", "effective sample size of the tokens of lag 0 under learner/sampler, as a share"),
    Metric("lag/mean", "mean lag of the trained tokens", "versions"),
    Metric("lag/max", "largest lag of a trained token", "versions"),
    Metric("lag/<lag>/fraction", "share of the trained tokens that have this lag"),
    Metric("weights/version", "version of the weights after the step", "versions"),
    Metric("sync/probe_max_abs", "largest |learner - sampler| log-probability on the probe after the sync", "nat"),
    Metric("sync/num_bytes", "bytes of weights sent to each sampler", "B"),
    Metric("sync/resyncs", "samplers that had to be sent the weights a second time", "samplers"),
    Metric(
        "tokens_per_s",
        "sampled tokens per second of the whole step; input tokens in a warm start",
        "tokens/s",
        timed=True,
    ),
    Metric("sampler/num_tokens", "tokens sampled in the step", "tokens"),
    Metric("sampler/tokens_per_s", "sampled tokens per second of sampling", "tokens/s", timed=True),
    Metric("data/prompts_dropped", "training prompts left out so far because they were too long", "prompts"),
    *(Metric(f"seconds/{stage}", f"time of the step spent in {stage}", "s", timed=True) for stage in STAGES),
    Metric("seconds/other", "time of the step outside every stage", "s", timed=True),
    Metric("seconds/step", "wall time of the step", "s", timed=True),
)

_PLACEHOLDERS = {"<label>": ".+", "<lag>": "[0-9]+"}


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.sub("<[a-z]+>", lambda found: _PLACEHOLDERS[found.group()], re.escape(name)))


_EXACT = {metric.name: metric for metric in METRICS if "<" not in metric.name}
_PATTERNS = tuple((_pattern(metric.name), metric) for metric in METRICS if "<" in metric.name)


def find_metric(name: str) -> Metric | None:
    """The row of METRICS that `name` belongs to; None for a name that is not in the table."""
    if exact := _EXACT.get(name):
        return exact
    return next((metric for pattern, metric in _PATTERNS if pattern.fullmatch(name)), None)


def deterministic_part(values: Mapping[str, float]) -> dict[str, float]:
    """The values that two equal runs share bit for bit: all but timings and machine figures."""
    return {name: value for name, value in values.items() if not ((metric := find_metric(name)) and metric.timed)}


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsLine:
    """One line of metrics.jsonl: one step of the run, or what was measured before the first."""

    step: int
    """Counts on over the phases: the first step of `train` follows the last of `warm_start`. 0, in a run without a warm
    start: the evaluation of the policy that it begins with."""
    phase: Phase
    time_s: float
    """Seconds since the start of the run; time between an interruption and its resume does not count."""
    values: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_training(self) -> bool:
        """Whether it is of a step of reinforcement learning; step 0 trained nothing."""
        return self.phase == "train" and self.step > 0

    def to_json(self) -> str:
        head = {"step": self.step, "phase": self.phase, "time_s": round(self.time_s, 3)}
        return json.dumps({**head, **self.values}, allow_nan=False) + "\n"


def read_metrics(path: Path) -> Iterator[MetricsLine]:
    """The lines of a metrics.jsonl; nothing when there is none. A last line cut short by a kill is left out."""
    for number, line in whole_lines(path):
        try:
            raw = json.loads(line)
            head = {key: raw.pop(key) for key in ("step", "phase", "time_s")}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{path}, line {number} holds no metrics: {error}; seen {line[:80]!r}") from error
        yield MetricsLine(**head, values=raw)


class MetricsWriter:
    """Writes one JSON object per step, flushed line by line, and tells the same to TensorBoard and other sinks.

    Opened on a folder with metrics it continues them: `step` and `time_s` count on. To resume from step N call
    `truncate_after(N)`; TensorBoard then hides what its earlier event files say about later steps.

    Args:
        sinks: are told every step besides TensorBoard; closing them is up to who made them.
    """

    def __init__(
        self, folder: RunFolder, clock: Callable[[], float] = time.monotonic, *, sinks: Sequence[MetricsSink] = ()
    ) -> None:
        self._path = folder.metrics_file
        self._clock = clock
        self._sinks: tuple[MetricsSink, ...] = (TensorBoardEvents(folder.tensorboard), *sinks)
        self._file = self._open(up_to=None)

    def write(self, step: int, phase: Phase, values: Mapping[str, float]) -> None:
        """Adds the line of `step`, counted over all phases; every step once, in order.

        Raises a WeaverRLError that names the metric when one is not finite or not in METRICS; nothing is written then.
        """
        self._refuse_bad(step, phase, values)
        plain = {name: _plain(value) for name, value in values.items()}
        self._file.write(MetricsLine(step=step, phase=phase, time_s=self._elapsed_s(), values=plain).to_json())
        self._file.flush()
        self._last_step = step
        for sink in self._sinks:
            sink.write(step, plain)

    def truncate_after(self, step: int) -> None:
        """Forgets every step after `step`, so that the file has each step once when a run goes on from there.

        -1: step 0 as well.
        """
        self._file.close()
        self._file = self._open(up_to=step)
        for sink in self._sinks:
            sink.rewound(step)

    def _open(self, up_to: int | None) -> IO[str]:
        kept = [line for line in read_metrics(self._path) if up_to is None or line.step <= up_to]
        content = "".join(line.to_json() for line in kept)
        if not self._path.exists() or self._path.read_text(encoding="utf-8") != content:
            write_atomically(self._path, content)
        self._last_step = kept[-1].step if kept else -1
        self._started = self._clock() - (kept[-1].time_s if kept else 0.0)
        return self._path.open("a", encoding="utf-8")

    def _elapsed_s(self) -> float:
        return self._clock() - self._started

    def _refuse_bad(self, step: int, phase: str, values: Mapping[str, float]) -> None:
        if phase not in get_args(Phase):
            raise WeaverRLError(f"phase {phase!r} is not known; allowed: {', '.join(get_args(Phase))}")
        if step <= self._last_step:
            raise WeaverRLError(f"metrics of step {step} after those of step {self._last_step}: each step comes once")
        for name, value in values.items():
            if find_metric(name) is None:
                raise WeaverRLError(f"metric {name!r} is not known; add it to METRICS in weaver_rl/metrics.py")
            if not math.isfinite(value):
                raise WeaverRLError(f"metric {name} is {value} in step {step} ({phase}); it must be finite")

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _plain(value: float) -> float:
    """A Python number from a numpy scalar: json refuses the latter."""
    return value if type(value) in (int, float) else float(value)
