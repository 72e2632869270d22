"""Who calls: API keys and the names behind them. It knows no routes; a key is never logged, shown or compared early."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from weaver_rl.errors import ConfigError
from weaver_rl.service.config import AuthConfig, is_loopback

KEY_HEADER = "X-WEAVER-API-KEY"
KEYS_VARIABLE = "WEAVER_RL_API_KEYS"
LOCAL_OWNER = "local"
"""Who everybody is on a server without keys."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KEY = re.compile(r"[!-~]{1,256}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKeys:
    """The keys of a server, as digests."""

    digest_by_owner: Mapping[str, bytes]
    """SHA-256 of the key of each name."""

    @classmethod
    def load(cls, config: AuthConfig, environ: Mapping[str, str] = os.environ) -> ApiKeys:
        """From the file (lines of `name: key`, `#` begins a comment line) and WEAVER_RL_API_KEYS ("name:key,name:key").

        Raises:
            ConfigError: names the place of what cannot be read; keys themselves are never part of the message.
        """
        entries: list[tuple[str, str]] = []
        if config.keys_file is not None:
            entries += _of_file(config.keys_file)
        words = environ.get(KEYS_VARIABLE, "").split(",")
        entries += [
            (f"{KEYS_VARIABLE}, entry {number}", word) for number, word in enumerate(words, start=1) if word.strip()
        ]
        return cls.of(dict(_pairs(entries)))

    @classmethod
    def of(cls, key_by_owner: Mapping[str, str]) -> ApiKeys:
        """Keys given by hand."""
        return cls(digest_by_owner={owner: _digest(key) for owner, key in key_by_owner.items()})

    def __bool__(self) -> bool:
        return bool(self.digest_by_owner)

    def owner_of(self, key: str | None) -> str | None:
        """The name behind a key; None for no or an unknown key. Without keys everybody is `local`.

        Takes the same time whichever key it is: every digest is compared, and none of them ends early.
        """
        if not self.digest_by_owner:
            return LOCAL_OWNER
        presented = _digest(key or "")
        found = None
        for owner, digest in self.digest_by_owner.items():
            if hmac.compare_digest(presented, digest):
                found = owner
        return found

    def check_host(self, host: str) -> None:
        """Raises ConfigError where everybody in the network could use a server without keys."""
        if not self.digest_by_owner and not is_loopback(host):
            raise ConfigError(
                f"http.host is {host!r} and no API key is configured: without keys only this machine may call. "
                f"Set auth.keys_file or {KEYS_VARIABLE}, or let http.host be 127.0.0.1"
            )


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _of_file(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"auth.keys_file: {path} cannot be read: {error}") from error
    return [
        (f"{path}, line {number}", line)
        for number, line in enumerate(lines, start=1)
        if line.strip() and not line.lstrip().startswith("#")
    ]


def _pairs(entries: Iterable[tuple[str, str]]) -> Iterable[tuple[str, str]]:
    seen: dict[str, str] = {}
    for place, text in entries:
        name, colon, key = (part.strip() for part in text.partition(":"))
        if not colon or not _NAME.fullmatch(name) or not _KEY.fullmatch(key):
            raise ConfigError(
                f"{place}: must be `name: key`, the name of letters, digits and . _ -, the key of printable ASCII "
                "without spaces"
            )
        if name in seen:
            raise ConfigError(f"{place}: {name} has a key already")
        if key in seen.values():
            raise ConfigError(f"{place}: {name} has the same key as another name")
        seen[name] = key
        yield name, key
