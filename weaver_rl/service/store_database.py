"""How a database is reached: drivers, durability, the lock, the version of the layout. It knows no record.

One connection writes and several read. SQLite: WAL, so that readers and the writer never wait for each other, and
synchronous=FULL, so that what was committed survives SIGKILL and the loss of power.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, insert, inspect, make_url, select
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, IntegrityError, SQLAlchemyError

from weaver_rl.errors import ConfigError, ServiceError
from weaver_rl.run_folder import fsync_directory
from weaver_rl.service.exclusive_lock import ExclusiveLock
from weaver_rl.service.store_tables import VERSION, metadata, schema_version

NUM_READERS = 4
LOCK_PATIENCE_S = 5.0
"""PostgreSQL notices a killed server's connection a moment after its death."""

_BUSY_TIMEOUT_S = 30.0
_CONNECT_TIMEOUT_S = 10
_ADVISORY_LOCK = 0x776561766572
_WAL_LIMIT_BYTES = 64 * 2**20

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Database:
    """An open database of this process alone."""

    name: str
    """For messages: no password in it."""
    writer: Engine
    """One connection."""
    reader: Engine
    """`NUM_READERS` connections, which change nothing."""
    lock: ExclusiveLock | None
    """Of SQLite; with PostgreSQL the writing connection holds it."""

    def close(self) -> None:
        self.reader.dispose()
        self.writer.dispose()
        if self.lock is not None:
            self.lock.release()


def open_database(url: str) -> Database:
    """Opens it, and makes the tables of an empty one.

    Raises:
        ConfigError: it cannot be reached, another server has it, or it is not of this version.
    """
    parsed = _parsed(url)
    name = parsed.render_as_string(hide_password=True)
    lock = _sqlite_lock(parsed) if parsed.get_backend_name() == "sqlite" else None
    try:
        writer, reader = _engines(parsed, name)
        try:
            with writer.begin() as connection:
                _require_layout(connection, name)
        except BaseException:  # boundary: cleans up, then raises again
            writer.dispose()
            raise
        if lock is not None:
            fsync_directory(_file_of(parsed).parent)
    except (SQLAlchemyError, OSError) as error:
        _release(lock)
        raise ConfigError(f"the database {name} cannot be used: {reason(error)}") from error
    except BaseException:  # boundary: cleans up, then raises again
        _release(lock)
        raise
    return Database(name=name, writer=writer, reader=reader, lock=lock)


def reason(error: BaseException) -> str:
    """What the driver said, without the statement and its values."""
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    return " ".join(str(cause).split()) or type(cause).__name__


def as_service_error(error: Exception) -> Exception:
    """What a caller of the store is told; errors that are ours already stay as they are.

    What the driver said names tables and hosts: it goes to the log alone.
    """
    # A ConfigError: the connection was lost, and when it came back another server had the lock.
    if not isinstance(error, (SQLAlchemyError, OSError, OverflowError, ConfigError)):
        return error
    _log.warning("the database refused something: %s", reason(error))
    if isinstance(error, IntegrityError):
        return ServiceError("conflict", "what it refers to is gone, or there is one like it already", status=409)
    if isinstance(error, (DataError, OverflowError)) or "too big" in reason(error):
        return ServiceError("invalid_request", "a value of it is larger than the database can hold", status=400)
    message = "the server's database does not take or give anything just now; try again, and see the server's log"
    return ServiceError("storage_unavailable", message, status=503, retryable=True)


def _release(lock: ExclusiveLock | None) -> None:
    if lock is not None:
        lock.release()


def _parsed(url: str) -> URL:
    allowed = "write sqlite:////absolute/file.sqlite or postgresql+psycopg://user:password@host/name"
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise ConfigError(f"database: the text is not a database URL; {allowed}") from error
    shown = parsed.render_as_string(hide_password=True)
    if parsed.drivername == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername not in ("sqlite", "sqlite+pysqlite", "postgresql+psycopg"):
        raise ConfigError(f"database: {shown!r} asks for {parsed.drivername!r}; {allowed}")
    if parsed.get_backend_name() == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise ConfigError(f"database: {shown!r} is in memory and would not survive a restart; {allowed}")
    return parsed


