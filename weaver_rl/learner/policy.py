"""The policy as one module: token ids in, log-probabilities of targets out. It knows transformers, no loss and no rank.

Dropout is off always (evaluation mode): the learner's log-probabilities must be those of the distribution sampled from.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from weaver_rl.errors import ModelError
from weaver_rl.losses.chunked_head import LogitTransform, LowRank, target_logprobs

_PROBE_TOKENS = 4
_PROBE_LOGIT = 60.0
_OF_ADAPTER = re.compile(r"\.lora_[AB]\.")
"""In the names of parameters that PEFT adds to a model."""


class Policy(nn.Module):
    """A causal language model with its head and log-softmax inside one forward.

    They are inside so that FSDP's all-gather of the root, which holds the embedding and the (perhaps tied) head,
    covers the use of the head's weight both in forward and in the recomputation of backward.
    """

    def __init__(self, model: Any, *, chunk_tokens: int, transform: LogitTransform) -> None:
        super().__init__()
        self.model = model
        self._chunk_tokens = chunk_tokens
        self._transform = transform
        self.head_change: LowRank | None = None
        """What an adapter adds to the head, which is computed here and not by the head's own forward."""
        self.train(False)

    def forward(
        self, token_ids_BW: torch.Tensor, flat_positions_P: torch.Tensor, targets_P: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        """log p(target) (P,) in float32, under logits / temperature. No attention mask: see `MicroBatch`."""
        hidden_BWH = decoder_of(self.model)(input_ids=token_ids_BW, use_cache=False)[0]
        hidden_PH = hidden_BWH.flatten(0, 1).index_select(0, flat_positions_P)
        head = self.model.get_output_embeddings()
        return target_logprobs(
            hidden_PH.to(head.weight.dtype),
            head.weight,
            head.bias,
            targets_P,
            transform=dataclasses.replace(self._transform, temperature=temperature),
            chunk_tokens=self._chunk_tokens,
            low_rank=self.head_change,
        )

    @property
    def num_embeddings(self) -> int:
        """Token ids the policy can read."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def vocab_size(self) -> int:
        """Token ids the policy can predict."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    @property
    def max_length(self) -> int | None:
        """Most tokens of one sequence, where the model states it."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return int(limit) if limit else None

    def layers(self) -> list[nn.Module]:
        """The decoder layers, each a unit of sharding and of activation checkpointing."""
        num_layers = getattr(self.model.config.get_text_config(), "num_hidden_layers", None)
        for module in decoder_of(self.model).modules():
            if isinstance(module, nn.ModuleList) and len(module) == num_layers:
                return list(module)
        return []

    def checkpoint_activations(self) -> None:
        """Keep only the inputs of each layer and compute it again in backward."""
        for layer in self.layers():
            layer.forward = _Checkpointed(layer.forward)


class _Checkpointed:
    """A layer's forward under activation checkpointing. Nothing in it is random, so no RNG state is kept."""

    def __init__(self, forward: Any) -> None:
        self._forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(self._forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def decoder_of(model: Any) -> Any:
    """The part of a causal language model that makes hidden states."""
    decoder = model.get_decoder()
    return decoder if decoder is not model else model.base_model


def own_parameters(model: Any, *, tied_twice: bool = False) -> Iterator[tuple[str, nn.Parameter]]:
    """The model's own weights under their own names, whatever adapters are in it; tied ones under their first name,
    or under each."""
    for name, parameter in model.named_parameters(remove_duplicate=not tied_twice):
        if not _OF_ADAPTER.search(name):
            yield name.replace(".base_layer.", "."), parameter


def load_model(model_dir: Path) -> tuple[Any, LogitTransform]:
    """The model with float32 weights on the CPU, and what its logits undergo after the head, both checked."""
    disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"cannot load a causal language model from {model_dir}: {error}") from error
    model.train(False)
    transform = read_transform(model.config.get_text_config())
    check_head(model, transform)
    return model, transform


def empty_model(model_dir: Path) -> Any:
    """The same model without memory behind its weights, for shards to be filled in."""
    config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
    with torch.device("meta"):
        build: Callable[..., Any] = AutoModelForCausalLM.from_config
        model = build(config, dtype=torch.float32)
    return model.train(False)


def read_transform(config: Any) -> LogitTransform:
    """Scaling and softcapping of the final logits, as the model families that have them name them."""
    scale = 1.0
    for name, invert in (("logit_scale", False), ("lm_head_multiplier", False), ("logits_scaling", True)):
        value = getattr(config, name, None)
        if value is not None:
            scale *= 1.0 / float(value) if invert else float(value)
    softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    return LogitTransform(scale=scale, softcap=float(softcap) if softcap else None)


@torch.no_grad()
def check_head(model: Any, transform: LogitTransform) -> None:
    """Refuse a model whose logits are not transform(head(decoder's hidden states)).

    The head's output is replaced by a ramp wider than any model's logits, so a softcap or scale that this file does
    not know shows at once, even in a freshly initialised model whose own logits are all near 0.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or decoder_of(model) is model:
        raise ModelError(
            f"{type(model).__name__} has no decoder with a linear head (seen {type(head).__name__}): "
            "the learner trains causal language models whose logits are a linear function of hidden states"
        )
    token_ids = torch.arange(_PROBE_TOKENS).unsqueeze(0) % model.get_input_embeddings().weight.shape[0]
    seen: dict[str, torch.Tensor] = {}

    def replace_logits(_module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        seen["hidden"] = inputs[0]
        ramp = torch.linspace(-_PROBE_LOGIT, _PROBE_LOGIT, output.numel()).view_as(output)
        seen["ramp"] = ramp.clone()
        return ramp

    handle = head.register_forward_hook(replace_logits)
    try:
        logits = model(input_ids=token_ids, use_cache=False).logits.float()
    finally:
        handle.remove()
    hidden = decoder_of(model)(input_ids=token_ids, use_cache=False)[0]
    if not torch.allclose(seen["hidden"], hidden, rtol=1e-4, atol=1e-5):
        raise ModelError(f"{type(model).__name__} changes hidden states before its head in a way the learner cannot")
    if not torch.allclose(logits, transform.apply_(seen["ramp"]), rtol=1e-4, atol=1e-4):
        raise ModelError(
            f"{type(model).__name__} changes logits after its head in a way the learner does not know; supported: "
            "logit_scale, lm_head_multiplier, logits_scaling, final_logit_softcapping, logits_soft_cap"
        )
