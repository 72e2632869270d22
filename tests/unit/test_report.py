"""The report: written from any run, asking nobody for anything, taking none of a user's text for markup."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import time
import tracemalloc
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_runs import (
    EVIL,
    damaged_config,
    full_run,
    make_run,
    rollout,
    run_config,
    write_ledger,
)

from weaver_rl.errors import ConfigError, UserError
from weaver_rl.ledger import read_ledger
from weaver_rl.metrics import MetricsLine, MetricsWriter
from weaver_rl.report import charts, write_curve_svg, write_page, write_report
from weaver_rl.report.curves import bucketed
from weaver_rl.report.idle_ledger import ledger_data
from weaver_rl.report.rollout_data import rollout_data
from weaver_rl.report.run_data import read_run
from weaver_rl.report.selection import evenly, select
from weaver_rl.rollout_files import rollouts_file, write_rollouts
from weaver_rl.run_folder import RunFolder
from weaver_rl.step_range import StepRange

pytestmark = pytest.mark.unit


class Page(HTMLParser):
    """What a browser would make of the page: its elements, its text and its data."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.blocks: dict[str, dict] = {}
        self.source = path.read_text()
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open.append(f"json {dict(attrs)['id']}" if ("type", "application/json") in attrs else tag)

    def handle_endtag(self, tag):
        while self.open and not self.open.pop().startswith((tag, "json")):
            pass

    def handle_data(self, data):
        where = self.open[-1] if self.open else ""
        if where.startswith("json "):
            self.blocks[where[5:]] = json.loads(data)
        elif where not in ("script", "style"):
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())

    @property
    def data(self) -> dict:
        return self.blocks["data"]

    def details(self) -> list[dict]:
        return [one for name, chunk in self.blocks.items() if name.startswith("chunk-") for one in chunk]

    def figure(self, title: str, phase: int = 0) -> dict | None:
        return next((f for f in self.data["phases"][phase]["figures"] if f["title"] == title), None)


def test_a_whole_run(tmp_path):
    folder = full_run(tmp_path, steps=4)
    path = write_report(tmp_path)
    assert path == folder.report
    page = Page(path)
    for words in (
        "quickstart finished model scratch",
        "0.930 accuracy at the end",
        "0.410 accuracy after warm start",
        "4 training steps + 2 of warm start",
        "Resolved configuration of quickstart",
        "run folder",
        "transformers",
    ):
        assert words in page.words, page.words
    curves = page.data["phases"][0]["curves"][0]
    assert curves["step"] == [2, 3, 4, 5, 6]
    assert curves["series"]["eval/accuracy"]["y"] == [0.41, None, None, None, 0.93]
    assert curves["series"]["reward/mean"]["y"] == [None, 0.3, 0.4, 0.5, 0.6]
    assert curves["tokens"] == [0, 100, 200, 300, 400]
    labels = [line["label"] for line in page.figure("Reward")["lines"]]
    assert labels == ["reward", EVIL, "task"]
    assert page.figure("Lag") is None
    assert page.data["phases"][1]["curves"][0]["step"] == [1, 2]
    assert len(page.data["rollouts"]["id"]) == len(page.details()) == 32


def test_the_report_at_the_end_of_a_run_is_quick(tmp_path):
    full_run(tmp_path)
    begun = time.perf_counter()
    write_report(tmp_path)
    assert time.perf_counter() - begun < 3


@pytest.mark.parametrize(
    ("warm_steps", "steps", "evaluate", "words"),
    [
        (0, 0, False, "No step was finished"),
        (0, 1, True, "0.930 accuracy at the end"),
        (0, 1, False, "1 training steps"),
        (2, 0, True, "0.410 accuracy after warm start"),
        (1, 0, False, "0 training steps + 1 of warm start"),
        (0, 1000, True, "1,000 training steps"),
    ],
)
def test_runs_of_any_length(tmp_path, warm_steps, steps, evaluate, words):
    make_run(tmp_path, warm_steps, steps, evaluate=evaluate)
    page = Page(write_report(tmp_path))
    assert words in page.words
    assert "No rollouts were recorded." in page.words
    assert "This run kept no idle ledger" in page.words
    assert not re.search(r"\b(nan|inf|NaN|Infinity)\b", json.dumps(page.data))
    write_curve_svg(tmp_path, tmp_path / "curve.svg")
    ET.parse(tmp_path / "curve.svg")


