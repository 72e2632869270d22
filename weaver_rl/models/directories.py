"""Directories that appear whole or not at all, made once when several processes ask. It knows nothing of models."""

from __future__ import annotations

import fcntl
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MARKER = "weaver_rl_source.json"
"""Written into the directory: what it was made from. Another source means making it again."""


def make_once(directory: Path, source: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
    """`directory`, made by `make` unless it is there already and was made from the same `source`."""
    if read_marker(directory) == source:
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with locked(directory.with_name(f".{directory.name}.lock")):
        # Another process may have made it while this one waited for the lock.
        if read_marker(directory) == source:
            return directory
        aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
        try:
            make(aside)
            aside.chmod(0o755)
            for file in aside.rglob("*"):
                file.chmod(0o755 if file.is_dir() else 0o644)
            (aside / MARKER).write_text(json.dumps(source, indent=2, sort_keys=True) + "\n")
            if directory.exists():
                shutil.rmtree(directory)
            aside.rename(directory)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return directory


def read_marker(directory: Path) -> Any:
    try:
        return json.loads((directory / MARKER).read_text())
    except (OSError, ValueError):
        return None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an advisory lock, which the system releases when the process dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
