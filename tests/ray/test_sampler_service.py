"""What a sampler promises the service: adapters beside the base, texts that end completions, and scores of prompts."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from sampler_parts import MAX_MODEL_LEN, TIMEOUT_S, VOCAB, in_actor, random_tokens
from service_parts import (
    LIMITS,
    MODULES,
    PROMPT,
    Reference,
    make_adapter,
    request,
    sample_all,
    text_of,
    tokens,
    wait_for_in_flight,
)

from weaver_rl.errors import EngineError
from weaver_rl.rollout import SamplingConfig
from weaver_rl.types import Adapter, GroupSample

pytest_plugins = ("service_fixtures",)
pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

TOLERANCE = 1e-4
"""Nats; what is seen is 1e-5."""
SAMPLING = SamplingConfig(max_tokens=24)


def loaded_adapters(service: Any) -> int:
    def count(sampler: Any) -> int:
        return int(sampler._loop.call(lambda engine: len(engine._engine.list_loras())).result(timeout=30))

    return int(in_actor(service, count))


# -- adapters ----------------------------------------------------------------------------------------------------------


def test_adapters_and_the_base_in_one_batch_are_what_peft_says(
    service: Any, adapters: dict[str, Adapter], reference: Reference
) -> None:
    """Every place for an adapter is taken, also the last, which vLLM's own CPU kernels give to the base."""
    kinds = [None, adapters["all"], adapters["attention"], adapters["head"], None, adapters["all"]]
    assert len({kind.name for kind in kinds if kind}) == LIMITS.max_loras
    asked = [request(f"mixed-{i}", 4, seed=100 * i, adapter=kind) for i, kind in enumerate(kinds)]
    for sampling in (SAMPLING, SamplingConfig(max_tokens=24, temperature=0.6)):
        groups = sample_all(service, asked, sampling)
        gaps = {
            f"{index} {kind.name if kind else 'base'}": max(
                reference.gap(completion, kind, sampling.temperature) for completion in group.completions_G
            )
            for index, (group, kind) in enumerate(zip(groups, kinds, strict=True))
        }
        assert max(gaps.values()) < TOLERANCE, gaps


def test_adapters_beside_the_base_do_not_change_a_bit_of_it(service: Any, adapters: dict[str, Adapter]) -> None:
    """The same batch with the base in place of the adapters: rows of matrices of the same shape, so no rounding differs
    either."""
    prompts = [random_tokens(20, seed=50 + index) for index in range(6)]
    kinds = [None, adapters["all"], adapters["attention"], None, adapters["head"], None]
    sampling = SamplingConfig(max_tokens=6)

    def ask(name: str, kinds: Sequence[Adapter | None]) -> list[GroupSample]:
        asked = [request(f"{name}-{i}", adapter=kind, prompt=prompts[i]) for i, kind in enumerate(kinds)]
        return asyncio.run(together(service, asked, sampling))

    mixed, alone = ask("mixed", kinds), ask("alone", [None] * 6)
    for index, kind in enumerate(kinds):
        with_adapters, without = mixed[index].completions_G[0], alone[index].completions_G[0]
        assert len(with_adapters.token_ids_L) == 6
        if kind is None:
            assert with_adapters.token_ids_L.tolist() == without.token_ids_L.tolist()
            assert with_adapters.logprobs_L.tolist() == without.logprobs_L.tolist()
        else:
            assert np.abs(with_adapters.logprobs_L - without.logprobs_L).max() > 0.01


async def together(service: Any, asked: Sequence[Any], sampling: SamplingConfig) -> list[GroupSample]:
    """All in before the next engine step, so that the batch is the same each time."""
    found: dict[str, GroupSample] = {}
    async for reference in service.generate.options(num_returns="streaming").remote(asked, sampling):
        found |= {group.group_id: group for group in await reference}
    return [found[each.group_id] for each in asked]


