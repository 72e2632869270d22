"""The audit passes every honest history and names what is wrong with each dishonest one."""

from __future__ import annotations

import asyncio
import io
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import weaver_rl.audit as audit_module
from weaver_rl.audit import audit
from weaver_rl.audit_report import AuditReport, print_audit
from weaver_rl.errors import JournalError
from weaver_rl.journal import FILE_NAME, Journal
from weaver_rl.rollout_files import RecordedRollout, recorded_steps, rollouts_file, truncate_after, write_rollouts
from weaver_rl.run_folder import RunFolder
from weaver_rl.types import Completion, Prompt, RewardComponent, Rollout, ScoredRollout

pytestmark = pytest.mark.unit

SAMPLES_PER_PROMPT = 2


def name(position: int) -> str:
    return f"{position:08d}"


def rollouts_of(position: int, step: int, *, used: bool, phase: str = "train", count: int = SAMPLES_PER_PROMPT):
    completion = Completion(
        token_ids_L=np.array([1], np.int32),
        logprobs_L=np.array([-0.5], np.float32),
        versions_L=np.array([step - 1], np.int32),
        stop_reason="stop",
    )
    prompt = Prompt(prompt_id=f"p-{position}", text="?", token_ids_P=(1,), answer=None, columns={})
    for index in range(count):
        rollout = Rollout(
            rollout_id=f"{name(position)}-{index}",
            prompt=prompt,
            completion=completion,
            text="!",
            sample_index=index,
            seed=0,
        )
        part = RewardComponent(name="task", value=1.0, missing=None, seconds=0.0)
        yield RecordedRollout(
            scored=ScoredRollout(rollout=rollout, components=(part,), reward=1.0),
            step=step,
            sampler="sampler-0",
            group_id=name(position),
            phase=phase,
            importance_weights_L=np.ones(1, np.float32) if used else None,
            dropped=None if used else "reward missing",
        )


class Story:
    """A run as its controller would tell it: to the journal and to the rollout files."""

    def __init__(self, run_dir: Path, *, groups_per_step=2, max_lag=0, first_position=0, first_step=1, last_step=3):
        self.run_dir = run_dir
        self.journal = Journal(run_dir / FILE_NAME)
        self.start = {
            "first_position": first_position,
            "first_step": first_step,
            "last_step": last_step,
            "groups_per_step": groups_per_step,
            "max_lag": max_lag,
        }

    def started(self, resumed=False, **changed: int) -> None:
        self.start |= changed
        self.journal.started(**self.start, resumed=resumed)

    def dispatch(self, *positions: int, version: int) -> None:
        for position in positions:
            self.journal.dispatched(name(position), position=position, prompt_id=f"p-{position}", version=version)

    def generate(self, *positions: int, oldest: int, newest: int | None = None) -> None:
        newest = oldest if newest is None else newest
        for position in positions:
            self.journal.generated(
                name(position), sampler="sampler-0", oldest_version=oldest, newest_version=newest, num_tokens=9
            )

    def score(self, *positions: int) -> None:
        for position in positions:
            self.journal.scored(name(position), num_missing=0)

    def finish(self, *positions: int, version: int) -> None:
        """Everything up to its rewards, all at one version."""
        self.dispatch(*positions, version=version)
        self.generate(*positions, oldest=version)
        self.score(*positions)

    def train(self, step: int, positions: Sequence[int], dropped: Iterable[int] = (), *, write: bool = True) -> None:
        for order, position in enumerate(positions):
            if position in dropped:
                self.journal.dropped(name(position), step=step, reason="every reward is missing")
            else:
                self.journal.trained(name(position), step=step, order=order)
        if write:
            self.write(step, positions, dropped)

    def write(self, step: int, positions: Iterable[int], dropped: Iterable[int] = ()) -> None:
        records = [r for p in positions for r in rollouts_of(p, step, used=p not in dropped)]
        records.extend(rollouts_of(900, step, used=False, phase="eval"))
        write_rollouts(self.run_dir, step, records)

    def rewind(self, step: int, *, finished: Iterable[int] = (), in_flight: Iterable[int] = ()) -> None:
        self.journal.rewound(
            step=step,
            reason="rank 0 is gone",
            finished=[name(p) for p in finished],
            in_flight=[name(p) for p in in_flight],
        )
        truncate_after(self.run_dir, step)

    def audit(self) -> AuditReport:
        self.journal.close()
        return audit(self.run_dir)

    def finished(self) -> AuditReport:
        self.journal.ended(state="finished", reason=None)
        return self.audit()


