"""Rewards without processes: their configuration, loading, built-ins, values and sums."""

from __future__ import annotations

import asyncio
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from weaver_rl.errors import ConfigError, MissingRewardsError, RewardError
from weaver_rl.rewards.combine import check_missing, combine, missing_reasons
from weaver_rl.rewards.config import BUILTINS, RewardSpec, check_labels
from weaver_rl.rewards.graders import last_number
from weaver_rl.rewards.plugin import LoadedReward, load_reward
from weaver_rl.types import Completion, Prompt, RewardComponent, Rollout, ScoredRollout

pytestmark = pytest.mark.unit

PLUGINS = Path(__file__).parent / "reward_plugins"


def make_rollout(text: str, answer: str | None = None, num_tokens: int = 3) -> Rollout:
    completion = Completion(
        token_ids_L=np.zeros(num_tokens, np.int32),
        logprobs_L=np.zeros(num_tokens, np.float32),
        versions_L=np.zeros(num_tokens, np.int32),
        stop_reason="stop",
    )
    prompt = Prompt(prompt_id="p", text="?", token_ids_P=(1,), answer=answer)
    return Rollout(rollout_id="r", prompt=prompt, completion=completion, text=text)


def load(name: str, **args: Any) -> LoadedReward:
    return load_reward(RewardSpec(name=name, args=args), PLUGINS)


def test_importing_the_config_stays_light() -> None:
    heavy = "'torch', 'ray', 'vllm', 'transformers', 'sympy', 'math_verify', 'numpy', 'asyncio'"
    code = f"import sys, weaver_rl.rewards.config; sys.exit(str([m for m in ({heavy}) if m in sys.modules]))"
    result = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert result.stderr.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "seen"),
    [
        ("exact_mach", "did you mean 'exact_match'"),
        ("rewards.py", r"write rewards.py:FUNCTION"),
        ("rewards.py:", "seen ''"),
        ("rewards.py:not a name", "seen 'not a name'"),
        ("some/rewards:brevity", r"expected file.py or package.module before ':'"),
        (":f", "seen ''"),
    ],
)
def test_names_that_cannot_be_resolved_are_refused_with_the_config(name: str, seen: str) -> None:
    with pytest.raises(ValidationError, match=seen):
        RewardSpec(name=name)


@pytest.mark.parametrize("label", ["a\nb", "a\n", "\ta", "a\x1b[31m", "a\x85b"])
def test_a_label_with_a_control_character_is_refused_with_the_config(label: str) -> None:
    for named in ({"name": "task", "label": label}, {"name": f"{label}.py:f"}):
        with pytest.raises(ValidationError, match="has a line break, a tab or another control character"):
            RewardSpec.model_validate(named)


def test_every_component_needs_a_name_of_its_own() -> None:
    twice = [RewardSpec(name="regex", args={"pattern": "a"}), RewardSpec(name="regex", args={"pattern": "b"})]
    with pytest.raises(ConfigError, match=r"rewards 0 and 1 are both recorded as 'regex'"):
        check_labels(twice)
    assert check_labels([twice[0], RewardSpec(name="regex", label="b")])[1].component_name == "b"


@pytest.mark.parametrize(
    ("name", "args", "mode", "value"),
    [
        ("friendly.py:brevity", {"limit": 10}, "each", -0.4),
        ("friendly.py:takes_any", {"a": 1, "b": 2}, "each", 2.0),
        ("friendly.py:Threshold", {"at": 5}, "each", 0.0),
        ("friendly:brevity", {"limit": 10, "scale": 2.0}, "each", -0.8),
        ("regex", {"pattern": "^f.ur$"}, "each", 1.0),
    ],
)
def test_functions_and_classes_are_called_with_their_args(name: str, args: Any, mode: str, value: float) -> None:
    loaded = load(name, **args)
    assert loaded.mode == mode
    assert loaded.call(make_rollout("four")) == pytest.approx(value)
    assert re.fullmatch("[0-9a-f]{64}", loaded.source)


def test_async_and_batched_are_told_from_the_signature() -> None:
    assert load("hostile.py:concurrently").mode == "concurrent"
    assert load("hostile.py:batched").mode == "batched"
    batch = load("friendly.py:AsyncBatch")
    assert batch.mode == "batched"
    assert asyncio.run(batch.call([make_rollout("a"), make_rollout("b")])) == [2.0, 2.0]


