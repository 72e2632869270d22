"""How requests reach handlers and leave them: who calls, parsed bodies, documented answers. It knows no endpoint."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.responses import Response

from weaver_rl.errors import ServiceError
from weaver_rl.service.config import ServeConfig
from weaver_rl.service.http.answers import Answer, OperationAnswer
from weaver_rl.service.http.bodies import small_body
from weaver_rl.service.http.decoders import Decoders
from weaver_rl.service.http.decoding import JSON, seq_id_of
from weaver_rl.service.http.downloads import DownloadLinks
from weaver_rl.service.http.errors import ERROR_RESPONSES
from weaver_rl.service.http.mistakes import shown
from weaver_rl.service.http.render import operation_json
from weaver_rl.service.http.roles import WeaverService
from weaver_rl.service.http.wire import MAX_INT
from weaver_rl.service.records import Operation


@dataclass(frozen=True, slots=True, kw_only=True)
class Face:
    """What handlers work with: one for each application."""

    service: WeaverService
    config: ServeConfig
    decoders: Decoders
    links: DownloadLinks
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the server is about to stop: nothing is held any longer."""


async def _face(request: Request) -> Face:
    face: Face = request.app.state.face
    return face


async def _owner(request: Request) -> str:
    owner: str = request.state.owner
    return owner


FaceOf = Annotated[Face, Depends(_face)]
Owner = Annotated[str, Depends(_owner)]
Id = Annotated[str, Path(pattern=r"^[A-Za-z0-9][A-Za-z0-9-]{0,63}$")]
Limit = Annotated[int, Query(ge=1, le=1000)]
Offset = Annotated[int, Query(ge=0, le=MAX_INT)]


class JsonRequest(Request):
    """A request whose body was read, bounded, and parsed as JSON already."""

    def take(self, raw: bytes) -> None:
        """Raises ServiceError 400 or 415."""
        self._raw = raw
        self._parsed: Any = None
        if not raw:
            return
        content_type = self.headers.get("content-type", "")
        if content_type.partition(";")[0].strip().lower() != JSON:
            raise ServiceError(
                "unsupported_media_type", f"Content-Type: seen {shown(content_type)}; allowed: {JSON}", status=415
            )
        try:
            self._parsed = from_json(raw, allow_inf_nan=False)
        except ValueError as error:
            raise ServiceError("invalid_request", f"the body is no JSON: {error}", status=400) from error

    async def body(self) -> bytes:
        return self._raw

    async def json(self) -> Any:
        return self._parsed


class JsonRoute(APIRoute):
    """Reads bodies itself: FastAPI would read without bound, and let pass text that no database takes."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def read_and_handle(request: Request) -> Response:
            taken = JsonRequest(request.scope, request.receive)
            taken.take(await small_body(request))
            return await handle(taken)

        return read_and_handle


class SequencedRoute(JsonRoute):
    """Of requests with a `seq_id`: one that is refused leaves no gap for the next to wait at."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_or_skip(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                seq_id = seq_id_of(error.body)
                if seq_id is not None:
                    face: Face = request.app.state.face
                    await face.service.skip_seq(request.state.owner, request.path_params["model_id"], seq_id)
                raise

        return handle_or_skip


def documented(answer: type[Answer] | None, status: int = 200) -> dict[str, Any]:
    """Arguments of a route decorator: what it answers, as the description shows it. Nothing is validated again."""
    described: dict[str, Any] = {} if answer is None else {"model": answer}
    return {
        "response_model": None,
        "status_code": status,
        "response_class": Response,
        "responses": {status: described | {"description": "Done."}, **ERROR_RESPONSES},
    }


SUBMITS = documented(OperationAnswer, 202)
"""Of routes that submit an operation."""


def answered(answer: Answer, status: int = 200) -> Response:
    return Response(answer.json_bytes(), status, media_type=JSON)


def operation_response(operation: Operation, status: int = 200) -> Response:
    return Response(operation_json(operation), status, media_type=JSON)


async def digest_of(request: Request) -> str:
    """SHA-256 of the request, which tells the same one sent twice from another."""
    return hashlib.sha256(await request.body()).hexdigest()


def check_room(face: Face, owner: str) -> None:
    """Raises ServiceError 429 when a key has too many operations that have not ended."""
    limit = face.config.limits.operations_in_flight
    if face.service.operations_in_flight(owner) >= limit:
        raise ServiceError(
            "rate_limited",
            f"this API key has {limit} operations that have not ended; wait for some of them",
            status=429,
            retryable=True,
        )


async def check_room_or_skip(face: Face, owner: str, model_id: str, seq_id: int) -> None:
    """The same of a request with a seq_id, which leaves no gap."""
    try:
        check_room(face, owner)
    except ServiceError:
        await face.service.skip_seq(owner, model_id, seq_id)
        raise


async def submitted(face: Face, owner: str, operation: Operation) -> Response:
    """The answer to a submission, held for a moment: a short operation ends within, and needs no poll."""
    grace_s = face.config.http.submit_grace_s
    if not operation.ended and grace_s > 0:
        operation = await face.service.operation(owner, operation.id, grace_s)
    return operation_response(operation, 202)


async def polled(face: Face, owner: str, operation_id: str) -> Response:
    """The answer to a poll, held until the operation ends, the server stops, or for the configured time."""
    poll = asyncio.ensure_future(face.service.operation(owner, operation_id, face.config.http.long_poll_s))
    stop = asyncio.ensure_future(face.stopping.wait())
    try:
        await asyncio.wait({poll, stop}, return_when=asyncio.FIRST_COMPLETED)
        if poll.done():
            return operation_response(poll.result())
    finally:
        stop.cancel()
        poll.cancel()
    return operation_response(await face.service.operation(owner, operation_id, 0.0))
