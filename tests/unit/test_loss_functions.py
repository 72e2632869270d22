"""From what a client sent to what the learner is given: which form, which defaults, and every refusal by name."""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from weaver_rl.errors import ServiceError
from weaver_rl.losses.config import CrossEntropy, ImportanceSampling, ImportanceSamplingRatio, PpoClip, Surrogate
from weaver_rl.service.loss_functions import LossRequest, RawDatum, describe_losses, losses_table, resolve_loss
from weaver_rl.service.loss_table import CONFIG_KEYS, FORMS, LossForm, loss_names

pytestmark = pytest.mark.unit

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "losses.md"
TARGETS = np.array([4, 2, 9])
WEIGHTED = {"target_tokens": TARGETS, "weights": np.array([0.0, 1.0, 0.5])}
IMPORTANCE = WEIGHTED | {"importance_weights": np.array([0.0, -1.5, 2.0], np.float32)}
RATIO = {
    "target_tokens": TARGETS,
    "logprobs": np.array([0.0, -0.5, -1.25]),
    "advantages": np.array([0, 2, -1]),
    "loss_mask": np.array([0, 1, 1]),
}
SURROGATE = {"target_tokens": TARGETS, "surrogate_weights": np.array([0.25, -2.0, 0.0])}
INPUTS: dict[str, dict[str, Any]] = {
    "cross_entropy": WEIGHTED,
    "importance_sampling": RATIO,
    "truncated_importance_sampling": RATIO,
    "ppo_clip": RATIO,
    "cispo": RATIO,
    "surrogate": SURROGATE,
}


def raw(inputs: dict[str, Any], datum_id: str | None = None) -> RawDatum:
    return RawDatum(datum_id=datum_id, token_ids_N=np.array([7, 4, 2]), inputs=inputs)


def resolve(name: str, *inputs: dict[str, Any], backward: bool = True, **config: Any) -> LossRequest:
    return resolve_loss(name, config, [raw(each) for each in inputs], backward=backward)


def refusal(name: str, *inputs: dict[str, Any], backward: bool = True, **config: Any) -> str:
    with pytest.raises(ServiceError) as caught:
        resolve(name, *inputs, backward=backward, **config)
    assert (caught.value.code, caught.value.status, caught.value.retryable) == ("invalid_request", 400, False)
    json.dumps(caught.value.details, allow_nan=False)
    return caught.value.message


# -- what the learner is given ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", INPUTS)
def test_the_learner_is_given_its_inputs_and_no_others(name):
    request = resolve(name, INPUTS[name] | {"sampling_mask": [[1], [2, 3], []]}, entropy_coeff=1e-4)
    (datum,) = request.data
    assert request.loss is not None
    assert set(datum.loss_fn_inputs) == set(request.loss.required_inputs)
    for key, values in datum.loss_fn_inputs.items():
        assert values.shape == (3,)
        assert values.dtype == (np.int64 if key == "target_tokens" else np.float32)
    assert (request.name, request.temperature, datum.datum_id) == (name, 1.0, "d0")
    assert request.ignored == ("loss_fn_config.entropy_coeff", "loss_fn_inputs.sampling_mask")
    assert not request.skipped_positions


def test_the_ratio_form_as_the_companion_sends_it():
    request = resolve("importance_sampling", RATIO, RATIO, entropy_coeff=1e-4, enable_debug_dump=False)
    assert request.loss == ImportanceSamplingRatio(name="importance_sampling_ratio")
    inputs = request.data[1].loss_fn_inputs
    np.testing.assert_array_equal(inputs["weights"], [0, 1, 1])
    np.testing.assert_array_equal(inputs["advantages"], [0, 2, -1])
    np.testing.assert_array_equal(inputs["logprobs"], np.array([0, -0.5, -1.25], np.float32))
    assert request.ignored == ("loss_fn_config.enable_debug_dump", "loss_fn_config.entropy_coeff")


