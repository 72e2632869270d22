"""All samplers as one: shares out requests, re-issues what a lost sampler owed, replaces it. It holds no engine.

- `generate`  produces finished groups; waits for samplers; unblocked by a group, by the loss of a sampler (its groups
              go to another) or by the end of the last hope for one.
- `_keep_up`  produces one serving sampler after the other under one name; waits for its loss; unblocked by `_lose`.
- `_watch`    produces nothing; loses a sampler that does not answer or makes no progress.

A sampler serves from the moment it holds the newest weights and has passed the probe (`bring_up_with`).
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from weaver_rl.errors import ActorFailedError, LearnerLostError, ResourcesError, UserError, WeaverRLError
from weaver_rl.roles import FleetEvents, SamplerFactory, SamplerReplica
from weaver_rl.rollout import SamplingConfig
from weaver_rl.types import Float32Array, GroupSample, PublishedWeights, SampleRequest
from weaver_rl.waits import current_waits

T = TypeVar("T")

MAX_FAILED_STARTS = 3
"""A sampler that could not be started so often in a row is given up."""
MAX_ISSUES = 6
"""A group that so many samplers were lost over is no accident: the run stops and names it."""
PAUSE_BEFORE_RETRY_S = 1.0

BringUp = Callable[[SamplerReplica, Callable[[], None]], Awaitable[None]]
"""Brings a started sampler to the newest weights; calls its second argument when the sampler may serve."""


@dataclass(slots=True, eq=False)
class _Wave:
    """The requests of one `generate`."""

    sampling: SamplingConfig
    owed: dict[str, SampleRequest]
    arrived: asyncio.Queue[GroupSample | Exception] = field(default_factory=asyncio.Queue)
    num_issues: dict[str, int] = field(default_factory=dict)
    streams: set[asyncio.Task[None]] = field(default_factory=set)


@dataclass(slots=True, eq=False)
class _Member:
    """One name of the fleet and the sampler that stands behind it now."""

    name: str
    replica: SamplerReplica | None = None
    starting: asyncio.Task[SamplerReplica] | None = None
    serving: bool = False
    leaving: bool = False
    owed: dict[str, _Wave] = field(default_factory=dict)
    lost: str | None = None
    """Why the sampler behind the name is to be replaced."""
    has_no_room: bool = False
    """Its last start found no resources."""
    streams: set[asyncio.Task[None]] = field(default_factory=set)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when it was lost, is to leave, or owes nothing any more."""


async def _serve_at_once(replica: SamplerReplica, join: Callable[[], None]) -> None:
    join()