def test_more_adapters_than_places_wait_for_each_other(
    service: Any, adapters: dict[str, Adapter], reference: Reference
) -> None:
    assert len(adapters) > LIMITS.max_loras
    asked = [request(f"{name}-{i}", adapter=each) for i in range(4) for name, each in adapters.items()]
    groups = sample_all(service, asked, SAMPLING)
    for each, group in zip(asked, groups, strict=True):
        assert reference.gap(group.completions_G[0], each.adapter) < TOLERANCE
    assert loaded_adapters(service) <= LIMITS.max_idle


def test_another_name_is_another_adapter(
    service: Any, base_dir: Path, adapters: dict[str, Adapter], reference: Reference, tmp_path: Path
) -> None:
    """Nothing cached under a name, weights or prefixes, is met under a later one or under that name once forgotten."""
    long_prompt = request("long", adapter=adapters["all"], prompt=random_tokens(100, seed=3))
    sample_all(service, [long_prompt], SAMPLING)
    first = make_adapter(tmp_path / "first", base_dir, MODULES, seed=11)
    second = make_adapter(tmp_path / "second", base_dir, MODULES, seed=12)
    renamed = Adapter(name="first", directory=second.directory)

    def score(adapter: Adapter, like: Adapter | None = None) -> float:
        asked = request("again", adapter=adapter, prompt=long_prompt.token_ids_P)
        [group] = sample_all(service, [asked], SAMPLING)
        row = reference.logprobs(long_prompt.token_ids_P, like or adapter)[-1]
        return abs(float(group.completions_G[0].logprobs_L[0] - row[group.completions_G[0].token_ids_L[0]]))

    assert score(first) < TOLERANCE
    assert score(second) < TOLERANCE
    with pytest.raises(EngineError, match=r"adapter first was loaded from .*first, now .*second is asked for"):
        score(renamed)
    ray.get(service.forget_adapter.remote("first"))
    assert score(renamed) < TOLERANCE
    ray.get(service.forget_adapter.remote("first"))
    assert score(first) < TOLERANCE
    ray.get(service.forget_adapter.remote("first"))
    rewritten = make_adapter(tmp_path / "rewritten", base_dir, MODULES, seed=13)
    shutil.copytree(rewritten.directory, first.directory, dirs_exist_ok=True)
    assert score(first, like=rewritten) < TOLERANCE


def test_an_adapter_that_is_forgotten_stays_for_whoever_uses_it(
    service: Any, adapters: dict[str, Adapter], reference: Reference
) -> None:
    """One name, two contents in flight."""
    num_before = loaded_adapters(service)
    kinds = [adapters["all"], adapters["d"]]
    ray.get(service.pause.remote("in_place"))
    answers = []
    for index, kind in enumerate(kinds):
        asked = request(f"shared-{index}", 2, adapter=Adapter(name="shared", directory=kind.directory))
        answers.append(service.sample.remote(asked, SAMPLING))
        wait_for_in_flight(service, 2 * (index + 1))
        ray.get(service.forget_adapter.remote("shared"))
    ray.get(service.resume.remote())
    for kind, group in zip(kinds, ray.get(answers, timeout=TIMEOUT_S), strict=True):
        assert max(reference.gap(completion, kind) for completion in group.completions_G) < TOLERANCE
    assert loaded_adapters(service) == num_before


def spoil_config(directory: Path) -> None:
    (directory / "adapter_config.json").write_text("{")


def spoil_feature(directory: Path) -> None:
    """vLLM's own refusal."""
    path = directory / "adapter_config.json"
    path.write_text(path.read_text().replace('"use_dora": false', '"use_dora": true'))


