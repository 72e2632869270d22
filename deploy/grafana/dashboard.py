"""The Grafana dashboard as a program: rows of panels, each with its queries. It knows no Grafana server.

`python deploy/grafana/dashboard.py > deploy/grafana/weaver-rl.json` writes it anew; a test keeps the two equal and
every metric in it one that is exported.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

RUN = 'run=~"$run"'
SERVER = 'server=~"$server"'
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH, HEIGHT = 24, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One panel: a title, queries with their legends, and how it is drawn."""

    title: str
    queries: Sequence[tuple[str, str]]
    about: str = ""
    unit: str = "short"
    width: int = 8
    stacking: Literal["none", "normal", "percent"] = "none"
    kind: Literal["timeseries", "stat"] = "timeseries"
    top: float | None = None


def gauge(name: str, *labels: str, selector: str = RUN, by: str = "run") -> str:
    """A gauge of one process: two processes of a run, one just killed, show as one."""
    return f"max by ({', '.join((by, *labels))}) (ray_weaver_rl_{name}{{{selector}}})"


def rate(name: str, *labels: str, selector: str = RUN) -> str:
    """A counter per second, over all processes."""
    return f"sum by ({', '.join(labels)}) (rate(ray_weaver_rl_{name}{{{selector}}}[$__rate_interval]))"


def budget(role: str) -> Panel:
    """Where the time of all actors of a role goes; counters know the whole, so the shares add up to 1."""
    query = rate("actor_seconds_total", "state", selector=f'{RUN}, role="{role}"')
    return Panel(
        title=f"Time of the {role}s" if role != "controller" else "Time of the controller",
        queries=[(query, "{{state}}")],
        about="Busy states and what was waited for, of the idle ledger. They add up to 100 % of wall time.",
        unit="percentunit",
        width=6,
        stacking="percent",
    )


def quantile(share: float, name: str, label: str) -> str:
    """Of a histogram, over all processes."""
    buckets = f"rate(ray_weaver_rl_{name}_bucket{{{SERVER}}}[$__rate_interval])"
    return f"histogram_quantile({share}, sum by (le, {label}) ({buckets}))"


