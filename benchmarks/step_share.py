"""Share of a synchronous step outside sample, score, learn and sync, from the metrics of a real, short run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.alternation import Ratio
from benchmarks.quickstart import CONFIG
from benchmarks.results import Aim, Row
from benchmarks.scale import Scale

STAGES = ("sample", "score", "learn", "sync")
TIMEOUT_S = 300.0


def measure(scale: Scale, folder: Path) -> list[Row]:
    """Rows for the quickstart's steps: the share and, for scale, the seconds of a step."""
    run_dir = folder / "run"
    _train(run_dir, scale, num_steps=4 if scale.quick else 14)
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    kept = [step for step in steps if step["phase"] == "train"][1:-1]
    shares = Ratio.of([outside_share(step) for step in kept])
    seconds = Ratio.of([step["seconds/step"] for step in kept])
    mean = sum(shares.values) / len(shares.values)
    return [
        Row(
            benchmark="step",
            case=f"quickstart, {len(kept)} synchronous steps (first and last left out)",
            quantity="share outside sample, score, learn and sync",
            ours=shares.median,
            ratio=shares,
            aim=Aim(kind="at most", value=0.05),
            note=f"mean {mean:.4f}",
        ),
        Row(
            benchmark="step",
            case=" · ".join(f"{stage} {_median(kept, stage):.3g} s" for stage in (*STAGES, "other", "wait")),
            quantity="seconds of a step",
            ours=seconds.median,
            ratio=seconds,
        ),
    ]


def outside_share(step: Mapping[str, float]) -> float:
    """(step − sample − score − learn − sync) / step."""
    inside = sum(step.get(f"seconds/{stage}", 0.0) for stage in STAGES)
    return (step["seconds/step"] - inside) / step["seconds/step"]


def _median(steps: Sequence[Mapping[str, float]], stage: str) -> float:
    return Ratio.of([step.get(f"seconds/{stage}", 0.0) for step in steps]).median


def _train(run_dir: Path, scale: Scale, num_steps: int) -> None:
    overrides = [
        f"run_dir={run_dir}",
        "warm_start.num_steps=5",
        f"num_steps={num_steps}",
        "eval.every=0",
        "eval.num_prompts=1",
        "checkpoint.every=0",
        "cluster.address=local",
        f"learner.num_threads={scale.num_threads}",
        f"sampler.num_threads={scale.num_threads}",
    ]
    command = [sys.executable, "-c", "from weaver_rl.cli import main; main()", "train", str(CONFIG), *overrides]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        env=environment,
    )
    if done.returncode != 0:
        raise RuntimeError(f"weaver-rl train ended with status {done.returncode}:\n{done.stdout[-2000:]}")
