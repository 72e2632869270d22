"""Runs whose folder is at a URL, when something goes wrong: nothing is lost, and nothing is said that is not so."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from strict_store import StrictStore
from test_remote_run import URL, Run, began, log, move_to, record, stored

from actors.signals import StopSignals
from weaver_rl import lease as lease_module
from weaver_rl import remote_run, run_mirror
from weaver_rl.config import load_config
from weaver_rl.errors import ConfigError, FilesError
from weaver_rl.lease import Lease, LeaseRecord, read_lease, this_machine
from weaver_rl.remote_folder import RemoteFolder
from weaver_rl.remote_run import mirrored
from weaver_rl.run_folder import RunFolder
from weaver_rl.run_location import staging_folder
from weaver_rl.run_mirror import RunMirror

pytestmark = [pytest.mark.unit, pytest.mark.timeout(30)]


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    StrictStore.empty()
    monkeypatch.setattr(
        Lease.__init__, "__kwdefaults__", Lease.__init__.__kwdefaults__ | {"settle_s": 0.0, "watch_s": 0.0}
    )
    move_to("first", tmp_path, monkeypatch)
    yield
    StrictStore.empty()


def here() -> RunFolder:
    return RunFolder(staging_folder(URL))


def held(*, resume: bool = False, **changes: Any) -> AbstractContextManager[RunMirror | None]:
    arguments: dict[str, Any] = {"overwrite": False, "keep": 2, "tell": print} | changes
    return mirrored(URL, here(), resume=resume, **arguments)


def left_behind() -> None:
    """A run of this machine that was killed before the last line of its metrics was uploaded."""
    with held() as mirror:
        assert mirror is not None
        began(here())
        mirror.upload()
        with here().metrics_file.open("a") as file:
            file.write("not uploaded\n")
        shutil.copytree(here().path, here().path.with_name("killed"))
        there = dict(StrictStore.files)
    here().path.with_name("killed").rename(here().path)
    StrictStore.files.clear()
    StrictStore.files.update(there)
    record(staging=(here().path / ".staging_id").read_text(), renewed_at=0.0)


def cut_off(*_: object) -> None:
    raise FilesError("cut off")


def test_a_download_that_was_cut_off_is_not_taken_for_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with held():
        began(here())
    with monkeypatch.context() as patch:
        patch.setattr(remote_run, "download_checkpoint", cut_off)
        with pytest.raises(FilesError, match="cut off"), held(resume=True):
            pass
    with held(resume=True):
        assert [path.name for path in here().checkpoints.iterdir()] == ["step_000002"]


def test_a_resume_elsewhere_that_did_not_begin_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    left_behind()
    move_to("second", tmp_path, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(remote_run, "download_checkpoint", cut_off)
        with pytest.raises(FilesError, match="cut off"), held(resume=True):
            pass
    move_to("first", tmp_path, monkeypatch)
    with held(resume=True):
        assert "not uploaded" in here().metrics_file.read_text()


def test_a_run_that_never_reached_the_url_is_not_cleared_away():
    began(here())
    with pytest.raises(ConfigError, match=r"holds a run that was not uploaded.*--resume.*--overwrite"), held():
        pass
    assert here().metrics_file.exists()
    with held(overwrite=True):
        assert not here().metrics_file.exists()


def test_a_resume_that_is_refused_removes_nothing_at_the_url():
    with held():
        began(here())
    before = stored()

    def refuse() -> None:
        assert here().status_file.exists()
        raise ConfigError("another seed")

    with pytest.raises(ConfigError, match="another seed"), held(resume=True, check=refuse):
        pass
    assert stored() == before
    assert not here().path.exists()


def test_checkpoints_that_are_to_be_kept_stay_on_a_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with held() as mirror:
        assert mirror is not None
        run = Run(here())
        for step in (1, 2):
            run.checkpoint(step)
            mirror.upload()
    move_to("second", tmp_path, monkeypatch)
    with held(resume=True) as mirror:
        assert mirror is not None
        mirror.upload()
        assert {name.split("/")[1] for name in stored() if "checkpoints" in name} == {"step_000001", "step_000002"}


def test_what_a_resume_here_takes_back_goes_at_the_url_too():
    left_behind()
    RemoteFolder(URL).write("rollouts/step_000000.parquet", b"of another machine")
    with held(resume=True):
        (here().rollouts / "step_000003.parquet").unlink()
    assert "rollouts/step_000003.parquet" not in stored()
    assert stored() >= {"rollouts/step_000002.parquet", "rollouts/step_000000.parquet"}


def test_who_lost_the_lease_removes_and_writes_nothing_more(tmp_path: Path):
    remote = RemoteFolder(URL)
    run = Run(RunFolder(tmp_path / "run"))
    lease = Lease(remote, "mine", renew_every_s=100.0)
    lease.take(lease.find())
    mirror = RunMirror(run.folder, remote, lease, keep=2)
    run.step(1)
    run.checkpoint(1)
    mirror.upload()
    remote.write("checkpoints/step_000002/manifest.json", b"{}")
    record()
    before = len(log())
    with pytest.raises(FilesError, match="node-7 has taken over"):
        mirror.upload()
    assert log()[before:] == []
    mirror.start()
    with pytest.raises(FilesError, match=r"node-7 has taken over.*move it elsewhere") as caught:
        mirror.close(5.0)
    assert "goes on from it" not in str(caught.value)


LONG_AGO, IN_AN_HOUR = 5.0, time.time() + 3600


def taken_over_at(moment: str, then: Callable[[], object] = lambda: None) -> None:
    """Another machine takes the run over while the line of the store's log that has `moment` in it is being done."""

    def take_over(line: str) -> None:
        if moment in line.replace("bucket/runs/x/", ""):
            StrictStore.before = None
            record()
            then()

    StrictStore.before = take_over


