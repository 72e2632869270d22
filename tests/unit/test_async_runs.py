"""Whole runs of the real controller, fleets, stream and journal on a virtual clock, under random schedules of faults.

Whatever the lag, the sizes, the speeds and the faults: a run ends, no token is too old, every prompt is trained exactly
once, and nothing that was sampled with wrong weights is trained. Each is checked from the files that the run leaves.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from fake_fleet import FakeRewardWorkers, FakeSamplers, FleetLog, LosableLearner, uniform
from fakes import FakePrompts, FakeView, fake_logprob, make_config
from hypothesis import HealthCheck, currently_in_test_context, event, given, settings
from hypothesis import strategies as st

from weaver_rl import journal as journal_module
from weaver_rl.audit import audit
from weaver_rl.checkpoints import Checkpoints
from weaver_rl.controller import Controller, Crew
from weaver_rl.errors import ActorFailedError, LearnerLostError, ResourcesError, WeaverRLError, WeightSyncError
from weaver_rl.journal import Journal
from weaver_rl.metrics import MetricsWriter, deterministic_part, read_metrics
from weaver_rl.plan.virtual_loop import VirtualLoop, run_virtually
from weaver_rl.reward_fleet import RewardFleet
from weaver_rl.rollout_files import RecordedRollout, read_rollouts
from weaver_rl.run_folder import RunFolder
from weaver_rl.sampler_fleet import MAX_FAILED_STARTS, SamplerFleet
from weaver_rl.waits import Waits, using
from weaver_rl.weights.probe import probe_token_ids
from weaver_rl.weights.sync import WeightSync

pytestmark = pytest.mark.unit

PROBE = probe_token_ids(12, 16)
LONGEST_S = 2e4
"""Virtual seconds after which a run that still goes on goes in circles."""
GENERATE_TIMEOUT_S = 120.0
MEMORY = Path("/dev/shm")


@pytest.fixture(scope="module", autouse=True)
def no_fsync() -> Iterator[None]:
    """What must survive a loss of power is tested elsewhere; here it would be most of the time."""

    def open_without_sync(path: Path) -> sqlite3.Connection:
        connection = open_for_writing(path)
        connection.execute("PRAGMA synchronous = OFF")
        return connection

    open_for_writing = journal_module._open_for_writing
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal_module, "_open_for_writing", open_without_sync)
        patch.setattr("os.fsync", lambda file: None)
        yield


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run and all that befalls it."""

    max_lag: int = 1
    prompts_per_step: int = 2
    samples_per_prompt: int = 2
    num_steps: int = 3
    warm_steps: int = 0
    num_samplers: int = 2
    num_reward_workers: int = 2
    checkpoint_every: int = 1
    eval_every: int = 0
    seed: int = 0
    longest_s: float = 20.0
    """Of one generation."""
    learn_s: float = 3.0
    slow: frozenset[int] = frozenset()
    """Positions whose first sampling takes longer than a sampler may."""
    upsets: tuple[tuple[str, str, str], ...] = ()
    """Sampler, "start", "restart", "load" or "probe", "die" or "hang"."""
    killed: tuple[tuple[float, str | None, str], ...] = ()
    """Time, sampler (None: all at once), "die" or "hang"."""
    failing_starts: tuple[tuple[str, str, str], ...] = ()
    """Sampler, "start" or "restart", "failed" or "resources"."""
    wrong: tuple[tuple[str, int, int], ...] = ()
    """Sampler, version, how many of its loads of that version are wrong."""
    rewards: tuple[tuple[int, str], ...] = ()
    """The how-manieth group to be scored, "die" or "hang"."""
    learner: tuple[tuple[str, int, str], ...] = ()
    """Operation, how-manieth call, "die" or "late"."""
    scales: tuple[tuple[float, int], ...] = ()
    """Time, number of samplers."""
    interrupted_at: tuple[float, ...] = ()
    """Each process of the run but the last is interrupted after so long."""

    @property
    def is_calm(self) -> bool:
        """Nothing befalls it."""
        return self == Plan(**{name: getattr(self, name) for name in _SIZES})

    @property
    def positions(self) -> range:
        first = self.warm_steps * 2
        return range(first, first + self.num_steps * self.prompts_per_step)


_SIZES = (
    *("max_lag", "prompts_per_step", "samples_per_prompt", "num_steps", "warm_steps", "num_samplers", "seed"),
    *("num_reward_workers", "checkpoint_every", "eval_every", "longest_s", "learn_s"),
)


