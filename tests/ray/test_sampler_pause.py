"""A real engine that is paused, whose callers go away, or that is given whole new weights from a directory."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from sampler_parts import TIMEOUT_S, make_model, random_tokens
from service_parts import (
    MAX_SEQUENCES,
    PROMPT,
    Reference,
    num_in_flight,
    request,
    sample_all,
    text_of,
    tokens,
    wait_for_in_flight,
    wait_for_steps,
)

from weaver_rl.errors import EngineError
from weaver_rl.rollout import SamplingConfig
from weaver_rl.types import Adapter, GroupSample

pytest_plugins = ("service_fixtures",)
pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

TOLERANCE = 1e-4
LONG = SamplingConfig(max_tokens=200)


@pytest.fixture
def paused_later(service: Any) -> Iterator[Any]:
    yield service
    ray.get(service.resume.remote())


# -- pausing -----------------------------------------------------------------------------------------------------------


def test_abort_returns_what_there_is(paused_later: Any, adapters: dict[str, Adapter]) -> None:
    """More completions than the engine runs at a time: some have not begun."""
    asked = [request(f"cut-{i}", 30, seed=50 * i, adapter=kind) for i, kind in enumerate([None, adapters["all"]])]
    whole = sample_all(paused_later, asked, LONG)
    waiting = [paused_later.sample.remote(each, LONG) for each in asked]
    wait_for_steps(paused_later, 8)
    ray.get(paused_later.pause.remote("abort"))
    cut: list[GroupSample] = ray.get(waiting, timeout=TIMEOUT_S)
    assert num_in_flight(paused_later) == 0
    completions = [completion for group in cut for completion in group.completions_G]
    assert len(completions) == 60
    assert {completion.stop_reason for completion in completions} <= {"abort", "stop"}
    lengths = [len(completion.token_ids_L) for completion in completions if completion.stop_reason == "abort"]
    assert lengths.count(0) >= 1
    assert max(lengths) >= 8
    assert sum(length > 0 for length in lengths) <= MAX_SEQUENCES
    for group, full in zip(cut, whole, strict=True):
        for ours, text, theirs in zip(group.completions_G, group.texts_G, full.completions_G, strict=True):
            length = len(ours.token_ids_L)
            assert ours.token_ids_L.tolist() == theirs.token_ids_L[:length].tolist()
            np.testing.assert_allclose(ours.logprobs_L, theirs.logprobs_L[:length], atol=TOLERANCE)
            assert ours.versions_L.tolist() == [0] * length
            if ours.stop_reason == "abort":
                assert text == "".join(map(text_of, ours.token_ids_L.tolist()))


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_what_is_not_aborted_is_answered_as_without_a_pause(
    paused_later: Any, adapters: dict[str, Adapter], mode: str
) -> None:
    asked = [
        request(f"kept-{i}", 4, seed=50 * i, adapter=kind, num_prompt_logprobs=0, stop=("qq",))
        for i, kind in enumerate([None, adapters["all"], adapters["attention"]])
    ]
    whole = sample_all(paused_later, asked, LONG)
    waiting = [paused_later.sample.remote(each, LONG) for each in asked]
    wait_for_steps(paused_later, 8)
    ray.get(paused_later.pause.remote(mode))
    num_steps = ray.get(paused_later.heartbeat.remote()).num_steps
    score = paused_later.prompt_logprobs.remote(PROMPT)
    ready, _ = ray.wait([*waiting, score], num_returns=1, timeout=0.5)
    assert not ready
    heartbeat = ray.get(paused_later.heartbeat.remote())
    assert (heartbeat.is_busy, heartbeat.num_steps) == (False, num_steps)
    ray.get(paused_later.resume.remote())
    for ours, theirs in zip(ray.get(waiting, timeout=TIMEOUT_S), whole, strict=True):
        assert tokens(ours) == tokens(theirs)
        assert ours.texts_G == theirs.texts_G
        for mine, full in zip(ours.completions_G, theirs.completions_G, strict=True):
            np.testing.assert_allclose(mine.logprobs_L, full.logprobs_L, atol=TOLERANCE)
    assert ray.get(score).logprobs_P.shape == (len(PROMPT),)


# -- callers that go ---------------------------------------------------------------------------------------------------


def test_a_cancelled_call_frees_the_engine(paused_later: Any, adapters: dict[str, Adapter]) -> None:
    asked = [request("stays", 2), request("goes", 8, adapter=adapters["all"]), request("waits", 60)]
    staying, *going = [paused_later.sample.remote(each, LONG) for each in asked]
    wait_for_steps(paused_later, 3)
    ray.get(paused_later.pause.remote("in_place"))
    num_before = num_in_flight(paused_later)
    going.append(paused_later.prompt_logprobs.remote(PROMPT))
    wait_for_in_flight(paused_later, num_before + 1)
    assert num_before > 30
    for reference in going:
        ray.cancel(reference)
    wait_for_in_flight(paused_later, 2)
    for reference in going:
        with pytest.raises((ray.exceptions.TaskCancelledError, ray.exceptions.RayTaskError)):
            ray.get(reference, timeout=TIMEOUT_S)
    ray.get(paused_later.resume.remote())
    assert len(ray.get(staying, timeout=TIMEOUT_S).completions_G) == 2


def test_a_group_can_be_ended_by_name(paused_later: Any) -> None:
    ray.get(paused_later.pause.remote("in_place"))
    unwanted = paused_later.sample.remote(request("unwanted", 8), LONG)
    wait_for_in_flight(paused_later, 8)
    ray.get(paused_later.abort.remote("unwanted"))
    with pytest.raises(EngineError, match="group unwanted was aborted"):
        ray.get(unwanted, timeout=TIMEOUT_S)
    assert num_in_flight(paused_later) == 0


# -- whole weights -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Other weights for the same two models."""
    directory = tmp_path_factory.mktemp("others")
    return {kind: make_model(directory / kind, tied=kind == "tied", seed=7) for kind in ("tied", "untied")}


