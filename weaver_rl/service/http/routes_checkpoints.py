"""Saved weights: checkpoints, what samplers load, exports and their files."""

from __future__ import annotations

import stat
from typing import Annotated

import anyio.to_thread
from fastapi import APIRouter, Query, Request
from fastapi import Path as InPath
from starlette.responses import FileResponse, Response

from weaver_rl.errors import ServiceError
from weaver_rl.service.http.answers import (
    ArtifactAnswer,
    ArtifactsAnswer,
    CheckpointAnswer,
    CheckpointsAnswer,
    DownloadAnswer,
    DownloadFile,
    iso_time,
)
from weaver_rl.service.http.downloads import check_range
from weaver_rl.service.http.errors import ERROR_RESPONSES, error_response, request_id_of
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
    check_room_or_skip,
    digest_of,
    documented,
    submitted,
)
from weaver_rl.service.http.wire import (
    DEFAULT_SAMPLER_TTL_SECONDS,
    ExportBody,
    ExportCheckpointBody,
    ExportSamplerBody,
    LoadBody,
    SaveBody,
    TtlBody,
)
from weaver_rl.service.records import Artifact

router = APIRouter(tags=["checkpoints"])
plain = APIRouter(route_class=JsonRoute)
sequenced = APIRouter(route_class=SequencedRoute)
downloads = APIRouter(tags=["checkpoints"])
"""Without a key: the address itself is the permission."""


@sequenced.post("/models/{model_id}/export-sampler", **SUBMITS)
async def export_sampler(
    request: Request, face: FaceOf, owner: Owner, model_id: Id, body: ExportSamplerBody
) -> Response:
    """Saves the weights as samplers load them; its turn is that of its seq_id."""
    await check_room_or_skip(face, owner, model_id, body.seq_id)
    operation = await face.service.export_sampler(
        owner, model_id, body.seq_id, await digest_of(request), body.path, body.ttl_seconds, render_result
    )
    return await submitted(face, owner, operation)


@plain.post("/models/{model_id}/checkpoints", **SUBMITS)
async def save(face: FaceOf, owner: Owner, model_id: Id, body: SaveBody) -> Response:
    """Saves the weights, behind the operations that are queued."""
    check_room(face, owner)
    ttl_seconds = body.ttl_seconds
    if body.type == "sampling" and "ttl_seconds" not in body.model_fields_set:
        ttl_seconds = DEFAULT_SAMPLER_TTL_SECONDS
    operation = await face.service.save_checkpoint(owner, model_id, body.type, body.name, ttl_seconds, render_result)
    return await submitted(face, owner, operation)


@plain.get("/models/{model_id}/checkpoints", **documented(CheckpointsAnswer))
async def list_checkpoints(face: FaceOf, owner: Owner, model_id: Id) -> Response:
    """A model's checkpoints that have not expired."""
    return answered(CheckpointsAnswer.of(await face.service.checkpoints(owner, model_id)))


@plain.post("/models/{model_id}/load", **SUBMITS)
async def load(face: FaceOf, owner: Owner, model_id: Id, body: LoadBody) -> Response:
    """Goes on from a checkpoint, with or without the optimizer's state."""
    check_room(face, owner)
    operation = await face.service.load_checkpoint(owner, model_id, body.path, body.include_optimizer, render_result)
    return await submitted(face, owner, operation)


@plain.patch("/models/{model_id}/checkpoints/ttl", **documented(CheckpointAnswer))
async def set_ttl(face: FaceOf, owner: Owner, model_id: Id, body: TtlBody) -> Response:
    """When a checkpoint goes."""
    return answered(CheckpointAnswer.of(await face.service.set_ttl(owner, model_id, body.path, body.ttl_seconds)))


@plain.post("/models/{model_id}/export-hf", **SUBMITS)
async def export_hf(face: FaceOf, owner: Owner, model_id: Id, body: ExportBody) -> Response:
    """Saves the weights and exports them: a PEFT adapter, or a whole Hugging Face model."""
    check_room(face, owner)
    operation = await face.service.export_hf(owner, model_id, body.merge_adapter, body.ttl_seconds, render_result)
    return await submitted(face, owner, operation)


@plain.post(
    "/checkpoints/{checkpoint_id}/export",
    **SUBMITS
    | {
        "responses": {
            **SUBMITS["responses"],
            200: {"model": ArtifactAnswer, "description": "There is such an export already."},
        }
    },
)
async def export_checkpoint(face: FaceOf, owner: Owner, checkpoint_id: Id, body: ExportCheckpointBody) -> Response:
    """Exports a checkpoint, unless there is such an export already."""
    check_room(face, owner)
    made = await face.service.export_checkpoint(
        owner, checkpoint_id, body.merge_adapter, body.ttl_seconds, body.force, render_result
    )
    if isinstance(made, Artifact):
        return answered(ArtifactAnswer.of(made))
    return await submitted(face, owner, made)


@plain.get("/checkpoints/{checkpoint_id}/artifacts", **documented(ArtifactsAnswer))
async def list_artifacts(face: FaceOf, owner: Owner, checkpoint_id: Id) -> Response:
    """Exports of a checkpoint."""
    artifacts = await face.service.artifacts(owner, checkpoint_id)
    return answered(ArtifactsAnswer(items=[ArtifactAnswer.of(artifact) for artifact in artifacts]))


@plain.get("/artifacts/{artifact_id}/download", **documented(DownloadAnswer))
async def describe_download(request: Request, face: FaceOf, owner: Owner, artifact_id: Id) -> Response:
    """Where to fetch the files of an export, without a key, for some time."""
    artifact = await face.service.artifact(owner, artifact_id)
    base = face.config.http.public_url or str(request.base_url)
    files = [
        _download_file(face, base.rstrip("/"), artifact, file.name, file.size, file.sha256) for file in artifact.files
    ]
    return answered(DownloadAnswer(artifact_id=artifact.id, files=files))


def _download_file(face: Face, base: str, artifact: Artifact, name: str, size: int, sha256: str) -> DownloadFile:
    link = face.links.link(artifact.id, name)
    return DownloadFile(
        name=name, url=base + link.target, size=size, sha256=sha256, url_expires_at=iso_time(link.expires_at)
    )


@downloads.get(
    "/downloads/{artifact_id}/{name:path}",
    response_model=None,
    response_class=Response,
    responses={
        200: {"description": "The file.", "content": {"application/octet-stream": {}}},
        206: {"description": "The range of it that was asked for.", "content": {"application/octet-stream": {}}},
        **ERROR_RESPONSES,
    },
)
async def download(
    request: Request,
    face: FaceOf,
    artifact_id: Id,
    name: Annotated[str, InPath(max_length=1000)],
    expires: Annotated[int, Query(ge=0, le=2**53)],
    signature: Annotated[str, Query(max_length=200)],
) -> Response:
    """A file of an export, or a range of it."""
    face.links.check(artifact_id, name, expires, signature)
    path = await face.service.artifact_file(artifact_id, name)
    try:
        status = await anyio.to_thread.run_sync(path.stat)
    except OSError:
        status = None
    if status is None or not stat.S_ISREG(status.st_mode):
        raise ServiceError("not_found", f"artifact {artifact_id} has no file {name!r} any more", status=404)
    try:
        check_range(request.headers.get("range"), status.st_size)
    except ServiceError as error:
        response = error_response(error, request_id_of(request))
        response.headers["Content-Range"] = f"bytes */{status.st_size}"
        return response
    return FileResponse(path, media_type="application/octet-stream", stat_result=status)


router.include_router(plain)
router.include_router(sequenced)