def test_a_run_without_a_warm_start_shows_where_it_began(tmp_path):
    with MetricsWriter(RunFolder(tmp_path)) as writer:
        writer.write(0, "train", {"eval/accuracy": 0.25})
        writer.write(1, "train", {"loss": 1.0, "reward/mean": 0.5, "sampler/num_tokens": 10, "eval/accuracy": 0.75})
    page = Page(write_report(tmp_path))
    for words in ("0.750 last accuracy", "0.250 accuracy before training", "1 training steps"):
        assert words in page.words
    curves = page.data["phases"][0]["curves"][0]
    assert (curves["step"], curves["tokens"]) == ([0, 1], [0, 10])
    assert curves["series"]["eval/accuracy"]["y"] == [0.25, 0.75]
    both = Page(write_page([tmp_path, tmp_path], tmp_path / "both.html"))
    assert "training steps 1 1" in both.words
    write_curve_svg(tmp_path, tmp_path / "curve.svg")


def test_a_run_of_which_only_the_status_is_there(tmp_path):
    folder = make_run(tmp_path)
    folder.config_json.unlink()
    folder.metrics_file.unlink()
    words = Page(write_report(tmp_path)).words
    assert "No step was finished" in words
    assert "no configuration is in the run folder" in words


@pytest.mark.parametrize("state", ["failed", "interrupted"])
def test_the_reason_of_an_early_end_is_shown(tmp_path, state):
    make_run(tmp_path, steps=1, ending=(state, f"sampler-0 <disagrees> {EVIL}"))
    page = Page(write_report(tmp_path))
    assert f"quickstart {state}" in page.words
    assert "sampler-0 <disagrees>" in page.words


def test_a_run_that_was_killed_is_said_to_have_stopped(tmp_path):
    folder = make_run(tmp_path, steps=1)
    folder.status_file.write_text(folder.status_file.read_text().replace('"finished"', '"running"'))
    words = Page(write_report(tmp_path)).words
    assert "quickstart stopped" in words
    assert "was killed" in words


def test_the_page_asks_nobody_for_anything_and_runs_nothing_of_the_users(tmp_path):
    folder = full_run(tmp_path)
    damaged_config(folder, EVIL)
    write_rollouts(tmp_path, 9, [rollout(1, 1.0, EVIL, step=9), rollout(2, 0.0, "a\ud800b", step=9)])
    page = Page(write_report(tmp_path))
    scripts = [attrs for tag, attrs in page.tags if tag == "script"]
    assert sum(attrs.get("type") is None for attrs in scripts) == 1
    assert not [tag for tag, _ in page.tags if tag in ("img", "link", "iframe", "object", "base")]
    outside = [attrs for _, attrs in page.tags if {"src", "onerror", "onclick", "style"} & set(attrs)]
    assert not outside
    assert {attrs["href"] for _, attrs in page.tags if "href" in attrs} == {"#main"}
    assert "url(" not in page.source
    assert "innerHTML" not in page.source
    assert page.words.count("alert(1)") >= 3
    assert any(EVIL in "".join(detail["texts"]) for detail in page.details())


def test_the_policy_of_the_page_names_its_script_and_its_style_and_no_other(tmp_path):
    make_run(tmp_path, steps=1)
    source = write_report(tmp_path).read_text()
    policy = re.search(r'Content-Security-Policy"\s+content="([^"]+)"', source)[1]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for kind, text in (
        ("script", re.search(r"<script>(.*?)</script>", source, re.S)[1]),
        ("style", re.search(r"<style>(.*?)</style>", source, re.S)[1]),
    ):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy


# -- curves ------------------------------------------------------------------------------------------------------------


