"""Checks one after the other: none stops the next, each ends in time, and what they found is printed."""

from __future__ import annotations

import io
import json
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from weaver_rl.check.checklist import Check, go_through, run_check
from weaver_rl.check.finding import Finding, MemoryPart, RoleMemory, failed, passed, warned
from weaver_rl.check.given import Given, NotCheckedError
from weaver_rl.check.printout import as_json, has_failed, print_group, summary
from weaver_rl.errors import ConfigError

pytestmark = pytest.mark.unit


def check(run, title: str = "a", timeout_s: float = 5) -> Check:
    return Check(title=title, run=run, timeout_s=timeout_s)


def test_one_that_crashes_is_a_line_and_the_next_goes_on():
    def crash():
        yield passed("before", "was there")
        raise ZeroDivisionError("by nothing")

    (_, first), (_, second) = go_through((check(crash), check(lambda: (passed("b", "good"),), "b")))
    assert first[0].subject == "before"
    assert first[1].level == "fail"
    assert "the check itself failed: ZeroDivisionError: by nothing" in first[1].seen
    assert second == (passed("b", "good"),)


def test_an_error_of_the_users_is_its_own_words():
    def refuse():
        raise ConfigError("num_steps: seen -1")

    (line,) = run_check(check(refuse))
    assert (line.level, line.seen) == ("fail", "num_steps: seen -1")


def test_one_that_hangs_is_left_after_its_time_with_what_it_found():
    release = threading.Event()

    def hang():
        yield passed("before", "was there")
        release.wait()

    found = run_check(check(hang, timeout_s=0.2))
    release.set()
    assert [line.subject for line in found] == ["before", "a"]
    assert found[1].level == "fail"
    assert "not done after 0.2 s" in found[1].seen


def test_a_thing_that_cannot_be_made_fails_once_and_is_named_to_the_others():
    made = []

    def make():
        made.append(1)
        raise ConfigError("no such model")

    thing = Given("the model", make)
    (owner,), (other,) = run_check(check(lambda: (thing.get(),))), run_check(check(lambda: (thing.needed(),)))
    assert (owner.level, owner.seen) == ("fail", "no such model")
    assert (other.level, other.seen) == ("warn", "not checked: the model could not be had, see above")
    assert len(made) == 1


def test_a_thing_that_hangs_holds_up_nobody_else():
    release = threading.Event()
    thing = Given("the model", lambda: release.wait(30))
    assert run_check(check(lambda: (thing.get(),), timeout_s=0.2))[0].level == "fail"
    started = time.monotonic()
    with pytest.raises(NotCheckedError, match="the model is still not there"):
        thing.needed()
    assert time.monotonic() - started < 1
    release.set()


findings = st.builds(
    Finding, level=st.sampled_from(["pass", "warn", "fail"]), subject=st.text(), seen=st.text(), advice=st.text()
)


@settings(deadline=None)
@given(st.lists(st.lists(findings, max_size=4).map(tuple), max_size=5))
def test_the_summary_counts_and_json_holds_every_line(groups: list[tuple[Finding, ...]]):
    checked = [(check(tuple, f"check {index}"), found) for index, found in enumerate(groups)]
    levels = [finding.level for found in groups for finding in found]
    assert has_failed(checked) == ("fail" in levels)
    content = json.loads(as_json(checked))
    assert [line["level"] for line in content["findings"]] == levels
    console = Console(width=60, file=io.StringIO())
    for one in checked:
        print_group(console, *one)  # never raises, whatever the text
    if {"fail", "warn"} & set(levels):
        fails, warns = levels.count("fail"), levels.count("warn")
        assert summary(checked).startswith(
            f"{fails} failure{'s' * (fails != 1)}, {warns} warning{'s' * (warns != 1)}: check"
        )
    else:
        assert summary(checked) == f"all {len(levels)} lines pass"


def test_failures_come_first_in_the_summary():
    found = (warned("w", "seen", "do"), failed("f", "seen", "do"))
    assert summary([(check(tuple, "files"), found)]) == "1 failure, 1 warning: files: f; files: w"


def test_markup_in_what_was_seen_is_printed_as_it_is_and_advice_stands_below():
    console = Console(width=100, record=True)
    role = RoleMemory(
        role="sampler",
        count=2,
        where="GPU",
        parts=(MemoryPart(name="kv cache", num_bytes=3 << 30),),
        capacity_bytes=None,
    )
    print_group(console, check(tuple, "memory"), (role, failed("[red]x", "[bold]y", "do [this]")))
    printed = console.export_text()
    assert "fail  [red]x" in printed
    assert "[bold]y" in printed
    assert "→ do [this]" in printed
    assert "2 × sampler" in printed
    assert "3,072" in printed
    assert "unknown" in printed
