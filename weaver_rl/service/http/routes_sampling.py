"""Sampling sessions: completions and log-probabilities from weights that do not change."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter
from starlette.responses import Response

from weaver_rl.errors import ServiceError
from weaver_rl.rollout import SamplingConfig
from weaver_rl.service.calls import NewSamplingSession, SampleCall
from weaver_rl.service.http.answers import Answer, SamplingSessionAnswer
from weaver_rl.service.http.render import render_result, sample_render
from weaver_rl.service.http.routes_models import split_base_model
from weaver_rl.service.http.routing import (
    SUBMITS,
    FaceOf,
    Id,
    JsonRoute,
    Owner,
    answered,
    check_room,
    documented,
    submitted,
)
from weaver_rl.service.http.wire import (
    LogprobsBody,
    NewSamplingSessionBody,
    PauseBody,
    PromptBody,
    SampleBody,
    SamplingParamsBody,
)

router = APIRouter(route_class=JsonRoute, tags=["sampling"])


class PausedAnswer(Answer):
    ok: bool
    status: Literal["paused"]
    mode: str


class RunningAnswer(Answer):
    ok: bool
    status: Literal["running"]


@router.post("/sessions/{session_id}/sampling-sessions", **documented(SamplingSessionAnswer, 201))
async def create_sampling_session(face: FaceOf, owner: Owner, session_id: Id, body: NewSamplingSessionBody) -> Response:
    """Pins weights: those of a checkpoint as it is now, or the base model's."""
    lineup = face.service.lineup()
    new = NewSamplingSession(
        seq_id=body.sampling_session_seq_id,
        base_model=split_base_model(body.base_model, lineup)[0] if body.base_model is not None else None,
        path=body.model_path,
        model_id=body.model_id,
    )
    created = await face.service.create_sampling_session(owner, session_id, new)
    return answered(SamplingSessionAnswer.of(created, lineup), 201)


@router.get("/sampling-sessions/{sampling_session_id}", **documented(SamplingSessionAnswer))
async def get_sampling_session(face: FaceOf, owner: Owner, sampling_session_id: Id) -> Response:
    """A sampling session."""
    session = await face.service.sampling_session(owner, sampling_session_id)
    return answered(SamplingSessionAnswer.of(session, face.service.lineup()))


@router.delete("/sampling-sessions/{sampling_session_id}", **documented(None, 204))
async def delete_sampling_session(face: FaceOf, owner: Owner, sampling_session_id: Id) -> Response:
    """Ends a sampling session."""
    await face.service.delete_sampling_session(owner, sampling_session_id)
    return Response(status_code=204)


@router.post("/sampling-sessions/{sampling_session_id}/samples", **SUBMITS)
async def sample(face: FaceOf, owner: Owner, sampling_session_id: Id, body: SampleBody) -> Response:
    """Completions of a prompt."""
    for name in ("return_sampling_mask", "return_moe_topk_indices", "score_centering"):
        if getattr(body, name):
            raise ServiceError("unsupported", f"{name}: not served here", status=400)
    limit = face.config.limits.num_samples
    if body.num_samples > limit:
        raise ServiceError("invalid_request", f"num_samples: {body.num_samples}, allowed are 1 to {limit}", status=400)
    check_room(face, owner)
    render = sample_render(body.return_old_logprob)
    operation = await face.service.sample(owner, sampling_session_id, _sample_call(body), render)
    return await submitted(face, owner, operation)


@router.post("/sampling-sessions/{sampling_session_id}/logprobs", **SUBMITS)
async def logprobs(face: FaceOf, owner: Owner, sampling_session_id: Id, body: LogprobsBody) -> Response:
    """Log-probability of every token of a prompt."""
    if body.return_rollout_token_expert:
        raise ServiceError("unsupported", "return_rollout_token_expert: not served here", status=400)
    check_room(face, owner)
    temperature = body.loss_fn_config.temperature if body.loss_fn_config is not None else 1.0
    operation = await face.service.logprobs(
        owner, sampling_session_id, _token_ids(body.prompt), temperature, render_result
    )
    return await submitted(face, owner, operation)


@router.post("/sampling-sessions/{sampling_session_id}/pause-generation", **documented(PausedAnswer))
async def pause_generation(face: FaceOf, owner: Owner, sampling_session_id: Id, body: PauseBody) -> Response:
    """Stops the engine of a model with training_mode full_ft."""
    await face.service.pause_generation(owner, sampling_session_id, body.mode)
    return answered(PausedAnswer(ok=True, status="paused", mode=body.mode))


@router.post("/sampling-sessions/{sampling_session_id}/continue-generation", **documented(RunningAnswer))
async def continue_generation(face: FaceOf, owner: Owner, sampling_session_id: Id) -> Response:
    """Lets a stopped engine go on."""
    await face.service.continue_generation(owner, sampling_session_id)
    return answered(RunningAnswer(ok=True, status="running"))


def _sample_call(body: SampleBody) -> SampleCall:
    params = body.sampling_params
    return SampleCall(
        token_ids=_token_ids(body.prompt),
        num_samples=body.num_samples,
        sampling=SamplingConfig(temperature=params.temperature, top_p=params.top_p, top_k=max(params.top_k, 0)),
        max_tokens=params.max_tokens,
        stop=tuple(params.stop),
        stop_token_ids=tuple(params.stop_token_ids),
        seed=_seed(params),
        wants_prompt_logprobs=body.prompt_logprobs,
        num_top_prompt_logprobs=body.topk_prompt_logprobs,
    )


def _token_ids(prompt: PromptBody) -> tuple[int, ...]:
    return tuple(token for chunk in prompt.chunks for token in chunk.tokens)


def _seed(params: SamplingParamsBody) -> int | None:
    if None not in (params.seed, params.sampling_seed) and params.seed != params.sampling_seed:
        raise ServiceError(
            "invalid_request",
            f"sampling_params.seed is {params.seed} and sampling_seed {params.sampling_seed}: they mean the same",
            status=400,
        )
    return params.seed if params.seed is not None else params.sampling_seed