def lines(values: list[dict], first: int = 1) -> list[MetricsLine]:
    return [MetricsLine(step=first + i, phase="train", time_s=float(i), values=v) for i, v in enumerate(values)]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=200), st.integers(1, 50))
def test_buckets_keep_the_extremes_and_the_mean(values, limit):
    curves = bucketed(lines([{"loss": value} for value in values]), limit)
    curve = curves.curves["loss"]
    assert len(curves.steps) <= limit or len(values) <= limit
    assert curves.steps[-1] == len(values)
    assert min(curve.low) == min(values)
    assert max(curve.high) == max(values)
    sizes = [end - start for start, end in zip((0, *curves.steps), curves.steps, strict=False)]
    whole = math.fsum(size * part for size, part in zip(sizes, curve.mean, strict=True))
    assert whole == pytest.approx(math.fsum(values), rel=1e-6, abs=1e-3)


def test_a_share_that_a_step_does_not_name_is_0_and_a_measurement_is_absent():
    steps = [
        {"seconds/step": 1.0, "seconds/eval": 0.5, "eval/accuracy": 0.5, "lag/max": 0},
        {"seconds/step": 1.0, "lag/max": 1, "lag/1/fraction": 1.0},
    ]
    curves = bucketed(lines(steps), 1).curves
    assert curves["seconds/eval"].mean == (0.25,)
    assert curves["lag/1/fraction"].mean == (0.5,)
    assert curves["eval/accuracy"].mean == (0.5,)


@pytest.mark.parametrize(("largest", "labels"), [(7, [*"01234567"]), (9, [*"0123456", "7 or more"])])
def test_the_largest_lags_share_the_last_colour(tmp_path, largest, labels):
    shares = [0.0] * (largest - 1) + [0.25, 0.75]
    with MetricsWriter(RunFolder(tmp_path)) as writer:
        values = {f"lag/{lag}/fraction": share for lag, share in enumerate(shares)}
        writer.write(1, "train", {"lag/max": len(shares) - 1} | values)
    lag = Page(write_report(tmp_path)).figure("Lag")
    assert [line["label"] for line in lag["lines"]] == labels
    assert lag["lines"][-1]["names"][-1] == f"lag/{largest}/fraction"


def test_only_the_steps_that_were_asked_for(tmp_path):
    full_run(tmp_path)
    page = Page(write_page([tmp_path], tmp_path / "part.html", steps=StepRange.parse("4:5")))
    assert page.data["phases"][0]["curves"][0]["step"] == [4, 5]
    assert set(page.data["rollouts"]["step"]) == {4, 5}
    assert (page.data["ledgers"][0]["from"][0], page.data["ledgers"][0]["to"][-1]) == (4, 5)


def test_figures_of_some_steps_are_not_called_those_of_the_run(tmp_path):
    clock = iter(range(0, 1000, 10))
    with RunFolder(tmp_path).claim() as claim, MetricsWriter(claim.folder, lambda: float(next(clock))) as writer:
        for step in range(1, 11):
            writer.write(step, "train", {"reward/mean": step / 10, "eval/accuracy": step / 20})
        claim.end("finished", None)
    part = Page(write_page([tmp_path], tmp_path / "part.html", steps=StepRange.parse("4:6"))).words
    for words in (
        "steps 4 to 6 only",
        "0.300 accuracy at step 6",
        "0.200 accuracy at step 4",
        "0.600 mean reward, step 6 from 0.400",
        "0 m 30 s wall time of these steps",
        "3 training steps shown",
    ):
        assert words in part, part
    assert "at the end" not in part
    both = Page(write_page([tmp_path] * 2, tmp_path / "both.html", steps=StepRange.parse("4:6"))).words
    assert "2 runs steps 4 to 6 only" in both
    assert "Figures of steps 4 to 6" in both
    assert "wall time 0 m 30 s 0 m 30 s" in both
    whole = Page(write_page([tmp_path], tmp_path / "whole.html", steps=StepRange.parse("1:10"))).words
    assert "accuracy at the end" in whole
    assert "only" not in whole
    assert "Final figures" in Page(write_page([tmp_path] * 2, tmp_path / "both.html")).words


