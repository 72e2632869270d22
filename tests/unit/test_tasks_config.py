"""The task section: which one a name means, and what is said about a wrong one."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from weaver_rl.tasks.config import CustomTask, JsonlTask, ParquetTask, ReasoningGymTask, TaskConfig

pytestmark = pytest.mark.unit
ADAPTER: TypeAdapter[Any] = TypeAdapter(TaskConfig)


@pytest.mark.parametrize(
    ("data", "section"),
    [
        ({"name": "reasoning_gym", "dataset": "chain_sum"}, ReasoningGymTask),
        ({"name": "jsonl", "path": "a.jsonl", "answer_pattern": r"####\s*(.+)"}, JsonlTask),
        ({"name": "parquet", "path": "a.parquet"}, ParquetTask),
        ({"name": "my_task.py:Doubling", "args": {"x": 1}}, CustomTask),
    ],
)
def test_name_chooses_the_section_and_the_dump_reloads_equal(data, section):
    config = ADAPTER.validate_python(data)
    assert type(config) is section
    assert ADAPTER.validate_python(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"name": "jsnl", "path": "a"}, r"'jsnl' is unknown.*did you mean 'jsonl'"),
        ({"path": "a"}, "task needs a name"),
        ({"name": "jsonl", "path": "a", "answer_pattern": "####"}, "0 groups, needs exactly 1"),
        ({"name": "jsonl", "path": "a", "answer_pattern": "(("}, "no regular expression"),
        ({"name": "jsonl", "path": "a", "answer_template": "{question}"}, "may only use"),
        ({"name": "jsonl", "path": "a", "answer_template": "yes"}, "must contain"),
        ({"name": "jsonl", "path": "a", "eval_fraction": 1.0}, "less than 1"),
        ({"name": "jsonl", "path": "a", "dataset": "b"}, "dataset"),
    ],
)
def test_wrong_sections_say_why(data, said):
    with pytest.raises(ValidationError, match=said):
        ADAPTER.validate_python(data)


def test_the_section_loads_nothing_heavy():
    heavy = "{'torch', 'transformers', 'reasoning_gym', 'pyarrow', 'ray', 'vllm'}"
    code = f"import sys, weaver_rl.tasks.config, weaver_rl.models.config; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
