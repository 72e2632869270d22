"""Sums reward components by weight and counts what is missing. It knows neither processes nor advantages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from weaver_rl.errors import MissingRewardsError
from weaver_rl.rewards.config import RewardSpec
from weaver_rl.types import RewardComponent, Rollout, ScoredRollout


def combine(rollout: Rollout, components: Sequence[RewardComponent], specs: Sequence[RewardSpec]) -> ScoredRollout:
    """Σ weight · value; no reward where a component whose weight is not 0 is missing."""
    return ScoredRollout(rollout=rollout, components=tuple(components), reward=_weighted_sum(components, specs))


def missing_reasons(scored: Sequence[ScoredRollout]) -> Counter[str]:
    """How often each kind of reason occurred, components of weight 0 included.

    Example: Counter({"my_rewards.py:brevity raised ZeroDivisionError": 3})
    """
    return Counter(kind for kind, _, _ in _failures(scored))


def check_missing(scored_in_step: Sequence[ScoredRollout], max_missing_fraction: float) -> None:
    """Raises MissingRewardsError with the reasons if too large a share of the step's rollouts has no reward."""
    without = [scored for scored in scored_in_step if scored.reward is None]
    if not without or len(without) <= max_missing_fraction * len(scored_in_step):
        return
    examples: dict[str, tuple[str, str]] = {}
    for kind, rollout_id, reason in _failures(without):
        examples.setdefault(kind, (rollout_id, reason))
    lines = [
        f"  {count} × {kind}; for example rollout {examples[kind][0]}: {examples[kind][1]}"
        for kind, count in missing_reasons(without).most_common()
    ]
    share = len(without) / len(scored_in_step)
    raise MissingRewardsError(
        f"{len(without)} of {len(scored_in_step)} rollouts of the step have no reward ({share:.1%}); "
        f"reward_workers.max_missing_fraction allows {max_missing_fraction:.1%}\n" + "\n".join(lines)
    )


def _weighted_sum(components: Sequence[RewardComponent], specs: Sequence[RewardSpec]) -> float | None:
    total = 0.0
    for component, spec in zip(components, specs, strict=True):
        if spec.weight == 0:
            continue
        if component.value is None:
            return None
        total += spec.weight * component.value
    return total


def _failures(scored: Sequence[ScoredRollout]) -> Iterator[tuple[str, str, str]]:
    """(component and kind of reason, rollout_id, whole reason) of every missing component."""
    for one in scored:
        for component in one.components:
            if component.missing is not None:
                yield f"{component.name} {kind_of(component.missing)}", one.rollout.rollout_id, component.missing


def kind_of(reason: str) -> str:
    """A reason without its details, for counting: `raised KeyError: 'x' (r.py:3)` is `raised KeyError`."""
    return reason.partition(": ")[0]