def test_the_form_with_importance_weights():
    request = resolve("importance_sampling", IMPORTANCE, clip_ratio=2, temperature=0.5)
    assert request.loss == ImportanceSampling(name="importance_sampling", clip_ratio=2.0)
    assert request.temperature == 0.5
    np.testing.assert_array_equal(request.data[0].loss_fn_inputs["importance_weights"], [0, -1.5, 2])


def test_null_is_no_clip_ratio():
    for inputs in (IMPORTANCE, RATIO):
        loss = resolve("importance_sampling", inputs, clip_ratio=None).loss
        assert isinstance(loss, ImportanceSampling | ImportanceSamplingRatio)
        assert loss.clip_ratio is None


def test_defaults_are_the_sections_own():
    assert resolve("ppo_clip", RATIO).loss == PpoClip(name="ppo_clip")
    chosen = resolve("ppo_clip", RATIO, clip_low_threshold=0, clip_high_threshold=3, aggregation="sum").loss
    assert chosen == PpoClip(name="ppo_clip", clip_low_threshold=0, clip_high_threshold=3, aggregation="sum")


def test_cross_entropy_takes_the_loss_mask_where_weights_are_absent():
    request = resolve("cross_entropy", RATIO, WEIGHTED | {"loss_mask": np.ones(3)})
    assert request.loss == CrossEntropy(name="cross_entropy")
    np.testing.assert_array_equal(request.data[0].loss_fn_inputs["weights"], [0, 1, 1])
    np.testing.assert_array_equal(request.data[1].loss_fn_inputs["weights"], [0, 1, 0.5])
    assert request.ignored == ("loss_fn_inputs.advantages", "loss_fn_inputs.logprobs", "loss_fn_inputs.loss_mask")
    assert resolve("cross_entropy", RATIO).ignored == ("loss_fn_inputs.advantages", "loss_fn_inputs.logprobs")


def test_a_surrogate_counts_every_token_and_lists_the_loss_inputs_of_the_client():
    request = resolve("surrogate", SURROGATE | WEIGHTED)
    assert request.loss == Surrogate(name="surrogate")
    np.testing.assert_array_equal(request.data[0].loss_fn_inputs["weights"], [1, 1, 1])
    assert request.ignored == ("loss_fn_inputs.weights",)
    nothing = SURROGATE | {"surrogate_weights": np.zeros(3)}
    assert resolve("surrogate", nothing).loss == request.loss


def test_ids_are_kept_and_made_up_where_there_are_none():
    data = [raw(WEIGHTED, "mine"), raw(WEIGHTED)]
    request = resolve_loss("cross_entropy", {}, data, backward=True)
    assert [datum.datum_id for datum in request.data] == ["mine", "d1"]


@pytest.mark.parametrize("name", INPUTS)
def test_a_target_of_minus_100_has_no_weight(name):
    targets = np.array([-100, 2, -100], np.int32)
    request = resolve(name, INPUTS[name], INPUTS[name] | {"target_tokens": targets})
    inputs = request.data[1].loss_fn_inputs
    np.testing.assert_array_equal(inputs["target_tokens"], [0, 2, 0])
    np.testing.assert_array_equal(inputs["weights"], [0, 1, 0])
    assert inputs["target_tokens"].dtype == np.int64
    assert {index: list(where) for index, where in request.skipped_positions.items()} == {1: [0, 2]}
    np.testing.assert_array_equal(targets, [-100, 2, -100])


@pytest.mark.parametrize("name", loss_names())
def test_a_forward_needs_targets_alone(name):
    extra = {"weights": np.zeros(2), "loss_mask": "x", "tokens_of_mine": 3}
    request = resolve(name, {"target_tokens": TARGETS} | extra, backward=False, temperature=0.7, clip=1)
    assert request.loss is None
    assert request.temperature == 0.7
    assert set(request.data[0].loss_fn_inputs) == {"target_tokens"}
    assert {"loss_fn_inputs.tokens_of_mine", "loss_fn_config.clip"} <= set(request.ignored)
    skipped = resolve(name, {"target_tokens": np.array([1, -100, 2])}, backward=False)
    assert list(skipped.skipped_positions[0]) == [1]
    np.testing.assert_array_equal(skipped.data[0].loss_fn_inputs["target_tokens"], [1, 0, 2])
    assert "loss_fn_inputs.target_tokens is missing; a forward needs target_tokens" in refusal(
        name, WEIGHTED | {"target_tokens": TARGETS}, {"weights": TARGETS}, backward=False
    )