@pytest.mark.parametrize(
    ("text", "words"),
    [("4:6", "steps 4 to 6"), (":3", "steps up to 3"), ("9:", "steps from 9 on"), ("5", "step 5"), (":", "all steps")],
)
def test_ranges_in_words(text, words):
    assert StepRange.parse(text).in_words() == words


@pytest.mark.parametrize(
    ("text", "inside", "outside"), [("4:6", [4, 6], [3, 7]), (":3", [0, 3], [4]), ("9:", [9], [8]), ("5", [5], [4, 6])]
)
def test_ranges_of_steps(text, inside, outside):
    steps = StepRange.parse(text)
    assert all(step in steps for step in inside)
    assert not any(step in steps for step in outside)


@pytest.mark.parametrize("text", ["a:b", "7:3", "1:2:3"])
def test_a_range_that_is_none_is_refused(text):
    with pytest.raises(UserError, match="write A:B"):
        StepRange.parse(text)


# -- rollouts ----------------------------------------------------------------------------------------------------------


def test_the_texts_of_the_tokens_are_the_completion(tmp_path):
    full_run(tmp_path)
    data = rollout_data([read_run(tmp_path)], 400)
    details = [detail for chunk in data.chunks for detail in json.loads(chunk)]
    assert len(details) == data.count == 48
    assert not any("text" in detail for detail in details)
    party = next(detail for detail in details if "🎉" in detail["texts"])
    assert "".join(party["texts"]) == "12 é🎉 ok"
    at = party["texts"].index("🎉")
    assert [party["labels"][str(at - back)] for back in (3, 2, 1)] == ["F0", "9F", "8E"]
    assert party["labels"][str(len(party["texts"]) - 1)] == "<eos>"


def test_without_a_tokenizer_tokens_are_ids_and_the_page_says_so(tmp_path):
    full_run(tmp_path)
    (tmp_path / "policy" / "tokenizer.json").write_text("{damaged")
    page = Page(write_report(tmp_path))
    assert "tokens are shown as ids" in page.words
    detail = next(detail for detail in page.details() if detail.get("text") == "7")
    assert set(detail["texts"]) == {""}
    assert detail["labels"]["0"] == f"#{detail['ids'][0]}"


def test_gaps_survive_rounding(tmp_path):
    make_run(tmp_path, steps=5)
    sampler = rollout(1, 1.0).scored.rollout.completion.logprobs_L
    learner = (sampler - np.float32(3e-7)).astype(np.float32)
    weights = np.full(2, 0.5, np.float32)
    write_rollouts(
        tmp_path, 5, [rollout(1, 1.0, learner_logprobs_L=learner, importance_weights_L=weights, group_id="g")]
    )
    (detail,) = Page(write_report(tmp_path)).details()
    assert detail["gaps"] == pytest.approx([-3e-7] * 2, rel=1e-3)
    assert detail["weights"] == 0.5


def test_what_goes_in_is_bounded_spread_and_has_the_extremes(tmp_path):
    make_run(tmp_path, steps=5)
    for step in range(1, 41):
        groups = [rollout(step * 1000 + n, n / 96, step=step, group_id=f"{step}-{n // 8}") for n in range(96)]
        groups[50] = rollout(step * 1000 + 50, None, step=step, group_id=f"{step}-6")
        write_rollouts(tmp_path, step, groups)
    selection = select(tmp_path, 300)
    assert 250 <= selection.num_chosen <= 300
    assert len(selection.choices) == 12
    assert [selection.choices[0].step, selection.choices[-1].step] == [1, 40]
    assert (selection.num_steps, selection.num_left_out) == (40, 12 * 96 - selection.num_chosen)
    last = selection.choices[-1].rollout_ids
    assert {f"{40_000 + n}" for n in (*range(8), *range(88, 96), 50)} <= last
    page = Page(write_page([tmp_path], tmp_path / "p.html", max_rollouts=300))
    assert f"{selection.num_chosen} rollouts of 12 of 40 steps are in this page" in page.words
    assert "--max-rollouts 1000" in page.words
    small = select(tmp_path, 5)
    assert 1 <= small.num_chosen <= 5
    assert small.choices[-1].step == 40
    everything = select(tmp_path, 10**6)
    assert everything.num_left_out == 0


