"""Findings on the terminal, or as JSON. It knows no check."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from weaver_rl.check.checklist import Check, Entry
from weaver_rl.check.finding import Finding, RoleMemory

STYLE = {"pass": "green", "warn": "yellow", "fail": "bold red"}
INDENT = 2
SUBJECT_WIDTH = 24
NAMED_IN_SUMMARY = 4
Checked = tuple[Check, tuple[Entry, ...]]


def print_group(console: Console, check: Check, entries: Sequence[Entry]) -> None:
    """The title, the table of memory where there is one, then a line for each finding with its advice below."""
    console.print(Text(check.title, style="bold"))
    roles = [entry for entry in entries if isinstance(entry, RoleMemory)]
    if roles:
        console.print(Padding(memory_table(roles), (0, 0, 0, INDENT)))
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(max_width=SUBJECT_WIDTH, min_width=SUBJECT_WIDTH, overflow="fold")
    grid.add_column(overflow="fold")
    for finding in _findings(entries):
        words = Text(finding.seen)
        if finding.advice:
            words.append(f"\n→ {finding.advice}", style="italic")
        grid.add_row(Text(finding.level, style=STYLE[finding.level]), Text(finding.subject), words)
    console.print(Padding(grid, (0, 0, 1, INDENT)))


def memory_table(roles: Sequence[RoleMemory]) -> Table:
    """A column for each role, a row for each part that any of them has; MiB of one process."""
    table = Table(title="estimated MiB of each process", title_justify="left", title_style="italic", box=None)
    table.add_column("", style="dim")
    for role in roles:
        table.add_column(f"{role.count} × {role.role}\n{role.where}", justify="right")
    sizes = [{part.name: part.num_bytes for part in role.parts} for role in roles]
    for name in dict.fromkeys(part.name for role in roles for part in role.parts):
        table.add_row(name, *(_mib(size[name]) if name in size else "" for size in sizes))
    table.add_row("in all", *(_mib(role.total_bytes) for role in roles), style="bold")
    there = ("unknown" if role.capacity_bytes is None else _mib(role.capacity_bytes) for role in roles)
    table.add_row("there is", *there)
    return table


def summary(checked: Iterable[Checked]) -> str:
    """`2 failures, 1 warning: …`, failures first."""
    findings = [(check, finding) for check, entries in checked for finding in _findings(entries)]
    failures = [f"{check.title}: {finding.subject}" for check, finding in findings if finding.level == "fail"]
    warnings = [f"{check.title}: {finding.subject}" for check, finding in findings if finding.level == "warn"]
    if not failures and not warnings:
        return f"all {len(findings)} lines pass"
    counts = [_count(len(failures), "failure"), _count(len(warnings), "warning")]
    named = (failures + warnings)[:NAMED_IN_SUMMARY]
    more = len(failures) + len(warnings) - len(named)
    return ", ".join(counts) + ": " + "; ".join(named) + (f"; and {more} more" if more else "")


def has_failed(checked: Iterable[Checked]) -> bool:
    return any(finding.level == "fail" for _, entries in checked for finding in _findings(entries))


def as_json(checked: Sequence[Checked]) -> str:
    """`findings`, `memory` and `summary`, for programs."""
    content = {
        "findings": [
            {"check": check.title, **asdict(finding)} for check, entries in checked for finding in _findings(entries)
        ],
        "memory": [
            asdict(entry) | {"total_bytes": entry.total_bytes}
            for _, entries in checked
            for entry in entries
            if isinstance(entry, RoleMemory)
        ],
        "summary": summary(checked),
    }
    return json.dumps(content, indent=2, ensure_ascii=False)


def _findings(entries: Sequence[Entry]) -> list[Finding]:
    return [entry for entry in entries if isinstance(entry, Finding)]


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):,.0f}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
