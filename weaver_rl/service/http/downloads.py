"""Links to files of artifacts: signed, with an end. Whoever holds one may fetch that file; it knows no API key."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from weaver_rl.errors import ServiceError
from weaver_rl.service.http.mistakes import shown

_RANGES = re.compile(r"bytes=\s*[0-9]{0,18}-[0-9]{0,18}(\s*,\s*[0-9]{0,18}-[0-9]{0,18})*\s*")
SECRET_FILE = "download_secret"
_SECRET_BYTES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """Path and query of one file's address."""

    target: str
    expires_at: int
    """Seconds since the epoch."""


class DownloadLinks:
    """Makes and checks links.

    Args:
        secret: what signatures are made with.
        valid_s: how long a link works.
        clock: seconds since the epoch.
    """

    def __init__(self, secret: bytes, valid_s: float, clock: Callable[[], float] = time.time) -> None:
        self._secret = secret
        self._valid_s = valid_s
        self._clock = clock

    def link(self, artifact_id: str, name: str) -> Link:
        expires_at = int(self._clock() + self._valid_s)
        signature = self._signature(artifact_id, name, expires_at)
        return Link(
            target=f"/api/v1/downloads/{artifact_id}/{quote(name)}?expires={expires_at}&signature={signature}",
            expires_at=expires_at,
        )

    def check(self, artifact_id: str, name: str, expires_at: int, signature: str) -> None:
        """Raises ServiceError 403 for a link that was not made here, or whose time is over."""
        expected = self._signature(artifact_id, name, expires_at)
        if not hmac.compare_digest(expected.encode(), signature.encode()):
            raise ServiceError("invalid_link", "this is no download link of this server", status=403)
        if expires_at <= self._clock():
            raise ServiceError(
                "link_expired", "this download link has expired; ask for the artifact's download again", status=403
            )

    def _signature(self, artifact_id: str, name: str, expires_at: int) -> str:
        # Ids have no line breaks, so that no two links are signed by the same text.
        text = f"{artifact_id}\n{expires_at}\n{name}"
        return hmac.new(self._secret, text.encode(), hashlib.sha256).hexdigest()


def check_range(header: str | None, num_bytes: int) -> None:
    """Refuses what a file of that size cannot give: 416, or 400 for what is no list of byte ranges."""
    if header is None:
        return
    if not _RANGES.fullmatch(header):
        raise _bad_range(header)
    for part in header.partition("=")[2].split(","):
        first, last = (int(number) if number else None for number in part.strip().split("-"))
        if (first is None and last is None) or (first is not None and last is not None and last < first):
            raise _bad_range(header)
        if num_bytes == 0 or (last == 0 if first is None else first >= num_bytes):
            raise ServiceError("range_not_satisfiable", f"the file has {num_bytes} bytes", status=416)


def _bad_range(header: str) -> ServiceError:
    return ServiceError("invalid_request", f"Range: seen {shown(header)}; allowed: bytes=FIRST-LAST", status=400)


def load_secret(state_dir: Path) -> bytes:
    """The secret of a server, made with its first start and readable by its user alone: links survive restarts."""
    state_dir.mkdir(parents=True, exist_ok=True)
    path = state_dir / SECRET_FILE
    draft = path.with_name(f"{SECRET_FILE}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        return _read(path)
    except FileNotFoundError:
        draft.touch(mode=0o600)
        draft.write_text(secrets.token_hex(_SECRET_BYTES))
    try:
        # A link is made whole or not at all, and never over what another server has just made.
        os.link(draft, path)
    except FileExistsError:
        pass
    finally:
        draft.unlink()
    return _read(path)


def _read(path: Path) -> bytes:
    return bytes.fromhex(path.read_text().strip())
