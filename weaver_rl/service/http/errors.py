"""Every refusal in the one shape that the SDK reads. It decides nothing: codes and messages are others'."""

from __future__ import annotations

import math
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import Response

from weaver_rl.errors import ServiceError
from weaver_rl.service.http.mistakes import invalid_request

_CODES = {404: "not_found", 405: "method_not_allowed"}


class ErrorAnswer(BaseModel):
    """Why a request was refused."""

    error: str = Field(description="For programs: the same word for the same cause.")
    message: str = Field(description="For people: what was seen and what is allowed.")
    retryable: bool = Field(description="The very same request may succeed later.")
    request_id: str = Field(description="Also the header X-Request-ID; the server's log has it.")
    retry_after: float | None = Field(default=None, description="Seconds; also the header Retry-After.")
    details: dict[str, Any] = Field(default_factory=dict)


ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorAnswer, "description": "Refused; `error` and `message` say why."},
    "5XX": {"model": ErrorAnswer, "description": "Not possible, now or on this server."},
}
"""What any endpoint may answer, for the OpenAPI description."""


def error_response(error: ServiceError, request_id: str) -> Response:
    """The answer to a request that `error` refuses."""
    retry_after = error.details.get("retry_after")
    if error.status == HTTPStatus.TOO_MANY_REQUESTS and retry_after is None:
        retry_after = 1.0
    answer = ErrorAnswer(
        error=error.code,
        message=error.message,
        retryable=error.retryable,
        request_id=request_id,
        retry_after=float(retry_after) if isinstance(retry_after, int | float) else None,
        details=error.details,
    )
    headers = {} if answer.retry_after is None else {"Retry-After": str(math.ceil(answer.retry_after))}
    return Response(
        answer.model_dump_json(exclude_none=True), error.status, headers=headers, media_type="application/json"
    )


def request_id_of(request: Request) -> str:
    return str(request.state.request_id)


def add_error_handlers(app: FastAPI) -> None:
    """What routes raise becomes an answer; what nobody foresaw is the gate's."""

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, ServiceError)
        return error_response(error, request_id_of(request))

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return error_response(invalid_request(error.errors()), request_id_of(request))

    async def no_route(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = _CODES.get(error.status_code, "invalid_request")
        message = f"{request.method} {request.url.path}: {HTTPStatus(error.status_code).phrase.lower()}"
        refusal = ServiceError(code, message, status=error.status_code)
        response = error_response(refusal, request_id_of(request))
        response.headers.update(error.headers or {})
        return response

    app.add_exception_handler(ServiceError, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, no_route)
