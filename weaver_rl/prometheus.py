"""Every metric as Prometheus has it: name, labels, kind. It does not know who exports them, nor any cluster.

Names of metrics.jsonl become those of Prometheus by rule: `reward/mean` is `weaver_rl_reward_mean`, what is measured
for each reward, lag or stage is one metric with a label, and a base unit ends the name. What is counted while a run
lasts, not once a step, is in `LIVE`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from weaver_rl.ledger import CONTROLLER, ROLES
from weaver_rl.metrics import METRICS, STAGES, Metric, find_metric

Kind = Literal["gauge", "counter", "histogram"]

PREFIX = "weaver_rl"
EXPORTED_AS = "ray_"
"""What Ray puts before every name when it exports it."""
RAY_LABELS = (
    "Component",
    "NodeAddress",
    "SessionName",
    "Version",
    "WorkerId",
    "otel_scope_name",
    "otel_scope_schema_url",
    "otel_scope_version",
)
"""What Ray adds to the labels of everything that a process exports."""

_UNITS = {"s": "seconds", "B": "bytes", "nat": "nats", "tokens": "tokens", "tokens/s": "tokens_per_second"}
"""Units that end a name; others are counts of things that the name has already."""
_SPELLINGS = {"s": "seconds", "B": "num_bytes", "tokens": "num_tokens", "tokens/s": "tokens_per_s"}
"""How names of metrics.jsonl spell a unit."""

_LABELLED = (
    (re.compile(r"reward/(?P<reward>.+)/(?P<rest>mean|std|missing_fraction|seconds)"), "reward/component/"),
    (re.compile(r"lag/(?P<lag>[0-9]+|<lag>)/(?P<rest>fraction)"), "lag/"),
    (re.compile(rf"(?P<rest>seconds)/(?P<stage>{'|'.join(STAGES)}|other)"), "stage/"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """One metric of Prometheus.

    Example:
        Exported(name="weaver_rl_reward_component_mean", kind="gauge", labels=("run", "reward"), meaning="mean of ...")
    """

    name: str
    """Without the `ray_` that Ray puts before it; a counter's ends in `_total`."""
    kind: Kind
    labels: tuple[str, ...]
    """Of these each series has one value; none of them grows with the number of steps, prompts or requests."""
    meaning: str
    unit: str = "1"
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram."""
    known: tuple[Mapping[str, str], ...] = ()
    """Series of a counter, by labels without the common one, that begin with the process. Prometheus' `rate` does not
    see the first event of one that begins with the event."""
    sources: tuple[str, ...] = ()
    """Names in metrics.jsonl, with `<label>` and `<lag>` as they stand in METRICS."""

    @property
    def series(self) -> tuple[str, ...]:
        """The names under which it is found in Prometheus."""
        name = EXPORTED_AS + self.name
        return (name,) if self.kind != "histogram" else (f"{name}_bucket", f"{name}_sum", f"{name}_count")


_LOSABLE = tuple({"role": role} for role in ROLES if role != CONTROLLER)

LIVE: tuple[Exported, ...] = (
    Exported(
        name=f"{PREFIX}_step",
        kind="gauge",
        labels=("run",),
        meaning="last step that is finished, counted over all phases; there while the run's driver lives",
        unit="steps",
    ),
    Exported(
        name=f"{PREFIX}_actor_seconds_total",
        kind="counter",
        labels=("run", "actor", "role", "state"),
        meaning="wall time of an actor by what it did or waited for; adds up to the time of the steps",
        unit="s",
    ),
    Exported(
        name=f"{PREFIX}_groups_sampling",
        kind="gauge",
        labels=("run",),
        meaning="groups asked of the samplers and not delivered, just now",
        unit="groups",
    ),
    Exported(
        name=f"{PREFIX}_samplers_serving",
        kind="gauge",
        labels=("run",),
        meaning="samplers that hold the newest weights and take groups, just now",
        unit="samplers",
    ),
    Exported(
        name=f"{PREFIX}_samplers_starting",
        kind="gauge",
        labels=("run",),
        meaning="samplers that are asked for and do not serve, just now",
        unit="samplers",
    ),
    Exported(
        name=f"{PREFIX}_actor_losses_total",
        kind="counter",
        labels=("run", "role"),
        known=_LOSABLE,
        meaning="actors that died, hung or could not be trusted any more",
        unit="actors",
    ),
    Exported(
        name=f"{PREFIX}_actor_restarts_total",
        kind="counter",
        labels=("run", "role"),
        known=_LOSABLE,
        meaning="actors that came up in the place of a lost one",
        unit="actors",
    ),
    Exported(
        name=f"{PREFIX}_groups_reissued_total",
        kind="counter",
        labels=("run",),
        known=({},),
        meaning="groups that were given to another sampler because the first was lost",
        unit="groups",
    ),
)
"""Of a run, while it lasts."""


def run_metrics() -> tuple[Exported, ...]:
    """Everything that a run exports: a metric for each row of METRICS, those of one name as one, then `LIVE`."""
    found: dict[str, Exported] = {}
    for metric in METRICS:
        name, labels = place(metric)
        earlier = found.get(name)
        found[name] = Exported(
            name=name,
            kind="gauge",
            labels=("run", *labels),
            meaning=metric.meaning if earlier is None else "time of the step spent in a stage",
            unit=metric.unit,
            sources=(metric.name,) if earlier is None else (*earlier.sources, metric.name),
        )
    return (*found.values(), *LIVE)


def place(metric: Metric) -> tuple[str, dict[str, str]]:
    """Where a row of METRICS stands in Prometheus: its name there, and its labels but for `run`."""
    return _place(metric.name, metric.unit)


@lru_cache(maxsize=4096)
def place_of(name: str) -> tuple[str, dict[str, str]]:
    """The same of a metric as it was written, `reward/task/mean`."""
    metric = find_metric(name)
    assert metric is not None, name
    return _place(name, metric.unit)


def _place(path: str, unit: str) -> tuple[str, dict[str, str]]:
    labels: dict[str, str] = {}
    for pattern, stem in _LABELLED:
        if found := pattern.fullmatch(path):
            labels = {key: value for key, value in found.groupdict().items() if key != "rest"}
            path = stem + found["rest"]
            break
    return _named(path, unit), labels


def _named(path: str, unit: str) -> str:
    words = path.replace("/", "_")
    suffix = _UNITS.get(unit)
    if suffix is not None:
        spelling = _SPELLINGS.get(unit, suffix)
        words = "_".join(part for part in re.split(rf"(?:^|_){spelling}(?:_|$)", words) if part)
        return "_".join(part for part in (PREFIX, words, suffix) if part)
    words = words.replace("num_", "")
    # `_count` at the end belongs to histograms.
    words = re.sub(r"[a-z]+_count$", unit.replace("-", ""), words)
    return f"{PREFIX}_{words}"
