"""The files of `RUN/spans`: what each actor of a run did. They know neither Ray nor the ledger.

`<actor>.jsonl` begins with `{"actor": "sampler 0", "role": "sampler"}`; then comes one object for each span, in the
order of their ends:

    {"name": "sampler/load_weights", "begin_s": 1767225600.0, "end_s": 1767225600.5, "track": "engine", "pid": 4711,
     "id": 12, "parent": 11, "attributes": {"version": 3}}

Times are seconds since the epoch by the driver's clock. `id` is unique for one `pid`; `parent` and `attributes` are
left out where there are none. On one `track` of one `pid` spans nest or are disjoint. `{"dropped": 3, "pid": 4711,
"before_s": …}` says that spans were lost. A file that has grown to half of what an actor may have becomes
`<actor>.older.jsonl`, in place of the one before: the newest stay.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weaver_rl.run_folder import append_whole
from weaver_rl.spans import Span, Spans

MAX_BYTES = 64 << 20
"""What one actor may have."""
OLDER = ".older.jsonl"


class SpanFiles:
    """Writes them. What is there already, of a run that is resumed, is continued."""

    def __init__(self, directory: Path, max_bytes: int = MAX_BYTES) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._whole: set[Path] = set()

    def append(self, actor: str, role: str, drained: Spans) -> None:
        """Adds what an actor told of itself."""
        lines = [_to_json(span, drained.pid) for span in drained.spans]
        if drained.num_dropped:
            note = {"dropped": drained.num_dropped, "pid": drained.pid, "before_s": drained.drained_at_s}
            lines.insert(0, json.dumps(note))
        if not lines:
            return
        self._directory.mkdir(exist_ok=True)
        path = self._directory / f"{slug(actor)}.jsonl"
        if path.exists() and path.stat().st_size >= self._max_bytes // 2:
            path.replace(path.with_name(f"{slug(actor)}{OLDER}"))
        content = "".join(f"{line}\n" for line in lines)
        if not path.exists() or path.stat().st_size == 0:
            content = json.dumps({"actor": actor, "role": role}) + "\n" + content
        elif path not in self._whole and not _ends_whole(path):
            content = "\n" + content
        append_whole(path, content)
        self._whole.add(path)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedSpan:
    """A span and the process that it was in.

    Example:
        RecordedSpan(span=span, pid=4711)
    """

    span: Span
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorSpans:
    """The files of one actor.

    Example:
        ActorSpans(actor="sampler 0", role="sampler", paths=(Path("runs/a/spans/sampler-0.jsonl"),))
    """

    actor: str
    role: str
    paths: tuple[Path, ...]
    """Older ones first."""

    def read(self) -> Iterator[RecordedSpan]:
        """Every span, in the order of their ends; a line that a kill cut short is left out."""
        for path in self.paths:
            with path.open(encoding="utf-8", errors="replace") as file:
                for line in file:
                    raw = _parsed(line)
                    if "begin_s" in raw:
                        yield _recorded(raw)


def find_span_files(directory: Path) -> list[ActorSpans]:
    """The files of every actor, by name."""
    found = []
    slugs = {path.name.removesuffix(OLDER).removesuffix(".jsonl") for path in directory.glob("*.jsonl")}
    for name in sorted(slugs):
        # A kill or a full disk between the two leaves the older one without a newer, or with one that has no head.
        paths = tuple(path for path in (directory / f"{name}{OLDER}", directory / f"{name}.jsonl") if path.exists())
        head = next((head for head in map(_head, paths) if "actor" in head), None)
        if head is not None:
            found.append(ActorSpans(actor=head["actor"], role=head["role"], paths=paths))
    return found


def _head(path: Path) -> dict[str, Any]:
    with path.open(encoding="utf-8", errors="replace") as file:
        return _parsed(file.readline())


def _ends_whole(path: Path) -> bool:
    """Else a line that a kill cut short would swallow the next."""
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def slug(actor: str) -> str:
    """An actor's name as that of a file."""
    return re.sub(r"[^\w.-]+", "-", actor)


def _to_json(span: Span, pid: int) -> str:
    raw: dict[str, Any] = {
        "name": span.name,
        "begin_s": round(span.begin_s, 6),
        "end_s": round(span.end_s, 6),
        "track": span.track,
        "pid": pid,
        "id": span.span_id,
    }
    if span.parent_id is not None:
        raw["parent"] = span.parent_id
    if span.attributes:
        raw["attributes"] = dict(span.attributes)
    return json.dumps(raw)


def _recorded(raw: dict[str, Any]) -> RecordedSpan:
    span = Span(
        name=raw["name"],
        begin_s=raw["begin_s"],
        end_s=raw["end_s"],
        track=raw["track"],
        span_id=raw["id"],
        parent_id=raw.get("parent"),
        attributes=raw.get("attributes", {}),
    )
    return RecordedSpan(span=span, pid=raw["pid"])


def _parsed(line: str) -> dict[str, Any]:
    try:
        raw = json.loads(line)
    except ValueError:
        return {}
    return raw if isinstance(raw, dict) else {}
