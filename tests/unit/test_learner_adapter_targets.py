"""Which layers an adapter changes in which family of models, and how it begins."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from adapter_fixtures import (
    EVERYTHING,
    adapter_weights,
    assert_same_tensors,
    logprobs,
    plain_logprobs,
    plain_peft,
    train,
)
from learner_fixtures import VOCAB, cpu_config, make_data, make_llama
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    Qwen2MoeConfig,
)

from weaver_rl.errors import ConfigError
from weaver_rl.learner.adapter_config import AdapterConfig
from weaver_rl.learner.adapter_targets import find_targets
from weaver_rl.learner.learner import Learner

pytestmark = pytest.mark.unit
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
NEOX = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
FAMILIES = {
    "llama": (
        LlamaConfig(**SIZES),
        {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"},
        {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"},
    ),
    "phi3": (Phi3Config(**SIZES), {"self_attn.qkv_proj", "self_attn.o_proj"}, {"mlp.gate_up_proj", "mlp.down_proj"}),
    "gpt_neox": (
        GPTNeoXConfig(**NEOX),
        {"attention.query_key_value", "attention.dense"},
        {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
    ),
    "bloom": (
        BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=2),
        {"self_attention.query_key_value", "self_attention.dense"},
        {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
    ),
    "opt": (
        OPTConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
        ),
        {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"},
        {"fc1", "fc2"},
    ),
}


def save_model(config, directory: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def changed(learner: Learner) -> set[str]:
    """Layers that the adapter changes, as they are called inside a decoder layer; the head by its own name."""
    names = {name.removesuffix(".lora_A.weight").removesuffix(".lora_B.weight") for name in adapter_weights(learner)}
    return {re.sub(r"^.*?\.\d+\.", "", name) for name in names}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_parts_are_found_in_any_family_and_plain_peft_agrees(family, tmp_path):
    config, attention, mlp = FAMILIES[family]
    data = make_data(4)
    base = Learner(save_model(config, tmp_path / "model"), cpu_config())
    head = {name for name, module in base._policy.model.named_modules() if module is base._policy.model.lm_head}
    for number, (switches, expected) in enumerate(
        [
            ((True, False, False), attention),
            ((False, True, False), mlp),
            ((False, False, True), head),
            ((True, True, True), attention | mlp | head),
        ]
    ):
        attn, mlps, unembed = switches
        adapter = AdapterConfig(rank=2, train_attn=attn, train_mlp=mlps, train_unembed=unembed)
        learner = base.with_adapter(f"a{number}", adapter)
        assert changed(learner) == expected
    train(learner, data)
    learner.save_for_sampler(tmp_path / "peft")
    with torch.no_grad():
        expected = plain_logprobs(plain_peft(tmp_path / "model", tmp_path / "peft"), data).numpy()
    np.testing.assert_allclose(logprobs(learner, data), expected, rtol=1e-4, atol=1e-4)


def test_routers_of_experts_are_left_alone_and_stacked_experts_are_refused(tmp_path):
    config = MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    base = Learner(save_model(config, tmp_path), cpu_config())
    with pytest.raises(
        ConfigError, match=r"train_mlp: MixtralForCausalLM keeps its experts stacked.*train_mlp to false"
    ):
        base.with_adapter("a", EVERYTHING)
    learner = base.with_adapter("a", AdapterConfig(rank=2, train_mlp=False))
    assert changed(learner) == {*FAMILIES["llama"][1], "lm_head"}
    data = make_data(3)
    train(learner, data)
    learner.save_for_sampler(tmp_path / "peft")
    learner.save_hf(tmp_path / "hf")
    with torch.no_grad():
        expected = plain_logprobs(plain_peft(tmp_path, tmp_path / "peft"), data).numpy()
    np.testing.assert_allclose(logprobs(learner, data), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(logprobs(Learner(tmp_path / "hf", cpu_config()), data), expected, rtol=1e-4, atol=1e-4)


class Experts(nn.Module):
    """Half of a model whose experts are layers of their own, as older ones are."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.ModuleDict(
            {
                "gate": nn.Linear(8, 2),
                "router": nn.Linear(8, 2),
                "shared_expert_gate": nn.Linear(8, 1),
                "experts": nn.ModuleList(nn.ModuleDict({"gate_proj": nn.Linear(8, 8)}) for _ in range(2)),
            }
        )
        self.lm_head = nn.Linear(8, VOCAB)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


