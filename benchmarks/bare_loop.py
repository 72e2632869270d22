"""The training loop that one would write by hand: transformers, cross-entropy over all logits, AdamW. No weaver-rl."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

LEARNING_RATE = 1e-5
BETAS = (0.9, 0.95)
CLIP_NORM = 1.0


def build_bare_step(
    model_dir: Path, sequences: Sequence[tuple[tuple[int, ...], tuple[float, ...]]], batches: Sequence[tuple[int, ...]]
) -> Callable[[], float]:
    """Loads the model; the result makes one optimizer step on all sequences and returns its loss.

    Args:
        sequences: per datum, its token ids and the weight of each token as a target (the first one's is unused).
        batches: indices of each micro-batch, padded to its longest sequence.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import torch
    from torch.nn.utils.rnn import pad_sequence
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=0.0, fused=True)
    sum_weights = sum(sum(weights[1:]) for _, weights in sequences)

    def step() -> float:
        total = 0.0
        for indices in batches:
            tokens = pad_sequence([torch.tensor(sequences[i][0]) for i in indices], batch_first=True)
            weights = pad_sequence([torch.tensor(sequences[i][1]) for i in indices], batch_first=True)
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
            losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
            loss = (losses * weights[:, 1:].flatten()).sum() / sum_weights
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step
