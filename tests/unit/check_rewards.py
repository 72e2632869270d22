"""Rewards for the checks to judge, each wrong in its own way."""

from __future__ import annotations

import time

from weaver_rl.types import Rollout


def constant(rollout: Rollout) -> float:
    return 0.5


def never_right(rollout: Rollout) -> float:
    return 0.25 if rollout.text == rollout.prompt.answer else 0.0


def not_for_empty(rollout: Rollout) -> float:
    return 1 / len(rollout.text)


def breaks(rollout: Rollout) -> float:
    raise LookupError("no judge there")


def slow(rollout: Rollout) -> float:
    time.sleep(0.05)
    return float(len(rollout.text))


def stuck(rollout: Rollout) -> float:
    time.sleep(60)
    return 0.0
