"""The lines of a file that is being appended to, or was cut short by a kill. It does not know what they mean."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def whole_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Every line that has its end, with its number from 1 on; nothing when there is no file.

    Bytes that are no text become �: who knows what lines mean can say which is damaged.
    """
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                return
            yield number, line
