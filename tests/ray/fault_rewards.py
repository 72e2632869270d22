"""A reward that waits while a test keeps its gate closed, so that no run ends before it was disturbed."""

import time
from pathlib import Path

from weaver_rl.types import Rollout

LOOK_EVERY_S = 0.05


class Gated:
    """Shorter is better, said while the gate is open.

    Args:
        gate: a file that is there while rollouts of the training stream have to wait.
    """

    def __init__(self, gate: str) -> None:
        self._gate = Path(gate)

    def __call__(self, rollout: Rollout) -> float:
        while self._gate.exists() and not rollout.rollout_id.startswith("eval"):
            time.sleep(LOOK_EVERY_S)
        return -len(rollout.text) - 0.01 * rollout.sample_index
