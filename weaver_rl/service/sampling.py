"""What runs in an engine: completions and log-probabilities of sampling sessions. It knows which weights a session has
for as long as it lives, not where engines run.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Literal

from weaver_rl.errors import EngineError, ServiceError
from weaver_rl.meter import NO_METER, Meter
from weaver_rl.rollout import SamplingConfig
from weaver_rl.service.calls import LineupModel, NewSamplingSession, SampleCall
from weaver_rl.service.operations import Operations
from weaver_rl.service.records import Checkpoint, Operation, SamplingSession
from weaver_rl.service.results import LogprobsResult, Render, Rendered, Result, SampleResult
from weaver_rl.service.roles import PauseMode, Samplers, SamplerWeights
from weaver_rl.service.store import Store
from weaver_rl.service.weights import Weights
from weaver_rl.types import SampleRequest


class Sampling:
    """Sampling sessions and what is asked of them.

    Args:
        idle_s: a session that was not used for so long has ended.
        clock: seconds since the epoch.
        meter: counts tokens.
    """

    def __init__(
        self,
        store: Store,
        operations: Operations,
        samplers: Samplers,
        weights: Weights,
        lineup: Mapping[str, LineupModel],
        *,
        idle_s: float,
        clock: Callable[[], float] = time.time,
        meter: Meter = NO_METER,
    ) -> None:
        self._meter = meter
        self._store = store
        self._operations = operations
        self._samplers = samplers
        self._weights = weights
        self._lineup = lineup
        self._idle_s = idle_s
        self._clock = clock

    # -- sessions --------------------------------------------------------------------------------------------------

    async def create(self, owner: str, session_id: str, new: NewSamplingSession) -> SamplingSession:
        """Pins the weights that the path means now."""
        checkpoint = await self._weights.at_path(owner, new.path) if new.path is not None else None
        base_model = checkpoint.base_model if checkpoint is not None else new.base_model
        if base_model is None:
            raise ServiceError("invalid_request", "a sampling session needs base_model, model_path or both")
        if new.base_model is not None and checkpoint is not None and new.base_model != base_model:
            raise ServiceError(
                "invalid_request", f"model_path {new.path} is of {base_model}, base_model says {new.base_model}"
            )
        if base_model not in self._lineup:
            raise unknown_base_model(base_model, self._lineup)
        if new.model_id is not None and checkpoint is not None and new.model_id != checkpoint.model_id:
            raise ServiceError(
                "invalid_request", f"model_path {new.path} is of model {checkpoint.model_id}, model_id {new.model_id}"
            )
        now = self._clock()
        session = SamplingSession(
            id=str(uuid.uuid4()),
            owner=owner,
            session_id=session_id,
            seq_id=new.seq_id,
            base_model=base_model,
            checkpoint_id=checkpoint.id if checkpoint is not None else None,
            model_id=checkpoint.model_id if checkpoint is not None else new.model_id,
            created_at=now,
            last_used_at=now,
        )
        stored = await self._store.add_sampling_session(session)
        if (stored.base_model, stored.checkpoint_id) == (session.base_model, session.checkpoint_id):
            return stored  # this one, or the one that the same request made when it was sent before
        # Another client counts from 1 again in the same session: never give it the weights of the first.
        return await self._store.add_sampling_session(replace(session, seq_id=own_number()))

    async def session(self, owner: str, sampling_session_id: str) -> SamplingSession:
        """Raises ServiceError 404, or 410 when it has ended."""
        found = await self._store.sampling_session(owner, sampling_session_id)
        if found is None:
            raise ServiceError("not_found", f"there is no sampling session {sampling_session_id}", status=404)
        if found.last_used_at + self._idle_s <= self._clock():
            raise ServiceError(
                "sampling_session_expired",
                f"sampling session {sampling_session_id} was not used for {self._idle_s:g} s; create another",
                status=410,
            )
        return found

    async def delete(self, owner: str, sampling_session_id: str) -> None:
        session = await self.session(owner, sampling_session_id)
        await self._store.delete_sampling_session(session.id)

    async def _weights_of(self, session: SamplingSession) -> SamplerWeights:
        if session.checkpoint_id is None:
            return SamplerWeights(
                base_model=session.base_model, mode=None, directory=None, key="base", model_id=None, version=0
            )
        # By id, not by name: a later export under the name is another checkpoint.
        checkpoint = await self._store.checkpoint(session.owner, session.checkpoint_id)
        if checkpoint is None or self._has_expired(checkpoint):
            raise ServiceError(
                "sampling_session_expired",
                f"the weights of sampling session {session.id} have expired (ttl_seconds of the export); export again "
                "and create another session",
                status=410,
            )
        return SamplerWeights(
            base_model=checkpoint.base_model,
            mode=checkpoint.training_mode,
            directory=self._weights.sampler_directory(checkpoint),
            key=checkpoint.id,
            model_id=checkpoint.model_id,
            version=checkpoint.num_steps,
        )

    def _has_expired(self, checkpoint: Checkpoint) -> bool:
        return checkpoint.expires_at is not None and checkpoint.expires_at <= self._clock()

    # -- operations ------------------------------------------------------------------------------------------------

    async def sample(self, session: SamplingSession, call: SampleCall, render: Render) -> Operation:
        weights = await self._weights_of(session)
        room = self._room(session.base_model, call.token_ids, "prompt", spare=1)
        max_tokens = room if call.max_tokens is None else min(call.max_tokens, room)
        sampling = SamplingConfig.model_validate(call.sampling.model_dump() | {"max_tokens": max_tokens})
        operation_id = str(uuid.uuid4())
        wants_prompt = call.wants_prompt_logprobs or call.num_top_prompt_logprobs > 0
        request = SampleRequest(
            group_id=operation_id,
            token_ids_P=call.token_ids,
            seeds_G=sample_seeds(call.seed, call.num_samples),
            stop=call.stop,
            stop_token_ids=call.stop_token_ids,
            num_prompt_logprobs=call.num_top_prompt_logprobs if wants_prompt else None,
        )

        async def work() -> Result:
            async with self._still_there(session):
                group = await self._samplers.sample(weights, request, sampling)
            num_tokens = sum(len(completion.token_ids_L) for completion in group.completions_G)
            self._meter.add("weaver_rl_service_sampled_tokens_total", num_tokens, base_model=weights.base_model)
            return SampleResult(
                group=group,
                num_prompt_tokens=len(call.token_ids),
                wants_prompt_logprobs=call.wants_prompt_logprobs,
                num_top_prompt_logprobs=call.num_top_prompt_logprobs,
                weight_version=weights.version,
            )

        return await self._submit(session, "sample", operation_id, work, render)

    async def logprobs(
        self, session: SamplingSession, token_ids: Sequence[int], temperature: float, render: Render
    ) -> Operation:
        weights = await self._weights_of(session)
        self._room(session.base_model, token_ids, "prompt", spare=0)

        async def work() -> Result:
            async with self._still_there(session):
                prompt = await self._samplers.prompt_logprobs(weights, token_ids, temperature)
            return LogprobsResult(prompt=prompt, weight_version=weights.version)

        return await self._submit(session, "logprobs", str(uuid.uuid4()), work, render)

    @asynccontextmanager
    async def _still_there(self, session: SamplingSession) -> AsyncIterator[None]:
        """What the engine says of weights that expired while a request waited is not the client's mistake."""
        try:
            yield
        except EngineError:
            await self._weights_of(session)
            raise

    async def pause(self, session: SamplingSession, mode: PauseMode) -> None:
        """Of the engine of the session's model, which was trained whole."""
        await self._samplers.pause(await self._own_engine(session), mode)

    async def resume(self, session: SamplingSession) -> None:
        await self._samplers.resume(await self._own_engine(session))

    async def _own_engine(self, session: SamplingSession) -> str:
        model = await self._store.model(session.owner, session.model_id) if session.model_id is not None else None
        if model is None or model.training_mode != "full_ft":
            raise ServiceError(
                "unsupported",
                "only the engine of a model with training_mode full_ft can be paused: others are shared with everybody "
                f"on {session.base_model}",
            )
        return model.id

    def _room(self, base_model: str, token_ids: Sequence[int], what: str, *, spare: int) -> int:
        """Tokens that still fit behind these."""
        model = self._lineup.get(base_model)
        if model is None:  # it was in the configuration when the session was created
            raise unknown_base_model(base_model, self._lineup)
        if not token_ids:
            raise ServiceError("invalid_request", f"the {what} is empty: at least one token is needed")
        if len(token_ids) + spare > model.max_length:
            raise ServiceError(
                "invalid_request",
                f"the {what} has {len(token_ids)} tokens; {base_model} takes {model.max_length - spare} at most",
            )
        low, high = min(token_ids), max(token_ids)
        if low < 0 or high >= model.vocab_size:
            raise ServiceError(
                "invalid_request",
                f"the {what} holds token id {low if low < 0 else high}; the vocabulary is 0..{model.vocab_size - 1}",
            )
        return model.max_length - len(token_ids)

    async def _submit(
        self,
        session: SamplingSession,
        kind: Literal["sample", "logprobs"],
        operation_id: str,
        work: Callable[[], Awaitable[Result]],
        render: Render,
    ) -> Operation:
        async def run() -> bytes | Rendered:
            return await asyncio.to_thread(render, await work())

        now = self._clock()
        await self._store.touch_sampling_session(session.id, now)
        operation = Operation(
            id=operation_id, owner=session.owner, kind=kind, created_at=now, sampling_session_id=session.id
        )
        return await self._operations.submit(operation, run)


def own_number() -> int:
    """In place of a number that a client gave twice; clients' own begin at 1."""
    return -1 - secrets.randbits(62)


def sample_seeds(seed: int | None, num_samples: int) -> tuple[int, ...]:
    """One seed in [0, 2**63) for each completion; the same for the same `seed`, others every time without one."""
    start = secrets.randbits(63) if seed is None else seed
    digests = (hashlib.blake2b(f"{start}\x00{index}".encode(), digest_size=8).digest() for index in range(num_samples))
    return tuple(int.from_bytes(digest, "little") >> 1 for digest in digests)


def unknown_base_model(name: str, lineup: Mapping[str, LineupModel]) -> ServiceError:
    """What to say of a base model that is not served."""
    return ServiceError(
        "not_found", f"base_model {name!r} is not served here; supported: {', '.join(sorted(lineup))}", status=404
    )
