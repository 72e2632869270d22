"""Operations that a model's learner runs: passes over data and optimizer steps; and operations as such."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response

from weaver_rl.errors import ServiceError
from weaver_rl.service.http.answers import Answer, OperationAnswer
from weaver_rl.service.http.bodies import Body
from weaver_rl.service.http.decoding import JSON, MULTIPART, Decoded, DecodeJob, Refusal, check_same_model
from weaver_rl.service.http.errors import ERROR_RESPONSES
from weaver_rl.service.http.render import pass_render, render_result
from weaver_rl.service.http.result_packs import description_in, pack_response
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
    check_room_or_skip,
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

READ_FIRST_BYTES = 1 << 20
"""A smaller body is read before its request is refused for want of room, so that its seq_id leaves no gap."""


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
    if not _is_small(request):
        # Not read in vain; but its seq_id stays unknown, and is waited for.
        check_room(face, owner)
    with face.service.receiving(owner, model_id):
        decoded = await _decoded(request, face, model_id, backward)
        if isinstance(decoded, Refusal):
            if decoded.seq_id is not None:
                await face.service.skip_seq(owner, model_id, decoded.seq_id)
            raise decoded.error
        await check_room_or_skip(face, owner, model_id, decoded.call.seq_id)
        submit = face.service.forward_backward if backward else face.service.forward
        operation = await submit(owner, model_id, decoded.call, pass_render(decoded.codec))
    del decoded  # millions of numbers that the service has now; the answer may be held for a while
    return await submitted(face, owner, operation)


def _is_small(request: Request) -> bool:
    declared = request.headers.get("content-length", "")
    return declared.isdecimal() and int(declared) < READ_FIRST_BYTES


async def _decoded(request: Request, face: Face, model_id: str, backward: bool) -> Decoded | Refusal:
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
    except ServiceError:
        await face.service.skip_seq(owner, model_id, payload.seq_id)
        raise
    await check_room_or_skip(face, owner, model_id, payload.seq_id)
    params = AdamParams(**payload.adam_params.model_dump())
    operation = await face.service.optim_step(
        owner, model_id, payload.seq_id, await digest_of(request), params, render_result
    )
    return await submitted(face, owner, operation)


@passes.get("/operations/{operation_id}", tags=["operations"], **documented(OperationAnswer))
async def get_operation(face: FaceOf, owner: Owner, operation_id: Id) -> Response:
    """An operation, held until it ends or for some seconds."""
    return await polled(face, owner, operation_id)


@passes.get(
    "/operations/{operation_id}/tensor-pack",
    tags=["operations"],
    response_model=None,
    response_class=Response,
    responses={
        200: {"description": "The pack, as it was described.", "content": {"application/octet-stream": {}}},
        **ERROR_RESPONSES,
    },
)
async def get_tensor_pack(face: FaceOf, owner: Owner, operation_id: Id) -> Response:
    """The tensors of a result that refers to them (`tensor_pack`): those of requests that came with a pack."""
    operation = await face.service.operation(owner, operation_id, 0.0)
    description = None if operation.response is None else description_in(operation.response)
    if description is None:
        why = "its result is inline, in `response`" if operation.status == "done" else f"it is {operation.status}"
        raise ServiceError("not_found", f"operation {operation_id} has no tensor pack: {why}", status=404)
    return pack_response(await face.service.operation_attachment(owner, operation_id), description)


@passes.get("/loss-functions", **documented(LossFunctionsAnswer))
async def list_loss_functions(_owner: Owner) -> Response:
    """What `loss_fn` may be, with inputs, keys and formulas."""
    return answered(LossFunctionsAnswer(items=describe_losses()))


router.include_router(passes)
router.include_router(steps)
