"""What the controller itself must remember to go on after a stop. Plain values; the learner saves its own."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from weaver_rl.errors import CheckpointError
from weaver_rl.group_stream import Backlog


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """Position of a run between two steps.

    Example:
        RunState(step=320, position=19520, baseline=None, accuracies={"300": 0.45, "320": 0.7})
    """

    step: int = 0
    """Optimizer updates done, over all phases; also the version of the weights."""
    position: int = 0
    """The next prompt of the training stream that was never asked for."""
    in_flight: tuple[int, ...] = ()
    """Positions before it that were asked for and neither trained nor finished: they are sampled again."""
    prompts_dropped: int = 0
    """Training prompts left out so far because they were too long."""
    baseline: float | None = None
    """Running baseline of `reinforce`."""
    accuracies: dict[str, float] = field(default_factory=dict)
    """Held-out accuracy by step (JSON keys are text)."""
    sampled_tokens: int = 0
    """Tokens sampled for training so far."""
    train_seconds: float = 0.0
    """Wall time of the steps of reinforcement learning so far."""

    def with_accuracy(self, accuracy: float) -> RunState:
        return replace(self, accuracies=self.accuracies | {str(self.step): accuracy})

    def backlog(self) -> Backlog:
        """What was admitted and not trained; the finished groups are in a file of their own."""
        return Backlog(position=self.position, in_flight=self.in_flight, prompts_dropped=self.prompts_dropped)

    def with_backlog(self, backlog: Backlog) -> RunState:
        return replace(
            self,
            position=backlog.position,
            in_flight=backlog.in_flight,
            prompts_dropped=backlog.prompts_dropped,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(raw: dict[str, Any]) -> RunState:
        """Raises CheckpointError when the keys are not those of this version."""
        names = {item.name for item in fields(RunState)}
        if set(raw) != names:
            raise CheckpointError(
                f"controller state has the keys {sorted(raw)}, this version needs {sorted(names)}; "
                "resume with the version that wrote it"
            )
        return RunState(**raw | {"in_flight": tuple(raw["in_flight"])})