ROWS: Sequence[tuple[str, Sequence[Panel]]] = (
    (
        "Run",
        (
            Panel(title="Step", queries=[(gauge("step"), "{{run}}")], kind="stat", width=4),
            Panel(
                title="Held-out accuracy",
                queries=[(gauge("eval_accuracy"), "{{run}}")],
                kind="stat",
                unit="percentunit",
                width=4,
            ),
            Panel(title="Sampled tokens/s", queries=[(gauge("tokens_per_second"), "{{run}}")], kind="stat", width=4),
            Panel(title="Step time", queries=[(gauge("step_seconds"), "{{run}}")], kind="stat", unit="s", width=4),
            Panel(title="Samplers serving", queries=[(gauge("samplers_serving"), "{{run}}")], kind="stat", width=4),
            Panel(title="Weights version", queries=[(gauge("weights_version"), "{{run}}")], kind="stat", width=4),
        ),
    ),
    (
        "Learning",
        (
            Panel(
                title="Reward",
                queries=[
                    (gauge("reward_mean"), "{{run}} mean"),
                    (gauge("reward_min"), "{{run}} min"),
                    (gauge("reward_max"), "{{run}} max"),
                ],
            ),
            Panel(
                title="Reward by component",
                queries=[(gauge("reward_component_mean", "reward"), "{{run}} {{reward}}")],
                about="Before its weight.",
            ),
            Panel(
                title="Held-out accuracy",
                queries=[(gauge("eval_accuracy"), "{{run}}")],
                unit="percentunit",
                top=1.0,
            ),
            Panel(title="Loss", queries=[(gauge("loss"), "{{run}}")]),
            Panel(title="Gradient norm", queries=[(gauge("grad_norm"), "{{run}}")]),
            Panel(
                title="Nothing to learn from",
                queries=[
                    (gauge("groups_zero_advantage_fraction"), "{{run}} zero advantage"),
                    (gauge("reward_missing_fraction"), "{{run}} reward missing"),
                ],
                unit="percentunit",
                top=1.0,
            ),
        ),
    ),
    (
        "Can it be trusted",
        (
            Panel(
                title="Log-probability gap",
                queries=[
                    (gauge("logprob_gap_mean_nats"), "{{run}} mean"),
                    (gauge("logprob_gap_max_nats"), "{{run}} max"),
                ],
                about="Learner and sampler on tokens of lag 0: the same weights, so only numerics are left.",
            ),
            Panel(
                title="Effective sample size",
                queries=[(gauge("ratio_ess"), "{{run}} tokens"), (gauge("ratio_ess_sequence"), "{{run}} rollouts")],
                unit="percentunit",
                top=1.0,
                about="Falls where samplers and learner drift apart: smaller steps, or less lag.",
            ),
            Panel(
                title="Lag of the trained tokens",
                queries=[(gauge("lag_fraction", "lag"), "{{run}} lag {{lag}}")],
                unit="percentunit",
                stacking="normal",
            ),
            Panel(
                title="Importance weights",
                queries=[
                    (gauge("importance_weights_abs_mean"), "{{run}} mean magnitude"),
                    (gauge("importance_weights_clipped_fraction"), "{{run}} clipped"),
                ],
            ),
            Panel(
                title="Completions",
                queries=[
                    (gauge("rollout_length_mean_tokens"), "{{run}} mean length"),
                    (gauge("rollout_length_max_tokens"), "{{run}} longest"),
                ],
            ),
            Panel(
                title="Probe after a sync",
                queries=[(gauge("sync_probe_max_abs_nats"), "{{run}}")],
                about="Largest difference between learner and sampler on the fixed sequence.",
            ),
        ),
    ),
    (
        "Speed",
        (
            Panel(
                title="Tokens/s",
                queries=[
                    (gauge("tokens_per_second"), "{{run}} whole step"),
                    (gauge("sampler_tokens_per_second"), "{{run}} sampling"),
                    (gauge("learner_tokens_per_second"), "{{run}} learning"),
                ],
            ),
            Panel(
                title="Where a step's time goes",
                queries=[(gauge("stage_seconds", "stage"), "{{run}} {{stage}}")],
                unit="s",
                stacking="normal",
            ),
            Panel(
                title="Reward functions",
                queries=[(gauge("reward_component_seconds", "reward"), "{{run}} {{reward}}")],
                unit="s",
                about="Mean time of one call.",
            ),
        ),
    ),
    ("Time budget", tuple(budget(role) for role in ("sampler", "learner", "reward", "controller"))),
    (
        "Samplers",
        (
            Panel(
                title="Samplers",
                queries=[
                    (gauge("samplers_serving"), "{{run}} serving"),
                    (gauge("samplers_starting"), "{{run}} starting"),
                ],
            ),
            Panel(
                title="Groups",
                queries=[
                    (gauge("groups_sampling"), "{{run}} being sampled"),
                    (gauge("groups_in_flight"), "{{run}} in flight after the step"),
                    (gauge("groups_finished"), "{{run}} finished and waiting"),
                ],
            ),
            Panel(
                title="Losses and restarts",
                queries=[
                    (rate("actor_losses_total", "run", "role"), "{{run}} {{role}} lost"),
                    (rate("actor_restarts_total", "run", "role"), "{{run}} {{role}} again"),
                ],
                unit="cps",
            ),
            Panel(
                title="Busy share of each sampler",
                queries=[
                    (
                        rate("actor_seconds_total", "run", "actor", selector=f'{RUN}, role="sampler", state="generate"')
                        + " / "
                        + rate("actor_seconds_total", "run", "actor", selector=f'{RUN}, role="sampler"'),
                        "{{run}} {{actor}}",
                    )
                ],
                unit="percentunit",
                width=24,
                top=1.0,
            ),
        ),
    ),
    (
        "Server (weaver-rl serve)",
        (
            Panel(
                title="Requests/s",
                queries=[
                    (rate("service_requests_total", "endpoint", "status", selector=SERVER), "{{endpoint}} {{status}}")
                ],
                unit="reqps",
            ),
            Panel(
                title="Request time, 95 %",
                queries=[(quantile(0.95, "service_request_seconds", "endpoint"), "{{endpoint}}")],
                unit="s",
                about="Polls are held until there is something to say.",
            ),
            Panel(
                title="Operation time, 95 %",
                queries=[(quantile(0.95, "service_operation_seconds", "kind"), "{{kind}}")],
                unit="s",
            ),
            Panel(
                title="Operations",
                queries=[
                    (gauge("service_operations_in_flight", "kind", selector=SERVER, by="server"), "{{kind}} in flight"),
                    (
                        gauge("service_queue_depth", "base_model", selector=SERVER, by="server"),
                        "queue of {{base_model}}",
                    ),
                ],
            ),
            Panel(
                title="Operations that failed/s",
                queries=[
                    (rate("service_operations_total", "kind", selector=f'{SERVER}, status="error"'), "{{kind}}"),
                ],
                unit="ops",
            ),
            Panel(
                title="Tokens/s",
                queries=[
                    (rate("service_sampled_tokens_total", "base_model", selector=SERVER), "{{base_model}} sampled"),
                    (rate("service_trained_tokens_total", "base_model", selector=SERVER), "{{base_model}} trained"),
                ],
            ),
            Panel(
                title="Engines and learners up",
                queries=[
                    (
                        gauge("service_engines_up", "base_model", selector=SERVER, by="server"),
                        "engines of {{base_model}}",
                    ),
                    (
                        gauge("service_learners_up", "base_model", selector=SERVER, by="server"),
                        "learners of {{base_model}}",
                    ),
                ],
            ),
            Panel(
                title="Optimizer steps/s",
                queries=[(rate("service_weight_versions_total", "base_model", selector=SERVER), "{{base_model}}")],
            ),
            Panel(
                title="What clients measure",
                queries=[(gauge("service_session_metric", "metric", selector=SERVER, by="server"), "{{metric}}")],
            ),
        ),
    ),
)


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana imports it."""
    return {
        "title": "weaver-rl",
        "uid": "weaver-rl",
        "tags": ["weaver-rl", "ray"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"},
                _variable("run", "Run", "ray_weaver_rl_step"),
                _variable("server", "Server", "ray_weaver_rl_service_engines_up"),
            ]
        },
        "annotations": {"list": []},
        "panels": list(_panels()),
    }


def _variable(name: str, label: str, metric: str) -> dict[str, Any]:
    query = f"label_values({metric}, {name})"
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": SOURCE,
        "definition": query,
        "query": {"query": query, "refId": f"{name}s"},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def _panels() -> Iterator[dict[str, Any]]:
    number, y = 0, 0
    for title, panels in ROWS:
        number += 1
        yield {
            "id": number,
            "type": "row",
            "title": title,
            "collapsed": False,
            "panels": [],
            "gridPos": _place(0, y, WIDTH, 1),
        }
        y += 1
        x, height = 0, 0
        for panel in panels:
            if x + panel.width > WIDTH:
                x, y, height = 0, y + height, 0
            number += 1
            own = HEIGHT if panel.kind == "timeseries" else HEIGHT // 2
            yield _panel(panel, number) | {"gridPos": _place(x, y, panel.width, own)}
            x, height = x + panel.width, max(height, own)
        y += height


def _place(x: int, y: int, width: int, height: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": width, "h": height}


def _panel(panel: Panel, number: int) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit}
    if panel.kind == "timeseries":
        is_stacked = panel.stacking != "none"
        defaults["custom"] = {
            "fillOpacity": 60 if is_stacked else 0,
            "lineWidth": 0 if is_stacked else 1,
            "showPoints": "never",
            "stacking": {"mode": panel.stacking, "group": "A"},
        }
    if panel.top is not None:
        defaults |= {"min": 0, "max": panel.top}
    options: dict[str, Any] = {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}}
    if panel.kind == "stat":
        options = {"reduceOptions": {"calcs": ["lastNotNull"]}, "textMode": "value_and_name"}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": SOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": [
            {"refId": chr(ord("A") + place), "expr": query, "legendFormat": legend, "datasource": SOURCE}
            for place, (query, legend) in enumerate(panel.queries)
        ],
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(dashboard(), indent=2) + "\n")
