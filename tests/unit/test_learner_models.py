"""Models whose logits are scaled or capped are computed exactly, unknown ones are refused; other families work."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from learner_fixtures import VOCAB, cpu_config, gradients, make_data, make_llama
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaForCausalLM,
    MixtralConfig,
    Qwen2Config,
)

from weaver_rl.errors import ModelError
from weaver_rl.learner.learner import Learner
from weaver_rl.learner.microbatches import sum_weights
from weaver_rl.learner.policy import check_head
from weaver_rl.losses import cross_entropy_loss
from weaver_rl.losses.chunked_head import LogitTransform
from weaver_rl.losses.config import CrossEntropy

pytestmark = pytest.mark.unit

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": None,
}
FAMILIES = {
    "gemma2": Gemma2Config(**SIZES, head_dim=32, final_logit_softcapping=2.0),
    "granite": GraniteConfig(**SIZES, logits_scaling=3.0),
    "cohere": CohereConfig(**SIZES, logit_scale=0.25),
    "qwen2": Qwen2Config(**SIZES),
    "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=2, n_positions=64, initializer_range=0.2),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
}


def save_model(config, directory: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("family", list(FAMILIES))
def test_any_causal_language_model_gives_its_own_loss_and_gradient(family, tmp_path):
    data = make_data(4)
    directory = save_model(FAMILIES[family], tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    logits = torch.cat([model(torch.from_numpy(datum.token_ids_N)[None]).logits[0] for datum in data])
    targets, token_weights = (
        torch.from_numpy(np.concatenate([datum.loss_fn_inputs[name] for datum in data]))
        for name in ("target_tokens", "weights")
    )
    expected = cross_entropy_loss(logits, targets, token_weights)
    expected.backward()
    learner = Learner(directory, cpu_config(activation_checkpointing=True))
    output = learner.forward_backward(data, CrossEntropy(name="cross_entropy"), sum_weights(data))
    assert output.loss == pytest.approx(expected.item(), rel=1e-4)
    seen = gradients(learner)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(seen[name], parameter.grad, rtol=1e-3, atol=1e-4)


def test_names_of_the_hub_come_back_where_transformers_renames(tmp_path):
    """Mixtral's files hold one weight per expert, its module holds them stacked: vLLM wants the files' names."""
    directory = save_model(FAMILIES["mixtral"], tmp_path / "model")
    learner = Learner(directory, cpu_config())
    names = {name for chunk in learner.state_chunks(10_000) for name in chunk}
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight" in names
    learner.save_state(tmp_path / "state")
    learner.load_state(tmp_path / "state")
    learner.save_hf(tmp_path / "hf")
    data = make_data(3)
    again = Learner(tmp_path / "hf", cpu_config())
    for seen, expected in zip(
        again.forward(data).logprobs_per_datum, learner.forward(data).logprobs_per_datum, strict=True
    ):
        np.testing.assert_array_equal(seen, expected)


class HiddenScalingLlama(LlamaForCausalLM):
    """Divides logits by something the learner has never heard of."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits / 1.01
        return output


def test_unknown_changes_of_logits_are_refused(tmp_path):
    model = HiddenScalingLlama.from_pretrained(make_llama(tmp_path)).eval()
    with pytest.raises(ModelError, match="HiddenScalingLlama changes logits"):
        check_head(model, LogitTransform())


def test_directories_without_a_model_are_refused(tmp_path):
    with pytest.raises(ModelError, match="cannot load"):
        Learner(tmp_path, cpu_config())
