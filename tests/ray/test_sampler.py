"""What a sampler promises beyond its weights: seeds, refusals that harm nobody else, streaming, and a visible death."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY
from safetensors.numpy import load_file
from sampler_parts import (
    MAX_MODEL_LEN,
    STOP_TOKENS,
    TOKENS_PER_STEP,
    VOCAB,
    StartedFleet,
    in_actor,
    process_id,
    random_tokens,
    requests,
    sample,
)

from actors.cast import Cast
from actors.object_store import publish
from actors.preparation import Prepared
from actors.spawn import Actors
from weaver_rl.config import load_config
from weaver_rl.engines.config import DEFAULT_MAX_NUM_BATCHED_TOKENS, DEFAULT_MAX_NUM_SEQS
from weaver_rl.errors import ActorFailedError, EngineError
from weaver_rl.rollout import SamplingConfig
from weaver_rl.sampler_fleet import SamplerFleet
from weaver_rl.types import GroupSample, PublishedWeights, SampleRequest

pytest_plugins = ("sampler_fixtures",)
pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

PROMPT = random_tokens(20, seed=1)


@pytest.fixture
def weights(models: dict[str, Path], replicas: SamplerFleet) -> PublishedWeights:
    """The tied policy's first weights, loaded by both engines as v5."""
    loaded = publish(5, [load_file(models["tied"] / "model.safetensors")])
    asyncio.run(replicas.load_weights(loaded))
    return loaded


@pytest.fixture
def same_policy(replicas: SamplerFleet, weights: PublishedWeights) -> SamplerFleet:
    """Two samplers of one policy."""
    return replicas


def tokens(group: GroupSample) -> list[list[int]]:
    return [completion.token_ids_L.tolist() for completion in group.completions_G]


def both(group_seeds: tuple[int, ...], name: str) -> list[SampleRequest]:
    """The same group twice: the first request of a call goes to one sampler, the second to the other."""
    return [SampleRequest(group_id=f"{name}-{i}", token_ids_P=PROMPT, seeds_G=group_seeds) for i in range(2)]


# -- seeds -------------------------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_tokens_on_every_sampler_and_every_time(same_policy: SamplerFleet) -> None:
    seeds = (3, 1, 4, 1_000_000_007, 2**62, 9)
    sampling = SamplingConfig(max_tokens=24)
    alone = asyncio.run(sample(same_policy, both(seeds, "alone"), sampling))
    others = requests([random_tokens(50, seed) for seed in range(4)], 5, name="other")
    among = asyncio.run(sample(same_policy, [*both(seeds, "among"), *others], sampling))
    assert alone["alone-0"].sampler != alone["alone-1"].sampler
    assert tokens(alone["alone-0"]) == tokens(alone["alone-1"]) == tokens(among["among-0"]) == tokens(among["among-1"])
    for ours, theirs in zip(alone["alone-0"].completions_G, among["among-1"].completions_G, strict=True):
        np.testing.assert_allclose(ours.logprobs_L, theirs.logprobs_L, atol=1e-5)


def test_different_seeds_give_different_tokens(same_policy: SamplerFleet) -> None:
    sampled = asyncio.run(sample(same_policy, requests([PROMPT] * 4, 8, name="group"), SamplingConfig(max_tokens=12)))
    completions = [tuple(completion) for group in sampled.values() for completion in tokens(group)]
    assert len(completions) == 32
    assert len(set(completions)) == 32


def test_engines_do_not_share_a_stream_of_random_numbers(same_policy: SamplerFleet, samplers: dict[str, Any]) -> None:
    """Nothing of a run samples without a seed of its own; if something ever does, replicas must not repeat each other.

    Each engine's stream is set back to where its start left it: to the seed it was built with.
    """

    def restart_stream(sampler: Any) -> None:
        from vllm.utils.torch_utils import set_random_seed

        def restart(engine: Any) -> None:
            set_random_seed(engine._engine.vllm_config.model_config.seed)

        sampler._loop.call(restart).result(timeout=30)

    for sampler in samplers.values():
        in_actor(sampler, restart_stream)
    unseeded: Any = (None,) * 4
    sampled = asyncio.run(sample(same_policy, both(unseeded, "unseeded"), SamplingConfig(max_tokens=8)))
    assert tokens(sampled["unseeded-0"]) != tokens(sampled["unseeded-1"])


def test_a_run_gives_every_engine_a_seed_of_its_own() -> None:
    unused: Any = None
    prepared = Prepared(
        model_dir=Path("model"), prompts=unused, task_scorer=None, vocab_size=VOCAB, max_len=64, stop_tokens=STOP_TOKENS
    )
    cast = Cast(
        config=load_config(TINY, ["seed=11"]),
        prepared=prepared,
        actors=Actors(),
        spawner=unused,
        placement=unused,
        reservation=Unreserved(),
        transport="object_store",
    )
    assert len({cast.sampler_spec(f"sampler {index}").seed for index in range(3)}) == 3


class Unreserved:
    def give_back(self, name: str) -> None: ...


