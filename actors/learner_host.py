"""One learner of a server: started when it is needed, anew after a loss, ended; and a model in it.

It knows no other learner, no client and no file of a checkpoint.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

from ray.util.placement_group import PlacementGroup, remove_placement_group

from actors.calls import GIVE_UP_MARGIN_S, first_error, shared, without_paths
from actors.cluster import reserve
from actors.learner import RayLearnerGroup
from actors.learner_start import start_learner
from actors.lineup import PreparedModel
from actors.spawn import Actors, spawn_learner
from weaver_rl.errors import (
    ActorFailedError,
    CallFailedError,
    ConfigError,
    LearnerLostError,
    ModelError,
)
from weaver_rl.losses.config import LossConfig
from weaver_rl.placement import Placement
from weaver_rl.service.config import ServeConfig
from weaver_rl.types import AdamParams, Datum, ForwardBackwardOutput, ForwardOutput, OptimStepOutput
from weaver_rl.waits import current_waits

CHUNK_BYTES = 512 << 20

_log = logging.getLogger(__name__)


class LearnerHost:
    """One learner group, started when it is first used.

    Args:
        placement: the bundles of its ranks.
        on_lost: is told once for every group that was lost.
    """

    def __init__(
        self,
        name: str,
        prepared: PreparedModel,
        placement: Placement,
        config: ServeConfig,
        on_lost: Callable[[LearnerHost], None],
    ) -> None:
        self.name = name
        self.base_model = prepared.config.name
        self._prepared = prepared
        self._placement = placement
        self._config = config
        self._on_lost = on_lost
        self._actors = Actors()
        self._room: PlacementGroup | None = None
        self._group: RayLearnerGroup | None = None
        self._starting: asyncio.Task[RayLearnerGroup] | None = None
        self._is_closed = False

    async def group(self) -> RayLearnerGroup:
        """The group, up. All who ask while it starts share that start and its failure; the next starts it again.

        Raises:
            ResourcesError: there is no room for it.
            LearnerLostError: it died while it started, or was ended.
            ActorFailedError: it cannot be started as the server is configured.
        """
        if self._is_closed:
            raise LearnerLostError(f"{self.name} was ended")
        if self._group is not None:
            return self._group
        if self._starting is None:
            self._starting = asyncio.create_task(self._start(), name=f"{self.name} starts")
            self._starting.add_done_callback(self._started)
        return await shared(self._starting, f"{self.name} was ended while it started")

    @property
    def is_up(self) -> bool:
        return self._group is not None

    def is_up_with(self, group: RayLearnerGroup) -> bool:
        """Whether it is that group which is up."""
        return self._group is group

    @contextlib.asynccontextmanager
    async def watched(self, group: RayLearnerGroup) -> AsyncIterator[None]:
        """An operation of that group: one that loses it ends what is left of it, so that the next starts anew."""
        try:
            yield
        except LearnerLostError:
            if self._group is group:
                self._group = None
                self._on_lost(self)
                await self._end()
            raise

    async def close(self) -> None:
        """Ends the ranks, also those that start, and gives their room back; it never starts again."""
        self._is_closed = True
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.wait([self._starting])
        self._group = None
        await self._end()

    def _started(self, starting: asyncio.Task[RayLearnerGroup]) -> None:
        self._starting = None
        if not starting.cancelled() and starting.exception() is None:
            self._group = starting.result()

    async def _start(self) -> RayLearnerGroup:
        try:
            try:
                return await self._start_once()
            except CallFailedError as error:
                # The port at which the ranks meet was free when it was chosen, and taken when it was used.
                if not _is_port_taken(error):
                    raise
                return await self._start_once()
        except (ConfigError, ModelError) as error:
            # The server's own configuration: no client can mend it.
            _log.warning("%s did not start: %s", self.name, error)
            raise ActorFailedError(f"{self.name} did not start: {without_paths(error)}") from error
        except ActorFailedError as error:
            _log.warning("%s did not start: %s", self.name, error)
            raise LearnerLostError(without_paths(error)) from error

    async def _start_once(self) -> RayLearnerGroup:
        config = self._prepared.config.learner
        try:
            self._room = await reserve(self.name, self._placement.bundles, self._config.cluster.start_timeout_s)
            spawn_learner(self._actors, config, self._placement, self._room)
            ranks = self._actors.learner_ranks
            await start_learner(
                ranks,
                config,
                model_dir=self._prepared.model_dir,
                seed=self._config.seed,
                transport="object_store",
                chunk_bytes=CHUNK_BYTES,
                name=self.name,
            )
        except BaseException as error:  # boundary: cleans up, then raises again
            await self._end()
            if isinstance(error, BaseExceptionGroup):
                raise first_error(error) from error
            raise
        return RayLearnerGroup(ranks, self._deadline_s(), outlives_failed_calls=True, name=self.name)

    def _deadline_s(self) -> float:
        """Of one operation in the ranks: later than that of the service, which costs one client its operation only.

        An operation that the service gives up goes on in the ranks; where it never ends this loses them.
        """
        return max(self._prepared.config.learner.timeout_s, self._config.operations.timeout_s + GIVE_UP_MARGIN_S)

    async def _end(self) -> None:
        # Taken before the first await: what another start makes meanwhile is not this one's.
        actors, self._actors = self._actors, Actors()
        room, self._room = self._room, None
        for rank in range(self._prepared.config.learner.num_ranks):
            current_waits().forget(f"{self.name} rank {rank}")
        await asyncio.shield(_ended(actors, room))


async def _ended(actors: Actors, room: PlacementGroup | None) -> None:
    await actors.kill_learner()
    if room is not None:
        await asyncio.to_thread(remove_placement_group, room)


def _is_port_taken(error: CallFailedError) -> bool:
    text = str(error)
    return "EADDRINUSE" in text or "address already in use" in text.lower()


class HostedModel:
    """One model in a host's group: `ModelLearner` of the service."""

    def __init__(self, host: LearnerHost, group: RayLearnerGroup, model: RayLearnerGroup) -> None:
        self.host = host
        self._group = group
        self._model = model

    @property
    def is_up(self) -> bool:
        """Whether its ranks are those that the host has now."""
        return self.host.is_up_with(self._group)

    async def forward(self, data: Sequence[Datum], temperature: float = 1.0) -> ForwardOutput:
        async with self.host.watched(self._group):
            return await self._model.forward(data, temperature)

    async def forward_backward(
        self, data: Sequence[Datum], loss: LossConfig, temperature: float = 1.0
    ) -> ForwardBackwardOutput:
        async with self.host.watched(self._group):
            return await self._model.forward_backward(data, loss, temperature, positions="all", with_grad_norm=True)

    async def optim_step(self, params: AdamParams) -> OptimStepOutput:
        async with self.host.watched(self._group):
            return await self._model.optim_step(params)

    async def save_state(self, directory: Path, with_optimizer: bool = True) -> None:
        async with self.host.watched(self._group):
            await self._model.save_state(directory, with_optimizer)

    async def load_state(self, directory: Path, with_optimizer: bool = True) -> None:
        async with self.host.watched(self._group):
            await self._model.load_state(directory, with_optimizer)

    async def save_for_sampler(self, directory: Path) -> None:
        async with self.host.watched(self._group):
            await self._model.save_for_sampler(directory)

    async def save_hf(self, directory: Path) -> None:
        async with self.host.watched(self._group):
            await self._model.save_hf(directory)

    async def remove(self, adapter: str) -> None:
        """Frees the adapter that it is, unless that went with its ranks."""
        if self.is_up:
            async with self.host.watched(self._group):
                await self._group.remove_adapter(adapter)
