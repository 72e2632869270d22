"""A named fake of an engine, and a loop around it. It knows no vLLM."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np
from fakes import make_completion

from weaver_rl.engines.loop import EngineLoop
from weaver_rl.errors import EngineError
from weaver_rl.rollout import SamplingConfig
from weaver_rl.types import Adapter, Completion, Float32Array, GroupSample, SampleRequest

SAMPLING = SamplingConfig(max_tokens=4)
WAIT_S = 10.0


class FakeEngine:
    """Finishes every group after `steps_per_group` steps, a token each; stops before a step while `gate` is closed."""

    name = "sampler-0"

    def __init__(self, steps_per_group: int = 1) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.at_gate = threading.Event()
        self.steps: list[tuple[str, ...]] = []
        """The groups that were in flight at each step."""
        self.resets = 0
        self.fail_next_step: BaseException | None = None
        self.fail_reset: Exception | None = None
        self.closed = threading.Event()
        self.dropped_scores: list[str] = []
        self._left: dict[str, int] = {}
        self._num_scores = 0
        self._scores: dict[str, Float32Array | None] = {}
        self._steps_per_group = steps_per_group

    def add(self, request: SampleRequest, sampling: SamplingConfig) -> None:
        if len(request.token_ids_P) > 8:
            raise EngineError(f"group {request.group_id}: the prompt is too long")
        self._left[request.group_id] = self._steps_per_group

    def add_score(self, token_ids: Sequence[int], temperature: float, adapter: Adapter | None) -> str:
        if len(token_ids) < 2:
            raise EngineError("two tokens are needed")
        self._num_scores += 1
        self._scores[f"score-{self._num_scores}"] = None
        return list(self._scores)[-1]

    def drop_score(self, score_id: str) -> None:
        self.dropped_scores.append(score_id)
        del self._scores[score_id]

    def take_score(self, score_id: str) -> Float32Array | None:
        return self._scores.pop(score_id) if self._scores[score_id] is not None else None

    def has_work(self) -> bool:
        return bool(self._left or self._scores)

    def step(self) -> list[GroupSample]:
        self.at_gate.set()
        assert self.gate.wait(WAIT_S)
        self.steps.append(tuple(self._left))
        if self.fail_next_step is not None:
            error, self.fail_next_step = self.fail_next_step, None
            raise error
        self._scores = {score_id: np.zeros(3, np.float32) for score_id in self._scores}
        self._left = {group: left - 1 for group, left in self._left.items()}
        done = [group for group, left in self._left.items() if left == 0]
        self._left = {group: left for group, left in self._left.items() if left}
        return [self._sample(group, make_completion()) for group in done]

    def _sample(self, group_id: str, completion: Completion) -> GroupSample:
        return GroupSample(group_id=group_id, completions_G=(completion,), sampler=self.name)

    def cut_short(self) -> list[GroupSample]:
        """A completion has as many tokens as there were steps with it."""
        tokens = {group: (7,) * (self._steps_per_group - left) for group, left in self._left.items()}
        self._left = {}
        return [self._sample(group, make_completion(tokens[group])) for group in tokens]

    def abort(self, group_ids: Sequence[str]) -> None:
        for group_id in group_ids:
            del self._left[group_id]

    def abort_all(self) -> list[str]:
        lost = list(self._left)
        self._left, self._scores = {}, {}
        return lost

    def reset_cache(self) -> None:
        if self.fail_reset is not None:
            raise self.fail_reset
        self.resets += 1

    def close(self) -> None:
        self.closed.set()


class Rig:
    """An engine loop that a test can stop before a step."""

    def __init__(self, steps_per_group: int = 2) -> None:
        self.engine = FakeEngine(steps_per_group=steps_per_group)
        self.loop = EngineLoop(lambda: self.engine)
        self.loop.wait_started(WAIT_S)

    def submit(self, *group_ids: str, cold: bool = False) -> list[Future[GroupSample]]:
        return self.loop.submit([request(group_id) for group_id in group_ids], SAMPLING, cold=cold)

    def hold(self, *group_ids: str) -> list[Future[GroupSample]]:
        """Submits groups and returns once the thread stands before their first step."""
        self.engine.gate.clear()
        self.engine.at_gate.clear()
        futures = self.submit(*group_ids)
        assert self.engine.at_gate.wait(WAIT_S)
        return futures


def request(group_id: str, num_tokens: int = 2) -> SampleRequest:
    return SampleRequest(group_id=group_id, token_ids_P=(1,) * num_tokens, seeds_G=(0,))


def ids(futures: list[Future[GroupSample]]) -> list[str]:
    return [future.result(WAIT_S).group_id for future in futures]
