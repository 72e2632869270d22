"""The last words of a run on the terminal: what was learnt, how fast, and where everything is."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from weaver_rl.controller import RunSummary


def print_outcome(console: Console, place: Path | str, summary: RunSummary, wall_seconds: float) -> None:
    """Prints accuracy before and after, wall time, tokens/s and the paths to look at."""
    before = "not measured" if summary.accuracy_before is None else f"{summary.accuracy_before:.3f}"
    after = "not measured" if summary.accuracy_after is None else f"{summary.accuracy_after:.3f}"
    console.print(
        f"held-out accuracy: {before} before reinforcement learning, {after} at the end\n"
        f"wall time: {wall_seconds:.0f} s; {summary.tokens_per_s:,.0f} sampled tokens/s over the steps\n"
        f"policy: {place}/policy (Hugging Face directory)\n"
        f"report: {place}/report.html",
        highlight=False,
        soft_wrap=True,
    )