@pytest.fixture
def own_weights(samplers: dict[str, Any], models: dict[str, Path]) -> Iterator[dict[str, Any]]:
    """Both engines, each with the weights of its own directory as v5."""

    def load() -> None:
        ray.get([samplers[kind].load_directory.remote(models[kind], 5) for kind in samplers], timeout=TIMEOUT_S)

    load()
    yield samplers
    ray.get([sampler.resume.remote() for sampler in samplers.values()])
    load()


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_a_directory_takes_the_place_of_the_weights_and_of_what_was_cached_under_them(
    own_weights: dict[str, Any], models: dict[str, Path], others: dict[str, Path], kind: str
) -> None:
    prompt = random_tokens(70, seed=5)  # more than two blocks of the prefix cache
    for version, directory in ((5, models[kind]), (6, others[kind]), (7, models[kind])):
        if version > 5:
            ray.get(own_weights[kind].load_directory.remote(directory, version), timeout=TIMEOUT_S)
        reference = Reference(directory)
        [group] = sample_all(
            own_weights[kind], [request(f"v{version}", 4, prompt=prompt)], SamplingConfig(max_tokens=8)
        )
        score = ray.get(own_weights[kind].prompt_logprobs.remote(prompt))
        np.testing.assert_allclose(score.logprobs_P[1:], reference.of_tokens(prompt), atol=TOLERANCE)
        for completion in group.completions_G:
            assert set(completion.versions_L.tolist()) == {version}
            expected = reference.of_tokens((*prompt, *completion.token_ids_L.tolist()))[len(prompt) - 1 :]
            np.testing.assert_allclose(completion.logprobs_L, expected, atol=TOLERANCE)


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_what_was_paused_goes_on_with_the_new_weights(
    own_weights: dict[str, Any], models: dict[str, Path], others: dict[str, Path], mode: str
) -> None:
    sampler = own_weights["tied"]
    waiting = sampler.sample.remote(request("over", 4), LONG)
    wait_for_steps(sampler, 8)
    ray.get(sampler.pause.remote(mode))
    ray.get(sampler.load_directory.remote(others["tied"], 6), timeout=TIMEOUT_S)
    assert not ray.get(sampler.heartbeat.remote()).is_busy
    ray.get(sampler.resume.remote())
    seen = set()
    for completion in ray.get(waiting, timeout=TIMEOUT_S).completions_G:
        seen |= set(completion.versions_L.tolist())
        for version, directory in ((5, models["tied"]), (6, others["tied"])):
            mine = completion.versions_L == version
            expected = Reference(directory).of_tokens((*PROMPT, *completion.token_ids_L.tolist()))[len(PROMPT) - 1 :]
            np.testing.assert_allclose(completion.logprobs_L[mine], expected[mine], atol=TOLERANCE)
    assert seen == ({5, 6} if mode == "in_place" else {6})


def test_another_model_is_refused_and_nothing_changes(
    own_weights: dict[str, Any], models: dict[str, Path], tmp_path: Path
) -> None:
    asked = request("same", 2)
    before = sample_all(own_weights["untied"], [asked], SamplingConfig(max_tokens=8))
    for directory, seen in ((models["tied"], r"weights missing lm_head\.weight"), (tmp_path, "holds no")):
        with pytest.raises(EngineError, match=seen):
            ray.get(own_weights["untied"].load_directory.remote(directory, 6))
    after = sample_all(own_weights["untied"], [replace(asked, group_id="after")], SamplingConfig(max_tokens=8))
    assert tokens(before[0]) == tokens(after[0])
    assert {v for completion in after[0].completions_G for v in completion.versions_L.tolist()} == {5}


def test_an_engine_with_adapters_keeps_its_base(service: Any, base_dir: Path) -> None:
    with pytest.raises(EngineError, match="an engine that takes adapters keeps its weights"):
        ray.get(service.load_directory.remote(base_dir, 1))


def test_a_stream_of_groups_can_be_cut_short_too(own_weights: dict[str, Any]) -> None:
    """One path for runs and service."""

    async def run() -> list[GroupSample]:
        asked = [request(f"stream-{i}", 4, seed=10 * i) for i in range(3)]
        stream = own_weights["tied"].generate.options(num_returns="streaming").remote(asked, LONG)
        await asyncio.to_thread(wait_for_steps, own_weights["tied"], 8)
        await own_weights["tied"].pause.remote("abort")
        return [group async for reference in stream for group in await reference]

    groups = asyncio.run(asyncio.wait_for(run(), TIMEOUT_S))
    assert len(groups) == 3
    assert "abort" in {completion.stop_reason for group in groups for completion in group.completions_G}