def test_prompts_that_do_not_fit_one_step_are_sampled_all_the_same(same_policy: SamplerFleet) -> None:
    """With seeds: a prompt cut in two by vLLM would end the engine's step on a CPU."""
    asked = requests([random_tokens(100, seed) for seed in range(16)], 4, name="long")
    assert TOKENS_PER_STEP < 16 * 100
    sampled = asyncio.run(sample(same_policy, asked, SamplingConfig(max_tokens=4)))
    assert len(sampled) == 16


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "seen"),
    [
        ((5, VOCAB, 6), rf"token ids 5..{VOCAB} seen, 0..{VOCAB - 1} allowed"),
        ((5, -1), r"token ids -1..5 seen"),
        ((), "the prompt is empty"),
        (random_tokens(MAX_MODEL_LEN, seed=0), rf"the prompt has {MAX_MODEL_LEN} tokens, the engine takes at most"),
    ],
    ids=["too high", "negative", "empty", "too long"],
)
def test_a_bad_request_harms_nobody_else(prompt: tuple[int, ...], seen: str, same_policy: SamplerFleet) -> None:
    good = requests([PROMPT] * 2, 4, name="good")
    bad = SampleRequest(group_id="bad", token_ids_P=prompt, seeds_G=(1, 2))

    async def run() -> None:
        in_flight = asyncio.create_task(sample(same_policy, good, SamplingConfig(max_tokens=60)))
        with pytest.raises(EngineError, match=f"bad: .*{seen}"):
            await sample(same_policy, [bad], SamplingConfig(max_tokens=60))
        during = await in_flight
        again = await sample(same_policy, good, SamplingConfig(max_tokens=60))
        assert {name: tokens(group) for name, group in during.items()} == {
            name: tokens(group) for name, group in again.items()
        }
        # Beside good groups in one call it is still its own error that is raised.
        with pytest.raises(EngineError, match=f"bad: .*{seen}"):
            await sample(same_policy, [*requests([PROMPT] * 2, 1, name="beside"), bad], SamplingConfig(max_tokens=2))

    asyncio.run(run())


# -- what comes out, and when ------------------------------------------------------------------------------------------


def test_a_group_arrives_as_soon_as_it_is_complete(
    same_policy: SamplerFleet, samplers: dict[str, Any], weights: PublishedWeights
) -> None:
    pool = StartedFleet({"tied": samplers["tied"]})
    long, short = requests([PROMPT, random_tokens(MAX_MODEL_LEN - 2, seed=2)], 4, name="group")
    newer = PublishedWeights(version=6, handle=weights.handle, num_bytes=weights.num_bytes)

    async def run() -> list[GroupSample]:
        arrived = []
        async for group in pool.generate([long, short], SamplingConfig(max_tokens=150)):
            arrived.append(group)
            if len(arrived) == 1:
                await pool.load_weights(newer)
        return arrived

    first, last = asyncio.run(run())
    assert (first.group_id, last.group_id) == (short.group_id, long.group_id)
    assert [(len(c.token_ids_L), c.stop_reason) for c in first.completions_G] == [(2, "length")] * 4
    # What was done on the arrival of the first happened while the last was being sampled.
    assert {version for c in last.completions_G for version in c.versions_L.tolist()} == {5, 6}


def test_an_end_token_is_the_last_and_only_one(same_policy: SamplerFleet) -> None:
    asked = requests([random_tokens(10, seed) for seed in range(6)], 8, name="end")
    sampled = asyncio.run(sample(same_policy, asked, SamplingConfig(temperature=1.5, max_tokens=100)))
    completions = [c for group in sampled.values() for c in group.completions_G]
    ends = set()
    for completion in completions:
        *body, last = completion.token_ids_L.tolist()
        assert not set(body) & set(STOP_TOKENS)
        assert np.isfinite(completion.logprobs_L).all()
        if completion.stop_reason == "stop":
            assert last in STOP_TOKENS
            ends.add(last)
        else:
            assert (completion.stop_reason, len(completion.token_ids_L)) == ("length", 100)
            assert last not in STOP_TOKENS
    assert ends == set(STOP_TOKENS)
    assert {completion.stop_reason for completion in completions} == {"stop", "length"}


def test_a_sampler_that_dies_is_named_at_once(same_policy: SamplerFleet, doomed_samplers: dict[str, Any]) -> None:
    pid = process_id(doomed_samplers["untied"])
    asked = requests([PROMPT, random_tokens(MAX_MODEL_LEN - 2, seed=2), PROMPT, PROMPT], 4, name="group")
    killed_at = 0.0

    async def run() -> None:
        nonlocal killed_at
        async for group in same_policy.generate(asked, SamplingConfig(max_tokens=200)):
            assert group.group_id == "group-1", "the group that ends first is of the sampler to be killed"
            killed_at = time.monotonic()
            os.kill(pid, signal.SIGKILL)

    with pytest.raises(ActorFailedError, match=r"^untied died after .* sampling 2 groups"):
        asyncio.run(run())
    assert killed_at
    assert time.monotonic() - killed_at < 10
    assert list(asyncio.run(same_policy.score(PROMPT))) == ["tied"]


def test_the_defaults_that_check_and_plan_count_with_are_the_engines(
    samplers: dict[str, Any], models: dict[str, Path]
) -> None:
    model = str(models["tied"])

    def limits(actor: Any) -> tuple[int, int]:
        from inspect import signature

        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        context = signature(LLMEngine.from_engine_args).parameters["usage_context"].default
        args = EngineArgs(model=model, skip_tokenizer_init=True, dtype="float32", max_model_len=64)
        scheduler = args.create_engine_config(context).scheduler_config
        return scheduler.max_num_seqs, scheduler.max_num_batched_tokens

    assert in_actor(samplers["tied"], limits) == (DEFAULT_MAX_NUM_SEQS, DEFAULT_MAX_NUM_BATCHED_TOKENS)