class WatchedJournal(Journal):
    """The real one; time stands still while it writes, and it counts the groups that are admitted and not trained."""

    loop: VirtualLoop
    outstanding: set[str]
    most: int = 0

    async def flush(self) -> None:
        with self.loop.real_work():
            await super().flush()

    def dispatched(self, group_id: str, **detail: Any) -> None:
        super().dispatched(group_id, **detail)
        self.outstanding.add(group_id)
        self.most = max(self.most, len(self.outstanding))

    def trained(self, group_id: str, *, step: int, order: int) -> None:
        super().trained(group_id, step=step, order=order)
        self.outstanding.remove(group_id)

    def dropped(self, group_id: str, *, step: int, reason: str) -> None:
        super().dropped(group_id, step=step, reason=reason)
        self.outstanding.remove(group_id)

    def rewound(self, *, finished: Any, **detail: Any) -> None:
        super().rewound(finished=finished, **detail)
        self.outstanding = set(finished)


@dataclass
class JournalingLog(FleetLog):
    """Writes what was issued again into the journal, as a run does."""

    journal: Journal | None = None

    def group_reissued(self, group_id: str, sampler: str, reason: str) -> None:
        super().group_reissued(group_id, sampler, reason)
        if group_id.isdigit() and self.journal is not None:
            self.journal.reissued(group_id, sampler=sampler, reason=reason)


