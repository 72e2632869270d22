"""The run on one page: sample, score, learn, sync. It knows neither Ray nor vLLM, only roles.

- `run`           produces a trained policy; waits for each step in turn; unblocked by the step's last await. A learner
                  that is lost sends it back to the newest checkpoint.
- `GroupStream`   produces scored groups, up to `max_lag` steps ahead; waits for samplers and reward workers.
- `_train_step`   produces version v+1; waits for the groups that it must and may train, then for the learner.
- `_learn`        produces an update; waits for the learner; unblocked by its answer. Stops the run, before the update,
                  when learner and sampler disagree about the log-probabilities of what was sampled.
- `_sync_weights` produces samplers that provably use the new version; waits for learner and samplers. With `max_lag`
                  above 0 they are in the middle of other groups then, and go on with these.

A step makes version v+1 from rollouts of versions v - max_lag to v; `max_lag: 0` is synchronous. Step and version count
optimizer updates, those of the warm start included.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from weaver_rl.backlog_file import load_backlog, save_backlog
from weaver_rl.batch import StepBatch, build_batch, require_fresh
from weaver_rl.checkpoints import Checkpoints, load_controller_state, save_controller_state
from weaver_rl.config import RunConfig
from weaver_rl.errors import CheckpointError, JournalError, LearnerLostError
from weaver_rl.evaluation import evaluate
from weaver_rl.group_stream import Backlog, GroupStream
from weaver_rl.journal import Journal
from weaver_rl.learn_step import demonstration_data, learn, next_baseline
from weaver_rl.ledger import REWOUND, STEP
from weaver_rl.losses.config import CrossEntropy
from weaver_rl.metrics import MetricsWriter
from weaver_rl.off_policy import LearnInput
from weaver_rl.records import eval_records, train_records
from weaver_rl.rewards.combine import check_missing
from weaver_rl.roles import LearnerGroup, PromptSource, RewardPool, SamplerPool
from weaver_rl.rollout import group_id_of
from weaver_rl.rollout_files import RecordedRollout, truncate_after, write_rollouts
from weaver_rl.run_folder import RunFolder, ending
from weaver_rl.run_state import RunState
from weaver_rl.spans import now, record, span
from weaver_rl.stage_clock import StageClock
from weaver_rl.step_metrics import eval_metrics, step_metrics
from weaver_rl.terminal import LiveView
from weaver_rl.types import ForwardBackwardOutput, OptimStepOutput, SampleRequest
from weaver_rl.waits import current_waits
from weaver_rl.weights.sync import WeightSync

MAX_LEARNER_LOSSES = 3
"""Losses of the learner without a step between them that go further than before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Crew:
    """Everybody that works on a run."""

    prompts: PromptSource
    samplers: SamplerPool
    rewards: RewardPool
    learner: LearnerGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """How a run ended."""

    state: RunState
    accuracy_before: float | None
    """Held-out accuracy before reinforcement learning (after the warm start, if there is one)."""
    accuracy_after: float | None
    tokens_per_s: float
    """Sampled tokens per second of wall time, over all steps of reinforcement learning."""