def lines_after(moment: str) -> list[str]:
    """What was done at the store after the first line that has `moment` in it."""
    lines = log()
    return lines[next(number for number, line in enumerate(lines) if moment in line) + 1 :]


def made_for(lease: Lease, folder: Path) -> RunMirror:
    """Of a run with something of every kind; it has the lease."""
    run = Run(RunFolder(folder))
    run.step(1)
    run.checkpoint(1)
    run.folder.spans.mkdir()
    for name in ("a", "b"):
        (run.folder.spans / name).write_text("x")
    lease.take(lease.find())
    return RunMirror(run.folder, RemoteFolder(URL), lease, keep=2)


KINDS = ["put metrics.jsonl", "put spans/a", "put checkpoints/step_000001/optimizer/a", "put journal.sqlite"]


@pytest.mark.parametrize("moment", KINDS)
def test_a_renewal_that_finds_another_holder_ends_the_pass(tmp_path: Path, moment: str):
    lease = Lease(RemoteFolder(URL), "mine", renew_every_s=0.01)
    mirror = made_for(lease, tmp_path / "run")

    def wait() -> None:
        while lease.lost is None:
            record()  # again: a renewal that was under way has perhaps been written over it
            time.sleep(0.02)

    taken_over_at(moment, wait)
    with pytest.raises(FilesError, match="node-7 has taken over"):
        mirror.upload()
    assert lines_after(moment) == []


@pytest.mark.parametrize("moment", KINDS)
def test_who_has_not_renewed_for_long_asks_before_it_writes(tmp_path: Path, moment: str):
    seconds = [1000.0]
    lease = Lease(RemoteFolder(URL), "mine", renew_every_s=1000.0, clock=lambda: seconds[0])
    mirror = made_for(lease, tmp_path / "run")
    taken_over_at(moment, lambda: seconds.append(seconds.pop() + 30))
    with pytest.raises(FilesError, match="node-7 has taken over"):
        mirror.upload()
    assert lines_after(moment) == []


def test_journal_and_manifest_do_not_follow_what_was_written_without_knowing_better(tmp_path: Path):
    lease = Lease(RemoteFolder(URL), "mine", renew_every_s=1000.0)
    mirror = made_for(lease, tmp_path / "run")
    taken_over_at("put metrics.jsonl")
    with pytest.raises(FilesError, match="node-7 has taken over"):
        mirror.upload()
    assert not stored() & {"journal.sqlite", "checkpoints/step_000001/manifest.json"}
    lease = Lease(RemoteFolder(URL), "mine", renew_every_s=1000.0)
    record(is_released=True)
    mirror = made_for(lease, tmp_path / "another")
    taken_over_at("put journal.sqlite")
    with pytest.raises(FilesError, match="node-7 has taken over"):
        mirror.upload()
    assert lines_after("put journal.sqlite") == []


def test_the_last_pass_brings_no_older_checkpoint_over_a_successors(tmp_path: Path):
    lease = Lease(RemoteFolder(URL), "mine", renew_every_s=1000.0)
    mirror = made_for(lease, tmp_path / "run")
    Run(RunFolder(tmp_path / "run")).checkpoint(2)
    taken_over_at("put checkpoints/step_000001/weights")
    with pytest.raises(FilesError, match="node-7 has taken over"):
        mirror.upload(is_last=True)
    assert "checkpoints/step_000001/manifest.json" not in stored()


