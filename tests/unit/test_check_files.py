"""Files of a run: each there or named, weights whole or not, models found without loading them."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from check_parts import a_run, lines
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from weaver_rl.check.checklist import Check, run_check
from weaver_rl.check.files import check_files
from weaver_rl.check.model_source import find_model
from weaver_rl.check.weight_files import INDEX, weight_bytes
from weaver_rl.errors import ModelError
from weaver_rl.models.config import PretrainedModel

pytestmark = pytest.mark.unit


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Two shards and their index."""
    save_file({"a": np.zeros((4, 4), np.float32)}, tmp_path / "1.safetensors")
    save_file({"b": np.ones(8, np.float32), "c": np.ones(2, np.float32)}, tmp_path / "2.safetensors")
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors", "c": "2.safetensors"}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_whole_weights_are_counted(weights: Path):
    assert weight_bytes(weights) == sum(file.stat().st_size for file in weights.glob("*.safetensors"))
    (weights / INDEX).unlink()
    assert weight_bytes(weights) == sum(file.stat().st_size for file in weights.glob("*.safetensors"))


def test_a_missing_shard_is_named(weights: Path):
    (weights / "2.safetensors").unlink()
    with pytest.raises(ModelError, match=r"2\.safetensors is not there"):
        weight_bytes(weights)


def test_a_shard_without_its_tensor_is_named(weights: Path):
    save_file({"b": np.ones(8, np.float32)}, weights / "2.safetensors")
    with pytest.raises(ModelError, match=r"lacks 1 tensor\(s\).* c first"):
        weight_bytes(weights)


@given(cut=st.integers(min_value=1, max_value=200))
def test_a_file_cut_anywhere_is_no_weights(tmp_path_factory: pytest.TempPathFactory, cut: int):
    directory = tmp_path_factory.mktemp("cut")
    save_file({"a": np.zeros(40, np.float32)}, directory / "model.safetensors")
    content = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(content[: max(0, len(content) - cut)])
    with pytest.raises(ModelError, match=r"model\.safetensors (has|is no safetensors file)"):
        weight_bytes(directory)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
        (b"", "is no safetensors file"),
        (struct.pack("<Q", 1 << 60) + b"{}", "is no safetensors file"),
        (struct.pack("<Q", 2) + b"[]", "is no safetensors file"),
    ],
)
def test_what_only_bears_the_name_is_told_apart(tmp_path: Path, content: bytes, words: str):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=words):
        weight_bytes(tmp_path)


def test_a_broken_index_is_named(weights: Path):
    (weights / INDEX).write_text("[]")
    with pytest.raises(ModelError, match="is not an index of weights"):
        weight_bytes(weights)


def test_every_file_of_a_good_run_passes():
    found = lines(check_files(a_run()))
    assert {finding.level for finding in found.values()} == {"pass"}
    assert "tiny_rewards.py" in found["rewards.1"].seen
    assert "endless training problems, 16 held out" in found["task"].seen
    assert "made from nothing" in found["model"].seen


def test_what_is_missing_is_named_with_its_key(tmp_path: Path):
    run = a_run(
        f"base_dir={tmp_path}",
        "task={name: jsonl, path: train.jsonl, eval_path: held.jsonl}",
        "rewards=[{name: 'mine.py:f'}, {name: numeric}]",
        "warm_start.task={name: 'teacher.py:T'}",
        "model={name: ./nowhere}",
    )
    found = lines(check_files(run))
    for subject, name in (
        ("task.path", "train.jsonl"),
        ("task.eval_path", "held.jsonl"),
        ("warm_start.task.name", "teacher.py"),
        ("rewards.0", "mine.py"),
        ("model", "nowhere is not there"),
    ):
        assert found[subject].level == "fail", subject
        assert name in found[subject].seen
    assert "correct task.path" in found["task.path"].advice
    assert "task" not in found  # not loaded without its files


def test_a_task_that_does_not_load_says_why(tmp_path: Path):
    (tmp_path / "train.jsonl").write_text('{"prompt": "2 + 2 =", "answer": "4"}\nno json\n')
    run = a_run(f"base_dir={tmp_path}", "task={name: jsonl, path: train.jsonl}", "rewards=[{name: numeric}]")
    found = lines(run_check(Check(title="files", run=lambda: check_files(run), timeout_s=30)))
    assert found["task"].level == "fail"
    assert "train.jsonl line 2" in found["task"].seen
    assert "not checked: the task could not be had" in found["files"].seen  # of whose texts the model is made


def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A snapshot as huggingface_hub leaves it, of a hub that cannot be reached."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--org--small"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    return snapshot


def test_a_model_in_the_hubs_cache_is_found_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    snapshot = hub_cache(tmp_path, monkeypatch)
    (snapshot / "config.json").write_text(
        json.dumps({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4})
    )
    save_file({"a": np.zeros(4, np.float32)}, snapshot / "model.safetensors")
    found = find_model(PretrainedModel(name="org/small"), tmp_path, list)
    assert found.config.hidden_size == 64
    assert "whole" in found.where


def test_a_model_that_is_nowhere_says_where_it_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hub_cache(tmp_path, monkeypatch)
    with pytest.raises(ModelError, match=r"'org/other' is not here: no directory .*the hub's cache, and the hub could"):
        find_model(PretrainedModel(name="org/other"), tmp_path, list)
