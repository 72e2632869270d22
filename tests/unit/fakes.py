"""Named fakes of the roles of a run: deterministic, and each writes what it was asked into one shared list.

The fake policy is one number, theta. Sampler and learner compute log-probabilities with the same function of it, so
they agree exactly when the sampler has the learner's theta, and every update depends on everything that was sampled.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from weaver_rl.config import RunConfig
from weaver_rl.rollout import SamplingConfig
from weaver_rl.types import (
    AdamParams,
    Completion,
    Datum,
    ForwardBackwardOutput,
    ForwardOutput,
    GroupSample,
    OptimStepOutput,
    Prompt,
    PublishedWeights,
    RewardComponent,
    Rollout,
    SampleRequest,
    ScoredRollout,
)

VOCAB = 12
EOS = 11
Calls = list[tuple[Any, ...]]


def fake_logprob(theta: float, previous: int, token: int) -> float:
    """A smooth function of theta, different for every pair of tokens, always below 0."""
    return -1.5 + float(np.cos(theta * (1 + previous) + 0.7 * token))


def fake_draw(*parts: Any, below: int) -> int:
    """A number in [0, below) that depends on the parts alone."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") % below


def make_config(**changes: Any) -> RunConfig:
    """A small whole run: warm start, reinforcement learning, evaluation, checkpoints."""
    values: dict[str, Any] = {
        "name": "fake",
        "model": {"name": "scratch"},
        "task": {"name": "reasoning_gym", "dataset": "chain_sum"},
        "warm_start": {"num_steps": 2, "prompts_per_step": 3},
        "num_steps": 4,
        "rollout": {"prompts_per_step": 3, "samples_per_prompt": 4, "sampling": {"max_tokens": 5}},
        "rewards": [{"name": "task"}],
        "reward_workers": {"max_missing_fraction": 0.25},
        "learner": {"learning_rate": 0.01},
        "eval": {"every": 2, "num_prompts": 5},
        "checkpoint": {"every": 1, "keep": 20},
    }
    return RunConfig.model_validate(values | changes)


def make_completion(tokens: Sequence[int] = (5, EOS), *, logprobs: Sequence[float] | None = None, version: int = 0):
    """A finished completion."""
    return Completion(
        token_ids_L=np.array(tokens, np.int32),
        logprobs_L=np.array([-1.0] * len(tokens) if logprobs is None else logprobs, np.float32),
        versions_L=np.full(len(tokens), version, np.int32),
        stop_reason="stop",
    )


def make_scored(
    rollout_id: str,
    reward: float | None,
    *,
    prompt_tokens: Sequence[int] = (1, 2, 3),
    completion: Completion | None = None,
    index: int = 0,
    component: str = "task",
) -> ScoredRollout:
    """A rollout with one reward component of weight 1."""
    prompt = Prompt(prompt_id="p", text="p", token_ids_P=tuple(prompt_tokens))
    rollout = Rollout(
        rollout_id=rollout_id,
        prompt=prompt,
        completion=completion or make_completion(),
        text="t",
        sample_index=index,
    )
    part = RewardComponent(name=component, value=reward, missing="raised KeyError: 'x'" if reward is None else None)
    return ScoredRollout(rollout=rollout, components=(part,), reward=reward)


class FakePrompts:
    """An endless stream of two-token prompts, none of which is too long."""

    def __init__(self) -> None:
        self.num_dropped = 0

    def prompt(self, index: int) -> Prompt:
        return Prompt(prompt_id=f"train-{index}", text=f"problem {index}", token_ids_P=(1, 2 + index % 7))

    def demonstration(self, index: int) -> tuple[Prompt, tuple[int, ...]]:
        return self.prompt(index), (3 + index % 5, EOS)

    def eval_prompts(self, num: int) -> Sequence[Prompt]:
        return [Prompt(prompt_id=f"eval-{i}", text=f"held out {i}", token_ids_P=(0, 2 + i % 7)) for i in range(num)]

    def decode(self, token_ids: Sequence[int]) -> str:
        return " ".join(str(token) for token in token_ids if token != EOS)


class FakeLongPrompts(FakePrompts):
    """Before every third position one prompt was too long."""

    def prompt(self, index: int) -> Prompt:
        self.num_dropped += index % 3 == 0
        return super().prompt(index)


