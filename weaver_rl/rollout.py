"""How a run samples: the `rollout` section and the pure function that gives every completion its seed."""

from __future__ import annotations

import hashlib

from pydantic import Field

from weaver_rl.section import Section


class SamplingConfig(Section):
    """How completions are drawn; names and meanings are vLLM's."""

    temperature: float = Field(default=1.0, ge=0.0, le=2.0)
    """Logits are divided by it (no unit); 0 is greedy."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Draw only from the likeliest tokens whose probabilities add up to this; 1 keeps the whole vocabulary."""
    top_k: int = Field(default=0, ge=0)
    """Draw only from this many of the likeliest tokens; 0 keeps the whole vocabulary."""
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    """Draw only tokens at least this fraction as probable as the likeliest; 0 keeps the whole vocabulary."""
    max_tokens: int = Field(default=256, ge=1)
    """Tokens of a completion at most, the end token included."""

    def greedy(self) -> SamplingConfig:
        """The same length limit, always the likeliest token."""
        return SamplingConfig(temperature=0.0, max_tokens=self.max_tokens)

    def filters(self) -> list[str]:
        """Which settings leave out part of the vocabulary, with their values: `top_p 0.9`."""
        settings = (("top_p", self.top_p, 1.0), ("top_k", self.top_k, 0), ("min_p", self.min_p, 0.0))
        return [f"{name} {value:g}" for name, value, off in settings if value != off]


class RolloutConfig(Section):
    """What one step samples."""

    prompts_per_step: int = Field(default=16, ge=1)
    """Groups in the batch of one step."""
    samples_per_prompt: int = Field(default=8, ge=1)
    """Completions in a group."""
    max_lag: int = Field(default=0, ge=0)
    """Versions a trained token may be behind the learner. 0 is synchronous; with K the samplers work up to K steps
    ahead while the learner trains, and new weights are loaded while they generate."""
    sampling: SamplingConfig = SamplingConfig()
    """How completions are drawn."""
    timeout_s: float = Field(default=1800.0, gt=0)
    """Seconds a sampler may take for the groups of one dispatch; then it is replaced and others are given them."""


def group_id_of(position: int) -> str:
    """Names the group of the prompt at a position of the training stream."""
    return f"{position:08d}"


def completion_seed(run_seed: int, position: int, prompt_id: str, sample_index: int) -> int:
    """Seed of one completion, in [0, 2**63): the same for the same arguments in every process and Python.

    Every completion has its own, because vLLM's `n > 1` with a seed repeats itself and its engine seed repeats
    across replicas. Whoever samples a group again, after a loss or a resume, draws with the same seeds.
    """
    text = f"{run_seed}\x00{position}\x00{prompt_id}\x00{sample_index}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