@given(st.integers(0, 60), st.integers(1, 20))
def test_steps_are_spread_evenly(count, limit):
    values = list(range(count))
    some = evenly(values, limit)
    assert len(some) == min(count, limit) == len(set(some))
    assert some == sorted(some)
    if count:
        assert some[-1] == count - 1
        assert limit == 1 or some[0] == 0


def test_a_completion_that_is_too_long_is_cut_and_the_page_stays_small(tmp_path):
    make_run(tmp_path, steps=5)
    rows = []
    for number in range(40):
        long = rollout(number, float(number), text="x" * 50_000)
        tokens = 50_000 if number == 3 else 9000
        completion = type(long.scored.rollout.completion)(
            token_ids_L=np.ones(tokens, np.int32),
            logprobs_L=np.full(tokens, -0.12345678, np.float32),
            versions_L=np.zeros(tokens, np.int32),
            stop_reason="length",
        )
        object.__setattr__(long.scored.rollout, "completion", completion)
        rows.append(long)
    write_rollouts(tmp_path, 5, rows)
    path = write_page([tmp_path], tmp_path / "p.html", max_rollouts=20)
    page = Page(path)
    assert path.stat().st_size < 2_000_000
    assert all(len(detail["ids"]) <= 4096 and detail["cut"] > 4000 for detail in page.details())
    assert "would have made the page too large" in page.words


def test_damaged_rollouts_do_not_cost_the_report(tmp_path):
    full_run(tmp_path)
    rollouts_file(tmp_path, 5).write_bytes(b"damaged")
    page = Page(write_report(tmp_path))
    assert "step_000005.parquet is no file of rollouts" in page.words
    assert 5 not in page.data["rollouts"]["step"]
    assert 6 in page.data["rollouts"]["step"]


# -- the ledger --------------------------------------------------------------------------------------------------------


def test_the_ledger_adds_up_to_the_time_of_every_actor(tmp_path):
    folder = make_run(tmp_path, steps=450)
    write_ledger(folder, range(1, 451), warm_steps=7)
    ledger = ledger_data(read_run(tmp_path))
    assert [actor["name"] for actor in ledger["actors"]] == ["sampler 0", "sampler 1", "learner 0"]
    assert [state["name"] for state in ledger["states"]] == [
        "generate",
        "learn",
        "sync",
        "wait for learner",
        "wait for samplers",
    ]
    assert [state["busy"] for state in ledger["states"]] == [True, True, True, False, False]
    assert len(ledger["from"]) <= 201
    assert ledger["training"] == 8
    assert 8 in ledger["from"]
    assert (ledger["from"][0], ledger["to"][-1]) == (1, 450)
    for per_state in ledger["seconds"]:
        assert sum(map(sum, per_state)) == pytest.approx(450)
    assert sum(ledger["seconds"][0][0]) == pytest.approx(225)


def test_a_long_ledger_does_not_fill_the_memory(tmp_path):
    folder = make_run(tmp_path, steps=5000)
    write_ledger(folder, range(1, 5001))
    run = read_run(tmp_path)
    tracemalloc.start()
    try:
        ledger_data(run)
        peak_B = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_B < folder.ledger_file.stat().st_size


def test_a_ledger_that_grows_while_it_is_read(tmp_path, monkeypatch):
    folder = make_run(tmp_path, steps=3)
    write_ledger(folder, range(1, 3))

    def read_and_grow(path):
        yield from read_ledger(path)
        write_ledger(folder, range(1, 4))

    monkeypatch.setattr("weaver_rl.report.idle_ledger.read_ledger", read_and_grow)
    ledger = ledger_data(read_run(tmp_path))
    assert ledger["to"][-1] == 2
    assert sum(map(sum, ledger["seconds"][0])) == pytest.approx(2)


