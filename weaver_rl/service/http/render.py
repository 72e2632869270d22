"""Operations and their results as JSON bytes in Weaver's shape. Results are rendered once, off the event loop."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy.typing as npt

from weaver_rl.service.http.answers import artifact_fields, checkpoint_fields, iso_time
from weaver_rl.service.http.result_packs import Packer
from weaver_rl.service.http.wire import Codec
from weaver_rl.service.records import Operation
from weaver_rl.service.results import (
    ArtifactResult,
    CheckpointResult,
    LoadResult,
    LogprobsResult,
    OptimResult,
    Render,
    Rendered,
    Result,
    SampleResult,
    TrainingResult,
)
from weaver_rl.types import Completion, Float32Array, PromptLogprobs

_PENDING = {
    "pending": ("queued", "The operation waits for those before it."),
    "running": ("running", "The operation runs."),
}


def render_result(result: Result) -> bytes:
    """What `response` of a finished operation holds."""
    match result:
        case TrainingResult():
            return _json({"result": _training(result, _inline)})
        case OptimResult():
            return _json({"metrics": dict(result.metrics), "num_steps": result.num_steps})
        case CheckpointResult():
            fields = checkpoint_fields(result.checkpoint)
            return _json({**fields, "model_path": result.checkpoint.path})
        case LoadResult():
            return _json(
                {"path": result.path, "num_steps": result.num_steps, "include_optimizer": result.with_optimizer}
            )
        case ArtifactResult():
            return _json(artifact_fields(result.artifact))
        case SampleResult():
            return _json({"result": _sample(result, with_old_logprobs=False)})
        case LogprobsResult():
            return _json(
                {
                    "result": {
                        "prompt_logprobs": _prompt_logprobs(result.prompt),
                        "weight_version": result.weight_version,
                    }
                }
            )


def pass_render(codec: Codec | None) -> Render:
    """For passes: tensors in a pack beside the JSON, or in it where there is no codec."""
    return render_result if codec is None else functools.partial(_render_packed, codec=codec)


def _render_packed(result: Result, *, codec: Codec) -> Rendered:
    assert isinstance(result, TrainingResult)
    packer = Packer(codec)
    answer = _training(result, packer.add)
    pack, description = packer.packed()
    return Rendered(response=_json({"result": answer, "tensor_pack": description}), attachment=pack)


def sample_render(with_old_logprobs: bool) -> Render:
    """For `samples`: with the log-probabilities a second time, as `old_logprobs`, for clients that look there."""
    return functools.partial(_render_sample, with_old_logprobs=with_old_logprobs)


def _render_sample(result: Result, *, with_old_logprobs: bool) -> bytes:
    assert isinstance(result, SampleResult)
    return _json({"result": _sample(result, with_old_logprobs)})


def operation_json(operation: Operation, now: float | None = None) -> bytes:
    """The operation object. Its response is embedded as it is, whatever its size.

    Args:
        now: seconds since the epoch; None: what the clock says.
    """
    head: dict[str, Any] = {
        "id": operation.id,
        "type": operation.kind,
        "status": operation.status,
        "model_id": operation.model_id,
        "sampling_session_id": operation.sampling_session_id,
        "seq_id": operation.seq_id,
        "created_at": iso_time(operation.created_at),
        "finished_at": None if operation.finished_at is None else iso_time(operation.finished_at),
    }
    if operation.status == "done":
        return _json(head | {"response": msgspec.Raw(operation.response or b"{}")})
    if operation.status == "error":
        return _json(head | _failure(operation))
    code, message = _PENDING[operation.status]
    waited_s = max(0.0, (time.time() if now is None else now) - operation.created_at)
    return _json(head | {"pending_info": {"code": code, "message": message, "wait_seconds": round(waited_s, 3)}})


def _failure(operation: Operation) -> dict[str, Any]:
    return {
        "error_code": operation.error_code or "operation_failed",
        "error_message": operation.error_message or "the operation failed",
        "error_details": {"operation_id": operation.id, **operation.error_details},
        "retryable": operation.retryable,
    }


def _inline(values: Float32Array) -> dict[str, Any]:
    return {"data": values.tolist(), "dtype": "float32", "shape": list(values.shape)}


def _training(result: TrainingResult, tensor: Callable[[Float32Array], dict[str, Any]]) -> dict[str, Any]:
    outputs = []
    for datum_id, logprobs in zip(result.datum_ids, result.logprobs_per_datum, strict=True):
        output: dict[str, Any] = {"logprobs": tensor(logprobs)}
        if datum_id is not None:
            output["datum_id"] = datum_id
        outputs.append(_piece(output))
    return {"loss_fn_outputs": outputs, "metrics": dict(result.metrics), "ignored": list(result.ignored)}


def _sample(result: SampleResult, with_old_logprobs: bool) -> dict[str, Any]:
    completions = result.group.completions_G
    texts = result.group.texts_G or (None,) * len(completions)
    num_tokens = sum(len(completion.token_ids_L) for completion in completions)
    sample: dict[str, Any] = {
        "sequences": [
            _sequence(completion, text, result.weight_version, with_old_logprobs)
            for completion, text in zip(completions, texts, strict=True)
        ],
        "usage": {
            "prompt_tokens": result.num_prompt_tokens,
            "completion_tokens": num_tokens,
            "total_tokens": result.num_prompt_tokens + num_tokens,
        },
        "weight_version": result.weight_version,
    }
    # None: it was aborted before the engine had read the prompt.
    prompt = result.group.prompt_logprobs
    if result.wants_prompt_logprobs:
        sample["prompt_logprobs"] = None if prompt is None else _prompt_logprobs(prompt)
    if result.num_top_prompt_logprobs:
        # Tuples become arrays: [[token, logprob], ...].
        sample["topk_prompt_logprobs"] = None if prompt is None else [None, *prompt.top_P[1:]]
    return sample


def _sequence(completion: Completion, text: str | None, version: int, with_old_logprobs: bool) -> msgspec.Raw:
    logprobs = completion.logprobs_L.tolist()
    sequence = {
        "tokens": completion.token_ids_L.tolist(),
        "logprobs": logprobs,
        "text": text,
        "stop_reason": completion.stop_reason,
        "weight_version": version,
    }
    return _piece(sequence | {"old_logprobs": logprobs} if with_old_logprobs else sequence)


def _prompt_logprobs(prompt: PromptLogprobs) -> list[float | None]:
    """One for each token; null for the first, which nothing is before."""
    logprobs: npt.NDArray[Any] = prompt.logprobs_P
    return [None, *logprobs[1:].tolist()]


def _piece(value: Any) -> msgspec.Raw:
    """Part of a larger whole. One call for the whole would keep the interpreter's lock from the event loop."""
    return msgspec.Raw(_json(value))


def _json(value: Any) -> bytes:
    """What is no number (it would be no JSON) becomes null."""
    return msgspec.json.encode(value)