def three_steps(story: Story, *, until: int = 3) -> None:
    """A synchronous run of two groups a step."""
    story.started()
    for step in range(1, until + 1):
        positions = [2 * step - 2, 2 * step - 1]
        story.finish(*positions, version=step - 1)
        story.train(step, positions)
        story.journal.committed(step=step)


def cut_into_step_3(story: Story) -> None:
    """An asynchronous run with a checkpoint at step 2, cut in step 3; it carried 4 finished, 5 in flight."""
    story.started()
    story.dispatch(0, 1, 2, 3, version=0)
    story.generate(1, 0, oldest=0)
    story.score(0, 1)
    story.train(1, [1, 0])
    story.dispatch(4, 5, version=1)
    story.generate(2, 3, oldest=0, newest=1)
    story.score(3, 2)
    story.train(2, [2, 3])
    story.generate(4, oldest=1, newest=2)
    story.score(4)
    story.journal.committed(step=2)
    story.dispatch(6, 7, version=2)
    story.generate(5, 6, oldest=2)
    story.score(6, 5)
    story.train(3, [4, 6])


def end_after_rewind(story: Story) -> None:
    story.dispatch(5, version=2)
    story.generate(5, oldest=2)
    story.score(5)
    story.train(3, [4, 5])


def set_of(report: AuditReport) -> str:
    return "\n".join(report.violations)


# -- honest histories ----------------------------------------------------------------------------------------------


def test_a_synchronous_run(tmp_path):
    story = Story(tmp_path)
    three_steps(story)
    report = story.finished()
    assert report.violations == ()
    assert report.ok
    assert report == AuditReport(
        violations=(),
        state="finished",
        first_step=1,
        last_step=3,
        num_trained=6,
        dropped={},
        groups_by_lag={0: 6},
        num_in_flight=0,
        num_finished_untrained=0,
        num_checkpoints=3,
        num_rewinds=0,
        num_steps_redone=0,
        num_reissued=0,
        num_steps_compared=3,
    )


def test_an_asynchronous_run_out_of_order_with_a_lost_sampler_and_a_dropped_group(tmp_path):
    story = Story(tmp_path, max_lag=2)
    story.started()
    story.dispatch(0, 1, 2, 3, version=0)
    story.journal.reissued(name(0), sampler="sampler-1", reason="gone")
    story.generate(3, 1, oldest=0)
    story.score(3, 1)
    story.train(1, [3, 1])
    story.generate(0, oldest=0, newest=1)
    story.dispatch(4, 5, version=1)
    story.generate(5, oldest=1)
    story.score(5, 0)
    story.train(2, [5, 0], dropped=[5])
    story.generate(2, oldest=0, newest=2)
    story.generate(4, oldest=1)
    story.score(4, 2)
    story.train(3, [2, 4])
    report = story.finished()
    assert report.violations == ()
    assert report.groups_by_lag == {0: 2, 1: 2, 2: 1}
    assert report.dropped == {"every reward is missing": 1}
    assert (report.num_trained, report.num_reissued) == (5, 1)


