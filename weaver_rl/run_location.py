"""Where a run's folder is: a directory, or the URL of a store that a directory of this machine is mirrored to.

It opens neither.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import PlainValidator

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::|://)")
_PASSWORD = re.compile(r"://[^@/\s]*:(?!\d+(/|$))[^@\s]*@")
"""A number up to a slash is a port; what follows may have an `@` of its own."""


def is_url(text: str) -> bool:
    """Whether it names a place by a scheme: `s3://bucket/runs/x`, `file:///data/x`; a path does not."""
    return _URL.match(text) is not None


def has_password(url: str) -> bool:
    """Whether there is one in it, which every log and the run folder itself would show."""
    return _PASSWORD.search(url) is not None


def address_has_password(address: str) -> bool:
    """The same for `http://HOST:PORT` and for `HOST:PORT`."""
    return has_password(address if "://" in address else f"ray://{address}")


PASSWORD_REFUSED = (
    "the URL has a password in it, which logs and config.json would show; leave it out and set the environment "
    "variable FSSPEC_SCHEME_PASSWORD, with the scheme in place of SCHEME"
)
ADDRESS_PASSWORD_REFUSED = (
    "the address has a password in it, which logs would show; leave it out and set RAY_AUTH_TOKEN, or for a proxy "
    """RAY_JOB_HEADERS='{"Authorization": "…"}'"""
)


def staging_folder(url: str) -> Path:
    """The directory of this machine in which a run works whose folder is at the URL."""
    cache = os.environ.get("XDG_CACHE_HOME")
    runs = (Path(cache) if cache else Path.home() / ".cache") / "weaver-rl" / "runs"
    name = re.sub(r"[^A-Za-z0-9._-]", "_", url.rstrip("/").rpartition("/")[2])
    return runs / f"{name}-{hashlib.sha256(url.rstrip('/').encode()).hexdigest()[:12]}"


def _path_or_url(value: Any) -> Any:
    if isinstance(value, str):
        if has_password(value):
            raise ValueError(PASSWORD_REFUSED)
        return value.rstrip("/") if is_url(value) else Path(value)
    if value is None or isinstance(value, Path):
        return value
    raise ValueError(f"seen {value!r}; a path is needed, or a URL such as s3://bucket/runs/name")


RunDir = Annotated[Path | str | None, PlainValidator(_path_or_url)]
"""A path, or the URL of any file system that fsspec knows; None: not given."""
