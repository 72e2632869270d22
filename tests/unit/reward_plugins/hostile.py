"""Reward functions that go wrong in every way a user's can; `prompt.columns["does"]` says which. They know no test."""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import os
import subprocess
import sys
import threading
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from weaver_rl.types import Rollout

HOARD: list[bytearray] = []


def endless_loop_in_c() -> None:
    sum(itertools.repeat(0))


def eat_memory() -> None:
    while True:
        HOARD.append(bytearray(8 * 2**20))


def recurse() -> None:
    recurse()


def segfault() -> None:
    sys.stderr.write("about to segfault\n")
    ctypes.string_at(0)


def fork_and_return() -> float:
    os.fork()
    return 1.0


def print_endlessly() -> None:
    while True:
        sys.stdout.write("x" * 1000)


def leave_grandchildren_and_hang(path: str) -> None:
    """One in our process group, one in a session of its own; both hold every descriptor that a fork inherits."""
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    pids = [subprocess.Popen(sleep).pid, subprocess.Popen(sleep, start_new_session=True).pid]
    if (forked := os.fork()) == 0:
        time.sleep(600)
    Path(path).write_text(" ".join(map(str, [*pids, forked])))
    endless_loop_in_c()


def leave_a_forked_holder_and_die(path: str | None = None) -> None:
    """The forked child keeps our end of the channel and of the output pipe open."""
    if (forked := os.fork()) == 0:
        time.sleep(600)
    if path:
        Path(path).write_text(str(forked))
    os._exit(5)


def announce_and_loop() -> None:
    sys.stdout.write("looping\n")
    endless_loop_in_c()


def raise_value_error() -> None:
    raise ValueError("bad\nthing")


def close_every_descriptor() -> None:
    os.closerange(3, 256)


def sleep_a_little() -> float:
    time.sleep(0.2)
    return 1.0


def poison() -> float:
    """Scores well and kills the process a moment later, while the next rollout is judged."""
    threading.Timer(0.1, os._exit, (7,)).start()
    return 1.0


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


ACTIONS: dict[str, Any] = {
    "exception": raise_value_error,
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "minus_inf": lambda: float("-inf"),
    "none": lambda: None,
    "str": lambda: "0.5",
    "complex": lambda: 1j,
    "list": lambda: [1.0],
    "lambda": lambda: lambda: 1.0,
    "unprintable": Unprintable,
    "huge": lambda: 10**400,
    "beyond_float32": lambda: 1e39,
    "system_exit": lambda: sys.exit(0),
    "keyboard_interrupt": lambda: (_ for _ in ()).throw(KeyboardInterrupt()),
    "recursion": recurse,
    "stdin": input,
    "os_exit": lambda: os._exit(3),
    "segfault": segfault,
    "abort": os.abort,
    "memory": eat_memory,
    "memory_at_once": lambda: bytearray(128 * 2**20),
    "endless_python": lambda: all(True for _ in itertools.count()),
    "endless_c": endless_loop_in_c,
    "announced_loop": announce_and_loop,
    "endless_print": print_endlessly,
    "closed_channel": close_every_descriptor,
    "forked_holder": leave_a_forked_holder_and_die,
    "bool": lambda: True,
    "int": lambda: 1,
    "numpy": lambda: np.float32(1.0),
    "numpy_bool": lambda: np.bool_(True),
    "numpy_0d": lambda: np.array(1),
    "decimal": lambda: Decimal(1),
    "fork_and_return": fork_and_return,
    "noisy": lambda: float(bool(sys.stdout.write("chatter" * 10_000))),
    "poison": poison,
    "slow": sleep_a_little,
}


def misbehave(rollout: Rollout) -> Any:
    does = rollout.prompt.columns.get("does")
    if path := rollout.prompt.columns.get("path"):
        leave_grandchildren_and_hang(path) if does == "grandchildren" else leave_a_forked_holder_and_die(path)
    return ACTIONS[does]() if does else 1.0


def batched(rollouts: list[Rollout]) -> Any:
    does = {rollout.prompt.columns.get("does") for rollout in rollouts}
    if "wrong_length" in does:
        return [1.0, 1.0]
    if "no_list" in does:
        return 1.0
    return [misbehave(rollout) for rollout in rollouts]


async def concurrently(rollout: Rollout) -> Any:
    does = rollout.prompt.columns.get("does")
    if does == "await_forever":
        await asyncio.Event().wait()
    if does == "ignore_cancellation":
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                continue
    if does == "blocks_often":
        for _ in range(6):
            time.sleep(0.1)
            await asyncio.sleep(0)
    if does == "awaits":
        for _ in range(8):
            await asyncio.sleep(0.025)
        return 1.0
    await asyncio.sleep(0)
    return misbehave(rollout) if does != "blocks_often" else 1.0


async def batched_async(rollouts: list[Rollout]) -> list[Any]:
    await asyncio.sleep(0)
    return [misbehave(rollout) for rollout in rollouts]


def length(rollout: Rollout) -> float:
    return float(len(rollout.text))
