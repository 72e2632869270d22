"""One weight sync: publish, load, probe, and once more for a sampler that disagrees. It knows no transport."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from weaver_rl.errors import WeightSyncError
from weaver_rl.roles import LearnerGroup, SamplerPool, SamplerReplica
from weaver_rl.spans import span
from weaver_rl.types import PublishedWeights
from weaver_rl.weights.probe import ProbeAnswers, ProbeResult, compare, is_stale, probe_datum


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """What one sync did."""

    version: int
    num_bytes: int
    probe_max_abs: float | None
    """Largest |Δ| in nats over all samplers that serve now; None when every sampler was lost meanwhile."""
    resynced: tuple[str, ...] = ()
    """Samplers that needed a second load."""
    replaced: tuple[str, ...] = ()
    """Samplers that disagreed after it too: what they sampled with this version must not be trained."""
    unproven: tuple[str, ...] = ()
    """Samplers that were lost, or began to leave, between a load and its probe: the same holds for them."""


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
        self._published: PublishedWeights | None = None
        self._proven: set[str] = set()
        # A sampler that joins between the load of the others and their probe would be in neither.
        self._lock = asyncio.Lock()
        samplers.bring_up_with(self.bring_up)

    async def __call__(self, version: int) -> SyncReport:
        """Raises WeightSyncError naming a sampler that never agreed, not even after a second load.

        One that agreed at an earlier version is replaced instead: its engine is at fault, not the configuration.
        """
        with span("controller/samplers_ready"):
            await self._samplers.ready()
        async with self._lock:
            weights = await self._learner.publish_weights(version)
            asked = tuple(self._samplers.names)
            await self._samplers.load_weights(weights)
            results = await self._probe(version)
            failed = [result.sampler for result in results if not result.passed]
            if failed:
                weights = await self._learner.publish_weights(version)
                for sampler in failed:
                    await self._samplers.load_weights(weights, only=sampler)
                results = await self._probe(version)
            still = [result for result in results if not result.passed]
            for result in still:
                if result.sampler not in self._proven:
                    raise WeightSyncError(_message(result))
                self._samplers.replace(result.sampler, _message(result))
            answered = {result.sampler for result in results}
            unproven = tuple(sampler for sampler in asked if sampler not in answered)
            for sampler in unproven:
                self._samplers.replace(sampler, f"it was never asked whether it uses weights v{version}")
            self._before, self._published = self._now, weights
            passed = [result for result in results if result.passed]
            self._proven |= {result.sampler for result in passed}
        return SyncReport(
            version=version,
            num_bytes=weights.num_bytes,
            probe_max_abs=max((result.max_abs for result in passed), default=None),
            resynced=tuple(failed),
            replaced=tuple(result.sampler for result in still),
            unproven=unproven,
        )

    async def bring_up(self, sampler: SamplerReplica, join: Callable[[], None]) -> None:
        """Loads the newest weights into a sampler that started later, probes it, and lets it join.

        Raises WeightSyncError when it disagrees.
        """
        async with self._lock:
            # Held on to: the learner may be lost, and both be forgotten, while this waits for the sampler.
            published, proof = self._published, self._before
            if published is not None and proof is not None:
                await sampler.load_weights(published)
                answer = await sampler.score(self._token_ids)
                result = compare(sampler.name, published.version, answer, proof.learner, self._tolerance)
                if not result.passed:
                    raise WeightSyncError(_message(result))
                self._proven.add(sampler.name)
            join()

    def forget(self) -> None:
        """The learner that published is gone, and its weights with it."""
        self._published = self._before = None

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
            "older weights; nothing sampled with them is trained."
        )
    return (
        f"{result.sampler} does not use weights v{result.version}: after two loads its log-probabilities of the probe "
        f"are up to {result.max_abs:.3g} nats from the learner's, {result.tolerance:.3g} allowed. It kept older "
        "weights or loaded them wrongly; nothing sampled with them is trained. If both sides compute in different "
        "precision, raise weights.probe_tolerance."
    )