@pytest.mark.parametrize(
    ("spoil", "seen"),
    [
        (shutil.rmtree, "cannot be read"),
        (spoil_config, "adapter_config.json cannot be read"),
        (spoil_feature, "vLLM does not yet support DoRA"),
        (lambda path: (path / "adapter_model.safetensors").write_bytes(b"no"), "cannot be read as safetensors"),
    ],
    ids=["gone", "config", "feature", "weights"],
)
def test_a_bad_adapter_harms_nobody_else(
    service: Any, adapters: dict[str, Adapter], tmp_path: Path, spoil: Callable[[Path], None], seen: str
) -> None:
    directory = shutil.copytree(adapters["all"].directory, tmp_path / "spoilt")
    spoil(directory)
    good = [request(f"good-{i}", 2, adapter=kind) for i, kind in enumerate([None, adapters["all"]])]
    expected = sample_all(service, good, SAMPLING)
    in_flight = [service.sample.remote(each, SAMPLING) for each in good]
    bad = service.sample.remote(request("bad", 2, adapter=Adapter(name=tmp_path.name, directory=directory)), SAMPLING)
    assert [tokens(group) for group in ray.get(in_flight)] == [tokens(group) for group in expected]
    with pytest.raises(EngineError, match=seen):
        ray.get(bad)


def test_a_rank_above_the_limit_and_an_engine_without_adapters_are_told(
    service: Any, base_dir: Path, adapters: dict[str, Adapter], samplers: dict[str, Any], tmp_path: Path
) -> None:
    large = make_adapter(tmp_path / "large", base_dir, ("q_proj",), rank=LIMITS.max_rank + 1)
    with pytest.raises(EngineError, match="has rank 9, the engine takes at most 8"):
        sample_all(service, [request("large", adapter=large)], SAMPLING)
    for asked in (
        samplers["tied"].sample.remote(request("none", adapter=adapters["all"]), SAMPLING),
        samplers["tied"].prompt_logprobs.remote(PROMPT, 1.0, adapters["all"]),
    ):
        with pytest.raises(EngineError, match="adapter all seen, this engine takes none"):
            ray.get(asked)


def test_files_of_an_adapter_may_go_while_it_is_in_use(
    service: Any, adapters: dict[str, Adapter], reference: Reference, tmp_path: Path
) -> None:
    """Also while it waits for a place and others are loaded: vLLM would let go of it, and read it again in a step."""
    long = SamplingConfig(max_tokens=200, temperature=0.3)
    running = [adapters[name] for name in ("all", "attention", "head")]
    assert len(running) == LIMITS.max_loras
    asked = [request(f"running-{each.name}", 4, adapter=each) for each in running]
    asked.append(request("mine", 4, adapter=Adapter(name="mine", directory=tmp_path / "mine")))
    asked.append(request("later", 4, adapter=adapters["e"]))
    shutil.copytree(adapters["d"].directory, tmp_path / "mine")
    ray.get(service.pause.remote("in_place"))
    answers = []
    for index, each in enumerate(asked):
        answers.append(service.sample.remote(each, long))
        wait_for_in_flight(service, 4 * (index + 1))
    shutil.rmtree(tmp_path / "mine")
    ray.get(service.resume.remote())
    for kind, answer in zip([*running, adapters["d"], adapters["e"]], answers, strict=True):
        for completion in ray.get(answer, timeout=TIMEOUT_S).completions_G:
            assert reference.gap(completion, kind, long.temperature) < TOLERANCE


# -- what ends a completion --------------------------------------------------------------------------------------------


def unstopped(service: Any) -> tuple[list[int], str]:
    [group] = sample_all(service, [request("whole", seed=4)], SamplingConfig(max_tokens=40))
    whole = tokens(group)[0]
    assert (len(whole), group.completions_G[0].stop_reason) == (40, "length")
    assert group.texts_G == ("".join(map(text_of, whole)),)
    return whole, group.texts_G[0]


@pytest.mark.parametrize(("start", "length"), [(20, 2), (21, 2), (21, 1), (20, 5)], ids=str)
def test_a_text_ends_a_completion_and_is_left_out_of_its_text_only(service: Any, start: int, length: int) -> None:
    """Within a token, over two, and over three: tokens are two letters each."""
    whole, text = unstopped(service)
    stop = text[start : start + length]
    found = text.find(stop)
    asked = request("stopped", seed=4, stop=("never seen", stop))
    [group] = sample_all(service, [asked], SamplingConfig(max_tokens=40))
    num_tokens = (found + length + 1) // 2
    assert tokens(group) == [whole[:num_tokens]]
    assert len(group.completions_G[0].logprobs_L) == num_tokens
    assert group.completions_G[0].stop_reason == "stop"
    assert group.texts_G == (text[:found],)