@dataclass
class FakeLearner:
    """One theta, moved by what it is trained on. `theta` and `steps` are all its state."""

    calls: Calls = field(default_factory=list)
    theta: float = 0.3
    steps: int = 0
    gradient: float = 0.0
    fail_at_step: int | None = None
    """Raises in the `optim_step` after this many steps, once: an interruption."""

    def _logprobs(self, data: Sequence[Datum]) -> tuple[np.ndarray[Any, Any], ...]:
        return tuple(
            np.array(
                [
                    fake_logprob(self.theta, int(previous), int(target))
                    for previous, target in zip(d.token_ids_N, d.loss_fn_inputs["target_tokens"], strict=True)
                ],
                np.float32,
            )
            for d in data
        )

    async def forward(self, data: Sequence[Datum], temperature: float = 1.0) -> ForwardOutput:
        self.calls.append(("forward", tuple(d.datum_id for d in data), temperature))
        await asyncio.sleep(0)
        return ForwardOutput(logprobs_per_datum=self._logprobs(data))

    async def forward_backward(
        self, data: Sequence[Datum], loss: Any, temperature: float = 1.0, sum_weights: float | None = None
    ) -> ForwardBackwardOutput:
        logprobs = self._logprobs(data)
        weighted = [
            d.loss_fn_inputs["weights"] * d.loss_fn_inputs.get("importance_weights", np.ones(len(d.token_ids_N)))
            for d in data
        ]
        self.gradient += float(sum((w * p).sum() for w, p in zip(weighted, logprobs, strict=True)))
        self.calls.append(("forward_backward", loss.name, tuple(d.datum_id for d in data), self.gradient, temperature))
        await asyncio.sleep(0)
        if sum_weights is None:
            sum_weights = float(sum(d.loss_fn_inputs["weights"].sum() for d in data))
        return ForwardBackwardOutput(
            loss=-self.gradient / sum_weights,
            num_tokens=sum(len(d.token_ids_N) for d in data),
            sum_weights=sum_weights,
            logprobs_per_datum=logprobs,
            metrics={"num_microbatches": 1.0},
        )

    async def optim_step(self, params: AdamParams) -> OptimStepOutput:
        await asyncio.sleep(0)
        if self.fail_at_step == self.steps:
            self.fail_at_step = None
            raise KeyboardInterrupt("SIGINT")
        self.calls.append(("optim_step", params.learning_rate))
        self.steps += 1
        self.theta += params.learning_rate * float(np.tanh(self.gradient))
        gradient, self.gradient = self.gradient, 0.0
        return OptimStepOutput(grad_norm=abs(gradient), learning_rate=params.learning_rate)

    async def restart(self) -> None:
        self.calls.append(("restart",))
        self.theta, self.steps, self.gradient = 0.3, 0, 0.0

    async def publish_weights(self, version: int) -> PublishedWeights:
        self.calls.append(("publish_weights", version))
        return PublishedWeights(version=version, handle=self.theta, num_bytes=8)

    async def save_state(self, directory: Path) -> None:
        self.calls.append(("save_state",))
        (directory / "learner.json").write_text(json.dumps({"theta": self.theta, "steps": self.steps}))

    async def load_state(self, directory: Path) -> None:
        self.calls.append(("load_state",))
        state = json.loads((directory / "learner.json").read_text())
        self.theta, self.steps = state["theta"], state["steps"]

    async def save_hf(self, directory: Path) -> None:
        self.calls.append(("save_hf",))
        directory.mkdir(exist_ok=True)
        (directory / "theta.json").write_text(json.dumps(self.theta))
        (directory / "config.json").write_text("{}")