def test_a_forward_lists_no_input_of_the_loss_as_ignored():
    assert resolve("importance_sampling", IMPORTANCE | RATIO, backward=False).ignored == ()
    assert resolve("forward_logprob", WEIGHTED, backward=False).ignored == ("loss_fn_inputs.weights",)


@pytest.mark.parametrize("values", [[4, 2, 9], TARGETS.astype(np.int32)])
def test_targets_may_come_as_a_list_or_in_32_bits(values):
    request = resolve("cross_entropy", {"target_tokens": values, "weights": [0, 1.0, True]})
    np.testing.assert_array_equal(request.data[0].loss_fn_inputs["target_tokens"], TARGETS)
    np.testing.assert_array_equal(request.data[0].loss_fn_inputs["weights"], [0, 1, 1])


# -- which form ------------------------------------------------------------------------------------------------------


def test_both_forms_or_neither_is_an_error_that_names_them():
    text = refusal("importance_sampling", IMPORTANCE | RATIO)
    assert text == (
        "datum 0: loss_fn_inputs have the inputs of both forms; allowed: weights, importance_weights (importance "
        "weights form) or logprobs, advantages, loss_mask (ratio form), not both"
    )
    text = refusal("importance_sampling", RATIO, {"target_tokens": TARGETS})
    assert text.startswith("datum 1: loss_fn_inputs have the inputs of neither form; allowed: weights, importance_")
    assert text.endswith("(ratio form); seen target_tokens")


@pytest.mark.parametrize(
    ("inputs", "gap"),
    [
        ({"weights"}, "the importance weights form lacks importance_weights"),
        ({"importance_weights"}, "the importance weights form lacks weights"),
        ({"logprobs", "advantages"}, "the ratio form lacks loss_mask"),
        ({"loss_mask"}, "the ratio form lacks logprobs, advantages"),
        (
            {"weights", "logprobs"},
            "the importance weights form lacks importance_weights; the ratio form lacks advantages, loss_mask",
        ),
    ],
)
def test_half_a_form_names_what_is_missing(inputs, gap):
    every = IMPORTANCE | RATIO
    text = refusal("importance_sampling", {name: every[name] for name in inputs | {"target_tokens"}})
    assert text.endswith(gap)
    assert f"seen {', '.join(sorted(inputs | {'target_tokens'}))}; " in text


def test_a_complete_form_beside_a_piece_of_the_other():
    request = resolve("importance_sampling", RATIO | {"weights": WEIGHTED["weights"]})
    assert isinstance(request.loss, ImportanceSamplingRatio)
    np.testing.assert_array_equal(request.data[0].loss_fn_inputs["weights"], RATIO["loss_mask"])
    assert request.ignored == ("loss_fn_inputs.weights",)


def test_all_data_are_in_one_form():
    text = refusal("importance_sampling", RATIO, RATIO, IMPORTANCE)
    assert text == (
        "datum 2: loss_fn_inputs are those of the importance weights form (weights, importance_weights), those of "
        "datum 0 of the ratio form (logprobs, advantages, loss_mask): one request takes one form"
    )


# -- refusals --------------------------------------------------------------------------------------------------------


def test_an_unknown_name_is_told_every_name():
    text = refusal("ppo", RATIO)
    assert text == f"loss_fn: seen 'ppo'; allowed: {', '.join(loss_names())}"
    assert set(loss_names()) == INPUTS.keys() | {"forward_logprob"}
    assert refusal("cross_entrop", RATIO).endswith("did you mean 'cross_entropy'?")


def test_forward_logprob_has_no_backward():
    text = refusal("forward_logprob", WEIGHTED)
    assert "seen forward_logprob, which runs forward only" in text


