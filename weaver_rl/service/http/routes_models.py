"""Models (training runs) and the base models that they begin from."""

from __future__ import annotations

from collections.abc import Iterable

from fastapi import APIRouter
from starlette.responses import Response

from weaver_rl.service.calls import LineupModel, NewModel
from weaver_rl.service.http.answers import (
    CatalogAnswer,
    CatalogModel,
    ModelAnswer,
    ModelsAnswer,
    SupportedModel,
    SupportedModelsAnswer,
    TrainingRunAnswer,
    page_of,
)
from weaver_rl.service.http.routing import FaceOf, Id, JsonRoute, Limit, Offset, Owner, answered, documented
from weaver_rl.service.http.wire import NewModelBody, TerminateBody
from weaver_rl.service.records import LoraParams

router = APIRouter(route_class=JsonRoute, tags=["models"])


@router.post("/sessions/{session_id}/models", **documented(ModelAnswer, 201))
async def create_model(face: FaceOf, owner: Owner, session_id: Id, body: NewModelBody) -> Response:
    """Begins a training run: an adapter on a base model, or all of it (`full_ft`)."""
    lineup = face.service.lineup()
    base_model, max_length = split_base_model(body.base_model, lineup)
    bounds = [bound for bound in (max_length, body.training_max_sequence_length) if bound is not None]
    new = NewModel(
        model_seq_id=body.model_seq_id,
        base_model=base_model,
        training_mode=body.training_mode or "lora",
        lora=LoraParams(**body.lora_config.model_dump()) if body.lora_config is not None else LoraParams(),
        max_length=min(bounds, default=None),
        user_metadata=body.user_metadata or {},
    )
    return answered(ModelAnswer.of(await face.service.create_model(owner, session_id, new), lineup), 201)


@router.get("/models", **documented(ModelsAnswer))
async def list_models(face: FaceOf, owner: Owner, limit: Limit = 25, offset: Offset = 0) -> Response:
    """This key's models, newest first."""
    page = await face.service.models(owner, limit, offset)
    return answered(ModelsAnswer.of(page, face.service.lineup(), limit, offset))


@router.get("/models/{model_id}", **documented(ModelAnswer))
async def get_model(face: FaceOf, owner: Owner, model_id: Id) -> Response:
    """A model."""
    return answered(ModelAnswer.of(await face.service.model(owner, model_id), face.service.lineup()))


@router.post("/models/{model_id}/terminate", **documented(ModelAnswer))
async def terminate_model(face: FaceOf, owner: Owner, model_id: Id, body: TerminateBody | None = None) -> Response:
    """Frees what a model has in learner and engine. Its checkpoints stay."""
    types = body.instance_types if body is not None and body.instance_types is not None else ["trainer", "inference"]
    model = await face.service.terminate_model(
        owner, model_id, trainer="trainer" in types, inference="inference" in types
    )
    return answered(ModelAnswer.of(model, face.service.lineup()))


@router.get("/training-runs", **documented(ModelsAnswer))
async def list_training_runs(face: FaceOf, owner: Owner, limit: Limit = 25, offset: Offset = 0) -> Response:
    """Another name of GET /models."""
    return await list_models(face, owner, limit, offset)


@router.get("/training-runs/{model_id}", **documented(TrainingRunAnswer))
async def get_training_run(face: FaceOf, owner: Owner, model_id: Id) -> Response:
    """A model with its checkpoints."""
    model = await face.service.model(owner, model_id)
    checkpoints = await face.service.checkpoints(owner, model_id)
    return answered(TrainingRunAnswer.of_run(model, face.service.lineup(), checkpoints))


@router.get("/supported-models", **documented(SupportedModelsAnswer))
async def list_supported_models(face: FaceOf, _owner: Owner, limit: Limit = 100, offset: Offset = 0) -> Response:
    """The base models of this server."""
    return answered(SupportedModelsAnswer(**page_of(face.service.lineup(), limit, offset, SupportedModel.of)))


@router.get("/model-catalog", **documented(CatalogAnswer))
async def list_catalog(face: FaceOf, _owner: Owner, limit: Limit = 100, offset: Offset = 0) -> Response:
    """The base models with what they cost, which is nothing."""
    return answered(CatalogAnswer(**page_of(face.service.lineup(), limit, offset, CatalogModel.of)))


def split_base_model(name: str, lineup: Iterable[LineupModel]) -> tuple[str, int | None]:
    """`name:4096` as name and length, unless the lineup has a model of the whole name."""
    names = {model.name for model in lineup}
    base, colon, length = name.rpartition(":")
    # Not int() of any digits: Python reads also those of other scripts, and refuses thousands of them.
    if name in names or not colon or not (length.isascii() and length.isdecimal() and len(length) < 10):
        return name, None
    return base, int(length)