def test_a_token_ends_a_completion_and_stays_in_it(service: Any) -> None:
    whole, text = unstopped(service)
    asked = [request(f"token-{i}", seed=4, stop_token_ids=ids) for i, ids in enumerate([(whole[7], 499), ()])]
    stopped, not_stopped = sample_all(service, asked, SamplingConfig(max_tokens=40))
    end = whole.index(whole[7]) + 1
    assert (tokens(stopped), stopped.completions_G[0].stop_reason) == ([whole[:end]], "stop")
    assert stopped.texts_G == (text[: 2 * (end - 1)],)
    assert tokens(not_stopped) == [whole]


def test_what_an_engine_of_a_run_cannot_do_is_told(samplers: dict[str, Any]) -> None:
    with pytest.raises(EngineError, match="this engine scores at temperature 1 only"):
        ray.get(samplers["tied"].prompt_logprobs.remote(PROMPT, 0.5))
    with pytest.raises(EngineError, match=r"stop texts \('x',\) need an engine with a tokenizer"):
        sample_all(samplers["tied"], [request("stop", stop=("x",))], SAMPLING)
    [group] = sample_all(samplers["tied"], [request("no text")], SAMPLING)
    assert group.texts_G == ()


@pytest.mark.parametrize(
    ("more", "seen"),
    [({"stop": ("",)}, "stop cannot contain an empty string"), ({"num_prompt_logprobs": 30}, "max allowed: 20")],
    ids=["empty stop text", "too many likeliest tokens"],
)
def test_what_vllm_refuses_is_told(service: Any, more: dict[str, Any], seen: str) -> None:
    with pytest.raises(EngineError, match=f"service: refused: vLLM refuses it: .*{seen}"):
        sample_all(service, [request("refused", **more)], SAMPLING)


def test_no_seeds_are_refused(service: Any) -> None:
    with pytest.raises(EngineError, match="no seeds"):
        sample_all(service, [request("nothing", 0)], SAMPLING)


def test_hundreds_of_different_requests_are_answered_each_as_alone(service: Any, adapters: dict[str, Adapter]) -> None:
    kinds = [None, *adapters.values()]
    configs = [
        SamplingConfig(max_tokens=12),
        SamplingConfig(max_tokens=20, temperature=0.0),
        SamplingConfig(max_tokens=8, temperature=1.5, top_k=20),
        SamplingConfig(max_tokens=16, temperature=0.7, top_p=0.9),
    ]
    asked = [
        (request(f"many-{i}", seed=i, adapter=kinds[i % 6], stop=("ab",) if i % 3 else ()), configs[i % 4])
        for i in range(200)
    ]
    groups = ray.get([service.sample.remote(*each) for each in asked], timeout=TIMEOUT_S)
    assert [group.group_id for group in groups] == [each.group_id for each, _ in asked]
    for index in range(0, 200, 17):
        again = ray.get(service.sample.remote(*asked[index]), timeout=TIMEOUT_S)
        assert tokens(again) == tokens(groups[index])
        np.testing.assert_allclose(
            again.completions_G[0].logprobs_L, groups[index].completions_G[0].logprobs_L, atol=TOLERANCE
        )


# -- scores ------------------------------------------------------------------------------------------------------------