@dataclass
class Voyage:
    """One plan in one folder. `sail` is one process of it."""

    plan: Plan
    path: Path
    samplers: FakeSamplers = field(init=False)
    rewards: FakeRewardWorkers = field(init=False)
    learner: LosableLearner = field(init=False)
    log: JournalingLog = field(init=False)
    view: FakeView = field(default_factory=FakeView)
    most_outstanding: int = 0
    thetas: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        plan = self.plan
        self.config = make_config(
            warm_start={"num_steps": plan.warm_steps, "prompts_per_step": 2} if plan.warm_steps else None,
            num_steps=plan.num_steps,
            rollout={
                "prompts_per_step": plan.prompts_per_step,
                "samples_per_prompt": plan.samples_per_prompt,
                "max_lag": plan.max_lag,
                "sampling": {"max_tokens": 6},
            },
            advantage={"name": "grpo" if plan.samples_per_prompt > 1 else "reinforce"},
            reward_workers={"max_missing_fraction": 1.0},
            learner={"learning_rate": 0.05},
            eval={"every": plan.eval_every, "num_prompts": 2},
            checkpoint={"every": plan.checkpoint_every, "keep": 3},
        )
        self.folder = RunFolder(self.path)
        for directory in (self.path, self.folder.rollouts, self.folder.checkpoints):
            directory.mkdir(exist_ok=True)
        self._left = {
            "upsets": list(plan.upsets),
            "starts": [(name, call, _START_ERRORS[kind]) for name, call, kind in plan.failing_starts],
            "wrong": {(name, version): times for name, version, times in plan.wrong},
        }

    def sail_all(self) -> None:
        """Every process of the run, one after the other, to its end."""
        begun = False
        for interrupted_at in (*self.plan.interrupted_at, None):
            try:
                return run_virtually(self.sail(resume=begun, interrupted_at=interrupted_at))
            except asyncio.CancelledError:
                tell("interrupted")
                begun = True
                if not Checkpoints(self.folder.checkpoints, 3).steps():
                    begun = False  # nothing to resume from: the run starts anew, with --overwrite
                    for file in self.path.rglob("*"):
                        if file.is_file():
                            file.unlink()
        raise AssertionError("the last process of a run is not interrupted")

    async def sail(self, *, resume: bool, interrupted_at: float | None = None) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        self._man(resume)
        names = [f"sampler {index}" for index in range(self.plan.num_samplers)]
        self.log = JournalingLog()
        samplers = SamplerFleet(
            self.samplers, names, generate_timeout_s=GENERATE_TIMEOUT_S, watch_every_s=5.0, events=self.log
        )
        workers = [f"reward worker {index}" for index in range(self.plan.num_reward_workers)]
        rewards = RewardFleet(self.rewards, workers, labels=["task"], watch_every_s=5.0)
        self.waits = Waits(loop.time)
        with using(self.waits), MetricsWriter(self.folder) as metrics, WatchedJournal(self.folder.journal) as journal:
            journal.loop, journal.outstanding, self.log.journal = loop, set(), journal
            samplers.start()
            controller = Controller(
                config=self.config,
                crew=Crew(prompts=FakePrompts(), samplers=samplers, rewards=rewards, learner=self.learner),
                sync=WeightSync(self.learner, samplers, PROBE, tolerance=1e-4),
                folder=self.folder,
                checkpoints=Checkpoints(self.folder.checkpoints, 3),
                metrics=metrics,
                journal=journal,
                view=self.view,
            )
            fates = asyncio.create_task(self._befall(samplers))
            try:
                await rewards.start()
                running = asyncio.create_task(controller.run(resume=resume))
                await asyncio.wait({running}, timeout=LONGEST_S if interrupted_at is None else interrupted_at)
                assert running.done() or interrupted_at is not None, self._where()
                running.cancel()
                await running
            finally:
                fates.cancel()
                await asyncio.gather(fates, return_exceptions=True)
                await samplers.close()
                await rewards.close()
                self.most_outstanding = max(self.most_outstanding, journal.most)
                self.thetas |= self.learner.thetas
                self._require_nothing_left()

    def _man(self, resume: bool) -> None:
        plan, seconds = self.plan, uniform(self.plan.seed, 0.01, self.plan.longest_s)
        slow = set(plan.slow)

        def sampler_seconds(*what: Any) -> float:
            if what[0] == "generate" and what[1].isdigit() and int(what[1]) in slow:
                slow.remove(int(what[1]))
                return 2 * GENERATE_TIMEOUT_S
            return seconds(*what) / (1 if what[0] == "generate" else 4)

        self.samplers = FakeSamplers(
            seconds=sampler_seconds,
            upsets=self._left["upsets"],
            failing_starts=self._left["starts"],
            wrong=self._left["wrong"],
        )
        self.rewards = FakeRewardWorkers(seconds=uniform(plan.seed, 0.01, 2.0), upsets=dict(plan.rewards))
        upsets = {(operation, number): how for operation, number, how in plan.learner}
        self.learner = LosableLearner(
            seconds=uniform(plan.seed + 1, 0.01, plan.learn_s), upsets={} if resume else upsets
        )

    async def _befall(self, samplers: SamplerFleet) -> None:
        fates: list[tuple[float, Callable[[], None]]] = []
        for at, name, how in self.plan.killed:
            fates.append((at, lambda name=name, how=how: self._strike(name, how)))
        for at, number in self.plan.scales:
            fates.append((at, lambda number=number: samplers.scale(number)))
        for at, fate in sorted(fates, key=lambda item: item[0]):
            await asyncio.sleep(max(0.0, at - asyncio.get_running_loop().time()))
            fate()

    def _strike(self, name: str | None, how: str) -> None:
        for sampler in self.samplers.made:
            if name in (None, sampler.name) and not sampler.dead.is_set():
                sampler.die() if how == "die" else sampler.hang()

    def _where(self) -> str:
        chain = self.waits.chain()
        return f"the run still goes on after {LONGEST_S:g} s: {chain.line if chain else 'no wait'}"

    def _require_nothing_left(self) -> None:
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, left
        assert all(sampler.closed for sampler in self.samplers.made)
        assert all(worker.closed for worker in self.rewards.made)
        assert not any(sampler.num_streams for sampler in self.samplers.made)

    # -- what it left ----------------------------------------------------------------------------------------------

    def trained(self) -> list[RecordedRollout]:
        return [record for record in read_rollouts(self.path) if record.phase == "train"]

    def require_exactly_once(self) -> None:
        """From the journal, and from the rollout files alone."""
        violations = audit(self.path).violations
        assert violations == (), violations
        steps: dict[str, int] = {}
        rollouts: Counter[str] = Counter()
        for record in self.trained():
            assert steps.setdefault(record.group_id, record.step) == record.step
            rollouts[record.group_id] += 1
            assert record.scored.rollout.prompt.prompt_id == f"train-{int(record.group_id)}"
        assert {int(group) for group in steps} == set(self.plan.positions)
        assert set(rollouts.values()) == {self.plan.samples_per_prompt}
        first = self.plan.warm_steps + 1
        per_step = Counter(steps.values())
        assert per_step == dict.fromkeys(range(first, first + self.plan.num_steps), self.plan.prompts_per_step)

    def require_bound(self) -> None:
        """No token is too old, and each is of the weights that it says."""
        assert self.most_outstanding <= (self.plan.max_lag + 1) * self.plan.prompts_per_step
        for record in self.trained():
            completion = record.scored.rollout.completion
            before = [record.scored.rollout.prompt.token_ids_P[-1], *completion.token_ids_L.tolist()[:-1]]
            assert record.step - 1 - self.plan.max_lag <= completion.versions_L.min()
            assert completion.versions_L.max() <= record.step - 1
            for version, previous, token, logprob in zip(
                completion.versions_L.tolist(),
                before,
                completion.token_ids_L.tolist(),
                completion.logprobs_L,
                strict=True,
            ):
                expected = fake_logprob(self.thetas[version], previous, token)
                assert logprob == pytest.approx(expected, abs=1e-5), (record.group_id, record.step, version)

    def require_nothing_wasted(self) -> None:
        """Each group was asked for once and scored once."""
        asked = Counter(group for _, group in self.samplers.asked if group.isdigit())
        assert asked == {f"{position:08d}": 1 for position in self.plan.positions}
        assert Counter(group for group in self.rewards.asked if group.isdigit()) == asked
        assert self.log.lost == []

    def content(self) -> Any:
        """All that must not depend on speed."""
        lines = read_metrics(self.folder.metrics_file)
        metrics = [(line.step, line.phase, deterministic_part(line.values)) for line in lines]
        return metrics, [repr(record) for record in read_rollouts(self.path)], self.learner.theta


