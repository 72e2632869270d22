"""The run on one page: sample, score, learn, sync, in this order. It knows neither Ray nor vLLM, only roles.

- `run`           produces a trained policy; waits for each step in turn; unblocked by the step's last await.
- `_roll_out`     produces scored groups; waits for samplers and reward workers; unblocked by the slowest completion
                  and its rewards. Scoring of a group starts when it arrives, while others are still being sampled.
- `_learn`        produces an update; waits for the learner; unblocked by its answer. Stops the run, before the update,
                  when learner and sampler disagree about the log-probabilities of what was sampled.
- `_sync_weights` produces samplers that provably use the new version; waits for learner and samplers.

A step makes version v+1 from rollouts of version v (`max_lag: 0`). Step and version count optimizer updates, those of
the warm start included.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from weaver_rl.advantages import Reinforce
from weaver_rl.batch import ScoredGroup, StepBatch, build_batch, require_fresh, sequence_datum
from weaver_rl.checkpoints import Checkpoints, load_controller_state, save_controller_state
from weaver_rl.config import RunConfig
from weaver_rl.errors import CheckpointError
from weaver_rl.evaluation import EvalResult, evaluate
from weaver_rl.losses.config import CrossEntropy
from weaver_rl.metrics import MetricsWriter
from weaver_rl.off_policy import LearnInput, correct, gap_metrics, require_small_gap
from weaver_rl.records import eval_records, train_records
from weaver_rl.rewards.combine import check_missing, combine
from weaver_rl.roles import LearnerGroup, PromptSource, RewardPool, SamplerPool
from weaver_rl.rollout import SamplingConfig, completion_seed
from weaver_rl.rollout_files import RecordedRollout, truncate_after, write_rollouts
from weaver_rl.run_folder import RunFolder
from weaver_rl.run_state import RunState
from weaver_rl.stage_clock import StageClock
from weaver_rl.step_metrics import step_metrics
from weaver_rl.summation import mean
from weaver_rl.terminal import LiveView
from weaver_rl.types import ForwardBackwardOutput, GroupSample, OptimStepOutput, Prompt, Rollout, SampleRequest
from weaver_rl.weights.sync import WeightSync


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
        view: LiveView,
        on_step: Callable[[int], None] = lambda step: None,
    ) -> None:
        self._config = config
        self._crew = crew
        self._sync = sync
        self._folder = folder
        self._checkpoints = checkpoints
        self._metrics = metrics
        self._view = view
        self._on_step = on_step
        self._state = RunState()
        self._records: list[RecordedRollout] = []
        self._writing: asyncio.Task[Path] | None = None
        self._prompts_dropped_before = 0
        """By the processes that this one resumed from; the source of prompts counts anew."""
        self._clock = StageClock()
        self._warm_steps = config.warm_start.num_steps if config.warm_start else 0
        self._last_step = self._warm_steps + config.num_steps

    async def run(self, *, resume: bool = False) -> RunSummary:
        """Trains to the end and leaves the policy in the run folder; with `resume`, from the newest checkpoint."""
        try:
            return await self._run(resume)
        finally:
            # Those of a step that stopped the run are there too: they are the evidence.
            await self._write_records()
            await self._records_written()

    async def _run(self, resume: bool) -> RunSummary:
        if resume:
            await self._restore()
        if self._state.step < self._warm_steps:
            self._view.phase("warm_start", self._warm_steps)
            while self._state.step < self._warm_steps:
                await self._warm_start_step()
        if self._state.step < self._last_step:
            self._view.phase("train", self._config.num_steps, offset=self._warm_steps)
            if resume or self._warm_steps == 0:
                await self._sync_weights()
            if self._state.step == 0:
                await self._evaluate()
                await self._write_records()
            while self._state.step < self._last_step:
                await self._train_step()
        self._view.waiting("the learner to write the final policy")
        await self._crew.learner.save_hf(self._folder.policy)
        if not (self._folder.policy / "config.json").is_file():
            raise CheckpointError(
                f"the learner wrote the policy to {self._folder.policy}, and it is not there: learner and this process "
                "see different file systems; give a run_dir that both see and --resume"
            )
        return self._summary()

    # -- steps ---------------------------------------------------------------------------------------------------

    async def _warm_start_step(self) -> None:
        warm = self._config.warm_start
        assert warm is not None
        state, clock = self._state, self._clock
        first = state.position
        pairs = [self._crew.prompts.demonstration(first + i) for i in range(warm.prompts_per_step)]
        data = [
            sequence_datum(f"{state.step + 1:06d}-{i:04d}", prompt.token_ids_P, completion)
            for i, (prompt, completion) in enumerate(pairs)
        ]
        with clock.stage("learn"):
            learned = await self._crew.learner.forward_backward(data, CrossEntropy(name="cross_entropy"))
            update = await self._crew.learner.optim_step(warm.adam_params_at(state.step, self._config.learner))
        self._state = replace(
            state,
            step=state.step + 1,
            position=first + len(pairs),
            prompts_dropped=self._prompts_dropped_before + self._crew.prompts.num_dropped,
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
        state = self._state
        groups = await self._roll_out(state)
        require_fresh(groups, state.step, self._config.rollout.max_lag)
        batch = build_batch(groups, self._config.advantage, state.baseline or 0.0)
        self._records.extend(train_records(batch, state.step + 1, None))
        check_missing([e.scored for e in batch.entries], self._config.reward_workers.max_missing_fraction)
        learned_metrics = await self._learn(batch, state)
        self._state = replace(
            state,
            step=state.step + 1,
            position=state.position + len(groups),
            prompts_dropped=self._prompts_dropped_before + self._crew.prompts.num_dropped,
            baseline=self._next_baseline(batch),
            sampled_tokens=state.sampled_tokens
            + sum(len(e.scored.rollout.completion.token_ids_L) for e in batch.entries),
        )
        metrics = step_metrics(batch, state.step) | learned_metrics | await self._sync_weights()
        if self._is_due(self._config.eval.every):
            metrics |= await self._evaluate()
        metrics["data/prompts_dropped"] = self._state.prompts_dropped
        elapsed = self._clock.elapsed()
        self._state = replace(self._state, train_seconds=self._state.train_seconds + elapsed)
        metrics["tokens_per_s"] = metrics["sampler/num_tokens"] / elapsed
        metrics["sampler/tokens_per_s"] = metrics["sampler/num_tokens"] / self._clock.seconds("sample")
        await self._finish_step("train", metrics, checkpoint=self._is_due(self._config.checkpoint.every))

    # -- stages --------------------------------------------------------------------------------------------------

    async def _roll_out(self, state: RunState) -> list[ScoredGroup]:
        rollout = self._config.rollout
        prompts = [self._crew.prompts.prompt(state.position + i) for i in range(rollout.prompts_per_step)]
        requests = [
            SampleRequest(
                group_id=f"{state.step + 1:06d}-{slot:04d}",
                token_ids_P=prompt.token_ids_P,
                seeds_G=tuple(
                    completion_seed(self._config.seed, f"{slot}/{prompt.prompt_id}", state.step, index)
                    for index in range(rollout.samples_per_prompt)
                ),
            )
            for slot, prompt in enumerate(prompts)
        ]
        return await self._sample_and_score(prompts, requests, rollout.sampling)

    async def _sample_and_score(
        self, prompts: Sequence[Prompt], requests: Sequence[SampleRequest], sampling: SamplingConfig, stage: str = ""
    ) -> list[ScoredGroup]:
        """Scores each group as it arrives; the result is in the order of the requests."""
        asked = {request.group_id: (prompt, request) for prompt, request in zip(prompts, requests, strict=True)}
        scoring: dict[str, asyncio.Task[ScoredGroup]] = {}
        async with asyncio.TaskGroup() as tasks:
            with self._clock.stage(stage or "sample"):
                self._view.waiting(f"{len(requests)} groups from the samplers")
                async for sample in self._crew.samplers.generate(requests, sampling):
                    work = self._score(sample, *asked[sample.group_id])
                    scoring[sample.group_id] = tasks.create_task(work)
            with self._clock.stage(stage or "score"):
                self._view.waiting("the last rewards")
                groups = [await scoring[request.group_id] for request in requests]
        self._view.waiting(None)
        return groups

    async def _score(self, sample: GroupSample, prompt: Prompt, request: SampleRequest) -> ScoredGroup:
        rollouts = [
            Rollout(
                rollout_id=f"{sample.group_id}-{index:03d}",
                prompt=prompt,
                completion=completion,
                text=self._crew.prompts.decode(completion.token_ids_L.tolist()),
                sample_index=index,
                seed=seed,
            )
            for index, (completion, seed) in enumerate(zip(sample.completions_G, request.seeds_G, strict=True))
        ]
        components = await self._crew.rewards.score(rollouts)
        scored = tuple(
            combine(rollout, found, self._config.rewards) for rollout, found in zip(rollouts, components, strict=True)
        )
        return ScoredGroup(group_id=sample.group_id, sampler=sample.sampler, scored_G=scored)

    async def _learn(self, batch: StepBatch, state: RunState) -> dict[str, float]:
        config = self._config
        temperature = config.rollout.sampling.temperature
        learn_input = LearnInput.of(batch)
        if not learn_input.entries:
            self._view.note(f"step {state.step + 1}: every group was dropped; nothing to learn from")
            return {}
        with self._clock.stage("learn"):
            self._view.waiting("the learner")
            if config.correction.name != "none":
                before = await self._crew.learner.forward(learn_input.data(), temperature)
                learn_input = correct(learn_input, before, config.correction)
            learned = await self._crew.learner.forward_backward(
                learn_input.data(), config.loss, temperature, learn_input.sum_weights
            )
            learn_input = learn_input.with_learner_logprobs(learned.logprobs_per_datum)
            self._records = train_records(batch, state.step + 1, learn_input)
            gap = learn_input.gap()
            require_small_gap(gap, config)
            adam = config.learner.adam_params_at(state.step - self._warm_steps, config.num_steps)
            update = await self._crew.learner.optim_step(adam)
        metrics = self._update_metrics(learned, update, state.step + 1)
        return metrics | gap_metrics(gap) | learn_input.importance_metrics(config.loss, config.correction)

    async def _sync_weights(self) -> dict[str, float]:
        with self._clock.stage("sync"):
            self._view.waiting(f"samplers to load weights v{self._state.step}")
            report = await self._sync(self._state.step)
        for sampler in report.resynced:
            self._view.note(f"{sampler} kept older weights at v{report.version}; it was sent them again and agrees now")
        return {
            "sync/probe_max_abs": report.probe_max_abs,
            "sync/num_bytes": report.num_bytes,
            "sync/resyncs": len(report.resynced),
        }

    async def _evaluate(self) -> dict[str, float]:
        config = self._config
        prompts = self._crew.prompts.eval_prompts(config.eval.num_prompts)
        requests = [
            SampleRequest(group_id=f"eval-{self._state.step:06d}-{i:04d}", token_ids_P=p.token_ids_P, seeds_G=(0,))
            for i, p in enumerate(prompts)
        ]
        groups = await self._sample_and_score(prompts, requests, config.rollout.sampling.greedy(), stage="eval")
        result = evaluate([g.scored_G[0] for g in groups], config.deciding_reward, config.eval.success_at)
        self._records.extend(eval_records(groups, self._state.step))
        if result.accuracy is None:
            self._view.note(f"step {self._state.step}: no held-out completion has a reward; accuracy was not measured")
        else:
            self._state = self._state.with_accuracy(result.accuracy)
            self._view.evaluation(result.accuracy, self._state.step)
        return _eval_metrics(result, groups)

    # -- bookkeeping ---------------------------------------------------------------------------------------------

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
        step = self._state.step
        self._metrics.write(step, "warm_start" if phase == "warm_start" else "train", metrics)
        self._on_step(step)
        self._clock = StageClock()
        await self._write_records()
        if checkpoint:
            self._view.waiting(f"checkpoint of step {step}")
            await self._records_written()
            with self._clock.stage("checkpoint"), self._checkpoints.writing(step) as directory:
                await self._crew.learner.save_state(directory)
                save_controller_state(directory, self._state.to_json())
        self._view.step(step, metrics)

    async def _restore(self) -> None:
        directory = self._checkpoints.latest()
        if directory is None:
            raise CheckpointError(
                f"{self._folder.checkpoints} holds no usable checkpoint to resume from; start again with --overwrite"
            )
        self._state = RunState.from_json(load_controller_state(directory))
        # Nothing was asked of the prompts yet: what they count now, they counted at the start of the first process too.
        self._prompts_dropped_before = self._state.prompts_dropped - self._crew.prompts.num_dropped
        await self._crew.learner.load_state(directory)
        self._checkpoints.truncate_after(self._state.step)
        self._metrics.truncate_after(self._state.step)
        truncate_after(self._folder.path, self._state.step)
        self._view.note(f"resumed from {directory.name}")

    async def _write_records(self) -> None:
        """Starts writing the rollouts of this step; that goes on while the next step is sampled, never further."""
        await self._records_written()
        if self._records:
            write = asyncio.to_thread(write_rollouts, self._folder.path, self._records[0].step, self._records)
            self._writing = asyncio.create_task(write)
            self._records = []

    async def _records_written(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            with self._clock.stage("wait"):
                await writing

    def _next_baseline(self, batch: StepBatch) -> float | None:
        rewards = batch.rewards()
        if not isinstance(self._config.advantage, Reinforce) or len(rewards) == 0:
            return self._state.baseline
        return self._config.advantage.next_baseline(self._state.baseline, mean(rewards))

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


def _eval_metrics(result: EvalResult, groups: Sequence[ScoredGroup]) -> dict[str, float]:
    scored = [group.scored_G[0] for group in groups]
    rewards = [s.reward for s in scored if s.reward is not None]
    metrics = {
        "eval/num_prompts": float(len(scored)),
        "eval/missing_fraction": result.num_missing / len(scored),
        "eval/length_mean": sum(len(s.rollout.completion.token_ids_L) for s in scored) / len(scored),
    }
    if result.accuracy is not None:
        metrics["eval/accuracy"] = result.accuracy
    return metrics | ({"eval/reward_mean": sum(rewards) / len(rewards)} if rewards else {})