def test_a_damaged_ledger_does_not_cost_the_report(tmp_path):
    folder = full_run(tmp_path)
    folder.ledger_file.write_text("{not json}\n")
    page = Page(write_report(tmp_path))
    assert "is no row of a ledger" in page.words
    assert page.data["ledgers"] == [None]


# -- several runs ------------------------------------------------------------------------------------------------------


def test_several_runs_side_by_side(tmp_path):
    full_run(tmp_path / "a")
    full_run(tmp_path / "b", config=run_config(name="other", seed=7, correction={"name": "tis"}), ledger=False)
    make_run(tmp_path / "c", config=run_config(name="empty"))
    out = write_page([tmp_path / name for name in "abc"], tmp_path / "deep" / "page.html")
    page = Page(out)
    assert [run["name"] for run in page.data["runs"]] == ["quickstart", "other", "empty"]
    assert "seed 0 7 0" in page.words
    assert 'correction.name "none" "tis" "none"' in page.words
    assert "accuracy, last 0.930 0.930" in page.words
    assert "other, empty kept no idle ledger" in page.words
    assert set(page.data["rollouts"]["run"]) == {0, 1}
    assert len(page.data["phases"][0]["curves"]) == 3
    assert page.data["phases"][0]["curves"][2]["step"] == []


def test_first_last_and_best_accuracy_are_of_the_same_evaluations(tmp_path):
    with MetricsWriter(RunFolder(tmp_path)) as writer:
        writer.write(1, "warm_start", {"eval/accuracy": 0.9})
        writer.write(2, "train", {"eval/accuracy": 0.7})
    words = Page(write_page([tmp_path] * 2, tmp_path / "p")).words
    assert "first measured 0.900 0.900 accuracy, last 0.700 0.700 accuracy, best 0.900 0.900" in words


def test_runs_that_differ_in_nothing(tmp_path):
    for name in "ab":
        make_run(tmp_path / name, steps=1)
    assert (
        "None but the name and the run folder"
        in Page(write_page([tmp_path / "a", tmp_path / "b"], tmp_path / "p")).words
    )


def test_folders_without_a_run_and_too_many_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        write_report(tmp_path)
    with pytest.raises(ConfigError, match="at most 8"):
        write_page([tmp_path] * 9, tmp_path / "p")


# -- the curve of the README -------------------------------------------------------------------------------------------


def test_the_curve_counts_steps_of_training(tmp_path):
    make_run(tmp_path, warm_steps=300, steps=60)
    path = tmp_path / "curve.svg"
    write_curve_svg(tmp_path, path)
    texts = [element.text for element in ET.parse(path).iter("{http://www.w3.org/2000/svg}text")]
    assert {"Mean reward", "Held-out accuracy", "training step", "60"} <= set(texts)
    assert "360" not in texts


@given(st.floats(-1e12, 1e12), st.floats(1e-9, 1e12))
def test_ticks_are_round_cover_the_range_and_are_few(low, span):
    high = low + span
    ticks = charts.round_ticks(low, high)
    if high - low < 1e-6 * max(abs(low), abs(high), 1e-3):
        return
    assert 2 <= len(ticks) <= 8
    tolerance = 1e-6 * (high - low) + 1e-12
    assert ticks[0] <= low + tolerance
    assert ticks[-1] >= high - tolerance


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.25, "0.25"), (-2, "−2"), (5000, "5000"), (12500, "12.5k"), (2e6, "2M"), (1e-5, "1e-5")],
)
def test_short_numbers(value, text):
    assert charts.short_number(value) == text


def test_thinning_keeps_the_spikes():
    points = [(float(step), 0.0) for step in range(10_000)]
    points[1234] = (1234.0, 9.0)
    thin = charts.thinned(points)
    assert len(thin) <= charts.MAX_POINTS
    assert (1234.0, 9.0) in thin
    assert thin == sorted(thin)
