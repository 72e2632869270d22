"""Every metric that a server exports, as Prometheus has it. It does not know where they are counted.

No label has a value for each request, session or model: a server that runs for months has no more of them than one that
runs for a day. Models are counted by the base that they were made from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from weaver_rl.prometheus import PREFIX, Exported
from weaver_rl.service.records import ENDED, OperationKind

SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 180.0, 600.0)
"""From a request that only reads to the training of a large batch."""

MAX_SESSION_METRICS = 100
"""Names of clients' metrics that a server shows; more are counted and left out."""


def _row(
    name: str,
    kind: str,
    labels: tuple[str, ...],
    meaning: str,
    unit: str = "1",
    known: tuple[Mapping[str, str], ...] = (),
) -> Exported:
    buckets = SECONDS if kind == "histogram" else ()
    return Exported(
        name=f"{PREFIX}_service_{name}",
        kind=kind,  # type: ignore[arg-type]
        labels=("server", *labels),
        meaning=meaning,
        unit=unit,
        buckets=buckets,
        known=known,
    )


SERVICE_METRICS: tuple[Exported, ...] = (
    _row("requests_total", "counter", ("endpoint", "method", "status"), "HTTP requests answered", "requests"),
    _row(
        "request_seconds",
        "histogram",
        ("endpoint", "method"),
        "time from a request to the end of its answer; polls are held until there is something to say",
        "s",
    ),
    _row(
        "operations_total",
        "counter",
        ("kind", "status"),
        "operations that ended, by how",
        "operations",
        known=tuple({"kind": kind, "status": status} for kind in get_args(OperationKind) for status in ENDED),
    ),
    _row("operation_seconds", "histogram", ("kind",), "time from an operation's request to its end", "s"),
    _row("operations_in_flight", "gauge", ("kind",), "operations that have not ended", "operations"),
    _row(
        "queue_depth",
        "gauge",
        ("base_model",),
        "operations of models on this base that have not ended: one of each model runs, the others wait for it",
        "operations",
    ),
    _row("sampled_tokens_total", "counter", ("base_model",), "tokens of completions", "tokens"),
    _row("trained_tokens_total", "counter", ("base_model",), "input tokens of forward_backward", "tokens"),
    _row("weight_versions_total", "counter", ("base_model",), "versions of weights made: optimizer steps", "versions"),
    _row("engines_up", "gauge", ("base_model",), "vLLM engines that are up, those of models trained whole included"),
    _row("learners_up", "gauge", ("base_model",), "learners that are up, those of models trained whole included"),
    _row(
        "session_metric",
        "gauge",
        ("metric",),
        f"the newest value that any client sent for a metric of its own; the first {MAX_SESSION_METRICS} names",
    ),
    _row(
        "session_metrics_left_out_total",
        "counter",
        (),
        "values of clients' metrics under further names, or that are no finite numbers; the store has them",
        "values",
        known=({},),
    ),
)
