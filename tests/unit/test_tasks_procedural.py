"""reasoning-gym problems: addressed by index alone, never shared between training and evaluation, judged rightly."""

from __future__ import annotations

import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from weaver_rl.errors import TaskError
from weaver_rl.tasks.config import ReasoningGymTask
from weaver_rl.tasks.load import load_scorer, load_task
from weaver_rl.tasks.procedural import ProceduralTask
from weaver_rl.tasks.task import Problem, Task
from weaver_rl.types import Completion, Prompt, Rollout

pytestmark = pytest.mark.unit

TINY_SUMS = ReasoningGymTask(
    dataset="chain_sum",
    args={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    prompt_template="{metadata[expression]} =",
)


def rollout_of(problem: Problem, text: str) -> Rollout:
    prompt = Prompt(
        prompt_id=problem.problem_id, text="", token_ids_P=(1,), answer=problem.answer, columns=problem.columns
    )
    none = np.array([], np.int32)
    completion = Completion(token_ids_L=none, logprobs_L=none.astype(np.float32), versions_L=none, stop_reason="stop")
    return Rollout(rollout_id="r", prompt=prompt, completion=completion, text=text)


def test_template_reaches_into_metadata():
    problem = ProceduralTask(TINY_SUMS, seed=0).problem(0)
    left, operator, right, _ = str(problem.prompt).split()
    assert problem.answer == str(int(left) + int(right) if operator == "+" else int(left) - int(right))
    assert problem.columns["metadata"]["source_dataset"] == "chain_sum"


def test_no_training_problem_is_an_evaluation_problem_even_when_there_are_only_200():
    task = ProceduralTask(TINY_SUMS, seed=3)
    held_out = {problem.prompt for problem in task.eval_problems(25)}
    trained_on = {task.problem(index).prompt for index in range(3000)}
    assert len(held_out) == 25
    assert len(trained_on) > 120
    assert not held_out & trained_on


def test_evaluation_problems_are_the_same_for_every_seed_and_number_asked():
    first, second = ProceduralTask(TINY_SUMS, seed=1), ProceduralTask(TINY_SUMS, seed=2)
    assert first.eval_problems(20)[:10] == second.eval_problems(10)
    assert [first.problem(i) for i in range(10)] != [second.problem(i) for i in range(10)]


@pytest.mark.parametrize("dataset", ["chain_sum", "codeio", "gsm_symbolic"])
def test_a_problem_depends_on_the_index_alone(dataset):
    config = ReasoningGymTask(dataset=dataset)
    forward = ProceduralTask(config, seed=5)
    random.seed(1)
    there = {i: forward.problem(i) for i in (*range(30), 300, 10**12)}
    random.seed(2)
    backward = ProceduralTask(config, seed=5)
    assert {i: backward.problem(i) for i in reversed(there)} == there


def test_a_new_process_gives_the_same_problems():
    code = (
        "from weaver_rl.tasks.procedural import ProceduralTask; from weaver_rl.tasks.config import ReasoningGymTask;"
        "t = ProceduralTask(ReasoningGymTask(dataset='gsm_symbolic'), seed=4);"
        "print([t.problem(i).prompt for i in (7, 999)] + [p.prompt for p in t.eval_problems(3)])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    task = ProceduralTask(ReasoningGymTask(dataset="gsm_symbolic"), seed=4)
    expected = [task.problem(i).prompt for i in (7, 999)] + [p.prompt for p in task.eval_problems(3)]
    assert result.stdout.strip() == str(expected)


def test_drawing_leaves_the_global_generators_alone():
    random.seed(1)
    np.random.seed(1)
    ProceduralTask(TINY_SUMS, seed=0).problem(5)
    drawn = random.random(), np.random.rand()
    random.seed(1)
    np.random.seed(1)
    assert drawn == (random.random(), np.random.rand())


GRADED = (
    "chain_sum", "basic_arithmetic", "letter_counting", "countdown", "gcd", "leg_counting", "spell_backward",
    "base_conversion", "number_sorting", "word_sorting", "gsm_symbolic", "simple_equations",
)  # fmt: skip


@pytest.mark.parametrize("dataset", GRADED)
def test_the_travelled_scorer_gives_the_gold_answer_one(dataset):
    config = ReasoningGymTask(dataset=dataset)
    task = load_task(config, Path(), seed=0)
    assert isinstance(task, Task)
    scorer = load_scorer(config, Path(), task)
    assert scorer is not None
    scorer = pickle.loads(pickle.dumps(scorer))
    problem = pickle.loads(pickle.dumps(task.problem(11)))
    assert scorer(rollout_of(problem, f" {problem.answer}\n")) == 1.0
    assert scorer(rollout_of(problem, "certainly not")) < 1.0


def test_answer_tag_judges_what_stands_in_the_last_tag():
    task = load_task(TINY_SUMS.model_copy(update={"answer_tag": "answer"}), Path(), seed=0)
    scorer, problem = task.scorer(), task.problem(0)
    assert scorer is not None
    assert scorer(rollout_of(problem, f"so <answer>99</answer>, no: <answer> {problem.answer} </answer>")) == 1.0
    assert scorer(rollout_of(problem, str(problem.answer))) < 1.0


@pytest.mark.parametrize(
    ("update", "said"),
    [
        ({"dataset": "chain_sums"}, "'chain_sums' is no reasoning-gym dataset; nearest: chain_sum"),
        ({"args": {"min_term": 2}}, "'min_term' is unknown; chain_sum allows .*min_terms"),
        ({"args": {"seed": 2}}, "'seed' is chosen by the run"),
        ({"args": {"min_terms": 9, "max_terms": 2}}, "reasoning-gym refuses .*max_terms must be >= min_terms"),
        ({"args": {"min_terms": "two"}}, "reasoning-gym refuses"),
        ({"prompt_template": "{metadata[expresion]} ="}, r"does not fit chain_sum .*metadata\[...\] with .*expression"),
    ],
)
def test_wrong_settings_are_told_with_what_is_allowed(update, said):
    with pytest.raises(TaskError, match=said):
        load_task(TINY_SUMS.model_copy(update=update), Path(), seed=0)


def test_a_dataset_too_small_for_what_is_asked_is_an_error_not_an_endless_loop():
    task = ProceduralTask(TINY_SUMS, seed=0)
    with pytest.raises(TaskError, match=r"eval asks for 500 problems but chain_sum .* has only \d+ different ones"):
        task.eval_problems(500)
    with pytest.raises(TaskError, match="eval_fraction is 0"):
        ProceduralTask(TINY_SUMS.model_copy(update={"eval_fraction": 0.0}), seed=0).eval_problems(1)
    crowded = ProceduralTask(
        TINY_SUMS.model_copy(update={"eval_fraction": 0.999999, "prompt_template": "same"}), seed=0
    )
    with pytest.raises(TaskError, match="too few different problems"):
        crowded.problem(0)
