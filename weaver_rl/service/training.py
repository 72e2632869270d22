"""What runs in a learner: a model's operations, one after the other, and what is saved and loaded of it.

It knows what each operation does to a model; not where learners run, nor who owns what.
"""

from __future__ import annotations

import asyncio
import shutil
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from weaver_rl.errors import ServiceError
from weaver_rl.meter import NO_METER, Meter
from weaver_rl.service.calls import TrainingCall
from weaver_rl.service.model_states import ModelStates
from weaver_rl.service.operations import Operations
from weaver_rl.service.records import (
    Artifact,
    ArtifactKind,
    Checkpoint,
    CheckpointKind,
    Model,
    Operation,
    OperationKind,
)
from weaver_rl.service.results import (
    ArtifactResult,
    CheckpointResult,
    LoadResult,
    OptimResult,
    Render,
    Rendered,
    Result,
    TrainingResult,
)
from weaver_rl.service.roles import Learners, ModelLearner
from weaver_rl.service.store import Store
from weaver_rl.service.weaver_paths import check_name, parse_checkpoint_path
from weaver_rl.service.weights import Weights
from weaver_rl.types import AdamParams, Float32Array, Int64Array

Work = Callable[[], Awaitable[Result]]


class Training:
    """The operations of models. Each method submits one and returns at once; the model's order decides when it runs.

    Args:
        clock: seconds since the epoch.
        meter: counts tokens and steps.
    """

    def __init__(
        self,
        store: Store,
        operations: Operations,
        learners: Learners,
        weights: Weights,
        clock: Callable[[], float] = time.time,
        meter: Meter = NO_METER,
    ) -> None:
        self._meter = meter
        self._operations = operations
        self._learners = learners
        self._weights = weights
        self._clock = clock
        self._states = ModelStates(store, learners, weights, clock)

    async def forward(self, model: Model, call: TrainingCall, render: Render) -> Operation:
        async def work() -> Result:
            _check_lengths(model, call)
            async with self._states.in_learner(model) as learner:
                output = await learner.forward(call.request.data, call.request.temperature)
            metrics = {"tokens": float(_num_tokens(call))}
            return _training_result(call, output.logprobs_per_datum, metrics)

        return await self._submit(model, "forward", work, render, call.seq_id, call.digest)

    async def forward_backward(self, model: Model, call: TrainingCall, render: Render) -> Operation:
        loss = call.request.loss
        if loss is None:
            raise ServiceError("invalid_request", f"{call.request.name} has no backward; send it to forward-passes")

        async def work() -> Result:
            _check_lengths(model, call)
            async with self._states.in_learner(model, changes=True) as learner:
                output = await learner.forward_backward(call.request.data, loss, call.request.temperature)
            self._meter.add("weaver_rl_service_trained_tokens_total", output.num_tokens, base_model=model.base_model)
            metrics = {
                "loss": output.loss,
                "tokens": float(output.num_tokens),
                "sum_weights": output.sum_weights,
                **output.metrics,
            }
            return _training_result(call, output.logprobs_per_datum, metrics)

        return await self._submit(model, "forward_backward", work, render, call.seq_id, call.digest)

    async def optim_step(self, model: Model, seq_id: int, digest: str, params: AdamParams, render: Render) -> Operation:
        async def work() -> Result:
            async with self._states.in_learner(model, changes=True) as learner:
                num_steps = (await self._states.current(model)).num_steps + 1
                output = await learner.optim_step(params)
                await self._states.record(model, num_steps=num_steps)
            self._meter.add("weaver_rl_service_weight_versions_total", 1, base_model=model.base_model)
            metrics = {"grad_norm": output.grad_norm, "learning_rate": output.learning_rate}
            return OptimResult(num_steps=num_steps, metrics=metrics)

        return await self._submit(model, "optim_step", work, render, seq_id, digest)

    # -- saving ----------------------------------------------------------------------------------------------------

    async def export_sampler(
        self, model: Model, seq_id: int, digest: str, name: str | None, ttl_seconds: int | None, render: Render
    ) -> Operation:
        chosen = name if name is not None else f"sampler-{uuid.uuid4().hex[:12]}"
        check_name(chosen)
        work = self._saving(model, chosen, "sampling", ttl_seconds)
        return await self._submit(model, "export_sampler", work, render, seq_id, digest)

    async def save(
        self, model: Model, kind: CheckpointKind, name: str | None, ttl_seconds: int | None, render: Render
    ) -> Operation:
        chosen = name if name is not None else f"{kind.replace('_', '-')}-{uuid.uuid4().hex[:12]}"
        check_name(chosen)
        return await self._submit(model, "save", self._saving(model, chosen, kind, ttl_seconds), render)

    def _saving(self, model: Model, name: str, kind: CheckpointKind, ttl_seconds: int | None) -> Work:
        async def work() -> Result:
            async with self._states.in_learner(model) as learner:
                checkpoint = await self._save(model, learner, name, kind, ttl_seconds)
            return CheckpointResult(checkpoint=checkpoint)

        return work

    async def _save(
        self, model: Model, learner: ModelLearner, name: str, kind: CheckpointKind, ttl_seconds: int | None
    ) -> Checkpoint:
        async def write(directory: Path) -> None:
            if kind == "sampling":
                await learner.save_for_sampler(directory)
            else:
                await learner.save_state(directory, with_optimizer=kind == "weight_and_optimizer")

        current = await self._states.current(model)
        await self._weights.check_free(current, name, kind)
        return await self._weights.save(current, name=name, kind=kind, ttl_seconds=ttl_seconds, write=write)

    async def load(self, model: Model, path: str, include_optimizer: bool, render: Render) -> Operation:
        parse_checkpoint_path(path)

        async def work() -> Result:
            # Here and not before: a checkpoint that is saved by an operation in front of this one can be loaded.
            checkpoint = await self._loadable(model, path, include_optimizer)
            directory = self._weights.state_directory(checkpoint)
            async with self._states.in_learner(model, changes=True, reloads=True) as learner:
                await learner.load_state(directory, with_optimizer=include_optimizer)
                await self._states.record(model, num_steps=checkpoint.num_steps)
            return LoadResult(path=path, num_steps=checkpoint.num_steps, with_optimizer=include_optimizer)

        return await self._submit(model, "load", work, render)

    async def _loadable(self, model: Model, path: str, include_optimizer: bool) -> Checkpoint:
        checkpoint = await self._weights.at_path(model.owner, path)
        _check_same_shape(model, checkpoint)
        if include_optimizer and checkpoint.kind == "weight":
            raise ServiceError(
                "invalid_request",
                f"{path} was saved without the optimizer (type {checkpoint.kind}); load it without, or save with type "
                "weight_and_optimizer",
            )
        return checkpoint

    # -- artifacts -------------------------------------------------------------------------------------------------

    async def export_hf(self, model: Model, merge_adapter: bool, ttl_seconds: int | None, render: Render) -> Operation:
        """Saves the current weights and exports them."""
        kind = _artifact_kind(model.training_mode, merge_adapter)

        async def work() -> Result:
            async with self._states.in_learner(model) as learner:
                name = f"export-{uuid.uuid4().hex[:12]}"
                checkpoint = await self._save(model, learner, name, "weight", ttl_seconds)
                write = learner.save_hf if kind == "hf_model" else learner.save_for_sampler
                artifact = await self._weights.make_artifact(checkpoint, kind, ttl_seconds, write)
            return ArtifactResult(artifact=artifact)

        return await self._submit(model, "export_hf", work, render)

    async def export_checkpoint(
        self, checkpoint: Checkpoint, merge_adapter: bool, ttl_seconds: int | None, force: bool, render: Render
    ) -> Operation | Artifact:
        """Exports what was saved before. An artifact of the same kind that is ready is the answer, unless `force`."""
        kind = _artifact_kind(checkpoint.training_mode, merge_adapter)
        if not force and (ready := await self._weights.finished_artifact(checkpoint, kind)) is not None:
            return ready

        async def work() -> Result:
            await self._weights.checkpoint(checkpoint.owner, checkpoint.id)  # it may have expired meanwhile
            write = self._merging(checkpoint) if merge_adapter else self._copying(checkpoint)
            return ArtifactResult(artifact=await self._weights.make_artifact(checkpoint, kind, ttl_seconds, write))

        return await self._start(checkpoint.owner, "export_hf", work, render)

    def _copying(self, checkpoint: Checkpoint) -> Callable[[Path], Awaitable[None]]:
        source = self._weights.sampler_directory(checkpoint)

        async def write(directory: Path) -> None:
            await asyncio.to_thread(shutil.copytree, source, directory, dirs_exist_ok=True)

        return write

    def _merging(self, checkpoint: Checkpoint) -> Callable[[Path], Awaitable[None]]:
        """Through an adapter of its own in the learner: the model itself may have gone on since."""

        async def write(directory: Path) -> None:
            guest = f"export-{uuid.uuid4()}"
            try:
                learner = await self._learners.open(
                    guest, checkpoint.base_model, checkpoint.training_mode, checkpoint.lora
                )
                await learner.load_state(self._weights.state_directory(checkpoint), with_optimizer=False)
                await learner.save_hf(directory)
            finally:
                await self._learners.close(guest)

        return write

    # -- submitting ------------------------------------------------------------------------------------------------

    async def _submit(
        self,
        model: Model,
        kind: OperationKind,
        work: Work,
        render: Render,
        seq_id: int | None = None,
        digest: str | None = None,
    ) -> Operation:
        if model.status != "active":
            raise ServiceError("model_terminated", f"model {model.id} was terminated", status=409)
        return await self._start(model.owner, kind, work, render, model_id=model.id, seq_id=seq_id, digest=digest)

    async def _start(self, owner: str, kind: OperationKind, work: Work, render: Render, **of: Any) -> Operation:
        async def run() -> bytes | Rendered:
            return await asyncio.to_thread(render, await work())

        operation = Operation(id=str(uuid.uuid4()), owner=owner, kind=kind, created_at=self._clock(), **of)
        return await self._operations.submit(operation, run)


