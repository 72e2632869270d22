"""Request bodies: read with a bound on their size and on how long they stall. It knows nothing of what is in them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Self

from fastapi import Request
from starlette.requests import ClientDisconnect

from weaver_rl.errors import ServiceError
from weaver_rl.service.http.decoding import FilePlace
from weaver_rl.service.http.limits import BodyShare

INLINE_BYTES = 64 << 10
"""Larger bodies are kept in a file and decoded in another process."""
SMALL_BODY_BYTES = 4 << 20
"""Bound of every body but those of training data: it is decoded on the event loop."""
IDLE_S = 60.0
"""A body of which nothing comes for so long is given up: its model's queue may be waiting for it."""


async def body_chunks(request: Request, limit_bytes: int) -> AsyncIterator[bytes]:
    """The body, piece by piece.

    Raises:
        ServiceError: 413 once it is known to be larger than `limit_bytes`, 429 when all bodies together are too large,
            408 when it stalls, 400 when it breaks off.
    """
    declared = request.headers.get("content-length", "")
    share: BodyShare = request.state.body_share
    if declared.isdecimal():
        if int(declared) > limit_bytes:
            raise _too_large(limit_bytes)
        # All of it at once: requests that begin together must not fail one another half-way.
        share.grow_to(int(declared))
    size = 0
    stream = aiter(request.stream())
    while True:
        try:
            async with asyncio.timeout(IDLE_S):
                chunk = await anext(stream)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise ServiceError(
                "request_timeout", f"nothing of the body came for {IDLE_S:g} s", status=408, retryable=True
            ) from None
        except ClientDisconnect:
            raise ServiceError("client_disconnected", "the connection closed within the body", status=400) from None
        size += len(chunk)
        if size > limit_bytes:
            raise _too_large(limit_bytes)
        share.grow_to(size)
        yield chunk


async def small_body(request: Request) -> bytes:
    """A body of at most 4 MiB."""
    return b"".join([chunk async for chunk in body_chunks(request, SMALL_BODY_BYTES)])


class Body:
    """A body that may be large: in memory up to 64 KiB, else in a file without a name, which no crash leaves behind."""

    def __init__(self) -> None:
        self._start = bytearray()
        self._fd: int | None = None
        self._num_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    async def fill(self, request: Request, limit_bytes: int) -> None:
        """Takes the whole body of a request; raises what `body_chunks` raises."""
        async for chunk in body_chunks(request, limit_bytes):
            self._write(chunk)

    def content(self) -> bytes | FilePlace:
        """What was filled in; the place is good until this is closed."""
        if self._fd is None:
            return bytes(self._start)
        return FilePlace(pid=os.getpid(), fd=self._fd)

    def _write(self, chunk: bytes) -> None:
        self._num_bytes += len(chunk)
        if self._fd is None:
            self._start += chunk
            if self._num_bytes <= INLINE_BYTES:
                return
            self._fd = os.memfd_create("weaver-request", os.MFD_CLOEXEC)
            chunk = bytes(self._start)
            self._start.clear()
        view = memoryview(chunk)
        while view:
            view = view[os.write(self._fd, view) :]


def _too_large(limit_bytes: int) -> ServiceError:
    return ServiceError(
        "request_too_large", f"the body is larger than the {limit_bytes} bytes that are allowed here", status=413
    )
