"""Every way in which a user's reward function can go wrong, provoked in real worker processes."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest

from weaver_rl.errors import RewardError
from weaver_rl.rewards.config import RewardSpec, RewardWorkersConfig
from weaver_rl.rewards.pool import RewardWorker
from weaver_rl.rewards.process import OnOutput
from weaver_rl.types import Completion, Prompt, RewardComponent, Rollout

pytestmark = pytest.mark.unit

PLUGINS = Path(__file__).parent / "reward_plugins"
HURRIED_S = 0.5
"""Deadline where a test waits for it; everywhere else it is one that a loaded machine cannot miss."""
PATIENT_S = 30.0


def make_rollout(does: str | None = None, *, text: str = "four", **columns: Any) -> Rollout:
    completion = Completion(
        token_ids_L=np.arange(3, dtype=np.int32),
        logprobs_L=np.zeros(3, np.float32),
        versions_L=np.zeros(3, np.int32),
        stop_reason="stop",
    )
    prompt = Prompt(prompt_id="p", text="?", token_ids_P=(1,), columns={"does": does, **columns} if does else {})
    return Rollout(rollout_id=f"r-{does}", prompt=prompt, completion=completion, text=text)


def make_worker(*names: str, timeout_s: float = PATIENT_S, on_output: OnOutput | None = None) -> RewardWorker:
    specs = [RewardSpec(name=f"hostile.py:{name}") for name in names]
    config = RewardWorkersConfig(timeout_s=timeout_s, memory_limit_mb=64, start_timeout_s=30)
    return RewardWorker(specs=specs, workers=config, base_dir=PLUGINS, on_output=on_output)


@pytest.fixture(scope="module")
def workers() -> Iterator[Callable[..., RewardWorker]]:
    """One worker for each list of functions in the module: what one test does to it must not harm the next."""
    made: dict[tuple[Any, ...], RewardWorker] = {}

    def worker_for(*names: str, timeout_s: float = PATIENT_S) -> RewardWorker:
        key = (*names, timeout_s)
        return made.setdefault(key, made.get(key) or make_worker(*names, timeout_s=timeout_s))

    yield worker_for
    for worker in made.values():
        worker.kill()


@pytest.fixture
def each_worker(workers: Callable[..., RewardWorker]) -> RewardWorker:
    return workers("misbehave", "length")


def score(worker: RewardWorker, *rollouts: Rollout) -> list[list[RewardComponent]]:
    """Components by spec: [spec][rollout]."""
    scored = asyncio.run(worker.score(rollouts))
    return [list(column) for column in zip(*scored, strict=True)]


def wait_for_death(pid: int, timeout_s: float = 5.0) -> bool:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))
    finally:
        os.close(pidfd)


MISSING = {
    "exception": r"raised ValueError: bad thing \(hostile.py:\d+\)",
    "nan": "returned NaN",
    "inf": "returned inf",
    "minus_inf": "returned -inf",
    "none": "returned None, not a number",
    "str": "returned a str, not a number: '0.5'",
    "complex": "returned a complex, not a number: 1j",
    "list": "returned a list, not a number",
    "lambda": "returned a function, not a number: <function",
    "unprintable": "returned an Unprintable, not a number",
    "huge": "too large for a float",
    "beyond_float32": "beyond float32: 1e",
    "system_exit": "raised SystemExit: 0",
    "keyboard_interrupt": "raised KeyboardInterrupt",
    "recursion": "raised RecursionError: maximum recursion depth",
    "stdin": "raised EOFError",
    "os_exit": "the worker process exited with code 3",
    "segfault": "the worker process died with signal SIGSEGV: about to segfault .*hostile.py",
    "abort": "died with signal SIGABRT",
    "memory": r"used more than 64 MiB .*memory_limit_mb",
    "memory_at_once": r"used more than 64 MiB .*memory_limit_mb",
    "closed_channel": "its channel|exited with code",
    "forked_holder": "exited with code 5",
}


@pytest.fixture(scope="module")
def judged(workers: Callable[..., RewardWorker]) -> list[dict[str, RewardComponent]]:
    """The two components of every failing rollout and of good ones before, amid and after, scored in one call."""
    kinds = ["good-1", *list(MISSING)[:10], "good-2", *list(MISSING)[10:], "good-3"]
    rollouts = [make_rollout(None if kind.startswith("good") else kind) for kind in kinds]
    columns = score(workers("misbehave", "length"), *rollouts)
    return [dict(zip(kinds, column, strict=True)) for column in columns]


@pytest.mark.parametrize("does", MISSING)
def test_a_failure_is_missing_with_its_reason(judged: list[dict[str, RewardComponent]], does: str) -> None:
    assert judged[0][does].value is None
    assert re.search(MISSING[does], str(judged[0][does].missing)), judged[0][does].missing
    assert judged[0][does].name == "hostile.py:misbehave"


def test_failures_harm_no_other_rollout_and_no_other_component(judged: list[dict[str, RewardComponent]]) -> None:
    assert [judged[0][f"good-{n}"].value for n in (1, 2, 3)] == [1.0] * 3
    assert {component.value for component in judged[1].values()} == {4.0}


def test_endless_loops_are_killed_and_cost_only_their_own_score(workers: Callable[..., RewardWorker]) -> None:
    rollouts = make_rollout(), *map(make_rollout, ["endless_python", "endless_c", "endless_print"]), make_rollout()
    looped, length = score(workers("misbehave", "length", timeout_s=HURRIED_S), *rollouts)
    assert [component.value for component in looped] == [1.0, None, None, None, 1.0]
    assert {component.missing for component in looped[1:4]} == {"ran longer than 0.5 s and was killed"}
    assert [component.value for component in length] == [4.0] * 5
    assert all(HURRIED_S <= component.seconds < PATIENT_S for component in looped[1:4])


def test_numbers_of_every_kind_are_accepted(each_worker: RewardWorker) -> None:
    kinds = ["fork_and_return", "bool", "int", "numpy", "numpy_bool", "numpy_0d", "decimal", "noisy"]
    values = score(each_worker, *map(make_rollout, kinds))[0]
    assert [(kind, c.value, c.missing) for kind, c in zip(kinds, values, strict=True)] == [
        (k, 1.0, None) for k in kinds
    ]
    assert all(type(component.value) is float for component in values)


def test_a_forked_child_that_returns_does_not_answer_too(each_worker: RewardWorker) -> None:
    for _ in range(3):
        values = score(each_worker, make_rollout("fork_and_return"), make_rollout("nan"), make_rollout())
        assert [component.value for component in values[0]] == [1.0, None, 1.0]
        assert [component.value for component in values[1]] == [4.0, 4.0, 4.0]


def test_seconds_are_those_of_each_rollout(each_worker: RewardWorker) -> None:
    quick, slow = score(each_worker, make_rollout(), make_rollout("slow"))[0]
    assert quick.seconds < 0.2 <= slow.seconds


def test_what_a_rollout_leaves_behind_is_not_blamed_on_the_next(each_worker: RewardWorker) -> None:
    poisoned, innocent = score(each_worker, make_rollout("poison"), make_rollout("slow"))[0]
    assert (poisoned.value, innocent.value, innocent.missing) == (1.0, 1.0, None)


class Unpicklable:
    def __reduce__(self) -> Any:
        raise RuntimeError("not me")


class RaisesWhenRead:
    def __reduce__(self) -> Any:
        return (int, ("not a number",))


def test_rollouts_that_cannot_be_sent_or_read_spoil_no_other() -> None:
    worker = make_worker("misbehave", "batched", "concurrently")
    rollouts = make_rollout(), make_rollout("int", y=Unpicklable()), make_rollout("int", y=RaisesWhenRead())
    try:
        columns = score(worker, *rollouts)
    finally:
        worker.kill()
    for components in columns:
        assert components[0].value == 1.0
        assert "could not be pickled: RuntimeError: not me" in str(components[1].missing)
        assert "could not be unpickled in the reward worker: ValueError" in str(components[2].missing)


@pytest.mark.parametrize(
    ("function", "reasons"),
    [
        (
            "batched",
            {
                "exception": "raised ValueError",
                "none": "returned None",
                "wrong_length": "returned 2 values, not one for each of the 1 rollouts",
                "no_list": "raised TypeError",
                "os_exit": "exited with code 3",
                "memory": "used more than 64 MiB",
            },
        ),
        ("batched_async", {"exception": "raised ValueError"}),
        (
            "concurrently",
            {
                "exception": "raised ValueError",
                "system_exit": "raised SystemExit",
            },
        ),
        ("concurrently", {"os_exit": "exited with code 3", "memory": "used more than 64 MiB"}),
    ],
)
def test_only_the_culprits_of_a_batch_go_missing(
    workers: Callable[..., RewardWorker], function: str, reasons: dict[str, str]
) -> None:
    first, *bad, last = score(workers(function), make_rollout(), *map(make_rollout, reasons), make_rollout())[0]
    assert (first.value, last.value) == (1.0, 1.0)
    for does, component in zip(reasons, bad, strict=True):
        assert component.value is None
        assert reasons[does] in str(component.missing)


def test_the_endless_rollout_of_a_batch_is_found(workers: Callable[..., RewardWorker]) -> None:
    worker = workers("batched", timeout_s=HURRIED_S)
    found = score(worker, make_rollout(), make_rollout("endless_c"))[0]
    assert [component.value for component in found] == [1.0, None]
    assert found[1].missing == "ran longer than 0.5 s and was killed"


def test_late_coroutines_are_cancelled_and_stubborn_ones_killed(workers: Callable[..., RewardWorker]) -> None:
    worker = workers("concurrently", timeout_s=HURRIED_S)
    found = score(worker, make_rollout(), *map(make_rollout, ["await_forever", "ignore_cancellation"]))[0]
    assert [component.value for component in found] == [1.0, None, None]
    assert {component.missing for component in found[1:]} == {"ran longer than 0.5 s and was cancelled"}
    assert score(worker, make_rollout())[0][0].value == 1.0
    assert worker.num_replaced == 1


def test_async_functions_run_concurrently_and_blocking_ones_are_not_cut_short(
    workers: Callable[..., RewardWorker],
) -> None:
    worker = workers("concurrently", timeout_s=HURRIED_S)
    asyncio.run(worker.start())
    started = time.monotonic()
    waiting = score(worker, *[make_rollout("awaits")] * 32)[0]
    assert [component.value for component in waiting] == [1.0] * 32
    assert time.monotonic() - started < 32 * 0.2 / 2
    blocking = score(worker, *[make_rollout("slow")] * 3)[0]
    assert [component.value for component in blocking] == [1.0] * 3


def test_a_blocking_coroutine_is_not_held_against_those_that_wait(workers: Callable[..., RewardWorker]) -> None:
    waits, blocks, waits_too = score(
        workers("concurrently", timeout_s=HURRIED_S), *map(make_rollout, ["awaits", "blocks_often", "awaits"])
    )[0]
    assert (waits.value, waits_too.value) == (1.0, 1.0)
    assert "ran longer than 0.5 s" in str(blocks.missing)


def test_a_killed_worker_takes_its_grandchildren_along(tmp_path: Path) -> None:
    worker = make_worker("misbehave", timeout_s=1.5)
    try:
        pids_file = tmp_path / "pids"
        components = score(worker, make_rollout("grandchildren", path=str(pids_file)))[0]
        assert "ran longer than" in str(components[0].missing)
        pids = [int(pid) for pid in pids_file.read_text().split()]
        assert len(pids) == 3
        assert [wait_for_death(pid) for pid in pids] == [True] * 3
        components = score(worker, make_rollout("forked_holder", path=str(pids_file)))[0]
        assert components[0].missing == "the worker process exited with code 5"
        assert wait_for_death(int(pids_file.read_text()))
    finally:
        worker.kill()


def test_replacements_leave_no_descriptor_and_no_zombie() -> None:
    worker = make_worker("misbehave")
    try:
        score(worker, make_rollout("os_exit"), make_rollout())
        gc.collect()
        descriptors = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        num_replaced = worker.num_replaced
        for _ in range(2):
            score(worker, make_rollout(), make_rollout("os_exit"), make_rollout())
        assert worker.num_replaced == num_replaced + 4
        assert len(os.listdir("/proc/self/fd")) == descriptors  # noqa: PTH208
    finally:
        worker.kill()
    children = psutil.Process().children()
    assert [child for child in children if child.status() == psutil.STATUS_ZOMBIE] == []


def test_close_ends_the_process_and_refuses_more_work() -> None:
    async def run() -> int:
        async with make_worker("length") as worker:
            pid = worker.pid
            assert pid is not None
        with pytest.raises(RewardError, match="closed"):
            await worker.score([make_rollout()])
        await worker.close()
        return pid

    assert wait_for_death(asyncio.run(run()), timeout_s=0)


def test_a_cancelled_score_ends_at_once_and_the_worker_goes_on() -> None:
    async def run() -> None:
        async with make_worker("misbehave", timeout_s=600) as worker:
            hanging = asyncio.create_task(worker.score([make_rollout("endless_c")] * 3))
            await asyncio.sleep(0.05)
            hanging.cancel()
            with pytest.raises(asyncio.CancelledError):
                await hanging
            ((component,),) = await worker.score([make_rollout()])
            assert component.value == 1.0

    asyncio.run(asyncio.wait_for(run(), timeout=20))


def test_kill_interrupts_a_score_under_way() -> None:
    async def run() -> None:
        worker = make_worker("misbehave", timeout_s=600)
        await worker.start()
        hanging = asyncio.create_task(worker.score([make_rollout("endless_c")]))
        await asyncio.sleep(0.05)
        worker.kill()
        with pytest.raises(RewardError, match="closed"):
            await hanging

    asyncio.run(asyncio.wait_for(run(), timeout=20))


PARENT = """
import asyncio
from tests.unit.test_rewards_worker import make_rollout, make_worker

