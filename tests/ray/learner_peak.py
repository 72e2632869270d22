"""Trains two steps of a model made from nothing, in a process of its own, and prints what it took at its peak.

Arguments: an empty directory, tokens of a micro-batch, 1 for activation checkpointing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.peak_memory import build_peak
from weaver_rl.check.memory import learner_memory
from weaver_rl.check.policy_shape import shape_of
from weaver_rl.learner.config import LearnerConfig
from weaver_rl.learner.learner import Learner
from weaver_rl.losses.config import ImportanceSampling
from weaver_rl.types import AdamParams, Datum

LENGTH = 128
IMPORTED_MIB = 400
SHAPE = LlamaConfig(
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    vocab_size=2000,
    max_position_embeddings=LENGTH,
)


def main(directory: Path, num_tokens: int, checkpointing: bool) -> None:
    LlamaForCausalLM(SHAPE).save_pretrained(directory)
    config = LearnerConfig(max_tokens_per_microbatch=num_tokens, activation_checkpointing=checkpointing, num_threads=2)
    learner = Learner(directory, config)
    token_ids = np.arange(LENGTH, dtype=np.int64)
    ones = np.ones(LENGTH, np.float32)
    inputs = {"target_tokens": token_ids, "weights": ones, "importance_weights": ones}
    data = [
        Datum(datum_id=str(index), token_ids_N=token_ids, loss_fn_inputs=inputs)
        for index in range(2 * num_tokens // LENGTH)
    ]

    def step(data: list[Datum]) -> float:
        loss = learner.forward_backward(data, ImportanceSampling(name="importance_sampling"), 1.0).loss
        learner.optim_step(AdamParams(learning_rate=1e-5))
        return loss

    # The first step makes AdamW's moments, the second is at its peak while they are there.
    measured = build_peak(lambda: lambda: step(data[:1]) + step(data))()
    parts = {
        part.name: part.num_bytes / 2**20
        for part in learner_memory(
            shape_of(SHAPE), config, on_gpu=False, longest=LENGTH, chunk_mb=1, capacity_bytes=None
        ).parts
    }
    # The weights are there before the steps, and so is all that is imported.
    estimated = sum(size for name, size in parts.items() if name != "weights") - IMPORTED_MIB
    sys.stdout.write(json.dumps({"measured_mib": measured.growth_mib, "estimated_mib": estimated}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "1")
