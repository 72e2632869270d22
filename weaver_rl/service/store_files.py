"""What is asked of the tables of checkpoints and artifacts, inside a transaction of somebody else. It sees no file.

A checkpoint that is deleted for clients keeps its files for as long as a sampling session refers to it. `claim_*` gives
out what no row refers to any more, once: its files can then be removed without a look back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Connection, Table, and_, delete, exists, insert, select, update

from weaver_rl.service.records import Artifact, Checkpoint
from weaver_rl.service.store_statements import find, find_all, newest_first, unexpired
from weaver_rl.service.store_tables import artifacts, checkpoints, row_of, sampling_sessions

F = TypeVar("F", Checkpoint, Artifact)


def _as_of(record: F | None, now: float) -> F | None:
    """An expired one is deleted, whether it was swept or not."""
    if record is None or record.expires_at is None or record.expires_at > now:
        return record
    return replace(record, status="deleted")


def _kept(table: Table, now: float) -> ColumnElement[bool]:
    return and_(table.c.status != "deleted", unexpired(table, now))


# -- checkpoints ---------------------------------------------------------------------------------------------------


def _named(model_id: str, name: str) -> ColumnElement[bool]:
    return and_(checkpoints.c.model_id == model_id, checkpoints.c.name == name)


def add_checkpoint(connection: Connection, new: Checkpoint) -> Checkpoint:
    same = and_(_named(new.model_id, new.name), checkpoints.c.status != "deleted")
    connection.execute(update(checkpoints).where(same).values(status="deleted"))
    connection.execute(insert(checkpoints).values(row_of(new)))
    return new


def checkpoint(connection: Connection, owner: str, checkpoint_id: str, now: float) -> Checkpoint | None:
    own = and_(checkpoints.c.id == checkpoint_id, checkpoints.c.owner == owner)
    return _as_of(find(connection, checkpoints, Checkpoint, own), now)


def checkpoint_named(connection: Connection, owner: str, model_id: str, name: str, now: float) -> Checkpoint | None:
    own = and_(_named(model_id, name), checkpoints.c.owner == owner, _kept(checkpoints, now))
    return find(connection, checkpoints, Checkpoint, own)


def checkpoints_of(connection: Connection, owner: str, model_id: str, now: float) -> tuple[Checkpoint, ...]:
    own = and_(checkpoints.c.model_id == model_id, checkpoints.c.owner == owner, _kept(checkpoints, now))
    return find_all(connection, checkpoints, Checkpoint, own, order=newest_first(checkpoints))


def set_checkpoint_term(
    connection: Connection, checkpoint_id: str, term: Mapping[str, Any], now: float
) -> Checkpoint | None:
    """What has expired is not brought back."""
    kept = and_(checkpoints.c.id == checkpoint_id, _kept(checkpoints, now))
    if connection.execute(update(checkpoints).where(kept).values(**term)).rowcount == 0:
        return None
    return find(connection, checkpoints, Checkpoint, checkpoints.c.id == checkpoint_id)


def claim_unused_checkpoints(connection: Connection) -> tuple[Checkpoint, ...]:
    pinned = exists().where(sampling_sessions.c.checkpoint_id == checkpoints.c.id)
    unused = and_(checkpoints.c.status.in_(("deleted", "error")), checkpoints.c.files_removed.is_(False), ~pinned)
    claimed = find_all(connection, checkpoints, Checkpoint, unused)
    connection.execute(update(checkpoints).where(unused).values(files_removed=True))
    return claimed


# -- artifacts -----------------------------------------------------------------------------------------------------


def add_artifact(connection: Connection, new: Artifact) -> Artifact:
    _make_room(connection, new)
    connection.execute(insert(artifacts).values(row_of(new)))
    return new


def _make_room(connection: Connection, new: Artifact) -> None:
    """A completed one takes the place of an earlier one of the same checkpoint and kind."""
    if new.status == "completed":
        same = and_(artifacts.c.checkpoint_id == new.checkpoint_id, artifacts.c.kind == new.kind)
        earlier = and_(same, artifacts.c.status == "completed", artifacts.c.id != new.id)
        connection.execute(update(artifacts).where(earlier).values(status="deleted", updated_at=new.updated_at))


def artifact(connection: Connection, owner: str, artifact_id: str, now: float) -> Artifact | None:
    own = and_(artifacts.c.id == artifact_id, artifacts.c.owner == owner)
    return _as_of(find(connection, artifacts, Artifact, own), now)


def downloadable(connection: Connection, artifact_id: str, now: float) -> Artifact | None:
    complete = and_(artifacts.c.id == artifact_id, artifacts.c.status == "completed", unexpired(artifacts, now))
    return find(connection, artifacts, Artifact, complete)


def artifacts_of(connection: Connection, owner: str, checkpoint_id: str, now: float) -> tuple[Artifact, ...]:
    own = and_(artifacts.c.checkpoint_id == checkpoint_id, artifacts.c.owner == owner, _kept(artifacts, now))
    return find_all(connection, artifacts, Artifact, own, order=newest_first(artifacts))


def claim_unused_artifacts(connection: Connection) -> tuple[Artifact, ...]:
    unused = and_(artifacts.c.status.in_(("deleted", "error")), artifacts.c.files_removed.is_(False))
    claimed = find_all(connection, artifacts, Artifact, unused)
    connection.execute(update(artifacts).where(unused).values(files_removed=True))
    return claimed


# -- both ----------------------------------------------------------------------------------------------------------


def delete_expired(connection: Connection, now: float) -> int:
    past = select(checkpoints.c.id).where(checkpoints.c.expires_at <= now)
    connection.execute(delete(sampling_sessions).where(sampling_sessions.c.checkpoint_id.in_(past)))
    num_deleted = 0
    for table in (checkpoints, artifacts):
        expired = and_(table.c.status != "deleted", table.c.expires_at <= now)
        num_deleted += connection.execute(update(table).where(expired).values(status="deleted")).rowcount
    gone = exists().where(checkpoints.c.id == artifacts.c.checkpoint_id, checkpoints.c.status == "deleted")
    orphaned = and_(artifacts.c.expires_at.is_(None), artifacts.c.status.in_(("completed", "error")), gone)
    return num_deleted + connection.execute(update(artifacts).where(orphaned).values(status="deleted")).rowcount


def ids_with_files(connection: Connection, table: Table) -> set[str]:
    """What must stay on disk, for clients or for a sampling session."""
    return set(connection.execute(select(table.c.id).where(table.c.files_removed.is_(False))).scalars())
