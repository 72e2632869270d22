"""What the service remembers, on SQLite and on a real PostgreSQL: records, owners, terms, and what a restart finds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from service_databases import postgres as postgres
from service_databases import url as url
from service_records import (
    ODD_TEXT,
    OWNER,
    a_checkpoint,
    a_metric,
    a_model,
    a_sampling_session,
    a_session,
    an_artifact,
    an_operation,
    new_id,
)
from sqlalchemy import insert, select, text
from sqlalchemy.exc import IntegrityError

from weaver_rl.errors import ServiceError
from weaver_rl.service import store_tables as tables
from weaver_rl.service.records import Model, Session
from weaver_rl.service.store import Store
from weaver_rl.service.store_tables import MIN_PACKED_BYTES, row_of

pytestmark = pytest.mark.unit

NOW = 1000.0


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


class Rows:
    """An open store with a session and a model."""

    def __init__(self, store: Store, clock: Clock, session: Session, model: Model) -> None:
        self.store, self.clock, self.session, self.model = store, clock, session, model

    def execute(self, statement: Any, *values: Any) -> Any:
        """Past the store, as a program error would."""
        with self.store._database.writer.begin() as connection:
            result = connection.execute(statement, *values)
            return result.all() if result.returns_rows else None


@asynccontextmanager
async def filled(url: str) -> AsyncIterator[Rows]:
    clock = Clock()
    async with Store.opened(url, clock=clock) as store:
        session = await store.add_session(a_session())
        model = await store.add_model(a_model(session.id))
        yield Rows(store, clock, session, model)


def refused(error: pytest.ExceptionInfo[ServiceError]) -> tuple[str, int, bool]:
    return error.value.code, error.value.status, error.value.retryable


# -- records -----------------------------------------------------------------------------------------------------------


def test_records_come_back_as_they_were_also_after_a_restart(url: str):
    async def scenario() -> None:
        async with filled(url) as rows:
            store, session, model = rows.store, rows.session, rows.model
            operation = await store.add_operation(an_operation(model.id, 1))
            sample = await store.add_operation(an_operation(sampling_session_id="s", owner="b"))
            checkpoint = await store.add_checkpoint(a_checkpoint(model.id, ttl_seconds=10, expires_at=NOW + 10))
            artifact = await store.add_artifact(an_artifact(checkpoint))
            sampling = await store.add_sampling_session(a_sampling_session(session.id, checkpoint_id=checkpoint.id))
            whole = await store.add_model(a_model(session.id, 2, training_mode="full_ft", lora=None))
            placed = await store.add_session(a_session(scheduling_policy={"mode": "fixed", "clusters": ["a"]}))
            await store.add_metrics([a_metric(session.id), a_metric(session.id, model_id=None, step=4)])
            await store.add_metrics([])
        async with Store.opened(url, clock=rows.clock) as store:
            assert await store.session(OWNER, session.id) == session
            assert await store.session(OWNER, placed.id) == placed
            assert await store.model(OWNER, model.id) == model
            assert await store.model(OWNER, whole.id) == whole
            assert await store.operation(OWNER, operation.id) == operation
            assert await store.operation_at(model.id, 1) == operation
            assert await store.operation("b", sample.id) == sample
            assert await store.checkpoint(OWNER, checkpoint.id) == checkpoint
            assert await store.checkpoint_named(OWNER, model.id, "one") == checkpoint
            assert await store.checkpoints(OWNER, model.id) == (checkpoint,)
            assert (
                await store.artifact(OWNER, artifact.id) == artifact == await store.downloadable_artifact(artifact.id)
            )
            assert await store.artifacts(OWNER, checkpoint.id) == (artifact,)
            assert await store.sampling_session(OWNER, sampling.id) == sampling
            first, second = await store.metrics(OWNER, session.id)
            assert (first, second) == (a_metric(session.id), a_metric(session.id, model_id=None, step=4))

    asyncio.run(scenario())


def test_what_belongs_to_another_owner_is_not_there(url: str):
    async def scenario() -> None:
        async with filled(url) as rows:
            store, model = rows.store, rows.model
            operation = await store.add_operation(an_operation(model.id, 1))
            checkpoint = await store.add_checkpoint(a_checkpoint(model.id))
            artifact = await store.add_artifact(an_artifact(checkpoint))
            sampling = await store.add_sampling_session(a_sampling_session(rows.session.id))
            await store.add_metrics([a_metric(rows.session.id)])
            for owner, id_of in (("other", lambda record: record.id), (OWNER, lambda _: new_id())):
                assert await store.session(owner, id_of(rows.session)) is None
                assert await store.model(owner, id_of(model)) is None
                assert await store.operation(owner, id_of(operation)) is None
                assert await store.checkpoint(owner, id_of(checkpoint)) is None
                assert await store.checkpoint_named(owner, id_of(model), "one") is None
                assert await store.checkpoints(owner, id_of(model)) == ()
                assert await store.artifact(owner, id_of(artifact)) is None
                assert await store.artifacts(owner, id_of(checkpoint)) == ()
                assert await store.sampling_session(owner, id_of(sampling)) is None
                assert await store.metrics(owner, id_of(rows.session)) == ()
            assert (await store.models("other", 10)).total == 0
            assert await store.count_active_models("other") == 0
            with pytest.raises(ServiceError) as error:
                await store.add_sampling_session(
                    a_sampling_session(rows.session.id, 2, owner="other", checkpoint_id=checkpoint.id)
                )
            assert refused(error) == ("not_found", 404, False)

    asyncio.run(scenario())


def test_text_that_no_database_holds_is_mended_and_finds_nothing(url: str):
    async def scenario() -> None:
        async with filled(url) as rows:
            odd = await rows.store.add_session(a_session(name=ODD_TEXT, sdk_version="\ud83d\ude00"))
            found = await rows.store.session(OWNER, odd.id)
            assert found is not None
            assert (found.name, found.sdk_version) == ("a\ufffdb\ufffdc ✓", "😀")
            assert await rows.store.session(OWNER, ODD_TEXT) is None
            assert await rows.store.operation(ODD_TEXT, ODD_TEXT) is None

    asyncio.run(scenario())


def test_numbers_beyond_64_bits_are_refused(url: str):
    async def scenario() -> None:
        async with filled(url) as rows:
            for what in (
                rows.store.add_operation(an_operation(rows.model.id, 2**63)),
                rows.store.add_model(a_model(rows.session.id, 2**70)),
                rows.store.models(OWNER, 2**70),
            ):
                with pytest.raises(ServiceError) as error:
                    await what
                assert refused(error) == ("invalid_request", 400, False)
            await rows.store.add_operation(an_operation(rows.model.id, 2**63 - 1))

    asyncio.run(scenario())


# -- invariants --------------------------------------------------------------------------------------------------------


def test_a_request_sent_twice_finds_what_the_first_made(url: str):
    async def scenario() -> None:
        async with filled(url) as rows:
            store, session, model = rows.store, rows.session, rows.model
            assert await store.add_model(a_model(session.id)) == model
            assert (await store.add_model(a_model(session.id, 2))).id != model.id
            operations = await asyncio.gather(*(store.add_operation(an_operation(model.id, 1)) for _ in range(20)))
            assert len({operation.id for operation in operations}) == 1
            unnumbered = [await store.add_operation(an_operation(model.id)) for _ in range(2)]
            assert unnumbered[0].id != unnumbered[1].id
            sampling = await store.add_sampling_session(a_sampling_session(session.id))
            assert await store.add_sampling_session(a_sampling_session(session.id)) == sampling
            assert (await store.add_sampling_session(a_sampling_session(session.id, 2))).id != sampling.id

    asyncio.run(scenario())


def test_the_database_itself_forbids_what_must_not_be(url: str):
    async def scenario() -> None:
        async with filled(url) as rows:
            session, model = rows.session, rows.model
            checkpoint = await rows.store.add_checkpoint(a_checkpoint(model.id))
            forbidden = {
                tables.models: [a_model(session.id), a_model(new_id(), 9)],
                tables.operations: [an_operation(model.id, 1), an_operation(new_id(), 9)],
                tables.checkpoints: [a_checkpoint(model.id), a_checkpoint(new_id(), "two")],
                tables.artifacts: [an_artifact(checkpoint), an_artifact(a_checkpoint(model.id))],
                tables.sampling_sessions: [
                    a_sampling_session(session.id),
                    a_sampling_session(new_id(), 9),
                    a_sampling_session(session.id, 9, checkpoint_id=new_id()),
                ],
                tables.session_metrics: [a_metric(new_id())],
            }
            await rows.store.add_operation(an_operation(model.id, 1))
            await rows.store.add_artifact(an_artifact(checkpoint))
            await rows.store.add_sampling_session(a_sampling_session(session.id))
            for table, records in forbidden.items():
                for record in records:
                    with pytest.raises(IntegrityError):
                        rows.execute(insert(table).values(row_of(record)))
            rows.execute(insert(tables.checkpoints).values(row_of(a_checkpoint(model.id, status="deleted"))))
            rows.execute(insert(tables.artifacts).values(row_of(an_artifact(checkpoint, status="pending"))))
            with pytest.raises(ServiceError) as error:
                await rows.store.add_operation(an_operation(new_id(), 1))
            assert refused(error) == ("conflict", 409, False)
            assert "operations" not in str(error.value)

    asyncio.run(scenario())


# -- models ------------------------------------------------------------------------------------------------------------


def test_models_are_listed_newest_first_in_pages(url: str):
    async def scenario() -> None:
        async with filled(url) as rows:
            made = [
                await rows.store.add_model(a_model(rows.session.id, number, created_at=200.0 + number))
                for number in (2, 3, 4)
            ]
            page = await rows.store.models(OWNER, 2)
            assert (page.items, page.total) == ((made[2], made[1]), 4)
            page = await rows.store.models(OWNER, 2, 2)
            assert (page.items, page.total) == ((made[0], rows.model), 4)
            assert await rows.store.count_active_models(OWNER) == 4
            await rows.store.update_model(made[0].id, status="terminated", updated_at=NOW)
            assert await rows.store.count_active_models(OWNER) == 3

    asyncio.run(scenario())


def test_a_model_is_changed_where_it_is_told_and_nowhere_else(url: str):
    async def scenario() -> None:
        async with filled(url) as rows:
            other = await rows.store.add_model(a_model(rows.session.id, 2))
            changed = await rows.store.update_model(
                rows.model.id, training_state="trained", num_steps=3, updated_at=NOW
            )
            assert changed == replace(rows.model, training_state="trained", num_steps=3, updated_at=NOW)
            assert await rows.store.model(OWNER, rows.model.id) == changed
            assert await rows.store.model(OWNER, other.id) == other
            assert await rows.store.update_model(new_id(), num_steps=3, updated_at=NOW) is None

    asyncio.run(scenario())


# -- operations --------------------------------------------------------------------------------------------------------


def test_an_operation_ends_once(url: str):
    async def scenario() -> None:
        async with filled(url) as rows:
            operation = await rows.store.add_operation(an_operation(rows.model.id, 5))
            with pytest.raises(ValueError, match="pending"):
                await rows.store.finish_operation(operation)
            ended = replace(operation, status="done", response=b'{"a": 1}', finished_at=NOW)
            assert await rows.store.finish_operation(ended)
            failed = replace(operation, status="error", error_code="late", finished_at=NOW)
            assert not await rows.store.finish_operation(failed)
            assert await rows.store.operation(OWNER, operation.id) == ended
            model = await rows.store.model(OWNER, rows.model.id)
            assert model is not None
            assert model.last_seq_id == 5
            earlier = await rows.store.add_operation(an_operation(rows.model.id, 2))
            error = replace(
                earlier, status="error", error_code="c", error_message="m", error_details={"d": 1}, retryable=True
            )
            await rows.store.finish_operation(replace(error, finished_at=NOW))
            assert await rows.store.operation(OWNER, earlier.id) == replace(error, finished_at=NOW)
            model = await rows.store.model(OWNER, rows.model.id)
            assert model is not None
            assert model.last_seq_id == 5

    asyncio.run(scenario())


def test_an_attachment_is_kept_with_its_operation_and_read_only_when_it_is_asked_for(url: str):
    async def scenario() -> None:
        attachment = bytes(range(256)) * 8000
        async with filled(url) as rows:
            operation = await rows.store.add_operation(an_operation(rows.model.id, 1))
            assert await rows.store.operation_attachment(OWNER, operation.id) is None
            ended = replace(operation, status="done", response=b"{}", attachment=attachment, finished_at=NOW)
            assert await rows.store.finish_operation(ended)
            plain = await rows.store.add_operation(an_operation(rows.model.id, 2))
            await rows.store.finish_operation(replace(plain, status="done", response=b"{}", finished_at=NOW + 5))
        async with Store.opened(url, clock=rows.clock) as store:
            light = replace(ended, attachment=None)
            assert await store.operation(OWNER, operation.id) == light == await store.operation_at(rows.model.id, 1)
            for _ in range(2):
                assert await store.operation_attachment(OWNER, operation.id) == attachment
            for owner, id_ in (("other", operation.id), (OWNER, plain.id), (OWNER, new_id())):
                assert await store.operation_attachment(owner, id_) is None
            assert await store.delete_operations_finished_before(NOW + 1) == 1
            assert await store.operation_attachment(OWNER, operation.id) is None

    asyncio.run(scenario())


def test_large_responses_are_kept_small(url: str):
    async def scenario() -> None:
        async with filled(url) as rows:
            for size in (0, 1, MIN_PACKED_BYTES - 1, MIN_PACKED_BYTES, 3_000_000):
                operation = await rows.store.add_operation(an_operation())
                response = (b'{"logprobs": -0.125}' * (size // 20 + 1))[:size]
                ended = replace(operation, status="done", response=response, finished_at=NOW)
                await rows.store.finish_operation(ended)
                assert await rows.store.operation(OWNER, operation.id) == ended
                column = select(tables.operations.c.response).where(tables.operations.c.id == operation.id)
                (stored,) = rows.execute(column)[0]
                assert len(stored) <= (size + 1 if size < MIN_PACKED_BYTES else size // 50)

    asyncio.run(scenario())


def test_a_restart_fails_what_had_not_ended_and_is_honest_about_another_try(url: str):
    async def scenario() -> None:
        async with filled(url) as rows:
            store, session = rows.store, rows.session
            trained = await store.add_model(a_model(session.id, 2))
            await store.update_model(trained.id, training_state="trained", updated_at=NOW)
            over = await store.add_model(a_model(session.id, 3))
            await store.update_model(over.id, status="terminated", updated_at=NOW)
            done = await store.add_operation(an_operation(rows.model.id, 1))
            await store.finish_operation(replace(done, status="done", response=b"{}", finished_at=NOW))
            unfinished = [
                (await store.add_operation(an_operation(rows.model.id, 7)), True),
                (await store.add_operation(an_operation(rows.model.id)), True),
                (await store.add_operation(an_operation(trained.id, 4)), False),
                (await store.add_operation(an_operation(over.id, 4)), False),
                (await store.add_operation(an_operation(sampling_session_id="s")), True),
            ]
        rows.clock.now += 5
        async with Store.opened(url, clock=rows.clock) as store:
            assert await store.fail_unfinished("server_restarted", "it was restarted") == 5
            assert await store.fail_unfinished("server_restarted", "it was restarted") == 0
            assert await store.mark_models_lost() == 1
            for operation, retryable in unfinished:
                assert await store.operation(OWNER, operation.id) == replace(
                    operation,
                    status="error",
                    error_code="server_restarted",
                    error_message="it was restarted",
                    retryable=retryable,
                    finished_at=NOW + 5,
                )
            kept = await store.operation(OWNER, done.id)
            assert kept is not None
            assert kept.status == "done"
            found = [await store.model(OWNER, id_) for id_ in (rows.model.id, trained.id, over.id)]
            states = [(model.training_state, model.last_seq_id) for model in found if model is not None]
            assert states == [("fresh", 7), ("lost", 4), ("fresh", 4)]

    asyncio.run(scenario())


def test_old_results_are_deleted_and_nothing_else(url: str):
    async def scenario() -> None:
        async with filled(url) as rows:

            async def ended(finished_at: float) -> str:
                operation = await rows.store.add_operation(an_operation())
                await rows.store.finish_operation(
                    replace(operation, status="done", response=b"{}", finished_at=finished_at)
                )
                return operation.id

            await asyncio.gather(*(ended(NOW - 1) for _ in range(450)))
            kept = [await ended(NOW), (await rows.store.add_operation(an_operation(created_at=1.0))).id]
            assert await rows.store.delete_operations_finished_before(NOW) == 450
            assert await rows.store.delete_operations_finished_before(NOW) == 0
            assert {id_ for (id_,) in rows.execute(select(tables.operations.c.id))} == set(kept)

    asyncio.run(scenario())


# -- checkpoints and artifacts -----------------------------------------------------------------------------------------


def test_a_newer_checkpoint_takes_the_name_and_the_older_keeps_its_files_for_who_samples_from_it(url: str):
    async def scenario() -> None:
        async with filled(url) as rows:
            store = rows.store
            first = await store.add_checkpoint(a_checkpoint(rows.model.id))
            pinning = await store.add_sampling_session(a_sampling_session(rows.session.id, checkpoint_id=first.id))
            second = await store.add_checkpoint(a_checkpoint(rows.model.id, created_at=104.0))
            assert await store.checkpoint_named(OWNER, rows.model.id, "one") == second
            assert await store.checkpoints(OWNER, rows.model.id) == (second,)
            assert await store.checkpoint(OWNER, first.id) == replace(first, status="deleted")
            with pytest.raises(ServiceError, match="export again") as error:
                await store.add_sampling_session(a_sampling_session(rows.session.id, 2, checkpoint_id=first.id))
            assert refused(error) == ("not_found", 404, False)
            assert (
                await store.add_sampling_session(a_sampling_session(rows.session.id, checkpoint_id=first.id)) == pinning
            )
            assert await store.claim_unused_checkpoints() == ()
            assert await store.checkpoint_ids_with_files() == {first.id, second.id}
            assert await store.delete_sampling_session(pinning.id)
            assert not await store.delete_sampling_session(pinning.id)
            assert await store.claim_unused_checkpoints() == (replace(first, status="deleted"),)
            assert await store.claim_unused_checkpoints() == ()
            assert await store.checkpoint_ids_with_files() == {second.id}

    asyncio.run(scenario())


def test_names_are_a_models_own(url: str):
    async def scenario() -> None:
        async with filled(url) as rows:
            other = await rows.store.add_model(a_model(rows.session.id, 2))
            first = await rows.store.add_checkpoint(a_checkpoint(rows.model.id))
            second = await rows.store.add_checkpoint(a_checkpoint(other.id))
            assert await rows.store.checkpoint_named(OWNER, rows.model.id, "one") == first
            assert await rows.store.checkpoint_named(OWNER, other.id, "one") == second

    asyncio.run(scenario())


def test_what_has_expired_is_gone_before_it_is_swept(url: str):
    async def scenario() -> None:
        async with filled(url) as rows:
            store = rows.store
            term = {"ttl_seconds": 10, "expires_at": NOW + 10}
            checkpoint = await store.add_checkpoint(a_checkpoint(rows.model.id, **term))
            artifact = await store.add_artifact(an_artifact(checkpoint, **term))
            sampling = await store.add_sampling_session(
                a_sampling_session(rows.session.id, checkpoint_id=checkpoint.id)
            )
            rows.clock.now = NOW + 9.9
            assert await store.delete_expired() == 0
            assert await store.checkpoint_named(OWNER, rows.model.id, "one") == checkpoint
            rows.clock.now = NOW + 10
            for _ in range(2):
                assert await store.checkpoint_named(OWNER, rows.model.id, "one") is None
                assert await store.checkpoints(OWNER, rows.model.id) == ()
                assert await store.checkpoint(OWNER, checkpoint.id) == replace(checkpoint, status="deleted")
                assert await store.artifacts(OWNER, checkpoint.id) == ()
                assert await store.artifact(OWNER, artifact.id) == replace(artifact, status="deleted")
                assert await store.downloadable_artifact(artifact.id) is None
                assert await store.set_checkpoint_ttl(checkpoint.id, None, None) is None
                another = a_sampling_session(rows.session.id, 2, checkpoint_id=checkpoint.id)
                with pytest.raises(ServiceError):
                    await store.add_sampling_session(another)
                await store.delete_expired()
            assert await store.sampling_session(OWNER, sampling.id) is None
            assert [claimed.id for claimed in await store.claim_unused_checkpoints()] == [checkpoint.id]
            assert [claimed.id for claimed in await store.claim_unused_artifacts()] == [artifact.id]
            assert await store.claim_unused_artifacts() == ()
            assert await store.artifact_ids_with_files() == set()

    asyncio.run(scenario())


def test_a_replaced_checkpoint_still_ends_its_sampling_sessions_at_its_term(url: str):
    async def scenario() -> None:
        async with filled(url) as rows:
            first = await rows.store.add_checkpoint(a_checkpoint(rows.model.id, expires_at=NOW + 10))
            sampling = await rows.store.add_sampling_session(
                a_sampling_session(rows.session.id, checkpoint_id=first.id)
            )
            second = await rows.store.add_checkpoint(a_checkpoint(rows.model.id))
            other = await rows.store.add_sampling_session(
                a_sampling_session(rows.session.id, 2, checkpoint_id=second.id)
            )
            rows.clock.now = NOW + 11
            await rows.store.delete_expired()
            assert await rows.store.sampling_session(OWNER, sampling.id) is None
            assert await rows.store.sampling_session(OWNER, other.id) == other
            assert [claimed.id for claimed in await rows.store.claim_unused_checkpoints()] == [first.id]

    asyncio.run(scenario())


def test_a_term_can_be_given_and_taken_while_it_lasts(url: str):
    async def scenario() -> None:
        async with filled(url) as rows:
            checkpoint = await rows.store.add_checkpoint(a_checkpoint(rows.model.id))
            changed = await rows.store.set_checkpoint_ttl(checkpoint.id, 20, NOW + 20)
            assert changed == replace(checkpoint, ttl_seconds=20, expires_at=NOW + 20)
            assert await rows.store.set_checkpoint_ttl(checkpoint.id, None, None) == checkpoint
            rows.clock.now = NOW + 1e9
            assert await rows.store.delete_expired() == 0
            assert await rows.store.checkpoints(OWNER, rows.model.id) == (checkpoint,)

    asyncio.run(scenario())


def test_an_artifact_takes_the_place_of_an_earlier_one_when_it_is_complete(url: str):
    async def scenario() -> None:
        async with filled(url) as rows:
            store = rows.store
            checkpoint = await store.add_checkpoint(a_checkpoint(rows.model.id))
            first = await store.add_artifact(an_artifact(checkpoint))
            merged = await store.add_artifact(an_artifact(checkpoint, kind="hf_model", created_at=103.0))
            pending = await store.add_artifact(an_artifact(checkpoint, status="pending", files=(), created_at=105.0))
            assert await store.artifacts(OWNER, checkpoint.id) == (pending, first, merged)
            assert await store.downloadable_artifact(pending.id) is None
            assert await store.claim_unused_artifacts() == ()
            second = await store.add_artifact(an_artifact(checkpoint, created_at=106.0))
            assert await store.artifacts(OWNER, checkpoint.id) == (second, pending, merged)
            assert [claimed.id for claimed in await store.claim_unused_artifacts()] == [first.id]
            assert await store.artifact_ids_with_files() == {second.id, pending.id, merged.id}

    asyncio.run(scenario())


def test_an_artifact_without_a_term_goes_with_its_checkpoint(url: str):
    async def scenario() -> None:
        async with filled(url) as rows:
            checkpoint = await rows.store.add_checkpoint(a_checkpoint(rows.model.id, expires_at=NOW + 10))
            follower = await rows.store.add_artifact(an_artifact(checkpoint))
            own = await rows.store.add_artifact(an_artifact(checkpoint, kind="hf_model", expires_at=NOW + 100))
            rows.clock.now = NOW + 10
            assert await rows.store.delete_expired() == 2
            assert [claimed.id for claimed in await rows.store.claim_unused_artifacts()] == [follower.id]
            assert await rows.store.artifacts(OWNER, checkpoint.id) == (own,)
            assert await rows.store.downloadable_artifact(own.id) == own

    asyncio.run(scenario())


# -- visits ------------------------------------------------------------------------------------------------------------


def test_touches_are_written_with_the_next_commit_and_never_backwards(url: str):
    async def scenario() -> None:
        async with filled(url) as rows:
            store = rows.store
            sampling = await store.add_sampling_session(a_sampling_session(rows.session.id))
            idle = await store.add_sampling_session(a_sampling_session(rows.session.id, 2))
            for at in (300.0, 500.0):
                await store.touch_session(rows.session.id, at)
                await store.touch_sampling_session(sampling.id, at)
            assert await store.delete_idle_sampling_sessions(400.0) == (idle,)
            assert await store.sampling_session(OWNER, sampling.id) == replace(sampling, last_used_at=500.0)
            assert await store.sampling_session(OWNER, idle.id) is None
            assert await store.session(OWNER, rows.session.id) == replace(rows.session, last_seen_at=500.0)
            await store.touch_session(rows.session.id, 200.0)
            await store.touch_session(new_id(), 200.0)
            await store.update_model(rows.model.id, updated_at=NOW)
            assert await store.session(OWNER, rows.session.id) == replace(rows.session, last_seen_at=500.0)
            await store.touch_session(rows.session.id, 600.0)
        async with Store.opened(url) as store:
            assert await store.session(OWNER, rows.session.id) == replace(rows.session, last_seen_at=600.0)

    asyncio.run(scenario())


def test_a_touch_alone_is_written_within_a_second(url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("weaver_rl.service.store_writer.LATER_S", 0.1)

    async def scenario() -> None:
        async with filled(url) as rows:
            await rows.store.touch_session(rows.session.id, 500.0)
            for _ in range(100):
                found = await rows.store.session(OWNER, rows.session.id)
                assert found is not None
                if found.last_seen_at == 500.0:
                    return
                await asyncio.sleep(0.05)
            pytest.fail("it was not written")

    asyncio.run(scenario())


def test_the_layout_has_a_version_row(url: str):
    async def scenario() -> None:
        async with filled(url) as rows:
            assert rows.execute(text("SELECT version FROM weaver_schema")) == [(tables.VERSION,)]

    asyncio.run(scenario())
