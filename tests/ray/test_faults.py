"""Runs of real processes that are killed, stopped, starved and lied to while they go on: nothing is lost or hangs.

Several faults share a run where they do not disturb each other, because a run takes long to start.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

import psutil
import pytest
from conftest import run
from fault_parts import FAULTY, FIRST_STEP, HALF_CPUS, LONG, Gate, GoingRun, going, gone, kill
from ledger_parts import check_ledger
from safetensors.numpy import load_file

from actors.cluster import SESSION_PREFIX, _lock_session, _remove_abandoned_sessions
from weaver_rl.audit import AuditReport
from weaver_rl.checkpoints import find_damage
from weaver_rl.rollout_files import RecordedRollout, read_rollouts
from weaver_rl.run_folder import RunFolder

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

PROMPTS_PER_STEP = 4
SYNCHRONOUS_STEPS = 7
SYNCHRONOUS = (*LONG, "rollout.max_lag=0", f"num_steps={SYNCHRONOUS_STEPS}")
LARGEST_FILE = 100_000
"""Bytes; more than the learner writes into its logs, less than its weights."""


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path / "gate")


def ends_clean(it: GoingRun, num_steps: int, killed_after: int = 0) -> AuditReport:
    """The run ends well: every step, every prompt once. `killed_after`: the driver was killed, that step stands."""
    ended = it.ends()
    assert ended.status == 0, ended.output
    audited = run("audit", str(it.folder.path))
    assert audited.status == 0, audited.output
    report = it.audit()
    assert report.state == "finished"
    assert report.last_step == FIRST_STEP + num_steps - 1
    assert report.num_trained + sum(report.dropped.values()) == PROMPTS_PER_STEP * num_steps
    check_ledger(it.folder, "controller", after=killed_after)
    return report


def test_whoever_is_killed_the_run_goes_on(tmp_path: Path, gate: Gate) -> None:
    arguments = [*LONG, *HALF_CPUS, "sampler.num_replicas=2", "rollout.max_lag=2", "num_steps=30"]
    with going(tmp_path / "run", gate, *arguments) as it:
        it.serves("sampler 0", "sampler 1")
        it.trains()
        _a_reward_worker(it)
        _a_sampler_in_the_middle_of_generation(it)
        _every_sampler_at_once(it)
        _the_only_learner_rank(it)
        report = ends_clean(it, num_steps=30)
    assert report.num_rewinds == 1
    assert report.num_steps_redone <= 1
    missing = [c.missing for record in it.trained() for c in record.scored.components if c.missing is not None]
    assert missing == []


def _a_reward_worker(it: GoingRun) -> None:
    """It is killed while it scores: the gate is closed."""
    it.until(
        "a worker that waits at the gate", lambda: any("score" in p.cmdline()[0] for p in it.actors("RewardActor"))
    )
    before = {process.pid for process in it.actors("RewardActor")}
    victim = next(process for process in it.actors("RewardActor") if "score" in process.cmdline()[0])
    children = victim.children(recursive=True)
    kill(victim)
    it.until("a worker in its place", lambda: len({p.pid for p in it.actors("RewardActor")} - before) == 1)
    it.until("the end of the lost worker's children", lambda: all(gone(child) for child in children))
    it.trains()


def _a_sampler_in_the_middle_of_generation(it: GoingRun) -> None:
    before = it.now()
    (victim,) = it.stop_at_work("sampler 0")
    kill(victim)
    it.until("groups issued again", lambda: it.events("reissued", before))
    assert {event.sampler for event in it.events("reissued", before)} == {"sampler 0"}
    it.trains()  # the other goes on meanwhile
    joined = it.until("a fresh sampler 0 that joins", lambda: it.noted("sampler 0", "joined", before))
    it.serves("sampler 0", "sampler 1")
    assert it.sampler("sampler 0") != victim
    assert len(it.noted("sampler 0", "lost", before)) == 1
    assert it.noted("sampler 1", "lost") == []
    it.gate.open()
    it.until(
        "groups of the fresh one", lambda: any(e.sampler == "sampler 0" for e in it.events("generated", joined[0].seq))
    )
    it.gate.close()


def _every_sampler_at_once(it: GoingRun) -> None:
    before = it.now()
    names = ["sampler 0", "sampler 1"]
    kill(*it.stop_at_work(*names))
    it.gate.open()  # what is finished is trained, then the learner waits for what nobody samples
    line = it.until(
        "a chain that ends at a starting engine",
        lambda: (live := it.live()) and live.chain and "starts its engine" in live.chain and live.chain,
    )
    assert line.startswith("learner waits for")
    seen = run("status", str(it.folder.path))
    assert "starts its engine" in seen.output, seen.output
    for name in names:
        it.until(f"{name} joined again", lambda name=name: it.noted(name, "joined", before))
        assert len(it.noted(name, "lost", before)) == 1
    assert it.events("reissued", before)
    it.trains()


def _the_only_learner_rank(it: GoingRun) -> None:
    """It is killed right after an update, so most often before the checkpoint of it."""
    (rank,) = it.actors("LearnerRank")
    it.trains()
    before, step = it.now(), it.step()
    kill(rank)
    it.gate.open()
    went_back = it.until("the run went back", lambda: it.events("rewound", before))
    assert went_back[0].step is not None
    assert step - 1 <= went_back[0].step
    assert it.noted("learner", "lost", before)
    it.trains(2)


def test_a_killed_driver_leaves_nothing_and_is_continued_from_the_newest_whole_checkpoint(
    tmp_path: Path, gate: Gate
) -> None:
    arguments = [*LONG, "sampler.num_cpus=0.5", "learner={num_ranks: 2, num_cpus: 0.5}", "rollout.max_lag=2"]
    arguments += ["sampler.num_replicas=1", "num_steps=14"]
    with going(tmp_path / "run", gate, *arguments) as it:
        it.trains()
        _one_of_two_learner_ranks(it)
        it.stop_at_work("sampler 0")[0].resume()
        session, shared = session_of(it), segments_of(it)
        kill(*it.processes()[:1])
        it.process.wait()
        it.leaves_no_process()
    assert not session.exists()
    assert [segment for segment in shared if segment.exists()] == []
    assert f"killed (pid {it.process.pid}" in run("status", str(it.folder.path)).output
    assert it.audit().ok, it.audit().violations
    assert it.audit().state == "killed"
    newest = checkpoint_steps(it.folder)[-1]
    flip_a_byte(it.folder, newest)
    with going(tmp_path / "run", gate, *arguments, "--resume") as again:
        report = ends_clean(again, num_steps=14, killed_after=newest - 1)
    assert f"step_{newest:06d} is damaged" in again.output
    assert f"resumed: continues from step_{newest - 1:06d}" in again.output
    assert report.num_rewinds == 2


def _one_of_two_learner_ranks(it: GoingRun) -> None:
    _, second = it.actors("LearnerRank")
    before = it.now()
    it.gate.open()
    trained = it.until("an update", lambda: it.events("trained", before))
    kill(second)
    it.until("the run went back", lambda: it.events("rewound", before))
    assert it.noted("learner", "lost", before)
    assert it.audit().num_steps_redone <= 1
    assert trained
    it.trains()


def segments_of(it: GoingRun) -> set[Path]:
    """Shared memory that processes of the run have mapped; what has no name any more goes with them."""
    mapped = set()
    for process in it.processes():
        with contextlib.suppress(psutil.Error):
            mapped |= {Path(part.path) for part in process.memory_maps() if part.path.startswith("/dev/shm/")}
    return {segment for segment in mapped if segment.exists()}


def session_of(it: GoingRun) -> Path:
    """The directory of the run's own Ray."""
    marks = [a.partition("=")[2] for p in it.processes() for a in p.cmdline() if a.startswith("--temp_dir=")]
    assert marks
    return Path(marks[0])