@pytest.mark.parametrize("backward", [True, False])
def test_no_data_and_empty_data_are_refused(backward):
    assert refusal("cross_entropy", backward=backward) == "data is empty: at least one datum is needed"
    empty = RawDatum(datum_id=None, token_ids_N=np.zeros(0, np.int64), inputs={name: np.zeros(0) for name in WEIGHTED})
    with pytest.raises(ServiceError, match=r"datum 1: model_input is empty: a datum needs at least one token"):
        resolve_loss("cross_entropy", {}, [raw(WEIGHTED), empty], backward=backward)


@pytest.mark.parametrize("name", INPUTS)
def test_every_input_is_needed_and_named_when_it_is_missing(name):
    if name == "importance_sampling":
        return
    for missing in INPUTS[name]:
        rest = {key: values for key, values in INPUTS[name].items() if key != missing}
        text = refusal(name, INPUTS[name], rest)
        instead = " (or loss_mask)" if missing == "weights" else ""
        assert text.startswith(f"datum 1: loss_fn_inputs.{missing} is missing{instead}; {name} needs target_tokens, ")
        assert text.endswith(f"seen {', '.join(sorted(rest))}")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("target_tokens", np.array([4.0, 2.0, 9.0]), "must be integers (int64 or int32), seen float64"),
        ("target_tokens", np.array([True, False, True]), "must be integers (int64 or int32), seen bool"),
        ("target_tokens", np.array([4, 2, 9], np.uint64), "must be integers (int64 or int32), seen uint64"),
        ("target_tokens", np.array([4, 2]), "must be int64 of shape [3], one number per input token, seen int64 of"),
        ("target_tokens", np.array([4, -1, 9]), "must be >= 0, or -100 to leave it out, seen -1 at 1"),
        ("target_tokens", np.array([-100, 2, -99]), "seen -99 at 2"),
        ("weights", np.ones(4), "must be float32 of shape [3], one number per input token, seen float64 of shape [4]"),
        ("weights", np.ones((3, 1)), "seen float64 of shape [3, 1]"),
        ("weights", np.float64(1.0), "seen float64 of shape []"),
        ("weights", [[1], [1, 2], []], "seen no array of numbers"),
        ("weights", ["a", "b", "c"], "must be float32 of shape [3]"),
        ("weights", [1.0, None, 1.0], "seen no array of numbers"),
        ("weights", None, "seen no array of numbers"),
        ("weights", {"data": [1, 1, 1]}, "seen no array of numbers"),
        ("weights", np.array([1.0, math.nan, 1.0]), "must be finite in float32, seen nan at 1"),
        ("weights", np.array([1.0, 1.0, -math.inf], np.float32), "seen -inf at 2"),
        ("weights", np.array([1e39, 0.0, 0.0]), "must be finite in float32, seen 1e+39 at 0"),
    ],
)
def test_what_is_wrong_with_an_input_is_named(field, value, words):
    with pytest.raises(ServiceError) as caught:
        resolve_loss("cross_entropy", {}, [raw(WEIGHTED), raw(WEIGHTED | {field: value}, "second")], backward=True)
    assert caught.value.message.startswith(f"datum 'second' (index 1): loss_fn_inputs.{field} must be ")
    assert words in caught.value.message
    assert caught.value.details == {
        "field": f"loss_fn_inputs.{field}",
        "datum_index": 1,
        "datum_id": "second",
    }


