"""The reference of all metrics, made from their tables: names, meaning, unit, labels. It measures nothing.

`python -m weaver_rl.metrics_reference > docs/metrics.md` writes it anew; a test keeps the two equal.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

from weaver_rl.ledger import STATES
from weaver_rl.metrics import METRICS
from weaver_rl.prometheus import EXPORTED_AS, LIVE, Exported, place
from weaver_rl.service.metrics_table import SERVICE_METRICS

HEAD = """\
# Metrics

Every figure that weaver-rl shows, by name. Made from the tables in the code by
`python -m weaver_rl.metrics_reference > docs/metrics.md`; change `weaver_rl/metrics.py`, `weaver_rl/prometheus.py` or
`weaver_rl/service/metrics_table.py`, not this file.

| where | what | how it is switched on |
| --- | --- | --- |
| `metrics.jsonl` in the run folder | one object a step | always |
| `tensorboard/` in the run folder | the same scalars | always: `tensorboard --logdir runs` |
| Weights & Biases, MLflow | the same scalars, the configuration, how the run ended | section `tracking`, see below |
| `ledger.jsonl` in the run folder | seconds by actor, step and state | always |
| Prometheus | the newest step, what is counted meanwhile, the server | on Ray clusters that others started, see below |

A metric that a step does not have is left out; none is ever 0 or NaN in the place of *missing*. A run without a warm
start begins with step 0, which has `eval/…` alone: the evaluation of the policy before it is trained.
"""

PROMETHEUS = """\
## Prometheus and Grafana

Ray serves the metrics of all processes of a node at one port. On a cluster that was there before (`--address`,
`RAY_ADDRESS`, or inside a job) `weaver-rl train` and `weaver-rl serve` hand theirs to Ray; every name begins with
`ray_` there. There is nothing to switch on but the port and somebody who scrapes it:

```console
$ ray start --head --metrics-export-port=8080        # each node; `ray start --address=… --metrics-export-port=8080`
$ curl -s localhost:8080/metrics | grep ray_weaver_rl
```

[`deploy/prometheus/`](../deploy/prometheus) has scrape configurations for Ray's service-discovery file and for KubeRay,
[`deploy/grafana/`](../deploy/grafana) a dashboard. Ray reports every 10 s (`metrics_report_interval_ms` of the
cluster); of shorter steps some are seen, metrics.jsonl has them all. In a cluster that a run starts for
itself nobody scrapes, and nothing is exported.

- Gauges of a run (`run` is its `name`) show the newest step. What that step does not have disappears; `eval/…` stands
  until the next evaluation. What was measured at a step that the run went back behind disappears, too.
- When a run or server ends it takes its gauges away. If it is killed Ray drops them after two reports that it missed.
- Counters of events (losses, restarts, groups given to others, operations of a server by how they end, values left out)
  begin at 0 with each process, so that `rate` and `increase` see a single event once the 0 was scraped. Other counters
  appear with the first that is counted, which these two do not see; a rare one, such as requests with status 500, is
  seen by `sum by (…) ((X - X offset 5m) or X)`: the events of five minutes.
- Ray goes on showing the last counters of a process that ended until the node's Ray ends, as flat lines: look at how
  counters change, never at their value. Each process has a `WorkerId` of its own, so a resumed run is another series:
  `sum by (run) (rate(…))`.
- No label grows with steps, prompts, requests, sessions or models. Ray adds `Component`, `NodeAddress`, `SessionName`,
  `Version`, `WorkerId` and three about its exporter.
- A driver hands its figures to Ray on its own node, which is to be one of the cluster: not through `ray://`.
- A figure that cannot be handed over is a warning, once; it never stops a run.
"""

TRACKING = """\
## Weights & Biases and MLflow

```yaml
tracking:
  wandb: {project: my-project, mode: online}     # or offline: files under the run folder, `wandb sync` sends them
  mlflow: {experiment: my-experiment, tracking_uri: "https://mlflow.example"}    # or sqlite:////data/mlflow.db
```

