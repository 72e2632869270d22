"""A user's own task class: found, built, checked; what goes wrong in it names its own line."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest

from weaver_rl.errors import TaskError
from weaver_rl.tasks.config import CustomTask
from weaver_rl.tasks.load import load_scorer, load_task

pytestmark = pytest.mark.unit

GOOD = """
from weaver_rl.tasks.task import Problem

def judge(rollout):
    return float(rollout == "four")

class Doubling:
    num_problems = None

    def __init__(self, start=0):
        self.start = start

    def problem(self, index):
        return Problem(problem_id=f"train-{index}", prompt=f"2 * {self.start + 2 * index} =")

    def eval_problems(self, num):
        return [Problem(problem_id=f"eval-{i}", prompt=f"2 * {2 * i + 1} =") for i in range(num)]

    def scorer(self):
        return judge
"""


def load(tmp_path, text: str, name: str = "my_task.py:Doubling", **args: object):
    (tmp_path / "my_task.py").write_text(text)
    return load_task(CustomTask(name=name, args=args), tmp_path, seed=0)


def test_class_in_a_file_is_built_with_its_args_and_its_scorer_travels(tmp_path):
    task = load(tmp_path, GOOD, start=10)
    assert task.problem(1).prompt == "2 * 12 ="
    scorer = load_scorer(CustomTask(name="my_task.py:Doubling"), tmp_path, task)
    assert scorer is not None
    assert scorer("four") == 1.0
    worker = "import pickle, sys; print(pickle.load(sys.stdin.buffer)('four'))"
    result = subprocess.run([sys.executable, "-c", worker], input=pickle.dumps(scorer), capture_output=True, check=True)
    assert result.stdout == b"1.0\n"


def test_class_in_a_module(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "weaver_rl_test_module.py").write_text(GOOD)
    task = load_task(CustomTask(name="weaver_rl_test_module:Doubling"), tmp_path, seed=0)
    assert task.num_problems is None


BROKEN = [
    (GOOD, "my_task.py:Tripling", {}, "has no class Tripling; it has Doubling"),
    (GOOD, "other.py:Doubling", {}, r"task file .*other.py is not there"),
    (GOOD, "no_such_module:Doubling", {}, "importing it raised ModuleNotFoundError"),
    (GOOD, "my_task.py:", {}, "expected package.module:Class"),
    (GOOD, "my_task.py:Doubling", {"begin": 1}, "unknown begin; Doubling takes start"),
    (GOOD.replace("start=0", "start"), "my_task.py:Doubling", {}, "missing start"),
    (GOOD.replace("def scorer", "def score"), "my_task.py:Doubling", {}, "is no task: it lacks scorer"),
    (GOOD.replace("num_problems = None", ""), "my_task.py:Doubling", {}, "lacks num_problems"),
    (GOOD.replace("num_problems = None", "num_problems = 0"), "my_task.py:Doubling", {}, "at least 1, seen 0"),
    (GOOD.replace("self.start = start", "1 / 0"), "my_task.py:Doubling", {}, r"ZeroDivisionError.*my_task.py:11"),
    (GOOD + "\n1 / 0\n", "my_task.py:Doubling", {}, r"importing it raised ZeroDivisionError.*my_task.py:"),
    (GOOD.replace("return Problem(", "return dict("), "my_task.py:Doubling", {}, r"problem\(0\) must give .*seen dict"),
]


@pytest.mark.parametrize(("text", "name", "args", "said"), BROKEN)
def test_a_class_that_is_no_task_is_refused_with_the_reason(tmp_path, text, name, args, said):
    with pytest.raises(TaskError, match=said):
        load(tmp_path, text, name, **args)


def test_a_problem_that_changes_from_call_to_call_is_refused(tmp_path):
    text = GOOD.replace("def problem(self, index):", "def problem(self, index):\n        self.start += 1")
    with pytest.raises(TaskError, match="two different problems"):
        load(tmp_path, text)


def test_eval_problems_must_give_as_many_as_asked(tmp_path):
    task = load(tmp_path, GOOD.replace("range(num)", "range(3)"))
    with pytest.raises(TaskError, match=r"eval_problems\(5\) gave 3 problems"):
        task.eval_problems(5)
