"""What was measured, as rows, and how rows are printed and written. It measures nothing."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from benchmarks.alternation import Ratio

FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Aim:
    """The bound that a row should keep."""

    kind: Literal["at least", "at most"]
    value: float

    def met_by(self, value: float) -> bool:
        return value >= self.value if self.kind == "at least" else value <= self.value


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One comparison.

    Example:
        Row(benchmark="sampler", case="quickstart, 8 tokens", quantity="tokens/s", ours=9000.0, baseline=9100.0,
            baseline_name="vllm.LLM", ratio=Ratio.of([0.98, 0.99]), aim=Aim(kind="at least", value=0.95))
    """

    benchmark: str
    case: str
    quantity: str
    """What `ours` and `baseline` are, with the unit."""
    ours: float
    """Median over the rounds."""
    baseline: float | None = None
    """Median over the rounds; None where there is nothing to stand beside."""
    baseline_name: str = ""
    ratio: Ratio | None = None
    """ours / baseline, round by round; without a baseline the spread of `ours` itself."""
    aim: Aim | None = None
    """Bound of the ratio's median."""
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the aim is met; None without one."""
        return None if self.aim is None or self.ratio is None else self.aim.met_by(self.ratio.median)


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """One call of the command."""

    machine: dict[str, Any]
    command: str
    rows: Sequence[Row]
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of each benchmark, start-up included."""
    failures: dict[str, str] = field(default_factory=dict)
    """Benchmarks that could not be measured, and why."""

    def to_json(self) -> str:
        content = {
            "format": FORMAT,
            "command": self.command,
            "machine": self.machine,
            "rows": [asdict(row) | {"met": row.met} for row in self.rows],
            "seconds": {name: round(seconds, 1) for name, seconds in self.seconds.items()},
            "failures": self.failures,
        }
        return json.dumps(content, indent=2, allow_nan=False) + "\n"

    def write(self, path: Path) -> None:
        """Appears whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=path.parent, prefix=".results-")
        with os.fdopen(handle, "w") as file:
            file.write(self.to_json())
        Path(aside).replace(path)

    def table(self) -> Table:
        table = Table(title="weaver-rl, measured", title_justify="left", show_lines=False)
        for name in ("benchmark", "case", "quantity", "baseline"):
            table.add_column(name, overflow="fold")
        for name in ("ours", "theirs", "ratio", "quartiles", "aim"):
            table.add_column(name, justify="right")
        for row in self.rows:
            table.add_row(row.benchmark, row.case, row.quantity, row.baseline_name, *_figures(row))
        return table


def _figures(row: Row) -> tuple[str, ...]:
    ratio = row.ratio if row.baseline is not None else None
    spread = row.ratio
    return (
        number(row.ours),
        "" if row.baseline is None else number(row.baseline),
        "" if ratio is None else f"{ratio.median:.3g}",
        "" if spread is None or spread.rounds < 2 else f"{spread.low:.3g}–{spread.high:.3g}",
        _verdict(row),
    )


def _verdict(row: Row) -> str:
    if row.aim is None:
        return ""
    sign = "≥" if row.aim.kind == "at least" else "≤"
    colour, word = {True: ("green", "met"), False: ("red", "missed"), None: ("yellow", "not measured")}[row.met]
    return f"{sign} {row.aim.value:g} [{colour}]{word}[/]"


def number(value: float) -> str:
    """Three or four significant digits, thousands separated, never an exponent: 12,345 · 12.3 · 0.0123."""
    if value == 0:
        return "0"
    magnitude = abs(value)
    if magnitude >= 1000:
        return f"{value:,.0f}"
    digits = 0 if magnitude >= 100 else 1 if magnitude >= 10 else 2 if magnitude >= 1 else 4
    return f"{value:.{digits}f}"
