"""Runs whose folder is at a URL: what goes up and in which order, who may write, and how a run goes on elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from strict_store import StrictStore

from weaver_rl import remote_run, run_mirror
from weaver_rl.checkpoints import Checkpoints, find_damage
from weaver_rl.errors import ConfigError, FilesError
from weaver_rl.journal import Journal, read_events
from weaver_rl.lease import STALE_AFTER_S, Lease, LeaseRecord, read_lease, this_machine
from weaver_rl.remote_folder import RemoteFolder
from weaver_rl.remote_run import mirrored, run_to_read
from weaver_rl.run_folder import RunFolder
from weaver_rl.run_location import staging_folder
from weaver_rl.run_mirror import RunMirror

pytestmark = [pytest.mark.unit, pytest.mark.timeout(30)]
URL = "strict://bucket/runs/x"


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    StrictStore.empty()
    monkeypatch.setattr(
        Lease.__init__, "__kwdefaults__", Lease.__init__.__kwdefaults__ | {"settle_s": 0.0, "watch_s": 0.0}
    )
    move_to("first", tmp_path, monkeypatch)
    yield
    StrictStore.empty()


def move_to(machine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / machine))


def stored() -> set[str]:
    return {name.removeprefix("bucket/runs/x/") for name in StrictStore.files}


def log() -> list[str]:
    return [line.replace("bucket/runs/x/", "") for line in StrictStore.log if "lease" not in line]


class Run:
    """Writes a run folder as a run does."""

    def __init__(self, folder: RunFolder, keep: int = 2) -> None:
        self.folder = folder
        for directory in (folder.rollouts, folder.checkpoints, folder.tensorboard):
            directory.mkdir(parents=True, exist_ok=True)
        self.checkpoints = Checkpoints(folder.checkpoints, keep)
        (folder.path / "run.json").write_text("{}")

    def step(self, step: int) -> None:
        with self.folder.metrics_file.open("a") as file:
            file.write(f"{step}\n")
        (self.folder.rollouts / f"step_{step:06d}.parquet").write_text(str(step))

    def checkpoint(self, step: int, content: str = "") -> None:
        with Journal(self.folder.journal) as journal:
            journal.committed(step=step)
        with self.checkpoints.writing(step) as directory:
            (directory / "optimizer").mkdir()
            (directory / "optimizer" / "a").write_text(content or f"state {step}")
            (directory / "optimizer" / ".metadata").write_text("as torch calls it")
            (directory / "weights").write_text(str(step))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(RunFolder(tmp_path / "first" / "run"))


@pytest.fixture
def mirror(run: Run) -> RunMirror:
    remote = RemoteFolder(URL)
    lease = Lease(remote, "s")
    return RunMirror(run.folder, remote, lease, keep=2)


# -- what goes up ------------------------------------------------------------------------------------------------------


def test_everything_that_a_resume_reads_is_there_before_the_manifest(run: Run, mirror: RunMirror):
    run.step(1)
    run.checkpoint(1)
    (run.folder.path / ".hidden").touch()
    mirror.upload()
    lines = log()
    manifest = lines.index("put checkpoints/step_000001/manifest.json")
    before = {line.removeprefix("put ") for line in lines[:manifest]}
    assert before >= {
        "metrics.jsonl",
        "rollouts/step_000001.parquet",
        "checkpoints/step_000001/optimizer/a",
        "checkpoints/step_000001/weights",
        "journal.sqlite",
    }
    journal = lines.index("put journal.sqlite")
    assert lines.index("put checkpoints/step_000001/weights") < journal < manifest
    assert ".hidden" not in stored()
    assert not (run.folder.path / ".mirror" / "checkpoints").exists()


def test_the_journal_goes_up_while_it_is_being_written(run: Run, mirror: RunMirror, tmp_path: Path):
    with Journal(run.folder.journal) as journal:
        journal.committed(step=1)
        while not list(read_events(run.folder.journal)):
            time.sleep(0.01)
        assert run.folder.journal.with_name("journal.sqlite-wal").stat().st_size
        mirror.upload()
    (tmp_path / "copy").write_bytes(StrictStore.files["bucket/runs/x/journal.sqlite"])
    assert [event.step for event in read_events(tmp_path / "copy")] == [1]
    assert not [name for name in stored() if name.startswith("journal.sqlite-")]


def test_what_has_not_changed_stays(run: Run, mirror: RunMirror):
    run.step(1)
    run.checkpoint(1)
    mirror.upload()
    before = len(log())
    mirror.upload()
    assert log()[before:] == []
    run.step(2)
    mirror.upload()
    assert sorted(log()[before:]) == ["put metrics.jsonl", "put rollouts/step_000002.parquet"]


def test_a_large_file_that_grows_waits(run: Run, mirror: RunMirror, monkeypatch: pytest.MonkeyPatch):
    run.step(1)
    mirror.upload()
    monkeypatch.setattr(run_mirror, "BYTES_PER_S", 1e-3)
    before = len(log())
    run.step(2)
    mirror.upload()
    assert log()[before:] == ["put rollouts/step_000002.parquet"]
    mirror.upload(is_last=True)
    assert log()[before + 1 :] == ["put metrics.jsonl"]


def test_spans_of_many_actors_wait_for_as_long_as_all_of_them_take(
    run: Run, mirror: RunMirror, monkeypatch: pytest.MonkeyPatch
):
    run.folder.spans.mkdir()
    files = [run.folder.spans / f"sampler-{number}.jsonl" for number in range(100)]

    def grow() -> int:
        for path in files:
            with path.open("a") as file:
                file.write("x" * 1000)
        before = len(log())
        mirror.upload()
        return sum("put spans/" in line for line in log()[before:])

    seconds = 1000.0
    monkeypatch.setattr(run_mirror, "time", SimpleNamespace(monotonic=lambda: seconds))
    monkeypatch.setattr(run_mirror, "BYTES_PER_S", 1000.0)
    assert grow() == 100
    seconds += 100  # for one of them it is time
    assert grow() == 0
    run.checkpoint(1)
    assert grow() == 0
    seconds += 500
    assert grow() == 100
    grow()
    mirror.upload(is_last=True)
    assert StrictStore.files["bucket/runs/x/spans/sampler-7.jsonl"] == files[7].read_bytes()


def test_old_checkpoints_go_after_the_new_one_is_there(run: Run, mirror: RunMirror):
    for step in (1, 2, 3):
        run.checkpoint(step)
        mirror.upload()
    assert {name.split("/")[1] for name in stored() if "checkpoints" in name} == {"step_000002", "step_000003"}
    lines = log()
    assert lines.index("put checkpoints/step_000003/manifest.json") < lines.index(
        "rm checkpoints/step_000001/manifest.json"
    )
    assert lines.index("rm checkpoints/step_000001/manifest.json") < lines.index("rm checkpoints/step_000001/weights")


def test_a_checkpoint_that_is_pruned_while_it_goes_up_gets_there_all_the_same(run: Run, mirror: RunMirror):
    run.checkpoint(1)

    def prune(line: str) -> None:
        if "optimizer/a" in line:
            StrictStore.before = None
            run.checkpoint(2)
            run.checkpoint(3)
            assert not (run.folder.checkpoints / "step_000001").exists()

    StrictStore.before = prune
    mirror.upload()
    assert "checkpoints/step_000001/weights" in stored()


def test_a_run_that_goes_back_takes_its_later_checkpoint_away_before_the_journal_says_so(run: Run, mirror: RunMirror):
    for step in (1, 2):
        run.step(step)
        run.checkpoint(step)
        mirror.upload()
    before = len(log())
    run.checkpoints.truncate_after(1)
    (run.folder.rollouts / "step_000002.parquet").unlink()
    with Journal(run.folder.journal) as journal:
        journal.rewound(step=1, reason="", finished=(), in_flight=())
    mirror.upload(is_last=True)
    lines = log()[before:]
    assert lines.index("rm checkpoints/step_000002/manifest.json") < lines.index("put journal.sqlite")
    assert not [name for name in stored() if "000002" in name]
    run.checkpoint(2, "another")
    mirror.upload()
    assert StrictStore.files["bucket/runs/x/checkpoints/step_000002/optimizer/a"] == b"another"


# -- failures ----------------------------------------------------------------------------------------------------------


def test_a_store_that_is_out_of_reach_is_said_once_and_tried_again(
    run: Run, mirror: RunMirror, monkeypatch: pytest.MonkeyPatch
):
    said: list[str] = []
    monkeypatch.setattr(run_mirror, "MAX_PAUSE_S", 0.01)
    mirror.tell, mirror._every_s = said.append, 0.01
    num_failures = 0

    def fail(line: str) -> None:
        nonlocal num_failures
        num_failures += 1
        if num_failures > 3:
            StrictStore.before = None
        raise ConnectionError("no route to the store")

    StrictStore.before = fail
    run.step(1)
    run.checkpoint(1)
    mirror.start()
    while len(said) < 2:
        time.sleep(0.01)
    mirror.close(10.0)
    assert "no route to the store" in said[0]
    assert "the run goes on" in said[0]
    assert said[1:] == [f"uploads to {URL} go on"]
    assert "checkpoints/step_000001/manifest.json" in stored()


def test_an_upload_that_fails_in_the_middle_leaves_no_checkpoint(run: Run, mirror: RunMirror, tmp_path: Path):
    run.checkpoint(1)
    mirror.upload()
    run.checkpoint(2)

    def fail(line: str) -> None:
        if "step_000002/weights" in line:
            raise ConnectionError("cut")

    StrictStore.before = fail
    with pytest.raises(FilesError, match="cannot take checkpoints/step_000002/weights: ConnectionError: cut"):
        mirror.upload()
    remote = RemoteFolder(URL)
    assert run_mirror.download_checkpoint(remote, tmp_path / "other", remote.sizes(), print) == 1
    assert find_damage(tmp_path / "other" / "checkpoints" / "step_000001") is None


def test_a_folder_that_vanishes_takes_nothing_with_it(run: Run, mirror: RunMirror):
    run.step(1)
    mirror.upload()
    before = stored()
    shutil.rmtree(run.folder.path)
    with pytest.raises(FilesError, match="is gone or holds no run any more"):
        mirror.upload()
    assert stored() == before


def test_a_damaged_checkpoint_is_passed_over(run: Run, mirror: RunMirror, tmp_path: Path):
    for step in (1, 2):
        run.checkpoint(step)
        mirror.upload()
    StrictStore.files["bucket/runs/x/checkpoints/step_000002/weights"] = b"3"
    said: list[str] = []
    remote = RemoteFolder(URL)
    assert run_mirror.download_checkpoint(remote, tmp_path / "other", remote.sizes(), said.append) == 1
    assert "the content of weights has changed" in said[0]


# -- who may write -----------------------------------------------------------------------------------------------------


def record(**changes: object) -> None:
    content = LeaseRecord(holder="h", staging="s", host="node-7", machine="another", pid=4711, renewed_at=time.time())
    changed = replace(content, **changes)  # type: ignore[arg-type]
    RemoteFolder(URL).write("lease.json", json.dumps({n: getattr(changed, n) for n in changed.__slots__}).encode())


def test_two_runs_at_one_url_are_refused():
    with mirrored(URL, RunFolder(staging_folder(URL)), resume=False, overwrite=False, keep=2, tell=print):
        lease = Lease(RemoteFolder(URL), "another")
        with pytest.raises(ConfigError, match=rf"in use by a live run \(process \d+ on {socket.gethostname()}"):
            lease.take(lease.find())


@pytest.mark.parametrize(
    ("changes", "is_held"),
    [
        ({}, True),
        ({"renewed_at": 0.0}, False),
        ({"is_released": True}, False),
        ({"renewed_at": time.time() + 3600}, False),
        ({"machine": this_machine(), "pid": 2**22 + 1}, False),
        ({"machine": this_machine(), "pid": os.getpid(), "renewed_at": time.time() + 3600}, True),
        ({"machine": this_machine(), "pid": os.getpid(), "renewed_at": 0.0}, True),
    ],
    ids=[
        "another machine",
        "silent",
        "released",
        "silent, of the future",
        "killed here",
        "lives here, of the future",
        "lives here, silent",
    ],
)
def test_a_lease_is_held_by_who_may_live(changes: dict[str, object], is_held: bool):
    record(**changes)
    lease = Lease(RemoteFolder(URL), "mine")
    if is_held:
        said = rf"\d+ on node-7, (which said so \d+ s ago|whose record is 3\d+ s ahead).*ends {STALE_AFTER_S:.0f} s"
        with pytest.raises(ConfigError, match=said):
            lease.take(lease.find())
    else:
        lease.take(lease.find())
        lease.release()
        after = read_lease(RemoteFolder(URL))
        assert after is not None
        assert after.is_released


def test_who_lost_the_lease_stops_uploading_and_says_so(run: Run):
    remote = RemoteFolder(URL)
    lease = Lease(remote, "mine", renew_every_s=0.01)
    lease.take(lease.find())
    said: list[str] = []
    mirror = RunMirror(run.folder, remote, lease, keep=2, tell=said.append, every_s=0.01)
    record()
    while lease.lost is None:
        time.sleep(0.01)
    before = len(log())
    mirror.start()
    run.step(1)
    with pytest.raises(FilesError, match=rf"node-7 has taken over.*Everything is in {run.folder.path}"):
        mirror.close(5.0)
    lease.release()
    after = read_lease(remote)
    assert after is not None
    assert after.host == "node-7"
    assert log()[before:] == []


# -- whole lives -------------------------------------------------------------------------------------------------------


def began(folder: RunFolder) -> Run:
    run = Run(folder)
    for step in (1, 2, 3):
        run.step(step)
        if step < 3:
            run.checkpoint(step)
    return run


def test_a_run_leaves_everything_at_the_url_and_nothing_here():
    folder = RunFolder(staging_folder(URL))
    with mirrored(URL, folder, resume=False, overwrite=False, keep=2, tell=print):
        began(folder)
        (folder.path / "policy").mkdir()
        (folder.path / "policy" / "config.json").write_text("{}")
    assert stored() >= {"run.json", "metrics.jsonl", "policy/config.json", "checkpoints/step_000002/manifest.json"}
    assert not folder.path.exists()


def test_a_killed_run_goes_on_on_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = RunFolder(staging_folder(URL))
    remote = RemoteFolder(URL)
    run = began(folder)
    RunMirror(folder, remote, Lease(remote, "s"), keep=2).upload()
    del run
    move_to("second", tmp_path, monkeypatch)
    second = RunFolder(staging_folder(URL))
    assert second != folder
    with mirrored(URL, second, resume=True, overwrite=False, keep=2, tell=print):
        assert second.metrics_file.read_text() == "1\n2\n3\n"
        assert [event.step for event in read_events(second.journal)] == [1, 2]
        assert [path.name for path in second.checkpoints.iterdir()] == ["step_000002"]
        assert not second.rollouts.exists()
        assert "rollouts/step_000002.parquet" in stored()
        assert "rollouts/step_000003.parquet" not in stored()
        again = Run(second)
        again.step(3)
        again.checkpoint(3)
    assert {name.split("/")[1] for name in stored() if "checkpoints" in name} == {"step_000002", "step_000003"}
    assert "rollouts/step_000001.parquet" in stored()


def test_a_folder_whose_upload_failed_is_kept_and_goes_on_from_itself(monkeypatch: pytest.MonkeyPatch):
    folder = RunFolder(staging_folder(URL))
    monkeypatch.setattr(remote_run, "LAST_UPLOAD_S", 0.9)

    def fail(line: str) -> None:
        if "rollouts" in line:
            raise PermissionError("not yours")

    def run_against_the_wall() -> None:
        with mirrored(URL, folder, resume=False, overwrite=False, keep=2, tell=print):
            StrictStore.before = fail
            began(folder)

    with pytest.raises(FilesError, match=rf"not yours.*Everything is in {folder.path}"):
        run_against_the_wall()
    StrictStore.before = None
    said: list[str] = []
    held = read_lease(RemoteFolder(URL))
    assert held is not None
    record(staging=held.staging, renewed_at=0.0)
    with mirrored(URL, folder, resume=True, overwrite=False, keep=2, tell=said.append):
        assert folder.metrics_file.read_text() == "1\n2\n3\n"
    assert "was held by process 4711 on node-7" in said[0]
    assert "what was not uploaded" in said[1]
    assert "rollouts/step_000003.parquet" in stored()


def test_a_failed_run_is_uploaded_and_its_own_error_is_the_one_that_counts(monkeypatch: pytest.MonkeyPatch):
    folder = RunFolder(staging_folder(URL))

    def fail(resume: bool, tell: Callable[[str], None], before: Callable[[], object]) -> None:
        with mirrored(URL, folder, resume=resume, overwrite=False, keep=2, tell=tell):
            before()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail(False, print, lambda: began(folder))
    assert "metrics.jsonl" in stored()
    monkeypatch.setattr(remote_run, "LAST_UPLOAD_S", 0.9)
    said: list[str] = []

    def cut_off() -> None:
        folder.metrics_file.write_text("4\n")
        StrictStore.before = lambda line: 1 / 0

    with pytest.raises(ZeroDivisionError):
        fail(True, said.append, cut_off)
    assert "could not be brought" in said[-1]
    assert folder.metrics_file.read_text() == "4\n"


def test_a_run_at_the_url_is_not_written_over_by_accident():
    folder = RunFolder(staging_folder(URL))
    with mirrored(URL, folder, resume=False, overwrite=False, keep=2, tell=print):
        began(folder)
    RemoteFolder(URL).write("notes.txt", b"mine")
    with (
        pytest.raises(ConfigError, match="already holds a run"),
        mirrored(URL, folder, resume=False, overwrite=False, keep=2, tell=print),
    ):
        pass
    assert not folder.path.exists()
    with mirrored(URL, folder, resume=False, overwrite=True, keep=2, tell=print):
        assert stored() == {"lease.json", "notes.txt"}
        (folder.path / "run.json").write_text("{}")
    shutil.rmtree(folder.path, ignore_errors=True)
    StrictStore.files.clear()
    with (
        pytest.raises(ConfigError, match="nothing to resume: strict://bucket/runs/x holds no run"),
        mirrored(URL, folder, resume=True, overwrite=False, keep=2, tell=print),
    ):
        pass


def test_an_unknown_scheme_and_a_missing_package_are_explained(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match=r"foo://x cannot be used.*Protocol not known"):
        RemoteFolder("foo://x")
    with pytest.raises(ConfigError, match="pip install gcsfs"):
        RemoteFolder("gs://bucket/x")


# -- readers -----------------------------------------------------------------------------------------------------------


def test_a_run_is_read_from_its_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = RunFolder(staging_folder(URL))
    with mirrored(URL, folder, resume=False, overwrite=False, keep=2, tell=print) as mirror:
        began(folder)
        assert mirror is not None
        mirror.upload()
        move_to("second", tmp_path, monkeypatch)
        with run_to_read(URL) as copy:
            assert copy != folder.path
            assert RunFolder(copy).is_claimed()
            assert (copy / "rollouts" / "step_000001.parquet").read_text() == "1"
            assert not (copy / "checkpoints").exists()
            sqlite3.connect(copy / "journal.sqlite").close()
    with run_to_read(URL, small=True) as copy:
        assert not RunFolder(copy).is_claimed()
        assert not (copy / "rollouts").exists()
    assert not copy.exists()
    with run_to_read(URL, checkpoints=True) as copy:
        assert find_damage(copy / "checkpoints" / "step_000002") is None
    with run_to_read(str(tmp_path)) as same:
        assert same == tmp_path