_START_ERRORS: dict[str, Callable[[], WeaverRLError]] = {
    "failed": lambda: ActorFailedError("the engine died while it started"),
    "resources": lambda: ResourcesError("no node has room"),
}


def tell(what: str) -> None:
    """For the statistics of hypothesis."""
    if currently_in_test_context():
        event(what)


@contextlib.contextmanager
def voyage(plan: Plan) -> Iterator[Voyage]:
    # In memory where the system has that: hundreds of small folders are most of the time on a slow disk.
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as path:
        yield Voyage(plan, Path(path))


def sail(plan: Plan) -> None:
    """Runs a plan and checks everything that must hold of every run that ends well."""
    with voyage(plan) as ship:
        try:
            ship.sail_all()
        except WeightSyncError:
            # Right only of a sampler that no sync of this process had proven: that is the configuration's fault.
            first_syncs = plan.interrupted_at or plan.learner or min(v for _, v, _ in plan.wrong) <= plan.warm_steps
            assert first_syncs and any(times > 1 for _, _, times in plan.wrong)  # noqa: PT018
            tell("never proven")
            return
        except ResourcesError:
            # Right only where nobody else could go on meanwhile.
            assert any(kind == "resources" for *_, kind in plan.failing_starts)
            assert 1 in {plan.num_samplers, *(number for _, number in plan.scales)}
            tell("no room for the only sampler")
            return
        ship.require_exactly_once()
        ship.require_bound()
        if plan.is_calm:
            ship.require_nothing_wasted()


# -- random schedules ------------------------------------------------------------------------------------------------

NAMES = st.sampled_from([f"sampler {index}" for index in range(4)])
HOW = st.sampled_from(["die", "hang"])
TIMES = st.floats(0.0, 150.0)
FAILURES = st.tuples(NAMES, st.just("start"), st.just("failed")) | st.tuples(
    NAMES, st.just("restart"), st.sampled_from(["failed", "resources"])
)
OPERATIONS = st.sampled_from(["forward", "forward_backward", "optim_step", "publish_weights", "save_state", "save_hf"])
SIZES = {
    "max_lag": st.integers(0, 4),
    "prompts_per_step": st.integers(1, 5),
    "samples_per_prompt": st.integers(1, 3),
    "num_steps": st.integers(1, 6),
    "warm_steps": st.integers(0, 1),
    "num_samplers": st.integers(1, 4),
    "num_reward_workers": st.integers(1, 3),
    "checkpoint_every": st.integers(0, 3),
    "eval_every": st.integers(0, 2),
    "seed": st.integers(0, 1000),
    "longest_s": st.sampled_from([0.5, 5.0, 20.0, 100.0]),
    "learn_s": st.sampled_from([0.1, 3.0, 30.0]),
}
calm_plans = st.builds(Plan, **SIZES)
rough_plans = st.builds(
    Plan,
    **SIZES,
    slow=st.frozensets(st.integers(0, 12), max_size=2),
    upsets=st.lists(st.tuples(NAMES, st.sampled_from(["start", "restart", "load", "probe"]), HOW), max_size=2).map(
        tuple
    ),
    killed=st.lists(st.tuples(TIMES, st.none() | NAMES, HOW), max_size=3).map(tuple),
    failing_starts=st.lists(FAILURES, max_size=1).map(tuple),
    wrong=st.lists(st.tuples(NAMES, st.integers(1, 6), st.integers(1, 2)), max_size=2).map(tuple),
    rewards=st.lists(st.tuples(st.integers(0, 15), HOW), max_size=3).map(tuple),
    learner=st.lists(st.tuples(OPERATIONS, st.integers(0, 6), st.sampled_from(["die", "late"])), max_size=2).map(tuple),
    scales=st.lists(st.tuples(TIMES, st.integers(1, 4)), max_size=3).map(tuple),
    interrupted_at=st.lists(TIMES, max_size=2).map(tuple),
)
FEW = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], print_blob=False
)


