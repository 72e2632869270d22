"""The store when many write, when it is killed, when the database fails, and when it is not the expected one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from service_databases import postgres as postgres
from service_databases import url as url
from service_records import OWNER, a_model, a_session, an_operation, new_id
from sqlalchemy import Connection, create_engine, event, select, text, update

from weaver_rl.errors import ConfigError, ServiceError
from weaver_rl.service import store_tables as tables
from weaver_rl.service.config import OperationsConfig
from weaver_rl.service.operations import Operations
from weaver_rl.service.store import Store
from weaver_rl.service.store_database import open_database
from weaver_rl.service.store_tables import VERSION, schema_version

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]


def refused(error: pytest.ExceptionInfo[ServiceError]) -> tuple[str, int, bool]:
    return error.value.code, error.value.status, error.value.retryable


# -- many at once ------------------------------------------------------------------------------------------------------


def test_writes_that_wait_together_share_a_transaction(url: str):
    async def scenario() -> None:
        async with Store.opened(url) as store:
            commits: list[Connection] = []
            event.listen(store._database.writer, "commit", commits.append)
            session = await store.add_session(a_session())
            model = await store.add_model(a_model(session.id))

            async def one(number: int) -> None:
                operation = await store.add_operation(an_operation(model.id, number))
                ended = replace(operation, status="done", response=b"%d" % number, finished_at=1.0)
                assert await store.finish_operation(ended)
                assert await store.operation(OWNER, operation.id) == ended

            await asyncio.gather(*(one(number) for number in range(1, 301)))
            assert len(commits) < 200
            found = await store.model(OWNER, model.id)
            assert found is not None
            assert found.last_seq_id == 300

    asyncio.run(scenario())


def test_a_write_that_fails_takes_no_other_with_it(url: str):
    async def scenario() -> None:
        async with Store.opened(url) as store:
            session = await store.add_session(a_session())
            good = [an_operation() for _ in range(20)]
            bad = [an_operation(new_id(), 1) for _ in range(3)]
            store._writer.write_later("bad", lambda connection: connection.execute(text("SELECT nothing FROM nowhere")))
            await store.touch_session(session.id, 900.0)
            results = await asyncio.gather(
                *(store.add_operation(operation) for operation in (*good[:10], *bad, *good[10:])),
                return_exceptions=True,
            )
            assert [type(result) for result in results[10:13]] == [ServiceError] * 3
            for operation in good:
                assert await store.operation(OWNER, operation.id) == operation
            touched = await store.session(OWNER, session.id)
            assert touched is not None
            assert touched.last_seen_at == 900.0

    asyncio.run(scenario())


def test_a_write_whose_caller_is_cancelled_is_committed_all_the_same(url: str):
    async def scenario() -> None:
        async with Store.opened(url) as store:
            operation = an_operation()
            writing = asyncio.ensure_future(store.add_operation(operation))
            await asyncio.sleep(0)
            writing.cancel()
            await store.add_operation(an_operation())
            assert await store.operation(OWNER, operation.id) == operation

    asyncio.run(scenario())


def test_the_event_loop_goes_on_while_the_database_is_slow(url: str):
    async def scenario() -> None:
        async with Store.opened(url) as store:

            def slow(connection: Connection) -> str:
                time.sleep(0.3)
                return "slow"

            work = [store._writer.write(slow), store._read(slow)]
            waiting = asyncio.gather(*work)
            longest, before = 0.0, time.monotonic()
            while not waiting.done():
                await asyncio.sleep(0.01)
                now = time.monotonic()
                longest, before = max(longest, now - before), now
            assert await waiting == ["slow", "slow"]
            assert longest < 0.25

    asyncio.run(scenario())


def test_operations_of_the_real_store_run_once_in_order_and_go_on_after_a_restart(url: str):
    ran: list[int] = []

    def run(number: int, seconds: float = 0.0) -> Callable[[], Awaitable[bytes]]:
        async def work() -> bytes:
            ran.append(number)
            await asyncio.sleep(seconds)
            return b"%d" % number

        return work

    async def before() -> str:
        async with Store.opened(url) as store, Operations(store, OperationsConfig()) as operations:
            model = await store.add_model(a_model((await store.add_session(a_session())).id))

            async def one(number: int) -> None:
                submitted = await operations.submit(an_operation(model.id, number), run(number))
                ended = await operations.wait(OWNER, submitted.id, 60.0)
                assert ended.response == b"%d" % number
                assert await operations.wait(OWNER, submitted.id, 0.0) == ended

            numbers = [*range(1, 41), *range(1, 41, 3)]
            random.Random(0).shuffle(numbers)
            await asyncio.gather(*(one(number) for number in numbers))
            endless = [
                await operations.submit(an_operation(model.id, 41 + more), run(41 + more, 1e6)) for more in (0, 1)
            ]
            await asyncio.sleep(0.05)
            await operations.close(timeout_s=0.1)
            assert [(await operations.wait(OWNER, left.id, 60.0)).ended for left in endless] == [False, False]
        return model.id

    async def after(model_id: str) -> None:
        async with Store.opened(url) as store, Operations(store, OperationsConfig()) as operations:
            assert await store.fail_unfinished("server_restarted", "again") == 2
            again = await operations.submit(an_operation(model_id, 42), run(42))
            assert (again.error_code, again.retryable) == ("server_restarted", True)
            ended = await operations.submit(an_operation(model_id, 43), run(43))
            assert (await operations.wait(OWNER, ended.id, 4.0)).status == "done"

    asyncio.run(after(asyncio.run(before())))
    assert ran == [*range(1, 42), 43]


# -- kills -------------------------------------------------------------------------------------------------------------

VICTIM = """
import asyncio, sys
from dataclasses import replace
from service_records import a_metric, a_model, a_session, an_operation
from weaver_rl.service.store import Store