`pip install "weaver-rl[wandb]"` or `"weaver-rl[mlflow]"`; without the package, or without an API key where W&B wants
one, the run does not start. [configuration.md](configuration.md) has every key.

- Names and step numbers are those of metrics.jsonl. MLflow takes few signs: others in a reward's label become `_`.
- Both run in threads of their own. When a service does not answer there is one warning, and the run goes on; when it
  answers again it gets everything, in order. The end of a run waits `tracking.end_timeout_s` for what is left, and a
  warning says when that was too short.
- W&B is waited for at the start alone. After it W&B's own process takes every step at once, and tries in silence for
  as long as the network is gone: only the warning at the end tells of such an outage. Steps count as taken once a run
  ended with everything sent; a resumed run sends the others, except those that W&B says it has.
- `--resume` goes on with the same run of the service (its identifier is in `tracking/` of the run folder), and first
  sends what metrics.jsonl has and the service lacks. Offline, W&B leaves a directory for each process, all of one run
  id; `wandb sync RUN/tracking/wandb/offline-run-*` sends them in order as one run.
- When a run goes back to a checkpoint, steps that were sent are not sent again: these services take steps in order
  only. They keep the first values, metrics.jsonl has the ones that count. Steps that still wait are forgotten, and sent
  as they come again.
- The end is W&B's exit code, with `state` and `reason` in its summary; in MLflow FINISHED, FAILED or KILLED, and the
  tag `reason`.
- `tracking_uri` takes no password: set MLFLOW_TRACKING_URI for a database that wants one, and for a server
  MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.
- MLflow's file store is closed for new data by MLflow itself; use a server or SQLite. Neither package is let report to
  its makers when nothing is to be sent (W&B offline; MLflow always, unless MLFLOW_DISABLE_TELEMETRY says otherwise).
"""


def reference() -> str:
    """The whole document."""
    return "\n".join(
        (
            HEAD,
            "## A step's metrics\n",
            "`<label>` is a reward's label, `<lag>` a number of versions.\n",
            _steps(),
            "## While a run lasts\n",
            _exported(LIVE),
            "## The ledger\n",
            "States of an actor, in `ledger.jsonl` and as label of `weaver_rl_actor_seconds_total`. Roles are "
            "`controller`,\n`sampler`, `reward` and `learner`; a learner's actors are its ranks.\n",
            _states(),
            "## A server\n",
            "Of `weaver-rl serve`; `server` is its `name`. Models are counted by the base that they were made from.\n",
            _exported(SERVICE_METRICS),
            PROMETHEUS,
            TRACKING.rstrip("\n"),
            "",
        )
    )


def _steps() -> str:
    lines = ["| Name | Unit | Meaning | In Prometheus |", "| --- | --- | --- | --- |"]
    for metric in METRICS:
        exported, labels = place(metric)
        braces = "{" + ", ".join(f"{key}={value}" for key, value in labels.items()) + "}" if labels else ""
        lines.append(f"| `{metric.name}` | {_unit(metric.unit)} | {_cell(metric.meaning)} | `{exported}{braces}` |")
    return "\n".join(lines) + "\n"


def _exported(table: Iterable[Exported]) -> str:
    lines = [
        f"| Name, after `{EXPORTED_AS}` | Kind | Labels | Unit | Meaning |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in table:
        labels = ", ".join(row.labels)
        lines.append(f"| `{row.name}` | {row.kind} | {labels} | {_unit(row.unit)} | {_cell(row.meaning)} |")
    return "\n".join(lines) + "\n"


def _states() -> str:
    lines = ["| State | Meaning |", "| --- | --- |"]
    lines += [f"| `{state}` | {meaning} |" for state, meaning in STATES.items()]
    return "\n".join(lines) + "\n"


def _unit(unit: str) -> str:
    return "" if unit == "1" else unit


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(reference())