def is_survivable(plan: Plan) -> bool:
    """Fewer failures of one start than make a fleet give up, and no sampler that was wrong before it was ever right."""
    failures = Counter(name for name, *_ in (*plan.upsets, *plan.failing_starts))
    failures.update(name for name, _, times in plan.wrong for _ in range(times))
    for _, name, _ in plan.killed:
        failures.update([name] if name is not None else (f"sampler {index}" for index in range(4)))
    return max(failures.values(), default=0) < MAX_FAILED_STARTS


@FEW
@given(calm_plans)
def test_any_size_and_speed_ends_within_the_bound_and_wastes_nothing(plan: Plan):
    sail(plan)


@FEW
@given(rough_plans.filter(is_survivable))
def test_any_faults_lose_nothing_and_end(plan: Plan):
    sail(plan)


@pytest.mark.parametrize("max_lag", [0, 2])
@pytest.mark.parametrize("wrong", [1, 2])
def test_nothing_sampled_with_wrong_weights_is_trained(max_lag: int, wrong: int):
    """One load is wrong, or two; long generations run on through it, short ones end before the probe."""
    for seed in range(6):
        wrongs = (("sampler 1", 2, wrong), ("sampler 0", 3, wrong))
        sail(Plan(max_lag=max_lag, num_steps=5, prompts_per_step=4, wrong=wrongs, seed=seed, learn_s=10.0))


def test_a_sampler_that_dies_or_leaves_before_its_wrong_weights_are_probed_trains_nothing():
    for seed in range(6):
        plan = Plan(max_lag=2, num_steps=5, prompts_per_step=4, wrong=(("sampler 1", 2, 1),), seed=seed, learn_s=10.0)
        sail(replace(plan, upsets=(("sampler 1", "probe v2", "die"),)))
        sail(replace(plan, scales=tuple((float(at), 1 + at % 2) for at in range(1, 60))))


def test_synchronous_runs_do_not_depend_on_speed():
    contents = []
    for longest_s, learn_s in ((1.0, 1.0), (90.0, 0.1), (5.0, 30.0)):
        plan = Plan(max_lag=0, warm_steps=1, eval_every=1, num_samplers=3, longest_s=longest_s, learn_s=learn_s)
        with voyage(plan) as ship:
            ship.sail_all()
            ship.require_nothing_wasted()
            contents.append(ship.content())
    assert contents[0] == contents[1] == contents[2]
    assert len(contents[0][1]) > 0


def test_an_asynchronous_run_overlaps_and_a_synchronous_one_does_not():
    versions = {}
    for max_lag in (0, 1, 3):
        with voyage(Plan(max_lag=max_lag, num_steps=6, prompts_per_step=3)) as ship:
            ship.sail_all()
            versions[max_lag] = {
                record.step - 1 - int(record.scored.rollout.completion.versions_L.min()) for record in ship.trained()
            }
    assert versions[0] == {0}
    assert max(versions[1]) == 1
    assert max(versions[3]) == 3


@pytest.mark.parametrize(
    ("plan", "error"),
    [
        (Plan(num_samplers=1, failing_starts=(("sampler 0", "start", "failed"),) * 3), ActorFailedError),
        (Plan(num_samplers=1, failing_starts=(("sampler 0", "start", "resources"),)), ResourcesError),
        (Plan(num_steps=2, learner=tuple(("optim_step", number, "die") for number in range(4))), LearnerLostError),
    ],
    ids=["no sampler starts", "no room for any", "the learner is lost again and again"],
)
def test_what_cannot_go_on_ends_with_its_error(plan: Plan, error: type[WeaverRLError]):
    with voyage(plan) as ship, pytest.raises(error):
        ship.sail_all()


