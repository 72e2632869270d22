"""`weaver-rl check` on real clusters, and on the real small model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY, TINY, run
from ray_nodes import FREE_CPUS, TOKEN, free_port

pytest_plugins = ("head_fixtures",)
pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]


def findings(output: str) -> dict[str, dict[str, str]]:
    content = json.loads(output[output.index("{") :])
    return {line["subject"]: line for line in content["findings"]}


def test_a_cluster_with_too_little_is_named_and_left_as_it_was(head: str) -> None:
    ended = run("check", str(TINY), "--json", "--address", head, "sampler.num_replicas=3", env=TOKEN)
    assert ended.status == 1, ended.output
    found = findings(ended.output)
    assert [subject for subject, line in found.items() if line["level"] == "fail"] == ["placement"]
    assert "CPU: asked 4, available 2" in found["placement"]["seen"]
    assert head in found["cluster"]["seen"]
    assert found["nodes"]["seen"].startswith("1 of 1 have the same")
    assert found["ray there"]["level"] == "pass"
    enough = run("check", str(TINY), "--json", "--address", head, env=TOKEN)
    assert enough.status == 0, enough.output
    assert findings(enough.output)["placement"]["level"] == "pass"
    seen = subprocess.run(
        [sys.executable, "-c", FREE_CPUS, head], env=os.environ | TOKEN, capture_output=True, text=True, timeout=60
    )
    assert seen.stdout.split()[-1] == "2.0", seen


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "http://127.0.0.1:{}"])
def test_an_address_where_nobody_answers_is_one_line_in_time(form: str) -> None:
    address = form.format(free_port())
    started = time.monotonic()
    ended = run("check", str(TINY), "--json", "--address", address, env=TOKEN)
    assert time.monotonic() - started < 90
    assert ended.status == 1, ended.output
    line = findings(ended.output)["cluster"]
    assert line["level"] == "fail"
    assert address in line["seen"]
    assert "answers at" in line["seen"]


def test_the_real_small_model_passes(smollm2: tuple[Path, Path], tmp_path: Path) -> None:
    config, cache = REPOSITORY / "configs" / "smollm2_cpu.yaml", {"XDG_CACHE_HOME": str(smollm2[0])}
    ended = run("check", str(config), "--json", "--no-cluster", f"run_dir={tmp_path}", env=cache)
    assert ended.status == 0, ended.output
    found = findings(ended.output)
    assert {line["level"] for line in found.values()} == {"pass"}, found
    assert "0.538 GB of weights" in found["model"]["seen"] or "134,515,008" in found["model"]["seen"]
    assert "'<|im_end|>' (2)" in found["stop tokens"]["seen"]
    assert "<|im_start|>assistant" in found["chat template"]["seen"]


@pytest.mark.parametrize("checkpointing", [0, 1])
def test_a_learners_memory_is_about_what_was_estimated(checkpointing: int, tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(Path(__file__).with_name("learner_peak.py")),
        str(tmp_path),
        "4096",
        str(checkpointing),
    ]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    figures = json.loads(done.stdout.splitlines()[-1])
    # An allocator keeps what was freed, and buffers of kernels come on top.
    assert figures["measured_mib"] == pytest.approx(figures["estimated_mib"], rel=0.25), figures
