"""The report: written from any run, asking nobody for anything, taking none of a user's text for markup."""

import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weaver_rl import report_charts as charts
from weaver_rl.errors import ConfigError
from weaver_rl.metrics import MetricsWriter
from weaver_rl.report import write_curve_svg, write_report
from weaver_rl.rollout_files import RecordedRollout, rollouts_file, write_rollouts
from weaver_rl.run_folder import RunFolder
from weaver_rl.types import Completion, Prompt, RewardComponent, Rollout, ScoredRollout

pytestmark = pytest.mark.unit

EVIL = "</script><script>alert(1)</script><img src=https://example.com/x>"


class Page(HTMLParser):
    """What a browser would make of the page: its elements, its text and the data of its charts."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.chart_data: list[dict] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag if ("type", "application/json") not in attrs else "json")

    def handle_endtag(self, tag):
        while self.open and self.open.pop() not in (tag, "json"):
            pass

    def handle_data(self, data):
        where = self.open[-1] if self.open else ""
        if where == "json":
            self.chart_data.append(json.loads(data))
        elif where not in ("script", "style"):
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def rollout(number: int, reward: float | None, text: str = "7", step: int = 5) -> RecordedRollout:
    completion = Completion(
        token_ids_L=np.zeros(2, np.int32),
        logprobs_L=np.zeros(2, np.float32),
        versions_L=np.zeros(2, np.int32),
        stop_reason="stop",
    )
    prompt = Prompt(prompt_id="p", text=f"prompt-{number}-", token_ids_P=(1,), answer="7")
    missing = "timed out" if reward is None else None
    return RecordedRollout(
        scored=ScoredRollout(
            rollout=Rollout(rollout_id=str(number), prompt=prompt, completion=completion, text=text),
            components=(RewardComponent(name="task", value=reward, missing=missing),),
            reward=reward,
        ),
        step=step,
        sampler="sampler-0",
        advantage=None if reward is None else reward - 0.5,
    )


def make_run(path: Path, warm_steps: int = 0, steps: int = 0, *, evaluate: bool = True, ending=("finished", None)):
    folder = RunFolder(path)
    with folder.claim() as claim, MetricsWriter(folder) as writer:
        folder.config_json.write_text(json.dumps({"name": "quickstart", "model": {"name": "scratch"}}))
        for step in range(1, warm_steps + steps + 1):
            warm = step <= warm_steps
            values = {"loss": 1 / step, "seconds/learn": 0.4, "seconds/step": 1.0, "tokens_per_s": 1800.0 + step}
            if not warm:
                values |= {"reward/mean": step / 10, "reward/task/mean": 0.1, f"reward/{EVIL}/mean": 0.2}
                values |= {"logprob_gap/mean": 1e-5, "logprob_gap/max": 0.0, "seconds/sample": 0.5}
            if evaluate and (step == warm_steps or step == warm_steps + steps):
                values["eval/accuracy"] = 0.41 if warm else 0.93
            writer.write(step, "warm_start" if warm else "train", values)
        claim.end(*ending)
    return folder


def test_a_whole_run(tmp_path):
    folder = make_run(tmp_path, warm_steps=3, steps=4)
    write_rollouts(tmp_path, 5, [rollout(1, 1.0)])
    path = write_report(tmp_path)
    assert path == folder.report
    page = Page(path)
    for words in (
        "quickstart finished model scratch",
        "0.930 accuracy at the end",
        "0.410 accuracy after warm start",
        "4 training steps + 3 of warm start",
        "Reward mean of the step",
        "Where the time goes",
        "sample 50.0% learn 40.0% other 10.0%",
    ):
        assert words in page.words, page.words
    assert [len(chart["series"]) for chart in page.chart_data if chart["stacked"]] == [3]
    reward = page.chart_data[0]["series"]
    assert [series["label"] for series in reward] == ["reward", EVIL, "task"]
    assert reward[0]["points"] == [[4, 0.4], [5, 0.5], [6, 0.6], [7, 0.7]]


def write_lags(path: Path, *histograms: list[float]) -> Page:
    with MetricsWriter(RunFolder(path)) as writer:
        for step, shares in enumerate(histograms, start=1):
            values = {f"lag/{lag}/fraction": share for lag, share in enumerate(shares)}
            writer.write(step, "train", {"lag/max": len(shares) - 1, "seconds/learn": 1, "seconds/step": 1} | values)
    return Page(write_report(path))


def test_lags_are_stacked_and_a_step_without_a_lag_has_none_of_it(tmp_path):
    page = write_lags(tmp_path, [1.0], [0.25, 0.75])
    assert "Lag share of the trained tokens, in versions 0 62.5% 1 37.5%" in page.words
    lags = page.chart_data[0]["series"]
    assert [series["points"] for series in lags] == [[[1, 1.0], [2, 0.25]], [[1, 0.0], [2, 0.75]]]


def test_a_run_of_lag_0_has_no_chart_of_it(tmp_path):
    assert "Lag share" not in write_lags(tmp_path, [1.0], [1.0]).words


@pytest.mark.parametrize(("largest", "labels"), [(7, [*"01234567"]), (9, [*"0123456", "7 or more"])])
def test_the_largest_lags_share_the_last_colour(tmp_path, largest, labels):
    page = write_lags(tmp_path, [0.0] * (largest - 1) + [0.25, 0.75])
    lags = page.chart_data[0]["series"]
    assert [series["label"] for series in lags] == labels
    assert lags[-1]["points"] == [[1, 1.0 if largest == 9 else 0.75]]


@pytest.mark.parametrize(
    ("warm_steps", "steps", "evaluate", "words"),
    [
        (0, 0, False, "No step was finished"),
        (0, 1, True, "0.930 accuracy at the end"),
        (0, 1, False, "1 training steps"),
        (2, 0, True, "0.410 accuracy after warm start"),
        (1, 0, False, "0 training steps + 1 of warm start"),
        (0, 1000, True, "1000 training steps"),
    ],
)
def test_runs_of_any_length(tmp_path, warm_steps, steps, evaluate, words):
    make_run(tmp_path, warm_steps, steps, evaluate=evaluate)
    path = write_report(tmp_path)
    assert words in Page(path).words
    assert not re.search(r"\b(nan|inf)\b", path.read_text())
    write_curve_svg(tmp_path, tmp_path / "curve.svg")
    ET.parse(tmp_path / "curve.svg")


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
    folder = make_run(tmp_path, steps=2)
    folder.config_json.write_text(json.dumps({"name": EVIL, "model": {"name": EVIL}}))
    folder.config_yaml.write_text(f"name: {EVIL}\n")
    write_rollouts(tmp_path, 5, [rollout(1, 1.0, EVIL), rollout(2, 0.0, "a\ud800b")])
    path = write_report(tmp_path)
    page = Page(path)
    assert sum(tag == "script" and attrs.get("type") is None for tag, attrs in page.tags) == 1
    assert not [tag for tag, _ in page.tags if tag in ("img", "link", "iframe", "object", "base")]
    assert not [attrs for _, attrs in page.tags if {"src", "href", "onerror"} & set(attrs)]
    assert "default-src 'none'" in path.read_text()
    assert "url(" not in path.read_text()
    assert page.words.count("alert(1)") >= 3


def test_the_highest_and_lowest_rollouts_of_the_last_step_are_shown_once_each(tmp_path):
    make_run(tmp_path, steps=5)
    write_rollouts(tmp_path, 4, [rollout(99, 9.0, step=4)])
    write_rollouts(tmp_path, 5, [rollout(number, number / 100) for number in range(20)] + [rollout(50, None)])
    words = Page(write_report(tmp_path)).words
    high, low = words.split("Highest reward")[1].split("Lowest reward")
    assert re.findall(r"prompt-(\d+)-", high) == ["19", "18", "17", "16", "15"]
    assert sorted(re.findall(r"prompt-(\d+)-", low), key=int) == ["0", "1", "2", "3", "4"]
    assert "21 in step 5, 1 without a reward" in words
    assert "0.190 advantage -0.310 2 tokens, stop task 0.190" in high


def test_few_rollouts_are_not_shown_twice(tmp_path):
    make_run(tmp_path, steps=5)
    write_rollouts(tmp_path, 5, [rollout(number, 1.0) for number in range(7)])
    words = Page(write_report(tmp_path)).words
    assert sorted(re.findall(r"prompt-(\d+)-", words)) == list("0123456")


def test_damaged_rollouts_do_not_cost_the_report(tmp_path):
    make_run(tmp_path, steps=5)
    rollouts_file(tmp_path, 5).write_bytes(b"damaged")
    assert "is no file of rollouts" in Page(write_report(tmp_path)).words


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        write_report(tmp_path)


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
