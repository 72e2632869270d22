"""Several models on one learner's ranks: each is trained as if it were alone, in turns, and none outlives them."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from sampler_parts import random_tokens, start_learner

from actors import batches
from actors.learner import RayLearnerGroup
from weaver_rl.errors import BatchError, CheckpointError, ConfigError, LearnerLostError
from weaver_rl.learner.adapter_config import AdapterConfig
from weaver_rl.losses.config import CrossEntropy, Surrogate
from weaver_rl.types import AdamParams, Datum, ForwardBackwardOutput, ForwardOutput

pytest_plugins = ("sampler_fixtures",)
pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

LOSS = CrossEntropy(name="cross_entropy")
# A large eps: AdamW would make whole steps of gradients that are only rounding.
ADAM = AdamParams(learning_rate=0.01, eps=1e-3)
ADAPTERS = {"first.of/two": AdapterConfig(rank=4, seed=1), "pop": AdapterConfig(rank=2, train_mlp=False, seed=2)}


@pytest.fixture
def groups(rank_actors: dict[str, list[Any]], models: dict[str, Path]) -> dict[int, RayLearnerGroup]:
    """The same policy on one rank and on two."""
    return {len(ranks): start_learner(ranks, models["untied"]) for ranks in rank_actors.values()}


def make_data(seed: int, num: int = 5) -> list[Datum]:
    data = []
    for index in range(num):
        tokens = np.array(random_tokens(8 + 3 * index, seed=seed + index), dtype=np.int64)
        weights = np.ones(len(tokens) - 1, dtype=np.float32)
        weights[: len(weights) // 3] = 0.0
        inputs = {"target_tokens": tokens[1:], "weights": weights}
        data.append(Datum(datum_id=f"d{index}", token_ids_N=tokens[:-1], loss_fn_inputs=inputs))
    return data


def flat(output: ForwardOutput | ForwardBackwardOutput) -> np.ndarray:
    return np.concatenate(output.logprobs_per_datum)


async def train(model: RayLearnerGroup, seed: int, num_steps: int = 2) -> list[float]:
    losses = []
    for _ in range(num_steps):
        output = await model.forward_backward(make_data(seed), LOSS, 0.8, positions="all", with_grad_norm=True)
        assert not np.isnan(flat(output)).any()
        step = await model.optim_step(ADAM)
        assert step.grad_norm == pytest.approx(output.metrics["grad_norm"], rel=1e-5)
        losses.append(output.loss)
    return losses


async def open_models(group: RayLearnerGroup) -> list[RayLearnerGroup]:
    for name, config in ADAPTERS.items():
        await group.add_adapter(name, config)
    return [group.with_adapter(name) for name in ADAPTERS]


def test_models_that_train_at_once_are_those_that_train_alone(groups: dict[int, RayLearnerGroup]) -> None:
    data = make_data(50)

    async def run(num: int, at_once: bool) -> list[Any]:
        base = await groups[num].forward(data)
        models = await open_models(groups[num])
        work = [train(model, 100 * index) for index, model in enumerate(models)]
        losses = await asyncio.gather(*work) if at_once else [await one for one in work]
        np.testing.assert_array_equal(flat(await groups[num].forward(data)), flat(base))
        after = [flat(await model.forward(data)) for model in models]
        for name in ADAPTERS:
            await groups[num].remove_adapter(name)
        return [flat(base), *losses, *after]

    alone, at_once = (asyncio.run(run(1, flag)) for flag in (False, True))
    two = asyncio.run(run(2, True))
    for ours, theirs, of_two in zip(at_once, alone, two, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_allclose(of_two, theirs, atol=1e-4)
    assert np.abs(alone[-1] - alone[0]).max() > 0.05


def test_a_loss_that_is_a_sum_is_not_divided_by_weights(groups: dict[int, RayLearnerGroup]) -> None:
    data = [
        replace(
            datum,
            loss_fn_inputs=dict(datum.loss_fn_inputs)
            | {"surrogate_weights": np.linspace(-1.0, 2.0, len(datum.token_ids_N), dtype=np.float32)},
        )
        for datum in make_data(0)
    ]

    async def run(num: int) -> tuple[ForwardBackwardOutput, float]:
        await groups[num].add_adapter("a", AdapterConfig(rank=2))
        model = groups[num].with_adapter("a")
        output = await model.forward_backward(data, Surrogate(name="surrogate"), sum_weights=123.0, positions="all")
        return output, (await model.optim_step(ADAM)).grad_norm

    (one, norm), (two, norm_of_two) = (asyncio.run(run(num)) for num in (1, 2))
    terms = [
        datum.loss_fn_inputs["weights"] * datum.loss_fn_inputs["surrogate_weights"] * logprobs
        for datum, logprobs in zip(data, one.logprobs_per_datum, strict=True)
    ]
    assert one.sum_weights == two.sum_weights == 1.0
    assert one.loss == pytest.approx(float(np.concatenate(terms).sum()), rel=1e-5)
    assert two.loss == pytest.approx(one.loss, rel=1e-5)
    assert norm_of_two == pytest.approx(norm, rel=1e-5)


def test_a_large_batch_goes_by_reference_and_comes_out_the_same(
    groups: dict[int, RayLearnerGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> list[Any]:
        await groups[2].add_adapter("a", AdapterConfig(rank=2))
        model = groups[2].with_adapter("a")
        losses = await train(model, 0)
        after = flat(await model.forward(make_data(50)))
        await groups[2].remove_adapter("a")
        return [*losses, *after]

    small = asyncio.run(run())
    puts = []
    put = ray.put
    monkeypatch.setattr(batches, "LARGE_BYTES", 0)
    monkeypatch.setattr(batches.ray, "put", lambda data: puts.append(data) or put(data))
    assert asyncio.run(run()) == small
    assert len(puts) == 2 * 3  # each rank has its own part


def test_states_go_through_files_and_only_into_what_they_are_of(
    groups: dict[int, RayLearnerGroup], tmp_path: Path
) -> None:
    data = make_data(50)

    async def run() -> None:
        first, second = await open_models(groups[2])
        await train(first, 0)
        await first.save_state(tmp_path / "state")
        expected = flat(await first.forward(data))
        going_on = await train(first, 7)
        await first.load_state(tmp_path / "state")
        np.testing.assert_array_equal(flat(await first.forward(data)), expected)
        assert await train(first, 7) == going_on
        await first.load_state(tmp_path / "state", with_optimizer=False)
        np.testing.assert_array_equal(flat(await first.forward(data)), expected)
        assert (await train(first, 7))[1] != going_on[1]
        with pytest.raises(CheckpointError, match=r"rank 4 .*this learner trains a LoRA adapter of rank 2"):
            await second.load_state(tmp_path / "state")
        await first.save_state(tmp_path / "weights", with_optimizer=False)
        assert not (tmp_path / "weights" / "optimizer").exists()
        await first.save_for_sampler(tmp_path / "sampler")
        assert (tmp_path / "sampler" / "adapter_model.safetensors").exists()
        await first.save_hf(tmp_path / "hf")
        await groups[2].save_for_sampler(tmp_path / "whole")
        for directory in ("hf", "whole"):
            assert (tmp_path / directory / "model.safetensors").exists()

    asyncio.run(run())


def test_what_is_not_there_or_frozen_is_refused_by_name(groups: dict[int, RayLearnerGroup]) -> None:
    data = make_data(0)
    group = groups[2]

    async def run() -> None:
        first, _ = await open_models(group)
        with pytest.raises(ConfigError, match="an adapter 'pop' already"):
            await group.add_adapter("pop", AdapterConfig(rank=1))
        with pytest.raises(ConfigError, match="the learner has no adapter 'third'"):
            await group.with_adapter("third").forward(data)
        with pytest.raises(ConfigError, match=r"no adapter 'third'; there are: first\.of/two, pop"):
            await group.remove_adapter("third")
        with pytest.raises(ConfigError, match="frozen base of adapters"):
            await group.forward_backward(data, LOSS)
        await group.remove_adapter("first.of/two")
        with pytest.raises(ConfigError, match=r"no adapter 'first\.of/two'"):
            await first.forward_backward(data, LOSS)
        with pytest.raises(BatchError, match="no forward_backward"):
            await group.with_adapter("pop").optim_step(ADAM)
        await train(group.with_adapter("pop"), 3)

    asyncio.run(run())


def test_adapters_go_with_a_restart_and_nothing_else_is_trained_for_them(
    groups: dict[int, RayLearnerGroup], rank_actors: dict[str, list[Any]], models: dict[str, Path]
) -> None:
    data = make_data(0)
    ranks = rank_actors["untied"]

    async def start_anew() -> list[Any]:
        start_learner(ranks, models["untied"])
        return ranks

    async def run() -> None:
        group = RayLearnerGroup(ranks, 60.0, start_anew)
        before = flat(await group.forward(data))
        view, _ = await open_models(group)
        await train(view, 0)
        await group.restart()
        for model in (view, group.with_adapter("pop")):
            for operation in (
                lambda model=model: model.forward(data),
                lambda model=model: model.forward_backward(data, LOSS),
                lambda model=model: model.optim_step(ADAM),
            ):
                with pytest.raises(ConfigError, match="not added since the learner started"):
                    await operation()
        np.testing.assert_array_equal(flat(await group.forward(data)), before)
        await group.forward_backward(data, LOSS)
        await group.optim_step(ADAM)

    asyncio.run(run())


class SlowRank:
    """Handle of a rank that is asked for one thing after the other and takes its time for each."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._free_at = 0.0
        self.calls: list[tuple[str, float]] = []

    def __getattr__(self, name: str) -> Any:
        return _Method(lambda: self._answer(name))

    def _answer(self, name: str) -> Awaitable[Any]:
        now = time.monotonic()
        self.calls.append((name, now))
        self._free_at = max(self._free_at, now) + self._seconds
        return asyncio.sleep(self._free_at - now)


class _Method:
    def __init__(self, answer: Callable[[], Awaitable[Any]]) -> None:
        self._answer = answer

    def remote(self, *_: Any) -> Awaitable[Any]:
        return self._answer()


def test_waiting_for_others_is_not_taken_for_being_late() -> None:
    rank = SlowRank(0.2)
    group = RayLearnerGroup([rank], timeout_s=0.35)
    models = [group, *(group.with_adapter(f"m{number}") for number in range(3))]

    async def run() -> None:
        await asyncio.gather(*(model.save_hf(Path("anywhere")) for model in models))

    asyncio.run(run())
    starts = [started for _, started in rank.calls]
    assert len(starts) == 4
    assert all(later - earlier > 0.15 for earlier, later in itertools.pairwise(starts))


def test_a_view_of_ranks_that_ended_says_so(cluster: None) -> None:
    class Ended:
        def forward(self, *_: Any) -> None: ...

    actor: Any = ray.remote(Ended).options(num_cpus=0).remote()
    view = RayLearnerGroup([actor], 60.0).with_adapter("a")
    ray.kill(actor)

    async def run() -> None:
        with pytest.raises(LearnerLostError, match="learner rank 0 died"):
            await view.forward(make_data(0))

    asyncio.run(run())
