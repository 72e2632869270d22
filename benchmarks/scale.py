"""How thorough a call of the benchmarks is. Nothing else."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Sizes and rounds follow from it."""

    quick: bool
    """A smoke test: seconds, figures of no worth."""
    full: bool
    """Also what needs a download-sized model."""
    num_threads: int
    """OpenMP threads of every process that computes, ours and the baselines'."""