def test_a_run_that_is_taken_over_in_its_last_pass_ends_with_what_to_do():
    def run() -> None:
        with held():
            began(here())
            taken_over_at("put metrics.jsonl")

    with pytest.raises(FilesError, match=r"node-7 has taken over.*Everything is in .*move it elsewhere"):
        run()
    assert here().metrics_file.exists()
    after = read_lease(RemoteFolder(URL))
    assert after is not None
    assert after.host == "node-7"


@pytest.mark.parametrize("wish", ["resume", "overwrite"])
def test_who_is_taken_over_before_it_began_changes_nothing(monkeypatch: pytest.MonkeyPatch, wish: str):
    with held():
        began(here())
    seconds = [time.time()]
    monkeypatch.setattr(
        Lease.__init__,
        "__kwdefaults__",
        Lease.__init__.__kwdefaults__ | {"clock": lambda: seconds[0], "renew_every_s": 1000.0},
    )
    before = stored()

    def paused(*_: object) -> int:
        record()
        seconds[0] += 120
        return 1

    if wish == "resume":
        monkeypatch.setattr(remote_run, "download_checkpoint", paused)
    else:
        monkeypatch.setattr(remote_run, "_clear", paused)
    with pytest.raises(FilesError, match="node-7 has taken over"), held(**{wish: True}):
        pass
    assert stored() == before
    after = read_lease(RemoteFolder(URL))
    assert after is not None
    assert after.host == "node-7"


@pytest.mark.parametrize("write", [Lease.begin, Lease.release])
def test_the_record_of_a_successor_stays(write: Callable[[Lease], None]):
    lease = Lease(RemoteFolder(URL), "mine", renew_every_s=1000.0)
    lease.take(lease.find())
    record()
    with pytest.raises(FilesError, match="node-7 has taken over"):
        write(lease)
    after = read_lease(RemoteFolder(URL))
    assert after is not None
    assert (after.host, after.is_released) == ("node-7", False)


def test_who_takes_over_is_told_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    left_behind()
    said: list[str] = []
    with held(resume=True, tell=said.append):
        assert not [note for note in said if "last complete upload" in note]  # here is all of it
        began(here())
    record(renewed_at=time.time() - 1000, complete_at=time.time() - 1300)
    move_to("second", tmp_path, monkeypatch)
    with held(resume=True, tell=said.append):
        pass
    (told,) = [note for note in said if "last complete upload" in note]
    assert "was 1300 s ago" in told
    assert "the newest checkpoint there is of step 2" in told
    assert "node-7" in told
    said.clear()
    move_to("third", tmp_path, monkeypatch)
    with held(resume=True, tell=said.append):  # it was released: nothing is missing
        pass
    assert not [note for note in said if "last complete upload" in note]


def test_only_a_pass_that_came_to_its_end_counts_as_complete(tmp_path: Path):
    seconds = [1000.0]
    lease = Lease(RemoteFolder(URL), "mine", renew_every_s=1000.0, clock=lambda: seconds[0])
    mirror = made_for(lease, tmp_path / "run")
    mirror.upload()
    seconds[0] = 1007.0
    StrictStore.before = cut_off
    (tmp_path / "run" / "notes").touch()
    with pytest.raises(FilesError, match="cut off"):
        mirror.upload()
    StrictStore.before = None
    lease.release()
    after = read_lease(RemoteFolder(URL))
    assert after is not None
    assert (after.complete_at, after.renewed_at) == (1000.0, 1007.0)


@pytest.mark.parametrize("renewed_at", [LONG_AGO, IN_AN_HOUR], ids=["behind", "ahead"])
def test_a_holder_whose_clock_is_wrong_is_seen_to_live(monkeypatch: pytest.MonkeyPatch, renewed_at: float):
    record(renewed_at=renewed_at)
    remote = RemoteFolder(URL)
    lease = Lease(remote, "mine", watch_s=0.01)
    monkeypatch.setattr(lease_module.time, "sleep", lambda seconds: seconds and record(renewed_at=renewed_at + 10))
    with pytest.raises(ConfigError, match="in use by a live run"):
        lease.take(lease.find())


