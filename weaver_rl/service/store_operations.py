"""What is asked of the table of operations, inside a transaction of somebody else. Responses in it are packed.

An operation is read without its attachment, which may be large and which hardly anybody who polls wants.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, and_, bindparam, case, delete, exists, func, insert, or_, select, update
from sqlalchemy.engine import Row

from weaver_rl.service.records import Operation
from weaver_rl.service.store_statements import raise_last_seq_id
from weaver_rl.service.store_tables import models, names_of, operations, record_of, row_of, unpack

_COLUMNS = tuple(operations.c[name] for name in names_of(Operation) if name != "attachment")
_UNFINISHED = operations.c.status == "pending"
# Made once: for every sample they are executed, and to make them takes longer than that.
_INSERT = insert(operations)
_GET = select(*_COLUMNS).where(operations.c.id == bindparam("this_id"), operations.c.owner == bindparam("this_owner"))
_ATTACHMENT = select(operations.c.attachment).where(
    operations.c.id == bindparam("this_id"), operations.c.owner == bindparam("this_owner")
)
_FINISH = update(operations).where(operations.c.id == bindparam("this_id"), _UNFINISHED)


def _record(row: Row[*tuple[Any, ...]] | None) -> Operation | None:
    if row is None:
        return None
    found = record_of(Operation, row)
    return found if found.response is None else replace(found, response=unpack(found.response))


def add(connection: Connection, operation: Operation) -> Operation:
    """The given one, or the one that has its place already."""
    if operation.model_id is not None and operation.seq_id is not None:
        known = at(connection, operation.model_id, operation.seq_id)
        if known is not None:
            return known
    connection.execute(_INSERT, row_of(operation))
    return operation


def get(connection: Connection, owner: str, operation_id: str) -> Operation | None:
    return _record(connection.execute(_GET, {"this_id": operation_id, "this_owner": owner}).first())


def attachment(connection: Connection, owner: str, operation_id: str) -> bytes | None:
    return connection.execute(_ATTACHMENT, {"this_id": operation_id, "this_owner": owner}).scalar_one_or_none()


def at(connection: Connection, model_id: str, seq_id: int) -> Operation | None:
    place = and_(operations.c.model_id == model_id, operations.c.seq_id == seq_id)
    return _record(connection.execute(select(*_COLUMNS).where(place)).first())


def finish(connection: Connection, ended: Operation, packed: bytes | None) -> bool:
    """False: it had ended before, and stays as it was."""
    values = {
        "this_id": ended.id,
        "status": ended.status,
        "response": packed,
        "attachment": ended.attachment,
        "error_code": ended.error_code,
        "error_message": ended.error_message,
        "error_details": ended.error_details,
        "retryable": ended.retryable,
        "finished_at": ended.finished_at,
    }
    if connection.execute(_FINISH, values).rowcount == 0:
        return False
    if ended.model_id is not None and ended.seq_id is not None:
        raise_last_seq_id(connection, ended.model_id, ended.seq_id)
    return True


def fail_unfinished(connection: Connection, code: str, message: str, now: float) -> int:
    """Retryable is what needs no weights that went with the process: no model, or one that can be made again."""
    of_models = select(operations.c.model_id, func.max(operations.c.seq_id)).where(
        _UNFINISHED, operations.c.model_id.is_not(None), operations.c.seq_id.is_not(None)
    )
    for model_id, seq_id in connection.execute(of_models.group_by(operations.c.model_id)).all():
        raise_last_seq_id(connection, model_id, seq_id)
    can_be_made_again = exists().where(
        models.c.id == operations.c.model_id, models.c.training_state == "fresh", models.c.status == "active"
    )
    retryable = case((or_(operations.c.model_id.is_(None), can_be_made_again), True), else_=False)
    values = {"status": "error", "error_code": code, "error_message": message, "finished_at": now}
    return connection.execute(update(operations).where(_UNFINISHED).values(**values, retryable=retryable)).rowcount


def delete_finished_before(connection: Connection, before: float, limit: int) -> int:
    """At most `limit` of them: one transaction must not hold up the others for long."""
    oldest = select(operations.c.id).where(operations.c.finished_at < before).limit(limit)
    return connection.execute(delete(operations).where(operations.c.id.in_(oldest))).rowcount
