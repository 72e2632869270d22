"""Learner tokens/s beside a bare PyTorch loop, and peak memory beside a loss that holds all logits."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.alternation import Effort, Ratio, alternate, ratio
from benchmarks.bare_loop import BETAS, CLIP_NORM, LEARNING_RATE, build_bare_step
from benchmarks.child import Child
from benchmarks.crew import local_crew
from benchmarks.peak_memory import Peak, build_peak
from benchmarks.plain_vllm import PASSIVE_OPENMP
from benchmarks.quickstart import Workload, prepare, quickstart_config
from benchmarks.random_llama import LlamaSize, save_random_llama
from benchmarks.results import Aim, Row
from benchmarks.scale import Scale
from weaver_rl.batch import sequence_datum
from weaver_rl.learner.config import LearnerConfig
from weaver_rl.learner.microbatches import pack, sum_weights
from weaver_rl.losses.cross_entropy import CrossEntropy
from weaver_rl.types import AdamParams, Datum

Sequences = Sequence[tuple[tuple[int, ...], tuple[float, ...]]]

BARE = "bare PyTorch loop"
ADAM = AdamParams(learning_rate=LEARNING_RATE, beta1=BETAS[0], beta2=BETAS[1], grad_clip_norm=CLIP_NORM)
CROSS_ENTROPY = CrossEntropy(name="cross_entropy")
LARGE = ["model.hidden_size=512", "model.num_heads=8", "model.num_layers=6", "model.intermediate_size=1408"]
"""A policy whose matrices, not the calls around them, take the time."""


def build_learner_step(model_dir: Path, config: LearnerConfig, data: Sequence[Datum]) -> Callable[[], float]:
    """`Learner` without Ray: one optimizer step on all data, and its loss."""
    from weaver_rl.learner.learner import Learner

    learner = Learner(model_dir, config)

    def step() -> float:
        loss = learner.forward_backward(data, CROSS_ENTROPY, sum_weights(data)).loss
        learner.optim_step(ADAM)
        return loss

    return step


def build_timed(build: Callable[..., Callable[[], Any]], *arguments: Any) -> Callable[[], tuple[float, Any]]:
    """Seconds of each call, measured where it happens, and what it returned."""
    call = build(*arguments)

    def timed() -> tuple[float, Any]:
        started = time.perf_counter()
        result = call()
        return time.perf_counter() - started, result

    return timed


def measure(scale: Scale, folder: Path) -> list[Row]:
    """Rows for the quickstart's policy and a larger one, then for memory."""
    rows = _speed("quickstart", [], scale, folder / "learner-0")
    if not scale.quick:
        rows += _speed("16M parameters", LARGE, scale, folder / "learner-1")
    return rows + _memory(scale, folder / "learner-memory")


def _speed(name: str, overrides: list[str], scale: Scale, folder: Path) -> list[Row]:
    workload = prepare(quickstart_config(overrides), folder, num_demonstrations=64 if overrides else 512)
    sequences, data = _batch(workload)
    config = workload.config.learner.model_copy(update={"num_threads": scale.num_threads})
    batches = pack([len(datum.token_ids_N) for datum in data], config.max_tokens_per_microbatch)
    num_tokens = sum(len(datum.token_ids_N) for datum in data)
    effort = Effort(rounds=3 if scale.quick else 31, max_seconds=10 if scale.quick else 15, warmups=2)
    environment = _environment(scale)
    losses: dict[str, list[float]] = {}

    def tokens_per_s(contender: str, timed: Callable[[], tuple[float, float]]) -> Callable[[], float]:
        def measured() -> float:
            seconds, loss = timed()
            losses.setdefault(contender, []).append(loss)
            return num_tokens / seconds

        return measured

    with contextlib.ExitStack() as stack:
        bare = Child(build_timed, (build_bare_step, workload.model_dir, sequences, batches), environment)
        stack.callback(bare.close)
        learner = Child(build_timed, (build_learner_step, workload.model_dir, config, data), environment)
        stack.callback(learner.close)
        crew = stack.enter_context(local_crew(workload.config, folder, scale.num_threads))
        group = crew.learner(workload.model_dir)

        async def step() -> float:
            output = await group.forward_backward(data, CROSS_ENTROPY)
            await group.optim_step(ADAM)
            return output.loss

        contenders = {
            "learner": tokens_per_s("learner", learner),
            BARE: tokens_per_s(BARE, bare),
            "actor": tokens_per_s("actor", build_timed(lambda: lambda: crew.wait(step()))),
        }
        rates = alternate(contenders, effort)
    for contender in losses:
        _check_same_training(name, contender, losses[contender], losses[BARE])
    case = f"{name}: {len(data)} data, {num_tokens} tokens, {len(batches)} micro-batch(es)"
    return [
        Row(
            benchmark="learner",
            case=case + how,
            quantity="tokens/s",
            ours=statistics.median(rates[contender]),
            baseline=statistics.median(rates[BARE]),
            baseline_name=BARE,
            ratio=ratio(rates[contender], rates[BARE]),
            aim=Aim(kind="at least", value=0.95),
        )
        for contender, how in (("learner", ""), ("actor", ", through Ray"))
    ]