@pytest.mark.parametrize("field", ["logprobs", "advantages", "loss_mask"])
def test_every_input_of_a_ratio_is_checked(field):
    bad = RATIO | {field: np.array([0.0, math.nan, 0.0])}
    assert f"datum 1: loss_fn_inputs.{field} must be finite in float32" in refusal("cispo", RATIO, bad)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        *(("cross_entropy", "temperature", bad) for bad in (0, -1.0, 1e-4, math.nan, math.inf, "1.0", None, True, [])),
        ("cross_entropy", "temperature", 10**400),
        ("cross_entropy", "aggregation", "median"),
        ("cross_entropy", "aggregation", None),
        ("cross_entropy", "aggregation", []),
        ("importance_sampling", "clip_ratio", 0),
        ("importance_sampling", "clip_ratio", "2"),
        ("importance_sampling", "clip_ratio", math.inf),
        *(("truncated_importance_sampling", "tis_cap", bad) for bad in (0, -2.0, None, False, "2.0", 10**400)),
        ("ppo_clip", "clip_low_threshold", -0.1),
        ("ppo_clip", "clip_high_threshold", 0),
        ("cispo", "clip_high_threshold", math.nan),
        ("cispo", "clip_low_threshold", {"a": 1}),
    ],
)
@pytest.mark.parametrize("backward", [True, False])
def test_a_bad_value_of_a_known_key_names_key_value_and_what_is_allowed(name, key, value, backward):
    text = refusal(name, INPUTS[name], backward=backward, **{key: value})
    assert text.startswith(f"loss_fn_config.{key}: seen ")
    assert text.endswith(f"; allowed: {CONFIG_KEYS[key].allowed}")
    if isinstance(value, str) or value is None:
        assert f"seen {value!r};" in text


def test_an_integer_that_python_does_not_write():
    text = refusal("cross_entropy", WEIGHTED, temperature=-(10**5000))
    assert text.startswith("loss_fn_config.temperature: seen an integer too long to show; allowed: ")


def test_thresholds_the_wrong_way_round():
    text = refusal("ppo_clip", RATIO, clip_low_threshold=1.5)
    assert text == (
        "loss_fn_config: clip_low_threshold is 1.5, clip_high_threshold 1.2: the low one must not be above the high one"
    )


def test_a_key_of_another_loss_is_ignored_and_said_to_be():
    assert resolve("cross_entropy", WEIGHTED, tis_cap=-1).ignored == ("loss_fn_config.tis_cap",)
    assert resolve("surrogate", SURROGATE, aggregation="mean").ignored == ("loss_fn_config.aggregation",)


def test_weights_that_add_up_to_nothing():
    zeros = RATIO | {"loss_mask": np.zeros(3, np.int64)}
    text = refusal("ppo_clip", zeros, zeros)
    assert text.startswith("loss_fn_inputs.loss_mask of all 2 data add up to 0 (targets of -100 count nothing): no ")
    assert resolve("ppo_clip", zeros, RATIO).loss is not None
    assert resolve("ppo_clip", zeros, aggregation="sum").loss is not None
    assert resolve("ppo_clip", zeros, backward=False).loss is None
    left_out = WEIGHTED | {"target_tokens": np.array([4, -100, -100])}
    assert "loss_fn_inputs.weights of all 1 data add up to 0" in refusal("cross_entropy", left_out)
    negative = WEIGHTED | {"weights": np.array([0.5, -1.0, -1.0])}
    assert "add up to -1.5" in refusal("cross_entropy", negative)


def test_messages_stay_short_whatever_is_sent():
    many = {f"input_{index}": 0 for index in range(5000)}
    assert len(refusal("x" * 10_000, WEIGHTED)) < 500
    assert len(refusal("cross_entropy", {"y" * 100_000: 1})) < 500
    assert len(refusal("cross_entropy", many)) < 2000
    assert len(refusal("cross_entropy", WEIGHTED, aggregation="z" * 10_000)) < 500


# -- properties ------------------------------------------------------------------------------------------------------

LENGTHS = st.integers(1, 40)
HUGE = float(np.float32(1e30))
FLOATS = st.sampled_from([np.float32, np.float64])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)


@st.composite
def data_of(draw: st.DrawFn, form: LossForm) -> list[RawDatum]:
    """Good data of any form, in the dtypes that may come over the wire."""
    made = []
    for index in range(draw(st.integers(1, 3))):
        length = draw(LENGTHS)
        inputs: dict[str, Any] = {}
        for each in form.inputs:
            if each.dtype == "int64":
                dtype, elements = draw(st.sampled_from([np.int32, np.int64])), st.just(-100) | st.integers(0, 2**31 - 1)
            else:
                dtype, low = draw(FLOATS), 0.0 if each.becomes == "weights" else -HUGE
                elements = st.floats(low, HUGE, width=32, allow_subnormal=False)
            inputs[each.name] = draw(hnp.arrays(dtype, length, elements=elements))
        inputs[form.inputs[0].name][0] = 1
        if form.weights_name:
            inputs[form.weights_name][0] = 1.0
        datum_id = draw(st.none() | st.text(min_size=1, max_size=9))
        tokens = np.arange(length, dtype=np.int64) + index
        made.append(RawDatum(datum_id=datum_id, token_ids_N=tokens, inputs=inputs))
    return made