def test_prompts_come_with_log_probabilities_and_the_likeliest_tokens(
    service: Any, adapters: dict[str, Adapter], reference: Reference
) -> None:
    kinds = [None, adapters["all"], adapters["attention"]]
    asked = [request(f"prompt-{i}", 3, adapter=kind, num_prompt_logprobs=i * 5) for i, kind in enumerate(kinds)]
    for each, group in zip(asked, sample_all(service, asked, SAMPLING), strict=True):
        found, num_top = group.prompt_logprobs, each.num_prompt_logprobs
        rows = reference.logprobs(PROMPT, each.adapter)
        assert found is not None
        assert np.isnan(found.logprobs_P[0])
        np.testing.assert_allclose(found.logprobs_P[1:], reference.of_tokens(PROMPT, each.adapter), atol=TOLERANCE)
        assert len(found.top_P) == (len(PROMPT) if num_top else 0)
        for position, top in enumerate(found.top_P):
            likeliest = np.argsort(-rows[position - 1])[:num_top].tolist() if position else []
            assert [token for token, _ in top] == likeliest
            np.testing.assert_allclose([value for _, value in top], rows[position - 1][likeliest], atol=TOLERANCE)
    assert sample_all(service, [request("plain")], SAMPLING)[0].prompt_logprobs is None


def test_sequences_are_scored_at_any_temperature_under_any_adapter(
    service: Any, adapters: dict[str, Adapter], reference: Reference
) -> None:
    """Also one that leaves no room for a new token, and beside requests that sample."""
    background = service.sample.remote(request("beside", 8, adapter=adapters["d"]), SamplingConfig(max_tokens=150))
    sequences = [PROMPT, random_tokens(MAX_MODEL_LEN, seed=9), PROMPT[:2]]
    kinds = [None, adapters["all"], adapters["head"]]
    cases = [(t, kind, sequence) for t in (1.0, 0.5, 2.0) for kind in kinds for sequence in sequences]
    scores = ray.get([service.prompt_logprobs.remote(sequence, t, kind) for t, kind, sequence in cases])
    gaps = []
    for (temperature, kind, sequence), score in zip(cases, scores, strict=True):
        assert score.logprobs_P.shape == (len(sequence),)
        assert np.isnan(score.logprobs_P[0])
        gaps.append(np.abs(score.logprobs_P[1:] - reference.of_tokens(sequence, kind, temperature)).max())
    assert max(gaps) < TOLERANCE, gaps
    ray.get(background)


def test_a_single_token_has_no_score(service: Any) -> None:
    assert np.isnan(ray.get(service.prompt_logprobs.remote(PROMPT[:1])).logprobs_P).tolist() == [True]


@pytest.mark.parametrize(
    ("token_ids", "temperature", "seen"),
    [
        ((), 1.0, "the prompt is empty"),
        ((5, VOCAB), 1.0, rf"token ids 5..{VOCAB} seen"),
        (random_tokens(MAX_MODEL_LEN + 1, seed=0), 1.0, f"the engine takes at most {MAX_MODEL_LEN}"),
        (PROMPT, 0.0, r"temperature 0.0 seen, 0.01..2.0 allowed"),
        (PROMPT, float("nan"), "temperature nan seen"),
    ],
    ids=["empty", "unknown token", "too long", "greedy", "not a number"],
)
def test_what_cannot_be_scored_is_told(service: Any, token_ids: tuple[int, ...], temperature: float, seen: str) -> None:
    with pytest.raises(EngineError, match=seen):
        ray.get(service.prompt_logprobs.remote(token_ids, temperature))


def test_a_failed_step_is_told_and_the_engine_goes_on(service: Any, adapters: dict[str, Adapter]) -> None:
    def fail_once(sampler: Any) -> None:
        def fail(engine: Any) -> None:
            core = engine._engine.engine_core
            step = core.get_output

            def get_output() -> Any:
                core.get_output = step
                raise MemoryError("no more")

            core.get_output = get_output

        sampler._loop.call(fail).result(timeout=30)

    asked = request("fails", 3, adapter=adapters["all"])
    expected = sample_all(service, [asked], SAMPLING)
    in_actor(service, fail_once)
    with pytest.raises(EngineError, match="service: the engine step failed: MemoryError: no more"):
        sample_all(service, [asked], SAMPLING)
    again = sample_all(service, [replace(asked, group_id="again")], SAMPLING)
    assert [tokens(group) for group in again] == [tokens(group) for group in expected]
