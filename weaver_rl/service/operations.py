"""Runs operations: each once, those of a model in their order, and tells everybody who waits how they ended.

It knows neither what an operation does (a function that gives the response) nor a wire protocol.

- `submit`  produces a stored operation; waits for its row to be committed.
- `wait`    produces an operation as it stands; waits for its end, at most so long as it is told.
- `_carry`  one task per operation, from its row to its end: waits for its row, for its turn in the model's queue, for
            what it does, and for its end to be committed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol, Self

from weaver_rl.errors import ServiceError
from weaver_rl.meter import NO_METER, Meter
from weaver_rl.service.config import OperationsConfig
from weaver_rl.service.model_queue import ModelQueue, Turn
from weaver_rl.service.operation_failures import Failure
from weaver_rl.service.operation_repeats import require_same, too_late
from weaver_rl.service.operation_work import GIVE_UP_S, OperationWork, Run, failed
from weaver_rl.service.records import Model, Operation

CLOSE_TIMEOUT_S = 10.0
"""How long `close` waits for what runs."""
RETRY_S = 5.0
"""Between tries to record an end that the database did not take."""

_log = logging.getLogger(__name__)


class OperationStore(Protocol):
    """What is needed of `Store`."""

    async def add_operation(self, operation: Operation) -> Operation: ...

    async def finish_operation(self, ended: Operation) -> bool: ...

    async def operation(self, owner: str, operation_id: str) -> Operation | None: ...

    async def operation_at(self, model_id: str, seq_id: int) -> Operation | None: ...

    async def operation_attachment(self, owner: str, operation_id: str) -> bytes | None: ...

    async def model(self, owner: str, model_id: str) -> Model | None: ...


@dataclass(slots=True, eq=False, kw_only=True)
class _Entry:
    """An operation that has not ended for good."""

    operation: Operation
    """As it stands."""
    work: OperationWork
    queue: ModelQueue | None
    turn: Turn
    stored: asyncio.Future[Operation]
    """The operation that its place belongs to; or the error of storing it."""
    over: asyncio.Event = field(default_factory=asyncio.Event)
    """It has ended, or this process is done with it."""
    task: asyncio.Task[None] | None = None

    @property
    def place(self) -> tuple[str, int] | None:
        return _place(self.operation)


class Operations:
    """All operations of a server that have not ended. An asynchronous context manager, which closes it.

    A model's queue stays in memory, a few hundred bytes, until `cancel_model`.

    Example:
        async with Operations(store, config.operations) as operations:
            operation = await operations.submit(Operation(id=..., kind="optim_step", ...), run)
            ended = await operations.wait(owner, operation.id, timeout_s=20.0)
    """

    def __init__(
        self,
        store: OperationStore,
        config: OperationsConfig,
        clock: Callable[[], float] = time.time,
        meter: Meter = NO_METER,
    ) -> None:
        self._meter = meter
        self._store = store
        self._config = config
        self._clock = clock
        self._entries: dict[str, _Entry] = {}
        self._by_place: dict[tuple[str, int], _Entry] = {}
        self._queues: dict[str, ModelQueue] = {}
        self._bases: dict[ModelQueue, str] = {}
        self._opening: dict[tuple[str, str], asyncio.Task[ModelQueue]] = {}
        self._receiving: Counter[tuple[str, str]] = Counter()
        self._in_flight: Counter[str] = Counter()
        self._is_closing = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self.close()

    # -- what clients ask for --------------------------------------------------------------------------------------

    async def submit(self, operation: Operation, run: Run) -> Operation:
        """Stores it and returns at once; `run` is called when its turn comes. It goes on if the caller is cancelled.

        The same request with the same (model_id, seq_id) is taken for one sent twice: the first one is returned as it
        stands, and `run` is never called. An operation with a seq_id needs a digest.

        Raises:
            ServiceError: 409 `seq_id_conflict`, the place belongs to another request, or to the same one too long ago;
                409 `seq_id_too_late`, its place was passed; 404 `not_found`, no such model of that owner; 409
                `model_terminated`; 503 `server_stopping`; or what the store raises, and then it was not taken.
        """
        if operation.seq_id is not None and operation.digest is None:
            raise ValueError(f"operation {operation.id} has a seq_id and no digest to tell a repetition by")
        self._require_open()
        queue = None if operation.model_id is None else await self._queue(operation.owner, operation.model_id)
        self._require_open()
        if (place := _place(operation)) is not None and queue is not None:
            if (first := self._by_place.get(place)) is not None:
                return await self._first(first, operation)
            if queue.has_passed(place[1]):
                return await self._passed(operation, place, queue.next_seq_id)
        # From here on it is not the caller's: who hangs up now may send it again, and finds it.
        return await self._first(self._enter(operation, run, queue), operation)

    async def wait(self, owner: str, operation_id: str, timeout_s: float) -> Operation:
        """The operation when it ended, or as it stands after `timeout_s`.

        Raises:
            ServiceError: 404 `not_found`; it is unknown, was deleted after `keep_s`, or is another owner's.
        """
        entry = self._entries.get(operation_id)
        if entry is not None and entry.operation.owner == owner and entry.stored.done():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await entry.over.wait()
            return entry.operation
        found = await self._store.operation(owner, operation_id)
        if found is None:
            kept = f"results are kept for {self._config.keep_s:g} s"
            raise ServiceError("not_found", f"there is no operation {operation_id}; {kept}", status=404)
        return found

    async def attachment(self, owner: str, operation_id: str) -> bytes:
        """The binary part of the response of an operation that is done.

        Raises:
            ServiceError: 404 `not_found`; there is no such operation, or it has none.
        """
        operation = await self.wait(owner, operation_id, 0.0)
        found = operation.attachment
        if found is None and operation.status == "done":
            found = await self._store.operation_attachment(owner, operation_id)
        if found is None:
            raise ServiceError("not_found", f"operation {operation_id} has no binary part", status=404)
        return found

    @contextlib.contextmanager
    def receiving(self, owner: str, model_id: str) -> Iterator[None]:
        """A request of the model arrives: a missing `seq_id` may be in it, so none is given up inside the block.

        To be left when the request was submitted or skipped, not before. The model need not exist.
        """
        self._receiving[owner, model_id] += 1
        self._tell_receiving(model_id)
        try:
            yield
        finally:
            self._receiving[owner, model_id] -= 1
            if not self._receiving[owner, model_id]:
                del self._receiving[owner, model_id]
            self._tell_receiving(model_id)

    async def skip(self, owner: str, model_id: str, seq_id: int) -> None:
        """A request with that number was refused before it became an operation: nobody waits for it any more.

        Of a model that is unknown or terminated nothing happens.
        """
        with contextlib.suppress(ServiceError):
            (await self._queue(owner, model_id)).refuse(seq_id)

    def in_flight(self, owner: str) -> int:
        """How many of the owner's operations have not ended."""
        return self._in_flight[owner]

    def by_kind(self) -> Counter[str]:
        """How many have not ended."""
        return Counter(entry.operation.kind for entry in self._entries.values())

    def by_base_model(self) -> Counter[str]:
        """How many of models have not ended, by the base of the model."""
        queues = (entry.queue for entry in self._entries.values() if entry.queue is not None)
        return Counter(self._bases[queue] for queue in queues if queue in self._bases)

    # -- ends ------------------------------------------------------------------------------------------------------

    async def cancel_model(self, model_id: str, code: str, message: str, *, cancel_running: bool = False) -> None:
        """What waits fails with that reason; what runs may end by itself, unless `cancel_running`. Then it returns.

        Whoever comes meanwhile is refused with the same reason, later ones if the store says that the model is
        terminated: write that there first. If it is not, the model goes on with a new queue.
        """
        if opening := [task for (_, opened), task in self._opening.items() if opened == model_id]:
            await asyncio.wait(opening)
        queue = self._queues.get(model_id)
        if queue is None:
            return
        entries = [entry for entry in self._entries.values() if entry.queue is queue]
        for entry in entries:
            entry.work.call_off(Failure(code=code, message=message), cancel=cancel_running)
        queue.close(lambda: ServiceError(code, message, status=409))
        try:
            for entry in entries:
                await entry.over.wait()
        finally:
            if self._queues.get(model_id) is queue:
                del self._queues[model_id]
            self._bases.pop(queue, None)

    async def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Takes nothing more, waits `timeout_s` for what runs, and lets everybody go who waits.

        What has not ended by then stays so in the store: the next start tells (`Store.fail_unfinished`).
        """
        self._is_closing = True
        for queue in self._queues.values():
            queue.close(_stopping)
        running = {entry.task for entry in self._entries.values() if entry.task is not None}
        if running:
            _, running = await asyncio.wait(running, timeout=timeout_s)
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running, timeout=GIVE_UP_S)

    # -- places ----------------------------------------------------------------------------------------------------

    def _require_open(self) -> None:
        if self._is_closing:
            raise _stopping()

    async def _queue(self, owner: str, model_id: str) -> ModelQueue:
        queue = self._queues.get(model_id)
        if queue is not None and queue.owner == owner:
            return queue
        # One for all who come meanwhile; they go on in the order in which they came.
        opening = self._opening.get((owner, model_id))
        if opening is None:
            opening = asyncio.create_task(self._opened_queue(owner, model_id))
            self._opening[owner, model_id] = opening
            opening.add_done_callback(lambda _: self._opening.pop((owner, model_id), None))
        return await asyncio.shield(opening)

    async def _opened_queue(self, owner: str, model_id: str) -> ModelQueue:
        model = await self._store.model(owner, model_id)
        if model is None:
            raise ServiceError("not_found", f"there is no model {model_id}", status=404)
        if model.status != "active":
            raise ServiceError("model_terminated", f"model {model_id} was terminated", status=409)
        queue = ModelQueue(
            owner=owner,
            last_seq_id=model.last_seq_id,
            reorder_wait_s=self._config.reorder_wait_s,
            is_receiving=lambda: (owner, model_id) in self._receiving,
        )
        self._queues[model_id] = queue
        self._bases[queue] = model.base_model
        return queue

    def _tell_receiving(self, model_id: str) -> None:
        if (queue := self._queues.get(model_id)) is not None:
            queue.receiving_changed()

    def _enter(self, operation: Operation, run: Run, queue: ModelQueue | None) -> _Entry:
        entry = _Entry(
            operation=operation,
            work=OperationWork(operation, run, timeout_s=self._config.timeout_s, clock=self._clock),
            queue=queue,
            turn=Turn(seq_id=operation.seq_id),
            stored=asyncio.get_running_loop().create_future(),
        )
        if queue is not None:
            queue.place(entry.turn)
        self._entries[operation.id] = entry
        self._in_flight[operation.owner] += 1
        if entry.place is not None:
            self._by_place[entry.place] = entry
        entry.task = asyncio.create_task(self._carry(entry), name=f"{operation.kind} {operation.id}")
        return entry

    async def _first(self, entry: _Entry, operation: Operation) -> Operation:
        """The operation that has the place of `operation`, of which `entry` is the first in this process."""
        stored = await asyncio.shield(entry.stored)
        first = entry.operation if stored.id == entry.operation.id else stored
        if first.id != operation.id:
            require_same(first, operation, self._config.repeat_within_s)
        return first

    async def _passed(self, operation: Operation, place: tuple[str, int], next_seq_id: int) -> Operation:
        first = await self._store.operation_at(*place)
        if first is None:
            raise too_late(operation, next_seq_id)
        require_same(first, operation, self._config.repeat_within_s)
        return first

    def _leave(self, entry: _Entry) -> None:
        """It is no longer known here."""
        owner = entry.operation.owner
        del self._entries[entry.operation.id]
        if entry.place is not None:
            del self._by_place[entry.place]
        self._in_flight[owner] -= 1
        if not self._in_flight[owner]:
            del self._in_flight[owner]
        if not entry.stored.done():
            entry.stored.set_exception(_stopping())
        entry.over.set()

    # -- from its row to its end -----------------------------------------------------------------------------------

    async def _carry(self, entry: _Entry) -> None:
        try:
            if not await self._stored(entry):
                return
            if entry.queue is not None:
                entry.queue.stored(entry.turn)
                await entry.turn.came
            if self._is_closing:
                return
            # Told from memory alone: who restarts need not know which of them ran.
            entry.operation = replace(entry.operation, status="running")
            ended = await entry.work.ended()
            # Before the commit: the next one need not wait for the disk.
            if entry.queue is not None:
                entry.queue.ended(entry.turn)
            await self._record(entry, ended)
        finally:
            self._leave(entry)

    async def _stored(self, entry: _Entry) -> bool:
        """Whether it has its place now, and is to be run."""
        try:
            stored = await self._store.add_operation(entry.operation)
        except Exception as error:  # noqa: BLE001 - boundary of the task: who submitted it is told, whatever it is
            entry.stored.set_exception(error)
        else:
            entry.stored.set_result(stored)
            if stored.id == entry.operation.id:
                return True
        if entry.queue is not None:
            entry.queue.withdraw(entry.turn)
        return False

    async def _record(self, entry: _Entry, ended: Operation) -> None:
        """Commits its end, then lets everybody know. While the database refuses it, it is answered from memory."""
        self._meter.add("weaver_rl_service_operations_total", 1, kind=ended.kind, status=ended.status)
        if ended.finished_at is not None:
            seconds = ended.finished_at - ended.created_at
            self._meter.observe("weaver_rl_service_operation_seconds", seconds, kind=ended.kind)
        while True:
            try:
                await self._store.finish_operation(ended)
            except Exception as error:  # noqa: BLE001 - boundary of the task: a client must not wait for ever
                _log.warning("the end of operation %s was not recorded: %s", ended.id, error)
                if isinstance(error, ServiceError) and not error.retryable and ended.status == "done":
                    too_large = Failure(code="too_large", message="its response is larger than the server can keep")
                    ended = failed(ended, too_large, self._clock())
                    continue
                entry.operation = ended
                entry.over.set()
                await asyncio.sleep(RETRY_S)
            else:
                entry.operation = ended
                return


def _place(operation: Operation) -> tuple[str, int] | None:
    if operation.model_id is None or operation.seq_id is None:
        return None
    return operation.model_id, operation.seq_id


def _stopping() -> ServiceError:
    return ServiceError("server_stopping", "the server is stopping; try again", status=503, retryable=True)
