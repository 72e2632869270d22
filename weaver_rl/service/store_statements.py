"""What is asked of the tables of sessions, models and sampling sessions, inside a transaction of somebody else.

Nothing here commits; a function that changes something may be done again after its transaction failed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Connection, Table, and_, delete, exists, func, insert, or_, select, update

from weaver_rl.errors import ServiceError
from weaver_rl.service.records import Checkpoint, Model, SamplingSession, Session, SessionMetric
from weaver_rl.service.store_tables import (
    checkpoints,
    models,
    names_of,
    operations,
    record_of,
    row_of,
    sampling_sessions,
    session_metrics,
    sessions,
)

R = TypeVar("R")


def find(connection: Connection, table: Table, kind: type[R], *where: ColumnElement[bool]) -> R | None:
    row = connection.execute(select(*(table.c[name] for name in names_of(kind))).where(*where)).first()
    return None if row is None else record_of(kind, row)


def find_all(
    connection: Connection, table: Table, kind: type[R], *where: ColumnElement[bool], order: Sequence[Any] = ()
) -> tuple[R, ...]:
    query = select(*(table.c[name] for name in names_of(kind))).where(*where).order_by(*order)
    return tuple(record_of(kind, row) for row in connection.execute(query))


def newest_first(table: Table) -> tuple[Any, Any]:
    return table.c.created_at.desc(), table.c.id.desc()


def unexpired(table: Table, now: float) -> ColumnElement[bool]:
    return or_(table.c.expires_at.is_(None), table.c.expires_at > now)


# -- sessions ------------------------------------------------------------------------------------------------------


def add_session(connection: Connection, new: Session) -> Session:
    connection.execute(insert(sessions).values(row_of(new)))
    return new


def session(connection: Connection, owner: str, session_id: str) -> Session | None:
    return find(connection, sessions, Session, sessions.c.id == session_id, sessions.c.owner == owner)


def touch_session(connection: Connection, session_id: str, at: float) -> None:
    newer = and_(sessions.c.id == session_id, sessions.c.last_seen_at < at)
    connection.execute(update(sessions).where(newer).values(last_seen_at=at))


def add_metrics(connection: Connection, metrics: Sequence[SessionMetric]) -> None:
    if metrics:
        connection.execute(insert(session_metrics), [row_of(metric) for metric in metrics])


def metrics(connection: Connection, owner: str, session_id: str) -> tuple[SessionMetric, ...]:
    if session(connection, owner, session_id) is None:
        return ()
    of_session = session_metrics.c.session_id == session_id
    return find_all(connection, session_metrics, SessionMetric, of_session, order=[session_metrics.c.id])


# -- models --------------------------------------------------------------------------------------------------------


def add_model(connection: Connection, new: Model) -> Model:
    same = and_(models.c.session_id == new.session_id, models.c.model_seq_id == new.model_seq_id)
    known = find(connection, models, Model, same)
    if known is None:
        connection.execute(insert(models).values(row_of(new)))
    return known or new


def model(connection: Connection, owner: str, model_id: str) -> Model | None:
    return find(connection, models, Model, models.c.id == model_id, models.c.owner == owner)


def models_page(connection: Connection, owner: str, limit: int, offset: int) -> tuple[tuple[Model, ...], int]:
    of_owner = models.c.owner == owner
    query = select(*(models.c[name] for name in names_of(Model))).where(of_owner).order_by(*newest_first(models))
    rows = connection.execute(query.limit(limit).offset(offset))
    items = tuple(record_of(Model, row) for row in rows)
    return items, connection.execute(select(func.count()).select_from(models).where(of_owner)).scalar_one()


def count_active_models(connection: Connection, owner: str) -> int:
    # One that is lost has nothing in a learner; its owner may not even know that it is still there.
    active = and_(models.c.owner == owner, models.c.status == "active", models.c.training_state != "lost")
    return connection.execute(select(func.count()).select_from(models).where(active)).scalar_one()


def update_model(connection: Connection, model_id: str, changes: Mapping[str, Any]) -> Model | None:
    connection.execute(update(models).where(models.c.id == model_id).values(**changes))
    return find(connection, models, Model, models.c.id == model_id)


def mark_models_lost(connection: Connection, at: float) -> int:
    """Active ones whose weights were in a learner."""
    gone = and_(models.c.status == "active", models.c.training_state == "trained")
    return connection.execute(update(models).where(gone).values(training_state="lost", updated_at=at)).rowcount


def terminate_models_idle_since(connection: Connection, before: float, at: float) -> tuple[Model, ...]:
    silent = exists().where(sessions.c.id == models.c.session_id, sessions.c.last_seen_at < before)
    busy = exists().where(operations.c.model_id == models.c.id, operations.c.created_at >= before)
    idle = and_(models.c.status == "active", models.c.updated_at < before, silent, ~busy)
    found = find_all(connection, models, Model, idle)
    connection.execute(update(models).where(idle).values(status="terminated", updated_at=at))
    return found


def raise_last_seq_id(connection: Connection, model_id: str, seq_id: int) -> None:
    lower = and_(models.c.id == model_id, models.c.last_seq_id < seq_id)
    connection.execute(update(models).where(lower).values(last_seq_id=seq_id))


# -- sampling sessions ---------------------------------------------------------------------------------------------


def add_sampling_session(connection: Connection, new: SamplingSession, now: float) -> SamplingSession:
    """The checkpoint is looked at here, in the transaction, so that its files cannot go in between."""
    same = and_(sampling_sessions.c.session_id == new.session_id, sampling_sessions.c.seq_id == new.seq_id)
    known = find(connection, sampling_sessions, SamplingSession, same)
    if known is not None:
        return known
    if new.checkpoint_id is not None:
        usable = and_(
            checkpoints.c.id == new.checkpoint_id,
            checkpoints.c.owner == new.owner,
            checkpoints.c.status == "completed",
            unexpired(checkpoints, now),
        )
        if find(connection, checkpoints, Checkpoint, usable) is None:
            raise ServiceError(
                "not_found", f"checkpoint {new.checkpoint_id} has expired or was replaced; export again", status=404
            )
    connection.execute(insert(sampling_sessions).values(row_of(new)))
    return new


def sampling_session(connection: Connection, owner: str, sampling_session_id: str) -> SamplingSession | None:
    own = and_(sampling_sessions.c.id == sampling_session_id, sampling_sessions.c.owner == owner)
    return find(connection, sampling_sessions, SamplingSession, own)


def touch_sampling_session(connection: Connection, sampling_session_id: str, at: float) -> None:
    newer = and_(sampling_sessions.c.id == sampling_session_id, sampling_sessions.c.last_used_at < at)
    connection.execute(update(sampling_sessions).where(newer).values(last_used_at=at))


def delete_sampling_session(connection: Connection, sampling_session_id: str) -> bool:
    this = sampling_sessions.c.id == sampling_session_id
    return connection.execute(delete(sampling_sessions).where(this)).rowcount > 0


def models_sampled_from(connection: Connection) -> set[str]:
    of = sampling_sessions.c.model_id
    return set(connection.execute(select(of).where(of.is_not(None)).distinct()).scalars())


def delete_idle_sampling_sessions(connection: Connection, before: float) -> tuple[SamplingSession, ...]:
    idle = sampling_sessions.c.last_used_at < before
    gone = find_all(connection, sampling_sessions, SamplingSession, idle)
    connection.execute(delete(sampling_sessions).where(idle))
    return gone
