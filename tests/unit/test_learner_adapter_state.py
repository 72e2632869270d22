"""Adapters on disk: resumed bit for bit, refused where they do not fit, read by plain PEFT, merged for transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_fixtures import (
    ATTENTION,
    EVERYTHING,
    HEAD,
    LOSS,
    PARAMS,
    adapter_weights,
    assert_same_tensors,
    logprobs,
    plain_logprobs,
    plain_peft,
    train,
)
from learner_fixtures import cpu_config, gradients, make_data, make_llama, weights
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from weaver_rl.errors import CheckpointError
from weaver_rl.learner.adapter_config import AdapterConfig
from weaver_rl.learner.learner import Learner

pytestmark = pytest.mark.unit
CONFIGS = {"everything": EVERYTHING, "attention": ATTENTION, "head": HEAD}
KINDS = [(tied, kind) for tied in (False, True) for kind in CONFIGS]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[bool, Path]:
    return {tied: make_llama(tmp_path_factory.mktemp("model"), tied=tied) for tied in (False, True)}


@pytest.fixture
def trained(models) -> Learner:
    """An adapter after two steps, one of them undone by nothing: its AdamW has moments and a step count."""
    learner = Learner(models[False], cpu_config()).with_adapter("a", EVERYTHING)
    train(learner, make_data())
    return learner


def next_steps(learner: Learner) -> list[dict[str, torch.Tensor]]:
    seen = []
    for seed in (1, 2):
        train(learner, make_data(5, seed=seed), num_steps=1)
        seen.append(adapter_weights(learner))
    return seen


@pytest.mark.parametrize("same_learner", [True, False])
def test_a_state_with_optimizer_goes_on_bit_for_bit(models, trained, tmp_path, same_learner):
    trained.save_state(tmp_path / "state")
    saved = adapter_weights(trained)
    expected = next_steps(trained)
    resumed = trained
    if not same_learner:
        # Another seed, another name, and neighbours: none of them is part of a state.
        base = Learner(models[False], cpu_config(), seed=5)
        train(base.with_adapter("neighbour", EVERYTHING), make_data())
        resumed = base.with_adapter("other", AdapterConfig(rank=4, seed=99))
    resumed.forward_backward(make_data(), LOSS, 1.0)
    resumed.load_state(tmp_path / "state")
    assert not gradients(resumed)
    assert_same_tensors(adapter_weights(resumed), saved)
    for seen, wanted in zip(next_steps(resumed), expected, strict=True):
        assert_same_tensors(seen, wanted)


@pytest.mark.parametrize("saved_with", [True, False])
@pytest.mark.parametrize("loaded_with", [True, False])
def test_without_an_optimizer_adamw_is_as_before_its_first_step(models, trained, tmp_path, saved_with, loaded_with):
    trained.save_state(tmp_path / "with")
    trained.save_state(tmp_path / "state", with_optimizer=saved_with)
    assert (tmp_path / "state" / "optimizer").exists() == saved_with
    going_on = next_steps(trained)
    trained.load_state(tmp_path / "state", with_optimizer=loaded_with)
    seen = next_steps(trained)
    if saved_with and loaded_with:
        assert_same_tensors(seen[0], going_on[0])
        return
    anew = Learner(models[False], cpu_config()).with_adapter("a", EVERYTHING)
    for name, parameter in anew._trained.named_parameters():
        file = load_file(tmp_path / "with" / "weights" / "adapter_model.safetensors")
        parameter.data.copy_(file[f"base_model.model.{name}"])
    for one, wanted in zip(seen, next_steps(anew), strict=True):
        assert_same_tensors(one, wanted)
    assert any(not torch.equal(value, going_on[0][name]) for name, value in seen[0].items())


def test_whole_policies_load_without_their_optimizer_too(models, tmp_path):
    data = make_data()
    learner = Learner(models[False], cpu_config())
    train(learner, data)
    learner.save_state(tmp_path / "state")
    learner.load_state(tmp_path / "state", with_optimizer=False)
    train(learner, data, num_steps=1)
    fresh = Learner(tmp_path / "state" / "weights", cpu_config())
    train(fresh, data, num_steps=1)
    assert_same_tensors(weights(learner), weights(fresh))


def spoil_json(state: Path, **changes: object) -> None:
    content = json.loads((state / "learner.json").read_text())
    (state / "learner.json").write_text(json.dumps(content | changes))


def drop_a_tensor(state: Path) -> None:
    path = state / "weights" / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors["base_model.model.lm_head.lora_B.weight"]
    save_file(tensors, path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-64])


SPOILT: dict[str, Callable[[Path], object]] = {
    "holds no readable learner state": lambda state: (state / "learner.json").unlink(),
    "learner state \\(adapter\\)": lambda state: spoil_json(state, adapter={"rank": 0}),
    "state format 7": lambda state: spoil_json(state, format=7),
    r"lm_head.lora_B.weight must have shape \(96, 4\), seen nothing": drop_a_tensor,
    "cannot read the learner state in .*invalid metadata|incomplete": lambda state: cut(
        state / "weights" / "adapter_model.safetensors"
    ),
    "state/optimizer": lambda state: shutil.rmtree(state / "optimizer"),
    "cannot read the learner state": lambda state: cut(state / "optimizer" / "__0_0.distcp"),
    "cannot read the learner state in .*[Hh]eader": lambda state: cut(state / "rng" / "rank-00000.safetensors"),
}


@pytest.mark.parametrize("message", list(SPOILT))
def test_a_spoilt_state_changes_nothing(trained, tmp_path, message):
    trained.save_state(tmp_path / "state")
    # What was saved is not what is there now: a state that is half loaded shows.
    train(trained, make_data(), num_steps=1)
    SPOILT[message](tmp_path / "state")
    assert_refuses(trained, tmp_path / "state", message)


def adamw_state(learner: Learner) -> dict[str, torch.Tensor]:
    states = enumerate(learner._optimizer.state.values())
    return {f"{index}.{key}": value for index, state in states for key, value in state.items()}


def assert_refuses(learner: Learner, state: Path, message: str) -> None:
    """And goes on as if it had never been asked to."""
    learner.forward_backward(make_data(), LOSS, 1.0)
    before, accumulated, generator = adapter_weights(learner), gradients(learner), torch.get_rng_state()
    moments = {name: value.clone() for name, value in adamw_state(learner).items()}
    with pytest.raises(CheckpointError, match=message):
        learner.load_state(state)
    assert_same_tensors(adapter_weights(learner), before)
    assert_same_tensors(gradients(learner), accumulated)
    assert_same_tensors(adamw_state(learner), moments)
    assert torch.equal(torch.get_rng_state(), generator)


OTHERS = {
    "rank 5 and alpha 32 on attention, MLP, head": AdapterConfig(rank=5),
    "rank 4 and alpha 16 on attention, MLP, head": AdapterConfig(rank=4, alpha=16),
    "rank 4 and alpha 32 on attention, head": AdapterConfig(rank=4, train_mlp=False),
}


@pytest.mark.parametrize("message", list(OTHERS))
def test_the_state_of_another_adapter_is_refused_by_both_their_kinds(models, trained, tmp_path, message):
    other = Learner(models[False], cpu_config()).with_adapter("other", OTHERS[message])
    other.save_state(tmp_path)
    message = f"holds the state of a LoRA adapter of {message}, this learner trains a LoRA adapter of rank 4 and alpha"
    assert_refuses(trained, tmp_path, message)


def test_states_of_policies_and_adapters_are_refused_by_each_other(models, trained, tmp_path):
    policy = Learner(models[False], cpu_config())
    policy.save_state(tmp_path / "policy")
    trained.save_state(tmp_path / "adapter")
    assert_refuses(trained, tmp_path / "policy", "holds the state of the whole policy, this learner trains a LoRA")
    assert_refuses(policy, tmp_path / "adapter", "LoRA adapter of rank 4.*, this learner trains the whole policy")


def test_an_adapter_of_another_base_is_refused_by_shape(trained, tmp_path):
    config = AutoModelForCausalLM.from_pretrained(trained._model_dir).config
    config.intermediate_size = 128
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "wider")
    Learner(tmp_path / "wider", cpu_config()).with_adapter("a", EVERYTHING).save_state(tmp_path / "state")
    assert_refuses(trained, tmp_path / "state", r"lora_B.weight must have shape \(96, 4\), seen \(128, 4\)")


@pytest.mark.parametrize(("tied", "kind"), KINDS)
def test_plain_peft_loads_what_samplers_are_given(models, tied, kind, tmp_path):
    data = make_data()
    learner = Learner(models[tied], cpu_config()).with_adapter("a", CONFIGS[kind])
    train(learner, data)
    learner.save_for_sampler(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(models[tied])
    assert (written["r"], written["lora_alpha"]) == (CONFIGS[kind].rank, CONFIGS[kind].alpha)
    assert written["target_modules"] == sorted(written["target_modules"])
    with torch.no_grad():
        expected = plain_logprobs(plain_peft(models[tied], tmp_path), data).numpy()
    assert np.abs(expected - logprobs(Learner(models[tied], cpu_config()), data)).max() > 0.1
    np.testing.assert_allclose(logprobs(learner, data), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("tied", "kind"), KINDS)
def test_plain_transformers_loads_the_merged_model(models, tied, kind, tmp_path):
    data = make_data()
    base = Learner(models[tied], cpu_config())
    neighbour, learner = base.with_adapter("neighbour", EVERYTHING), base.with_adapter("a", CONFIGS[kind])
    train(neighbour, data)
    train(learner, data)
    before, base_before, frozen = logprobs(learner, data), logprobs(base, data), weights(base)
    learner.save_hf(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.tie_word_embeddings == (tied and kind == "attention")
    with torch.no_grad():
        expected = plain_logprobs(model, data).numpy()
    np.testing.assert_allclose(before, expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(logprobs(learner, data), before)
    np.testing.assert_array_equal(logprobs(base, data), base_before)
    assert_same_tensors(weights(base), frozen)
    if tied:
        embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
        assert torch.equal(embedding, frozen["model.embed_tokens.weight"])
    again = Learner(tmp_path, cpu_config())
    np.testing.assert_allclose(logprobs(again, data), before, rtol=1e-3, atol=1e-4)


def test_the_policy_itself_is_written_without_its_adapters(models, tmp_path):
    data = make_data()
    base = Learner(models[True], cpu_config())
    expected = logprobs(base, data)
    learner = base.with_adapter("a", EVERYTHING)
    train(learner, data)
    base.save_state(tmp_path / "state")
    base.save_hf(tmp_path / "hf")
    base.save_for_sampler(tmp_path / "sampler")
    for directory in (tmp_path / "state" / "weights", tmp_path / "hf", tmp_path / "sampler"):
        assert load_file(directory / "model.safetensors").keys() == load_file(models[True] / "model.safetensors").keys()
        np.testing.assert_array_equal(logprobs(Learner(directory, cpu_config()), data), expected)
    base.remove_adapter("a")
    base.load_state(tmp_path / "state")
    np.testing.assert_array_equal(logprobs(base, data), expected)


def test_chunks_of_an_adapter_are_the_merged_weights(models, tmp_path):
    learner = Learner(models[False], cpu_config()).with_adapter("a", EVERYTHING)
    train(learner, make_data())
    learner.save_hf(tmp_path)
    chunks = list(learner.state_chunks(30_000))
    assert len(chunks) > 3
    merged = {name: tensor for chunk in chunks for name, tensor in chunk.items()}
    assert_same_tensors(merged, load_file(tmp_path / "model.safetensors"))


def test_a_disk_that_refuses_is_a_checkpoint_error(trained, tmp_path):
    (tmp_path / "file").write_text("")
    for write in (trained.save_state, trained.save_for_sampler, trained.save_hf):
        with pytest.raises(CheckpointError, match="cannot write"):
            write(tmp_path / "file" / "directory")
    train(trained, make_data(), num_steps=1)


def test_steps_after_writing_do_not_reach_the_files(trained, tmp_path):
    trained.save_for_sampler(tmp_path)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    train(trained, make_data(), params=PARAMS)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before
