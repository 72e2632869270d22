"""The `model:` section. It loads nothing; importing it is cheap."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from weaver_rl.section import Section

CPU_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head dimensions that vLLM's CPU attention has kernels for."""

SMOLLM2 = "smollm2-135m-instruct"
MIN_VOCAB_SIZE = 258
"""Every byte, the end token and the padding token: what a lossless tokenizer needs."""


class ScratchModel(Section):
    """A Llama-architecture policy with random weights and a byte-level tokenizer of its own, trained on the task."""

    name: Literal["scratch"] = "scratch"
    hidden_size: int = Field(default=256, ge=32)
    """Width of the residual stream."""
    num_layers: int = Field(default=4, ge=1)
    """Transformer blocks, each attention and feed-forward."""
    num_heads: int = Field(default=4, ge=1)
    """Query heads; hidden_size / num_heads is the head dimension."""
    num_kv_heads: int | None = Field(default=None, ge=1)
    """Key-value heads, a divisor of num_heads; null: as many as num_heads."""
    intermediate_size: int | None = Field(default=None, ge=1)
    """Width of the feed-forward layers; null: 8/3 of hidden_size, rounded up to a multiple of 32."""
    vocab_size: int = Field(default=512, ge=MIN_VOCAB_SIZE)
    """Most tokens the tokenizer may have; it has fewer when the task's texts have nothing to merge."""
    max_position_embeddings: int = Field(default=1024, ge=8)
    """Longest sequence, prompt and completion together, in tokens."""
    split_digits: bool = True
    """Every digit is a token of its own; false: numbers that are frequent in the task's texts become one token."""
    tie_embeddings: bool = False
    """One matrix for input embedding and output layer."""
    initializer_range: float = Field(default=0.02, gt=0)
    """Standard deviation of the random weights."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Of the random weights."""

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def feed_forward_size(self) -> int:
        return -(-self.hidden_size * 8 // 3 // 32) * 32 if self.intermediate_size is None else self.intermediate_size

    @model_validator(mode="after")
    def _heads_fit(self) -> ScratchModel:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}")
        if self.head_dim not in CPU_HEAD_DIMS:
            allowed = ", ".join(map(str, CPU_HEAD_DIMS))
            raise ValueError(
                f"hidden_size {self.hidden_size} / num_heads {self.num_heads} is a head dimension of {self.head_dim}, "
                f"which vLLM on CPU cannot run; allowed: {allowed}"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not divisible by num_kv_heads {self.kv_heads}")
        return self


class PretrainedModel(Section):
    """A policy that exists: the bundled small one, a directory, or an id of the Hugging Face hub."""

    name: str = Field(min_length=1)
    """`smollm2-135m-instruct` (no download), a Hugging Face directory, or a hub id like `org/name`."""
    revision: str | None = None
    """Branch, tag or commit of the hub id; null: its main branch."""


ONLY_SCRATCH = frozenset(ScratchModel.model_fields) - {"name"}


def _check_keys(value: Any) -> Any:
    """Says why a key is wrong, where pydantic would only say that it is unknown."""
    if not isinstance(value, dict):
        return value
    if value.get("name") is None:
        raise ValueError(f"model needs a name: scratch, {SMOLLM2}, a directory or a hub id")
    extra = sorted(ONLY_SCRATCH & value.keys())
    if value["name"] != "scratch" and extra:
        raise ValueError(f"{', '.join(extra)} only go with name: scratch; {value['name']!r} brings its own")
    return value


def _kind(value: Any) -> str:
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
    return "scratch" if name == "scratch" else "pretrained"


ModelConfig = Annotated[
    Annotated[ScratchModel, Tag("scratch")] | Annotated[PretrainedModel, Tag("pretrained")],
    Discriminator(_kind),
    BeforeValidator(_check_keys),
]
"""Either model section, told apart by `name`."""