async def main(url):
    store = await Store.open(url)
    session = await store.add_session(a_session())
    print("session", session.id, flush=True)

    async def endless(number):
        model = await store.add_model(a_model(session.id, number))
        print("model", model.id, flush=True)
        for seq_id in range(1, 10**9):
            operation = await store.add_operation(an_operation(model.id, seq_id))
            print("added", operation.id, flush=True)
            await store.finish_operation(replace(operation, status="done", response=b"x" * 100, finished_at=1.0))
            print("ended", operation.id, flush=True)

    await asyncio.gather(*(endless(number) for number in range(1, 21)))

asyncio.run(main(sys.argv[1]))
"""


def test_sigkill_loses_nothing_that_was_acknowledged(url: str):
    victim = subprocess.Popen(
        [sys.executable, "-c", VICTIM, url],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert victim.stdout is not None
    told = [victim.stdout.readline() for _ in range(1500)]
    victim.send_signal(signal.SIGKILL)
    rest, _ = victim.communicate()
    # The kill may have cut off the last line.
    told += rest.splitlines(keepends=True)
    acknowledged = [tuple(line.split()) for line in told if line.endswith("\n")]
    assert len(acknowledged) >= 1500

    async def scenario() -> None:
        async with Store.opened(url) as store:
            for what, id_ in acknowledged:
                if what == "session":
                    assert await store.session(OWNER, id_) is not None
                elif what == "model":
                    assert await store.model(OWNER, id_) is not None
                else:
                    found = await store.operation(OWNER, id_)
                    assert found is not None
                    assert what == "added" or found.response == b"x" * 100
            await store.fail_unfinished("server_restarted", "killed")
            with store._database.writer.begin() as connection:
                ended = connection.execute(select(tables.operations.c.status)).scalars().all()
            assert set(ended) <= {"done", "error"}

    asyncio.run(scenario())


SECOND = "import sys; from weaver_rl.service.store_database import *; open_database(sys.argv[1])"


def test_a_second_server_is_refused_until_the_first_is_gone(url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("weaver_rl.service.store_database.LOCK_PATIENCE_S", 0.2)

    async def scenario() -> None:
        async with Store.opened(url):
            with pytest.raises(ConfigError, match="in use by"):
                await Store.open(url)
            second = subprocess.run(
                [sys.executable, "-c", SECOND, url],
                cwd=ROOT,
                capture_output=True,
                text=True,
            )
            assert "in use by" in second.stderr
        async with Store.opened(url):
            pass

    asyncio.run(scenario())


# -- failures ----------------------------------------------------------------------------------------------------------


def test_a_database_that_fails_is_told_as_a_passing_thing_without_its_words(url: str, caplog: pytest.LogCaptureFixture):
    async def scenario() -> None:
        async with Store.opened(url) as store:
            with store._database.writer.begin() as connection:
                connection.execute(text("ALTER TABLE operations RENAME TO hidden_away"))
            for what in (store.add_operation(an_operation()), store.operation(OWNER, new_id())):
                with pytest.raises(ServiceError) as error:
                    await what
                assert refused(error) == ("storage_unavailable", 503, True)
                assert "operations" not in str(error.value)
            with store._database.writer.begin() as connection:
                connection.execute(text("ALTER TABLE hidden_away RENAME TO operations"))
            await store.add_operation(an_operation())

    asyncio.run(scenario())
    assert "operations" in caplog.text


def test_a_closed_store_refuses(url: str):
    async def scenario() -> None:
        store = await Store.open(url)
        writing = [asyncio.ensure_future(store.add_operation(an_operation())) for _ in range(50)]
        await asyncio.sleep(0)
        await store.close()
        assert len(await asyncio.gather(*writing)) == 50
        with pytest.raises(ServiceError) as error:
            await store.add_operation(an_operation())
        assert refused(error) == ("storage_unavailable", 503, True)

    asyncio.run(scenario())


def test_a_full_disk_loses_nothing_that_was_there(tmp_path: Path):
    """`max_page_count` is SQLite's own way to be full."""

    async def scenario() -> None:
        async with Store.opened(f"sqlite:///{tmp_path / 'weaver.sqlite'}") as store:
            first = await store.add_operation(an_operation())
            with store._database.writer.begin() as connection:
                pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
                connection.exec_driver_sql(f"PRAGMA max_page_count = {pages + 1}")
            with pytest.raises(ServiceError) as error:
                await store.finish_operation(
                    replace(first, status="done", response=os.urandom(100_000), finished_at=1.0)
                )
            assert refused(error) == ("storage_unavailable", 503, True)
            assert await store.operation(OWNER, first.id) == first
            with store._database.writer.begin() as connection:
                connection.exec_driver_sql("PRAGMA max_page_count = 100000")
            await store.finish_operation(replace(first, status="done", response=b"{}", finished_at=1.0))

    asyncio.run(scenario())


