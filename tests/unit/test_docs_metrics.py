"""docs/metrics.md has every metric, as the tables have it, and every state of the ledger."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from weaver_rl.ledger import AWAITED, BUSY, STATES
from weaver_rl.metrics import METRICS
from weaver_rl.metrics_reference import reference
from weaver_rl.prometheus import run_metrics
from weaver_rl.service.metrics_table import SERVICE_METRICS

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "metrics.md"
AGAIN = "write it anew: python -m weaver_rl.metrics_reference > docs/metrics.md"


def test_the_document_is_the_generated_one():
    assert DOCUMENT.read_text() == reference(), AGAIN


def test_every_metric_is_named_there():
    text = DOCUMENT.read_text()
    missing = [metric.name for metric in METRICS if f"| `{metric.name}` |" not in text]
    missing += [row.name for row in (*run_metrics(), *SERVICE_METRICS) if not re.search(rf"`{row.name}[`{{]", text)]
    assert not missing


def test_every_state_of_the_ledger_is_explained():
    assert STATES.keys() >= {*BUSY.values(), *(f"wait for {thing}" for thing in AWAITED.values())}
    text = DOCUMENT.read_text()
    assert all(f"| `{state}` | {meaning} |" in text for state, meaning in STATES.items())


def test_files_that_the_document_names_exist():
    text = DOCUMENT.read_text()
    named = {ROOT / name for name in re.findall(r"`((?:weaver_rl|actors|deploy|docs)/[\w./-]*\w)`", text)}
    named |= {(DOCUMENT.parent / link).resolve() for link in re.findall(r"\]\(([\w./-]+)\)", text)}
    assert named
    assert not sorted(path for path in named if not path.exists())
