"""Tiny policies, and how tests use real samplers and learner ranks with them. It starts no cluster."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray

from actors.learner import LearnerSpec, RayLearnerGroup
from actors.object_store import publish
from actors.sampler import SamplerSpec
from actors.sampler_replica import RaySampler
from weaver_rl.errors import ActorFailedError
from weaver_rl.learner.config import LearnerConfig
from weaver_rl.losses.config import CrossEntropy
from weaver_rl.rollout import SamplingConfig
from weaver_rl.sampler_fleet import SamplerFleet, _Member
from weaver_rl.types import AdamParams, Completion, Datum, Float32Array, GroupSample, PublishedWeights, SampleRequest

VOCAB = 500
MAX_MODEL_LEN = 256
TOKENS_PER_STEP = 1100
BLOCK = 32
STOP_TOKENS = (2, 7)
TIMEOUT_S = 60.0
START_TIMEOUT_S = 150.0
KINDS = ("tied", "untied")
"""The two policies: with one matrix for embedding and head (learner of 1 rank), and with two (learner of 2 ranks)."""


class StartedFleet(SamplerFleet):
    """A fleet of samplers that are up already and shared by many tests: one that is lost is not replaced."""

    def __init__(self, samplers: Mapping[str, Any]) -> None:
        nobody: Any = None
        super().__init__(nobody, (), generate_timeout_s=TIMEOUT_S, watch_every_s=TIMEOUT_S, events=Unheard())
        for name, actor in samplers.items():
            replica = RaySampler(
                name,
                actor,
                ray.get(actor.identity.remote()),
                load_timeout_s=TIMEOUT_S,
                unresponsive_after_s=TIMEOUT_S,
            )
            self._members[name] = _Member(name, replica=replica, serving=True)

    def _lose(self, member: _Member, reason: str) -> None:
        self._fail(ActorFailedError(reason))
        super()._lose(member, reason)


class Unheard:
    """`FleetEvents` that nobody wants to know."""

    def sampler_joined(self, name: str) -> None: ...
    def sampler_lost(self, name: str, reason: str, num_groups: int) -> None: ...
    def sampler_left(self, name: str) -> None: ...
    def group_reissued(self, group_id: str, sampler: str, reason: str) -> None: ...


@dataclass(frozen=True)
class Replicas:
    """The tied policy's weights for both engines: the untied one is given the embedding as its head, too."""

    weights: PublishedWeights

    def for_sampler(self, name: str) -> PublishedWeights:
        if name == "tied":
            return self.weights
        chunks = [ray.get(reference) for reference in self.weights.handle]
        embedding = next(c["model.embed_tokens.weight"] for c in chunks if "model.embed_tokens.weight" in c)
        head = publish(self.weights.version, [{"lm_head.weight": embedding}])
        return replace(self.weights, handle=(*self.weights.handle, *head.handle))


class ReplicaFleet(StartedFleet):
    """Both engines as two samplers of one run, whose policy is the tied one."""

    async def load_weights(self, weights: PublishedWeights, only: str | None = None) -> None:
        for name in self.names if only is None else (only,):
            await super().load_weights(self.on_the_way(weights, name), only=name)

    def on_the_way(self, weights: PublishedWeights, name: str) -> PublishedWeights:
        return Replicas(weights).for_sampler(name)


