"""What Prometheus would see of a run and of a server on a real cluster: scraped from the metrics port of the node."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import COMMAND, REPOSITORY, TINY
from prometheus_client.parser import text_string_to_metric_families
from ray_nodes import TOKEN, free_port, ray_head

from weaver_rl.ledger import read_ledger
from weaver_rl.metrics import read_metrics
from weaver_rl.prometheus import EXPORTED_AS, LIVE, RAY_LABELS, Exported, place_of, run_metrics
from weaver_rl.run_folder import RunFolder
from weaver_rl.service.metrics_table import SERVICE_METRICS

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

OURS = f"{EXPORTED_AS}weaver_rl_"
SCRAPE_EVERY_S = 0.5
GONE_WITHIN_S = 10.0

Series = tuple[str, frozenset[tuple[str, str]]]


@dataclass(frozen=True)
class Scrape:
    """What the node answered, without the labels that Ray adds; two processes' counters are added up."""

    values: dict[Series, float] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)

    def value(self, name: str, **labels: str) -> float | None:
        return self.values.get((EXPORTED_AS + name, frozenset(labels.items())))

    def gauges(self) -> dict[Series, float]:
        return {series: value for series, value in self.values.items() if self.kinds[series[0]] == "gauge"}


@dataclass(frozen=True)
class Head:
    """A Ray head in processes of its own."""

    address: str
    metrics_port: int

    def scrape(self) -> Scrape:
        found = Scrape()
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name.startswith(OURS):
                    labels = frozenset((k, v) for k, v in sample.labels.items() if k not in RAY_LABELS)
                    found.values[sample.name, labels] = found.values.get((sample.name, labels), 0.0) + sample.value
                    found.kinds[sample.name] = family.type
        return found

    def scraped_until(self, seen: Callable[[Scrape], bool], within_s: float) -> Scrape:
        end = time.monotonic() + within_s
        while not seen(scrape := self.scrape()):
            assert time.monotonic() < end, scrape
            time.sleep(SCRAPE_EVERY_S)
        return scrape


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    port = free_port()
    often = json.dumps({"metrics_report_interval_ms": 1000})
    with ray_head(f"--metrics-export-port={port}", f"--system-config={often}") as address:
        yield Head(address, port)


def command(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=REPOSITORY,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | TOKEN | {"COLUMNS": "200"},
        start_new_session=True,
    )


def check_names(scrapes: list[Scrape], table: tuple[Exported, ...], common: str) -> None:
    """Everything seen is in the table, with its kind and its labels."""
    rows = {name: row for row in table for name in row.series}
    for scrape in scrapes:
        for name, labels in scrape.values:
            row = rows[name]
            assert {key for key, _ in labels} - {"le"} == set(row.labels), name
            assert scrape.kinds[name] == row.kind, name
            assert common in row.labels


def of_step(values: dict[str, float]) -> dict[Series, float]:
    """A step's metrics as they are to be seen."""
    found: dict[Series, float] = {}
    for name, value in values.items():
        exported, labels = place_of(name)
        found[EXPORTED_AS + exported, frozenset((labels | {"run": "tiny"}).items())] = value
    return found


def test_a_run_is_seen_as_metrics_jsonl_has_it_and_then_no_more(head: Head, tmp_path: Path):
    folder = RunFolder(tmp_path / "run")
    training = command("train", str(TINY), f"run_dir={folder.path}", "num_steps=4", "--address", head.address)
    scrapes = []
    try:
        while training.poll() is None:
            scrapes.append(head.scrape())
            time.sleep(SCRAPE_EVERY_S)
        output = training.communicate(timeout=60)[0]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(training.pid, signal.SIGKILL)
    assert training.returncode == 0, output
    check_names(scrapes, run_metrics(), "run")

    lines = list(read_metrics(folder.metrics_file))
    last = lines[-1]
    held = {name: value for line in lines for name, value in line.values.items() if name.startswith("eval/")}
    live = {row.series[0] for row in LIVE}
    of_last = [scrape for scrape in scrapes if scrape.value("weaver_rl_step", run="tiny") == last.step]
    assert of_last, [scrape.value("weaver_rl_step", run="tiny") for scrape in scrapes]
    seen = [{series: value for series, value in it.gauges().items() if series[0] not in live} for it in of_last]
    # Ray reads a process while it writes: one of several may be half of this step and half of the one before.
    assert of_step(held | dict(last.values)) in seen, seen[-1]
    assert max(scrape.value("weaver_rl_samplers_serving", run="tiny") or 0 for scrape in scrapes) == 1

    after = head.scraped_until(lambda scrape: not scrape.gauges(), GONE_WITHIN_S)
    assert after.value("weaver_rl_actor_losses_total", run="tiny", role="sampler") == 0
    seconds: dict[Series, float] = {}
    for row in read_ledger(folder.ledger_file):
        for state, value in row.seconds.items():
            labels = {"run": "tiny", "actor": row.actor, "role": row.role, "state": state}
            series = f"{EXPORTED_AS}weaver_rl_actor_seconds_total", frozenset(labels.items())
            seconds[series] = seconds.get(series, 0.0) + value
    assert seconds
    counted = {series: value for series, value in after.values.items() if series[0].endswith("actor_seconds_total")}
    assert counted == pytest.approx({series: value for series, value in seconds.items() if value > 0}, abs=1e-4)


def test_a_server_counts_its_requests(head: Head, tmp_path: Path):
    arguments = ["models.0.preload=false", "http.port=0", f"state_dir={tmp_path / 'state'}", "name=tiny"]
    config = REPOSITORY / "configs" / "serve_quickstart.yaml"
    serving = command("serve", str(config), *arguments, "--address", head.address)
    assert serving.stdout is not None
    try:
        url = next(line.split()[-1] for line in serving.stdout if "weaver-rl serves" in line)
        for _ in range(3):
            with urllib.request.urlopen(f"{url}/health", timeout=10) as answer:
                assert answer.status == 200
        of = {"server": "tiny", "endpoint": "/health", "method": "GET"}
        scrape = head.scraped_until(
            lambda scrape: scrape.value("weaver_rl_service_requests_total", status="200", **of) == 3, 30
        )
    finally:
        serving.send_signal(signal.SIGTERM)
        output = serving.communicate(timeout=60)[0]
    assert serving.returncode == 130, output
    of_server = Scrape(
        {series: value for series, value in scrape.values.items() if "weaver_rl_service" in series[0]}, scrape.kinds
    )
    check_names([of_server], SERVICE_METRICS, "server")
    assert of_server.value("weaver_rl_service_request_seconds_count", **of) == 3
    assert of_server.value("weaver_rl_service_engines_up", server="tiny", base_model="weaver-rl/tiny") == 0
    head.scraped_until(lambda scrape: not scrape.gauges(), GONE_WITHIN_S)
