"""What happened to every group of a run, in order, on disk before anyone relies on it. It does not judge: `audit` does.

One SQLite file (WAL, synchronous=FULL) that only grows: rows are never changed or removed, by triggers too. A thread
owns the connection and commits everything queued so far as one transaction, so that an append costs the event loop
microseconds however slow the disk is. What `flush` returned for survives SIGKILL and power loss; what was appended
after it may be missing, always from the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import operator
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from weaver_rl.errors import JournalError
from weaver_rl.run_folder import fsync_directory

FILE_NAME = "journal.sqlite"
"""Its name in the run folder. SQLite keeps `-wal` and `-shm` beside it: whoever removes it removes those too."""

Kind = Literal[
    "started",
    "dispatched",
    "reissued",
    "generated",
    "scored",
    "trained",
    "dropped",
    "committed",
    "rewound",
    "ended",
    "noted",
]

CLOSE_TIMEOUT_S = 60.0
"""Seconds that `close` waits for the disk before it says that events are lost."""

_BUSY_TIMEOUT_S = 30.0
_ROWS_PER_READ = 4096
_APPLICATION_ID = 0x57524A4C
_FORMAT = 1
_COLUMNS = "time_s, kind, group_id, position, step, sampler, oldest_version, newest_version, detail"
_INSERT = f"INSERT INTO events ({_COLUMNS}) VALUES ({', '.join('?' * 9)})"
_SCHEMA = (
    "CREATE TABLE events (seq INTEGER PRIMARY KEY, time_s REAL NOT NULL, kind TEXT NOT NULL, group_id TEXT, "
    "position INTEGER, step INTEGER, sampler TEXT, oldest_version INTEGER, newest_version INTEGER, detail TEXT)",
    "CREATE TRIGGER events_stay BEFORE DELETE ON events BEGIN SELECT RAISE(ABORT, 'the journal only grows'); END",
    "CREATE TRIGGER events_keep BEFORE UPDATE ON events BEGIN SELECT RAISE(ABORT, 'the journal only grows'); END",
    # INSERT OR REPLACE removes the old row without asking the DELETE trigger.
    "CREATE TRIGGER events_once BEFORE INSERT ON events WHEN EXISTS (SELECT 1 FROM events WHERE seq = NEW.seq) "
    "BEGIN SELECT RAISE(ABORT, 'the journal only grows'); END",
    f"PRAGMA application_id = {_APPLICATION_ID}",
    f"PRAGMA user_version = {_FORMAT}",
)

_Row = tuple[float, Kind, str | None, int | None, int | None, str | None, int | None, int | None, str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalEvent:
    """One row of the journal.

    Example:
        JournalEvent(seq=7, time_s=1767225600.0, kind="trained", group_id="00000012", step=4, detail={"order": 0})
    """

    seq: int
    """1, 2, 3 … without gaps, over all processes of the run."""
    time_s: float
    """Seconds since the epoch, when it was appended."""
    kind: Kind
    group_id: str | None = None
    position: int | None = None
    """Place of the prompt in the training stream; only of `dispatched`."""
    step: int | None = None
    """Counted over all phases. Of `rewound`: the last step that stands."""
    sampler: str | None = None
    oldest_version: int | None = None
    """Of the group's tokens; of `dispatched`: that of the samplers when the group was admitted."""
    newest_version: int | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)
    """The other arguments of the method that appended it, as JSON gives them back."""


