"""Operations that a model's learner runs: passes over data and optimizer steps; and operations as such."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response

from weaver_rl.errors import ServiceError
from weaver_rl.service.calls import TrainingCall
from weaver_rl.service.http.answers import Answer, OperationAnswer
from weaver_rl.service.http.bodies import Body
from weaver_rl.service.http.decoding import JSON, MULTIPART, DecodeJob, Refusal, check_same_model
from weaver_rl.service.http.render import render_result
from weaver_rl.service.http.routing import (
    SUBMITS,
    Face,
    FaceOf,
    Id,
    JsonRoute,
    Owner,
    SequencedRoute,
    answered,
    check_room,
    digest_of,
    documented,
    polled,
    submitted,
)
from weaver_rl.service.http.wire import ForwardBackwardBody, ForwardBody, OptimBody, PackManifest
from weaver_rl.service.loss_functions import describe_losses
from weaver_rl.types import AdamParams

router = APIRouter(tags=["training"])
passes = APIRouter(route_class=JsonRoute)
steps = APIRouter(route_class=SequencedRoute)


class LossFunctionsAnswer(Answer):
    items: list[dict[str, Any]]


def _either(body: type[BaseModel]) -> dict[str, Any]:
    """Describes a body that is read by hand: as JSON, or with its tensors in a pack."""
    schema = {"$ref": f"#/components/schemas/{body.__name__}"}
    parts = {
        "type": "object",
        "properties": {
            "manifest": {"$ref": f"#/components/schemas/{PackManifest.__name__}"},
            "tensor_pack": {"type": "string", "format": "binary"},
        },
        "required": ["manifest", "tensor_pack"],
    }
    encoding = {"manifest": {"contentType": JSON}, "tensor_pack": {"contentType": "application/octet-stream"}}
    return {
        "requestBody": {
            "required": True,
            "content": {JSON: {"schema": schema}, MULTIPART: {"schema": parts, "encoding": encoding}},
        }
    }


@passes.post("/models/{model_id}/forward-passes", openapi_extra=_either(ForwardBody), **SUBMITS)
async def forward(request: Request, face: FaceOf, owner: Owner, model_id: Id) -> Response:
    """Log-probabilities of the targets; gradients stay as they are."""
    return await _pass(request, face, owner, model_id, backward=False)


@passes.post("/models/{model_id}/forward-backward-passes", openapi_extra=_either(ForwardBackwardBody), **SUBMITS)
async def forward_backward(request: Request, face: FaceOf, owner: Owner, model_id: Id) -> Response:
    """Adds to the gradients that the next optimizer step uses."""
    return await _pass(request, face, owner, model_id, backward=True)


async def _pass(request: Request, face: Face, owner: str, model_id: str, *, backward: bool) -> Response:
    await face.service.model(owner, model_id)
    check_room(face, owner)
    with face.service.receiving(owner, model_id):
        call = await _decoded(request, face, model_id, backward)
        if isinstance(call, Refusal):
            if call.seq_id is not None:
                await face.service.skip_seq(owner, model_id, call.seq_id)
            raise call.error
        submit = face.service.forward_backward if backward else face.service.forward
        operation = await submit(owner, model_id, call, render_result)
    del call  # millions of numbers that the service has now; the answer may be held for a while
    return await submitted(face, owner, operation)


async def _decoded(request: Request, face: Face, model_id: str, backward: bool) -> TrainingCall | Refusal:
    limit_bytes = face.config.http.max_body_mb << 20
    with Body() as body:
        await body.fill(request, limit_bytes)
        job = DecodeJob(
            body=body.content(),
            content_type=request.headers.get("content-type", ""),
            model_id=model_id,
            backward=backward,
            limit_bytes=limit_bytes,
        )
        return await face.decoders.decode(job)


@steps.post("/models/{model_id}/optimizer-steps", **SUBMITS)
async def optim_step(request: Request, face: FaceOf, owner: Owner, model_id: Id, body: OptimBody) -> Response:
    """One Adam update with the gradients so far, which are zero again afterwards."""
    payload = body.payload
    try:
        check_same_model(payload.model_id, model_id)
        check_room(face, owner)
    except ServiceError:
        await face.service.skip_seq(owner, model_id, payload.seq_id)
        raise
    params = AdamParams(**payload.adam_params.model_dump())
    operation = await face.service.optim_step(
        owner, model_id, payload.seq_id, await digest_of(request), params, render_result
    )
    return await submitted(face, owner, operation)


@passes.get("/operations/{operation_id}", tags=["operations"], **documented(OperationAnswer))
async def get_operation(face: FaceOf, owner: Owner, operation_id: Id) -> Response:
    """An operation, held until it ends or for some seconds."""
    return await polled(face, owner, operation_id)


@passes.get("/operations/{operation_id}/tensor-pack", tags=["operations"], **documented(None))
async def get_tensor_pack(face: FaceOf, owner: Owner, operation_id: Id) -> Response:
    """404: results are always in the operation itself."""
    await face.service.operation(owner, operation_id, 0.0)
    raise ServiceError(
        "not_found",
        f"operation {operation_id} has no tensor pack: this server gives all results inline, in `response`",
        status=404,
    )


@passes.get("/loss-functions", **documented(LossFunctionsAnswer))
async def list_loss_functions(_owner: Owner) -> Response:
    """What `loss_fn` may be, with inputs, keys and formulas."""
    return answered(LossFunctionsAnswer(items=describe_losses()))


router.include_router(passes)
router.include_router(steps)
