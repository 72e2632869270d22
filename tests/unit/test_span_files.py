"""The files of spans: what is written is read, a kill harms one line, and they do not grow for ever."""

from __future__ import annotations

from pathlib import Path

import pytest

from weaver_rl.span_files import SpanFiles, find_span_files, slug
from weaver_rl.spans import Span, Spans

pytestmark = pytest.mark.unit

EPOCH = 1_767_225_600.0


def drained(*numbers: int, dropped: int = 0) -> Spans:
    return Spans(
        spans=tuple(
            Span(
                name="sampler/generate",
                begin_s=EPOCH + number,
                end_s=EPOCH + number + 0.5,
                track="engine",
                span_id=number,
                parent_id=None if number == 0 else 0,
                attributes={"parts": number},
            )
            for number in numbers
        ),
        pid=4711,
        anchor_s=0.0,
        begun_s=EPOCH,
        drained_at_s=EPOCH + 100,
        num_dropped=dropped,
    )


def ids(directory: Path) -> list[int]:
    (actor,) = find_span_files(directory)
    return [recorded.span.span_id for recorded in actor.read()]


def test_what_is_written_is_read(tmp_path: Path):
    files = SpanFiles(tmp_path / "spans")
    files.append("sampler 0", "sampler", drained(0, 1))
    files.append("sampler 0", "sampler", drained(2, dropped=3))
    files.append("learner rank 0", "learner", drained())
    (actor,) = find_span_files(tmp_path / "spans")
    assert (actor.actor, actor.role, actor.paths) == ("sampler 0", "sampler", (tmp_path / "spans" / "sampler-0.jsonl",))
    recorded = list(actor.read())
    assert [it.span for it in recorded] == [*drained(0, 1, 2).spans]
    assert {it.pid for it in recorded} == {4711}
    assert '{"dropped": 3, "pid": 4711' in actor.paths[0].read_text()


def test_a_line_cut_short_by_a_kill_costs_nothing_else(tmp_path: Path):
    SpanFiles(tmp_path).append("sampler 0", "sampler", drained(0, 1))
    path = tmp_path / "sampler-0.jsonl"
    path.write_text(path.read_text()[:-20])
    SpanFiles(tmp_path).append("sampler 0", "sampler", drained(2, 3))
    assert ids(tmp_path) == [0, 2, 3]


def test_the_newest_stay_and_the_files_are_bounded(tmp_path: Path):
    files = SpanFiles(tmp_path, max_bytes=20_000)
    for number in range(1000):
        files.append("sampler 0", "sampler", drained(number))
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 20_500
    kept = ids(tmp_path)
    assert kept == list(range(kept[0], 1000))
    assert len(kept) > 50


def test_spans_are_found_between_a_rotation_and_what_comes_next(tmp_path: Path):
    files = SpanFiles(tmp_path, max_bytes=200)
    files.append("sampler 0", "sampler", drained(0, 1))
    (tmp_path / "sampler-0.jsonl").rename(tmp_path / "sampler-0.older.jsonl")  # then a kill, or a full disk
    assert ids(tmp_path) == [0, 1]
    (tmp_path / "sampler-0.jsonl").touch()
    assert ids(tmp_path) == [0, 1]
    SpanFiles(tmp_path).append("sampler 0", "sampler", drained(2))
    assert ids(tmp_path) == [0, 1, 2]


def test_names_of_files():
    assert slug("sampler 12") == "sampler-12"
    assert slug("a/../b") == "a-..-b"