def test_a_run_resumed_with_groups_that_the_checkpoint_carried(tmp_path):
    story = Story(tmp_path, max_lag=1)
    cut_into_step_3(story)
    story.started(resumed=True)
    story.rewind(2, finished=[4], in_flight=[5])
    end_after_rewind(story)
    report = story.finished()
    assert report.violations == ()
    assert (report.num_rewinds, report.num_steps_redone, report.num_checkpoints) == (1, 1, 1)
    assert report.num_trained == 6


def test_a_resumed_run_has_not_ended_as_it_had_before(tmp_path):
    story = Story(tmp_path)
    three_steps(story)
    story.journal.ended(state="finished", reason=None)
    story.started(resumed=True, last_step=5)
    story.rewind(3)
    report = story.audit()
    assert report.violations == ()
    assert report.state == "killed"


def test_a_rewind_before_the_start_of_the_process_that_resumes(tmp_path):
    story = Story(tmp_path, max_lag=1)
    cut_into_step_3(story)
    story.rewind(2, finished=[4], in_flight=[5])
    story.started(resumed=True)
    end_after_rewind(story)
    assert story.finished().violations == ()


def test_the_learner_goes_back_twice_and_the_groups_trained_since_are_trained_again(tmp_path):
    story = Story(tmp_path, max_lag=1)
    cut_into_step_3(story)
    for _ in range(2):
        story.rewind(2, finished=[4], in_flight=[5])
        story.dispatch(5, 6, version=2)
        story.generate(5, 6, oldest=2)
        story.score(6, 5)
        story.train(3, [5, 6])
    story.rewind(2, finished=[4], in_flight=[5])
    end_after_rewind(story)
    report = story.finished()
    assert report.violations == ()
    assert (report.num_rewinds, report.num_steps_redone) == (3, 3)


def test_a_warm_start_moves_steps_and_positions(tmp_path):
    story = Story(tmp_path, first_position=40, first_step=11, last_step=12)
    story.journal.noted("learner", "ready")
    story.started()
    story.journal.committed(step=10)
    story.finish(40, 41, version=10)
    story.train(11, [40, 41])
    story.rewind(10)
    story.finish(40, 41, version=10)
    story.train(11, [41, 40])
    story.finish(42, 43, version=11)
    story.train(12, [42, 43])
    report = story.finished()
    assert report.violations == ()
    assert (report.first_step, report.last_step, report.num_trained) == (11, 12, 4)


def test_a_run_that_was_killed_in_its_warm_start_needs_no_rewind(tmp_path):
    story = Story(tmp_path, first_step=4, last_step=4)
    story.started()
    story.journal.committed(step=2)
    story.started(resumed=True)
    story.finish(0, 1, version=3)
    story.train(4, [0, 1])
    assert story.finished().violations == ()


def test_a_resume_may_change_the_size_of_later_batches_and_their_lag(tmp_path):
    story = Story(tmp_path, last_step=2)
    three_steps(story, until=1)
    story.started(resumed=True, groups_per_step=3, max_lag=1)
    story.rewind(1)
    story.finish(2, 3, 4, version=0)
    story.train(2, [2, 3, 4])
    assert story.finished().violations == ()


def test_what_is_in_flight_in_a_run_that_goes_on_is_no_violation(tmp_path):
    with RunFolder(tmp_path).claim():
        story = Story(tmp_path, max_lag=1)
        cut_into_step_3(story)
        report = story.audit()
    assert report.violations == ()
    assert (report.state, report.num_in_flight, report.num_finished_untrained) == ("running", 1, 1)
    assert audit(tmp_path).state == "killed"


def test_rollouts_of_the_newest_steps_may_be_missing_while_a_run_goes_on(tmp_path):
    story = Story(tmp_path)
    three_steps(story)
    for step in (2, 3):
        rollouts_file(tmp_path, step).unlink()
    report = story.audit()
    assert report.violations == ()
    assert report.num_steps_compared == 1