def _memory(scale: Scale, folder: Path) -> list[Row]:
    size = LlamaSize(vocab_size=49152, hidden_size=576, num_layers=2, num_heads=9, num_kv_heads=3)
    num_sequences, length = (2, 513) if scale.quick else (16, 513)
    save_random_llama(size, folder)
    tokens = np.random.default_rng(0).integers(0, size.vocab_size, size=(num_sequences, length)).tolist()
    sequences = [(tuple(row), (1.0,) * length) for row in tokens]
    data = [sequence_datum(f"{i}", row[:1], row[1:]) for i, (row, _) in enumerate(sequences)]
    num_tokens = num_sequences * (length - 1)
    config = LearnerConfig(max_tokens_per_microbatch=num_tokens, num_threads=scale.num_threads)
    batches = [tuple(range(num_sequences))]
    full = _peak(scale, build_bare_step, folder, sequences, batches)
    ours = _peak(scale, build_learner_step, folder, config, data)
    _check_same_training("memory", "learner", [ours.result], [full.result])
    case = f"vocabulary {size.vocab_size}, hidden {size.hidden_size}, {num_tokens} tokens in one micro-batch"
    return [
        Row(
            benchmark="learner",
            case=case,
            quantity=quantity,
            ours=a,
            baseline=b,
            baseline_name="full-logits loss",
            ratio=Ratio.of([a / b]),
        )
        for quantity, a, b in (
            ("peak memory, MiB", ours.peak_mib, full.peak_mib),
            ("of it the step's own, MiB", ours.growth_mib, full.growth_mib),
            ("seconds of that step", ours.seconds, full.seconds),
        )
    ]


def _peak(scale: Scale, build: Callable[..., Callable[[], float]], *arguments: Any) -> Peak:
    with Child(build_peak, (build, *arguments), _environment(scale)) as child:
        peak = child()
    assert isinstance(peak, Peak)
    return peak


def _batch(workload: Workload) -> tuple[Sequences, list[Datum]]:
    """Demonstrations as both sides read them: weight 1 on the tokens of the completion."""
    sequences = [
        (prompt + completion, (0.0,) * len(prompt) + (1.0,) * len(completion))
        for prompt, completion in workload.demonstrations
    ]
    data = [sequence_datum(f"{i}", *pair) for i, pair in enumerate(workload.demonstrations)]
    return sequences, data


def _environment(scale: Scale) -> dict[str, str]:
    return PASSIVE_OPENMP | {"OMP_NUM_THREADS": str(scale.num_threads), "HF_HUB_OFFLINE": "1"}


def _check_same_training(case: str, contender: str, losses: Sequence[float], expected: Sequence[float]) -> None:
    """A contender that computes something else has no speed to compare."""
    for step, (seen, right) in enumerate(zip(losses, expected, strict=True)):
        if not math.isclose(seen, right, rel_tol=1e-3):
            raise RuntimeError(f"{case}: loss of {contender} at step {step} is {seen}, of the bare loop {right}")
