"""What must hold of the ledger of any run that ended well."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from weaver_rl.ledger import LedgerRow, read_ledger
from weaver_rl.metrics import read_metrics
from weaver_rl.run_folder import RunFolder

sys.path.append(str(Path(__file__).resolve().parents[1] / "unit"))

from trace_checker import check_trace

__all__ = ["check_ledger", "check_trace"]

CLOCK_S = 2e-3
"""A step's end is read once for the metrics and once for the span; rounding to microseconds per state is less."""


def check_ledger(folder: RunFolder, *actors: str, after: int = 0) -> dict[tuple[int, str], LedgerRow]:
    """A row for every step and every actor named, none twice, in order, each as long as the step; the rows.

    Args:
        after: of steps up to this one rows may be missing: the driver was killed, and took those of its last seconds.
    """
    steps = {line.step: line for line in read_metrics(folder.metrics_file)}
    rows: dict[tuple[int, str], LedgerRow] = {}
    last = 0
    for row in read_ledger(folder.ledger_file):
        assert (row.step, row.actor) not in rows
        assert row.step >= last
        last = row.step
        rows[row.step, row.actor] = row
        assert row.phase == steps[row.step].phase
        assert all(seconds >= 0 for seconds in row.seconds.values()), row
    for step, line in steps.items():
        if step <= after and (step, "controller") not in rows:
            continue
        for actor in actors:
            total = sum(rows[step, actor].seconds.values())
            assert "unknown" not in rows[step, actor].seconds
            assert total == pytest.approx(line.values["seconds/step"], abs=CLOCK_S), rows[step, actor]
        waited = rows[step, "controller"].seconds
        for stage, state in (("sample", "samplers"), ("score", "rewards"), ("learn", "learner"), ("eval", "eval")):
            assert waited.get(f"wait for {state}", 0.0) == pytest.approx(
                line.values.get(f"seconds/{stage}", 0.0), abs=CLOCK_S
            )
    return rows
