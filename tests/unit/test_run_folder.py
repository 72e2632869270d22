"""The run folder: refusals, the lock between processes, and a status that stays true however a run ends."""

import json
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from weaver_rl.errors import ConfigError, MissingRewardsError
from weaver_rl.run_folder import RunFolder, append_whole, write_atomically

pytestmark = pytest.mark.unit

HOLDER = """
import sys
from pathlib import Path
from weaver_rl.run_folder import RunFolder
with RunFolder(Path(sys.argv[1])).claim() as claim:
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path: Path):
    return RunFolder(tmp_path / "runs" / "one")


def finish(folder: RunFolder, **kwargs):
    with folder.claim(**kwargs) as claim:
        claim.progress(step=3, weights_version=3)


def test_a_run_that_ends_is_finished_with_its_last_step(folder):
    finish(folder)
    status = folder.read_status()
    assert (status.state, status.last_step, status.weights_version, status.num_resumes) == ("finished", 3, 3, 0)
    assert status.ended_at >= status.started_at
    assert status.software["weaver-rl"]
    assert not folder.is_claimed()


def test_the_status_is_running_while_the_run_is(folder):
    with folder.claim():
        assert folder.read_status().state == "running"
        assert folder.is_claimed()


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [
        (KeyboardInterrupt(), "interrupted", "KeyboardInterrupt"),
        (SystemExit(0), "finished", None),
        (SystemExit(2), "failed", "SystemExit"),
        (MissingRewardsError("too many missing"), "failed", "too many missing"),
        (ZeroDivisionError("x"), "failed", "ZeroDivisionError: x"),
    ],
)
def test_the_status_says_how_the_run_ended(folder, error, state, reason):
    with pytest.raises(type(error)), folder.claim():
        raise error
    status = folder.read_status()
    assert status.state == state
    assert (reason is None and status.reason is None) or reason in status.reason


def test_an_ending_that_was_said_is_kept(folder):
    with folder.claim() as claim:
        claim.end("interrupted", "SIGTERM")
    assert (folder.read_status().state, folder.read_status().reason) == ("interrupted", "SIGTERM")


def test_a_second_run_is_refused_and_told_what_to_do(folder):
    finish(folder)
    with pytest.raises(ConfigError, match=r"already holds a run \(finished, last step 3\).*--resume.*--overwrite"):
        folder.claim()


def test_resume_keeps_the_files_and_counts(folder):
    finish(folder)
    started_at = folder.read_status().started_at
    folder.metrics_file.write_text("kept")
    finish(folder, resume=True)
    assert folder.read_status().num_resumes == 1
    assert folder.read_status().started_at == started_at
    assert folder.metrics_file.read_text() == "kept"


def test_resume_of_nothing_is_refused(folder):
    with pytest.raises(ConfigError, match="nothing to resume"):
        folder.claim(resume=True)
    assert not folder.path.exists()


def test_overwrite_removes_the_run_and_nothing_else(folder):
    finish(folder)
    (folder.rollouts / "step_000001.parquet").write_text("old")
    folder.spans.mkdir()
    (folder.spans / "sampler-0.jsonl").write_text("old")
    for path in (folder.metrics_file, folder.ledger_file, folder.trace):
        path.write_text("old")
    (folder.path / "notes.txt").write_text("mine")
    finish(folder, overwrite=True)
    assert list(folder.rollouts.iterdir()) == []
    assert not any(path.exists() for path in (folder.metrics_file, folder.ledger_file, folder.trace, folder.spans))
    assert (folder.path / "notes.txt").read_text() == "mine"


def test_a_folder_that_cannot_be_is_a_config_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        RunFolder(tmp_path / "file").claim()
    with pytest.raises(ConfigError, match="cannot be written"):
        RunFolder(tmp_path / "file" / "below").claim()


def test_a_refused_claim_lets_the_lock_go(folder):
    finish(folder)
    with pytest.raises(ConfigError):
        folder.claim()
    finish(folder, resume=True)


def test_a_status_file_that_is_damaged_is_named(folder):
    finish(folder)
    folder.status_file.write_text("[]")
    with pytest.raises(ConfigError, match=r"run\.json"):
        folder.read_status()


def test_two_live_processes_cannot_share_a_folder_and_a_killed_one_leaves_it_free(folder):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        for mode in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(ConfigError, match=f"in use by a live run \\(process {holder.pid} on "):
                folder.claim(**mode)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert folder.read_status().state == "running"
        assert not folder.is_claimed()
        finish(folder, resume=True)
        assert folder.read_status().state == "finished"
    finally:
        holder.kill()
        holder.communicate()


def test_an_atomic_write_that_fails_keeps_the_old_content(tmp_path):
    path = tmp_path / "a.json"
    write_atomically(path, json.dumps({"a": 1}))
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "\ud800")
    assert path.read_text() == '{"a": 1}'
    assert [item.name for item in tmp_path.iterdir()] == ["a.json"]


def test_what_finds_no_room_leaves_no_part_of_it(tmp_path: Path):
    path = tmp_path / "lines.jsonl"
    append_whole(path, "first\n")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            append_whole(path, "second" * 5_000 + "\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    append_whole(path, "third\n")
    assert path.read_text() == "first\nthird\n"
