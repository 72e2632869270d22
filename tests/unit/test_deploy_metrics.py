"""The dashboard asks for metrics that are exported, by labels that they have; the scrape configurations find them."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from weaver_rl.prometheus import RAY_LABELS, Exported, run_metrics
from weaver_rl.service.metrics_table import SERVICE_METRICS

pytestmark = pytest.mark.unit

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
TOKEN = re.compile(
    r"""(?P<text>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')|(?P<range>\[[^\]]*\])|(?P<word>[A-Za-z_:][\w:]*)"""
    r"""|(?P<number>[\d.]+[a-z]*)|(?P<match>=~|!~|!=|==|>=|<=|=)|(?P<sign>\S)"""
)
GROUPING = {"by", "without", "on", "ignoring", "group_left", "group_right"}
OPERATORS = {"and", "or", "unless", "bool", "offset"}
TABLE: dict[str, Exported] = {name: row for row in (*run_metrics(), *SERVICE_METRICS) for name in row.series}


@dataclass
class Query:
    """What a PromQL expression asks for."""

    metrics: set[str] = field(default_factory=set)
    labels: set[str] = field(default_factory=set)
    functions: set[str] = field(default_factory=set)


def parse(expression: str) -> Query:
    """Names of metrics, labels and functions. Text in quotes and ranges name nothing."""
    found = Query()
    tokens = [(kind, token[kind]) for token in TOKEN.finditer(expression) if (kind := token.lastgroup)]
    in_selector, grouping = False, False
    for place, (kind, text) in enumerate(tokens):
        following = tokens[place + 1][1] if place + 1 < len(tokens) else ""
        if text in "{}" and kind == "sign":
            in_selector = text == "{"
        elif text == ")" and grouping:
            grouping = False
        elif kind == "word" and (in_selector or grouping):
            found.labels.add(text)
        elif kind == "word" and text in GROUPING:
            grouping = following == "("
        elif kind == "word" and text not in OPERATORS:
            aggregates = following in GROUPING
            (found.functions if following == "(" or aggregates else found.metrics).add(text)
    return found


def test_an_expression_is_taken_apart():
    query = parse(
        'histogram_quantile(0.95, sum by (le, kind) (rate(a_bucket{server=~"$s", x!="b{c}"}[$__rate_interval])))'
        " / on (run) group_left (kind) max(b_total offset 5m) > 0.5"
    )
    assert query.metrics == {"a_bucket", "b_total"}
    assert query.labels == {"le", "kind", "server", "x", "run"}
    assert query.functions == {"histogram_quantile", "sum", "rate", "max"}


# -- the dashboard -----------------------------------------------------------------------------------------------------


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((DEPLOY / "grafana" / "weaver-rl.json").read_text())
    return loaded


def queries(dashboard: dict[str, Any]) -> Iterator[tuple[str, Query]]:
    """Every expression, those of variables too, by where it stands."""
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], parse(target["expr"])
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            found = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
            assert found is not None
            yield variable["name"], Query({found[1]}, {found[2]}, set())


def test_the_dashboard_is_the_generated_one(dashboard: dict[str, Any]):
    again = "write it anew: python deploy/grafana/dashboard.py > deploy/grafana/weaver-rl.json"
    assert dashboard == load(DEPLOY / "grafana" / "dashboard.py").dashboard(), again


def test_every_metric_in_a_panel_is_exported_and_has_those_labels(dashboard: dict[str, Any]):
    seen = set()
    for where, query in queries(dashboard):
        assert query.metrics, where
        assert query.metrics <= TABLE.keys(), (where, query.metrics - TABLE.keys())
        for name in query.metrics:
            row = TABLE[name]
            allowed = {*row.labels, *RAY_LABELS, *(["le"] if row.kind == "histogram" else [])}
            assert query.labels <= allowed, (where, name, query.labels - allowed)
            assert ("rate" in query.functions) == (row.kind != "gauge"), (where, name)
        seen |= query.metrics
    assert len(seen) > 40


def test_legends_name_labels_that_the_query_keeps(dashboard: dict[str, Any]):
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            used = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert used <= parse(target["expr"]).labels, (panel["title"], target)


def test_the_dashboard_is_one_that_grafana_takes(dashboard: dict[str, Any]):
    panels = dashboard["panels"]
    ids = [panel["id"] for panel in panels]
    assert len(ids) == len(set(ids))
    places: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] >= 0
        assert at["x"] + at["w"] <= 24
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & places, panel["title"]
        places |= cells
        assert panel["type"] in ("row", "timeseries", "stat")
        refs = [target["refId"] for target in panel.get("targets", ())]
        assert len(refs) == len(set(refs))
        assert bool(refs) == (panel["type"] != "row")
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert {"datasource", "run", "server"} == variables.keys()
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    text = json.dumps(dashboard)
    assert set(re.findall(r"\$\{?(\w+)", text)) - {"__rate_interval", "__all"} == variables.keys()
    sources = [panel["datasource"]["uid"] for panel in panels if "datasource" in panel]
    assert set(sources) == {"${datasource}"}
    assert dashboard["schemaVersion"] >= 36


def test_a_time_budget_adds_up_to_a_whole(dashboard: dict[str, Any]):
    budgets = [panel for panel in dashboard["panels"] if panel["title"].startswith("Time of the")]
    assert len(budgets) == 4
    for panel in budgets:
        assert panel["fieldConfig"]["defaults"]["custom"]["stacking"]["mode"] == "percent"
        assert "state" in parse(panel["targets"][0]["expr"]).labels


# -- Prometheus --------------------------------------------------------------------------------------------------------


def test_prometheus_finds_the_nodes_of_a_ray_cluster():
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    assert config.keys() == {"global", "scrape_configs"}
    (job,) = config["scrape_configs"]
    (discovery,) = job["file_sd_configs"]
    assert [Path(name).name for name in discovery["files"]] == [PROMETHEUS_SERVICE_DISCOVERY_FILE]
    for relabel in job["metric_relabel_configs"]:
        check_relabel(relabel)


def test_the_pod_monitor_finds_what_kuberay_starts():
    monitor = yaml.safe_load((DEPLOY / "prometheus" / "podmonitor.yaml").read_text())
    assert (monitor["apiVersion"], monitor["kind"]) == ("monitoring.coreos.com/v1", "PodMonitor")
    (expression,) = monitor["spec"]["selector"]["matchExpressions"]
    assert (expression["key"], expression["operator"]) == ("ray.io/node-type", "In")
    assert set(expression["values"]) == {"head", "worker"}
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert (endpoint["port"], endpoint["path"]) == ("metrics", "/metrics")
    for relabel in endpoint["metricRelabelings"]:
        check_relabel(relabel)
    for manifest in (DEPLOY / "kuberay").glob("*.yaml"):
        heads = [
            port for port in ports(list(yaml.safe_load_all(manifest.read_text()))) if port.get("name") == "metrics"
        ]
        assert all(port["containerPort"] == 8080 for port in heads), manifest


def check_relabel(relabel: dict[str, str]) -> None:
    """It drops nothing that a panel asks for."""
    assert relabel["action"] == "labeldrop"
    dropped = {label for label in RAY_LABELS if re.fullmatch(relabel["regex"], label)}
    assert dropped
    ours = {label for row in TABLE.values() for label in row.labels}
    assert not {label for label in ours if re.fullmatch(relabel["regex"], label)}
    assert "WorkerId" not in dropped, "two processes' counters would be one series"


def ports(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, list):
        for item in node:
            yield from ports(item)
    elif isinstance(node, dict):
        if "containerPort" in node:
            yield node
        for item in node.values():
            yield from ports(item)
