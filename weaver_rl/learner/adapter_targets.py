"""Finds the linear layers of a policy that adapters change, by where they stand in it. It knows no family of models."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from weaver_rl.errors import ConfigError
from weaver_rl.learner.adapter_config import AdapterConfig
from weaver_rl.learner.policy import Policy

_ATTENTION = re.compile(r"attn|attention")
_MLP = re.compile(r"mlp|feed_forward|ffn|moe|expert|fc\d")
_ROUTER = re.compile(r"router|^gate$|expert_gate$")
"""A layer that chooses experts. Engines do not change those, and `gate_proj` is none."""
_EXPERTS_NDIM = 3
"""Experts that are one parameter: (num_experts, out, in)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterTargets:
    """Names of modules, in the order of the model."""

    model: str
    """Class of the model, for errors."""
    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    head: str
    stacked_experts: tuple[str, ...]
    """Parameters that hold the linear layers of all experts of an MLP block in one."""

    def select(self, config: AdapterConfig) -> tuple[str, ...]:
        """Modules that the adapter changes. Raises ConfigError for a part that the model does not have as layers."""
        if config.train_mlp and self.stacked_experts:
            raise ConfigError(
                f"train_mlp: {self.model} keeps its experts stacked in one parameter ({self.stacked_experts[0]}), "
                "which adapters here do not change: set train_mlp to false"
            )
        found = {"train_attn": self.attention, "train_mlp": self.mlp, "train_unembed": (self.head,)}
        for part in config.parts:
            if not found[part]:
                kind = "attention" if part == "train_attn" else "MLP"
                raise ConfigError(
                    f"{part}: {self.model} has no torch.nn.Linear inside {kind} blocks of its decoder layers: set "
                    f"{part} to false"
                )
        return tuple(name for part in config.parts for name in found[part])


def find_targets(policy: Policy) -> AdapterTargets:
    """Look through the decoder layers of a policy that has no adapter yet."""
    names = {module: name for name, module in policy.model.named_modules()}
    attention, mlp, experts = [], [], []
    for layer in policy.layers():
        for path, module in layer.named_modules():
            # Only the block that a layer is made of tells what it is: an MLP may have parts of any name.
            block = path.partition(".")[0]
            is_mlp = _MLP.search(block) is not None
            if is_mlp:
                own = module.named_parameters(recurse=False)
                experts += [f"{names[module]}.{name}" for name, parameter in own if parameter.ndim == _EXPERTS_NDIM]
            if not isinstance(module, nn.Linear):
                continue
            if _ATTENTION.search(block):
                attention.append(names[module])
            elif is_mlp and not _ROUTER.search(path.rpartition(".")[2]):
                mlp.append(names[module])
    return AdapterTargets(
        model=type(policy.model).__name__,
        attention=tuple(attention),
        mlp=tuple(mlp),
        head=names[policy.model.get_output_embeddings()],
        stacked_experts=tuple(experts),
    )