class SamplerFleet:
    """The samplers of a run; the pool that the controller sees.

    Args:
        factory: starts one sampler.
        names: the samplers to begin with.
        generate_timeout_s: how long a sampler may take for groups that it was given together; then it is replaced.
        watch_every_s: how often each sampler is asked whether it lives.
        events: is told what happens to samplers and groups.
    """

    def __init__(
        self,
        factory: SamplerFactory,
        names: Sequence[str],
        *,
        generate_timeout_s: float,
        watch_every_s: float,
        events: FleetEvents,
    ) -> None:
        self._factory = factory
        self._generate_timeout_s = generate_timeout_s
        self._watch_every_s = watch_every_s
        self._events = events
        self._bring_up: BringUp = _serve_at_once
        self._members = {name: _Member(name) for name in names}
        self._starting = set(names)
        self._started = asyncio.Event()
        self._unassigned: dict[str, _Wave] = {}
        self._waves: set[_Wave] = set()
        self._open: set[SamplerReplica] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._failure: Exception | None = None
        self._closing = False

    # -- what the controller asks ----------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """Every sampler that serves."""
        return tuple(member.name for member in self._serving())

    @property
    def members(self) -> Mapping[str, str]:
        """Every sampler with what it is doing, in words."""
        return {member.name: _words(member) for member in self._members.values()}

    @property
    def num_owed(self) -> int:
        """Groups asked for and not delivered."""
        return sum(len(wave.owed) for wave in self._waves)

    def bring_up_with(self, bring_up: BringUp) -> None:
        """Says how a started sampler comes to the newest weights."""
        self._bring_up = bring_up

    async def ready(self) -> None:
        """Returns once every sampler of the beginning was up; raises what kept one from starting."""
        with current_waits().waiting("samplers", "start", on=self._starting):
            if self._starting and self._failure is None:
                await self._started.wait()
        self._raise_failure()

    async def generate(self, requests: Sequence[SampleRequest], sampling: SamplingConfig) -> AsyncIterator[GroupSample]:
        """Yields groups as they are completed. With every sampler free, who takes which depends on the order alone.

        Raises:
            ActorFailedError: no sampler is left, or one group was the end of too many.
            WeaverRLError: what a sampler refused a request with.
        """
        self._raise_failure()
        wave = _Wave(sampling, {request.group_id: request for request in requests})
        self._waves.add(wave)
        try:
            self._assign(wave, requests)
            while wave.owed:
                item = await wave.arrived.get()
                if isinstance(item, Exception):
                    raise item
                if wave.owed.pop(item.group_id, None) is not None:
                    yield item
        finally:
            await self._end_wave(wave)

    async def load_weights(self, weights: PublishedWeights, only: str | None = None) -> None:
        """Every serving sampler (or the one named) loads them; one that cannot is lost.

        The one named held wrong ones: what it is sampling with them begins anew.
        """
        loaded = await self._ask_all(lambda replica: replica.load_weights(weights), only)
        if only is not None and only in loaded:
            self._begin_anew(self._members[only])

    async def score(self, token_ids: Sequence[int]) -> Mapping[str, Float32Array]:
        """The answer of every serving sampler; one that does not answer is lost."""
        return await self._ask_all(lambda replica: replica.score(token_ids))

    def replace(self, name: str, reason: str) -> None:
        """Ends a sampler that cannot be trusted; what it owes, or delivered and nobody took yet, goes to others."""
        for wave in self._waves:
            delivered = [wave.arrived.get_nowait() for _ in range(wave.arrived.qsize())]
            untrusted = [item for item in delivered if isinstance(item, GroupSample) and item.sampler == name]
            for item in delivered:
                if item not in untrusted:
                    wave.arrived.put_nowait(item)
            self._reissue(wave, [item.group_id for item in untrusted], name, reason)
        member = self._members.get(name)
        if member is not None and (member.serving or member.leaving):  # else it is lost already, and another starts
            self._lose(member, reason)

    # -- size ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the samplers of the beginning; `ready` says when they are up."""
        for member in self._members.values():
            self._spawn(self._keep_up(member))

    def scale(self, num_samplers: int) -> None:
        """Adds samplers, or lets the youngest leave: at once while they start, else after what they have to finish."""
        staying = [member for member in self._members.values() if not member.leaving]
        # The lowest names that are free.
        names = (f"sampler {index}" for index in itertools.count())
        free = (name for name in names if name not in self._members)
        for _ in range(num_samplers - len(staying)):
            member = _Member(next(free))
            self._members[member.name] = member
            self._spawn(self._keep_up(member))
        for member in staying[num_samplers:]:
            member.leaving = True
            member.changed.set()
            if member.starting is not None:  # it may wait for a node for half an hour, and nobody wants that any more
                member.starting.cancel()

    async def close(self) -> None:
        """Ends every sampler and every task."""
        self._closing = True  # a keeper whose cancellation a library swallowed goes no further than its next look
        for member in self._members.values():
            member.changed.set()
        tasks, self._tasks = self._tasks, set()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        # Those too whose ending was cut short just now.
        await asyncio.gather(*(replica.close() for replica in self._open), return_exceptions=True)

    # -- one sampler -----------------------------------------------------------------------------------------------

    async def _keep_up(self, member: _Member) -> None:
        num_failed = 0
        while not member.leaving and not self._closing:
            try:
                await self._serve(member)
                num_failed = 0
            except LearnerLostError as error:
                # The newest weights are gone with it. Who waits for groups must know: the learner alone can mend it.
                self._tell_waves(error)
                await asyncio.sleep(PAUSE_BEFORE_RETRY_S)
            except WeaverRLError as error:
                num_failed += 1
                self._events.sampler_lost(member.name, str(error), 0)
                if self._is_hopeless(member, error, num_failed):
                    self._give_up(member, error)
                    return
                await asyncio.sleep(PAUSE_BEFORE_RETRY_S * num_failed)
            finally:
                replica, member.replica, member.serving = member.replica, None, False
                if replica is not None:
                    await replica.close(kill=member.lost is not None)
                    self._open.discard(replica)
        del self._members[member.name]
        self._is_up(member)  # or it leaves before it ever was; nobody is to wait for it
        self._events.sampler_left(member.name)

    async def _serve(self, member: _Member) -> None:
        """Starts a sampler and returns when it was lost or has left; raises when it never came to serve."""
        why = f", the last was lost: {member.lost}" if member.lost else ""
        with current_waits().waiting(member.name, f"starts its engine{why}", about=lambda: self._unassigned):
            member.starting = asyncio.create_task(self._factory.start(member.name))
            try:
                member.replica = await member.starting
            except asyncio.CancelledError:
                if member.leaving and not self._closing:
                    return
                raise
            finally:
                member.starting = None
            self._open.add(member.replica)
        member.lost, member.has_no_room = None, False
        member.changed.clear()
        with current_waits().waiting(member.name, "gets the newest weights", about=lambda: self._unassigned):
            await self._bring_up(member.replica, lambda: self._join(member))
        watch = self._spawn(self._watch(member, member.replica))
        try:
            while member.lost is None and not self._closing and not (member.leaving and not member.owed):
                if member.leaving and member.serving:
                    member.serving = False
                    self._spawn(self._hand_over_late(member, member.replica))
                member.changed.clear()
                await member.changed.wait()
        finally:
            watch.cancel()

    def _join(self, member: _Member) -> None:
        member.serving = True
        self._is_up(member)
        self._events.sampler_joined(member.name)
        waiting, self._unassigned = self._unassigned, {}
        for wave in dict.fromkeys(waiting.values()):
            self._assign(wave, [wave.owed[group_id] for group_id, its in waiting.items() if its is wave])

    def _is_up(self, member: _Member) -> None:
        self._starting.discard(member.name)
        if not self._starting:
            self._started.set()

    async def _watch(self, member: _Member, replica: SamplerReplica) -> None:
        while True:
            await asyncio.sleep(self._watch_every_s)
            try:
                await replica.check()
            except WeaverRLError as error:
                if member.replica is replica:
                    self._lose(member, str(error))
                return

    async def _hand_over_late(self, member: _Member, replica: SamplerReplica) -> None:
        """One that leaves may finish what it has, but not for ever."""
        await asyncio.sleep(self._generate_timeout_s)
        if member.replica is replica:
            self._lose(member, f"was to leave and not done after {self._generate_timeout_s:g} s")

    def _lose(self, member: _Member, reason: str) -> None:
        if member.replica is None or member.lost is not None:
            return
        member.lost, member.serving = reason, False
        owed, member.owed = member.owed, {}
        self._events.sampler_lost(member.name, reason, len(owed))
        for wave in dict.fromkeys(owed.values()):
            lost = [group_id for group_id, its in owed.items() if its is wave and group_id in wave.owed]
            for group_id in lost:
                wave.num_issues[group_id] = wave.num_issues.get(group_id, 0) + 1
                if wave.num_issues[group_id] >= MAX_ISSUES:
                    wave.arrived.put_nowait(ActorFailedError(_poison(group_id, wave, member, reason)))
            self._reissue(wave, lost, member.name, reason)
        member.changed.set()

    def _begin_anew(self, member: _Member) -> None:
        """What it owes is asked for once more, of whoever owes least."""
        for stream in member.streams:
            stream.cancel()
        owed, member.owed = member.owed, {}
        for wave in dict.fromkeys(owed.values()):
            groups = [group_id for group_id, its in owed.items() if its is wave]
            self._reissue(wave, groups, member.name, "it held wrong weights")

    def _is_hopeless(self, member: _Member, error: WeaverRLError, num_failed: int) -> bool:
        """A user's mistake is; a lack of resources only if nobody else can go on meanwhile: nodes may come back."""
        member.has_no_room = isinstance(error, ResourcesError)
        others_go_on = any(not (other.has_no_room or other.leaving) for other in self._members.values())
        if member.has_no_room and member.name not in self._starting:
            return not others_go_on
        # Once it has worked, what looks like a mistake (too little free memory) may be over at the next try.
        is_mistake = isinstance(error, UserError) and member.name in self._starting
        return is_mistake or num_failed >= MAX_FAILED_STARTS

    def _give_up(self, member: _Member, error: WeaverRLError) -> None:
        """Without this name the run goes on; without any it cannot, nor when the first start shows a mistake."""
        del self._members[member.name]
        nobody_stays = all(other.leaving for other in self._members.values())
        if nobody_stays or member.name in self._starting:
            self._fail(error)
        else:
            self._events.sampler_left(member.name)

    def _fail(self, error: Exception) -> None:
        self._failure = error
        self._started.set()
        self._tell_waves(error)

    def _tell_waves(self, error: Exception) -> None:
        for wave in self._waves:
            wave.arrived.put_nowait(error)

    # -- groups ----------------------------------------------------------------------------------------------------

    def _reissue(self, wave: _Wave, group_ids: Sequence[str], sampler: str, reason: str) -> None:
        for group_id in group_ids:
            self._events.group_reissued(group_id, sampler, reason)
        self._assign(wave, [wave.owed[group_id] for group_id in group_ids])

    def _assign(self, wave: _Wave, requests: Sequence[SampleRequest]) -> None:
        """Each to the serving sampler that owes least, in one call per sampler."""
        loads = [(len(member.owed), index, member) for index, member in enumerate(self._serving())]
        if not loads:
            self._unassigned |= dict.fromkeys((request.group_id for request in requests), wave)
            return
        heapq.heapify(loads)
        shares: dict[str, list[SampleRequest]] = {}
        for request in requests:
            load, index, member = loads[0]
            heapq.heapreplace(loads, (load + 1, index, member))
            member.owed[request.group_id] = wave
            shares.setdefault(member.name, []).append(request)
        for name, share in shares.items():
            member = self._members[name]
            assert member.replica is not None
            stream = self._spawn(self._stream(member, member.replica, wave, share))
            for streams in (wave.streams, member.streams):
                streams.add(stream)
                stream.add_done_callback(streams.discard)

    async def _stream(
        self, member: _Member, replica: SamplerReplica, wave: _Wave, requests: Sequence[SampleRequest]
    ) -> None:
        left = dict.fromkeys(request.group_id for request in requests)
        timeout_s = self._generate_timeout_s
        try:
            with current_waits().waiting(member.name, f"samples {len(left)} groups", timeout_s=timeout_s, about=left):
                # Closed here and now, not when it is collected: what is left of its groups must not go on.
                async with (
                    asyncio.timeout(timeout_s),
                    contextlib.aclosing(_closable(replica.generate(requests, wave.sampling))) as arriving,
                ):
                    async for groups in arriving:
                        if member.replica is not replica or member.lost is not None:
                            return  # its groups are others' by now, and it may be distrusted
                        for group in groups:
                            del left[group.group_id], member.owed[group.group_id]
                            wave.arrived.put_nowait(group)
            if left:
                raise ActorFailedError(f"{member.name} ended without {len(left)} of the groups it was given")
        except TimeoutError:
            self._lose_if(member, replica, f"did not finish {len(left)} groups in {timeout_s:g} s (rollout.timeout_s)")
        except ActorFailedError as error:
            self._lose_if(member, replica, str(error))
        except Exception as error:  # noqa: BLE001 - boundary: who waits for the groups gets it, else it waits for ever
            wave.arrived.put_nowait(error)
        if member.leaving:
            member.changed.set()

    def _lose_if(self, member: _Member, replica: SamplerReplica, reason: str) -> None:
        if member.replica is replica:
            self._lose(member, reason)

    async def _end_wave(self, wave: _Wave) -> None:
        self._waves.discard(wave)
        streams = list(wave.streams)
        for stream in streams:
            stream.cancel()
        for group_id in wave.owed:
            self._unassigned.pop(group_id, None)
            for member in self._members.values():
                member.owed.pop(group_id, None)
        for member in self._members.values():
            if member.leaving:
                member.changed.set()
        await asyncio.gather(*streams, return_exceptions=True)

    # -- small things ----------------------------------------------------------------------------------------------

    def _serving(self) -> list[_Member]:
        return [member for member in self._members.values() if member.serving]

    async def _ask_all(
        self, ask: Callable[[SamplerReplica], Coroutine[Any, Any, T]], only: str | None = None
    ) -> dict[str, T]:
        asked = [m for m in self._serving() if only in (None, m.name)]
        replicas = [member.replica for member in asked if member.replica is not None]
        answers = await asyncio.gather(*(ask(replica) for replica in replicas), return_exceptions=True)
        found: dict[str, T] = {}
        for member, replica, answer in zip(asked, replicas, answers, strict=True):
            if isinstance(answer, LearnerLostError):
                raise answer
            if isinstance(answer, WeaverRLError):
                self._lose_if(member, replica, str(answer))
            elif isinstance(answer, BaseException):
                raise answer
            elif member.replica is replica and member.serving:
                found[member.name] = answer
        return found

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            self._fail(error)


def _closable(groups: AsyncIterator[Sequence[GroupSample]]) -> AsyncGenerator[Sequence[GroupSample], None]:
    return cast(AsyncGenerator[Sequence[GroupSample], None], groups)


def _words(member: _Member) -> str:
    if member.replica is None:
        return "starting"
    if member.leaving:
        return f"leaving, owes {len(member.owed)} groups"
    return f"serving, owes {len(member.owed)} groups" if member.serving else "getting weights"


def _poison(group_id: str, wave: _Wave, member: _Member, reason: str) -> str:
    return (
        f"group {group_id} was given to {wave.num_issues[group_id]} samplers and each was lost over it, the last, "
        f"{member.name}: {reason}. Its prompt has {len(wave.owed[group_id].token_ids_P)} tokens. The run stops rather "
        "than lose one engine after the other; look at logs/, lower the load of one engine, or raise rollout.timeout_s"
    )
