"""The state of real processes: running, stopped, gone, and a number that another process has got."""

import os
import signal
import subprocess
import sys

import psutil
import pytest

from weaver_rl.process_state import ProcessFacts, process_state, start_time

pytestmark = pytest.mark.unit


@pytest.fixture
def child():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()
    process.stdin.close()


def stop(process: subprocess.Popen):
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)


def test_running_stopped_zombie_gone(child):
    assert process_state(child.pid) in ("running", "waiting for disk")
    stop(child)
    assert process_state(child.pid) == "stopped (SIGSTOP)"
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process_state(child.pid) == "zombie"
    child.wait()
    assert process_state(child.pid) == "gone"
    assert start_time(child.pid) is None


def test_another_process_with_the_same_number_is_not_taken_for_it(child):
    started_at = start_time(child.pid)
    assert process_state(child.pid, started_at) != "gone"
    assert process_state(child.pid, started_at - 10) == "gone"


def test_a_process_that_waits_for_its_disk_and_one_that_is_traced(monkeypatch):
    for status, state in ((psutil.STATUS_DISK_SLEEP, "waiting for disk"), (psutil.STATUS_TRACING_STOP, "stopped by a")):
        monkeypatch.setattr(psutil.Process, "status", lambda self, status=status: status)
        assert process_state(os.getpid()).startswith(state)


def test_facts_say_since_when_and_alarm(child):
    now = [100.0]
    facts = ProcessFacts(child.pid, clock=lambda: now[0])
    assert facts().text == f"pid {child.pid} running"
    assert not facts().alarming
    stop(child)
    facts()
    now[0] += 4
    assert facts().text == f"pid {child.pid} stopped (SIGSTOP) for 4 s"
    assert facts().alarming
    child.kill()
    child.wait()
    facts()
    now[0] += 12
    assert facts().text == f"pid {child.pid} gone 12 s ago"
    assert facts().alarming


def test_facts_of_a_process_that_was_gone_already_stay_so(child):
    child.kill()
    child.wait()
    facts = ProcessFacts(child.pid)
    facts._pid = os.getpid()  # as if the system had given the number to somebody else
    assert "gone" in facts().text