class Controller:
    """Runs one configuration to its end with the crew it is given."""

    def __init__(
        self,
        *,
        config: RunConfig,
        crew: Crew,
        sync: WeightSync,
        folder: RunFolder,
        checkpoints: Checkpoints,
        metrics: MetricsWriter,
        journal: Journal,
        view: LiveView,
        on_step: Callable[[int], None] = lambda step: None,
        save_rollouts: Callable[[Path, int, Sequence[RecordedRollout]], Path] = write_rollouts,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._config = config
        self._crew = crew
        self._sync = sync
        self._folder = folder
        self._checkpoints = checkpoints
        self._metrics = metrics
        self._journal = journal
        self._view = view
        self._on_step = on_step
        self._save_rollouts = save_rollouts
        self._now = now
        self._beginning = RunState(prompts_dropped=crew.prompts.num_dropped)
        """What a finite task left out was known before anything was asked of it."""
        self._state = self._beginning
        self._synced: int | None = None
        self._records: list[RecordedRollout] = []
        self._writing: asyncio.Task[Path] | None = None
        self._clock = StageClock(self._now)
        self._warm_steps = config.warm_start.num_steps if config.warm_start else 0
        self._last_step = self._warm_steps + config.num_steps
        self._first_position = self._warm_steps * config.warm_start.prompts_per_step if config.warm_start else 0
        self._stream = GroupStream(
            prompts=crew.prompts,
            samplers=crew.samplers,
            rewards=crew.rewards,
            config=config.rollout,
            specs=config.rewards,
            seed=config.seed,
            last_position=self._first_position + config.num_steps * config.rollout.prompts_per_step,
            events=journal,
            now=now,
        )

    async def run(self, *, resume: bool = False) -> RunSummary:
        """Trains to the end and leaves the policy in the run folder; with `resume`, from the newest checkpoint."""
        try:
            summary = await self._run(resume)
        except BaseException as error:  # boundary: cleans up, then raises again
            state, reason = ending(error)
            if state != "running":
                with contextlib.suppress(JournalError):  # a second failure must not hide the first
                    self._journal.ended(state=state, reason=reason)
            raise
        finally:
            await self._stream.stop()
            # Those of a step that stopped the run are there too: they are the evidence.
            await self._write_records()
            await self._records_written()
        self._journal.ended(state="finished", reason=None)
        await self._journal.flush()
        return summary

    async def _run(self, resume: bool) -> RunSummary:
        self._journal.started(
            first_position=self._first_position,
            first_step=self._warm_steps + 1,
            last_step=self._last_step,
            groups_per_step=self._config.rollout.prompts_per_step,
            max_lag=self._config.rollout.max_lag,
            resumed=resume,
        )
        num_losses, lost_at = 0, -1
        lost: LearnerLostError | None = None
        while True:
            try:
                if lost is not None:
                    await self._restart_learner(lost)
                elif resume and not await self._restore("resumed"):
                    raise CheckpointError(
                        f"{self._folder.checkpoints} holds no usable checkpoint to resume from; start again with "
                        "--overwrite"
                    )
                await self._train()
                return self._summary()
            except LearnerLostError as error:
                num_losses = num_losses + 1 if self._state.step <= lost_at else 1
                lost_at = max(lost_at, self._state.step)
                if num_losses > MAX_LEARNER_LOSSES:
                    raise
                lost = error

    async def _train(self) -> None:
        """From where the state stands to the end."""
        if self._state.step < self._warm_steps:
            self._view.phase("warm_start", self._warm_steps)
            while self._state.step < self._warm_steps:
                await self._warm_start_step()
        if self._state.step < self._last_step:
            self._view.phase("train", self._config.num_steps, offset=self._warm_steps)
            if self._state.step == self._warm_steps:
                await self._stream.restore(self._state.backlog(), self._state.step)
            if self._synced != self._state.step:
                await self._sync_weights()
            if self._state.step == 0:
                self._metrics.write(0, "train", await self._evaluate())
                await self._write_records()
            while self._state.step < self._last_step:
                await self._train_step()
        with self._waiting("the learner to write the final policy"):
            await self._crew.learner.save_hf(self._folder.policy)
        if not (self._folder.policy / "config.json").is_file():
            raise CheckpointError(
                f"the learner wrote the policy to {self._folder.policy}, and it is not there: learner and this process "
                "see different file systems; give a run_dir that both see and --resume"
            )

    async def _restart_learner(self, error: LearnerLostError) -> None:
        self._view.note(f"the learner is lost ({error}); it starts anew from the newest checkpoint")
        self._journal.noted("learner", "lost", reason=str(error), step=self._state.step)
        await self._stream.stop()
        self._records = []
        await self._records_written()
        self._sync.forget()
        with self._waiting("the learner to start anew"):
            await self._crew.learner.restart()
        self._clock = StageClock(self._now)
        if not await self._restore("the learner was lost"):
            await self._go_back(self._beginning, Backlog(position=0, in_flight=()), "the learner was lost")
            self._view.note("no checkpoint yet: the run starts from its beginning")

    # -- steps ---------------------------------------------------------------------------------------------------

    async def _warm_start_step(self) -> None:
        warm = self._config.warm_start
        assert warm is not None
        state, clock = self._state, self._clock
        num_dropped = self._crew.prompts.num_dropped
        with span("controller/prompts"):
            data = demonstration_data(self._config, state.step + 1, self._crew.prompts)
        with clock.stage("learn"), self._waiting("the learner"):
            learned = await self._crew.learner.forward_backward(data, CrossEntropy(name="cross_entropy"))
            update = await self._crew.learner.optim_step(warm.adam_params_at(state.step, self._config.learner))
        self._state = replace(
            state,
            step=state.step + 1,
            position=(state.step + 1) * warm.prompts_per_step,
            prompts_dropped=state.prompts_dropped + self._crew.prompts.num_dropped - num_dropped,
        )
        metrics = self._update_metrics(learned, update, self._state.step)
        is_last = self._state.step == self._warm_steps
        if is_last:
            metrics |= await self._sync_weights()
            metrics |= await self._evaluate()
        metrics["tokens_per_s"] = learned.num_tokens / clock.elapsed()
        every = self._config.checkpoint.every
        due = every > 0 and self._state.step % every == 0
        await self._finish_step("warm_start", metrics, checkpoint=is_last or due)

    async def _train_step(self) -> None:
        state, step = self._state, self._state.step + 1
        with span("controller/prompts"):
            self._stream.admit(state.step)
        self._view.waiting("the samplers and rewards")
        groups = await self._stream.take(step, self._clock)
        self._view.waiting(None)
        require_fresh(groups, state.step, self._config.rollout.max_lag)
        batch = build_batch(groups, self._config.advantage, state.baseline or 0.0)
        self._records.extend(train_records(batch, step, None))
        check_missing([e.scored for e in batch.entries], self._config.reward_workers.max_missing_fraction)
        learned_metrics = await self._learn(batch)
        self._record_consumed(batch, step)
        self._state = replace(
            state,
            step=step,
            baseline=next_baseline(batch, self._config.advantage, state.baseline),
            sampled_tokens=state.sampled_tokens
            + sum(len(e.scored.rollout.completion.token_ids_L) for e in batch.entries),
        ).with_backlog(self._stream.backlog())
        metrics = step_metrics(batch, state.step) | learned_metrics | await self._sync_weights()
        if self._is_due(self._config.eval.every):
            metrics |= await self._evaluate()
        metrics["data/prompts_dropped"] = self._state.prompts_dropped
        metrics |= self._stream.metrics()
        elapsed = self._clock.elapsed()
        self._state = replace(self._state, train_seconds=self._state.train_seconds + elapsed)
        metrics["tokens_per_s"] = metrics["sampler/num_tokens"] / elapsed
        if seconds := self._stream.sampling_seconds():
            metrics["sampler/tokens_per_s"] = metrics["sampler/num_tokens"] / seconds
        await self._finish_step("train", metrics, checkpoint=self._is_due(self._config.checkpoint.every))

    # -- stages --------------------------------------------------------------------------------------------------

    async def _learn(self, batch: StepBatch) -> dict[str, float]:
        step = self._state.step + 1

        def keep_records(learn_input: LearnInput) -> None:
            self._records = train_records(batch, step, learn_input)

        with self._clock.stage("learn"), self._waiting(f"the learner's step {step}"):
            learned = await learn(
                batch,
                version=self._state.step,
                rl_step=self._state.step - self._warm_steps,
                learner=self._crew.learner,
                config=self._config,
                on_input=keep_records,
            )
        if learned is None:
            self._view.note(f"step {step}: every group was dropped; nothing to learn from")
            return {}
        return self._update_metrics(learned.output, learned.update, step) | learned.metrics

    async def _sync_weights(self) -> dict[str, float]:
        with self._clock.stage("sync"), self._waiting(f"samplers to load weights v{self._state.step}"):
            report = await self._sync(self._state.step)
        self._synced = self._state.step
        for sampler in (*report.resynced, *report.unproven):
            self._stream.distrust(sampler, report.version)
        for sampler in report.resynced:
            self._view.note(f"{sampler} kept older weights at v{report.version}; it was sent them again")
        for sampler in report.replaced:
            num = self._stream.distrust(sampler, report.version)
            self._view.note(f"{sampler} did not take weights v{report.version}; replaced, {num} groups sampled again")
        metrics = {"sync/num_bytes": report.num_bytes, "sync/resyncs": len(report.resynced)}
        return metrics | ({} if report.probe_max_abs is None else {"sync/probe_max_abs": report.probe_max_abs})

    async def _evaluate(self) -> dict[str, float]:
        config = self._config
        prompts = self._crew.prompts.eval_prompts(config.eval.num_prompts)
        requests = [
            SampleRequest(group_id=f"eval-{self._state.step:06d}-{i:04d}", token_ids_P=p.token_ids_P, seeds_G=(0,))
            for i, p in enumerate(prompts)
        ]
        with self._clock.stage("eval"), self._waiting(f"the evaluation of {len(requests)} held-out prompts"):
            groups = await self._stream.sample_aside(prompts, requests, config.rollout.sampling.greedy())
        result = evaluate([g.scored_G[0] for g in groups], config.deciding_reward, config.eval.success_at)
        self._records.extend(eval_records(groups, self._state.step))
        if result.accuracy is None:
            self._view.note(f"step {self._state.step}: no held-out completion has a reward; accuracy was not measured")
        else:
            self._state = self._state.with_accuracy(result.accuracy)
            self._view.evaluation(result.accuracy, self._state.step)
        return eval_metrics(result, groups)

    # -- bookkeeping ---------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _waiting(self, what: str) -> Iterator[None]:
        self._view.waiting(what)
        with current_waits().waiting("learner", what, root=True):
            yield
        self._view.waiting(None)

    def _record_consumed(self, batch: StepBatch, step: int) -> None:
        by_group: dict[str, list[str | None]] = {}
        for entry in batch.entries:
            by_group.setdefault(entry.datum_id.rpartition("-")[0], []).append(entry.dropped)
        for order, (group_id, dropped) in enumerate(by_group.items()):
            if None in dropped:
                self._journal.trained(group_id, step=step, order=order)
            else:
                self._journal.dropped(group_id, step=step, reason=dropped[0] or "")

    def _update_metrics(
        self, learned: ForwardBackwardOutput, update: OptimStepOutput, version: int
    ) -> dict[str, float]:
        return {
            "loss": learned.loss,
            "loss/sum_weights": learned.sum_weights,
            "grad_norm": update.grad_norm,
            "learning_rate": update.learning_rate,
            "learner/num_tokens": learned.num_tokens,
            "learner/num_microbatches": learned.metrics["num_microbatches"],
            "learner/tokens_per_s": learned.num_tokens / self._clock.seconds("learn"),
            "weights/version": version,
        }

    async def _finish_step(self, phase: str, metrics: dict[str, float], *, checkpoint: bool) -> None:
        """Records the step; a checkpoint's time shows in the next step, its line must be there before it."""
        metrics |= self._clock.metrics()
        step, end_s = self._state.step, now()
        record(STEP, end_s - metrics["seconds/step"], end_s, track="steps", step=step, phase=phase)
        self._metrics.write(step, "warm_start" if phase == "warm_start" else "train", metrics)
        self._on_step(step)
        self._clock = StageClock(self._now)
        await self._write_records()
        if checkpoint:
            await self._records_written()
            with self._clock.stage("checkpoint"), self._waiting(f"the checkpoint of step {step}"):
                await self._checkpoint(step)
        self._view.step(step, metrics)

    async def _checkpoint(self, step: int) -> None:
        # What it relies on is on disk before it: a journal without the steps of a checkpoint could prove nothing.
        backlog = self._stream.backlog() if step > self._warm_steps else self._state.backlog()
        self._state = self._state.with_backlog(backlog)
        await self._journal.flush()
        async with self._checkpoints.written(step) as directory:
            await self._crew.learner.save_state(directory)
            await asyncio.to_thread(save_backlog, directory, backlog)
            save_controller_state(directory, self._state.to_json())
        self._journal.committed(step=step)
        await self._journal.flush()

    async def _restore(self, why: str) -> bool:
        """Goes back to the newest checkpoint that is whole; False when there is none."""
        directory = await asyncio.to_thread(self._checkpoints.latest)
        if directory is None:
            return False
        state = RunState.from_json(load_controller_state(directory))
        backlog = load_backlog(directory, state.backlog())
        with self._waiting(f"the learner to load {directory.name}"):
            await self._crew.learner.load_state(directory)
        await self._go_back(state, backlog, why)
        self._view.note(f"{why}: continues from {directory.name}")
        return True

    async def _go_back(self, state: RunState, backlog: Backlog, why: str) -> None:
        """Undoes every step after the state."""
        self._state, self._synced = state, None
        await self._stream.restore(backlog, state.step)
        left = self._stream.backlog()
        self._journal.rewound(
            step=state.step,
            reason=why,
            finished=[group.group_id for group in left.finished],
            in_flight=[group_id_of(position) for position in left.in_flight],
        )
        await self._journal.flush()
        self._checkpoints.truncate_after(state.step)
        self._metrics.truncate_after(state.step or -1)  # at its beginning a run is evaluated again
        truncate_after(self._folder.path, state.step)
        record(REWOUND, now(), now(), track="steps", step=state.step)

    async def _write_records(self) -> None:
        """Starts writing the rollouts of this step; that goes on while the next step is sampled, never further."""
        await self._records_written()
        if self._records:
            writing = span("controller/write_rollouts", rollouts=len(self._records))(self._save_rollouts)
            write = asyncio.to_thread(writing, self._folder.path, self._records[0].step, self._records)
            self._writing = asyncio.create_task(write)
            self._records = []

    async def _records_written(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            with self._clock.stage("wait"), self._waiting("the rollouts to be written"):
                await writing

    def _is_due(self, every: int) -> bool:
        done = self._state.step - self._warm_steps
        return self._state.step == self._last_step or (every > 0 and done % every == 0)

    def _summary(self) -> RunSummary:
        accuracies = self._state.accuracies
        seconds = self._state.train_seconds
        return RunSummary(
            state=self._state,
            accuracy_before=accuracies.get(str(self._warm_steps)),
            accuracy_after=accuracies.get(str(self._last_step)),
            tokens_per_s=self._state.sampled_tokens / seconds if seconds else 0.0,
        )
