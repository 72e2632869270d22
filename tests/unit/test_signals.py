"""The signals of a run: the first stops it, clean-ups are finished in peace."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from actors.signals import KILLS_AT, STOPPING, StopSignals

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def _nothing_ignored() -> Iterator[None]:
    """Under `nohup` and in the background of a shell some of them are ignored, and then rightly stay so."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    for number in STOPPING:
        signal.signal(number, signal.default_int_handler if number is signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: signal.Signals = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", STOPPING)
def test_the_first_signal_interrupts_and_the_old_handlers_come_back(number):
    before = [signal.getsignal(each) for each in STOPPING]
    with pytest.raises(KeyboardInterrupt, match=number.name), StopSignals():
        send(number)
    assert [signal.getsignal(each) for each in STOPPING] == before


def test_a_clean_up_is_not_cut_short():
    done = []
    with StopSignals() as stop:
        with stop.deferred():
            send()
            done.append("cleaned up")
        with pytest.raises(KeyboardInterrupt, match="SIGTERM"):
            stop.check()
    assert done == ["cleaned up"]


def test_a_second_signal_does_not_interrupt_what_the_first_began():
    with StopSignals() as stop:
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        send(signal.SIGINT)  # the clean-up of a KeyboardInterrupt that is on its way out
        assert KILLS_AT == 3
        with pytest.raises(KeyboardInterrupt, match="SIGINT"):
            stop.check()


def test_a_signal_cancels_a_task_that_waits_for_ever():
    async def main(stop: StopSignals) -> None:
        async with stop.running():
            asyncio.get_running_loop().call_soon(send)
            await asyncio.get_running_loop().create_future()

    with StopSignals() as stop, pytest.raises(KeyboardInterrupt, match="SIGTERM"):
        asyncio.run(main(stop))


def test_the_handler_survives_the_end_of_the_event_loop():
    async def main(stop: StopSignals) -> None:
        async with stop.running():
            pass

    with StopSignals() as stop:
        asyncio.run(main(stop))
        with stop.deferred():
            send()
        with pytest.raises(KeyboardInterrupt):
            stop.check()


def test_who_insists_kills_the_process():
    code = (
        "import os, signal\n"
        "from actors.signals import StopSignals\n"
        "with StopSignals() as stop, stop.deferred():\n"
        "    for _ in range(3): os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=30, check=False)
    assert ended.returncode == -signal.SIGKILL


def test_a_signal_that_was_ignored_stays_ignored():
    """`nohup weaver-rl train …`: the terminal is closed, the run goes on."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            send(signal.SIGHUP)
            stop.install()  # as after ray.init
            send(signal.SIGHUP)
            stop.check()
            with pytest.raises(KeyboardInterrupt, match="SIGTERM"):
                send(signal.SIGTERM)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
