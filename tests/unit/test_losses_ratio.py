"""The losses of a probability ratio and the surrogate: formulas, gradients, masking, diagnostics, splits."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from learner_fixtures import cpu_config, gradients, make_data, make_llama
from pydantic import TypeAdapter, ValidationError
from transformers import AutoModelForCausalLM

from weaver_rl.errors import BatchError
from weaver_rl.learner.learner import Learner
from weaver_rl.learner.microbatches import sum_weights
from weaver_rl.losses import (
    cispo_loss,
    cross_entropy_loss,
    importance_sampling_ratio_loss,
    ppo_clip_loss,
    surrogate_loss,
    truncated_importance_sampling_loss,
)
from weaver_rl.losses.config import (
    Cispo,
    CrossEntropy,
    ImportanceSampling,
    ImportanceSamplingRatio,
    LossConfig,
    PpoClip,
    RunLossConfig,
    Surrogate,
    TruncatedImportanceSampling,
)
from weaver_rl.losses.contract import TokenLoss
from weaver_rl.losses.reference import loss_over_logits
from weaver_rl.types import Datum

pytestmark = pytest.mark.unit

PLAIN = ImportanceSamplingRatio(name="importance_sampling_ratio")
BOUNDED = ImportanceSamplingRatio(name="importance_sampling_ratio", clip_ratio=1.1)
TRUNCATED = TruncatedImportanceSampling(name="truncated_importance_sampling", tis_cap=1.3)
PPO = PpoClip(name="ppo_clip", clip_low_threshold=0.9, clip_high_threshold=1.3)
CISPO = Cispo(name="cispo", clip_low_threshold=0.7, clip_high_threshold=1.1)
SURROGATE = Surrogate(name="surrogate")
RATIO_LOSSES = [PLAIN, BOUNDED, TRUNCATED, PPO, CISPO]
Terms = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
OBJECTIVES: list[tuple[TokenLoss, Terms]] = [
    (PLAIN, lambda lp, r, A: r * A),
    (BOUNDED, lambda lp, r, A: torch.clamp(r, max=1.1) * A),
    (TRUNCATED, lambda lp, r, A: torch.clamp(r, max=1.3).detach() * A * lp),
    (PPO, lambda lp, r, A: torch.minimum(r * A, torch.clamp(r, 0.9, 1.3) * A)),
    (CISPO, lambda lp, r, A: torch.clamp(r, 0.7, 1.1).detach() * A * lp),
]
"""What each loss maximises, written as papers do."""


def label(value: object) -> str | None:
    return value.name if isinstance(value, TokenLoss) else None


def make_case(num_tokens: int = 40, vocab: int = 6) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, targets and inputs with ratios on both sides of every bound, advantages of both signs, weights of 0."""
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    logits = normal(num_tokens, vocab).requires_grad_()
    targets = torch.randint(vocab, (num_tokens,), generator=generator)
    logprobs = logits.detach().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    weights = normal(num_tokens).abs()
    weights[::5] = 0.0
    advantages = normal(num_tokens)
    advantages[3] = 0.0
    return (
        logits,
        targets,
        {"weights": weights, "logprobs": logprobs + normal(num_tokens) / 2, "advantages": advantages},
    )


def written_out(objective: Terms, logits, targets, inputs) -> torch.Tensor:
    logprobs = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    ratios = torch.exp(logprobs - inputs["logprobs"])
    terms = objective(logprobs, ratios, inputs["advantages"])
    return -(inputs["weights"] * terms).sum() / inputs["weights"].sum()


@pytest.mark.parametrize(("loss", "objective"), OBJECTIVES, ids=label)
def test_value_and_gradient_are_those_of_the_formula(loss, objective):
    logits, targets, inputs = make_case()
    expected = written_out(objective, logits, targets, inputs)
    seen = loss_over_logits(loss, logits, targets, inputs)
    torch.testing.assert_close(seen, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        *torch.autograd.grad(seen, logits), *torch.autograd.grad(expected, logits), rtol=1e-10, atol=1e-14
    )