@pytest.mark.parametrize("form", [form for form in FORMS if form.section], ids=lambda form: form.learner_name)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_good_data_come_through_unchanged(form: LossForm, data: st.DataObject):
    sent = data.draw(data_of(form))
    request = resolve_loss(form.name, {}, sent, backward=True)
    assert isinstance(request.loss, form.section)
    assert not request.ignored
    for index, (came, datum) in enumerate(zip(sent, request.data, strict=True)):
        assert datum.datum_id == (came.datum_id if came.datum_id is not None else f"d{index}")
        assert datum.token_ids_N is came.token_ids_N
        skip = came.inputs["target_tokens"] == -100
        np.testing.assert_array_equal(np.flatnonzero(skip), request.skipped_positions.get(index, []))
        assert not datum.loss_fn_inputs["weights"][skip].any()
        assert not datum.loss_fn_inputs["target_tokens"][skip].any()
        for each in form.inputs:
            expected = came.inputs[each.name].astype(each.dtype)
            np.testing.assert_array_equal(datum.loss_fn_inputs[each.becomes][~skip], expected[~skip])


@settings(max_examples=100, deadline=None)
@given(
    name=st.sampled_from(loss_names()),
    backward=st.booleans(),
    values=st.lists(st.dictionaries(st.sampled_from([*IMPORTANCE, *RATIO, *SURROGATE, "other"]), JSON), max_size=3),
    config=st.dictionaries(st.sampled_from([*CONFIG_KEYS, "other"]), JSON),
)
def test_junk_is_refused_and_never_breaks_anything(name, backward, values, config):
    with contextlib.suppress(ServiceError):
        resolve_loss(name, config, [raw(each) for each in values], backward=backward)


# -- the table -------------------------------------------------------------------------------------------------------


def test_the_document_holds_the_table_that_the_service_acts_on():
    text = DOCUMENT.read_text()
    printed = text.partition("<!-- tables: begin -->\n")[2].partition("<!-- tables: end -->")[0]
    assert printed == losses_table()


def test_the_description_is_what_the_service_does():
    described = json.loads(json.dumps(describe_losses(), allow_nan=False))
    assert [(each["name"], each["form"]) for each in described] == [(form.name, form.form) for form in FORMS]
    for each in described:
        inputs = {
            item["name"]: np.ones(3, np.int64 if item["dtype"] == "int64" else np.float32) for item in each["inputs"]
        }
        defaults = {key["name"]: key["default"] for key in each["config"]}
        backward = each["direction"] != "forward"
        plain = resolve(each["name"], inputs, backward=backward)
        given_all = resolve(each["name"], inputs, backward=backward, **defaults)
        assert (given_all.loss, given_all.temperature, given_all.ignored) == (plain.loss, plain.temperature, ())
        assert plain.ignored == ()


def test_every_key_is_explained_and_every_explanation_used():
    assert {key for form in FORMS for key in form.defaults} == CONFIG_KEYS.keys()
    defaults: dict[str, set[Any]] = {}
    for form in FORMS:
        for key, value in form.defaults.items():
            defaults.setdefault(key, set()).add(value)
    assert all(len(values) == 1 for values in defaults.values()), "one line of the table must be true of every loss"


def test_no_cell_breaks_the_table():
    for block in losses_table().strip().split("\n\n"):
        lines = block.splitlines()
        assert len({line.count("|") for line in lines}) == 1
        assert len(lines) > 2


def test_it_imports_nothing_heavy():
    code = (
        "import sys, weaver_rl.service.loss_functions; "
        "sys.exit(bool({'torch', 'transformers', 'ray', 'vllm'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
