"""What a learner trains of a policy, and the whole policy as such. It knows neither data, losses nor optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from weaver_rl.errors import ConfigError
from weaver_rl.learner.adapter_config import AdapterConfig
from weaver_rl.learner.export import save_hf_directory
from weaver_rl.learner.policy import Policy, own_parameters
from weaver_rl.learner.process_group import Ranks
from weaver_rl.learner.sharding import persistent_buffers

if TYPE_CHECKING:
    from weaver_rl.learner.adapters import Adapters


class Trained(Protocol):
    """The part of a policy that gradients and an optimizer belong to."""

    @property
    def config(self) -> AdapterConfig | None:
        """Which adapter it is; None: the whole policy."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is trained, tied weights once."""
        ...

    def activate(self) -> None:
        """Make the policy compute with it, and with nothing else that could be trained beside it."""
        ...

    def check_trainable(self) -> None:
        """Raise ConfigError if nothing of it may change now."""
        ...

    def summed_gradients(self) -> dict[nn.Parameter, torch.Tensor]:
        """Gradients over all ranks of what has accumulated, empty if nothing has; those in place stay as they are."""
        ...

    def weight_changes(self) -> Mapping[str, Callable[[], torch.Tensor]]:
        """What the policy's own weights must be added to, by name, to compute what it computes."""
        ...

    def tensors_in_files(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All that `save_weights` writes, under the names in its files."""
        ...

    def save_weights(self, directory: Path) -> None:
        """Write float32 weights to continue from; rank 0 writes, every rank takes part."""
        ...

    def save_for_sampler(self, directory: Path, dtype: torch.dtype) -> None:
        """Write what an engine loads; rank 0 writes, every rank takes part. `dtype` is that of whole weights."""
        ...


class WholePolicy:
    """Every weight of the policy; only while there is no adapter on it may they change."""

    config = None

    def __init__(self, policy: Policy, adapters: Adapters, ranks: Ranks, model_dir: Path) -> None:
        self._policy = policy
        self._adapters = adapters
        self._ranks = ranks
        self._model_dir = model_dir

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return own_parameters(self._policy.model)

    def activate(self) -> None:
        self._adapters.switch_to(None)

    def check_trainable(self) -> None:
        if self._adapters.names:
            raise ConfigError(
                f"the policy is the frozen base of adapters ({', '.join(self._adapters.names)}): train those, or "
                "remove them before the policy is changed"
            )

    def summed_gradients(self) -> dict[nn.Parameter, torch.Tensor]:
        # Sharded gradients are summed in backward already, each rank's part of them over all ranks.
        return {parameter: parameter.grad for _, parameter in self.named_parameters() if parameter.grad is not None}

    def weight_changes(self) -> Mapping[str, Callable[[], torch.Tensor]]:
        return {}

    def tensors_in_files(self) -> Iterator[tuple[str, torch.Tensor]]:
        return chain(self.named_parameters(), persistent_buffers(self._policy.model))

    def save_weights(self, directory: Path) -> None:
        self._save(directory, torch.float32, hub_names=False)

    def save_for_sampler(self, directory: Path, dtype: torch.dtype) -> None:
        self._save(directory, dtype, hub_names=True)

    def _save(self, directory: Path, dtype: torch.dtype, *, hub_names: bool) -> None:
        save_hf_directory(
            self._policy.model,
            directory,
            model_dir=self._model_dir,
            rank=self._ranks.rank,
            dtype=dtype,
            hub_names=hub_names,
        )
