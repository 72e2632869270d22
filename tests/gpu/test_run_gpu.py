"""Whole runs on CUDA: weights from GPU to GPU, by CUDA IPC on one GPU and by NCCL between two."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from weaver_rl.metrics import read_metrics
from weaver_rl.run_folder import RunFolder

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

REPOSITORY = Path(__file__).parents[2]
NUM_GPUS = torch.cuda.device_count()


def _run(folder: Path, *overrides: str) -> list[dict[str, float]]:
    command = [
        str(Path(sys.executable).with_name("weaver-rl")),
        "train",
        str(REPOSITORY / "tests" / "ray" / "tiny.yaml"),
    ]
    engine = "sampler.engine_args={max_num_seqs: 32, gpu_memory_utilization: 0.2, enforce_eager: true}"
    done = subprocess.run(
        [*command, f"run_dir={folder}", engine, *overrides],
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [dict(line.values) for line in read_metrics(RunFolder(folder).metrics_file) if line.is_training]


@pytest.mark.skipif(NUM_GPUS < 1, reason="needs an NVIDIA GPU")
def test_learner_and_sampler_share_a_gpu(tmp_path: Path) -> None:
    steps = _run(tmp_path / "run", "cluster.placement=colocated")
    assert len(steps) == 6
    assert max(step["logprob_gap/mean"] for step in steps) < 0.05


@pytest.mark.skipif(NUM_GPUS < 2, reason="needs two NVIDIA GPUs")
def test_weights_travel_by_nccl(tmp_path: Path) -> None:
    steps = _run(tmp_path / "run")
    assert len(steps) == 6
    assert max(step["logprob_gap/mean"] for step in steps) < 0.05
