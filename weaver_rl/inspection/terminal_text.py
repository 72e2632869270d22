"""Texts of policies and users as a terminal may show them: control characters visible, never obeyed."""

from __future__ import annotations

import unicodedata


def plain(text: str, *, one_line: bool = False) -> str:
    """The text with control characters and lone surrogates written out; a rollout can hold any escape sequence."""
    keep = "" if one_line else "\n\t"
    return "".join(_written(c) if c not in keep and unicodedata.category(c) in ("Cc", "Cs", "Cf") else c for c in text)


def clipped(text: str, limit: int) -> str:
    """One line of at most `limit` characters."""
    flat = plain(" ".join(text.split()), one_line=True)
    return flat if len(flat) <= limit else f"{flat[: limit - 1]}…"


def _written(character: str) -> str:
    code = ord(character)
    return {10: "\\n", 9: "\\t", 13: "\\r"}.get(code, f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")