@dataclass
class FakeSamplers:
    """Samplers that draw tokens from the seed alone and their log-probabilities from the theta they hold."""

    calls: Calls = field(default_factory=list)
    names: tuple[str, ...] = ("sampler-0", "sampler-1")
    arrival: Callable[[list[GroupSample]], list[GroupSample]] = lambda samples: samples
    """In which order groups come back."""
    lie_from_version: int | None = None
    """From this version on it reports log-probabilities half a nat too high for what it samples (not for the probe)."""
    loads_ignored: Mapping[tuple[str, int], int] = field(default_factory=dict)
    """(sampler, version): how many of its loads of that version do nothing."""
    block_generate_at: int | None = None
    """At this version nothing comes back after the first group; `blocked` is set."""
    blocked: asyncio.Event = field(default_factory=asyncio.Event)
    num_streams_closed: int = 0

    def __post_init__(self) -> None:
        self._theta = dict.fromkeys(self.names, 99.0)
        self._version = dict.fromkeys(self.names, -1)
        self._ignored = dict(self.loads_ignored)

    async def generate(self, requests: Sequence[SampleRequest], sampling: SamplingConfig) -> AsyncIterator[GroupSample]:
        self.calls.append(("generate", tuple(r.group_id for r in requests), sampling.temperature))
        samples = [self._sample(r, sampling, self.names[index % len(self.names)]) for index, r in enumerate(requests)]
        try:
            for index, sample in enumerate(self.arrival(samples)):
                await asyncio.sleep(0)
                if index == 1 and self.block_generate_at in self._version.values():
                    self.blocked.set()
                    await asyncio.Event().wait()
                yield sample
        finally:
            self.num_streams_closed += 1

    def _sample(self, request: SampleRequest, sampling: SamplingConfig, name: str) -> GroupSample:
        completions = tuple(self._complete(request, seed, sampling, name) for seed in request.seeds_G)
        return GroupSample(group_id=request.group_id, completions_G=completions, sampler=name)

    def _complete(self, request: SampleRequest, seed: int, sampling: SamplingConfig, name: str) -> Completion:
        greedy = sampling.temperature == 0
        root = (request.token_ids_P, round(self._theta[name], 12)) if greedy else (request.token_ids_P, seed)
        length = 1 + fake_draw(*root, "length", below=sampling.max_tokens - 1)
        tokens = [*(2 + fake_draw(*root, i, below=8) for i in range(length)), EOS]
        before = [request.token_ids_P[-1], *tokens[:-1]]
        version = self._version[name]
        lie = 0.5 if self.lie_from_version is not None and version >= self.lie_from_version else 0.0
        logprobs = [fake_logprob(self._theta[name], p, t) + lie for p, t in zip(before, tokens, strict=True)]
        return make_completion(tokens, logprobs=logprobs, version=version)

    async def ready(self) -> None:
        pass

    def bring_up_with(self, bring_up: Any) -> None:
        pass

    def replace(self, name: str, reason: str) -> None:
        self.calls.append(("replace", name))
        self._theta[name], self._version[name] = self._newest.handle, self._newest.version

    async def load_weights(self, weights: PublishedWeights, only: str | None = None) -> None:
        self.calls.append(("load_weights", weights.version, only))
        self._newest = weights
        await asyncio.sleep(0)
        for name in self.names if only is None else (only,):
            left = self._ignored.get((name, weights.version), 0)
            if left:
                self._ignored[name, weights.version] = left - 1
                continue
            self._theta[name] = weights.handle
            self._version[name] = weights.version

    async def score(self, token_ids: Sequence[int]) -> Mapping[str, np.ndarray[Any, Any]]:
        self.calls.append(("score",))
        pairs = list(itertools.pairwise(token_ids))
        return {
            name: np.array([fake_logprob(theta, p, t) for p, t in pairs], np.float32)
            for name, theta in self._theta.items()
        }


@dataclass
class FakeRewards:
    """One component, a function of the text; or none, for the rollouts that `missing` picks."""

    calls: Calls = field(default_factory=list)
    missing: Callable[[Rollout], bool] = lambda rollout: False
    delay: Callable[[str], int] = lambda group_id: 0
    """How many turns of the event loop a group's score takes."""

    async def score(self, rollouts: Sequence[Rollout]) -> Sequence[tuple[RewardComponent, ...]]:
        group_id = rollouts[0].rollout_id.rpartition("-")[0]
        self.calls.append(("reward", group_id))
        for _ in range(1 + self.delay(group_id)):
            await asyncio.sleep(0)
        return [(self._component(rollout),) for rollout in rollouts]

    def _component(self, rollout: Rollout) -> RewardComponent:
        if self.missing(rollout):
            return RewardComponent(name="task", value=None, missing="raised ZeroDivisionError: division by zero")
        return RewardComponent(name="task", value=float(fake_draw(rollout.text, below=3) / 2))


@dataclass
class FakeView:
    """Keeps what a person would have been told."""

    notes: list[str] = field(default_factory=list)
    phases: list[tuple[str, int, int]] = field(default_factory=list)
    evaluations: list[tuple[float, int]] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)

    def phase(self, name: str, total_steps: int, offset: int = 0) -> None:
        self.phases.append((name, total_steps, offset))

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self.steps.append(step)

    def evaluation(self, accuracy: float, step: int) -> None:
        self.evaluations.append((accuracy, step))

    def waiting(self, reason: str | None) -> None:
        pass

    def note(self, text: str) -> None:
        self.notes.append(text)

    def __enter__(self) -> FakeView:
        return self

    def __exit__(self, *_: object) -> None:
        pass