def test_a_lost_connection_comes_back_and_has_the_lock_again(
    postgres: Callable[[], str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("weaver_rl.service.store_database.LOCK_PATIENCE_S", 0.2)
    url = postgres()

    async def scenario() -> None:
        async with Store.opened(url) as store:
            operation = await store.add_operation(an_operation())
            admin = create_engine(url)
            kill = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
            for _ in range(3):
                with admin.begin() as connection:
                    connection.execute(text(f"{kill} AND datname = current_database()"))
                assert await store.operation(OWNER, operation.id) == operation
                await store.add_operation(an_operation())
                with pytest.raises(ConfigError, match="in use by"):
                    await Store.open(url)
            admin.dispose()

    asyncio.run(scenario())


def test_who_lost_the_lock_to_another_server_writes_nothing(
    postgres: Callable[[], str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("weaver_rl.service.store_database.LOCK_PATIENCE_S", 0.2)
    url = postgres()

    async def scenario() -> None:
        async with Store.opened(url) as first:
            first._database.writer.dispose()
            async with Store.opened(url) as second:
                with pytest.raises(ServiceError) as error:
                    await first.add_operation(an_operation())
                assert refused(error) == ("storage_unavailable", 503, True)
                await second.add_operation(an_operation())

    asyncio.run(scenario())


# -- what is opened ----------------------------------------------------------------------------------------------------


def test_sqlite_is_as_durable_as_it_says(tmp_path: Path):
    database = open_database(f"sqlite:///{tmp_path / 'new' / 'weaver.sqlite'}")
    with database.writer.begin() as connection:
        settings = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
        # From its first statement on nobody else writes, not even a person with a shell.
        other = sqlite3.connect(tmp_path / "new" / "weaver.sqlite", timeout=0, isolation_level=None)
        with contextlib.closing(other), pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")
    with database.reader.begin() as connection, pytest.raises(Exception, match="readonly"):
        connection.execute(update(tables.models).values(status="terminated"))
    database.close()
    assert settings == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30_000}


def test_another_version_is_refused(url: str):
    database = open_database(url)
    with database.writer.begin() as connection:
        connection.execute(update(schema_version).values(version=VERSION + 1))
    database.close()
    with pytest.raises(ConfigError, match=rf"layout version {VERSION + 1};.*reads {VERSION}.*another `state_dir`"):
        open_database(url)


def test_tables_of_something_else_are_left_alone(url: str):
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE models (name text)"))
    with pytest.raises(ConfigError, match=r"tables of something else \(models\)"):
        open_database(url)
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE models"))
        connection.execute(text("CREATE TABLE unrelated (name text)"))
    engine.dispose()
    open_database(url).close()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("no url", "not a database URL; write sqlite:"),
        ("postgresql:/root:secret@host/name", "not a database URL; write sqlite:"),
        ("mysql://root:secret@host/name", "asks for 'mysql'"),
        ("postgresql+asyncpg://root:secret@host/name", "asks for 'postgresql.asyncpg'"),
        ("sqlite://", "in memory"),
        ("sqlite:///:memory:", "in memory"),
        ("sqlite:////proc/no/such/file.sqlite", "cannot be made"),
        ("postgresql://root:secret@127.0.0.1:1/name", "cannot be used"),
    ],
)
def test_a_database_that_cannot_be_used_is_refused_without_its_password(url: str, said: str):
    with pytest.raises(ConfigError, match=said) as error:
        open_database(url)
    assert "secret" not in str(error.value)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path):
    file = tmp_path / "weaver.sqlite"
    file.write_text("not a database " * 100)
    with pytest.raises(ConfigError, match="file is not a database"):
        open_database(f"sqlite:///{file}")
    file.unlink()
    open_database(f"sqlite:///{file}").close()
