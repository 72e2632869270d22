"""Whose things these are, for clients that ask: one organisation, one project, one cluster. It asks nobody.

What a vendor sells and this server does not (managed datasets, deployments, billing) is answered with 501.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query
from starlette.responses import Response

from weaver_rl.errors import ServiceError
from weaver_rl.service.http.answers import ORGANIZATION_ID, PROJECT_ID, Answer
from weaver_rl.service.http.decoding import JSON
from weaver_rl.service.http.errors import ERROR_RESPONSES
from weaver_rl.service.http.mistakes import shown
from weaver_rl.service.http.routing import Id, JsonRoute, Owner, answered, documented

router = APIRouter(route_class=JsonRoute, tags=["scope"])

Reference = Annotated[str | None, Query(max_length=200)]


class Place(Answer):
    """An organisation or a project."""

    id: str
    name: str
    slug: str
    role: str


class ScopeAnswer(Answer):
    organization: Place
    project: Place


class SchedulingAnswer(Answer):
    can_select: bool
    clusters: list[dict[str, Any]]


ORGANIZATION = Place(id=ORGANIZATION_ID, name="Default organization", slug="default", role="owner")
PROJECT = Place(id=PROJECT_ID, name="Default project", slug="default", role="owner")


def check_scope(organization: str | None, project: str | None) -> None:
    """Raises ServiceError 404 for another organisation or project than the one there is; by id, slug or name."""
    for kind, reference, place in (("organization", organization, ORGANIZATION), ("project", project, PROJECT)):
        if reference is not None and reference not in (place.id, place.slug, place.name):
            raise ServiceError(
                "not_found",
                f"there is no {kind} {shown(reference)}; this server has one: {place.slug} ({place.id})",
                status=404,
            )


@router.get("/organizations", **documented(None) | {"responses": {200: {"model": list[Place]}, **ERROR_RESPONSES}})
async def list_organizations(_owner: Owner) -> Response:
    """The one there is."""
    return _listed(ORGANIZATION)


@router.get(
    "/organizations/{organization_id}/projects",
    **documented(None) | {"responses": {200: {"model": list[Place]}, **ERROR_RESPONSES}},
)
async def list_projects(_owner: Owner, organization_id: Id) -> Response:
    """The one there is."""
    check_scope(organization_id, None)
    return _listed(PROJECT)


@router.get("/scope/resolve", **documented(ScopeAnswer))
async def resolve_scope(_owner: Owner, organization: Reference = None, project: Reference = None) -> Response:
    """Ids of an organisation and a project, by id, slug or name."""
    check_scope(organization, project)
    return answered(ScopeAnswer(organization=ORGANIZATION, project=PROJECT))


@router.get("/scheduling/options", **documented(SchedulingAnswer))
async def scheduling_options(_owner: Owner) -> Response:
    """There is one cluster and nothing to choose."""
    return answered(SchedulingAnswer(can_select=False, clusters=[]))


def _listed(place: Place) -> Response:
    return Response(b"[" + place.json_bytes() + b"]", media_type=JSON)


def _absent(what: str) -> Any:
    async def refuse(_owner: Owner) -> Response:
        raise ServiceError("not_implemented", f"this server has no {what}", status=501)

    refuse.__doc__ = f"501: this server has no {what}."
    return refuse


_ABSENT = {
    "managed datasets": (
        ("GET", "/managed-datasets"),
        ("GET", "/managed-datasets/{name}/versions/{version}"),
        ("POST", "/models/{model_id}/managed-dataset-sample-lengths"),
    ),
    "deployments": (
        ("GET", "/deployments"),
        ("GET", "/deployments/{deployment_id}"),
        ("DELETE", "/deployments/{deployment_id}"),
        ("POST", "/checkpoints/{checkpoint_id}/deployments"),
    ),
    "billing and quotas in money": (
        ("GET", "/quota/balance"),
        ("GET", "/quota/requests"),
        ("POST", "/quota/requests"),
    ),
}

for _what, _routes in _ABSENT.items():
    for _method, _path in _routes:
        router.add_api_route(
            _path,
            _absent(_what),
            methods=[_method],
            name=f"no {_what}",
            status_code=501,
            response_model=None,
            response_class=Response,
            responses=ERROR_RESPONSES,
            tags=["not served"],
        )
