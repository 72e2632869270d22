"""One engine of a server from its start to its end: its actor, its room in the cluster. It does not know when either is
due, nor which weights the engine holds.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group

from actors.calls import answer, without_paths
from actors.cluster import reserve
from actors.ending import end_actor
from actors.identity import Identity
from actors.lineup import PreparedModel
from actors.model_files import model_on
from actors.sampler import SamplerSpec
from actors.sampler_replica import ANSWER_MARGIN_S, RaySampler
from actors.spawn import spawn_sampler
from weaver_rl.engines.config import LoraLimits, SamplerConfig
from weaver_rl.errors import ActorFailedError, ResourcesError, WeaverRLError
from weaver_rl.placement import Placement
from weaver_rl.service.roles import PauseMode
from weaver_rl.waits import current_waits

log = logging.getLogger(__name__)

LOAD_TIMEOUT_S = 600.0


def engine_spec(name: str, prepared: PreparedModel, seed: int, *, adapters: bool) -> SamplerSpec:
    """What the engine of a model starts with."""
    served = prepared.config
    return SamplerSpec(
        name=name,
        model_dir=prepared.model_dir,
        engine_args={"max_model_len": prepared.max_length} | served.sampler.engine_args,
        seed=seed,
        stop_token_ids=prepared.stop_tokens,
        tensor_parallel=served.sampler.tensor_parallel,
        transport="object_store",
        start_timeout_s=served.sampler.start_timeout_s,
        with_tokenizer=True,
        lora=LoraLimits(max_loras=served.max_loras, max_rank=served.max_lora_rank) if adapters else None,
    )


class EngineProcess:
    """A started engine.

    Args:
        room: what the actor runs in; given back at the end.
    """

    def __init__(self, name: str, actor: Any, room: PlacementGroup, replica: RaySampler) -> None:
        self.name = name
        self.replica = replica
        self._actor = actor
        self._room = room

    @classmethod
    async def start(
        cls,
        spec: SamplerSpec,
        config: SamplerConfig,
        placement: Placement,
        *,
        room_timeout_s: float,
        num_threads: int | None,
    ) -> EngineProcess:
        """An engine that is up; with a failure or a cancellation nothing is left of it.

        Raises ResourcesError for lack of room, ActorFailedError for whatever else kept it from starting: that is in the
        log, and no matter of whoever asked for the engine.
        """
        room = await reserve(spec.name, placement.bundles, room_timeout_s)
        actor: Any = None
        try:
            actor = spawn_sampler(config, placement, room, 0, num_threads)
            identity = await _started(actor, spec)
        except WeaverRLError as error:
            await asyncio.shield(_end(actor, room, kill=True))
            raise _start_failure(spec.name, error) from error
        except BaseException:  # boundary: cleans up, then raises again
            await asyncio.shield(_end(actor, room, kill=True))
            raise
        replica = RaySampler(
            spec.name,
            actor,
            identity,
            load_timeout_s=LOAD_TIMEOUT_S,
            unresponsive_after_s=config.unresponsive_after_s,
        )
        return cls(spec.name, actor, room, replica)

    async def ask(self, doing: str, call: Callable[[Any], Any], timeout_s: float) -> Any:
        """One call of the actor; see `answer`. Cancelled, it is cancelled there too."""
        reference = call(self._actor)
        try:
            return await answer(reference, actor=self.name, doing=doing, timeout_s=timeout_s)
        except asyncio.CancelledError:
            ray.cancel(reference)  # frees the engine of what nobody waits for any more
            raise

    async def pause(self, mode: PauseMode | None) -> None:
        """None: it goes on."""
        if mode is None:
            await self.ask("resuming", lambda actor: actor.resume.remote(), LOAD_TIMEOUT_S)
        else:
            await self.ask(f"pausing ({mode})", lambda actor: actor.pause.remote(mode), LOAD_TIMEOUT_S)

    async def end(self, *, kill: bool) -> None:
        """Calls that still wait for it fail."""
        current_waits().forget(self.name)
        await _end(self._actor, self._room, kill=kill)


async def _started(actor: Any, spec: SamplerSpec) -> Identity:
    # The sampler itself gives up first, and says where its engine stands.
    timeout_s = spec.start_timeout_s + ANSWER_MARGIN_S
    model_dir = await model_on(actor, spec.model_dir, name=spec.name, start_timeout_s=timeout_s)
    spec = replace(spec, model_dir=model_dir)
    await answer(actor.start.remote(spec), actor=spec.name, doing="starting its engine", timeout_s=timeout_s)
    identity: Identity = await answer(
        actor.identity.remote(), actor=spec.name, doing="saying which process it is", timeout_s=LOAD_TIMEOUT_S
    )
    return identity


async def _end(actor: Any, room: PlacementGroup, *, kill: bool) -> None:
    if actor is not None:
        await end_actor(actor, kill=kill)
    await asyncio.to_thread(remove_placement_group, room)


def _start_failure(name: str, error: WeaverRLError) -> WeaverRLError:
    """What a client may know of it: clients see neither paths nor stacks of the server."""
    if isinstance(error, ResourcesError):
        return error
    log.error("%s did not start: %s\n%s", name, error, error.__cause__ or "")
    return ActorFailedError(f"{name} did not start: {without_paths(error)}")
