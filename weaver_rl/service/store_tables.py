"""The tables of the service's database and how records become rows. It runs no statement.

A column has the name of the record's field; what only the database needs is marked. Invariants are constraints here,
so that no program error can break them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from typing import Any, TypeVar

import zstandard
from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.engine import Dialect, Row
from sqlalchemy.types import TypeDecorator

from weaver_rl.service.records import ArtifactFile, LoraParams

R = TypeVar("R")

VERSION = 2
"""Of the layout below; a database with another one is refused."""

MIN_PACKED_BYTES = 16 * 1024
"""Responses from this size on are compressed."""

_RAW, _ZSTD = b"\x00", b"\x01"


class Words(TypeDecorator[str]):
    """Text that may come from a client: what a database cannot hold (NUL, half of a surrogate pair) becomes U+FFFD."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        if value is None:
            return None
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\x00", "\ufffd")


class Json(TypeDecorator[Any]):
    """A JSON text. Not the database's own JSON type: PostgreSQL's refuses NaN, which metadata of clients may hold."""

    impl = Text
    cache_ok = True

    def __init__(self, load: Callable[[Any], Any] | None = None) -> None:
        """`load` makes the record's value of what JSON gives."""
        super().__init__()
        self.load = load

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        return None if value is None else json.dumps(value, default=_plain, separators=(",", ":"))

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:
        if value is None:
            return None
        loaded = json.loads(value)
        return loaded if self.load is None else self.load(loaded)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence):
        return list(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _lora(loaded: dict[str, Any]) -> LoraParams:
    return LoraParams(**loaded)


def _artifact_files(loaded: list[dict[str, Any]]) -> tuple[ArtifactFile, ...]:
    return tuple(ArtifactFile(**entry) for entry in loaded)


def _id() -> Column[str]:
    return Column("id", Words, primary_key=True)


def _owner() -> Column[str]:
    return Column("owner", Words, nullable=False)


metadata = MetaData()

schema_version = Table("weaver_schema", metadata, Column("version", Integer, nullable=False))

sessions = Table(
    "sessions",
    metadata,
    _id(),
    _owner(),
    Column("created_at", Double, nullable=False),
    Column("last_seen_at", Double, nullable=False),
    Column("name", Words),
    Column("sdk_version", Words),
    Column("tags", Json(tuple), nullable=False),
    Column("labels", Json, nullable=False),
    Column("user_metadata", Json, nullable=False),
    Column("scheduling_policy", Json),
)

models = Table(
    "models",
    metadata,
    _id(),
    _owner(),
    Column("session_id", ForeignKey("sessions.id"), nullable=False),
    Column("model_seq_id", BigInteger, nullable=False),
    Column("base_model", Words, nullable=False),
    Column("training_mode", Words, nullable=False),
    Column("lora", Json(_lora)),
    Column("max_length", BigInteger, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("updated_at", Double, nullable=False),
    Column("status", Words, nullable=False),
    Column("training_state", Words, nullable=False),
    Column("num_steps", BigInteger, nullable=False),
    Column("last_seq_id", BigInteger, nullable=False),
    Column("user_metadata", Json, nullable=False),
    UniqueConstraint("session_id", "model_seq_id", name="one_model_per_number"),
    Index("models_of_owner", "owner", "created_at"),
)

operations = Table(
    "operations",
    metadata,
    _id(),
    _owner(),
    Column("kind", Words, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("model_id", ForeignKey("models.id")),
    # No foreign key: a session that was deleted leaves its answers.
    Column("sampling_session_id", Words),
    Column("seq_id", BigInteger),
    Column("digest", Words),
    Column("status", Words, nullable=False),
    Column("response", LargeBinary),
    Column("error_code", Words),
    Column("error_message", Words),
    Column("error_details", Json, nullable=False),
    Column("retryable", Boolean, nullable=False),
    Column("finished_at", Double),
    # The last: SQLite reads a row up to the columns that are asked for.
    Column("attachment", LargeBinary),
    UniqueConstraint("model_id", "seq_id", name="one_operation_per_number"),
    Index("operations_by_end", "finished_at"),
)

checkpoints = Table(
    "checkpoints",
    metadata,
    _id(),
    _owner(),
    Column("model_id", ForeignKey("models.id"), nullable=False),
    Column("name", Words, nullable=False),
    Column("kind", Words, nullable=False),
    Column("base_model", Words, nullable=False),
    Column("training_mode", Words, nullable=False),
    Column("lora", Json(_lora)),
    Column("num_steps", BigInteger, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("status", Words, nullable=False),
    Column("ttl_seconds", BigInteger),
    Column("expires_at", Double),
    # The database's own: no file of it is left, and nothing may refer to one any more.
    Column("files_removed", Boolean, nullable=False, default=False),
)
_is_kept = text("status <> 'deleted'")
Index(
    "one_checkpoint_per_name",
    checkpoints.c.model_id,
    checkpoints.c.name,
    unique=True,
    sqlite_where=_is_kept,
    postgresql_where=_is_kept,
)

artifacts = Table(
    "artifacts",
    metadata,
    _id(),
    _owner(),
    Column("checkpoint_id", ForeignKey("checkpoints.id"), nullable=False),
    Column("model_id", ForeignKey("models.id"), nullable=False),
    Column("checkpoint_name", Words, nullable=False),
    Column("kind", Words, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("updated_at", Double, nullable=False),
    Column("status", Words, nullable=False),
    Column("files", Json(_artifact_files), nullable=False),
    Column("error", Words),
    Column("ttl_seconds", BigInteger),
    Column("expires_at", Double),
    Column("files_removed", Boolean, nullable=False, default=False),
    Index("artifacts_of_checkpoint", "checkpoint_id"),
)
_is_complete = text("status = 'completed'")
Index(
    "one_artifact_per_kind",
    artifacts.c.checkpoint_id,
    artifacts.c.kind,
    unique=True,
    sqlite_where=_is_complete,
    postgresql_where=_is_complete,
)

sampling_sessions = Table(
    "sampling_sessions",
    metadata,
    _id(),
    _owner(),
    Column("session_id", ForeignKey("sessions.id"), nullable=False),
    Column("seq_id", BigInteger, nullable=False),
    Column("base_model", Words, nullable=False),
    Column("checkpoint_id", ForeignKey("checkpoints.id")),
    Column("model_id", Words),
    Column("created_at", Double, nullable=False),
    Column("last_used_at", Double, nullable=False),
    UniqueConstraint("session_id", "seq_id", name="one_sampling_session_per_number"),
    Index("sampling_sessions_of_checkpoint", "checkpoint_id"),
    Index("sampling_sessions_by_use", "last_used_at"),
)

session_metrics = Table(
    "session_metrics",
    metadata,
    # SQLite counts by itself only in a column that is called INTEGER.
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("session_id", ForeignKey("sessions.id"), nullable=False),
    Column("model_id", Words),
    Column("name", Words, nullable=False),
    Column("value", Double, nullable=False),
    Column("step", BigInteger, nullable=False),
    Column("occurred_at", Words, nullable=False),
    Column("labels", Json, nullable=False),
    Index("metrics_of_session", "session_id"),
)


def names_of(kind: type[Any]) -> tuple[str, ...]:
    """The fields of a record, which are columns of its table."""
    return tuple(item.name for item in fields(kind))


def row_of(record: Any) -> dict[str, Any]:
    return {name: getattr(record, name) for name in names_of(type(record))}


def record_of(kind: type[R], row: Row[*tuple[Any, ...]]) -> R:
    return kind(**row._mapping)


def pack(response: bytes) -> bytes:
    """As it is stored: one byte that says how, then the response, compressed when it is large."""
    if len(response) < MIN_PACKED_BYTES:
        return _RAW + response
    return _ZSTD + bytes(zstandard.ZstdCompressor(level=3).compress(response))


def unpack(stored: bytes) -> bytes:
    if stored[:1] == _RAW:
        return stored[1:]
    return bytes(zstandard.ZstdDecompressor().decompress(stored[1:]))
