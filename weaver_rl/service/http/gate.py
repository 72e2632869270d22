"""What every request passes before it reaches a route: its id, who sent it, how often. It reads no body."""

from __future__ import annotations

import logging
import time
import uuid
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from weaver_rl.errors import ServiceError
from weaver_rl.meter import NO_METER, Meter
from weaver_rl.service.config import HttpConfig, is_loopback
from weaver_rl.service.http.auth import KEY_HEADER, ApiKeys
from weaver_rl.service.http.errors import error_response
from weaver_rl.service.http.limits import BodyBudget, RequestRate

DOWNLOADS = "/api/v1/downloads/"
"""Where files are fetched, by signed address and without a key."""
PUBLIC = ("/health", "/openapi.json")
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")

logger = logging.getLogger(__name__)


class Gate:
    """ASGI middleware: refuses before the body is read, turns what nobody foresaw into a 500, and counts it all."""

    def __init__(
        self, app: ASGIApp, *, keys: ApiKeys, rate: RequestRate, http: HttpConfig, meter: Meter = NO_METER
    ) -> None:
        self._meter = meter
        self._app = app
        self._keys = keys
        self._rate = rate
        self._bodies = BodyBudget(http.max_bodies_mb << 20)
        public_host = urlsplit(http.public_url).hostname if http.public_url else None
        self._local_hosts = {public_host} if public_host else set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, send)
        began = time.monotonic()
        try:
            await self._exchanged(scope, receive, exchange)
        finally:
            self._count(scope, exchange, time.monotonic() - began)

    def _count(self, scope: Scope, exchange: _Exchange, seconds: float) -> None:
        """By the path as the route has it: what a client may write instead has no end."""
        endpoint = getattr(scope.get("route"), "path", None) or "other"
        method = scope["method"] if scope["method"] in METHODS else "other"
        status = str(exchange.status) if exchange.status is not None else "none"
        self._meter.add("weaver_rl_service_requests_total", 1, endpoint=endpoint, method=method, status=status)
        self._meter.observe("weaver_rl_service_request_seconds", seconds, endpoint=endpoint, method=method)

    async def _exchanged(self, scope: Scope, receive: Receive, exchange: _Exchange) -> None:
        try:
            self._admit(scope)
            with self._bodies.share() as scope["state"]["body_share"]:
                await self._app(scope, receive, exchange.send)
        except ServiceError as error:
            await error_response(error, exchange.request_id)(scope, receive, exchange.send)
        except Exception:  # boundary: whatever a route did not foresee is logged and answered
            logger.exception("request %s: %s %s failed", exchange.request_id, scope["method"], scope["path"])
            if exchange.answered:
                raise
            failure = ServiceError(
                "internal_error",
                f"the server failed; its log has more under request {exchange.request_id}",
                status=500,
            )
            await error_response(failure, exchange.request_id)(scope, receive, exchange.send)

    def _admit(self, scope: Scope) -> None:
        path = scope["path"]
        headers = Headers(scope=scope)
        if not self._keys:
            self._check_host(headers.get("host", ""))
        if path in PUBLIC or path.startswith(DOWNLOADS):
            return
        owner = self._keys.owner_of(headers.get(KEY_HEADER))
        if owner is None:
            raise ServiceError("unauthorized", f"the header {KEY_HEADER} has no key of this server", status=401)
        self._rate.take(owner)
        scope["state"]["owner"] = owner

    def _check_host(self, host: str) -> None:
        """A page in a browser of this machine can be given a name that leads here; it cannot choose this header."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            name = ""
        if not is_loopback(name) and name not in self._local_hosts:
            raise ServiceError(
                "forbidden",
                "this server has no API keys and answers only to localhost; configure keys to use other names",
                status=403,
            )


class _Exchange:
    """One request and its answer, which carries the request's id."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.request_id = str(uuid.uuid4())
        self.answered = False
        self.status: int | None = None
        scope.setdefault("state", {})["request_id"] = self.request_id
        self._send = send

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.answered = True
            self.status = message["status"]
            message.setdefault("headers", [])
            MutableHeaders(scope=message)["X-Request-ID"] = self.request_id
        await self._send(message)
