"""LoRA adapters on one frozen policy, in PEFT's layers: made, switched between, removed. It knows no data and no loss.

At most one adapter is active at a time, and only the active one is computed or gets gradients.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.functional import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from weaver_rl.errors import ConfigError
from weaver_rl.learner.adapter_config import AdapterConfig
from weaver_rl.learner.adapter_files import PREFIX, save_adapter
from weaver_rl.learner.adapter_targets import AdapterTargets, find_targets
from weaver_rl.learner.policy import Policy, own_parameters
from weaver_rl.learner.process_group import Ranks
from weaver_rl.losses.chunked_head import LowRank


class Adapters:
    """All adapters on a policy. While there is one, the policy's own weights are frozen."""

    def __init__(self, policy: Policy, ranks: Ranks, model_dir: Path) -> None:
        self._policy = policy
        self._ranks = ranks
        self._model_dir = model_dir
        self._by_name: dict[str, Adapter] = {}
        self._active: Adapter | None = None
        self._targets: AdapterTargets | None = None
        # Names of modules must be free of dots and of names that a module has already: users' names are not.
        self._keys = (f"adapter{number}" for number in itertools.count())

    @property
    def names(self) -> tuple[str, ...]:
        """Those that are there, in the order that they came in."""
        return tuple(self._by_name)

    def add(self, name: str, config: AdapterConfig) -> Adapter:
        """A new adapter that changes nothing yet. Raises ConfigError for a taken name or a part the model lacks."""
        if name in self._by_name:
            raise ConfigError(f"there is an adapter {name!r} already: choose another name, or remove it first")
        if self._targets is None:
            self._targets = find_targets(self._policy)
        modules = self._targets.select(config)
        key = next(self._keys)
        # PEFT makes a new adapter the active one: another one must not be taken for it if this fails.
        self.switch_to(None)
        try:
            adapter = self._made(name, config, key, modules, self._targets.head)
        except BaseException:  # boundary: cleans up, then raises again
            self._delete(key)
            raise
        self._by_name[name] = self._active = adapter
        self.switch_to(None)
        return adapter

    def remove(self, name: str) -> None:
        """Free what the adapter had; after the last one the policy's own weights may be trained again."""
        adapter = self._by_name.get(name)
        if adapter is None:
            raise ConfigError(f"there is no adapter {name!r}; there are: {', '.join(self.names) or 'none'}")
        self.switch_to(None)
        del self._by_name[name]
        self._delete(adapter.key)

    def switch_to(self, adapter: Adapter | None) -> None:
        """Make the policy compute with this adapter only, or with none."""
        if adapter is self._active:
            return
        if adapter is not None and self._by_name.get(adapter.name) is not adapter:
            raise ConfigError(f"adapter {adapter.name!r} was removed")
        for layer in _lora_layers(self._policy.model):
            layer.set_adapter([] if adapter is None else [adapter.key])
        self._policy.head_change = None if adapter is None else adapter.head_change()
        self._active = adapter

    def _made(self, name: str, config: AdapterConfig, key: str, modules: Sequence[str], head: str) -> Adapter:
        """In its layers, and the active one in PEFT's eyes."""
        peft_config = LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=0.0,
            target_modules=list(modules),
            task_type="CAUSAL_LM",
            base_model_name_or_path=str(self._model_dir),
        )
        self._inject(peft_config, key)
        layers = {module: self._policy.model.get_submodule(module) for module in modules}
        adapter = Adapter(self, name, config, key, layers, head, peft_config, self._ranks)
        adapter.initialise()
        return adapter

    def _delete(self, key: str) -> None:
        """Whatever layers have it; nothing is active then. After the last one the policy's own weights are free."""
        for layer in _lora_layers(self._policy.model):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # in place of an active one PEFT makes another one active, and says so
                layer.delete_adapter(key)
            layer.set_adapter([])
        if not self._by_name:
            for _, parameter in own_parameters(self._policy.model):
                parameter.requires_grad_(True)

    def _inject(self, config: LoraConfig, key: str) -> None:
        model = self._policy.model
        with warnings.catch_warnings():
            # Of a tied embedding: it stays as it is, a merged model is written with a head of its own.
            warnings.simplefilter("ignore")
            # Without memory, so that nothing is drawn from the global generator.
            inject_adapter_in_model(config, model, key, low_cpu_mem_usage=True)
        # PEFT would take the next adapter for one more of the same tuner.
        del model.peft_config


class Adapter:
    """One adapter: float32, whole on every rank. It implements `Trained`."""

    def __init__(
        self,
        adapters: Adapters,
        name: str,
        config: AdapterConfig,
        key: str,
        layers: Mapping[str, Any],
        head: str,
        peft_config: LoraConfig,
        ranks: Ranks,
    ) -> None:
        self.name = name
        self.config = config
        self.key = key
        self._adapters = adapters
        self._layers = layers
        self._head = head
        self._peft_config = peft_config
        self._ranks = ranks

    def initialise(self) -> None:
        """A uniform in ±1/√in_features, as `torch.nn.Linear` begins; B zero."""
        for module, layer in self._layers.items():
            device = layer.get_base_layer().weight.device
            down, up = layer.lora_A[self.key], layer.lora_B[self.key]
            values = torch.empty(down.weight.shape)
            # On the CPU whatever the device, since generators of other devices draw other numbers.
            generator = torch.Generator().manual_seed(_seed_of(self.config.seed, module))
            nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
            down.weight = nn.Parameter(values.to(device))
            up.weight = nn.Parameter(torch.zeros(up.weight.shape, device=device))

    def head_change(self) -> LowRank | None:
        """What it adds to the head, if it does; live, not a copy."""
        layer = self._layers.get(self._head)
        if layer is None:
            return None
        return LowRank(
            down=layer.lora_A[self.key].weight, up=layer.lora_B[self.key].weight, scaling=layer.scaling[self.key]
        )

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for module, layer in self._layers.items():
            yield f"{module}.lora_A.weight", layer.lora_A[self.key].weight
            yield f"{module}.lora_B.weight", layer.lora_B[self.key].weight

    def activate(self) -> None:
        self._adapters.switch_to(self)

    def check_trainable(self) -> None:
        """It always is."""

    def summed_gradients(self) -> dict[nn.Parameter, torch.Tensor]:
        parameters = [parameter for _, parameter in self.named_parameters()]
        accumulated = any(parameter.grad is not None for parameter in parameters)
        if not self._ranks.max([float(accumulated)])[0]:
            return {}
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        return dict(zip(parameters, self._ranks.sum_tensors(gradients), strict=True))

    def weight_changes(self) -> Mapping[str, Callable[[], torch.Tensor]]:
        return {f"{module}.weight": partial(layer.get_delta_weight, self.key) for module, layer in self._layers.items()}

    def tensors_in_files(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((PREFIX + name, parameter) for name, parameter in self.named_parameters())

    def save_weights(self, directory: Path) -> None:
        if self._ranks.rank == 0:
            save_adapter(directory, dict(self.tensors_in_files()), self._peft_config)

    def save_for_sampler(self, directory: Path, dtype: torch.dtype) -> None:
        self.save_weights(directory)


def _lora_layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def _seed_of(seed: int, module: str) -> int:
    """A layer's own seed: it does not depend on which other layers are changed, nor on their order."""
    return int.from_bytes(hashlib.sha256(f"{seed} {module}".encode()).digest()[:8], "big", signed=True)