def test_a_learner_that_is_lost_while_it_comes_back_is_brought_back_again():
    sail(Plan(num_steps=4, learner=(("optim_step", 2, "die"), ("load_state", 0, "die"))))


def test_every_sampler_at_once_without_room_for_one_of_them_for_a_while():
    starts = (("sampler 1", "restart", "resources"),) * 3
    for how in ("die", "hang"):
        sail(Plan(num_steps=6, killed=((40.0, None, how),), failing_starts=starts, seed=3))


# -- stalls ----------------------------------------------------------------------------------------------------------

STALLS: dict[str, tuple[dict[str, Any], float, str]] = {
    "sampler": (
        {"killed": ((20.0, "sampler 0", "hang"),), "longest_s": 100.0, "num_samplers": 1},
        30.0,
        r"learner waits for (the groups of step \d+|the evaluation of .*) ← sampler 0 samples \d+ groups \(\d+ s of",
    ),
    "every sampler lost, one starts": (
        {
            "killed": ((20.0, None, "die"),),
            "num_steps": 30,
            "upsets": (("sampler 0", "restart", "hang"), ("sampler 1", "restart", "hang")),
        },
        20.0,
        r"learner waits for the groups of step \d+ ← sampler \d starts its engine, the last was lost: sampler \d died",
    ),
    "reward worker": (
        {"rewards": ((3, "hang"),), "num_reward_workers": 1},
        0.0,
        r"learner waits for the groups of step 1 ← .*reward worker 0 scores group 0000000\d",
    ),
    "forward_backward": (
        {"learner": (("forward_backward", 1, "hang"),)},
        0.0,
        r"learner waits for the learner's step 2 ← learner rank 0 forward_backward \(\d+ s of 600 s\)",
    ),
    "optim_step": (
        {"learner": (("optim_step", 1, "hang"),)},
        0.0,
        r"learner waits for the learner's step 2 ← learner rank 0 optim_step",
    ),
    "publish_weights": (
        {"learner": (("publish_weights", 1, "hang"),)},
        0.0,
        r"learner waits for samplers to load weights v1 ← learner rank 0 publish_weights",
    ),
    "save_state": (
        {"learner": (("save_state", 0, "hang"),)},
        0.0,
        r"learner waits for the checkpoint of step 1 ← learner rank 0 save_state",
    ),
    "load": (
        {"upsets": (("sampler 1", "load", "hang"),)},
        0.0,
        r"learner waits for samplers to load weights v0 ← sampler 1 loads weights v0 \(\d+ s of 60 s\)",
    ),
    "probe": (
        {"upsets": (("sampler 1", "probe", "hang"),)},
        0.0,
        r"learner waits for samplers to load weights v0 ← sampler 1 answers the probe \(\d+ s of 60 s\)",
    ),
    "save_hf": (
        {"learner": (("save_hf", 0, "hang"),)},
        0.0,
        r"learner waits for the learner to write the final policy ← learner rank 0 save_hf",
    ),
}


@pytest.mark.parametrize("stall", STALLS.values(), ids=STALLS)
def test_a_stall_of_a_run_is_named_within_20_seconds(stall: tuple[dict[str, Any], float, str]):
    changes, after_s, pattern = stall
    plan = Plan(**{"learn_s": 1.0, "longest_s": 2.0, "max_lag": 0} | changes)
    lines: list[str] = []

    async def watched(ship: Voyage) -> None:
        sailing = asyncio.create_task(ship.sail(resume=False, interrupted_at=1000.0))
        since: dict[str, float] = {}
        while not sailing.done():
            await asyncio.sleep(1.0)
            now = asyncio.get_running_loop().time()
            chain = ship.waits.chain() if now >= after_s else None
            if chain is not None and now - since.setdefault(repr(chain.progress[:3]), now) >= 20.0:
                lines.append(chain.line)
                break
        sailing.cancel()
        await asyncio.gather(sailing, return_exceptions=True)

    with voyage(plan) as ship:
        run_virtually(watched(ship))
    assert lines, "nothing stalled"
    assert re.search(pattern, lines[0]), lines[0]
