"""Adapters for the learner's tests: what is in them, steps of training, and plain PEFT as the judge."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from weaver_rl.learner.adapter_config import AdapterConfig
from weaver_rl.learner.learner import Learner
from weaver_rl.learner.microbatches import sum_weights
from weaver_rl.losses.config import ImportanceSampling
from weaver_rl.types import AdamParams, Datum


class LossWithFigures(ImportanceSampling):
    """One that reports something beside itself."""

    def metric_sums(self, logprobs, inputs):
        weights = inputs["weights"].double()
        return {
            "mean_probability": (weights * logprobs.double().exp()).sum(),
            "mean_target": (weights * inputs["target_tokens"]).sum(),
        }


LOSS = ImportanceSampling(name="importance_sampling", clip_ratio=1.0)
FIGURES = LossWithFigures(name="importance_sampling", clip_ratio=1.0)
PARAMS = AdamParams(learning_rate=1e-2, weight_decay=0.01)
EVERYTHING = AdapterConfig(rank=4, seed=3)
ATTENTION = AdapterConfig(rank=2, alpha=8, train_mlp=False, train_unembed=False, seed=5)
HEAD = AdapterConfig(rank=3, train_attn=False, train_mlp=False, seed=7)


def adapter_weights(learner: Learner) -> dict[str, torch.Tensor]:
    """Copies of what the learner trains, by name."""
    return {name: parameter.detach().clone() for name, parameter in learner._trained.named_parameters()}


def assert_same_tensors(seen: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert seen.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(seen[name], value), name


def train(learner: Learner, data: list[Datum], *, num_steps: int = 2, params: AdamParams = PARAMS) -> None:
    for _ in range(num_steps):
        learner.forward_backward(data, LOSS, sum_weights(data))
        learner.optim_step(params)


def logprobs(learner: Learner, data: list[Datum]) -> np.ndarray:
    return np.concatenate(learner.forward(data).logprobs_per_datum)


def plain_logprobs(model: Any, data: list[Datum], temperature: float = 1.0) -> torch.Tensor:
    """Every datum alone through a plain model, without padding: log p of its targets."""
    rows = []
    for datum in data:
        logits = model(torch.from_numpy(datum.token_ids_N)[None]).logits[0] / temperature
        targets = torch.from_numpy(datum.loss_fn_inputs["target_tokens"])[:, None]
        rows.append(logits.log_softmax(-1).gather(1, targets)[:, 0])
    return torch.cat(rows)


def plain_peft(model_dir: Path, adapter_dir: Path) -> Any:
    """What a user loads: the base model and the adapter, trainable."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        return PeftModel.from_pretrained(model, adapter_dir, is_trainable=True)


def peft_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """Parameters of the adapter of a `PeftModel`, by the names that the learner gives them."""
    return {
        name.removeprefix("base_model.model.").replace(".default.", "."): parameter
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }
