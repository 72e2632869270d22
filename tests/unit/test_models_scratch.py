"""The model built from scratch: a lossless tokenizer, the same bytes from the same seed, a directory that loads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from weaver_rl.models.config import ModelConfig, PretrainedModel, ScratchModel
from weaver_rl.models.directories import make_once
from weaver_rl.models.resolve import load_tokenizer, max_model_len, resolve_model, stop_token_ids
from weaver_rl.models.scratch import build_tokenizer

pytestmark = pytest.mark.unit

TEXTS = [f"{a} {op} {b} =" for a in range(10, 30) for b in range(10, 30) for op in "+-"] + ["-12", "40"]
SMALL = ScratchModel(hidden_size=64, num_heads=2, num_layers=1, max_position_embeddings=128)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(TEXTS, 512)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return resolve_model(SMALL, tmp_path_factory.mktemp("run"), lambda: TEXTS)


@settings(max_examples=300, deadline=None)
@given(text=st.text())
def test_any_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet="0123456789 +-*/=().,\n"))
def test_every_digit_is_one_token_and_always_the_same(tokenizer, text):
    pieces = [tokenizer.decode([i]) for i in tokenizer(text)["input_ids"]]
    assert all(len(piece) == 1 for piece in pieces if any(c.isdigit() for c in piece))
    assert [p for p in pieces if p.isdigit()] == [c for c in text if c.isdigit()]


def test_a_sum_takes_few_tokens(tokenizer):
    pieces = [tokenizer.decode([i]) for i in tokenizer("53 + 47 =")["input_ids"]]
    assert pieces == ["5", "3", " + ", "4", "7", " ="]
    assert len(tokenizer) <= 270


def test_tokens_are_the_same_after_saving_and_loading(directory, tokenizer):
    loaded = load_tokenizer(directory)
    for text in ("53 + 47 =", "  x 1st\n\n\t", "héllo 世界"):
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert loaded.decode(loaded(text)["input_ids"]) == text
    assert (loaded.eos_token, loaded.pad_token, loaded.bos_token) == ("<eos>", "<pad>", None)


def test_same_seed_same_bytes_whatever_was_drawn_before(directory, tmp_path):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    again = resolve_model(SMALL, tmp_path, lambda: TEXTS)
    assert torch.equal(torch.get_rng_state(), before)
    names = sorted(file.name for file in directory.iterdir())
    assert "model.safetensors" in names
    assert names == sorted(file.name for file in again.iterdir())
    assert [n for n in names if (directory / n).read_bytes() != (again / n).read_bytes()] == []
    other = resolve_model(SMALL.model_copy(update={"seed": 1}), tmp_path / "other", lambda: TEXTS)
    assert (other / "model.safetensors").read_bytes() != (directory / "model.safetensors").read_bytes()


def test_a_resumed_run_finds_the_model_and_another_config_makes_it_again(tmp_path):
    first = resolve_model(SMALL, tmp_path, lambda: TEXTS)
    (first / "seen").touch()
    assert (resolve_model(SMALL, tmp_path, lambda: TEXTS) / "seen").exists()
    again = resolve_model(SMALL.model_copy(update={"seed": 5}), tmp_path, lambda: TEXTS)
    assert again == first
    assert not (again / "seen").exists()
    assert [file.name for file in tmp_path.iterdir() if file.is_dir()] == ["initial_model"]


def test_the_directory_loads_in_transformers_with_these_sizes(directory):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = load_tokenizer(directory)
    assert model.config.model_type == "llama"
    assert model.config.head_dim == 32
    assert model.config.vocab_size == len(tokenizer) == model.lm_head.weight.shape[0]
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.dtype == torch.float32
    logits = model(torch.tensor([tokenizer("5 + 3 =")["input_ids"]])).logits
    assert torch.isfinite(logits).all()
    assert stop_token_ids(directory, tokenizer) == (tokenizer.eos_token_id,)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert max_model_len(directory) == 128


def test_tied_embeddings_and_grouped_heads(tmp_path):
    from transformers import AutoModelForCausalLM

    config = ScratchModel(
        hidden_size=128, num_heads=4, num_kv_heads=2, num_layers=1, intermediate_size=96, tie_embeddings=True
    )
    model = AutoModelForCausalLM.from_pretrained(resolve_model(config, tmp_path, lambda: TEXTS))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.num_key_value_heads == 2
    assert model.model.layers[0].mlp.up_proj.weight.shape == (96, 128)


def test_a_directory_that_failed_half_way_is_not_there(tmp_path):
    def fail(directory):
        (directory / "half").touch()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        make_once(tmp_path / "model", {"a": 1}, fail)
    assert [file for file in tmp_path.iterdir() if file.is_dir()] == []


ADAPTER = TypeAdapter(ModelConfig)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"name": "scratch", "hidden_size": 64}, r"hidden_size 64 / num_heads 4 is a head dimension of 16.*32, 64, 80"),
        ({"name": "scratch", "hidden_size": 100, "num_heads": 3}, "hidden_size 100 is not divisible by num_heads 3"),
        ({"name": "scratch", "num_kv_heads": 3}, "num_heads 4 is not divisible by num_kv_heads 3"),
        ({"name": "scratch", "vocab_size": 257}, "greater than or equal to 258"),
        ({"name": "org/model", "hidden_size": 64}, "hidden_size only go with name: scratch; 'org/model' brings"),
        ({"name": "scratch", "revision": "main"}, "revision"),
        ({"hidden_size": 64}, "model needs a name"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_the_numbers(data, said):
    with pytest.raises(ValidationError, match=said):
        ADAPTER.validate_python(data)


@pytest.mark.parametrize("data", [{"name": "scratch"}, {"name": "org/model", "revision": "main"}])
def test_sections_reload_equal(data):
    config = ADAPTER.validate_python(data)
    assert isinstance(config, ScratchModel if data["name"] == "scratch" else PretrainedModel)
    assert ADAPTER.validate_python(config.model_dump(mode="json")) == config
