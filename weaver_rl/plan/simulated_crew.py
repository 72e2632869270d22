"""The simulated rest of a run: prompts, reward workers, and records that are kept nowhere. They know no learner."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from weaver_rl.journal import Journal
from weaver_rl.metrics import MetricsLine, MetricsWriter, Phase
from weaver_rl.plan.cores import SharedCores
from weaver_rl.plan.costs import RewardCosts
from weaver_rl.plan.recording import Recording
from weaver_rl.plan.work import BusyTimes
from weaver_rl.rollout_files import RecordedRollout
from weaver_rl.types import Prompt, RewardComponent, Rollout


class SimulatedPrompts:
    """Prompts as long as the recorded ones, without content."""

    num_dropped = 0

    def __init__(self, recording: Recording) -> None:
        self._recording = recording

    def prompt(self, index: int) -> Prompt:
        return _prompt(str(index), self._recording.group(index).prompt_tokens)

    def demonstration(self, index: int) -> tuple[Prompt, tuple[int, ...]]:
        raise NotImplementedError("a simulated run has no warm start")

    def eval_prompts(self, num: int) -> Sequence[Prompt]:
        return [_prompt(f"eval-{i}", self._recording.evaluation(i).prompt_tokens) for i in range(num)]

    def decode(self, token_ids: Sequence[int]) -> str:
        return ""


def _prompt(prompt_id: str, num_tokens: int) -> Prompt:
    return Prompt(prompt_id=prompt_id, text="", token_ids_P=(0,) * num_tokens)


class SimulatedRewardWorker:
    """Answers as was recorded, after as long."""

    def __init__(
        self, name: str, recording: Recording, costs: RewardCosts, cores: SharedCores, busy: BusyTimes
    ) -> None:
        self.name = name
        self._recording = recording
        self._costs = costs
        self._cores = cores
        self._busy = busy

    async def score(self, rollouts: Sequence[Rollout]) -> Sequence[tuple[RewardComponent, ...]]:
        group_id = rollouts[0].rollout_id.rpartition("-")[0]
        group = self._recording.of_request(group_id)
        members = self._recording.members(group_id)
        with self._busy.at(self.name, "score"):
            await asyncio.sleep(self._costs.functions([group.reward_seconds_G[member] for member in members]))
            await self._cores.work(self._costs.computing(group, len(members)), 1.0)
        return [group.components_G[member] for member in members]

    async def check(self) -> None:
        """It lives."""

    async def close(self, *, kill: bool = False) -> None:
        """Nothing is left to end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedRewardWorkers:
    """Makes simulated reward workers, at once."""

    recording: Recording
    costs: RewardCosts
    cores: SharedCores
    busy: BusyTimes

    async def start(self, name: str) -> SimulatedRewardWorker:
        return SimulatedRewardWorker(name, self.recording, self.costs, self.cores, self.busy)


class DriverTimeJournal(Journal):
    """Keeps no event. The first group of every step that was consumed costs the driver the time that it takes itself.

    Args:
        spend: keeps the driver busy for the step that it is told.
    """

    def __init__(self, spend: Callable[[int], None]) -> None:
        self._spend = spend
        self._step = 0

    def trained(self, group_id: str, *, step: int, order: int) -> None:
        self._consumed(step)

    def dropped(self, group_id: str, *, step: int, reason: str) -> None:
        self._consumed(step)

    def _consumed(self, step: int) -> None:
        if step > self._step:
            self._step = step
            self._spend(step)

    async def flush(self) -> None:
        """There is nothing to wait for."""

    def close(self) -> None:
        """There is nothing to close."""

    def _append(self, *_: Any, **__: Any) -> None:
        pass


class KeptMetrics(MetricsWriter):
    """Keeps the lines and writes no file."""

    def __init__(self) -> None:
        self.lines: list[MetricsLine] = []

    def write(self, step: int, phase: Phase, values: Mapping[str, float]) -> None:
        self.lines.append(MetricsLine(step=step, phase=phase, time_s=0.0, values=dict(values)))

    def truncate_after(self, step: int) -> None:
        """A simulated run never goes back."""

    def close(self) -> None:
        """There is nothing to close."""


class SilentView:
    """A view for nobody."""

    def phase(self, name: str, total_steps: int, offset: int = 0) -> None:
        pass

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def evaluation(self, accuracy: float, step: int) -> None:
        pass

    def waiting(self, reason: str | None) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class NoFleetEvents:
    """Nobody wants to know."""

    def sampler_joined(self, name: str) -> None:
        pass

    def sampler_lost(self, name: str, reason: str, num_groups: int) -> None:
        pass

    def sampler_left(self, name: str) -> None:
        pass

    def group_reissued(self, group_id: str, sampler: str, reason: str) -> None:
        pass


def save_nothing(path: Path, step: int, records: Sequence[RecordedRollout]) -> Path:
    """In the place of rollout files."""
    return path
