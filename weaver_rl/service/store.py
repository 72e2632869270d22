"""What the service remembers, across kills: records in, records out. It knows no file and no protocol.

Every method returns after its commit (`touch_*` says otherwise), and never blocks the event loop.
Who asks is part of every look-up: what belongs to another owner is None, as if it were not there. What has expired is
never given out as alive, whether it was swept or not.

All methods raise ServiceError: `storage_unavailable` (503, retryable) when the database fails, `conflict` (409) when a
constraint forbids it, `invalid_request` (400) for numbers beyond 64 bits.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from sqlalchemy import Connection

from weaver_rl.service import store_files as files
from weaver_rl.service import store_operations as operations
from weaver_rl.service import store_statements as statements
from weaver_rl.service.calls import Page
from weaver_rl.service.records import (
    Artifact,
    Checkpoint,
    Model,
    ModelStatus,
    Operation,
    SamplingSession,
    Session,
    SessionMetric,
    TrainingState,
)
from weaver_rl.service.store_database import NUM_READERS, Database, as_service_error, open_database
from weaver_rl.service.store_tables import MIN_PACKED_BYTES, artifacts, checkpoints, pack
from weaver_rl.service.store_writer import Writer

T = TypeVar("T")

_ROWS_PER_DELETE = 200


class Store:
    """All records, behind one writing thread and a few reading ones.

    Example:
        async with Store.opened("sqlite:////data/weaver/weaver.sqlite") as store:
            model = await store.model("team-a", model_id)
    """

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        """Of an open database; `opened` is the usual way."""
        self._database = database
        self._clock = clock
        self._writer = Writer(database.writer)
        self._readers = ThreadPoolExecutor(max_workers=NUM_READERS, thread_name_prefix="store reader")

    @classmethod
    async def open(cls, url: str, *, clock: Callable[[], float] = time.time) -> Store:
        """SQLAlchemy's URL of an SQLite file or a PostgreSQL database; tables are made when there are none.

        Raises:
            ConfigError: it cannot be used, another server uses it, or another version of weaver-rl made it.
        """
        return cls(await asyncio.to_thread(open_database, url), clock)

    @classmethod
    @contextlib.asynccontextmanager
    async def opened(cls, url: str, *, clock: Callable[[], float] = time.time) -> AsyncIterator[Store]:
        """`open` for the length of a block."""
        store = await cls.open(url, clock=clock)
        try:
            yield store
        finally:
            await store.close()

    async def close(self) -> None:
        """Commits what is queued and lets the database go."""
        await asyncio.to_thread(self._writer.close)
        await asyncio.to_thread(self._readers.shutdown)
        await asyncio.to_thread(self._database.close)

    async def _write(self, work: Callable[[Connection], T]) -> T:
        return await self._writer.write(work)

    async def _read(self, work: Callable[[Connection], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._read_now, work)

    def _read_now(self, work: Callable[[Connection], T]) -> T:
        try:
            with self._database.reader.begin() as connection:
                return work(connection)
        except Exception as error:  # boundary: whatever the store says
            raise as_service_error(error) from error

    # -- sessions and metrics --------------------------------------------------------------------------------------

    async def add_session(self, session: Session) -> Session:
        return await self._write(partial(statements.add_session, new=session))

    async def session(self, owner: str, session_id: str) -> Session | None:
        return await self._read(partial(statements.session, owner=owner, session_id=session_id))

    async def touch_session(self, session_id: str, at: float) -> None:
        """Recorded within a second, together with other writes; waits for nothing."""
        self._writer.write_later(session_id, partial(statements.touch_session, session_id=session_id, at=at))

    async def add_metrics(self, metrics: Sequence[SessionMetric]) -> None:
        """Of a session that the caller has looked up."""
        await self._write(partial(statements.add_metrics, metrics=tuple(metrics)))

    async def metrics(self, owner: str, session_id: str) -> tuple[SessionMetric, ...]:
        """In the order of their arrival."""
        return await self._read(partial(statements.metrics, owner=owner, session_id=session_id))

    # -- models ----------------------------------------------------------------------------------------------------

    async def add_model(self, model: Model) -> Model:
        """The given one, or the one that has its (session_id, model_seq_id) already."""
        return await self._write(partial(statements.add_model, new=model))

    async def model(self, owner: str, model_id: str) -> Model | None:
        return await self._read(partial(statements.model, owner=owner, model_id=model_id))

    async def models(self, owner: str, limit: int, offset: int = 0) -> Page[Model]:
        """Newest first."""
        work = partial(statements.models_page, owner=owner, limit=limit, offset=offset)
        items, total = await self._read(work)
        return Page(items=items, total=total)

    async def count_active_models(self, owner: str) -> int:
        return await self._read(partial(statements.count_active_models, owner=owner))

    async def update_model(
        self,
        model_id: str,
        *,
        updated_at: float,
        status: ModelStatus | None = None,
        training_state: TrainingState | None = None,
        num_steps: int | None = None,
    ) -> Model | None:
        """Changes what is not None; the model as it is then. Its `last_seq_id` follows the operations by itself."""
        given = {"status": status, "training_state": training_state, "num_steps": num_steps}
        changes = {name: value for name, value in given.items() if value is not None} | {"updated_at": updated_at}
        return await self._write(partial(statements.update_model, model_id=model_id, changes=changes))

    async def terminate_models_idle_since(self, before: float) -> tuple[Model, ...]:
        """Active ones whose session had no heartbeat, and which ran and changed nothing, since then; as they were."""
        work = partial(statements.terminate_models_idle_since, before=before, at=self._clock())
        return await self._write(work)

    async def mark_models_lost(self) -> int:
        """At the start of a server: active models that were `trained` are `lost` with the learner. How many."""
        return await self._write(partial(statements.mark_models_lost, at=self._clock()))

    # -- operations ------------------------------------------------------------------------------------------------

    async def add_operation(self, operation: Operation) -> Operation:
        """The given one, or the one that has its (model_id, seq_id) already: compare ids to know.

        It is `pending` here until it ends; which of them run is known to `Operations` alone.
        """
        return await self._write(partial(operations.add, operation=operation))

    async def operation(self, owner: str, operation_id: str) -> Operation | None:
        return await self._read(partial(operations.get, owner=owner, operation_id=operation_id))

    async def operation_at(self, model_id: str, seq_id: int) -> Operation | None:
        """Of a model that the caller has looked up."""
        return await self._read(partial(operations.at, model_id=model_id, seq_id=seq_id))

    async def operation_attachment(self, owner: str, operation_id: str) -> bytes | None:
        """None: it has none, has not ended, or there is no such operation."""
        return await self._read(partial(operations.attachment, owner=owner, operation_id=operation_id))

    async def finish_operation(self, ended: Operation) -> bool:
        """Records response or error, and raises the model's `last_seq_id`. False: it had ended before.

        Raises:
            ValueError: `ended` has not ended.
        """
        if not ended.ended:
            raise ValueError(f"operation {ended.id} is {ended.status}; only a done or failed one can be finished")
        packed = ended.response
        if packed is not None and len(packed) < MIN_PACKED_BYTES:
            packed = pack(packed)
        elif packed is not None:
            packed = await asyncio.get_running_loop().run_in_executor(self._readers, pack, packed)
        return await self._write(partial(operations.finish, ended=ended, packed=packed))

    async def fail_unfinished(self, code: str, message: str) -> int:
        """At the start of a server, for what a former one left pending or running. How many.

        Retryable are those that need no weights which went with the process: without a model (samples), or of one that
        is `fresh` and can be made again as it was.
        """
        return await self._write(partial(operations.fail_unfinished, code=code, message=message, now=self._clock()))

    async def delete_operations_finished_before(self, before: float) -> int:
        """In small transactions. How many."""
        num_deleted = 0
        while True:
            some = await self._write(partial(operations.delete_finished_before, before=before, limit=_ROWS_PER_DELETE))
            num_deleted += some
            if some < _ROWS_PER_DELETE:
                return num_deleted

    # -- checkpoints -----------------------------------------------------------------------------------------------

    async def add_checkpoint(self, checkpoint: Checkpoint) -> Checkpoint:
        """One of the same model and name is deleted in the same transaction; sampling sessions keep its files."""
        return await self._write(partial(files.add_checkpoint, new=checkpoint))

    async def checkpoint(self, owner: str, checkpoint_id: str) -> Checkpoint | None:
        """Also a deleted one: its files stay while a sampling session refers to it. An expired one is `deleted`."""
        return await self._read(partial(files.checkpoint, owner=owner, checkpoint_id=checkpoint_id, now=self._clock()))

    async def checkpoint_named(self, owner: str, model_id: str, name: str) -> Checkpoint | None:
        """None when it is deleted or expired."""
        return await self._read(
            partial(files.checkpoint_named, owner=owner, model_id=model_id, name=name, now=self._clock())
        )

    async def checkpoints(self, owner: str, model_id: str) -> tuple[Checkpoint, ...]:
        """Neither deleted nor expired, newest first."""
        return await self._read(partial(files.checkpoints_of, owner=owner, model_id=model_id, now=self._clock()))

    async def set_checkpoint_ttl(
        self, checkpoint_id: str, ttl_seconds: int | None, expires_at: float | None
    ) -> Checkpoint | None:
        """As it is then; None when it is deleted or expired. Of a checkpoint that the caller has looked up."""
        term = {"ttl_seconds": ttl_seconds, "expires_at": expires_at}
        work = partial(files.set_checkpoint_term, checkpoint_id=checkpoint_id, term=term, now=self._clock())
        return await self._write(work)

    async def claim_unused_checkpoints(self) -> tuple[Checkpoint, ...]:
        """Deleted or failed ones without a sampling session, each once: their files are to be removed now."""
        return await self._write(files.claim_unused_checkpoints)

    async def checkpoint_ids_with_files(self) -> set[str]:
        """For `Directories.sweep`."""
        return await self._read(partial(files.ids_with_files, table=checkpoints))

    # -- artifacts -------------------------------------------------------------------------------------------------

    async def add_artifact(self, artifact: Artifact) -> Artifact:
        """A `completed` one takes the place of an earlier completed one of the same checkpoint and kind."""
        return await self._write(partial(files.add_artifact, new=artifact))

    async def artifact(self, owner: str, artifact_id: str) -> Artifact | None:
        """An expired one is `deleted`."""
        return await self._read(partial(files.artifact, owner=owner, artifact_id=artifact_id, now=self._clock()))

    async def downloadable_artifact(self, artifact_id: str) -> Artifact | None:
        """For links that the server signed, whoever follows them: a completed one that has not expired."""
        return await self._read(partial(files.downloadable, artifact_id=artifact_id, now=self._clock()))

    async def artifacts(self, owner: str, checkpoint_id: str) -> tuple[Artifact, ...]:
        """Neither deleted nor expired, newest first."""
        return await self._read(
            partial(files.artifacts_of, owner=owner, checkpoint_id=checkpoint_id, now=self._clock())
        )

    async def claim_unused_artifacts(self) -> tuple[Artifact, ...]:
        """Deleted or failed ones, each once: their files are to be removed now."""
        return await self._write(files.claim_unused_artifacts)

    async def artifact_ids_with_files(self) -> set[str]:
        """For `Directories.sweep`."""
        return await self._read(partial(files.ids_with_files, table=artifacts))

    async def delete_expired(self) -> int:
        """What has come to its term is deleted: checkpoints with their sampling sessions, and artifacts.

        An artifact without a term of its own goes with its checkpoint. How many checkpoints and artifacts.
        """
        return await self._write(partial(files.delete_expired, now=self._clock()))

    # -- sampling sessions -----------------------------------------------------------------------------------------

    async def add_sampling_session(self, sampling_session: SamplingSession) -> SamplingSession:
        """The given one, or the one that has its (session_id, seq_id) already; from then on it pins its checkpoint.

        Raises:
            ServiceError: 404 `not_found`; the checkpoint is missing, not completed, expired, or another owner's.
        """
        return await self._write(partial(statements.add_sampling_session, new=sampling_session, now=self._clock()))

    async def sampling_session(self, owner: str, sampling_session_id: str) -> SamplingSession | None:
        work = partial(statements.sampling_session, owner=owner, sampling_session_id=sampling_session_id)
        return await self._read(work)

    async def touch_sampling_session(self, sampling_session_id: str, at: float) -> None:
        """Recorded within a second, together with other writes; waits for nothing."""
        work = partial(statements.touch_sampling_session, sampling_session_id=sampling_session_id, at=at)
        self._writer.write_later(sampling_session_id, work)

    async def delete_sampling_session(self, sampling_session_id: str) -> bool:
        """False: it was not there. Of a sampling session that the caller has looked up."""
        return await self._write(partial(statements.delete_sampling_session, sampling_session_id=sampling_session_id))

    async def models_sampled_from(self) -> set[str]:
        """Those that sampling sessions are of."""
        return await self._read(statements.models_sampled_from)

    async def delete_idle_sampling_sessions(self, before: float) -> tuple[SamplingSession, ...]:
        """Those last used before; they are gone then."""
        return await self._write(partial(statements.delete_idle_sampling_sessions, before=before))
