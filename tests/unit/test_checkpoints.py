"""Checkpoints are whole or absent: after a failure, a kill, a full disk, a flipped bit."""

import asyncio
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from weaver_rl.checkpoints import Checkpoints, find_damage, load_controller_state, save_controller_state
from weaver_rl.errors import ActorFailedError, CheckpointError

pytestmark = pytest.mark.unit

WRITER = """
import sys
from pathlib import Path
from weaver_rl.checkpoints import Checkpoints
with Checkpoints(Path(sys.argv[1]), keep=2).writing(20) as directory:
    (directory / "weights").write_bytes(b"x" * 1000)
    print("half", flush=True)
    sys.stdin.read()
"""


def write(checkpoints: Checkpoints, step: int, *, pinned: bool = False) -> None:
    with checkpoints.writing(step, pinned=pinned) as directory:
        (directory / "ranks").mkdir()
        (directory / "ranks" / "rank_0").write_bytes(f"weights {step}".encode())
        save_controller_state(directory, {"step": step})


def write_half(checkpoints: Checkpoints, step: int, error: BaseException) -> None:
    with checkpoints.writing(step) as directory:
        (directory / "weights").write_bytes(b"half")
        raise error


def write_to_full_device(checkpoints: Checkpoints, step: int) -> None:
    with checkpoints.writing(step) as directory:
        (directory / "weights").symlink_to("/dev/full")  # the kernel answers every write with ENOSPC
        (directory / "weights").write_bytes(b"x")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_latest_is_the_newest_one(tmp_path):
    checkpoints = Checkpoints(tmp_path / "new" / "checkpoints", keep=3)
    assert checkpoints.latest() is None
    write(checkpoints, 20)
    write(checkpoints, 40)
    assert checkpoints.latest().name == "step_000040"
    assert load_controller_state(checkpoints.latest()) == {"step": 40}
    assert find_damage(checkpoints.latest()) is None


def test_old_ones_are_pruned_and_pinned_ones_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (10, 20, 30, 40, 50):
        write(checkpoints, step, pinned=step == 10)
    assert names(tmp_path) == ["step_000010", "step_000040", "step_000050"]


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt(), ActorFailedError("rank 1 died")])
def test_a_write_that_fails_leaves_nothing_and_harms_nothing(tmp_path, error):
    checkpoints = Checkpoints(tmp_path, keep=1)
    write(checkpoints, 20)
    expected = CheckpointError if isinstance(error, ValueError) else type(error)
    with pytest.raises(expected):
        write_half(checkpoints, 40, error)
    assert names(tmp_path) == ["step_000020"]
    assert checkpoints.latest().name == "step_000020"


def test_a_full_disk_is_a_clear_error(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    write(checkpoints, 20)
    with pytest.raises(CheckpointError, match=r"step_000040 could not be .*No space left on device.*step_000020"):
        write_to_full_device(checkpoints, 40)
    assert names(tmp_path) == ["step_000020"]


def test_an_empty_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no files"), Checkpoints(tmp_path, keep=1).writing(1):
        pass


def test_a_process_killed_while_writing_leaves_only_the_earlier_one(tmp_path):
    write(Checkpoints(tmp_path, keep=2), 10)
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert writer.stdout.readline() == "half\n"
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    finally:
        writer.kill()
        writer.communicate()
    assert names(tmp_path) == [".writing-step_000020", "step_000010"]
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert names(tmp_path) == ["step_000010"]
    assert checkpoints.latest().name == "step_000010"
    write(checkpoints, 20)
    assert checkpoints.latest().name == "step_000020"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda directory: flip(directory / "ranks" / "rank_0"), "content of ranks/rank_0 has changed"),
        (lambda directory: (directory / "ranks" / "rank_0").write_bytes(b"we"), "has 2 bytes instead of 10"),
        (lambda directory: (directory / "ranks" / "rank_0").unlink(), "rank_0 is missing"),
        (lambda directory: (directory / "manifest.json").unlink(), r"manifest\.json is missing"),
        (lambda directory: (directory / "manifest.json").write_text("{"), r"manifest\.json or a file cannot be read"),
    ],
)
def test_a_damaged_one_is_passed_over_with_a_warning(tmp_path, damage, words):
    warnings: list[str] = []
    checkpoints = Checkpoints(tmp_path, keep=2, warn=warnings.append)
    write(checkpoints, 20)
    write(checkpoints, 40)
    damage(tmp_path / "step_000040")
    assert checkpoints.latest().name == "step_000020"
    assert len(warnings) == 1
    assert re.search(words, warnings[0])


def test_a_damaged_later_one_never_costs_the_newest_valid_one_its_place(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    write(checkpoints, 60)
    flip(tmp_path / "step_000060" / "ranks" / "rank_0")
    write(checkpoints, 50)
    assert checkpoints.latest().name == "step_000050"


def test_a_step_can_be_written_again(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    write(checkpoints, 20)
    flip(tmp_path / "step_000020" / "ranks" / "rank_0")
    write(checkpoints, 20)
    assert names(tmp_path) == ["step_000020"]
    assert checkpoints.latest().name == "step_000020"


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    write(checkpoints, 20)
    (tmp_path / "step_000020").rename(tmp_path / ".replaced-step_000020")
    assert Checkpoints(tmp_path, keep=1).latest().name == "step_000020"


def test_truncate_after_removes_later_ones(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=5)
    for step in (10, 20, 30):
        write(checkpoints, step)
    checkpoints.truncate_after(10)
    assert names(tmp_path) == ["step_000010"]


def test_controller_state_comes_back_bit_for_bit(tmp_path):
    state = {"step": 3, "phase": "train", "baseline": 0.1 + 0.2, "rng": {"state": 2**120 + 1}, "none": None}
    save_controller_state(tmp_path, state)
    assert load_controller_state(tmp_path) == state


@pytest.mark.parametrize("value", [float("nan"), object()])
def test_controller_state_that_json_cannot_hold_is_refused(tmp_path, value):
    with pytest.raises(CheckpointError, match="cannot be written as JSON"):
        save_controller_state(tmp_path, {"x": value})


def test_controller_state_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"controller_state\.json cannot be read: No such file"):
        load_controller_state(tmp_path)


def test_keeping_none_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"checkpoint\.keep is 0"):
        Checkpoints(tmp_path, keep=0)


def test_written_in_the_background_it_is_the_same_and_fails_the_same(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, keep=2)

    async def story() -> None:
        async with checkpoints.written(1) as directory:
            (directory / "state").write_text("one")
        assert checkpoints.latest() == tmp_path / "step_000001"
        with pytest.raises(CheckpointError, match="checkpoint step_000002 could not be written"):
            async with checkpoints.written(2) as directory:
                raise OSError(28, "No space left on device")
        with pytest.raises(KeyboardInterrupt):
            async with checkpoints.written(2):
                raise KeyboardInterrupt

    asyncio.run(story())
    assert checkpoints.steps() == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]
