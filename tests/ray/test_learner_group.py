"""The ranks of a learner as one: two compute what one computes, refuse as one, and a death among them is told."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from sampler_parts import VOCAB, process_id, random_tokens, start_learner

from actors.learner import RayLearnerGroup
from weaver_rl.errors import ActorFailedError, BatchError
from weaver_rl.losses.config import ImportanceSampling
from weaver_rl.types import AdamParams, Datum, ForwardBackwardOutput

pytest_plugins = ("sampler_fixtures",)
pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

LOSS = ImportanceSampling(name="importance_sampling", clip_ratio=1.0)
# A large eps: AdamW would make whole steps of gradients that are only rounding.
ADAM = AdamParams(learning_rate=0.01, eps=1e-3)


@pytest.fixture
def groups(rank_actors: dict[str, list[Any]], models: dict[str, Path]) -> dict[int, RayLearnerGroup]:
    """The same policy on one rank and on two."""
    return {len(ranks): start_learner(ranks, models["untied"]) for ranks in rank_actors.values()}


def make_data(num: int = 9) -> list[Datum]:
    """Data of different lengths; the first third of each is a prompt of weight 0."""
    data = []
    for index in range(num):
        rng = np.random.default_rng(index)
        tokens = np.array(random_tokens(int(rng.integers(6, 60)), seed=index), dtype=np.int64)
        length = len(tokens) - 1
        weights = rng.uniform(0.25, 2.0, length).astype(np.float32)
        weights[: length // 3] = 0.0
        inputs: dict[str, npt.NDArray[Any]] = {
            "target_tokens": tokens[1:],
            "weights": weights,
            "importance_weights": rng.normal(0, 1.5, length).astype(np.float32),
        }
        data.append(Datum(datum_id=f"datum-{index}", token_ids_N=tokens[:-1], loss_fn_inputs=inputs))
    return data


def assert_same(ours: ForwardBackwardOutput, theirs: ForwardBackwardOutput) -> None:
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
    assert (ours.num_tokens, ours.sum_weights) == (theirs.num_tokens, theirs.sum_weights)
    for mine, other in zip(ours.logprobs_per_datum, theirs.logprobs_per_datum, strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-5)


def test_two_ranks_compute_what_one_computes(groups: dict[int, RayLearnerGroup]) -> None:
    data = make_data()

    async def run(group: RayLearnerGroup) -> Any:
        before = await group.forward_backward(data[:5], LOSS)
        more = await group.forward_backward(data[5:], LOSS, temperature=0.7)
        stepped = await group.optim_step(ADAM)
        return before, more, stepped, await group.forward(data), await group.forward(data[:1], temperature=0.5)

    one, two = (asyncio.run(run(groups[num])) for num in (1, 2))
    assert_same(one[0], two[0])
    assert_same(one[1], two[1])
    assert two[2].grad_norm == pytest.approx(one[2].grad_norm, rel=1e-5)
    assert [len(logprobs) for logprobs in two[3].logprobs_per_datum] == [len(datum.token_ids_N) for datum in data]
    for ours, theirs in zip(one[3:], two[3:], strict=True):
        for mine, other in zip(ours.logprobs_per_datum, theirs.logprobs_per_datum, strict=True):
            np.testing.assert_allclose(mine, other, atol=1e-4)


def bad_token(datum: Datum) -> Datum:
    tokens = datum.token_ids_N.copy()
    tokens[1] = VOCAB
    return replace(datum, token_ids_N=tokens)


def bad_weight(datum: Datum) -> Datum:
    inputs = dict(datum.loss_fn_inputs)
    inputs["importance_weights"] = np.full_like(inputs["importance_weights"], np.nan)
    return replace(datum, loss_fn_inputs=inputs)


def without_weights(datum: Datum) -> Datum:
    return replace(datum, loss_fn_inputs={"target_tokens": datum.loss_fn_inputs["target_tokens"]})


@pytest.mark.parametrize(
    ("spoil", "field"),
    [(bad_token, "token_ids_N"), (bad_weight, "importance_weights"), (without_weights, "weights")],
)
def test_a_bad_datum_is_named_and_nothing_of_its_batch_stays(
    spoil: Callable[[Datum], Datum], field: str, groups: dict[int, RayLearnerGroup]
) -> None:
    data = make_data()

    async def run(group: RayLearnerGroup, bad: bool) -> tuple[ForwardBackwardOutput, float]:
        output = await group.forward_backward(data, LOSS)
        # Whichever rank it falls to, and whichever rank answers first.
        for index in range(len(data)) if bad else ():
            batch = [*data[:index], spoil(data[index]), *data[index + 1 :]]
            with pytest.raises(BatchError, match=rf"datum 'datum-{index}': .*{field}"):
                await group.forward_backward(batch, LOSS)
        return output, (await group.optim_step(ADAM)).grad_norm

    undisturbed, norm = asyncio.run(run(groups[1], bad=False))
    disturbed, norm_after = asyncio.run(run(groups[2], bad=True))
    assert_same(disturbed, undisturbed)
    assert norm_after == pytest.approx(norm, rel=1e-5)


def test_a_rank_that_dies_is_named_and_nobody_waits_for_it(
    groups: dict[int, RayLearnerGroup], doomed_ranks: list[Any]
) -> None:
    pid = process_id(doomed_ranks[1])
    data = make_data()

    async def run() -> float:
        # It stands still first, so that the other rank is in the collective when it dies.
        os.kill(pid, signal.SIGSTOP)
        waiting = asyncio.create_task(groups[2].forward_backward(data, LOSS))
        await asyncio.wait([waiting], timeout=1.0)
        assert not waiting.done()
        os.kill(pid, signal.SIGKILL)
        killed_at = time.monotonic()
        with pytest.raises(ActorFailedError, match=r"^learner rank 1 died after .* forward_backward"):
            await waiting
        with pytest.raises(ActorFailedError, match=r"^learner rank 1 died"):
            await groups[2].optim_step(ADAM)
        return time.monotonic() - killed_at

    assert asyncio.run(run()) < 15