def test_a_run_cut_in_the_middle_of_a_batch_and_rollouts_of_a_step_that_stopped_it(tmp_path):
    story = Story(tmp_path)
    three_steps(story, until=1)
    story.finish(2, 3, version=1)
    story.train(2, [2], write=False)
    story.write(2, [2, 3])
    story.write(3, [4, 5])
    story.journal.ended(state="interrupted", reason="stopped by SIGTERM")
    report = story.audit()
    assert report.violations == ()
    assert report.state == "interrupted"


def test_the_process_killed_right_after_a_rewind(tmp_path):
    story = Story(tmp_path, max_lag=1)
    cut_into_step_3(story)
    story.rewind(2, finished=[4], in_flight=[5])
    report = story.audit()
    assert report.violations == ()
    assert (report.num_in_flight, report.num_finished_untrained, report.last_step) == (1, 1, 2)


def test_a_run_that_goes_back_while_it_is_audited(tmp_path, monkeypatch):
    story = Story(tmp_path, max_lag=1)
    cut_into_step_3(story)
    audited = []

    def recorded_after_a_rewind(run_dir: Path) -> list[int]:
        audited.append(run_dir)
        if len(audited) == 1:
            story.rewind(2, finished=[4], in_flight=[5])
            end_after_rewind(story)
            story.journal.close()
        return recorded_steps(run_dir)

    asyncio.run(story.journal.flush())
    monkeypatch.setattr(audit_module, "recorded_steps", recorded_after_a_rewind)
    report = audit(tmp_path)
    assert report.violations == ()
    assert (report.num_rewinds, len(audited)) == (1, 2)


def test_a_violation_that_a_rewind_undoes_does_not_stand(tmp_path):
    story = Story(tmp_path, max_lag=0, last_step=2)
    three_steps(story, until=1)
    story.finish(2, 3, version=0)
    story.train(2, [2, 3])
    story.rewind(1)
    story.finish(2, 3, version=1)
    story.train(2, [2, 3])
    assert story.finished().violations == ()


# -- rule 1: exactly once ------------------------------------------------------------------------------------------


def test_a_group_trained_in_two_steps(tmp_path):
    story = Story(tmp_path, last_step=2)
    three_steps(story, until=1)
    story.finish(2, version=1)
    story.train(2, [1, 2])
    assert "group 00000001 was consumed twice, at step 1 and at step 2" in story.finished().violations


def test_an_event_written_twice(tmp_path):
    story = Story(tmp_path, last_step=1)
    three_steps(story, until=1)
    story.journal.trained(name(1), step=1, order=1)
    found = set_of(story.finished())
    assert "group 00000001 was consumed twice, at step 1 and at step 1" in found
    assert "step 1 consumed 3 groups instead of 2" in found


def test_a_position_that_was_never_dispatched(tmp_path):
    story = Story(tmp_path, last_step=2)
    three_steps(story, until=1)
    story.finish(2, 4, version=1)
    story.train(2, [2, 4])
    assert story.finished().violations == ("group 00000003 was skipped: never dispatched, though 00000004 was",)


def test_a_position_that_was_in_flight_at_the_checkpoint_and_forgotten(tmp_path):
    story = Story(tmp_path, max_lag=1, last_step=9)
    cut_into_step_3(story)
    story.rewind(2, finished=[4], in_flight=[5])
    story.finish(6, version=2)
    story.train(3, [4, 6])
    (violation,) = story.audit().violations
    assert violation.startswith("group 00000005 was skipped: in flight at the checkpoint and not dispatched again")
    assert violation.endswith("though 00000006 was")


def test_a_group_that_the_checkpoint_forgot(tmp_path):
    story = Story(tmp_path, max_lag=1)
    cut_into_step_3(story)
    story.rewind(2, finished=[4])
    story.finish(6, version=2)
    story.train(3, [4, 6])
    assert story.finished().violations == ("group 00000005 was skipped: never dispatched, though 00000006 was",)


def test_a_group_left_over_when_the_run_finished(tmp_path):
    story = Story(tmp_path)
    three_steps(story)
    story.finish(6, version=3)
    assert story.finished().violations == ("group 00000006 is left over: finished when the run finished",)