def test_the_folder_is_gone_before_somebody_else_may_make_it():
    def look(line: str) -> None:
        if "lease" in line and is_ending:
            is_there.append(here().path.exists())

    is_ending, is_there = [], []
    StrictStore.before = look
    with held():
        began(here())
        is_ending.append(True)
    assert is_there[-1:] == [False]


def test_a_signal_does_not_cut_off_the_last_upload(capsys: pytest.CaptureFixture[str]):
    def ask(line: str) -> None:
        if "rollouts/step_000003" in line:
            signal.raise_signal(signal.SIGTERM)

    with StopSignals() as stop, held(in_peace=stop.deferred):
        began(here())
        StrictStore.before = ask
    assert "run.json" in stored()
    assert not here().path.exists()


def test_what_else_lies_at_the_url_stays_and_is_no_checkpoint():
    own = {"checkpoints/best/weights", "checkpoints/step_000002_of_friday/manifest.json", "checkpoints/zzz/notes"}
    with held() as mirror:
        assert mirror is not None
        run = Run(here())
        for name in own:
            RemoteFolder(URL).write(name, b"mine")
        for step in (999_999, 1_000_000, 1_000_001):
            run.checkpoint(step)
            mirror.upload()
    names = {name.split("/")[1] for name in stored() - own if "checkpoints" in name}
    assert names == {"step_1000000", "step_1000001"}
    assert stored() >= own
    StrictStore.files |= {"bucket/runs/x/": b"", "bucket/runs/x/checkpoints/": b""}  # as consoles keep folders
    with held(resume=True):
        assert [path.name for path in here().checkpoints.iterdir()] == ["step_1000001"]


def test_kept_checkpoints_that_were_soon_followed_by_another_go_up_in_the_end():
    with held():
        run = Run(here())
        for step in (1, 2, 3):
            run.checkpoint(step)
    remote = RemoteFolder(URL)
    assert {name.split("/")[1] for name in stored() if "checkpoints" in name} == {"step_000002", "step_000003"}
    remote.remove(["checkpoints/step_000003/manifest.json"])
    assert run_mirror.download_checkpoint(remote, here().path, remote.sizes(), print) == 2


def test_folders_that_vanish_while_they_are_looked_at_are_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = Run(RunFolder(tmp_path / "run"))
    run.step(1)
    for name in ("a", "b"):
        (run.folder.logs / name / "inner").mkdir(parents=True)
        (run.folder.logs / name / "inner" / "x").touch()
    is_file = Path.is_file

    def remove(path: Path) -> bool:
        if path.name == "x":
            for other in set("ab") - {path.parent.parent.name}:
                shutil.rmtree(run.folder.logs / other, ignore_errors=True)
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", remove)
    RunMirror(run.folder, RemoteFolder(URL), Lease(RemoteFolder(URL), "s"), keep=2).upload()
    assert "metrics.jsonl" in stored()


def test_only_a_checkpoint_keeps_its_manifest_for_the_end():
    with held():
        began(here())
        (here().tracking / "service").mkdir(parents=True)
        (here().tracking / "service" / "manifest.json").touch()
    assert "tracking/service/manifest.json" in stored()


def test_a_refused_overwrite_removes_nothing_at_the_url():
    with held():
        began(here())
    before = stored()
    here().path.mkdir()
    with here().held(), pytest.raises(ConfigError, match="in use by a live run"), held(overwrite=True):
        pass
    assert stored() == before


def at_url() -> LeaseRecord:
    found = read_lease(RemoteFolder(URL))
    assert found is not None
    return found


@pytest.mark.parametrize(
    "machine_of_record", [this_machine(), "another"], ids=["its process lives", "it has its folder"]
)
@pytest.mark.parametrize("wish", ["resume", "overwrite"])
def test_a_run_that_was_silent_for_long_is_left_alone_on_its_machine(machine_of_record: str, wish: str):
    with held() as mirror:
        assert mirror is not None
        began(here())
        mirror.upload()
        mine = at_url()
        record(machine=machine_of_record, pid=os.getpid(), staging=mine.staging, renewed_at=5.0)
        before = at_url()
        claim = nullcontext() if machine_of_record == this_machine() else here().held()
        with claim, pytest.raises(ConfigError, match="in use by a live run"), held(**{wish: True}):
            pass
        assert here().metrics_file.read_text() == "1\n2\n3\n"
        assert at_url() == before
        record(holder=mine.holder)


def test_a_record_tells_the_start_of_its_process_by_the_clock_of_now(monkeypatch: pytest.MonkeyPatch):
    lease = Lease(RemoteFolder(URL), "mine", renew_every_s=1000.0)
    lease.take(lease.find())
    monkeypatch.setattr(lease_module, "start_time", lambda pid: 77.0)
    lease.begin()
    assert at_url().process_started_at == 77.0


