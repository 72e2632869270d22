"""One thread that writes, many that wait: writes that arrive together share a transaction. It knows no table.

- `write`        produces the result of a piece of work; waits for the commit of the transaction that has it.
- `write_later`  waits for nothing: it goes with the next transaction, at the latest after LATER_S.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine

from weaver_rl.errors import ServiceError
from weaver_rl.service.store_database import as_service_error

T = TypeVar("T")
Work = Callable[[Connection], T]
"""What is done in a transaction. It may be done again after one that failed, so it changes nothing else."""

LATER_S = 1.0
"""What a kill may lose of `write_later`."""

MAX_BATCH = 1000
CLOSE_TIMEOUT_S = 30.0

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Write:
    work: Work[Any]
    loop: asyncio.AbstractEventLoop | None
    done: asyncio.Future[Any] | None
    result: Any = None
    error: Exception | None = None


class Writer:
    """Any thread may write. After `close` everything is refused with `storage_unavailable`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._changed = threading.Condition()
        self._writes: list[_Write] = []
        self._later: dict[Hashable, Work[Any]] = {}
        self._later_since = 0.0
        self._closing = False
        # A daemon: a process that ends without `close` must end.
        self._thread = threading.Thread(target=self._write_all, name="store writer", daemon=True)
        self._thread.start()

    async def write(self, work: Work[T]) -> T:
        """Returns when it is committed. When the caller is cancelled meanwhile it is committed all the same."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()
        with self._changed:
            if self._closing:
                raise ServiceError("storage_unavailable", "the server is stopping", status=503, retryable=True)
            self._writes.append(_Write(work, loop, done))
            self._changed.notify()
        return await done

    def write_later(self, key: Hashable, work: Work[Any]) -> None:
        """A later work with the same key takes the place of one that was not done yet. An error is only logged."""
        with self._changed:
            if not self._later:
                self._later_since = time.monotonic()
                self._changed.notify()
            self._later[key] = work

    def close(self) -> None:
        """Commits what is queued and ends the thread; blocks meanwhile, at most CLOSE_TIMEOUT_S."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            _log.error("the database did not answer for %g s; what was being written is lost", CLOSE_TIMEOUT_S)

    def _write_all(self) -> None:
        while batch := self._next_batch():
            self._commit(batch)
            _settle(batch)

    def _next_batch(self) -> list[_Write]:
        with self._changed:
            while not self._writes and not self._closing:
                wait_s = self._later_since + LATER_S - time.monotonic() if self._later else None
                if wait_s is not None and wait_s <= 0:
                    break
                self._changed.wait(wait_s)
            later, self._later = self._later, {}
            writes, self._writes = self._writes[:MAX_BATCH], self._writes[MAX_BATCH:]
        # Those first: what is awaited may rest on them, and never the other way round.
        return [_Write(work, None, None) for work in later.values()] + writes

    def _commit(self, batch: Sequence[_Write]) -> None:
        try:
            with self._engine.begin() as connection:
                for write in batch:
                    write.result = write.work(connection)
        except Exception as error:  # noqa: BLE001 - boundary of the thread: whatever it is, those who wait must be told
            if len(batch) == 1:
                batch[0].error = as_service_error(error)
                return
            # One that fails must not take the others with it: each again, in a transaction of its own.
            for write in batch:
                self._commit([write])


def _settle(batch: Sequence[_Write]) -> None:
    by_loop: dict[asyncio.AbstractEventLoop, list[_Write]] = {}
    for write in batch:
        if write.loop is not None:
            by_loop.setdefault(write.loop, []).append(write)
        elif write.error is not None:
            _log.warning("a note that can be done without was not written: %s", write.error)
    for loop, writes in by_loop.items():
        # A closed loop: nobody waits there any more.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(_tell, writes)


def _tell(writes: Sequence[_Write]) -> None:
    for write in writes:
        if write.done is None or write.done.done():
            continue
        if write.error is not None:
            write.done.set_exception(write.error)
        else:
            write.done.set_result(write.result)
