"""`weaver-rl status`: what a person reads of a run that goes on, stands still, was killed or has ended."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from weaver_rl.errors import UserError
from weaver_rl.live_state import LiveState, LiveWait, read_live_state
from weaver_rl.run_folder import RunFolder
from weaver_rl.status import print_status

pytestmark = pytest.mark.unit

HOLDER = """
import sys
from pathlib import Path
from weaver_rl.run_folder import RunFolder
with RunFolder(Path(sys.argv[1])).claim():
    print("held", flush=True)
    sys.stdin.read()
"""
CHAIN = "learner waits for 3 groups ← reward worker 2 scores group 00000017 (41 s of 60 s) ← pid 4711 gone 12 s ago"
SAMPLERS = [
    {"name": "sampler 0", "pid": 81, "node": "n1", "state": "generating", "version": 7, "groups_owed": 12},
    {"name": "sampler 1", "pid": None, "node": "n2", "state": "[starting]", "version": None, "groups_owed": 0},
]


@pytest.fixture
def folder(tmp_path: Path):
    return RunFolder(tmp_path / "run")


@pytest.fixture
def holder(folder):
    """Another process that holds the folder, as a run does."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def kill(process: subprocess.Popen):
    process.kill()
    process.wait()


def live_state(folder: RunFolder, **changes) -> LiveState:
    status = folder.read_status()
    wait = LiveWait(owner="reward worker 2", what="scores group 00000017", seconds=41.2, timeout_s=60)
    state = LiveState(
        time_s=status.started_at + 100,
        pid=status.pid,
        chain=CHAIN,
        waited_s=41.2,
        alarms={"reward worker 2": "pid 4711 gone 12 s ago"},
        waits=(wait, LiveWait(owner="controller", what="groups", seconds=50, timeout_s=None)),
        num_waits=2,
        facts={"step": 8, "samplers": SAMPLERS, "in_flight": 24, "finished": 5},
    )
    return replace(state, **changes)


def shown(folder: RunFolder, after_s: float = 103.0, width: int = 200) -> tuple[str, int]:
    """What is printed so many seconds after the start of the run, and the exit status."""
    stream = io.StringIO()
    started_at = folder.read_status().started_at
    status = print_status(Console(file=stream, width=width), folder.path, clock=lambda: started_at + after_s)
    return stream.getvalue(), status


@pytest.mark.parametrize("width", [80, 200])
def test_a_run_that_goes_on_shows_its_step_its_chain_its_samplers_and_its_waits(folder, holder, width):
    live_state(folder).write(folder.live_file)
    folder.config_json.write_text(json.dumps({"num_steps": 60, "warm_start": {"num_steps": 300}}))
    text, status = shown(folder, width=width)
    assert status == 0
    lines = text.splitlines()
    assert lines[0] == f"{folder.path}: running for 1:43 (pid {holder.pid} on {socket.gethostname()})"
    assert lines[1] == "step 8 of 360"
    assert lines[2] == "as of 0:03 ago"
    assert lines[3] == f"waiting 41 s: {CHAIN}"
    assert lines[4] == "reward worker 2: pid 4711 gone 12 s ago"
    assert lines[5] == "in flight 24 · finished 5"
    table = [line.split() for line in lines[6:]]
    assert ["name", "pid", "node", "state", "version", "groups", "owed"] in table
    assert ["sampler", "0", "81", "n1", "generating", "7", "12"] in table
    assert ["sampler", "1", "–", "n2", "[starting]", "–", "0"] in table
    assert ["reward", "worker", "2", "scores", "group", "00000017", "41", "s", "60", "s"] in table
    assert ["controller", "groups", "50", "s", "–"] in table


def test_where_the_time_of_the_last_step_went(folder, holder):
    ledger = {f"sampler {i}": {"generate": 0.71, "wait for learner": 0.286, "sync": 0.004} for i in range(30)}
    live_state(folder, facts={"step": 8, "ledger": ledger}).write(folder.live_file)
    text, _ = shown(folder)
    assert "the last step (the first 20 of 30)" in text
    assert "sampler 19  generate 71%  wait for learner 29%" in text
    assert "sampler 20" not in text
    assert "ledger" not in text


def test_many_waits_are_cut_and_counted(folder, holder):
    waits = tuple(LiveWait(owner=f"sampler {i}", what="generating", seconds=i, timeout_s=None) for i in range(40))
    live_state(folder, waits=waits, num_waits=4000).write(folder.live_file)
    text, _ = shown(folder)
    assert "waits: the oldest 12 of 4000" in text
    assert "sampler 11 " in text
    assert "sampler 12 " not in text


def test_a_run_that_has_told_nothing_yet_is_starting(folder, holder):
    text, status = shown(folder)
    assert ": starting for 1:43" in text
    assert "step 0\n" in text
    assert status == 0


def test_what_an_earlier_process_of_the_run_told_is_not_shown(folder, holder):
    live_state(folder, pid=holder.pid + 1).write(folder.live_file)
    assert CHAIN not in shown(folder)[0]
    live_state(folder, time_s=folder.read_status().started_at - 5).write(folder.live_file)
    assert CHAIN not in shown(folder)[0]


