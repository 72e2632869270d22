"""The journal keeps what it acknowledged, in order, through kills and full disks, and says when it cannot."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Coroutine, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import weaver_rl.journal as journal_module
from weaver_rl.errors import JournalError
from weaver_rl.journal import FILE_NAME, Journal, JournalEvent, read_events

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]

ACKNOWLEDGES_UNTIL_KILLED = """
import asyncio, sys
from pathlib import Path
from weaver_rl.journal import Journal

async def main():
    journal = Journal(Path(sys.argv[1]))
    for group in range(10**9):
        for missing in range(3):
            journal.scored(f"{group:08d}", num_missing=missing)
        await journal.flush()
        print(group, flush=True)
        journal.noted("run", "not acknowledged")

asyncio.run(main())
"""

FILLS_A_DISK = """
import asyncio, resource, sys
from pathlib import Path
import weaver_rl.journal as journal_module
from weaver_rl.errors import JournalError
from weaver_rl.journal import Journal

async def main():
    journal = Journal(Path(sys.argv[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    try:
        for group in range(10**9):
            journal.scored(f"{group:08d}", num_missing=0)
            await journal.flush()
            print(group, flush=True)
    except JournalError as error:
        print("flush:", error)
    try:
        journal.scored("after", num_missing=0)
    except JournalError as error:
        print("append:", error)
    journal.close()
    print("closed")

asyncio.run(main())
"""


def test_every_kind_of_event_comes_back(tmp_path):
    path = tmp_path / FILE_NAME
    ticks = iter(range(100, 200))
    with Journal(path, clock=lambda: float(next(ticks))) as journal:
        journal.started(first_position=8, first_step=3, last_step=9, groups_per_step=4, max_lag=1, resumed=False)
        journal.dispatched("00000008", position=8, prompt_id="p-8", version=2)
        journal.reissued("00000008", sampler="sampler-0", reason="gone (exit 137)")
        journal.generated("00000008", sampler="sampler-1", oldest_version=2, newest_version=3, num_tokens=90)
        journal.scored("00000008", num_missing=1)
        journal.trained("00000008", step=4, order=3)
        journal.dropped("00000009", step=4, reason="every reward is missing \udcff")
        journal.committed(step=4)
        journal.rewound(step=4, reason="rank 1 is gone", finished=("00000010",), in_flight=["00000011"])
        journal.noted("sampler 1", "lost", exit_code=-9, where=Path("x"))
        journal.ended(state="failed", reason=None)

    def event(seq, kind, **fields):
        return JournalEvent(seq=seq, time_s=99.0 + seq, kind=kind, **fields)

    start = {"first_position": 8, "first_step": 3, "last_step": 9, "groups_per_step": 4, "max_lag": 1}
    eight = {"group_id": "00000008"}
    carried = {"reason": "rank 1 is gone", "finished": ["00000010"], "in_flight": ["00000011"]}
    assert list(read_events(path)) == [
        event(1, "started", detail=start | {"resumed": False}),
        event(2, "dispatched", **eight, position=8, oldest_version=2, detail={"prompt_id": "p-8"}),
        event(3, "reissued", **eight, sampler="sampler-0", detail={"reason": "gone (exit 137)"}),
        event(
            4,
            "generated",
            **eight,
            sampler="sampler-1",
            oldest_version=2,
            newest_version=3,
            detail={"num_tokens": 90},
        ),
        event(5, "scored", **eight, detail={"num_missing": 1}),
        event(6, "trained", **eight, step=4, detail={"order": 3}),
        event(7, "dropped", group_id="00000009", step=4, detail={"reason": "every reward is missing \udcff"}),
        event(8, "committed", step=4),
        event(9, "rewound", step=4, detail=carried),
        event(10, "noted", detail={"exit_code": -9, "where": "x", "subject": "sampler 1", "what": "lost"}),
        event(11, "ended", detail={"state": "failed", "reason": None}),
    ]


def test_an_event_without_detail_takes_no_room_for_it(tmp_path):
    path = tmp_path / FILE_NAME
    with Journal(path) as journal:
        journal.committed(step=1)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT detail FROM events").fetchall() == [(None,)]


def test_numbers_of_numpy_are_numbers(tmp_path):
    path = tmp_path / FILE_NAME
    with Journal(path) as journal:
        journal.trained("00000000", step=np.int64(7), order=0)
    (event,) = read_events(path)
    assert event.step == 7


def test_another_process_goes_on_where_the_first_ended(tmp_path):
    path = tmp_path / FILE_NAME
    for step in (1, 2, 3):
        with Journal(path) as journal:
            journal.committed(step=step)
    assert [(event.seq, event.step) for event in read_events(path)] == [(1, 1), (2, 2), (3, 3)]
    assert [event.seq for event in read_events(path, after=1)] == [2, 3]


def test_many_events_are_read_in_order_and_from_several_threads_none_is_lost(tmp_path):
    path = tmp_path / FILE_NAME
    with Journal(path) as journal:

        def append(thread: int) -> None:
            for number in range(3000):
                journal.trained(f"{thread}", step=number, order=0)

        threads = [threading.Thread(target=append, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    events = list(read_events(path))
    assert [event.seq for event in events] == list(range(1, 12001))
    for thread in range(4):
        assert [event.step for event in events if event.group_id == str(thread)] == list(range(3000))


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE events SET step = 9",
        "DELETE FROM events",
        "INSERT OR REPLACE INTO events (seq, time_s, kind) VALUES (1, 0, 'noted')",
    ],
)
def test_the_database_itself_refuses_to_change_the_past(tmp_path, statement):
    path = tmp_path / FILE_NAME
    with Journal(path) as journal:
        journal.committed(step=1)
    with closing(sqlite3.connect(path)) as connection, pytest.raises(sqlite3.IntegrityError, match="only grows"):
        connection.execute(statement)
    (event,) = read_events(path)
    assert (event.kind, event.step) == ("committed", 1)


def test_what_flush_returned_for_is_there_for_others_while_the_run_goes_on(tmp_path):
    path = tmp_path / FILE_NAME

    async def run() -> None:
        for step in range(1, 6):
            journal.committed(step=step)
            await journal.flush()
            assert [event.step for event in read_events(path)] == list(range(1, step + 1))
        await journal.flush()

    with Journal(path) as journal:
        asyncio.run(run())


def test_every_commit_reaches_the_disk(tmp_path):
    with Journal(tmp_path / FILE_NAME) as journal:
        # What no kill of a process can show, only the power: SQLite's own word for it. 2 is FULL.
        assert journal._connection.execute("PRAGMA synchronous").fetchone() == (2,)
        assert journal._connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


@contextlib.contextmanager
def nobody_can_write(path: Path) -> Iterator[None]:
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


async def begun(flush: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """The task of a flush that has got as far as waiting."""
    task = asyncio.create_task(flush)
    await asyncio.sleep(0)
    return task


def test_appends_do_not_wait_for_the_disk_and_flush_does(tmp_path):
    path = tmp_path / FILE_NAME

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
        with nobody_can_write(path):
            for number in range(1000):
                journal.trained("00000000", step=number, order=0)
            cancelled = await begun(journal.flush())
            flushed = await begun(journal.flush())
            cancelled.cancel()
            assert list(read_events(path)) == []
            assert not flushed.done()
        await flushed
        assert len(list(read_events(path))) == 1000

    unhandled: list[dict[str, object]] = []
    with Journal(path) as journal:
        asyncio.run(run())
    assert unhandled == []


def test_a_loop_that_ended_while_it_waited_stops_nobody(tmp_path):
    path = tmp_path / FILE_NAME

    async def run() -> None:
        journal.committed(step=1)
        await begun(journal.flush())

    async def run_again() -> None:
        await journal.flush()

    with Journal(path) as journal:
        with nobody_can_write(path):
            asyncio.run(run())
        asyncio.run(run_again())
        assert [event.step for event in read_events(path)] == [1]


def test_a_slow_reader_holds_up_nobody_and_sees_what_came_later(tmp_path):
    path = tmp_path / FILE_NAME

    async def run() -> None:
        for number in range(5000):
            journal.trained("00000000", step=number, order=0)
        await journal.flush()
        reading = read_events(path)
        assert next(reading).step == 0
        journal.committed(step=5000)
        await journal.flush()
        with closing(sqlite3.connect(path)) as other:
            # (busy, pages in the WAL, pages moved): nothing is held back by a reader.
            busy, in_wal, moved = other.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            assert (busy, in_wal) == (0, moved)
        assert [event.step for event in reading] == list(range(1, 5001))

    with Journal(path) as journal:
        asyncio.run(run())


# -- kills and failures --------------------------------------------------------------------------------------------


def child(script: str, path: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", script, str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize("num_acknowledged", [1, 150])
def test_sigkill_loses_nothing_that_was_acknowledged(tmp_path, num_acknowledged):
    path = tmp_path / FILE_NAME
    with child(ACKNOWLEDGES_UNTIL_KILLED, path) as process:
        assert process.stdout is not None
        for _ in range(num_acknowledged):
            assert process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        told = process.stdout.read().split()
    acknowledged = num_acknowledged + len([line for line in told if line.isdigit()])
    content = {file.name: file.read_bytes() for file in (path, Path(f"{path}-wal"))}
    before = list(read_events(path))
    assert {file.name: file.read_bytes() for file in (path, Path(f"{path}-wal"))} == content
    scored = [(event.group_id, event.detail["num_missing"]) for event in before if event.kind == "scored"]
    expected = [(f"{group:08d}", missing) for group in range(acknowledged + 1) for missing in range(3)]
    assert scored == expected[: len(scored)]
    assert len(scored) >= 3 * acknowledged
    with Journal(path) as journal:
        journal.committed(step=1)
    after = list(read_events(path))
    assert after[:-1] == before
    assert [event.seq for event in after] == list(range(1, len(after) + 1))


def test_a_disk_that_takes_no_more_is_told_and_nothing_acknowledged_is_lost(tmp_path):
    path = tmp_path / FILE_NAME
    with child(FILLS_A_DISK, path) as process:
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    lines = output.splitlines()
    acknowledged = [line for line in lines if line.isdigit()]
    flush, append, closed = lines[len(acknowledged) :]
    assert flush.startswith(f"flush: the journal {path} cannot be written: ")
    assert "The last 1 events are lost." in flush
    assert append.startswith(f"append: the journal {path} cannot be written: ")
    assert closed == "closed"
    assert len(acknowledged) > 10
    assert [event.group_id for event in read_events(path)][: len(acknowledged)] == [
        f"{int(line):08d}" for line in acknowledged
    ]


@pytest.mark.parametrize("suffix", ["", "-wal"])
def test_a_file_that_was_removed_is_told(tmp_path, suffix):
    path = tmp_path / FILE_NAME

    async def run() -> None:
        journal.committed(step=1)
        await journal.flush()
        Path(f"{path}{suffix}").unlink()
        journal.committed(step=2)
        for _ in range(2):
            with pytest.raises(JournalError, match="was removed or replaced"):
                await journal.flush()
        with pytest.raises(JournalError, match="The last 1 events are lost"):
            journal.committed(step=3)

    with Journal(path) as journal:
        asyncio.run(run())


def unwritable(journal: Journal) -> None:
    """An event that no SQLite file holds: the next commit fails."""
    journal.committed(step=2**70)


def test_a_failure_that_nobody_was_told_of_comes_out_of_close(tmp_path):
    path = tmp_path / FILE_NAME
    journal = Journal(path)
    unwritable(journal)
    with pytest.raises(JournalError, match="cannot be written"):
        journal.close()
    journal.close()
    assert list(read_events(path)) == []


def test_a_failure_does_not_hide_the_error_that_ended_the_run(tmp_path):
    def run() -> None:
        with Journal(tmp_path / FILE_NAME) as journal:
            unwritable(journal)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        run()
    (note,) = caught.value.__notes__
    assert "cannot be written" in note


def test_close_does_not_wait_for_ever_for_a_disk_that_does_not_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(journal_module, "CLOSE_TIMEOUT_S", 0.05)
    path = tmp_path / FILE_NAME
    journal = Journal(path)
    with nobody_can_write(path):
        journal.committed(step=1)
        with pytest.raises(JournalError, match=r"the disk did not answer for 0 s\. The last 1 events are lost"):
            journal.close()


def test_a_failure_that_was_told_is_not_told_again_by_close(tmp_path):
    async def run() -> None:
        unwritable(journal)
        with pytest.raises(JournalError, match="cannot be written"):
            await journal.flush()

    with Journal(tmp_path / FILE_NAME) as journal:
        asyncio.run(run())


def test_a_failure_that_only_a_cancelled_flush_met_comes_out_of_close(tmp_path):
    path = tmp_path / FILE_NAME

    async def run() -> None:
        with nobody_can_write(path):
            unwritable(journal)
            (await begun(journal.flush())).cancel()

    journal = Journal(path)
    asyncio.run(run())
    with pytest.raises(JournalError, match="cannot be written"):
        journal.close()


def test_what_is_appended_after_close_is_refused(tmp_path):
    journal = Journal(tmp_path / FILE_NAME)
    journal.close()
    with pytest.raises(JournalError, match="is closed; `committed` cannot be appended"):
        journal.committed(step=1)
    asyncio.run(journal.flush())


# -- files that are none -------------------------------------------------------------------------------------------


def some_text(path: Path) -> None:
    path.write_text("no database, but long enough to be taken for one" * 100)


def other_database(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE cakes (name TEXT)")


def later_format(path: Path) -> None:
    Journal(path).close()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA user_version = 2")


@pytest.mark.parametrize(
    ("make", "reason"),
    [(some_text, "file is not a database"), (other_database, "something else"), (later_format, "has format 2")],
)
def test_a_file_that_is_no_journal_is_refused_and_left_alone(tmp_path, make, reason):
    path = tmp_path / FILE_NAME
    make(path)
    content = path.read_bytes()
    for use in (Journal, read_events):
        with pytest.raises(JournalError, match=reason):
            use(path)
    assert path.read_bytes() == content


def test_reading_what_is_not_there_makes_no_file(tmp_path):
    with pytest.raises(JournalError, match="there is no journal at"):
        read_events(tmp_path / FILE_NAME)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(JournalError, match="unable to open"):
        Journal(tmp_path / "none" / FILE_NAME)


def test_a_file_that_a_kill_left_empty_becomes_a_journal(tmp_path):
    path = tmp_path / FILE_NAME
    path.touch()
    with pytest.raises(JournalError, match="has no events"):
        read_events(path)
    with Journal(path) as journal:
        journal.committed(step=1)
    assert [event.seq for event in read_events(path)] == [1]


def test_damage_in_the_middle_is_an_error_and_not_the_end(tmp_path):
    path = tmp_path / FILE_NAME
    with Journal(path) as journal:
        for number in range(5000):
            journal.noted("run", "x" * 50, number=number)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :] = b"\x5a" * (len(content) - len(content) // 2)
    path.write_bytes(content)
    with pytest.raises(JournalError, match="cannot be used as the journal of a run"):
        list(read_events(path))