def test_the_folder_of_another_live_run_stays_when_a_second_one_ends(monkeypatch: pytest.MonkeyPatch):
    left_behind()
    monkeypatch.setattr(remote_run, "_refuse_claimed", lambda folder: None)  # it is claimed a moment later
    said: list[str] = []
    with here().held(), held(resume=True, tell=said.append):
        pass
    assert here().metrics_file.exists()
    assert said[-1].endswith("stays: another live run works in it")


@pytest.mark.parametrize(
    ("wishes", "refusal"),
    [
        ({}, "already holds a run"),
        ({"resume": True}, "another seed"),
        ({"resume": True, "overwrite": True}, "both given"),
    ],
    ids=["no wish", "resume", "both"],
)
def test_who_is_refused_does_not_touch_the_lease(wishes: dict[str, bool], refusal: str):
    left_behind()
    before = at_url()

    def refuse() -> None:
        raise ConfigError("another seed")

    with pytest.raises(ConfigError, match=refusal), held(**wishes, check=refuse):
        pass
    assert at_url() == before


def test_a_record_that_changes_while_it_is_looked_at_is_not_overwritten():
    lease = Lease(RemoteFolder(URL), "mine")
    before = lease.find()
    record()
    with pytest.raises(ConfigError, match="in use by a live run"):
        lease.take(before)
    assert at_url().host == "node-7"


@pytest.mark.parametrize(
    ("changes", "is_lost"),
    [
        ({"staging": "mine", "is_released": True}, False),
        ({"staging": "mine", "is_released": False}, True),
        ({"staging": "another", "is_released": True}, True),
    ],
    ids=["gave up before it began", "has it", "began and ended"],
)
def test_only_who_began_or_may_begin_ends_the_uploads_of_a_run_before(changes: dict[str, Any], is_lost: bool):
    lease = Lease(RemoteFolder(URL), "mine", renew_every_s=1000.0)
    lease.take(lease.find())
    lease.begin()
    mine = at_url()
    record(**changes)
    if is_lost:
        for _ in range(2):
            with pytest.raises(FilesError, match="node-7 has taken over"):
                lease.confirm()
            record(staging="mine", is_released=True)  # too late
    else:
        lease.confirm()
        assert (at_url().holder, at_url().is_released) == (mine.holder, False)


@pytest.mark.parametrize("wish", ["resume", "overwrite"])
def test_nothing_is_removed_at_the_url_before_the_record_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wish: str
):
    left_behind()
    before = at_url()
    stagings = []

    def look(line: str) -> None:
        if line.startswith("rm "):
            StrictStore.before = None
            stagings.append(at_url().staging)
            StrictStore.before = look

    move_to("second", tmp_path, monkeypatch)
    StrictStore.before = look
    with held(**{wish: True}):
        StrictStore.before = None
        (here().path / "run.json").write_text("{}")
    assert stagings
    assert before.staging not in stagings


@pytest.mark.parametrize(("wish", "complete_at"), [("resume", 7.0), ("overwrite", None)])
def test_a_new_run_has_no_complete_upload_of_the_run_before(wish: str, complete_at: float | None):
    left_behind()
    record(staging=at_url().staging, renewed_at=9.0, complete_at=7.0)
    with held(**{wish: True}):
        assert at_url().complete_at == complete_at
        began(here())


def test_names_at_a_url_do_not_lead_out_of_the_folder(tmp_path: Path):
    remote = RemoteFolder(URL)
    remote.write("spans/../../../out", b"")
    with pytest.raises(FilesError, match=r"spans/\.\./\.\./\.\./out.*leads out of"):
        run_mirror.download_run(remote, tmp_path / "folder", list(remote.sizes()))
    assert not (tmp_path / "out").exists()


def test_a_password_is_not_taken_in_a_url():
    with pytest.raises(ConfigError, match="password") as caught:
        RemoteFolder("strict://me:secret@bucket/x")
    assert "secret" not in str(caught.value)
    quickstart = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
    with pytest.raises(ConfigError, match=r"run_dir.*password") as caught:
        load_config(quickstart, ["run_dir=sftp://me:secret@host/x"])
    assert "secret" not in str(caught.value)
    assert load_config(quickstart, ["run_dir=sftp://me@host:22/x@y:z@"]).place == "sftp://me@host:22/x@y:z@"
