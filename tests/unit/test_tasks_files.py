"""Tasks from files: rows become problems, every bad row is named, evaluation rows are never trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weaver_rl.errors import TaskError
from weaver_rl.tasks.config import JsonlTask, ParquetTask
from weaver_rl.tasks.files import FileRowsTask
from weaver_rl.tasks.load import load_scorer, load_task
from weaver_rl.tasks.shuffle import permuted
from weaver_rl.tasks.task import Problem, is_held_out

pytestmark = pytest.mark.unit


def write(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sums(start: int, stop: int) -> list[object]:
    return [{"prompt": f"{i} + 1 =", "answer": i + 1, "level": i % 3} for i in range(start, stop)]


def load(path: Path, **keys: object) -> FileRowsTask:
    return FileRowsTask(JsonlTask(path=path.name, **keys), path.parent)


def test_rows_become_problems_with_all_their_columns(tmp_path):
    task = load(write(tmp_path / "a.jsonl", sums(0, 5)), eval_fraction=0)
    assert task.num_problems == 5
    problem = task.problem(3)
    assert (problem.prompt, problem.answer, problem.problem_id) == ("3 + 1 =", "4", "row-4")
    assert problem.columns == {"answer": 4, "level": 0}
    assert problem.source.endswith("a.jsonl line 4")


def test_blank_lines_are_skipped_and_line_numbers_stay_those_of_the_editor(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a"}\n\n  \n{"prompt": 5}\n')
    with pytest.raises(TaskError, match=r"a.jsonl line 4: prompt must be text"):
        load(path, eval_fraction=0)


def test_messages_are_kept_as_messages(tmp_path):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    task = load(write(tmp_path / "a.jsonl", [{"messages": messages, "prompt": None}]), eval_fraction=0)
    assert task.problem(0).prompt == tuple(messages)


def test_template_and_pattern_read_a_file_made_for_something_else(tmp_path):
    rows = [{"question": "How many?", "solution": "think #### 72"}]
    task = load(
        write(tmp_path / "a.jsonl", rows), eval_fraction=0, prompt_template="Q: {question}\nA:",
        answer_column="solution", answer_pattern=r"####\s*(.+)",
    )  # fmt: skip
    assert (task.problem(0).prompt, task.problem(0).answer) == ("Q: How many?\nA:", "72")


BAD_ROWS = [
    ("not json", "line 2: no JSON"),
    ("[1, 2]", "line 2: expected an object, seen list"),
    ('{"answer": "x"}', "line 2: has neither prompt nor messages .columns: answer"),
    ('{"prompt": ""}', "line 2: prompt must be text that is not empty"),
    ('{"prompt": "a", "messages": [{"role": "user", "content": "a"}]}', "line 2: has both prompt and messages"),
    ('{"messages": []}', "line 2: messages must be a list that is not empty"),
    ('{"messages": [{"role": "user"}]}', "line 2: message 1 must be {role, content}"),
    ('{"messages": [{"role": "boss", "content": "a"}]}', "line 2: message 1 has role 'boss', allowed: system"),
    ('{"prompt": "a", "answer": ["x"]}', "line 2: answer must be text or a number, seen list"),
]


@pytest.mark.parametrize(("line", "said"), BAD_ROWS)
def test_a_bad_row_is_named_at_start(tmp_path, line, said):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(TaskError, match=f"a.jsonl {said}"):
        load(path, eval_fraction=0)


def test_a_template_or_pattern_that_does_not_fit_names_the_row(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "answer": "7"}])
    with pytest.raises(TaskError, match=r"line 1: task.prompt_template .*columns of the row: prompt, answer"):
        load(path, prompt_template="{question}")
    with pytest.raises(TaskError, match=r"line 1: task.answer_pattern .* is not in the answer '7'"):
        load(path, answer_pattern="#(.)")


def test_files_that_are_missing_empty_or_of_another_kind(tmp_path):
    with pytest.raises(TaskError, match="is not there"):
        load(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(TaskError, match=r"empty.jsonl is empty"):
        load(tmp_path / "empty.jsonl")
    with pytest.raises(TaskError, match="no readable Parquet file"):
        load_task(ParquetTask(path="empty.jsonl"), tmp_path, seed=0)
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    with pytest.raises(TaskError, match=r"empty.parquet is empty"):
        load_task(ParquetTask(path="empty.parquet"), tmp_path, seed=0)


def test_parquet_gives_the_same_problems_as_jsonl(tmp_path):
    rows = [*sums(0, 40)]
    write(tmp_path / "a.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=7)
    text = load_task(JsonlTask(path="a.jsonl"), tmp_path, seed=0)
    table = load_task(ParquetTask(path="a.parquet"), tmp_path, seed=0)
    assert text.num_problems == table.num_problems
    for index in range(text.num_problems or 0):
        ours, theirs = text.problem(index), table.problem(index)
        assert (ours.problem_id, ours.prompt, ours.answer, ours.columns) == (
            theirs.problem_id, theirs.prompt, theirs.answer, theirs.columns,
        )  # fmt: skip
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(TaskError, match=r"a.parquet row 1: has neither"):
        load_task(ParquetTask(path="a.parquet"), tmp_path, seed=0)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.floats(0.05, 0.9))
def test_held_out_prompts_are_never_trained_on_even_when_rows_repeat(tmp_path_factory, values, fraction):
    path = write(tmp_path_factory.mktemp("t") / "a.jsonl", [{"prompt": f"p{v}"} for v in values])
    if all(is_held_out(Problem(problem_id="", prompt=f"p{v}").key, fraction) for v in values):
        with pytest.raises(TaskError, match="fall into the evaluation share"):
            load(path, eval_fraction=fraction)
        return
    task = load(path, eval_fraction=fraction)
    trained_on = {task.problem(i).prompt for i in range(task.num_problems or 0)}
    num_eval = len({f"p{v}" for v in values} - trained_on)
    held_out = {problem.prompt for problem in task.eval_problems(num_eval)}
    assert len(held_out) == num_eval
    assert not held_out & trained_on
    with pytest.raises(TaskError, match=f"asks for {num_eval + 1} problems, seen {num_eval}"):
        task.eval_problems(num_eval + 1)


def test_rows_that_also_stand_in_the_evaluation_file_are_left_out(tmp_path, caplog):
    write(tmp_path / "eval.jsonl", sums(5, 10))
    task = load(write(tmp_path / "a.jsonl", sums(0, 8)), eval_path="eval.jsonl")
    assert {task.problem(i).prompt for i in range(task.num_problems or 0)} == {f"{i} + 1 =" for i in range(5)}
    assert {problem.prompt for problem in task.eval_problems(5)} == {f"{i} + 1 =" for i in range(5, 10)}
    assert "3 of 8 rows" in caplog.text
    assert load_scorer(JsonlTask(path="a.jsonl"), tmp_path, task) is None


@given(st.integers(1, 500), st.text(max_size=5))
@settings(max_examples=30, deadline=None)
def test_permuted_is_a_permutation(size, key):
    assert sorted(permuted(i, size, key) for i in range(size)) == list(range(size))


def test_permuted_shuffles_and_refuses_what_is_outside():
    assert [permuted(i, 1000, "a") for i in range(1000)] != [permuted(i, 1000, "b") for i in range(1000)]
    moved = sum(permuted(i, 1000, "a") != i for i in range(1000))
    assert moved > 980
    with pytest.raises(ValueError, match="outside"):
        permuted(1000, 1000, "a")
