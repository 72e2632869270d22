"""After a sync the samplers use the learner's weights, all of them, for everything; and a load that went wrong is seen.

Each way in which a vLLM engine on a CPU keeps something old makes a test here red: linear layers repacked by oneDNN,
a tied head that is not updated, cached prefixes, running requests that keep their keys and values.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from sampler_parts import (
    BLOCK,
    KINDS,
    VOCAB,
    ReplicaFleet,
    StartedFleet,
    change,
    gap,
    learner_logprobs,
    random_tokens,
    requests,
    sample,
    start_learner,
)

from actors.learner import RayLearnerGroup
from actors.object_store import publish
from weaver_rl.errors import WeightSyncError
from weaver_rl.rollout import SamplingConfig
from weaver_rl.types import PublishedWeights
from weaver_rl.weights.probe import probe_datum, probe_token_ids
from weaver_rl.weights.sync import WeightSync

pytest_plugins = ("sampler_fixtures",)
pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

Actors = dict[str, Any]
Ranks = dict[str, list[Any]]
Models = dict[str, Path]

PROBE = probe_token_ids(VOCAB, 64)
TOLERANCE = 1e-3
EXACT = 1e-4
TEMPERATURE = 0.7


@pytest.fixture
def learner(rank_actors: Ranks, models: Models) -> RayLearnerGroup:
    """The tied policy, of one rank, at its first weights."""
    return start_learner(rank_actors["tied"], models["tied"])


@pytest.mark.parametrize("kind", KINDS)
def test_after_a_large_change_the_sampler_agrees(
    kind: str, samplers: Actors, rank_actors: Ranks, models: Models
) -> None:
    learner, pool = start_learner(rank_actors[kind], models[kind]), StartedFleet({kind: samplers[kind]})
    asked = requests([random_tokens(3 * BLOCK + 8, seed) for seed in range(2)], 4, name="again")

    async def run() -> None:
        sync = WeightSync(learner, pool, PROBE, TOLERANCE)
        await sync(1)
        before = (await learner.forward([probe_datum(PROBE)])).logprobs_per_datum[0]
        await sample(pool, asked, SamplingConfig(max_tokens=4))
        await change(learner)
        after = (await learner.forward([probe_datum(PROBE)])).logprobs_per_datum[0]
        assert np.abs(after - before).max() > 0.5
        report = await sync(2)
        assert report.resynced == ()
        assert report.probe_max_abs < EXACT
        sampled = await sample(pool, asked, SamplingConfig(temperature=TEMPERATURE, max_tokens=24))
        for group in sampled.values():
            for completion in group.completions_G:
                assert set(completion.versions_L.tolist()) == {2}
        assert gap(await learner_logprobs(learner, asked, sampled, TEMPERATURE), version=2) < EXACT

    asyncio.run(run())


@pytest.mark.parametrize("kind", KINDS)
def test_weights_loaded_while_requests_are_in_flight(
    kind: str, samplers: Actors, rank_actors: Ranks, models: Models, tmp_path: Path
) -> None:
    learner, pool = start_learner(rank_actors[kind], models[kind]), StartedFleet({kind: samplers[kind]})
    long = requests([random_tokens(3 * BLOCK + 8, seed) for seed in range(2)], 6, name="long")
    # Asked for before and after the load while `long` runs: an idle engine would forget its prefixes by itself.
    prompts = [long[0].token_ids_P, random_tokens(4 * BLOCK + 1, seed=9)]
    before, after = requests(prompts, 4, name="before"), requests(prompts, 4, name="after")
    short = SamplingConfig(temperature=TEMPERATURE, max_tokens=8)

    async def run() -> None:
        await WeightSync(learner, pool, PROBE, TOLERANCE)(1)
        await learner.save_state(tmp_path / "v1")
        await change(learner)
        weights = await learner.publish_weights(2)
        in_flight = asyncio.create_task(sample(pool, long, SamplingConfig(temperature=TEMPERATURE, max_tokens=140)))
        sampled = await sample(pool, before, short)
        await pool.load_weights(weights)
        sampled |= await sample(pool, after, short)
        assert not in_flight.done(), "the requests that should have met the load ended before it"
        sampled |= await in_flight
        for asked, versions in ((before, {1}), (after, {2}), (long, {1, 2})):
            completions = [c for request in asked for c in sampled[request.group_id].completions_G]
            assert {version for c in completions for version in c.versions_L.tolist()} == versions
            assert all((np.diff(c.versions_L) >= 0).all() for c in completions)
        asked = [*before, *after, *long]
        assert gap(await learner_logprobs(learner, asked, sampled, TEMPERATURE), version=2) < EXACT
        await learner.load_state(tmp_path / "v1")
        assert gap(await learner_logprobs(learner, asked, sampled, TEMPERATURE), version=1) < EXACT

    asyncio.run(run())


class AlteringFleet(ReplicaFleet):
    """Two samplers; on its way to `untied` one tensor is altered, in the first `times` loads."""

    tensor = ""
    times = 0

    def on_the_way(self, weights: PublishedWeights, name: str) -> PublishedWeights:
        weights = super().on_the_way(weights, name)
        if name != "untied" or self.times == 0:
            return weights
        self.times -= 1
        chunks = [dict(ray.get(reference)) for reference in weights.handle]
        for chunk in chunks:
            if self.tensor in chunk:
                chunk[self.tensor] = chunk[self.tensor] * np.float32(1.05)
        return replace(weights, handle=publish(weights.version, chunks).handle)


@pytest.mark.parametrize(
    "tensor", ["model.embed_tokens.weight", "model.layers.1.self_attn.v_proj.weight", "model.norm.weight"]
)
def test_one_altered_tensor_is_seen_and_sent_again(tensor: str, samplers: Actors, learner: RayLearnerGroup) -> None:
    pool = AlteringFleet(samplers)
    pool.tensor, pool.times = tensor, 1

    async def run() -> None:
        report = await WeightSync(learner, pool, PROBE, TOLERANCE)(3)
        assert report.resynced == ("untied",)
        assert report.probe_max_abs < EXACT
        asked = requests([PROBE] * 2, 2, name="mended")
        sampled = await sample(pool, asked, SamplingConfig(max_tokens=4))
        assert {group.sampler for group in sampled.values()} == {"tied", "untied"}
        assert gap(await learner_logprobs(learner, asked, sampled, 1.0), version=3) < EXACT

    asyncio.run(run())


def test_a_sampler_that_never_gets_the_weights_right_is_named(samplers: Actors, learner: RayLearnerGroup) -> None:
    pool = AlteringFleet(samplers)
    pool.tensor, pool.times = "model.layers.0.mlp.down_proj.weight", 1000
    with pytest.raises(WeightSyncError, match=r"^untied does not use weights v4: .* nats from the learner's"):
        asyncio.run(WeightSync(learner, pool, PROBE, TOLERANCE)(4))
    assert pool.times == 998