def test_a_finished_run_that_lacks_a_step(tmp_path):
    story = Story(tmp_path)
    three_steps(story, until=2)
    assert story.finished().violations == ("the run finished at step 2; its last step is 3",)


def test_a_group_dispatched_again_without_a_rewind(tmp_path):
    story = Story(tmp_path)
    three_steps(story, until=1)
    story.dispatch(1, version=1)
    (violation,) = story.audit().violations
    assert violation == "group 00000001 was dispatched (event 11) when it was consumed at step 1"


def test_a_rewind_that_carries_a_group_which_stays_trained(tmp_path):
    story = Story(tmp_path, max_lag=1)
    cut_into_step_3(story)
    story.rewind(2, finished=[3, 4], in_flight=[5])
    (violation,) = story.audit().violations
    assert violation == "group 00000003 is carried as finished by the checkpoint of step 2, and was consumed at 2"


def test_a_rewind_that_carries_a_group_twice(tmp_path):
    story = Story(tmp_path, max_lag=1)
    cut_into_step_3(story)
    story.rewind(2, finished=[4], in_flight=[4, 5])
    assert story.audit().violations == ("group 00000004 is carried twice by the checkpoint of step 2",)


def test_names_that_are_no_positions_of_the_run(tmp_path):
    story = Story(tmp_path, first_position=40)
    story.started()
    story.journal.scored("000001-0002", num_missing=0)
    story.journal.scored("41", num_missing=0)
    story.dispatch(39, 40, 10**9, version=0)
    story.journal.dispatched(name(41), position=42, prompt_id="p", version=0)
    found = story.audit().violations
    assert [text.split(" ")[1] for text in found] == ["000001-0002", "41", "00000039", "1000000000", "00000041"]
    assert found[0].endswith("is none of this run: names are positions from 00000040 on")
    assert found[4].endswith("was dispatched with the prompt at position 42")


# -- rule 2: whole batches in order --------------------------------------------------------------------------------


def test_a_batch_that_lacks_a_group(tmp_path):
    story = Story(tmp_path)
    three_steps(story, until=1)
    story.finish(2, 3, 4, version=1)
    story.train(2, [2])
    story.train(3, [3, 4])
    assert "step 2 consumed 1 groups instead of 2" in story.audit().violations


def test_the_last_batch_of_a_finished_run_lacks_a_group(tmp_path):
    story = Story(tmp_path)
    three_steps(story, until=2)
    story.finish(4, version=2)
    story.train(3, [4])
    assert story.finished().violations == ("step 3 consumed 1 groups instead of 2",)


def test_the_newest_batch_of_a_run_that_goes_on_has_a_group_too_many(tmp_path):
    story = Story(tmp_path)
    three_steps(story, until=1)
    story.finish(2, 3, 4, version=1)
    story.train(2, [2, 3])
    story.journal.dropped(name(4), step=2, reason="every reward is missing")
    assert story.audit().violations == ("step 2 consumed 3 groups instead of 2",)


def test_a_step_left_out(tmp_path):
    story = Story(tmp_path)
    three_steps(story, until=1)
    story.finish(2, 3, version=1)
    story.train(3, [2, 3])
    assert "step 3 came after step 1" in set_of(story.audit())


def test_a_group_added_to_an_earlier_step(tmp_path):
    story = Story(tmp_path, max_lag=2)
    three_steps(story, until=2)
    story.finish(4, version=0)
    story.train(1, [4], write=False)
    assert "step 1 consumed another group after step 2 had begun" in set_of(story.audit())