def test_the_case_has_ratios_on_both_sides_of_every_bound():
    logits, targets, inputs = make_case()
    logprobs = logits.detach().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    for loss in RATIO_LOSSES[1:]:
        shares = loss.metric_sums(logprobs, inputs)["ratio_clipped_fraction"] / inputs["weights"].sum()
        assert 0.1 < float(shares) < 0.9, loss.name


def test_the_formulas_by_hand():
    """One token with p = 1/2, weight 3 of a total of 3, r = 2 and A = −0.5 or 0.5, by arithmetic."""
    logits = torch.zeros(1, 2, dtype=torch.float64)
    target, q = torch.tensor([0]), torch.tensor([math.log(0.25)], dtype=torch.float64)
    weights = torch.tensor([3.0], dtype=torch.float64)
    good, bad = (torch.tensor([value], dtype=torch.float64) for value in (0.5, -0.5))
    given = (logits, target, weights, q)
    assert importance_sampling_ratio_loss(*given, good).item() == pytest.approx(-1.0)
    assert importance_sampling_ratio_loss(*given, good, 1.5).item() == pytest.approx(-0.75)
    assert truncated_importance_sampling_loss(*given, good, 1.5).item() == pytest.approx(0.75 * math.log(2))
    assert ppo_clip_loss(*given, good).item() == pytest.approx(-0.6)
    assert ppo_clip_loss(*given, bad).item() == pytest.approx(1.0)
    assert cispo_loss(*given, bad).item() == pytest.approx(-0.6 * math.log(2))
    assert surrogate_loss(logits, target, weights / 3, good).item() == pytest.approx(-0.5 * math.log(2))


@pytest.mark.parametrize("loss", [PLAIN, BOUNDED, PPO], ids=label)
def test_gradients_through_the_ratio_equal_finite_differences(loss):
    logits, targets, inputs = make_case(12)
    assert torch.autograd.gradcheck(lambda x: loss_over_logits(loss, x, targets, inputs), logits)


@pytest.mark.parametrize(("loss", "bounds"), [(TRUNCATED, (0.0, 1.3)), (CISPO, (0.7, 1.1))], ids=label)
def test_gradients_with_a_constant_ratio_equal_finite_differences_of_lp_alone(loss, bounds):
    logits, targets, inputs = make_case(12)
    logprobs = logits.detach().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    factors = torch.exp(logprobs - inputs["logprobs"]).clamp(*bounds) * inputs["advantages"] * inputs["weights"]
    (seen,) = torch.autograd.grad(loss_over_logits(loss, logits, targets, inputs), logits)

    def linear(values: torch.Tensor) -> float:
        chosen = values.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        return float(-(factors * chosen).sum() / inputs["weights"].sum())

    step = 1e-6
    for row, column in [(1, 0), (2, 3), (3, 1), (5, 2), (11, 5)]:
        moved = torch.zeros_like(logits)
        moved[row, column] = step
        difference = (linear(logits.detach() + moved) - linear(logits.detach() - moved)) / (2 * step)
        assert float(seen[row, column]) == pytest.approx(difference, abs=1e-9)


def test_surrogate_is_a_sum_whose_gradient_is_its_weights():
    logits, targets, inputs = make_case()
    wanted = inputs["advantages"]
    ones = torch.ones_like(wanted)
    logprobs = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    loss = surrogate_loss(logits, targets, ones, wanted)
    torch.testing.assert_close(loss, (wanted * logprobs).sum())
    assert not SURROGATE.normalised
    leaf = logprobs.detach().requires_grad_()
    SURROGATE.token_losses(leaf, {"weights": ones, "surrogate_weights": wanted}).sum().backward()
    assert torch.equal(leaf.grad, wanted)
    left_out = surrogate_loss(logits, targets, inputs["weights"] * 0, wanted)
    assert left_out.item() == 0.0


