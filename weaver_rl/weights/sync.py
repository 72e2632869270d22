"""One weight sync: publish, load, probe, and once more for a sampler that disagrees. It knows no transport."""

from __future__ import annotations

from dataclasses import dataclass

from weaver_rl.errors import WeightSyncError
from weaver_rl.roles import LearnerGroup, SamplerPool
from weaver_rl.weights.probe import ProbeAnswers, ProbeResult, compare, is_stale, probe_datum


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """What one sync did."""

    version: int
    num_bytes: int
    probe_max_abs: float
    """Largest |Δ| in nats over all samplers, after any resync."""
    resynced: tuple[str, ...]
    """Samplers that needed a second load."""


class WeightSync:
    """Brings every sampler to the learner's weights and proves it.

    Args:
        probe_token_ids: the fixed sequence that both sides score.
        tolerance: largest |Δ| in nats that counts as agreement.
    """

    def __init__(
        self, learner: LearnerGroup, samplers: SamplerPool, probe_token_ids: tuple[int, ...], tolerance: float
    ) -> None:
        self._learner = learner
        self._samplers = samplers
        self._token_ids = probe_token_ids
        self._tolerance = tolerance
        self._before: ProbeAnswers | None = None

    async def __call__(self, version: int) -> SyncReport:
        """Raises WeightSyncError naming the sampler that still disagrees after a second load."""
        weights = await self._learner.publish_weights(version)
        await self._samplers.load_weights(weights)
        results = await self._probe(version)
        failed = [result.sampler for result in results if not result.passed]
        if failed:
            weights = await self._learner.publish_weights(version)
            for sampler in failed:
                await self._samplers.load_weights(weights, only=sampler)
            results = await self._probe(version)
            still = [result for result in results if not result.passed]
            if still:
                raise WeightSyncError(_message(still[0]))
        self._before = self._now
        return SyncReport(
            version=version,
            num_bytes=weights.num_bytes,
            probe_max_abs=max(result.max_abs for result in results),
            resynced=tuple(failed),
        )

    async def _probe(self, version: int) -> list[ProbeResult]:
        output = await self._learner.forward([probe_datum(self._token_ids)])
        by_sampler = await self._samplers.score(self._token_ids)
        self._now = ProbeAnswers(learner=output.logprobs_per_datum[0], by_sampler=by_sampler)
        return [
            compare(
                sampler,
                version,
                logprobs,
                self._now.learner,
                self._tolerance,
                stale=is_stale(sampler, self._before, self._now),
            )
            for sampler, logprobs in by_sampler.items()
        ]


def _message(result: ProbeResult) -> str:
    if result.stale:
        return (
            f"{result.sampler} does not use weights v{result.version}: since the last version the learner's "
            "log-probabilities of the probe have changed, the sampler's by not a single bit, after two loads. It keeps "
            "older weights; nothing was sampled with them."
        )
    return (
        f"{result.sampler} does not use weights v{result.version}: after two loads its log-probabilities of the probe "
        f"are up to {result.max_abs:.3g} nats from the learner's, {result.tolerance:.3g} allowed. It kept older "
        "weights or loaded them wrongly; nothing was sampled with them. If both sides compute in different precision, "
        "raise weights.probe_tolerance."
    )
