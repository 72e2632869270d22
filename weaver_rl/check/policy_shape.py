"""The dimensions that memory depends on, counted from the real model built without memory. It knows no weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyShape:
    """A causal language model's sizes.

    Example:
        PolicyShape(num_parameters=134_515_008, layer_parameters=3_540_096, num_layers=30, hidden_size=576,
                    feed_forward_size=1536, num_heads=9, num_kv_heads=3, head_dim=64, vocab_size=49152, qk_norm=False,
                    tied=True)
    """

    num_parameters: int
    """Of the whole model, tied weights once."""
    layer_parameters: int
    """Of the largest decoder layer."""
    num_layers: int
    hidden_size: int
    feed_forward_size: int
    """Features of the feed-forward layers that one token goes through; of a mixture, of all its experts for a token."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    """Rows of the head."""
    qk_norm: bool
    """Queries and keys are normalised, each head by itself."""
    tied: bool
    """One matrix is embedding and head."""

    @property
    def root_parameters(self) -> int:
        """What is in no layer: embedding, head, last norm."""
        return self.num_parameters - self.num_layers * self.layer_parameters


def shape_of(config: Any) -> PolicyShape:
    """Builds the model of a transformers configuration on the meta device, and counts."""
    import torch
    from transformers import AutoModelForCausalLM

    from weaver_rl.learner.policy import decoder_of

    with torch.device("meta"):
        build: Callable[..., Any] = AutoModelForCausalLM.from_config
        model = build(config)
    text = config.get_text_config()
    num_layers = int(text.num_hidden_layers)
    layers = next(
        module
        for module in decoder_of(model).modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == num_layers
    )
    num_heads = int(text.num_attention_heads)
    head = model.get_output_embeddings().weight
    names = [name for name, _ in layers.named_modules()]
    return PolicyShape(
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        layer_parameters=max(sum(parameter.numel() for parameter in layer.parameters()) for layer in layers),
        num_layers=num_layers,
        hidden_size=int(text.hidden_size),
        feed_forward_size=_feed_forward_size(text),
        num_heads=num_heads,
        num_kv_heads=int(getattr(text, "num_key_value_heads", None) or num_heads),
        head_dim=int(getattr(text, "head_dim", None) or text.hidden_size // num_heads),
        vocab_size=int(head.shape[0]),
        qk_norm=any(re.search(r"\.(q|k)_(layer)?norm$", name) for name in names),
        tied=head is model.get_input_embeddings().weight,
    )


def _feed_forward_size(text: Any) -> int:
    per_token = getattr(text, "num_experts_per_tok", None)
    if per_token:
        width = int(getattr(text, "moe_intermediate_size", None) or text.intermediate_size)
        return int(per_token) * width + int(getattr(text, "shared_expert_intermediate_size", None) or 0)
    for name in ("intermediate_size", "n_inner", "ffn_dim"):
        if getattr(text, name, None):
            return int(getattr(text, name))
    return 4 * int(text.hidden_size)