@pytest.mark.parametrize("loss", RATIO_LOSSES, ids=label)
def test_sum_is_the_mean_times_the_weights(loss):
    logits, targets, inputs = make_case()
    summed = loss.model_copy(update={"aggregation": "sum"})
    assert (loss.normalised, summed.normalised) == (True, False)
    expected = loss_over_logits(loss, logits, targets, inputs) * inputs["weights"].sum()
    torch.testing.assert_close(loss_over_logits(summed, logits, targets, inputs), expected)
    nothing = inputs | {"weights": torch.zeros_like(inputs["weights"])}
    assert loss_over_logits(summed, logits, targets, nothing).item() == 0.0
    with pytest.raises(BatchError, match="all weights are zero"):
        loss_over_logits(loss, logits, targets, nothing)


def test_cross_entropy_can_be_a_sum():
    logits, targets, inputs = make_case()
    summed = CrossEntropy(name="cross_entropy", aggregation="sum")
    expected = cross_entropy_loss(logits, targets, inputs["weights"]) * inputs["weights"].sum()
    torch.testing.assert_close(loss_over_logits(summed, logits, targets, inputs), expected)


# -- garbage and overflow --------------------------------------------------------------------------------------------


def token_losses(loss: TokenLoss, lp: list[float], **inputs: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token losses and their gradients in float32."""
    leaf = torch.tensor(lp, requires_grad=True)
    losses = loss.token_losses(leaf, {name: torch.tensor(values) for name, values in inputs.items()})
    losses.sum().backward()
    return losses.detach(), leaf.grad


@pytest.mark.parametrize("loss", RATIO_LOSSES, ids=label)
@pytest.mark.parametrize("garbage", [3e38, -3e38, 1e3, -1e3])
def test_a_token_without_weight_adds_exactly_nothing(loss, garbage):
    given = {"logprobs": [garbage, -1.0], "advantages": [3e38, 1.0], "weights": [0.0, 1.0]}
    losses, grads = token_losses(loss, [-2.0, -1.0], **given)
    assert (float(losses[0]), float(grads[0])) == (0.0, 0.0)
    assert float(losses[1]) != 0.0
    assert math.isfinite(float(grads[1]))
    tensors = {name: torch.tensor(values) for name, values in given.items()}
    for name, value in loss.metric_sums(torch.tensor([-2.0, -1.0]), tensors).items():
        assert float(value) == pytest.approx({"ratio_mean": 1.0}.get(name, 0.0)), name


@pytest.mark.parametrize("loss", RATIO_LOSSES, ids=label)
def test_a_token_without_advantage_adds_nothing_whatever_its_ratio(loss):
    losses, grads = token_losses(loss, [-1.0], logprobs=[-1e4], advantages=[0.0], weights=[1.0])
    assert (float(losses[0]), float(grads[0])) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("loss", "value", "grad"),
    [(BOUNDED, -1.1, 0.0), (TRUNCATED, 1.3, -1.3), (PPO, -1.3, 0.0), (CISPO, 1.1, -1.1)],
    ids=label,
)
def test_a_bound_holds_where_the_ratio_itself_overflows(loss, value, grad):
    losses, grads = token_losses(loss, [-1.0], logprobs=[-1e4], advantages=[1.0], weights=[1.0])
    assert float(losses[0]) == pytest.approx(value)
    assert float(grads[0]) == pytest.approx(grad)


def test_equal_bounds_are_a_constant_ratio():
    loss = Cispo(name="cispo", clip_low_threshold=2.0, clip_high_threshold=2.0)
    losses, grads = token_losses(loss, [-3.0], logprobs=[0.0], advantages=[1.0], weights=[1.0])
    assert (losses.item(), grads.item()) == (pytest.approx(6.0), pytest.approx(-2.0))


def test_bounds_of_zero_are_possible():
    loss = PpoClip(name="ppo_clip", clip_low_threshold=0.0)
    losses, grads = token_losses(loss, [-9.0], logprobs=[0.0], advantages=[-1.0], weights=[1.0])
    assert float(losses[0]) == float(grads[0]) == pytest.approx(math.exp(-9.0))


# -- diagnostics -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", RATIO_LOSSES, ids=label)
def test_diagnostics_are_weighted_means_that_add_up_over_parts(loss):
    logits, targets, inputs = make_case()
    logprobs = logits.detach().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    weights, ratios = inputs["weights"], torch.exp(logprobs - inputs["logprobs"])
    expected = {
        "ratio_mean": float((weights * ratios).sum()),
        "approx_kl": float((weights * (inputs["logprobs"] - logprobs)).sum()),
    }
    good = inputs["advantages"] > 0
    clipped = {
        BOUNDED: ratios > 1.1,
        TRUNCATED: ratios > 1.3,
        PPO: (good & (ratios > 1.3)) | (~good & (ratios < 0.9) & (inputs["advantages"] != 0)),
        CISPO: (ratios > 1.1) | (ratios < 0.7),
    }.get(loss)
    if clipped is not None:
        expected["ratio_clipped_fraction"] = float((weights * clipped).sum())
    seen = loss.metric_sums(logprobs, inputs)
    assert {name: pytest.approx(float(value)) for name, value in seen.items()} == expected
    parts = [
        loss.metric_sums(logprobs[rows], {name: values[rows] for name, values in inputs.items()})
        for rows in (slice(0, 7), slice(7, 30), slice(30, None), slice(0, 0))
    ]
    assert {name: pytest.approx(sum(float(part[name]) for part in parts)) for name in seen} == expected
    assert {name: float(value) for name, value in parts[-1].items()} == dict.fromkeys(expected, 0.0)


def test_clipped_means_that_the_gradient_changed():
    """For the losses whose ratio carries the gradient: no gradient exactly where a token counts as clipped."""
    logits, targets, inputs = make_case()
    leaf = logits.detach().log_softmax(-1).gather(1, targets[:, None])[:, 0].requires_grad_()
    for loss in (BOUNDED, PPO):
        (grad,) = torch.autograd.grad(loss.token_losses(leaf, inputs).sum(), leaf)
        clipped = loss.clipped(torch.exp(leaf.detach() - inputs["logprobs"]), inputs["advantages"])
        used = (inputs["weights"] != 0) & (inputs["advantages"] != 0)
        assert torch.equal(used & (grad == 0), used & clipped)


def test_one_absurd_token_does_not_make_a_metric_infinite():
    inputs = {"weights": torch.ones(2), "logprobs": torch.tensor([-3e38, -1.0]), "advantages": torch.ones(2)}
    assert all(math.isfinite(float(value)) for value in TRUNCATED.metric_sums(torch.zeros(2) - 1, inputs).values())


def test_losses_without_diagnostics_have_none():
    assert CrossEntropy(name="cross_entropy").metric_sums(torch.zeros(1), {"weights": torch.ones(1)}) == {}


# -- in the learner --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(model_dir) -> list[Datum]:
    """The policy's own log-probabilities, moved, as those of a sampler; garbage on the prompt."""
    rng = np.random.default_rng(4)
    raw = make_data(6, seed=4)
    logprobs = Learner(model_dir, cpu_config()).forward(raw).logprobs_per_datum
    made = []
    for datum, values in zip(raw, logprobs, strict=True):
        weights = datum.loss_fn_inputs["weights"]
        q = values + rng.normal(0, 0.4, len(values)).astype(np.float32)
        inputs = {
            "target_tokens": datum.loss_fn_inputs["target_tokens"],
            "weights": weights,
            "logprobs": np.where(weights == 0, np.float32(-3e38), q).astype(np.float32),
            "advantages": rng.normal(0, 1, len(values)).astype(np.float32),
            "surrogate_weights": rng.normal(0, 1, len(values)).astype(np.float32),
        }
        made.append(Datum(datum_id=datum.datum_id, token_ids_N=datum.token_ids_N, loss_fn_inputs=inputs))
    return made


def divisor(loss: TokenLoss, data: list[Datum]) -> float:
    return sum_weights(data) if loss.normalised else 1.0


IN_THE_LEARNER = [*RATIO_LOSSES, SURROGATE, PPO.model_copy(update={"aggregation": "sum"})]


@pytest.mark.parametrize("loss", IN_THE_LEARNER, ids=label)
def test_the_learner_equals_plain_transformers_however_it_splits(model_dir, data, loss):
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    logits = torch.cat([model(torch.from_numpy(datum.token_ids_N)[None]).logits[0] for datum in data])
    inputs = {
        name: torch.from_numpy(np.concatenate([datum.loss_fn_inputs[name] for datum in data]))
        for name in loss.required_inputs
    }
    expected = loss_over_logits(loss, logits, inputs.pop("target_tokens"), inputs)
    expected.backward()
    for budget, positions in ((4096, "all"), (1, "all"), (45, "weighted")):
        learner = Learner(model_dir, cpu_config(max_tokens_per_microbatch=budget))
        output = learner.forward_backward(data, loss, divisor(loss, data), positions=positions)
        assert output.loss == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)
        seen = gradients(learner)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(seen[name], parameter.grad, rtol=1e-3, atol=2e-5)


