"""The examples, as a user starts them: as scripts, with nothing but WEAVER_BASE_URL (and a key)."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from serve_parts import KEYS, REPOSITORY, RunningServer

pytest_plugins = ("serve_fixtures",)
pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


def run_example(server: RunningServer, name: str, *arguments: str) -> str:
    environment = os.environ | {"WEAVER_BASE_URL": server.url, "WEAVER_API_KEY": KEYS["anne"]}
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "examples" / name), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def numbers(text: str, label: str) -> list[float]:
    return [float(value) for value in re.findall(rf"{label} +(-?[\d.]+)", text)]


def test_supervised_fine_tuning(server: RunningServer):
    output = run_example(server, "sft.py", "--steps", "30")
    losses = numbers(output, "loss")
    assert losses[-1] < 0.4 * losses[0], output


def test_a_reinforcement_learning_loop(server: RunningServer):
    output = run_example(server, "rl_loop.py", "--steps", "15")
    rewards = numbers(output, "mean reward")
    assert len(rewards) == 15
    assert sum(rewards[-3:]) / 3 > 0.5 > 0.2 > sum(rewards[:3]) / 3, output


def test_a_custom_loss(server: RunningServer):
    output = run_example(server, "custom_loss.py", "--steps", "8")
    losses, margins = numbers(output, "loss"), numbers(output, "margin")
    assert losses[-1] < losses[0]
    assert margins[-1] > margins[0]