def test_places_of_a_batch(tmp_path):
    story = Story(tmp_path)
    story.started()
    story.finish(0, 1, 2, 3, version=0)
    for position, place in ((0, 1), (1, 1)):
        story.journal.trained(name(position), step=1, order=place)
    for position, place in ((2, 0), (3, 2)):
        story.journal.trained(name(position), step=2, order=place)
    found = set_of(story.audit())
    assert "group 00000001 has place 1 in step 1, and so has another" in found
    assert "group 00000003 has place 2 in step 2, of 2 from 0" in found


# -- rule 3: a life in order ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("left_out", "seen"),
    [
        ("dispatched", "group 00000000 was generated (event 2) when it was never dispatched"),
        ("generated", "group 00000000 was scored (event 3) when it was in flight"),
        ("scored", "group 00000000 was trained at step 1 when it was generated"),
    ],
)
def test_an_event_left_out(tmp_path, left_out, seen):
    story = Story(tmp_path, groups_per_step=1, last_step=1)
    story.started()
    if left_out != "dispatched":
        story.dispatch(0, version=0)
    if left_out != "generated":
        story.generate(0, oldest=0)
    if left_out != "scored":
        story.score(0)
    story.train(1, [0])
    assert story.finished().violations == (seen,)


def test_a_group_carried_in_flight_is_not_finished_by_what_came_before_the_rewind(tmp_path):
    story = Story(tmp_path, max_lag=1)
    cut_into_step_3(story)
    story.rewind(2, finished=[4], in_flight=[5])
    story.train(3, [4, 5])
    (violation,) = story.finished().violations
    assert violation == (
        "group 00000005 was trained at step 3 when it was in flight at the checkpoint and not dispatched again"
    )


def test_a_group_carried_as_finished_that_never_was(tmp_path):
    story = Story(tmp_path, max_lag=1, last_step=9)
    cut_into_step_3(story)
    story.rewind(2, finished=[4, 7], in_flight=[5, 8])
    found = set_of(story.audit())
    assert "group 00000007 is carried as finished by the checkpoint of step 2, and never was it" in found
    assert "group 00000008 is carried as in flight by the checkpoint of step 2, and never was it" in found


def test_a_reissue_of_a_group_that_nobody_had(tmp_path):
    story = Story(tmp_path)
    three_steps(story)
    story.journal.reissued(name(5), sampler="sampler-0", reason="gone")
    assert "group 00000005 was reissued (event 29) when it was consumed at step 3" in story.finished().violations


def test_what_the_process_before_had_is_not_taken_up_without_a_rewind(tmp_path):
    story = Story(tmp_path)
    three_steps(story, until=1)
    story.started(resumed=True)
    story.finish(2, 3, version=1)
    (violation,) = story.audit().violations
    assert violation == "event 12: the run was taken up without saying from which checkpoint"


def test_an_earlier_rewind_is_none_of_the_resume(tmp_path):
    story = Story(tmp_path)
    three_steps(story, until=1)
    story.rewind(1)
    story.finish(2, version=1)
    story.started(resumed=True)
    story.finish(3, version=1)
    (violation,) = story.audit().violations
    assert violation == "event 16: the run was taken up without saying from which checkpoint"


# -- rule 4: lag ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("max_lag", "is_wrong"), [(1, True), (2, False)])
def test_a_group_with_a_token_that_is_too_old(tmp_path, max_lag, is_wrong):
    story = Story(tmp_path, max_lag=max_lag)
    three_steps(story, until=2)
    story.dispatch(4, 5, version=0)
    story.generate(4, 5, oldest=0, newest=2)
    story.score(4, 5)
    story.train(3, [4, 5], dropped=[5])
    seen = "group 00000004 was trained at step 3 with tokens of v0: lag 2, max_lag is 1"
    assert story.finished().violations == ((seen,) if is_wrong else ())


def test_a_group_with_tokens_of_a_version_that_was_not_made_yet(tmp_path):
    story = Story(tmp_path, last_step=1)
    story.started()
    story.finish(0, version=0)
    story.finish(1, version=1)
    story.train(1, [0, 1])
    seen = "group 00000001 was trained at step 1 with tokens of v1, which is made later"
    assert story.finished().violations == (seen,)


