"""The state directory: whole directories or none, nothing of a client in a path, and one server at a time."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from service_records import a_checkpoint, a_model, a_sampling_session, a_session, new_id

from weaver_rl.errors import CheckpointError, ConfigError, LearnerLostError, ServiceError
from weaver_rl.service import directories as directories_module
from weaver_rl.service.records import ArtifactFile
from weaver_rl.service.state_files import StateFiles
from weaver_rl.service.store import Store
from weaver_rl.service.weaver_paths import (
    CheckpointPath,
    check_name,
    parse_checkpoint_path,
)

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
CONTENT = {"weights.bin": b"w" * 5000, "config.json": b"{}", "deep/er/tokens.txt": b""}


def fill(directory: Path, content: dict[str, bytes] = CONTENT) -> None:
    for name, data in content.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)


def content_of(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


async def write(files: StateFiles, checkpoint_id: str, content: dict[str, bytes] = CONTENT) -> None:
    async with files.writing(checkpoint_id) as directory:
        fill(directory, content)


def everything_in(state_dir: Path) -> set[str]:
    return {path.name for folder in ("checkpoints", "artifacts") for path in (state_dir / folder).iterdir()}


# -- writing -----------------------------------------------------------------------------------------------------------


def test_a_directory_is_there_when_its_block_has_ended_and_not_before(tmp_path: Path):
    async def scenario() -> None:
        with StateFiles(tmp_path) as files:
            for writing, place in (
                (files.writing, files.checkpoint_dir),
                (files.writing_artifact, files.artifact_dir),
            ):
                id_ = new_id()
                async with writing(id_) as directory:
                    assert directory.is_absolute()
                    assert list(directory.iterdir()) == []
                    fill(directory)
                    assert not place(id_).exists()
                assert not directory.exists()
                assert content_of(place(id_)) == CONTENT
                assert place(id_).is_absolute()
                with pytest.raises(ValueError, match="is there already"):
                    await writing(id_).__aenter__()
                assert content_of(place(id_)) == CONTENT

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("error", "raised", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/secret/path"), CheckpointError, r"No space.*MB free"),
        (LearnerLostError("rank 0 died"), LearnerLostError, "rank 0 died"),
        (ServiceError("a", "b"), ServiceError, "b"),
        (ValueError("odd"), ValueError, "odd"),
        (TimeoutError("slow"), TimeoutError, "slow"),
        (ConnectionError("gone"), ConnectionError, "gone"),
        (KeyboardInterrupt("stop"), KeyboardInterrupt, "stop"),
    ],
)
def test_a_block_that_fails_leaves_nothing_and_harms_nothing(
    tmp_path: Path, error: BaseException, raised: type[BaseException], said: str
):
    async def scenario() -> None:
        with StateFiles(tmp_path) as files:
            before, id_ = new_id(), new_id()
            await write(files, before)

            async def failing() -> None:
                async with files.writing(id_) as directory:
                    fill(directory)
                    raise error

            with pytest.raises(raised, match=said) as caught:
                await failing()
            assert "secret" not in str(caught.value)
            assert everything_in(tmp_path) == {before}
            assert content_of(files.checkpoint_dir(before)) == CONTENT
            await write(files, id_)

    asyncio.run(scenario())


def test_a_block_that_writes_nothing_is_a_failure(tmp_path: Path):
    async def scenario() -> None:
        with StateFiles(tmp_path) as files:
            with pytest.raises(CheckpointError, match="without any file"):
                async with files.writing(new_id()) as directory:
                    (directory / "empty").mkdir()
            assert everything_in(tmp_path) == set()

    asyncio.run(scenario())


@pytest.mark.parametrize("step", ["fsync of a file", "fsync of the folder", "rename"])
def test_a_disk_that_fails_at_the_last_moment_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
):
    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    def fail_for_the_folder(directory: Path) -> None:
        if directory == tmp_path / "checkpoints":
            fail()

    async def scenario() -> None:
        with StateFiles(tmp_path) as files:
            if step == "fsync of a file":
                monkeypatch.setattr(directories_module.os, "fsync", fail)
            elif step == "rename":
                monkeypatch.setattr(Path, "rename", fail)
            else:
                monkeypatch.setattr(directories_module, "fsync_directory", fail_for_the_folder)
            with pytest.raises(CheckpointError, match="Input/output error"):
                await write(files, new_id())
            monkeypatch.undo()
            assert everything_in(tmp_path) == set()

    asyncio.run(scenario())


def test_everything_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    synced: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def watched_fsync(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").resolve().name)
        fsync(descriptor)

    def watched_rename(self: Path, target: Path) -> Path:
        synced.append("RENAMED")
        return rename(self, target)

    async def scenario() -> None:
        with StateFiles(tmp_path) as files:
            monkeypatch.setattr(directories_module.os, "fsync", watched_fsync)
            monkeypatch.setattr(Path, "rename", watched_rename)
            await write(files, new_id())

    asyncio.run(scenario())
    before = set(synced[: synced.index("RENAMED")])
    assert {"weights.bin", "config.json", "tokens.txt", "deep", "er"} <= before
    assert synced[-1] == "checkpoints"


def test_a_cancelled_write_leaves_nothing_whenever_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fsync, mkdir = os.fsync, Path.mkdir

    def slow_fsync(descriptor: int) -> None:
        time.sleep(0.02)
        fsync(descriptor)

    def slow_mkdir(self: Path, *options: Any, **more: Any) -> None:
        time.sleep(0.03 if self.name.startswith(".writing-") else 0.0)
        mkdir(self, *options, **more)

    monkeypatch.setattr(directories_module.os, "fsync", slow_fsync)
    monkeypatch.setattr(Path, "mkdir", slow_mkdir)

    async def scenario() -> None:
        with StateFiles(tmp_path) as files:
            done = 0
            for delay_ms in range(0, 200, 10):
                id_ = new_id()
                writing = asyncio.ensure_future(write(files, id_))
                await asyncio.sleep(delay_ms / 1000)
                writing.cancel()
                await asyncio.gather(writing, return_exceptions=True)
                left = everything_in(tmp_path)
                if writing.cancelled():
                    assert left == set()
                else:
                    done += 1
                    assert content_of(files.checkpoint_dir(id_)) == CONTENT
                    await files.remove_checkpoint(id_)
            assert done < 20

    asyncio.run(scenario())


def test_the_event_loop_goes_on_while_the_disk_is_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(directories_module.os, "fsync", lambda _: time.sleep(0.1))

    async def scenario() -> None:
        with StateFiles(tmp_path) as files:
            writing = asyncio.ensure_future(write(files, new_id()))
            longest, before = 0.0, time.monotonic()
            while not writing.done():
                await asyncio.sleep(0.01)
                now = time.monotonic()
                longest, before = max(longest, now - before), now
            await writing
            assert longest < 0.09

    asyncio.run(scenario())


# -- kills -------------------------------------------------------------------------------------------------------------

VICTIM = """
import asyncio, sys
from pathlib import Path
from service_records import new_id
from test_service_state_files import write
from weaver_rl.service.state_files import StateFiles