class Journal:
    """The journal of the run that this process makes. Any thread may append; nothing but `flush` and `close` waits.

    When a write fails, that and everything after it is lost, and said: `flush` and every later append raise
    JournalError. `close` raises it only if nobody was told before, and leaving the block with another error never
    hides that one: the failure becomes a note on it.

    Example:
        with Journal(run_dir / FILE_NAME) as journal:
            journal.dispatched("00000000", position=0, prompt_id="p-0", version=0)
            await journal.flush()
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        """Opens the file, or makes it; a later process goes on where an earlier one ended."""
        self._path = path
        self._clock = clock
        self._changed = threading.Condition()
        self._queue: list[_Row] = []
        self._num_appended = 0
        self._num_durable = 0
        self._waiters: deque[tuple[int, asyncio.AbstractEventLoop, asyncio.Future[None]]] = deque()
        self._failure: Exception | None = None
        self._failure_told = False
        self._closing = False
        self._connection = _open_for_writing(path)
        self._identities = _identities(path)
        # A daemon: a process that ends without `close` must end.
        self._thread = threading.Thread(target=self._write_all, name="journal", daemon=True)
        self._thread.start()

    # -- events --------------------------------------------------------------------------------------------------

    def started(
        self, *, first_position: int, first_step: int, last_step: int, groups_per_step: int, max_lag: int, resumed: bool
    ) -> None:
        """A process began or took up the run; `first_position` and `first_step` are those of the whole run."""
        self._append(
            "started",
            first_position=first_position,
            first_step=first_step,
            last_step=last_step,
            groups_per_step=groups_per_step,
            max_lag=max_lag,
            resumed=resumed,
        )

    def dispatched(self, group_id: str, *, position: int, prompt_id: str, version: int) -> None:
        """A group was admitted while the samplers had `version`."""
        self._append("dispatched", group_id, position=position, oldest_version=version, prompt_id=prompt_id)

    def reissued(self, group_id: str, *, sampler: str, reason: str) -> None:
        """`sampler` was lost with the group unfinished; it goes to another."""
        self._append("reissued", group_id, sampler=sampler, reason=reason)

    def generated(
        self, group_id: str, *, sampler: str, oldest_version: int, newest_version: int, num_tokens: int
    ) -> None:
        """Every completion of the group is there."""
        self._append(
            "generated",
            group_id,
            sampler=sampler,
            oldest_version=oldest_version,
            newest_version=newest_version,
            num_tokens=num_tokens,
        )

    def scored(self, group_id: str, *, num_missing: int) -> None:
        """The group is finished, with this many rewards missing."""
        self._append("scored", group_id, num_missing=num_missing)

    def trained(self, group_id: str, *, step: int, order: int) -> None:
        """The update of `step` used the group, at place `order` of its batch (from 0)."""
        self._append("trained", group_id, step=step, order=order)

    def dropped(self, group_id: str, *, step: int, reason: str) -> None:
        """The group took its place in the batch of `step` and gave no data."""
        self._append("dropped", group_id, step=step, reason=reason)

    def committed(self, *, step: int) -> None:
        """The checkpoint of `step` is in place."""
        self._append("committed", step=step)

    def rewound(self, *, step: int, reason: str, finished: Sequence[str], in_flight: Sequence[str]) -> None:
        """The run went back to the checkpoint of `step`, which carries these groups; all else after it is undone."""
        self._append("rewound", step=step, reason=reason, finished=list(finished), in_flight=list(in_flight))

    def ended(self, *, state: Literal["finished", "interrupted", "failed"], reason: str | None) -> None:
        """This process is done with the run."""
        self._append("ended", state=state, reason=reason)

    def noted(self, subject: str, what: str, **detail: Any) -> None:
        """Something that no rule depends on: ("sampler 1", "lost"), ("learner", "restarted")."""
        self._append("noted", **detail | {"subject": subject, "what": what})

    # -- durability ----------------------------------------------------------------------------------------------

    async def flush(self) -> None:
        """Returns when everything appended before is on disk. It sets no deadline and may be cancelled."""
        loop = asyncio.get_running_loop()
        with self._changed:
            self._require_sound()
            if self._num_durable == self._num_appended:
                return
            done: asyncio.Future[None] = loop.create_future()
            self._waiters.append((self._num_appended, loop, done))
        try:
            await done
        except JournalError:
            self._failure_told = True
            raise

    def close(self) -> None:
        """Writes what is queued and ends the thread; see the class for what happens after a failure."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            self._fail(TimeoutError(f"the disk did not answer for {CLOSE_TIMEOUT_S:.0f} s"))
        with self._changed:
            if not self._failure_told:
                self._require_sound()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except JournalError as failure:
            if error is None:
                raise
            error.add_note(str(failure))

    def _append(
        self,
        kind: Kind,
        group_id: str | None = None,
        *,
        position: int | None = None,
        step: int | None = None,
        sampler: str | None = None,
        oldest_version: int | None = None,
        newest_version: int | None = None,
        **detail: Any,
    ) -> None:
        # Encoded here, not in the thread: what cannot be written is the caller's error, and later changes do not count.
        encoded = json.dumps(detail, separators=(",", ":"), default=str) if detail else None
        # numpy's integers would be stored as bytes.
        numbers = [None if n is None else operator.index(n) for n in (position, step, oldest_version, newest_version)]
        with self._changed:
            self._require_sound()
            if self._closing:
                raise JournalError(f"the journal {self._path} is closed; `{kind}` cannot be appended")
            row = (self._clock(), kind, group_id, numbers[0], numbers[1], sampler, numbers[2], numbers[3], encoded)
            self._queue.append(row)
            self._num_appended += 1
            self._changed.notify()

    def _require_sound(self) -> None:
        if self._failure is None:
            return
        self._failure_told = True
        raise self._failure_in_words() from self._failure

    def _failure_in_words(self) -> JournalError:
        lost = self._num_appended - self._num_durable
        return JournalError(
            f"the journal {self._path} cannot be written: {self._failure}. The last {lost} events are lost. "
            "See to the disk (free some space, if it is full) and continue with --resume"
        )

    # -- the thread ----------------------------------------------------------------------------------------------

    def _write_all(self) -> None:
        try:
            while batch := self._next_batch():
                with _transaction(self._connection):
                    self._connection.executemany(_INSERT, batch)
                self._require_same_files()
                self._acknowledge(len(batch))
        except Exception as error:  # noqa: BLE001 - boundary of the thread: whatever it is, those who wait must be told
            self._fail(error)
        finally:
            # Tidies the WAL into the file; if that fails, the WAL is read as before.
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()

    def _next_batch(self) -> list[_Row]:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing)
            batch, self._queue = self._queue, []
        return batch

    def _require_same_files(self) -> None:
        """A removed file takes writes without an error, as long as it is open."""
        if _identities(self._path) != self._identities:
            raise FileNotFoundError("the file or its -wal was removed or replaced while the run was writing it")

    def _acknowledge(self, count: int) -> None:
        with self._changed:
            self._num_durable += count
            while self._waiters and self._waiters[0][0] <= self._num_durable:
                _, loop, done = self._waiters.popleft()
                _settle(loop, done, None)

    def _fail(self, error: Exception) -> None:
        with self._changed:
            self._failure = self._failure or error
            while self._waiters:
                _, loop, done = self._waiters.popleft()
                _settle(loop, done, self._failure_in_words())


