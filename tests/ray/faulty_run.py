"""Run as a program: `weaver-rl` whose samplers have faults of their own (faulty_sampler.py)."""

from __future__ import annotations

import faulty_sampler

import actors.spawn
from weaver_rl.cli import main

# A class of an importable module: Ray sends it by name, and the workers find it on PYTHONPATH.
actors.spawn.Sampler = faulty_sampler.FaultySampler  # type: ignore[misc]
main()