@pytest.mark.parametrize(
    ("name", "args", "seen"),
    [
        ("freindly.py:brevity", {}, r"no file .*freindly\.py.*did you mean 'friendly\.py'.*hostile\.py"),
        (
            "friendly.py:brevty",
            {},
            r"friendly\.py holds no 'brevty' \(did you mean 'brevity'\?\); functions and classes",
        ),
        ("friendly.py:NOT_A_FUNCTION", {}, "is of type int, not a function"),
        ("no_such_package.rewards:f", {}, "no module named 'no_such_package'; looked in"),
        (
            "friendly.py:brevity",
            {"limt": 3},
            r"takes no argument 'limt' \(did you mean 'limit'\?\); allowed: limit, scale",
        ),
        ("friendly.py:needs_pattern", {}, r"needs args: \{pattern: …\}"),
        ("friendly.py:takes_nothing", {}, r"write def f\(rollout\)"),
        ("friendly.py:Threshold", {"at": -1}, "building Threshold raised ValueError: at must not be negative, seen -1"),
        ("friendly.py:Threshold", {}, r"needs args: \{at: …\}"),
        ("friendly.py:NotCallable", {}, "NotCallable has no __call__"),
        ("regex", {"pattern": "("}, "argument 'pattern': not a regular expression"),
        ("regex", {"patern": "x"}, "did you mean 'pattern'"),
        ("numeric", {"tolerance": "much"}, "argument 'tolerance': .*seen 'much'"),
        ("length_penalty", {"soft": 9, "max": 9}, "soft must be below max, seen soft=9 and max=9"),
        ("task", {}, "this task has none"),
    ],
)
def test_what_cannot_be_loaded_is_named_with_what_would_do(name: str, args: Any, seen: str) -> None:
    with pytest.raises(RewardError, match=seen):
        load(name, **args)


GOLD = ["7", "-3", "1,234.5", "3/4", "1e-3", "#### 42", "0", ".5", "\N{MINUS SIGN}8", "100000000000000000000000"]
GOLD_MATH = ["7", r"\frac{1}{2}", "(1, 2)", r"\sqrt{2}", "x^2+1", r"$\{1,2\}$", r"\boxed{12}", "0.5", "-3"]


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        *(("exact_match", answer) for answer in [*GOLD, *GOLD_MATH, "Paris", ""]),
        *(("numeric", answer) for answer in GOLD),
        *(("math_verify", answer) for answer in GOLD_MATH),
    ],
)
def test_a_grader_gives_the_gold_answer_one(name: str, answer: str) -> None:
    call = load(name).call
    assert call(make_rollout(answer, answer)) == 1.0
    assert call(make_rollout("I do not know", answer)) == 0.0
    assert call(make_rollout("", answer)) == float(answer == "")
    with pytest.raises(ValueError, match="'p' has no answer"):
        call(make_rollout(answer, None))


@given(st.integers() | st.floats(allow_nan=False, allow_infinity=False))
def test_numeric_gives_every_number_one(number: float) -> None:
    call = load("numeric").call
    assert call(make_rollout(f"so the answer is {number}.", str(number))) == 1.0
    assert call(make_rollout(f"{number * 1.001 + 0.01}", str(number))) == 0.0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 + 4 = 7.", 7),
        ("5-3", 3),
        ("x=-3", -3),
        ("(-3)", -3),
        ("1,234,567", 1234567),
        ("1,2,3", 3),
        ("12,3456", 3456),
        ("$1,000.50", 1000.5),
        ("1/0", float("nan")),
        ("none", None),
        ("-1/4", -0.25),
        ("2e3 units", 2000),
    ],
)
def test_last_number(text: str, number: float | None) -> None:
    assert last_number(text) == pytest.approx(number, nan_ok=True) if number is not None else last_number(text) is None


def test_a_gold_answer_that_is_no_number_is_missing_not_zero() -> None:
    with pytest.raises(ValueError, match="holds no number"):
        load("numeric").call(make_rollout("7", "seven"))


@pytest.mark.parametrize(
    ("text", "score"),
    [("so it is $\\frac{2}{4}$", 1.0), ("\\boxed{0.5}", 1.0), ("$\\frac{1}{3}$", 0.0), ("$\\frac{", 0.0)],
)
def test_math_verify_compares_values(text: str, score: float) -> None:
    assert load("math_verify").call(make_rollout(text, r"\frac{1}{2}")) == score


