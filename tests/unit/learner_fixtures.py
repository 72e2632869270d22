"""Tiny models and data for the learner's tests, and the program that runs as one of several gloo ranks."""

from __future__ import annotations

import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp
from transformers import LlamaConfig, LlamaForCausalLM

from weaver_rl.learner.config import LearnerConfig
from weaver_rl.learner.learner import Learner
from weaver_rl.types import Datum

VOCAB = 96
RANKS_TIMEOUT_S = 60.0


def make_llama(directory: Path, *, tied: bool = False, seed: int = 0) -> Path:
    """A two-layer Llama with hidden size 64 and head_dim 32, without a tokenizer."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def make_data(num: int = 7, *, seed: int = 0, max_length: int = 20) -> list[Datum]:
    """Data of different lengths, the first third of each a prompt of weight 0."""
    rng = np.random.default_rng(seed)
    data = []
    for index in range(num):
        length = int(rng.integers(3, max_length + 1))
        tokens = rng.integers(0, VOCAB, length + 1)
        weights = rng.uniform(0.25, 2.0, length).astype(np.float32)
        weights[: length // 3] = 0.0
        inputs = {
            "target_tokens": tokens[1:].astype(np.int64),
            "weights": weights,
            "importance_weights": rng.normal(0, 1.5, length).astype(np.float32),
        }
        data.append(Datum(datum_id=f"d{index}", token_ids_N=tokens[:-1].astype(np.int64), loss_fn_inputs=inputs))
    return data


def cpu_config(**changes: Any) -> LearnerConfig:
    """One thread, no GPU, short timeouts."""
    return LearnerConfig(**{"num_threads": 1, "num_gpus": 0, "timeout_s": 30.0, "logprob_chunk_tokens": 8} | changes)


def gradients(learner: Learner) -> dict[str, torch.Tensor]:
    """Whole gradients of what the learner trains, by name; a collective."""
    named = learner._trained.named_parameters()
    return {name: _full(parameter.grad).clone() for name, parameter in named if parameter.grad is not None}


def weights(learner: Learner) -> dict[str, torch.Tensor]:
    """Copies of the whole weights by name (rank 0; a collective)."""
    return {name: tensor.clone() for chunk in learner.state_chunks(1 << 30) for name, tensor in chunk.items()}


def run_ranks(program: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Run `program(rank, world_size, port, *args)` in real processes; their results in order of rank."""
    context = mp.get_context("spawn")
    results = context.Queue()
    port = _free_port()
    processes = [
        context.Process(target=_run_rank, args=(program, rank, world_size, port, results, args), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        # Read before joining: a child that still has results in the pipe does not end. Empty means a rank hung or died.
        by_rank = dict(results.get(timeout=RANKS_TIMEOUT_S) for _ in processes)
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
    failed = {rank: value for rank, (ok, value) in by_rank.items() if not ok}
    assert not failed, "\n".join(f"rank {rank}:\n{value}" for rank, value in failed.items())
    return [by_rank[rank][1] for rank in range(world_size)]


def _run_rank(program: Any, rank: int, world_size: int, port: int, results: Any, args: Any) -> None:
    torch.set_num_threads(1)
    try:
        value = program(rank, world_size, port, *args)
        results.put((rank, (True, value)))
    except BaseException:  # noqa: BLE001 the boundary of a test process: reported to the test
        results.put((rank, (False, traceback.format_exc())))


def _full(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