def test_routers_beside_experts_that_are_layers_are_left_alone():
    model = Experts()
    targets = find_targets(SimpleNamespace(model=model, layers=lambda: [model]))
    assert targets.select(AdapterConfig(rank=1, train_attn=False, train_unembed=False)) == (
        "mlp.experts.0.gate_proj",
        "mlp.experts.1.gate_proj",
    )


def test_a_shared_expert_that_is_half_of_the_mlp_is_no_mlp(tmp_path):
    config = Qwen2MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16
    )
    base = Learner(save_model(config, tmp_path), cpu_config())
    with pytest.raises(ConfigError, match="experts stacked"):
        base.with_adapter("a", EVERYTHING)


def test_a_family_without_linear_layers_is_refused_and_nothing_changes(tmp_path):
    config = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    base = Learner(save_model(config, tmp_path), cpu_config())
    with pytest.raises(
        ConfigError, match=r"train_attn: GPT2LMHeadModel has no torch.nn.Linear inside attention blocks"
    ):
        base.with_adapter("a", EVERYTHING)
    with pytest.raises(ConfigError, match=r"train_mlp: GPT2LMHeadModel has no torch.nn.Linear inside MLP blocks"):
        base.with_adapter("a", AdapterConfig(rank=2, train_attn=False))
    train(base, make_data(2), num_steps=1)
    assert changed(base.with_adapter("a", AdapterConfig(rank=2, train_attn=False, train_mlp=False))) == {"lm_head"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rank": 0}, "rank must be >= 1, seen 0"),
        ({"alpha": 0}, "alpha must be >= 1, seen 0"),
        (
            {"train_attn": False, "train_mlp": False, "train_unembed": False},
            "train_attn, train_mlp, train_unembed are all false",
        ),
    ],
)
def test_configurations_that_no_adapter_has_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        AdapterConfig(**({"rank": 4} | wrong))


def test_the_configuration_crosses_processes_without_torch():
    config = AdapterConfig(rank=4, seed=-(10**20))
    assert pickle.loads(pickle.dumps(config)) == config
    code = "import sys; import weaver_rl.learner.adapter_config; assert not {'torch', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_adapter_begins_by_its_seed_alone(tmp_path):
    """Not by the name, the neighbours, what was drawn before, or the order; layers of one shape differ."""
    directory = make_llama(tmp_path)
    first = adapter_weights(Learner(directory, cpu_config(), seed=1).with_adapter("a", EVERYTHING))
    base = Learner(directory, cpu_config(), seed=2)
    base.with_adapter("neighbour", AdapterConfig(rank=7, seed=11))
    torch.rand(13)
    generator = torch.get_rng_state()
    again = adapter_weights(base.with_adapter("b", EVERYTHING))
    assert torch.equal(torch.get_rng_state(), generator)
    assert_same_tensors(again, first)
    part = adapter_weights(base.with_adapter("part", AdapterConfig(rank=4, seed=3, train_mlp=False)))
    assert_same_tensors(part, {name: first[name] for name in part})
    downs = [value for name, value in first.items() if name.endswith("lora_A.weight")]
    assert len({tuple(value.flatten()[:3].tolist()) for value in downs}) == len(downs)
    other = adapter_weights(base.with_adapter("other", AdapterConfig(rank=4, seed=4)))
    for name, value in first.items():
        assert value.dtype == torch.float32
        if name.endswith("lora_B.weight"):
            assert not value.any()
        else:
            assert not torch.equal(other[name], value)
            limit = value.shape[1] ** -0.5
            assert 0.9 * limit < value.abs().max() <= limit
            assert abs(float(value.mean())) < 0.2 * limit


def test_the_first_numbers_of_a_seed_are_fixed(tmp_path):
    """A change of how adapters begin would make old runs impossible to repeat."""
    learner = Learner(make_llama(tmp_path), cpu_config()).with_adapter("a", EVERYTHING)
    value = adapter_weights(learner)["model.layers.0.self_attn.q_proj.lora_A.weight"]
    assert value[0, :3].tolist() == pytest.approx([0.10557602, 0.02414174, -0.09419732], abs=1e-7)
