"""Seeds of completions, and greedy sampling."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weaver_rl.rollout import SamplingConfig, completion_seed

pytestmark = pytest.mark.unit


@given(st.integers(0, 2**31), st.text(), st.integers(0, 10**9), st.integers(0, 10**6))
def test_seeds_fit_into_63_bits_and_repeat(run_seed, prompt_id, step, index):
    seed = completion_seed(run_seed, prompt_id, step, index)
    assert 0 <= seed < 2**63
    assert seed == completion_seed(run_seed, prompt_id, step, index)


def test_every_argument_changes_the_seed():
    base = (1, "train-1", 2, 3)
    others = [(2, "train-1", 2, 3), (1, "train-2", 2, 3), (1, "train-1", 3, 3), (1, "train-1", 2, 4)]
    assert len({completion_seed(*arguments) for arguments in [base, *others]}) == 5


def test_digits_do_not_run_together():
    assert completion_seed(1, "a", 12, 3) != completion_seed(1, "a", 1, 23)
    assert completion_seed(1, "1a", 1, 3) != completion_seed(11, "a", 1, 3)


def test_seeds_of_a_large_step_are_distinct():
    seeds = {completion_seed(0, f"train-{p}", 5, i) for p in range(200) for i in range(50)}
    assert len(seeds) == 10_000


def test_seeds_are_the_same_in_another_process():
    code = "from weaver_rl.rollout import completion_seed; print(completion_seed(5, 'train-17', 300, 2))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert int(done.stdout) == completion_seed(5, "train-17", 300, 2)


def test_greedy_keeps_the_length_and_drops_every_filter():
    sampling = SamplingConfig(temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, max_tokens=33)
    assert sampling.greedy() == SamplingConfig(temperature=0.0, max_tokens=33)
