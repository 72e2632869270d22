"""`forward_backward` tokens/s through the SDK, by both of its transports, beside the learner alone on the same data."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actors.lineup import PreparedModel
from benchmarks.alternation import Effort, alternate, ratio
from benchmarks.child import Child
from benchmarks.learner import build_timed
from benchmarks.plain_vllm import PASSIVE_OPENMP
from benchmarks.results import Row
from benchmarks.scale import Scale
from benchmarks.service_process import Server
from weaver_rl.learner.adapter_config import AdapterConfig
from weaver_rl.learner.config import LearnerConfig
from weaver_rl.service.config import ServeConfig
from weaver_rl.types import Int64Array

ALONE = "the learner alone"
API_KEY = "sk-none"
"""The SDK wants one; a server without keys takes any."""
HEARTBEAT_S = 1.0
"""A client that closes sleeps until its next one is due."""
LOSS = "cross_entropy"
POLL_S = "0.02"
"""As `WEAVER_OPERATION_POLL_INTERVAL` of the SDK, whose first poll comes after half a second otherwise."""
RANK = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequences:
    """Data of one request: every token but the first of each is a target, half of them with weight 0."""

    token_ids: Int64Array
    """(sequences, length + 1)."""

    @staticmethod
    def of(num_sequences: int, length: int, vocab_size: int) -> Sequences:
        chosen = np.random.default_rng(0).integers(0, vocab_size, size=(num_sequences, length + 1))
        return Sequences(token_ids=chosen)

    @property
    def num_tokens(self) -> int:
        """That go through the model."""
        return int(self.token_ids[:, 1:].size)

    def pairs(self) -> Iterator[tuple[Int64Array, dict[str, Any]]]:
        """Input tokens and loss inputs of each datum, as arrays."""
        weights = np.arange(self.token_ids.shape[1] - 1) % 2
        for row in self.token_ids:
            yield row[:-1], {"target_tokens": row[1:], "weights": weights.astype(np.float32)}


def build_adapter_pass(
    model_dir: Path, config: LearnerConfig, seed: int, adapter: AdapterConfig, sequences: Sequences
) -> Callable[[], float]:
    """`Learner` with one adapter, without Ray; the result accumulates the gradient of all data, and is their loss."""
    from weaver_rl.learner.learner import Learner
    from weaver_rl.learner.microbatches import sum_weights
    from weaver_rl.service.loss_functions import RawDatum, resolve_loss

    raw = [RawDatum(datum_id=None, token_ids_N=tokens, inputs=inputs) for tokens, inputs in sequences.pairs()]
    asked = resolve_loss(LOSS, {}, raw, backward=True)
    loss = asked.loss
    assert loss is not None
    learner = Learner(model_dir, config, seed=seed).with_adapter("only", adapter)
    normaliser = sum_weights(asked.data)

    def run() -> float:
        output = learner.forward_backward(asked.data, loss, normaliser, positions="all", with_grad_norm=True)
        return output.loss

    return run


def learner_alone(config: ServeConfig, prepared: PreparedModel, sequences: Sequences) -> Child:
    """Started, not yet up; with the server's configuration of the learner."""
    learner = prepared.config.learner
    environment = PASSIVE_OPENMP | {"OMP_NUM_THREADS": str(learner.num_threads or 1), "HF_HUB_OFFLINE": "1"}
    arguments = (prepared.model_dir, learner, config.seed, AdapterConfig(rank=RANK), sequences)
    return Child(build_timed, (build_adapter_pass, *arguments), environment)


def training_sequences(scale: Scale, vocab_size: int) -> Sequences:
    """What is trained on."""
    return Sequences.of(16 if scale.quick else 64, 128, vocab_size)


def measure_training(scale: Scale, server: Server, base_model: str, sequences: Sequences, alone: Child) -> list[Row]:
    """A row for each transport."""
    effort = Effort(rounds=3 if scale.quick else 21, max_seconds=60, warmups=1 if scale.quick else 2)
    losses: dict[str, list[float]] = {}

    def tokens_per_s(name: str, timed: Callable[[], tuple[float, float]]) -> Callable[[], float]:
        def measured() -> float:
            seconds, loss = timed()
            losses.setdefault(name, []).append(loss)
            return sequences.num_tokens / seconds

        return measured

    data = sdk_data(sequences)
    with clients(server, {"inline JSON": "default", "http-binary, raw": "http-binary"}) as services:
        contenders = {
            name: tokens_per_s(name, build_timed(_pass, service, base_model, data))
            for name, service in services.items()
        }
        alone.wait_started()
        contenders[ALONE] = tokens_per_s(ALONE, alone)
        rates = alternate(contenders, effort)
    for name in services:
        check_same_loss(name, losses[name], losses[ALONE])
    num_sequences, length = sequences.token_ids.shape
    return [
        Row(
            benchmark="service",
            case=f"forward_backward, SDK, {name}: {num_sequences} data of {length - 1} tokens, LoRA rank {RANK}",
            quantity="tokens/s",
            ours=statistics.median(rates[name]),
            baseline=statistics.median(rates[ALONE]),
            baseline_name=ALONE,
            ratio=ratio(rates[name], rates[ALONE]),
            note=f"from the call of the SDK to its result, polling every {POLL_S} s",
        )
        for name in services
    ]


def check_same_loss(name: str, losses: Sequence[float], expected: Sequence[float]) -> None:
    """Who computes something else has no speed to compare. Weights do not change, so neither does the loss."""
    for seen, right in zip(losses, expected, strict=True):
        if not math.isclose(seen, right, rel_tol=1e-3):
            raise RuntimeError(f"forward_backward, {name}: the loss is {seen}, that of {ALONE} {right}")


def sdk_data(sequences: Sequences) -> list[Any]:
    """The same data as the SDK takes them."""
    import torch
    from weaver.types import Datum, ModelInput

    return [
        Datum(
            model_input=ModelInput.from_ints(tokens.tolist()),
            loss_fn_inputs={name: torch.tensor(values) for name, values in inputs.items()},
        )
        for tokens, inputs in sequences.pairs()
    ]


@contextlib.contextmanager
def clients(server: Server, transports: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The unmodified SDK, once for each tensor transport (raw, not compressed). Their models end with the block."""
    from weaver import ServiceClient

    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(
                ServiceClient(
                    base_url=server.url,
                    api_key=API_KEY,
                    tensor_transport=transport,
                    tensor_compression="raw",
                    heartbeat_interval=HEARTBEAT_S,
                )
            )
            for name, transport in transports.items()
        }


def _pass(service: Any, base_model: str, data: Sequence[Any]) -> Callable[[], float]:
    from weaver.types import LoraConfig

    model = service.create_model(base_model=base_model, lora_config=LoraConfig(rank=RANK, seed=0))

    def run() -> float:
        return float(model.forward_backward(data, LOSS)["result"]["metrics"]["loss"])

    return run