def test_a_checkpoint_cannot_carry_tokens_of_later_versions(tmp_path):
    story = Story(tmp_path, max_lag=1)
    three_steps(story, until=2)
    story.finish(4, version=2)
    story.rewind(1, finished=[4])
    (violation, *_) = story.audit().violations
    assert violation == (
        "group 00000004 is carried as finished by the checkpoint of step 1 with tokens of v2, which is made later"
    )


# -- rule 5: checkpoints and rewinds -------------------------------------------------------------------------------


def test_a_rewind_to_a_step_that_was_never_trained(tmp_path):
    story = Story(tmp_path)
    three_steps(story, until=2)
    story.rewind(3)
    (violation,) = story.audit().violations
    assert violation.endswith(
        "the run went back to step 3, which the journal does not have as trained (only steps up to 2 are)"
    )


def test_a_rewind_to_a_step_that_lacks_a_group(tmp_path):
    story = Story(tmp_path)
    story.started()
    story.finish(0, 1, version=0)
    story.train(1, [0])
    story.rewind(1, finished=[1])
    assert "went back to step 1, which the journal does not have as trained (with 1 of its 2" in set_of(story.audit())


def test_a_checkpoint_of_a_step_that_was_never_trained(tmp_path):
    story = Story(tmp_path)
    three_steps(story, until=2)
    story.journal.committed(step=3)
    assert "a checkpoint of step 3 was committed, which the journal does not have" in set_of(story.audit())


def test_a_resume_of_another_run(tmp_path):
    story = Story(tmp_path)
    three_steps(story, until=1)
    story.started(resumed=True, first_position=8)
    story.rewind(1)
    assert "began with position 8 at step 1; it began with position 0 at step 1" in set_of(story.audit())


def test_a_run_begun_anew_in_the_journal_of_another(tmp_path):
    story = Story(tmp_path)
    three_steps(story, until=1)
    story.started()
    assert "event 11: a run was begun anew in the journal of another" in story.audit().violations


# -- rule 6: rollout files -----------------------------------------------------------------------------------------


def test_a_group_that_the_rollouts_lack(tmp_path):
    story = Story(tmp_path)
    three_steps(story)
    story.write(2, [2])
    assert story.finished().violations == (
        "step_000002.parquet lacks group 00000003, which the journal consumed at step 2",
    )


def test_a_group_that_the_journal_lacks(tmp_path):
    story = Story(tmp_path)
    three_steps(story)
    story.write(2, [2, 3, 7])
    assert story.finished().violations == (
        "step_000002.parquet has group 00000007, which the journal did not consume at step 2",
    )


def test_one_rollout_of_a_group_missing(tmp_path):
    story = Story(tmp_path)
    three_steps(story)
    write_rollouts(tmp_path, 2, [*rollouts_of(2, 2, used=True), *rollouts_of(3, 2, used=True, count=1)])
    assert story.finished().violations == ("step_000002.parquet has 1 rollouts of group 00000003 and 2 of others",)


@pytest.mark.parametrize(("dropped", "written"), [([], [2]), ([2], [])])
def test_trained_in_one_and_dropped_in_the_other(tmp_path, dropped, written):
    story = Story(tmp_path, last_step=2)
    three_steps(story, until=1)
    story.finish(2, 3, version=1)
    story.train(2, [2, 3], dropped, write=False)
    story.write(2, [2, 3], written)
    (violation,) = story.finished().violations
    assert violation.startswith("step_000002.parquet has group 00000002 as ")


@pytest.mark.parametrize("step", [1, 3])
def test_a_rollout_file_missing(tmp_path, step):
    story = Story(tmp_path)
    three_steps(story)
    rollouts_file(tmp_path, step).unlink()
    assert story.finished().violations == (f"step {step} has no rollout file (step_00000{step}.parquet)",)


