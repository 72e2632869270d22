"""The log of a job over connections that break: every line once, whatever breaks where."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weaver_rl.job_log import JobLog

pytestmark = pytest.mark.unit


@given(
    text=st.text(alphabet="ab\n", max_size=40),
    connections=st.lists(st.lists(st.integers(0, 40), max_size=6), max_size=6),
)
def test_every_line_comes_once_in_order_however_connections_break(text: str, connections: list[list[int]]):
    log, lines = JobLog(), []
    for cuts in [*connections, [40]]:
        log.connect()
        at = 0
        for cut in sorted(cuts):
            lines += log.tell(text[at:cut])
            at = max(at, min(cut, len(text)))
    lines += log.end()
    assert lines == (text[:-1] if text.endswith("\n") else text).split("\n") or (text == "" and lines == [])


def test_the_whole_log_may_be_asked_for_while_a_connection_tells_it_again():
    log = JobLog()
    log.connect()
    assert log.tell("one\ntwo\nth") == ["one", "two"]
    log.connect()
    assert log.tell("one\n") == []
    assert log.tell_whole("one\ntwo\nth") == []
    assert log.tell("two\nth") == []
    assert log.tell_whole("one\ntwo\nthree\nfour\n") == ["three", "four"]
    assert log.tell("ree\nfour\nfive\n") == ["five"]


def test_a_line_is_told_only_when_it_is_whole():
    log = JobLog()
    log.connect()
    assert log.tell("one\ntw") == ["one"]
    log.connect()
    assert log.tell("one\ntwo\nth") == ["two"]
    assert log.num_told == 10
    assert log.end() == ["th"]
    assert log.end() == []