def _training_result(
    call: TrainingCall, logprobs_per_datum: Sequence[Float32Array], metrics: dict[str, float]
) -> TrainingResult:
    skipped = call.request.skipped_positions
    return TrainingResult(
        datum_ids=call.datum_ids,
        logprobs_per_datum=tuple(
            _zero_at(logprobs, skipped[index]) if index in skipped else logprobs
            for index, logprobs in enumerate(logprobs_per_datum)
        ),
        metrics=metrics,
        ignored=call.request.ignored,
    )


def _zero_at(logprobs_N: Float32Array, positions: Int64Array) -> Float32Array:
    """Where the target was -100 there is no token whose log-probability it could be."""
    changed = logprobs_N.copy()
    changed[positions] = 0.0
    return changed


def _check_lengths(model: Model, call: TrainingCall) -> None:
    for datum in call.request.data:
        if len(datum.token_ids_N) > model.max_length:
            raise ServiceError(
                "invalid_request",
                f"datum {datum.datum_id!r}: model_input has {len(datum.token_ids_N)} tokens, model {model.id} takes "
                f"{model.max_length} at most",
            )


def _num_tokens(call: TrainingCall) -> int:
    return sum(len(datum.token_ids_N) for datum in call.request.data)


def _artifact_kind(training_mode: str, merge_adapter: bool) -> ArtifactKind:
    if training_mode == "full_ft" and merge_adapter:
        raise ServiceError("invalid_request", "merge_adapter is for LoRA models; this one is trained whole")
    return "hf_model" if training_mode == "full_ft" or merge_adapter else "hf_adapter"


def _check_same_shape(model: Model, checkpoint: Checkpoint) -> None:
    def shape(of: Model | Checkpoint) -> tuple[Any, ...]:
        return of.base_model, of.training_mode, replace(of.lora, seed=None) if of.lora is not None else None

    if shape(model) != shape(checkpoint):
        raise ServiceError(
            "invalid_request",
            f"{checkpoint.path} is of {_words(checkpoint)}, this model is {_words(model)}: only the same base model, "
            "mode and adapter shape can be loaded",
        )


def _words(of: Model | Checkpoint) -> str:
    lora = of.lora
    if of.training_mode == "full_ft" or lora is None:
        return f"{of.base_model} ({of.training_mode})"
    parts = [
        name for name, on in (("attn", lora.train_attn), ("mlp", lora.train_mlp), ("unembed", lora.train_unembed)) if on
    ]
    return f"{of.base_model} (lora, rank {lora.rank}, {'+'.join(parts)})"