def make_model(directory: Path, *, tied: bool, seed: int = 0) -> Path:
    """A two-layer Llama with grouped-query attention; its weights are large enough for a peaked distribution."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=MAX_MODEL_LEN,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=STOP_TOKENS[0],
    )
    model: Any = LlamaForCausalLM(config)  # type: ignore[no-untyped-call]
    model.save_pretrained(directory)
    return directory


def sampler_spec(name: str, model_dir: Path, seed: int) -> SamplerSpec:
    return SamplerSpec(
        name=name,
        model_dir=model_dir,
        engine_args={
            "max_model_len": MAX_MODEL_LEN,
            "block_size": BLOCK,
            "max_num_seqs": 64,
            "max_num_batched_tokens": TOKENS_PER_STEP,
            "kv_cache_memory_bytes": 32 << 20,
        },
        seed=seed,
        stop_token_ids=STOP_TOKENS,
        tensor_parallel=1,
        transport="object_store",
        start_timeout_s=START_TIMEOUT_S,
    )


def start_learner(ranks: Sequence[Any], model_dir: Path, *, timeout_s: float = TIMEOUT_S) -> RayLearnerGroup:
    """The ranks as one learner at the weights of the directory, whatever they were before."""
    ray.get([rank.close.remote() for rank in ranks])
    address, port = ray.get(ranks[0].free_address.remote())
    config = LearnerConfig(num_ranks=len(ranks), num_threads=1, num_gpus=0, timeout_s=timeout_s)
    specs = [
        LearnerSpec(
            model_dir=model_dir,
            config=config,
            rank=rank,
            seed=0,
            master_addr=address,
            master_port=port,
            transport="object_store",
            # One tensor in a chunk: whatever could happen between two chunks has its chance.
            chunk_bytes=1,
        )
        for rank in range(len(ranks))
    ]
    ray.get([rank.start.remote(spec) for rank, spec in zip(ranks, specs, strict=True)])
    return RayLearnerGroup(ranks, timeout_s)


async def change(learner: RayLearnerGroup, *, num_steps: int = 2) -> None:
    """Updates that move every weight a lot."""
    for step in range(num_steps):
        data = [datum(random_tokens(40, seed=100 * step + index), f"d{index}") for index in range(8)]
        await learner.forward_backward(data, CrossEntropy(name="cross_entropy"))
        await learner.optim_step(AdamParams(learning_rate=0.03))


def random_tokens(num: int, seed: int) -> tuple[int, ...]:
    return tuple(int(token) for token in np.random.default_rng(seed).integers(10, VOCAB, size=num))


def datum(token_ids: Sequence[int], datum_id: str) -> Datum:
    """Every token after the first is a target of weight 1."""
    tokens = np.array(token_ids, dtype=np.int64)
    return Datum(
        datum_id=datum_id,
        token_ids_N=tokens[:-1],
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": np.ones(len(tokens) - 1, dtype=np.float32)},
    )


def requests(prompts: Sequence[Sequence[int]], num_samples: int, *, name: str, seed: int = 0) -> list[SampleRequest]:
    """One group a prompt; all seeds differ."""
    return [
        SampleRequest(
            group_id=f"{name}-{index}",
            token_ids_P=tuple(prompt),
            seeds_G=tuple(seed + 1000 * index + sample for sample in range(num_samples)),
        )
        for index, prompt in enumerate(prompts)
    ]


async def collect(groups: AsyncIterator[GroupSample]) -> dict[str, GroupSample]:
    return {group.group_id: group async for group in groups}


async def sample(
    fleet: SamplerFleet, asked: Sequence[SampleRequest], sampling: SamplingConfig
) -> dict[str, GroupSample]:
    return await collect(fleet.generate(asked, sampling))


async def learner_logprobs(
    learner: RayLearnerGroup, asked: Sequence[SampleRequest], sampled: Mapping[str, GroupSample], temperature: float
) -> list[tuple[Completion, Float32Array]]:
    """Each completion with the learner's own log-probabilities (L,) of its tokens, by a full forward."""
    pairs = [(request, c) for request in asked for c in sampled[request.group_id].completions_G]
    data = [datum((*request.token_ids_P, *c.token_ids_L.tolist()), request.group_id) for request, c in pairs]
    output = await learner.forward(data, temperature)
    return [
        (completion, logprobs[len(request.token_ids_P) - 1 :])
        for (request, completion), logprobs in zip(pairs, output.logprobs_per_datum, strict=True)
    ]


def gap(pairs: Sequence[tuple[Completion, Float32Array]], version: int) -> float:
    """Largest |Δ| in nats over the tokens of one version; refuses to be vacuous."""
    differences = [np.abs(c.logprobs_L - logprobs)[c.versions_L == version] for c, logprobs in pairs]
    values = np.concatenate(differences)
    assert len(values), f"no token of v{version}"
    return float(values.max())


def in_actor(actor: Any, function: Callable[[Any], Any]) -> Any:
    """`function(actor)` in the actor's process. Only a local function will do: the actor cannot import test modules."""
    return ray.get(actor.__ray_call__.remote(function), timeout=TIMEOUT_S)


def process_id(actor: Any) -> int:
    def getpid(actor: Any) -> int:
        import os

        return os.getpid()

    return int(in_actor(actor, getpid))
