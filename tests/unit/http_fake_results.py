"""Results of a service that trains and samples nothing, made of the request so that tests can tell them apart."""

from __future__ import annotations

import hashlib
import time
import uuid
from dataclasses import replace
from pathlib import Path

import numpy as np

from weaver_rl.errors import ServiceError
from weaver_rl.service.calls import SampleCall, TrainingCall
from weaver_rl.service.records import Artifact, ArtifactFile, ArtifactKind, Checkpoint, Operation
from weaver_rl.service.results import Rendered, SampleResult, TrainingResult
from weaver_rl.types import Completion, GroupSample, PromptLogprobs


def training_result(call: TrainingCall) -> TrainingResult:
    """Log-probabilities that tell targets apart: -target / 100."""
    logprobs = [(-datum.loss_fn_inputs["target_tokens"] / 100).astype(np.float32) for datum in call.request.data]
    return TrainingResult(
        datum_ids=call.datum_ids,
        logprobs_per_datum=tuple(logprobs),
        metrics={"loss": 1.5, "tokens": float(sum(map(len, logprobs)))},
        ignored=call.request.ignored,
    )


def prompt_logprobs(num_tokens: int, num_top: int = 0) -> PromptLogprobs:
    logprobs = -np.arange(num_tokens, dtype=np.float32) / 4
    logprobs[:1] = np.nan
    top = tuple((rank, -0.25 - rank) for rank in range(num_top))
    return PromptLogprobs(logprobs_P=logprobs, top_P=((), *(top for _ in range(num_tokens - 1))) if num_top else ())


def sample_result(call: SampleCall) -> SampleResult:
    """Completion g of a prompt is [g, seed], or [g, 0] without a seed."""
    completions = tuple(
        Completion(
            token_ids_L=np.array([index, (call.seed or 0) % 1000], np.int32),
            logprobs_L=np.array([-0.5, -0.25], np.float32),
            versions_L=np.array([4, 4], np.int32),
            stop_reason="stop",
        )
        for index in range(call.num_samples)
    )
    wanted = call.wants_prompt_logprobs or call.num_top_prompt_logprobs
    group = GroupSample(
        group_id="g",
        completions_G=completions,
        sampler="fake",
        texts_G=tuple(f"text {index}" for index in range(call.num_samples)),
        prompt_logprobs=prompt_logprobs(len(call.token_ids), call.num_top_prompt_logprobs) if wanted else None,
    )
    return SampleResult(
        group=group,
        num_prompt_tokens=len(call.token_ids),
        wants_prompt_logprobs=call.wants_prompt_logprobs,
        num_top_prompt_logprobs=call.num_top_prompt_logprobs,
        weight_version=4,
    )


def ended_operation(operation: Operation, made: bytes | Rendered | ServiceError) -> Operation:
    now = time.time()
    if isinstance(made, ServiceError):
        failed = replace(operation, status="error", error_code=made.code, error_message=made.message)
        return replace(failed, retryable=made.retryable, finished_at=now)
    response, attachment = (made.response, made.attachment) if isinstance(made, Rendered) else (made, None)
    return replace(operation, status="done", response=response, attachment=attachment, finished_at=now)


def artifact_of(
    checkpoint: Checkpoint, directory: Path | None, kind: ArtifactKind, ttl_seconds: int | None
) -> Artifact:
    """An export whose files are those of a directory."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file()) if directory is not None else []
    files = tuple(
        ArtifactFile(
            name=path.relative_to(directory).as_posix(),
            size=path.stat().st_size,
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path in paths
        if directory is not None
    )
    return Artifact(
        id=str(uuid.uuid4()),
        owner=checkpoint.owner,
        checkpoint_id=checkpoint.id,
        model_id=checkpoint.model_id,
        checkpoint_name=checkpoint.name,
        kind=kind,
        created_at=time.time(),
        updated_at=time.time(),
        status="completed",
        files=files,
        ttl_seconds=ttl_seconds,
    )