def flip_a_byte(folder: RunFolder, step: int) -> None:
    """In the middle of the largest file of a checkpoint."""
    files = (file for file in (folder.checkpoints / f"step_{step:06d}").rglob("*") if file.is_file())
    largest = max(files, key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


def test_directories_of_drivers_killed_together_with_their_reaper_are_removed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    abandoned, alive, unknown = (tmp_path / f"{SESSION_PREFIX}{name}" for name in ("abandoned", "alive", "unknown"))
    for session in (abandoned, alive, unknown):
        session.mkdir()
    os.close(_lock_session(abandoned))
    lock = _lock_session(alive)
    _remove_abandoned_sessions()
    os.close(lock)
    assert sorted(tmp_path.iterdir()) == [alive, unknown]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A synchronous run that nobody disturbed."""
    place = tmp_path_factory.mktemp("undisturbed")
    gate = Gate(place / "gate")
    with going(place / "run", gate, *SYNCHRONOUS) as it:
        ends_clean(it, SYNCHRONOUS_STEPS)
    return it.folder


def test_a_synchronous_run_that_was_killed_and_could_not_write_ends_as_if_nothing_had_been(
    undisturbed: RunFolder, tmp_path: Path, gate: Gate
) -> None:
    folder = RunFolder(tmp_path / "run")
    _the_driver_is_killed(folder, gate)
    stands = checkpoint_steps(folder)[-1]
    _a_checkpoint_cannot_be_written(folder, gate)
    with going(folder.path, gate, *SYNCHRONOUS, "--resume") as it:
        ends_clean(it, SYNCHRONOUS_STEPS, killed_after=stands)
    ours, theirs = ([identity(r) for r in read_rollouts(f.path)] for f in (folder, undisturbed))
    assert ours == theirs
    assert weights_of(folder) == weights_of(undisturbed)
    _no_checkpoint_is_whole(folder, gate)


def _the_driver_is_killed(folder: RunFolder, gate: Gate) -> None:
    with going(folder.path, gate, *SYNCHRONOUS) as it:
        it.trains(2)
        it.stop_at_work("sampler 0")
        kill(*it.processes()[:1])
        it.process.wait()
        it.leaves_no_process()


def _a_checkpoint_cannot_be_written(folder: RunFolder, gate: Gate) -> None:
    with going(folder.path, gate, *SYNCHRONOUS, "--resume") as it:
        it.trains()
        it.until("the checkpoint of the step", lambda: checkpoint_steps(folder)[-1:] == [it.step()])
        (rank,) = it.actors("LearnerRank")
        # What a full disk does to a write, without filling a disk that others use: larger files fail.
        rank.rlimit(psutil.RLIMIT_FSIZE, (LARGEST_FILE, psutil.RLIM_INFINITY))
        written = checkpoint_steps(folder)
        ended = it.ends()
    assert ended.status == 2, ended.output
    assert f"checkpoint step_{written[-1] + 1:06d} could not be written" in ended.output
    assert "File too large" in ended.output
    assert "Earlier checkpoints are untouched" in ended.output
    assert "Traceback" not in ended.output
    assert checkpoint_steps(folder) == written
    assert find_damage(folder.checkpoints / f"step_{written[-1]:06d}") is None
    assert it.audit().ok, it.audit().violations


def _no_checkpoint_is_whole(folder: RunFolder, gate: Gate) -> None:
    for step in checkpoint_steps(folder):
        flip_a_byte(folder, step)
    with going(folder.path, gate, *SYNCHRONOUS, "--resume") as it:
        ended = it.ends()
    assert ended.status == 2, ended.output
    assert "holds no usable checkpoint" in ended.output
    assert "Traceback" not in ended.output


def checkpoint_steps(folder: RunFolder) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in folder.checkpoints.glob("step_*"))


def identity(record: RecordedRollout) -> tuple[object, ...]:
    rollout = record.scored.rollout
    return record.step, rollout.rollout_id, rollout.text, rollout.completion.logprobs_L.tolist(), record.advantage


def weights_of(folder: RunFolder) -> dict[str, bytes]:
    return {
        name: tensor.tobytes()
        for file in folder.policy.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def test_samplers_that_slow_down_or_load_wrong_weights_are_replaced(tmp_path: Path, gate: Gate) -> None:
    """Sampler 0 answers ever slower from v3 on; sampler 1 gets one altered tensor with v4 and later."""
    faults = tmp_path / "faults"
    faults.mkdir()
    (faults / "slow sampler 0").write_text("3")
    (faults / "wrong sampler 1").write_text("4")
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {"FAULTS": str(faults), "PYTHONPATH": os.pathsep.join(paths)}
    arguments = [*LONG, *HALF_CPUS, "sampler.num_replicas=2", "rollout={max_lag: 1, timeout_s: 20}", "num_steps=20"]
    arguments += ["rollout.prompts_per_step=4", "rollout.samples_per_prompt=4", "rollout.sampling.max_tokens=300"]
    with going(tmp_path / "run", gate, *arguments, program=FAULTY, env=env) as it:
        it.serves("sampler 0", "sampler 1")
        it.gate.open()
        names = ("sampler 0", "sampler 1")
        it.until("both lost", lambda: all(it.noted(name, "lost") for name in names))
        it.gate.close()
        it.until("both joined again", lambda: all(len(it.noted(name, "joined")) == 2 for name in names))
        ends_clean(it, num_steps=20)
    assert list(faults.iterdir()) == []
    slow, wrong = (it.noted(name, "lost")[0].detail["reason"] for name in ("sampler 0", "sampler 1"))
    assert "rollout.timeout_s" in slow
    assert "does not use weights v4" in wrong
    _nothing_of_it_was_trained(it, "sampler 1", version=4)


def _nothing_of_it_was_trained(it: GoingRun, sampler: str, version: int) -> None:
    """Nothing made with that version by the process that had it wrong, the first."""
    fresh = it.noted(sampler, "joined")[1].seq
    generated = {event.group_id: event for event in it.events("generated")}  # the last time of each
    of_it = [
        record.scored.rollout.rollout_id.rpartition("-")[0]
        for record in it.trained()
        if record.sampler == sampler and version in record.scored.rollout.completion.versions_L
    ]
    assert all(generated[group].seq > fresh for group in of_it)


def test_samplers_come_and_go_and_one_that_is_stopped_is_replaced(tmp_path: Path, gate: Gate) -> None:
    arguments = [*LONG, "sampler.num_cpus=0.5", "sampler.unresponsive_after_s=10", "rollout.max_lag=1", "num_steps=20"]
    with going(tmp_path / "run", gate, *arguments) as it:
        it.serves("sampler 0")
        it.trains()
        _one_joins(it)
        _it_is_stopped(it)
        _it_leaves(it)
        report = ends_clean(it, num_steps=20)
    assert report.num_rewinds == 0
    assert {record.sampler for record in it.trained()} == {"sampler 0", "sampler 1"}
    assert it.noted("sampler 0", "lost") == []


def _one_joins(it: GoingRun) -> None:
    assert run("scale", str(it.folder.path), "--samplers", "2").status == 0
    it.until("sampler 1 joined", lambda: it.noted("sampler 1", "joined"))
    _gives_groups(it, "sampler 1", after=it.now())


def _gives_groups(it: GoingRun, sampler: str, after: int) -> None:
    it.gate.open()
    it.until(f"groups of {sampler}", lambda: any(e.sampler == sampler for e in it.events("generated", after)))
    it.gate.close()


def _it_is_stopped(it: GoingRun) -> None:
    before = it.now()
    (victim,) = it.stop_at_work("sampler 1")
    it.gate.open()  # what is finished is trained, then the learner waits for groups of the stopped one
    it.until(
        "a chain that ends at the stopped process",
        lambda: (live := it.live()) and f"pid {victim.pid} stopped (SIGSTOP)" in (live.chain or ""),
    )
    it.until("the stopped one lost", lambda: it.noted("sampler 1", "lost", before))
    it.until("its process killed", lambda: gone(victim))
    assert {event.sampler for event in it.events("reissued", before)} == {"sampler 1"}
    it.gate.close()
    it.until("sampler 1 joined again", lambda: it.noted("sampler 1", "joined", before))
    _gives_groups(it, "sampler 1", after=it.now())


def _it_leaves(it: GoingRun) -> None:
    before = it.now()
    leaver = it.sampler("sampler 1")
    assert run("scale", str(it.folder.path), "--samplers", "1").status == 0
    it.until("sampler 1 left", lambda: it.noted("sampler 1", "left", before))
    it.until("only sampler 0 is there", lambda: set(it.samplers()) == {"sampler 0"})
    it.until("its process ended", lambda: gone(leaver))
    assert it.events("reissued", before) == []
    it.trains()
