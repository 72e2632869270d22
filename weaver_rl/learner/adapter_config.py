"""Which LoRA adapter a learner trains. It knows sizes and parts, imports nothing heavy and no model."""

from __future__ import annotations

from dataclasses import dataclass

from weaver_rl.errors import ConfigError

_PARTS = {"train_attn": "attention", "train_mlp": "MLP", "train_unembed": "head"}


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """A low-rank change of linear layers: W + alpha/rank · B@A, B zero at the beginning.

    Raises ConfigError for a rank, alpha or choice of parts that no adapter has.

    Example:
        AdapterConfig(rank=32, train_unembed=False, seed=7)
    """

    rank: int
    """Rows of A and columns of B."""
    alpha: int = 32
    """The change is scaled by alpha / rank."""
    train_attn: bool = True
    """Linear layers of the attention blocks."""
    train_mlp: bool = True
    """Linear layers of the MLP blocks; routers of experts are left alone."""
    train_unembed: bool = True
    """The output head. A tied embedding is not changed with it."""
    seed: int = 0
    """Of A: the same in every process and on every rank for the same layer, whatever was drawn before."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"adapter rank must be >= 1, seen {self.rank}")
        if self.alpha < 1:
            raise ConfigError(f"adapter alpha must be >= 1, seen {self.alpha}")
        if not self.parts:
            raise ConfigError(f"an adapter changes at least one part: {', '.join(_PARTS)} are all false")

    @property
    def parts(self) -> tuple[str, ...]:
        """The switches that are on."""
        return tuple(switch for switch in _PARTS if getattr(self, switch))

    def __str__(self) -> str:
        parts = ", ".join(_PARTS[switch] for switch in self.parts)
        return f"a LoRA adapter of rank {self.rank} and alpha {self.alpha} on {parts}"
