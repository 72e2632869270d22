"""Removes what has expired, now and then. What it has not come to yet is refused all the same by who is asked for it.

- `run`  produces nothing; waits for the next time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from weaver_rl.errors import WeaverRLError
from weaver_rl.service.config import ServeConfig
from weaver_rl.service.endings import Endings
from weaver_rl.service.roles import Samplers
from weaver_rl.service.state_files import StateFiles
from weaver_rl.service.store import Store

log = logging.getLogger(__name__)


class Sweeper:
    """Expired sessions, checkpoints, artifacts and results; models that were left behind; engines nobody can reach.

    Args:
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        config: ServeConfig,
        store: Store,
        files: StateFiles,
        samplers: Samplers,
        endings: Endings,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        self._store = store
        self._files = files
        self._samplers = samplers
        self._endings = endings
        self._clock = clock

    async def run(self) -> None:
        """For ever."""
        while True:
            await asyncio.sleep(self._config.retention.sweep_every_s)
            await self.sweep()

    async def start(self) -> None:
        """When a server starts: also what a killed one left without a row."""
        await self.sweep()
        await self._files.sweep(
            checkpoint_ids=await self._store.checkpoint_ids_with_files(),
            artifact_ids=await self._store.artifact_ids_with_files(),
        )

    async def sweep(self) -> None:
        """Once. What cannot be removed keeps nothing else."""
        for step in (self._end_records, self._end_models, self._remove_checkpoints, self._remove_artifacts):
            await self._tried(step())
        keep = await self._store.models_sampled_from()
        await self._tried(self._samplers.close_all_but(keep))

    async def _end_records(self) -> None:
        now = self._clock()
        await self._store.delete_operations_finished_before(now - self._config.operations.keep_s)
        await self._store.delete_idle_sampling_sessions(now - self._config.retention.sampling_session_idle_s)
        await self._store.delete_expired()

    async def _end_models(self) -> None:
        """Of clients that were killed: no heartbeat and no operation for so long."""
        before = self._clock() - self._config.retention.session_idle_s
        for model in await self._store.terminate_models_idle_since(before):
            log.warning("model %s was terminated: its client was not heard of for a long time", model.id)
            self._endings.begin(model.id)

    async def _remove_checkpoints(self) -> None:
        # One that a newer export replaced lives on for the sessions that were created from it.
        for checkpoint in await self._store.claim_unused_checkpoints():
            await self._tried(self._files.remove_checkpoint(checkpoint.id))

    async def _remove_artifacts(self) -> None:
        for artifact in await self._store.claim_unused_artifacts():
            await self._tried(self._files.remove_artifact(artifact.id))

    async def _tried(self, work: Awaitable[None]) -> None:
        try:
            await work
        except (WeaverRLError, OSError) as error:
            log.warning("what has expired could not be removed: %s", error)
