"""Figures of one step's rollouts and rewards, by the names of weaver_rl.metrics. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from weaver_rl.batch import ScoredGroup, StepBatch
from weaver_rl.evaluation import EvalResult
from weaver_rl.summation import mean, std, total
from weaver_rl.types import RewardComponent


def step_metrics(batch: StepBatch, version: int) -> dict[str, float]:
    """Rewards, advantages, groups, lengths and lag of a step's batch; `version` is the learner's while it was made."""
    completions = [entry.scored.rollout.completion for entry in batch.entries]
    lengths = np.array([len(c.token_ids_L) for c in completions])
    logprobs = np.concatenate([c.logprobs_L for c in completions])
    stops = [c.stop_reason for c in completions]
    metrics = {
        "rollout/count": len(completions),
        "rollout/length_mean": mean(lengths),
        "rollout/length_max": lengths.max(),
        "rollout/truncated_fraction": stops.count("length") / len(stops),
        "rollout/logprob_mean": mean(logprobs),
        "sampler/num_tokens": lengths.sum(),
        "groups/trained": batch.num_groups - batch.num_groups_dropped,
        "groups/dropped": batch.num_groups_dropped,
        "groups/zero_advantage_fraction": batch.num_groups_without_signal / batch.num_groups,
        "reward/missing_fraction": sum(e.scored.reward is None for e in batch.entries) / len(batch.entries),
    }
    rewards = batch.rewards()
    if len(rewards):
        metrics |= {
            "reward/mean": mean(rewards),
            "reward/std": std(rewards),
            "reward/min": rewards.min(),
            "reward/max": rewards.max(),
        }
    advantages = np.array([entry.advantage for entry in batch.trained()], dtype=np.float64)
    if len(advantages):
        metrics |= {"advantage/mean": mean(advantages), "advantage/std": std(advantages)}
    metrics |= _lag_metrics(batch, version)
    components = [component for entry in batch.entries for component in entry.scored.components]
    for name in dict.fromkeys(component.name for component in components):
        metrics |= _component_metrics(name, [c for c in components if c.name == name])
    return {name: float(value) for name, value in metrics.items()}


def _lag_metrics(batch: StepBatch, version: int) -> dict[str, float]:
    """Of the trained tokens; the histogram has every lag from 0 to the largest. Nothing where no token was trained."""
    versions = [entry.scored.rollout.completion.versions_L for entry in batch.trained()]
    lags_T = version - np.concatenate(versions) if versions else np.empty(0, dtype=np.int64)
    if not len(lags_T):
        return {}
    counts = np.bincount(lags_T).tolist()
    fractions = {f"lag/{lag}/fraction": count / len(lags_T) for lag, count in enumerate(counts)}
    return {"lag/mean": mean(lags_T), "lag/max": lags_T.max(), **fractions}


def eval_metrics(result: EvalResult, groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """Figures of one evaluation, a group of one rollout per held-out prompt."""
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


def _component_metrics(name: str, components: list[RewardComponent]) -> dict[str, float]:
    values = np.array([c.value for c in components if c.value is not None], dtype=np.float64)
    metrics = {
        f"reward/{name}/missing_fraction": 1 - len(values) / len(components),
        f"reward/{name}/seconds": total(c.seconds for c in components) / len(components),
    }
    if len(values):
        metrics |= {f"reward/{name}/mean": mean(values), f"reward/{name}/std": std(values)}
    return metrics