def test_a_surrogate_gives_the_gradient_of_the_loss_that_it_stands_for(model_dir, data):
    direct, through = Learner(model_dir, cpu_config()), Learner(model_dir, cpu_config())
    direct.forward_backward(data, PPO, sum_weights(data))
    surrogates = []
    for datum, values in zip(data, through.forward(data).logprobs_per_datum, strict=True):
        leaf = torch.from_numpy(values).requires_grad_()
        inputs = {name: torch.from_numpy(array) for name, array in datum.loss_fn_inputs.items()}
        (PPO.token_losses(leaf, inputs).sum() / sum_weights(data)).backward()
        changed = {
            "target_tokens": datum.loss_fn_inputs["target_tokens"],
            "weights": np.ones(len(values), np.float32),
            "surrogate_weights": leaf.grad.numpy(),
        }
        surrogates.append(Datum(datum_id=datum.datum_id, token_ids_N=datum.token_ids_N, loss_fn_inputs=changed))
    through.forward_backward(surrogates, SURROGATE, 1.0, positions="all")
    for name, grad in gradients(direct).items():
        torch.testing.assert_close(gradients(through)[name], grad, rtol=1e-3, atol=1e-6)


# -- sections --------------------------------------------------------------------------------------------------------


def test_the_learner_knows_every_loss_and_a_run_two():
    learner, run = TypeAdapter(LossConfig), TypeAdapter(RunLossConfig)
    for loss in [*RATIO_LOSSES, SURROGATE]:
        assert learner.validate_python(loss.model_dump()) == loss
        assert {"target_tokens", "weights"} <= set(loss.required_inputs)
        with pytest.raises(ValidationError, match="cross_entropy"):
            run.validate_python(loss.model_dump())
    assert run.validate_python({"name": "importance_sampling"}) == ImportanceSampling(name="importance_sampling")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"name": "truncated_importance_sampling", "tis_cap": 0}, "tis_cap"),
        ({"name": "importance_sampling_ratio", "clip_ratio": -1}, "clip_ratio"),
        ({"name": "ppo_clip", "clip_low_threshold": -0.1}, "clip_low_threshold"),
        ({"name": "cispo", "clip_high_threshold": math.inf}, "clip_high_threshold"),
        ({"name": "ppo_clip", "clip_low_threshold": 1.3}, r"clip_low_threshold is 1\.3, clip_high_threshold 1\.2"),
        ({"name": "ppo_clip", "clip_low_threshold": 0.5, "clip_high_threshold": 0.4}, "must not be above"),
        ({"name": "cispo", "aggregation": "median"}, "aggregation"),
        ({"name": "surrogate", "aggregation": "mean"}, "aggregation"),
    ],
)
def test_values_that_make_no_loss_are_refused(values, words):
    with pytest.raises(ValidationError, match=words):
        TypeAdapter(LossConfig).validate_python(values)