async def main():
    worker = make_worker(
        "misbehave",
        timeout_s=600,
        on_output=lambda printed: print(worker.pid, flush=True),
    )
    await worker.score([make_rollout("announced_loop")])

asyncio.run(main())
"""


def test_a_looping_child_dies_with_a_killed_parent() -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", PARENT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert Path(f"/proc/{child}").exists()
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    assert wait_for_death(child)


@pytest.mark.parametrize(
    ("source", "seen"),
    [
        ("def f(rollout): return 1 +", "raised SyntaxError"),
        ("import no_such_package", "no_such_package"),
        ("import os; print('goodbye'); os._exit(4)", "exited with code 4: goodbye"),
        ("while True: pass", "did not finish loading in 1 s"),
    ],
)
def test_plugins_that_cannot_be_imported_are_one_error(tmp_path: Path, source: str, seen: str) -> None:
    (tmp_path / "mine.py").write_text(source)
    workers = RewardWorkersConfig(start_timeout_s=1 if "while" in source else 30)
    worker = RewardWorker(specs=[RewardSpec(name="mine.py:f")], workers=workers, base_dir=tmp_path)
    with pytest.raises(RewardError, match=seen):
        asyncio.run(worker.start())
    worker.kill()


def test_a_source_changed_during_the_run_is_refused(tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text("import os\ndef f(rollout): os._exit(1)")
    worker = RewardWorker(specs=[RewardSpec(name="mine.py:f")], workers=RewardWorkersConfig(), base_dir=tmp_path)
    try:
        assert "exited with code 1" in str(score(worker, make_rollout())[0][0].missing)
        plugin.write_text("def f(rollout): return 0.5")
        with pytest.raises(RewardError, match=r"mine.py:f' changed during the run"):
            score(worker, make_rollout())
    finally:
        worker.kill()


def test_what_plugins_print_reaches_the_listener() -> None:
    heard: list[bytes] = []
    worker = make_worker("misbehave", on_output=heard.append)
    try:
        assert score(worker, make_rollout("noisy"))[0][0].value == 1.0
    finally:
        worker.kill()
    assert b"".join(heard).count(b"chatter") == 10_000