async def endless(files):
    while True:
        id_ = new_id()
        await write(files, id_)
        print(id_, flush=True)

async def main():
    with StateFiles(Path(sys.argv[1])) as files:
        await asyncio.gather(*(endless(files) for _ in range(3)))

asyncio.run(main())
"""


def test_sigkill_leaves_whole_directories_and_what_the_next_start_removes(tmp_path: Path):
    victim = subprocess.Popen(
        [sys.executable, "-c", VICTIM, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert victim.stdout is not None
    told = [victim.stdout.readline() for _ in range(40)]
    with pytest.raises(ConfigError, match=rf"in use by process {victim.pid} on"):
        StateFiles(tmp_path)
    victim.send_signal(signal.SIGKILL)
    rest, _ = victim.communicate()
    finished = {line.strip() for line in told + rest.splitlines(keepends=True) if line.endswith("\n")}

    async def scenario() -> None:
        with StateFiles(tmp_path) as files:
            left = everything_in(tmp_path)
            assert finished <= left
            for id_ in left:
                assert content_of(files.checkpoint_dir(id_)) == CONTENT

    asyncio.run(scenario())


def test_what_a_killed_writer_or_remover_left_goes_at_the_next_start(tmp_path: Path):
    with StateFiles(tmp_path):
        pass
    for folder in ("checkpoints", "artifacts"):
        for prefix in (".writing-", ".removing-"):
            fill(tmp_path / folder / f"{prefix}{new_id()}-0123")
    with StateFiles(tmp_path):
        assert everything_in(tmp_path) == set()


def test_a_sweep_removes_what_an_earlier_server_did_not_record_and_nothing_of_this_one(tmp_path: Path):
    async def scenario() -> None:
        kept, forgotten, mine, artifact = (new_id() for _ in range(4))
        with StateFiles(tmp_path) as files:
            await write(files, kept)
            await write(files, forgotten)
            async with files.writing_artifact(artifact) as directory:
                fill(directory)
        (tmp_path / "checkpoints" / "of-a-person").mkdir()
        with StateFiles(tmp_path) as files:
            await write(files, mine)
            assert await files.sweep(checkpoint_ids={kept}, artifact_ids=set()) == 2
            assert everything_in(tmp_path) == {kept, mine, "of-a-person"}
            assert await files.sweep(checkpoint_ids=set(), artifact_ids=set()) == 0
            assert everything_in(tmp_path) == {kept, mine, "of-a-person"}

    asyncio.run(scenario())


def test_files_go_when_no_sampling_session_needs_them(tmp_path: Path):
    """Store and files together, as the service uses them."""

    async def scenario() -> None:
        with StateFiles(tmp_path) as files:
            async with Store.opened(files.database_url) as store:
                session = await store.add_session(a_session())
                model = await store.add_model(a_model(session.id))

                async def export() -> str:
                    checkpoint = a_checkpoint(model.id)
                    await write(files, checkpoint.id)
                    await store.add_checkpoint(checkpoint)
                    return checkpoint.id

                async def sweep() -> None:
                    for checkpoint in await store.claim_unused_checkpoints():
                        await files.remove_checkpoint(checkpoint.id)

                first = await export()
                asked = a_sampling_session(session.id, checkpoint_id=first)
                await store.add_sampling_session(asked)
                second = await export()
                await sweep()
                assert everything_in(tmp_path) == {first, second}
                await store.delete_sampling_session(asked.id)
                await sweep()
                assert everything_in(tmp_path) == {second}
                await write(files, unrecorded := new_id())
        with StateFiles(tmp_path) as files:
            async with Store.opened(files.database_url) as store:
                assert everything_in(tmp_path) == {second, unrecorded}
                keep = await store.checkpoint_ids_with_files()
                await files.sweep(checkpoint_ids=keep, artifact_ids=await store.artifact_ids_with_files())
                assert everything_in(tmp_path) == {second}

    asyncio.run(scenario())


# -- removing ----------------------------------------------------------------------------------------------------------


def test_removing_takes_one_and_may_be_done_again(tmp_path: Path):
    async def scenario() -> None:
        with StateFiles(tmp_path) as files:
            first, second = new_id(), new_id()
            await write(files, first)
            await write(files, second)
            await files.remove_checkpoint(first)
            await files.remove_checkpoint(first)
            await files.remove_artifact(second)
            assert everything_in(tmp_path) == {second}

    asyncio.run(scenario())


def test_what_cannot_be_removed_whole_has_lost_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "Input/output error", "/secret")

    async def scenario() -> None:
        with StateFiles(tmp_path) as files:
            await write(files, id_ := new_id())
            monkeypatch.setattr(shutil, "rmtree", fail)
            with pytest.raises(CheckpointError, match="could not be removed: Input/output error"):
                await files.remove_checkpoint(id_)
            monkeypatch.undo()
            assert not files.checkpoint_dir(id_).exists()
        with StateFiles(tmp_path):
            assert everything_in(tmp_path) == set()

    asyncio.run(scenario())


# -- artifacts ---------------------------------------------------------------------------------------------------------


def test_a_manifest_has_every_file_with_size_and_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    async def scenario() -> None:
        with StateFiles(tmp_path) as files:
            await write(files, id_ := new_id())
            (files.checkpoint_dir(id_) / "link").symlink_to("/etc/passwd")
            assert await files.manifest(files.checkpoint_dir(id_)) == tuple(
                ArtifactFile(name=name, size=len(data), sha256=hashlib.sha256(data).hexdigest())
                for name, data in sorted(CONTENT.items())
            )
            monkeypatch.setattr(hashlib, "file_digest", _fail)
            with pytest.raises(CheckpointError, match="cannot be read back: Input/output error"):
                await files.manifest(files.checkpoint_dir(id_))

    asyncio.run(scenario())


def _fail(*_: Any, **__: Any) -> None:
    raise OSError(errno.EIO, "Input/output error", "/secret/path")


def test_a_file_of_an_artifact_is_found_by_its_name_and_nothing_else_is(tmp_path: Path):
    async def scenario() -> None:
        with StateFiles(tmp_path) as files:
            id_, other = new_id(), new_id()
            for one in (id_, other):
                async with files.writing_artifact(one) as directory:
                    fill(directory)
            directory = files.artifact_dir(id_)
            for name, data in CONTENT.items():
                assert files.artifact_file(id_, name).read_bytes() == data
            (tmp_path / "outside.txt").write_text("secret")
            (directory / "link").symlink_to(tmp_path / "outside.txt")
            (directory / "inner").symlink_to(directory / "config.json")
            (directory / "linked").symlink_to(tmp_path)
            os.mkfifo(directory / "fifo")
            for name in (
                "",
                ".",
                "..",
                "/",
                "missing",
                "deep",
                "deep/er",
                "deep/er/",
                "./config.json",
                "deep//er/tokens.txt",
                "deep/../config.json",
                f"../{other}/config.json",
                "../../outside.txt",
                f"{tmp_path}/outside.txt",
                "link",
                "inner",
                "linked/outside.txt",
                "fifo",
                "config.json\x00",
                "config.json\n",
                "..\\config.json",
                "a" * 5000,
                "\ud800",
            ):
                with pytest.raises(ServiceError) as error:
                    files.artifact_file(id_, name)
                assert (error.value.code, error.value.status) == ("not_found", 404), name
            for strange in ("..", f"{id_}/", "../checkpoints", id_.upper(), "", new_id()):
                with pytest.raises(ServiceError):
                    files.artifact_file(strange, "config.json")

    asyncio.run(scenario())


@pytest.mark.parametrize("strange", ["..", "", "a/b", "../artifacts/x", "0" * 36, "x" * 200, "\x00", ".writing-1"])
def test_only_ids_of_ours_become_paths(tmp_path: Path, strange: str):
    with StateFiles(tmp_path) as files:
        uses: list[Callable[[], Any]] = [
            lambda: files.checkpoint_dir(strange),
            lambda: files.artifact_dir(strange),
            lambda: asyncio.run(files.remove_checkpoint(strange)),
            lambda: asyncio.run(write(files, strange)),
        ]
        for use in uses:
            with pytest.raises(ValueError, match="a UUID in lower case is expected"):
                use()


# -- one server --------------------------------------------------------------------------------------------------------


def test_a_second_server_is_refused_until_the_first_is_gone(tmp_path: Path):
    with StateFiles(tmp_path) as files:
        assert files.logs.is_dir()
        with pytest.raises(ConfigError, match=rf"state_dir {tmp_path} is in use by process {os.getpid()} on"):
            StateFiles(tmp_path)
    with StateFiles(tmp_path):
        pass


def test_a_directory_that_cannot_be_used_is_refused_and_let_go(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"state_dir .*/file cannot be used"):
        StateFiles(tmp_path / "file")
    (tmp_path / "checkpoints").write_text("not a folder")
    errors = []
    for _ in range(2):
        with pytest.raises(ConfigError, match="cannot be used") as error:
            StateFiles(tmp_path)
        errors.append(error)


# -- names on the wire -------------------------------------------------------------------------------------------------

GOOD_NAMES = ["a", "step_000001", "initial", "0.1", "A-b.c_d", "x" * 128, "a..b", "checkpoints"]
BAD_NAMES = [
    "",
    ".",
    "..",
    ".a",
    "-a",
    "_a",
    "a/b",
    "a\\b",
    "a b",
    "a\n",
    "\na",
    "a\x00",
    "ü",
    "x" * 129,
    "../a",
    "a%2f",
]


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_good_names_and_paths(name: str):
    assert check_name(name) == name
    assert parse_checkpoint_path(f"weaver://m-1/checkpoints/{name}") == CheckpointPath(model_id="m-1", name=name)
    assert parse_checkpoint_path(f"weaver://m-1/{name}") == CheckpointPath(model_id="m-1", name=name)


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_names_are_refused_with_what_is_allowed(name: str):
    for parse, text in (
        (check_name, name),
        (parse_checkpoint_path, f"weaver://m/checkpoints/{name}"),
    ):
        with pytest.raises(ServiceError, match="a letter or digit, then") as error:
            parse(text)
        assert (error.value.code, error.value.status) == ("invalid_request", 400)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "m/checkpoints/a",
        "weaver:/m/a",
        "Weaver://m/a",
        "http://m/a",
        "weaver://m",
        "weaver://m/",
        "weaver:///a",
        "weaver://../a",
        "weaver://m_1/a",
        "weaver://m/checkpoints/a/b",
        "weaver://m/artifacts/a/b",
        "weaver://m/checkpoints/a/artifacts/gguf",
        "weaver://m/checkpoints/a ",
        " weaver://m/a",
        "file:///etc/passwd",
        "/etc/passwd",
        "weaver://m/checkpoints/../../../etc/passwd",
    ],
)
def test_anything_else_is_no_path(path: str):
    with pytest.raises(ServiceError, match=r"weaver://<model id>/checkpoints/<name>"):
        parse_checkpoint_path(path)


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.text(max_size=30),
        st.lists(st.sampled_from(["weaver://", "m", "/", "checkpoints", "..", "\x00", "%2e", "a", "\n"])).map("".join),
    )
)
def test_whatever_is_taken_has_no_part_that_could_lead_elsewhere(path: str):
    try:
        found = parse_checkpoint_path(path)
    except ServiceError:
        return
    for part in (found.model_id, found.name):
        assert part.isascii()
        assert "/" not in part
        assert part[0].isalnum()
        assert (Path("/base") / part).resolve().parent == Path("/base")