def test_an_old_rollout_file_missing_in_a_run_that_goes_on(tmp_path):
    story = Story(tmp_path)
    three_steps(story)
    rollouts_file(tmp_path, 1).unlink()
    assert story.audit().violations == ("step 1 has no rollout file (step_000001.parquet)",)


def test_a_rollout_file_too_many(tmp_path):
    story = Story(tmp_path)
    three_steps(story)
    story.write(4, [6, 7])
    write_rollouts(tmp_path, 5, rollouts_of(900, 5, used=False, phase="eval"))
    assert story.finished().violations == ("step_000004.parquet has groups of a step that the journal did not train",)


def test_rollouts_under_the_name_of_another_step(tmp_path):
    story = Story(tmp_path)
    three_steps(story)
    rollouts_file(tmp_path, 2).write_bytes(rollouts_file(tmp_path, 1).read_bytes())
    assert "step_000002.parquet has rollouts of step 1" in story.finished().violations


def test_a_rollout_file_that_cannot_be_read(tmp_path):
    story = Story(tmp_path)
    three_steps(story)
    rollouts_file(tmp_path, 2).write_bytes(b"PAR1 no more")
    (violation,) = story.finished().violations
    assert violation.startswith("step_000002.parquet cannot be read")


# -- the journal itself --------------------------------------------------------------------------------------------


def test_events_cut_out_of_the_journal(tmp_path):
    story = Story(tmp_path)
    three_steps(story)
    story.journal.ended(state="finished", reason=None)
    story.journal.close()
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as connection, connection:
        connection.execute("DROP TRIGGER events_stay")
        connection.execute("DELETE FROM events WHERE kind = 'committed' AND step = 2")
    assert audit(tmp_path).violations == ("events 19 to 19 are missing from the journal",)


def test_a_journal_without_the_start_of_its_run(tmp_path):
    story = Story(tmp_path)
    story.finish(0, version=0)
    assert story.audit().violations == ("the journal does not begin with the start of a run",)


def test_an_event_that_is_none(tmp_path):
    story = Story(tmp_path)
    story.started()
    story.journal.close()
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as connection, connection:
        connection.execute("INSERT INTO events (time_s, kind) VALUES (0, 'committed')")
    with pytest.raises(JournalError, match=r"event 2 of the journal \(committed\) is not what one is"):
        audit(tmp_path)


def test_no_journal_is_a_clear_error(tmp_path):
    with pytest.raises(JournalError, match="there is no journal at"):
        audit(tmp_path)


# -- the report ----------------------------------------------------------------------------------------------------


def printed(report: AuditReport) -> tuple[int, str]:
    out = io.StringIO()
    status = print_audit(Console(file=out, width=40), report)
    return status, out.getvalue()


def test_a_clean_report_ends_with_0(tmp_path):
    story = Story(tmp_path, last_step=1)
    story.started()
    story.finish(0, 1, version=0)
    story.journal.dropped(name(0), step=1, reason="[bold]no \udcff")
    story.journal.trained(name(1), step=1, order=1)
    story.write(1, [0, 1], dropped=[0])
    status, text = printed(story.finished())
    assert status == 0
    assert "audit      clean: every group exactly once, none skipped" in text
    assert "1 trained, 1 dropped" in text
    assert "1 dropped: [bold]no ?" in text
    assert "0: 1" in text


def test_violations_are_printed_and_end_with_1(tmp_path):
    story = Story(tmp_path)
    three_steps(story, until=2)
    status, text = printed(story.finished())
    assert status == 1
    assert "audit      1 violations\n  the run finished at step 2; its last step is 3\n" in text


def test_a_report_of_very_many_violations_is_bounded(tmp_path):
    story = Story(tmp_path)
    story.started()
    story.dispatch(1500, version=0)
    report = story.audit()
    assert len(report.violations) == 1001
    assert report.violations[-1] == "and 500 more"
    assert printed(report)[1].count("skipped") == 40