def read_events(path: Path, after: int = 0) -> Iterator[JournalEvent]:
    """Events later than number `after`, in order; also while the run writes, from another process.

    It reads in chunks, each in a transaction of its own: a slow reader holds up nobody.
    """
    if not path.is_file():
        raise JournalError(f"there is no journal at {path}; give the folder of a run that writes one")
    with _read_errors(path):
        connection = sqlite3.connect(
            f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=_BUSY_TIMEOUT_S, isolation_level=None
        )
        try:
            if not _has_tables(connection):
                raise JournalError(f"the journal {path} has no events: its run has not begun")
            _require_journal(connection, path)
        except BaseException:  # boundary: cleans up, then raises again
            connection.close()
            raise
    return _rows(connection, path, after)


def _rows(connection: sqlite3.Connection, path: Path, after: int) -> Iterator[JournalEvent]:
    query = f"SELECT seq, {_COLUMNS} FROM events WHERE seq > ? ORDER BY seq LIMIT {_ROWS_PER_READ}"
    with contextlib.closing(connection):
        while True:
            with _read_errors(path):
                events = [_event(row) for row in connection.execute(query, (after,))]
            if not events:
                return
            yield from events
            after = events[-1].seq


def _event(row: tuple[Any, ...]) -> JournalEvent:
    seq, time_s, kind, group_id, position, step, sampler, oldest_version, newest_version, detail = row
    return JournalEvent(
        seq=seq,
        time_s=time_s,
        kind=kind,
        group_id=group_id,
        position=position,
        step=step,
        sampler=sampler,
        oldest_version=oldest_version,
        newest_version=newest_version,
        detail={} if detail is None else json.loads(detail),
    )


def _open_for_writing(path: Path) -> sqlite3.Connection:
    with _read_errors(path):
        connection = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        try:
            if _has_tables(connection):
                _require_journal(connection, path)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            if not _has_tables(connection):
                with _transaction(connection):
                    for statement in _SCHEMA:
                        connection.execute(statement)
                fsync_directory(path.parent)
            # An empty write: the WAL file is there from now on, and a disk that takes nothing says so at once.
            with _transaction(connection):
                connection.execute(f"PRAGMA user_version = {_FORMAT}")
        except BaseException:  # boundary: cleans up, then raises again
            connection.close()
            raise
    return connection


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:  # boundary: cleans up, then raises again
        with contextlib.suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise


def _has_tables(connection: sqlite3.Connection) -> bool:
    return bool(connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])


def _require_journal(connection: sqlite3.Connection, path: Path) -> None:
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (written,) = connection.execute("PRAGMA user_version").fetchone()
    if application != _APPLICATION_ID:
        raise JournalError(f"{path} is a database of something else, not the journal of a run; move it away")
    if written != _FORMAT:
        raise JournalError(f"the journal {path} has format {written}; this version of weaver-rl reads {_FORMAT}")


@contextlib.contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError, ValueError) as error:
        raise JournalError(f"{path} cannot be used as the journal of a run: {error}") from error


def _identities(path: Path) -> tuple[tuple[int, int] | None, ...]:
    """Device and inode of the file and its WAL; None where there is none."""

    def identity(file: Path) -> tuple[int, int] | None:
        try:
            found = file.stat()
        except FileNotFoundError:
            return None
        return found.st_dev, found.st_ino

    return identity(path), identity(path.with_name(f"{path.name}-wal"))


def _settle(loop: asyncio.AbstractEventLoop, done: asyncio.Future[None], error: JournalError | None) -> None:
    def settle() -> None:
        if done.done():
            return
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    # A closed loop: nobody waits there any more.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(settle)