def test_a_driver_that_was_killed_is_said_to_be_with_what_it_waited_for(folder, holder):
    live_state(folder).write(folder.live_file)
    kill(holder)
    text, status = shown(folder)
    assert status == 1
    assert f"killed (pid {holder.pid} on {socket.gethostname()} is gone without a word); continue with --resume" in text
    assert "as of 0:03 ago, before it was killed" in text
    assert CHAIN in text


def test_a_driver_that_was_stopped_is_said_to_be(folder, holder):
    live_state(folder).write(folder.live_file)
    assert "told nothing" not in shown(folder, after_s=112)[0]
    assert "has told nothing for 40 s\n" in shown(folder, after_s=140)[0]
    holder.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, holder.pid, os.WSTOPPED | os.WNOWAIT)
    text, status = shown(folder, after_s=140)
    assert f"told nothing for 40 s: it is stopped (SIGSTOP); let it go on with `kill -CONT {holder.pid}`" in text
    assert status == 0


def test_a_run_on_another_machine_is_judged_by_its_news(folder, holder):
    live_state(folder).write(folder.live_file)
    kill(holder)  # its lock cannot be seen here
    folder.write_status(replace(folder.read_status(), host="elsewhere"))
    assert shown(folder)[1] == 0
    text, status = shown(folder, after_s=140)
    assert status == 1
    assert ": killed (" in text


def test_a_silent_driver_on_another_machine_is_to_be_looked_at_there(folder, holder):
    live_state(folder).write(folder.live_file)
    folder.write_status(replace(folder.read_status(), host="elsewhere"))
    assert "on elsewhere) has told nothing for 40 s; look at that process there" in shown(folder, after_s=140)[0]


@pytest.mark.parametrize(
    ("state", "reason", "exit_status", "said"),
    [
        ("finished", None, 0, "finished 0:03 ago, resumed once"),
        ("failed", "too many missing", 1, "failed 0:03 ago, resumed once: too many missing"),
        ("interrupted", "SIGTERM", 1, "interrupted 0:03 ago, resumed once: SIGTERM; continue with --resume"),
    ],
)
def test_a_run_that_has_ended_says_how_and_shows_no_waits(folder, state, reason, exit_status, said):
    with folder.claim() as claim:
        claim.progress(step=7, weights_version=7)
    with folder.claim(resume=True) as claim:
        live_state(folder).write(folder.live_file)
        claim.end(state, reason)
    folder.write_status(replace(folder.read_status(), ended_at=folder.read_status().started_at + 100))
    text, status = shown(folder)
    assert status == exit_status
    assert text == f"{folder.path}: {said}\nstep 7\n"


def test_a_run_that_ends_between_the_looks_is_not_called_killed(folder, monkeypatch):
    with folder.claim():
        running = folder.read_status()
    ended = folder.read_status()
    answers = [running, ended]
    monkeypatch.setattr(RunFolder, "read_status", lambda self: answers.pop(0))
    stream = io.StringIO()
    assert print_status(Console(file=stream, width=200), folder.path) == 0
    assert "finished" in stream.getvalue()


def test_a_run_that_is_resumed_between_the_looks_is_not_called_killed(folder, monkeypatch):
    with folder.claim():
        killed = replace(folder.read_status(), pid=2**22 + 1)
        answers = [killed, folder.read_status()]
        monkeypatch.setattr(RunFolder, "read_status", lambda self: answers.pop(0))
        monkeypatch.setattr(RunFolder, "is_claimed", lambda self: False)  # looked at before the resume
        stream = io.StringIO()
        assert print_status(Console(file=stream, width=200), folder.path) == 0
    assert "starting" in stream.getvalue()


def test_a_folder_without_a_run_is_a_users_error(folder):
    with pytest.raises(UserError, match=r"run does not exist: give the folder of a run"):
        print_status(Console(file=io.StringIO()), folder.path)
    folder.path.mkdir()
    with pytest.raises(UserError, match=r"has no run\.json"):
        print_status(Console(file=io.StringIO()), folder.path)
    folder.status_file.write_text("{")
    with pytest.raises(UserError, match=r"run\.json is not the status of a run"):
        print_status(Console(file=io.StringIO()), folder.path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"waits": [{"a": 1}], "time_s": 1}', '{"waits": 3}'])
def test_a_live_json_that_cannot_be_read_is_as_none(folder, holder, content):
    folder.live_file.write_text(content)
    assert read_live_state(folder.live_file) is None
    assert ": starting for" in shown(folder)[0]


def test_overwrite_removes_what_the_run_before_told(folder):
    with folder.claim():
        live_state(folder).write(folder.live_file)
    with folder.claim(overwrite=True):
        assert not folder.live_file.exists()


def test_live_state_comes_back_as_it_was_written(folder):
    with folder.claim():
        state = live_state(folder)
        state.write(folder.live_file)
        assert read_live_state(folder.live_file) == state