def _file_of(url: URL) -> Path:
    return Path(url.database or "").absolute()


def _sqlite_lock(url: URL) -> ExclusiveLock:
    file = _file_of(url)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"database: {file.parent} cannot be made ({error.strerror})") from error
    return ExclusiveLock(file.with_name(f"{file.name}.lock"), f"the database {file}")


def _engines(url: URL, name: str) -> tuple[Engine, Engine]:
    """The writer and the reader."""
    only_one: dict[str, Any] = {"pool_size": 1, "max_overflow": 0}
    several: dict[str, Any] = {"pool_size": NUM_READERS, "max_overflow": 0}
    if url.get_backend_name() == "sqlite":
        arguments: dict[str, Any] = {"connect_args": {"timeout": _BUSY_TIMEOUT_S, "isolation_level": None}}
        writer = create_engine(url, **arguments, **only_one)
        reader = create_engine(url, **arguments, **several)
        # IMMEDIATE: a transaction that begins by reading could not become a writing one while another writes.
        _set_up_sqlite(writer, "BEGIN IMMEDIATE", "journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON")
        _set_up_sqlite(reader, "BEGIN", "query_only = ON")
        return writer, reader
    arguments = {"connect_args": {"connect_timeout": _CONNECT_TIMEOUT_S}, "pool_pre_ping": True}
    try:
        writer = create_engine(url, **arguments, **only_one)
        reader = create_engine(url, **arguments, **several)
    except ImportError as error:
        raise ConfigError(
            f"database: {name} needs psycopg, which is not installed; pip install 'weaver-rl[postgresql]'"
        ) from error
    _take_advisory_lock(writer, name)
    return writer, reader


def _set_up_sqlite(engine: Engine, begin: str, *pragmas: str) -> None:
    @event.listens_for(engine, "connect")
    def _connected(connection: Any, _: Any) -> None:
        for pragma in (*pragmas, f"journal_size_limit = {_WAL_LIMIT_BYTES}"):
            connection.execute(f"PRAGMA {pragma}")

    # Without it the driver would begin transactions by its own rules, and not for every statement.
    @event.listens_for(engine, "begin")
    def _begun(connection: Connection) -> None:
        connection.exec_driver_sql(begin)


def _take_advisory_lock(engine: Engine, name: str) -> None:
    """The connection that writes holds the lock: when it is lost, so is the lock, and nobody writes without it."""

    @event.listens_for(engine, "connect")
    def _connected(connection: Any, _: Any) -> None:
        deadline = time.monotonic() + LOCK_PATIENCE_S
        while not connection.execute("SELECT pg_try_advisory_lock(%s)", (_ADVISORY_LOCK,)).fetchone()[0]:
            connection.rollback()
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"the database {name} is in use by another server; stop that one, or give another `database`"
                )
            time.sleep(0.1)
        connection.commit()


def _require_layout(connection: Connection, name: str) -> None:
    found = set(inspect(connection).get_table_names())
    if schema_version.name not in found:
        if strange := sorted(found & set(metadata.tables)):
            raise ConfigError(
                f"the database {name} has tables of something else ({', '.join(strange)}); give another `database`"
            )
        metadata.create_all(connection)
        connection.execute(insert(schema_version).values(version=VERSION))
    written = connection.execute(select(schema_version.c.version)).scalars().all()
    if written != [VERSION]:
        raise ConfigError(
            f"the database {name} has layout version {', '.join(map(str, written)) or 'unknown'}; this version of "
            f"weaver-rl reads {VERSION}. Use the version that wrote it, or start with another `state_dir` or `database`"
        )
