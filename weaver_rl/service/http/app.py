"""The HTTP face put together: gate, routes, description. What the routes do is the service's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Security
from fastapi.security import APIKeyHeader
from pydantic import ConfigDict
from pydantic.json_schema import models_json_schema
from starlette.responses import Response

from weaver_rl import __version__
from weaver_rl.meter import NO_METER, Meter
from weaver_rl.service.config import ServeConfig
from weaver_rl.service.http import (
    routes_checkpoints,
    routes_models,
    routes_sampling,
    routes_scope,
    routes_sessions,
    routes_training,
)
from weaver_rl.service.http.answers import Answer
from weaver_rl.service.http.auth import KEY_HEADER, ApiKeys
from weaver_rl.service.http.decoders import Decoders
from weaver_rl.service.http.decoding import JSON
from weaver_rl.service.http.downloads import DownloadLinks, load_secret
from weaver_rl.service.http.errors import ERROR_RESPONSES, add_error_handlers
from weaver_rl.service.http.gate import Gate
from weaver_rl.service.http.limits import RequestRate
from weaver_rl.service.http.roles import WeaverService
from weaver_rl.service.http.routing import Face, FaceOf
from weaver_rl.service.http.wire import ForwardBackwardBody, ForwardBody, PackManifest

PREFIX = "/api/v1"


class WeaverApp(FastAPI):
    """FastAPI whose description also has the bodies that routes read by hand."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            described = super().openapi()
            _, definitions = models_json_schema(
                [(model, "validation") for model in (ForwardBody, ForwardBackwardBody, PackManifest)],
                ref_template="#/components/schemas/{model}",
            )
            described["components"]["schemas"] |= definitions["$defs"]
        assert self.openapi_schema is not None
        return self.openapi_schema


class HealthAnswer(Answer):
    model_config = ConfigDict(extra="allow")

    status: str


def create_app(
    service: WeaverService,
    config: ServeConfig,
    keys: ApiKeys,
    *,
    download_secret: bytes | None = None,
    meter: Meter = NO_METER,
) -> FastAPI:
    """The whole HTTP face of a service.

    Args:
        download_secret: what download links are signed with; None: kept in `config.state_dir`, made if need be.
        meter: counts requests.

    Raises:
        ConfigError: without keys the host must be one that only this machine reaches.
    """
    keys.check_host(config.http.host)
    secret = load_secret(config.state_dir) if download_secret is None else download_secret
    face = Face(
        service=service,
        config=config,
        decoders=Decoders(config.http.decode_workers),
        links=DownloadLinks(secret, config.retention.download_url_s),
    )

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        face.decoders.start()
        yield
        await asyncio.to_thread(face.decoders.close)

    app = WeaverApp(
        title="weaver-rl",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.face = face
    app.add_middleware(Gate, keys=keys, rate=RequestRate(config.limits), http=config.http, meter=meter)
    add_error_handlers(app)
    needs_key = [Security(APIKeyHeader(name=KEY_HEADER, auto_error=False))] if keys else []
    for module in (
        routes_sessions,
        routes_models,
        routes_training,
        routes_sampling,
        routes_checkpoints,
        routes_scope,
    ):
        app.include_router(module.router, prefix=PREFIX, dependencies=needs_key)
    app.include_router(routes_checkpoints.downloads, prefix=PREFIX)
    app.include_router(_health_router())
    return app


def _health_router() -> APIRouter:
    router = APIRouter(tags=["health"])

    @router.get(
        "/health",
        response_model=None,
        response_class=Response,
        responses={200: {"model": HealthAnswer, "description": "It lives."}, **ERROR_RESPONSES},
    )
    async def health(face: FaceOf) -> Response:
        """That the server lives, and what it waits for; needs no key."""
        return Response(HealthAnswer(**face.service.health()).json_bytes(), media_type=JSON)

    return router
