"""From prompts to scored groups, running ahead of the learner as far as the lag allows. It knows no learner.

- `admit`        dispatches as many groups as there is room for; waits for nothing.
- `_sample_wave` produces sampled groups; waits for the samplers; unblocked by each group.
- `_score`       produces a scored group; waits for a reward worker.
- `take`         produces the groups of a step; waits until those are scored that it must and may train.

Synchronous sampling is `max_lag: 0`: then there is room for one step's groups, and only after the step before.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from weaver_rl.batch import ScoredGroup
from weaver_rl.pacing import Ledger
from weaver_rl.rewards.combine import combine
from weaver_rl.rewards.config import RewardSpec
from weaver_rl.roles import PromptSource, RewardPool, SamplerPool
from weaver_rl.rollout import RolloutConfig, SamplingConfig, completion_seed, group_id_of
from weaver_rl.stage_clock import StageClock
from weaver_rl.types import GroupSample, Prompt, Rollout, SampleRequest, newest_version, oldest_version
from weaver_rl.waits import current_waits


class GroupEvents(Protocol):
    """Who records the life of every group: the journal."""

    def dispatched(self, group_id: str, *, position: int, prompt_id: str, version: int) -> None: ...

    def generated(
        self, group_id: str, *, sampler: str, oldest_version: int, newest_version: int, num_tokens: int
    ) -> None: ...

    def reissued(self, group_id: str, *, sampler: str, reason: str) -> None: ...

    def scored(self, group_id: str, *, num_missing: int) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Backlog:
    """What a stream has admitted and no step has trained: a checkpoint carries it, so that nothing is lost.

    Example:
        Backlog(position=192, in_flight=(129, 130), finished=(group_128,), prompts_dropped=0)
    """

    position: int
    """The next prompt of the training stream that was never asked for."""
    in_flight: tuple[int, ...]
    """Positions admitted and not finished: they are sampled again."""
    finished: tuple[ScoredGroup, ...] = ()
    """Groups scored and not trained."""
    prompts_dropped: int = 0
    """Prompts left out because they were too long, up to here; those met for `in_flight` are met again."""


class GroupStream:
    """The groups of a run.

    Args:
        last_position: where the training stream ends for this run; no group from there on is dispatched.
    """

    def __init__(
        self,
        *,
        prompts: PromptSource,
        samplers: SamplerPool,
        rewards: RewardPool,
        config: RolloutConfig,
        specs: Sequence[RewardSpec],
        seed: int,
        last_position: int,
        events: GroupEvents,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._prompts = prompts
        self._samplers = samplers
        self._rewards = rewards
        self._config = config
        self._specs = specs
        self._seed = seed
        self._last_position = last_position
        self._events = events
        self._now = now
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._begin(Backlog(position=0, in_flight=()))

    def _begin(self, backlog: Backlog) -> None:
        self._ledger = Ledger(groups_per_step=self._config.prompts_per_step, max_lag=self._config.max_lag)
        self._position = backlog.position
        self._again = list(backlog.in_flight)
        self._num_dropped = backlog.prompts_dropped
        self._dropped_for: dict[int, int] = {}
        self._admitted: dict[int, str] = {}
        self._scoring: dict[int, GroupSample] = {}
        self._refused: set[int] = set()
        self._finished: dict[int, ScoredGroup] = {}
        self._num_sampling = 0
        self._sampling_since = 0.0
        self._sampling_seconds = 0.0
        self._failure: BaseException | None = None

    # -- life ------------------------------------------------------------------------------------------------------

    async def restore(self, backlog: Backlog, version: int) -> None:
        """Forgets everything and goes on from a backlog; `version`: that of the weights now.

        A finished group that could not be trained in time any more is sampled again (`max_lag` was lowered).
        """
        await self.stop()
        self._begin(backlog)
        due_first = sorted(backlog.finished, key=lambda group: (group.oldest_version, group.position))
        for group in due_first:
            last_step = group.oldest_version + self._config.max_lag + 1
            if len(self._finished) >= (last_step - version) * self._config.prompts_per_step:
                self._again.append(group.position)
                continue
            self._ledger.admit(group.position, group.oldest_version)
            self._ledger.finish(group.position)
            self._admitted[group.position] = group.group_id
            self._finished[group.position] = group
        self._again.sort()

    async def stop(self) -> None:
        """Ends everything in flight."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def backlog(self) -> Backlog:
        """What is admitted and not trained now."""
        in_flight = sorted([*(p for p in self._admitted if p not in self._finished), *self._again])
        return Backlog(
            position=self._position,
            in_flight=tuple(in_flight),
            finished=tuple(self._finished[position] for position in sorted(self._finished)),
            prompts_dropped=self._num_dropped - sum(self._dropped_for.get(position, 0) for position in in_flight),
        )

    # -- ahead of the learner --------------------------------------------------------------------------------------

    def admit(self, version: int) -> int:
        """Dispatches groups while there is room; every sampler holds `version`. Returns how many."""
        positions = self._next_positions(self._ledger.room())
        prompts = [self._prompt(position) for position in positions]
        requests = [self._request(position, prompt) for position, prompt in zip(positions, prompts, strict=True)]
        for position, prompt, request in zip(positions, prompts, requests, strict=True):
            self._ledger.admit(position, version)
            self._admitted[position] = request.group_id
            self._events.dispatched(request.group_id, position=position, prompt_id=prompt.prompt_id, version=version)
        self._sample(positions, prompts, requests)
        return len(requests)

    def _next_positions(self, number: int) -> list[int]:
        again, self._again = self._again[:number], self._again[number:]
        fresh = range(self._position, min(self._position + number - len(again), self._last_position))
        self._position = max(self._position, fresh.stop)
        return [*again, *fresh]

    def _prompt(self, position: int) -> Prompt:
        before = self._prompts.num_dropped
        prompt = self._prompts.prompt(position)
        if dropped := self._prompts.num_dropped - before:
            self._num_dropped += dropped
            self._dropped_for[position] = dropped
        return prompt

    def _request(self, position: int, prompt: Prompt) -> SampleRequest:
        seeds = (
            completion_seed(self._seed, position, prompt.prompt_id, index)
            for index in range(self._config.samples_per_prompt)
        )
        return SampleRequest(group_id=group_id_of(position), token_ids_P=prompt.token_ids_P, seeds_G=tuple(seeds))

    async def _sample_wave(
        self, positions: Sequence[int], prompts: Sequence[Prompt], requests: Sequence[SampleRequest]
    ) -> None:
        asked = {r.group_id: (p, prompt, r) for p, prompt, r in zip(positions, prompts, requests, strict=True)}
        left = len(requests)
        try:
            async for sample in self._samplers.generate(requests, self._config.sampling):
                left -= 1
                self._count_sampling(-1)
                position, prompt, request = asked[sample.group_id]
                self._record(sample)
                self._scoring[position] = sample  # at once: `distrust` must find it wherever it is
                self._spawn(self._finish(position, sample, prompt, request))
                self._changed.set()
        finally:
            self._count_sampling(-left)

    async def _finish(self, position: int, sample: GroupSample, prompt: Prompt, request: SampleRequest) -> None:
        try:
            scored = await self.score(sample, prompt, request, position)
        finally:
            del self._scoring[position]
        if position in self._refused:
            self._refused.remove(position)
            self._sample_again([position], sample.sampler)
            return
        num_missing = sum(rollout.reward is None for rollout in scored.scored_G)
        self._events.scored(sample.group_id, num_missing=num_missing)
        self._finished[position] = scored
        self._ledger.finish(position)
        self._changed.set()

    async def score(
        self, sample: GroupSample, prompt: Prompt, request: SampleRequest, position: int = -1
    ) -> ScoredGroup:
        """The group with its rewards."""
        rollouts = [
            Rollout(
                rollout_id=f"{sample.group_id}-{index:03d}",
                prompt=prompt,
                completion=completion,
                text=self._prompts.decode(completion.token_ids_L.tolist()),
                sample_index=index,
                seed=seed,
            )
            for index, (completion, seed) in enumerate(zip(sample.completions_G, request.seeds_G, strict=True))
        ]
        components = await self._rewards.score(rollouts)
        scored = tuple(
            combine(rollout, found, self._specs) for rollout, found in zip(rollouts, components, strict=True)
        )
        return ScoredGroup(group_id=sample.group_id, sampler=sample.sampler, scored_G=scored, position=position)

    def _record(self, sample: GroupSample) -> None:
        self._events.generated(
            sample.group_id,
            sampler=sample.sampler,
            oldest_version=oldest_version(sample.completions_G),
            newest_version=newest_version(sample.completions_G),
            num_tokens=sum(len(completion.token_ids_L) for completion in sample.completions_G),
        )

    # -- for the learner -------------------------------------------------------------------------------------------

    async def take(self, step: int, clock: StageClock) -> list[ScoredGroup]:
        """The groups of a step, in order of position. Raises what ended the sampling or scoring of any group."""
        while (chosen := self._chosen(step)) is None:
            sampling = self._waits_for_samplers()
            with (
                clock.stage("sample" if sampling else "score"),
                current_waits().waiting("learner", f"the groups of step {step}", on=self._missing, root=True),
            ):
                while self._chosen(step) is None and self._waits_for_samplers() == sampling:
                    self._changed.clear()
                    await self._changed.wait()
        self._ledger.take(chosen)
        for position in chosen:
            del self._admitted[position]
            self._dropped_for.pop(position, None)
        return [self._finished.pop(position) for position in chosen]

    async def sample_aside(
        self, prompts: Sequence[Prompt], requests: Sequence[SampleRequest], sampling: SamplingConfig
    ) -> list[ScoredGroup]:
        """Groups that no step trains, sampled and scored beside the stream, in the order of the requests."""
        asked = {request.group_id: (prompt, request) for prompt, request in zip(prompts, requests, strict=True)}
        scoring: dict[str, asyncio.Task[ScoredGroup]] = {}
        try:
            async for sample in self._samplers.generate(requests, sampling):
                work = self.score(sample, *asked[sample.group_id])
                scoring[sample.group_id] = asyncio.create_task(work)
            return [await scoring[request.group_id] for request in requests]
        finally:
            for task in scoring.values():
                task.cancel()
            await asyncio.gather(*scoring.values(), return_exceptions=True)

    def distrust(self, sampler: str, version: int) -> int:
        """Samples again what a sampler made with weights of `version` that were not the learner's; returns how many."""
        again = [
            p for p, group in self._finished.items() if group.sampler == sampler and group.newest_version >= version
        ]
        for position in again:
            del self._finished[position]
            self._ledger.unfinish(position)
        refused = {
            position
            for position, sample in self._scoring.items()
            if sample.sampler == sampler and newest_version(sample.completions_G) >= version
        }
        self._refused |= refused
        self._sample_again(again, sampler)
        return len(again) + len(refused)

    def metrics(self) -> dict[str, float]:
        """How much is ahead of the learner."""
        return {
            "groups/in_flight": len(self._admitted) - len(self._finished),
            "groups/finished": len(self._finished),
        }

    def sampling_seconds(self) -> float:
        """Seconds since the last call in which any group was being sampled."""
        self._count_sampling(0)
        seconds, self._sampling_seconds = self._sampling_seconds, 0.0
        return seconds

    # -- small things ----------------------------------------------------------------------------------------------

    def _sample_again(self, positions: Sequence[int], distrusted: str) -> None:
        prompts = [self._prompts.prompt(position) for position in positions]
        requests = [self._request(position, prompt) for position, prompt in zip(positions, prompts, strict=True)]
        for request in requests:
            self._events.reissued(request.group_id, sampler=distrusted, reason="its weights were not the learner's")
        self._sample(positions, prompts, requests)

    def _sample(self, positions: Sequence[int], prompts: Sequence[Prompt], requests: Sequence[SampleRequest]) -> None:
        if requests:
            self._count_sampling(len(requests))
            self._spawn(self._sample_wave(positions, prompts, requests))

    def _chosen(self, step: int) -> Sequence[int] | None:
        if self._failure is not None:
            raise self._failure
        return self._ledger.choose(step)

    def _waits_for_samplers(self) -> bool:
        num_sampled = len(self._admitted) - self._num_sampling
        return num_sampled < self._config.prompts_per_step or num_sampled == len(self._finished)

    def _missing(self) -> list[str]:
        return [group_id for position, group_id in self._admitted.items() if position not in self._finished]

    def _count_sampling(self, change: int) -> None:
        now = self._now()
        if self._num_sampling:
            self._sampling_seconds += now - self._sampling_since
        self._sampling_since = now
        self._num_sampling += change

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failure = self._failure or error
            self._changed.set()