def test_math_verify_reads_the_whole_gold_tuple() -> None:
    assert load("math_verify").call(make_rollout("$(1, 2)$", "(1, 2)")) == 1.0
    assert load("math_verify").call(make_rollout("$2$", "(1, 2)")) == 0.0


def test_length_penalty_follows_its_formula() -> None:
    call = load("length_penalty", soft=200, max=256).call
    lengths = [0, 200, 228, 256, 10_000]
    assert [call(make_rollout("", num_tokens=length)) for length in lengths] == [0.0, 0.0, -0.5, -1.0, -1.0]
    assert load("length_penalty", soft=1, max=3, unit="chars").call(make_rollout("ab")) == -0.5
    with pytest.raises(ValueError, match="carries no tokens"):
        call(make_rollout("words", num_tokens=0))


def test_regex_options() -> None:
    rollout = make_rollout("<A>\n1</A>")
    assert load("regex", pattern="<a>.*</a>", ignore_case=True).call(rollout) == 1.0
    assert load("regex", pattern="<A>.*</A>", dot_all=False).call(rollout) == 0.0
    assert load("regex", pattern="<A>", full=True).call(rollout) == 0.0


def is_even(rollout: Rollout) -> float:
    return float(int(rollout.text) % 2 == 0)


def test_the_task_reward_calls_the_task_scorer() -> None:
    loaded = load_reward(RewardSpec(name="task"), PLUGINS, is_even)
    assert loaded.call(make_rollout("4")) == 1.0
    assert loaded.call(make_rollout("5")) == 0.0


def test_every_builtin_is_listed_where_it_is() -> None:
    needed: dict[str, dict[str, Any]] = {"regex": {"pattern": "x"}, "length_penalty": {"soft": 1, "max": 2}}
    for name in BUILTINS:
        assert load_reward(RewardSpec(name=name, args=needed.get(name, {})), PLUGINS, is_even).mode == "each"


SPECS = [RewardSpec(name="exact_match"), RewardSpec(name="my.py:f", weight=0.5), RewardSpec(name="my.py:g", weight=0)]


def scored(*values: float | str, rollout_id: str = "r") -> ScoredRollout:
    components = [
        RewardComponent(name=spec.component_name, value=None, missing=value)
        if isinstance(value, str)
        else RewardComponent(name=spec.component_name, value=value)
        for spec, value in zip(SPECS, values, strict=True)
    ]
    rollout = make_rollout("x")
    named = Rollout(rollout_id=rollout_id, prompt=rollout.prompt, completion=rollout.completion, text="x")
    return combine(named, components, SPECS)


def test_components_are_summed_by_weight_and_missing_ones_are_not_zero() -> None:
    assert scored(1.0, -2.0, 100.0).reward == 0.0
    assert scored(1.0, 4.0, 0.0).reward == 3.0
    assert scored(1.0, "raised KeyError: 'x'", 1.0).reward is None
    assert scored(1.0, 1.0, "raised KeyError: 'x'").reward == 1.5
    assert [component.value for component in scored(1.0, 2.0, 3.0).components] == [1.0, 2.0, 3.0]


def test_missing_reasons_are_counted_without_their_details() -> None:
    step = [scored(1.0, "raised KeyError: 'a' (f.py:1)", 1.0), scored("raised KeyError: 'b'", "returned NaN", 1.0)]
    assert missing_reasons(step) == {
        "my.py:f raised KeyError": 1,
        "exact_match raised KeyError": 1,
        "my.py:f returned NaN": 1,
    }


def test_too_many_missing_rewards_stop_the_step_with_the_reasons() -> None:
    good = [scored(1.0, 1.0, "ignored: weight 0")] * 7
    bad = [scored(1.0, f"raised KeyError: {index}", 1.0, rollout_id=f"bad-{index}") for index in range(3)]
    check_missing([*good, *bad], max_missing_fraction=0.3)
    check_missing([], max_missing_fraction=0.0)
    with pytest.raises(MissingRewardsError) as caught:
        check_missing([*good, *bad], max_missing_fraction=0.29)
    message = str(caught.value)
    assert "3 of 10 rollouts of the step have no reward (30.0%)" in message
    assert "allows 29.0%" in message
    assert "3 × my.py:f raised KeyError; for example rollout bad-0: raised KeyError: 0" in message
    assert "ignored" not in message
    assert str(pickle.loads(pickle.dumps(caught.value))) == message
