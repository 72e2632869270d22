"""The report in a real browser, from a file: it draws, it is gone through by keyboard, it asks nobody for anything."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from report_runs import EVIL, full_run, make_run, rollout, run_config

from weaver_rl.metrics import MetricsLine
from weaver_rl.report import write_page, write_report
from weaver_rl.rollout_files import write_rollouts

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: no browser can be driven")

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)

pytestmark = [
    pytest.mark.unit,
    pytest.mark.timeout(120),
    pytest.mark.skipif(CHROMIUM is None, reason=f"no Chromium is installed: none of {', '.join(NAMES)} is on PATH"),
]

DEADLINE_MS = 10_000


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=60_000)
        yield chromium
        chromium.close()


class Opened:
    """A page and everything that it complained about or asked for."""

    def __init__(self, page: playwright.Page, path: Path, part: str = "") -> None:
        self.page = page
        self.complaints: list[str] = []
        self.requests: list[str] = []
        page.set_default_timeout(DEADLINE_MS)
        page.on("console", lambda message: self.complaints.append(message.text) if message.type != "log" else None)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("dialog", lambda dialog: (self.complaints.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: self.requests.append(request.url))
        page.goto(path.as_uri() + part)
        self.own = path.as_uri()

    def texts(self, selector: str) -> list[str]:
        return self.page.locator(selector).all_inner_texts()

    def text(self, selector: str) -> str:
        return self.page.locator(selector).first.inner_text()

    def choose(self, selector: str, value: str) -> None:
        self.page.select_option(selector, value)

    @property
    def shown(self) -> str:
        """Id of the rollout that is shown."""
        return self.text(".detail h2")

    def require_quiet(self) -> None:
        assert self.complaints == []
        assert {url.partition("#")[0] for url in self.requests} == {self.own}


@pytest.fixture
def open_page(browser) -> Iterator:
    pages: list[Opened] = []

    def opened(path: Path, part: str = "", **options) -> Opened:
        pages.append(Opened(browser.new_page(viewport={"width": 1300, "height": 900}, **options), path, part))
        return pages[-1]

    yield opened
    for one in pages:
        one.page.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("run")
    full_run(run_dir, config=run_config(correction={"name": "tis"}))
    return write_report(run_dir)


def test_every_part_opens_and_nothing_is_asked_for(open_page, report):
    opened = open_page(report)
    page = opened.page
    titles = page.eval_on_selector_all("figure", "all => all.map((one) => one.dataset.title)")
    assert {"Reward", "Held-out accuracy", "Loss", "Effective sample size", "Throughput"} <= set(titles)
    page.get_by_label("Smoothing").fill("3")
    page.get_by_text("wall time", exact=True).last.click()
    assert page.locator('figure[data-title="Loss"] path.line').count() >= 1
    page.get_by_text("All other metrics").click()
    page.locator("details figure").first.wait_for()
    page.locator('figure[data-title="Loss"] svg').first.focus()
    page.keyboard.press("ArrowRight")
    assert "loss" in opened.text('figure[data-title="Loss"] .tip')
    page.locator("#tab-curves").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#panel-time").is_visible()
    assert not page.locator("#panel-curves").is_visible()
    page.click("#tab-configuration")
    assert "prompts_per_step" in opened.text("#panel-configuration pre")
    opened.require_quiet()


def test_a_line_is_switched_off_in_its_legend(open_page, report):
    opened = open_page(report)
    reward = opened.page.locator('figure[data-title="Reward"]')
    before = reward.locator("path.line:not(.pale)").count()
    reward.locator(".legend button").first.click()
    assert reward.locator("path.line:not(.pale)").count() == before - 1
    assert reward.locator(".legend button").first.get_attribute("aria-pressed") == "false"


def test_the_ledger_adds_up_for_the_steps_that_are_chosen(open_page, report):
    opened = open_page(report, "#time")
    rows = [re.split(r"\t", row) for row in opened.texts("#ledger-table tr")]
    head, body = rows[0], rows[1:]
    assert [row[0] for row in body] == ["sampler, all 2", "sampler 0", "sampler 1", "learner 0"]
    assert all(row[head.index("sum")] == "100.0%" for row in body)
    assert body[0][head.index("generate")] == "37.5%"
    assert [row[head.index("idle")] for row in body] == ["45.0%", "40.0%", "50.0%", "25.0%"]
    assert body[1][head.index("seconds")] == "6"
    assert "steps 3 to 8" in opened.text("#ledger")
    opened.page.fill("#ledger-from", "7")
    opened.page.locator("#ledger-from").blur()
    assert opened.texts("#ledger-table tr")[2].split("\t")[-1] == "2"
    assert "steps 7 to 8" in opened.text("#ledger")
    opened.choose("#ledger-who", "actor:1")
    assert opened.page.locator('#ledger figure[data-title="sampler 1"]').count() == 2
    opened.require_quiet()


def test_rollouts_are_gone_through_by_keyboard(open_page, report):
    opened = open_page(report, "#rollouts")
    press = opened.page.keyboard.press
    first = opened.shown
    press("j")
    second = opened.shown
    assert second != first
    assert opened.page.locator('.list li[aria-selected="true"]').get_attribute("data-place") == "1"
    press("k")
    assert opened.shown == first
    opened.page.locator(".list").focus()
    press("ArrowDown")
    assert opened.shown == second
    press("End")
    assert "48 of 48" in opened.text(".keys")
    press("ArrowDown")
    assert "48 of 48" in opened.text(".keys")
    press("/")
    opened.page.keyboard.type("日本語")
    assert 0 < len(opened.texts(".list li")) < 48
    press("Escape")
    press("j")
    assert opened.shown
    opened.require_quiet()


def test_filters_and_orders(open_page, report):
    opened = open_page(report, "#rollouts")
    page = opened.page
    opened.choose("#f-state", "missing")
    assert set(opened.texts(".list li .lost")) == {"dropped"}
    assert "missing: timed out" in opened.text(".detail")
    assert "Not trained on: reward missing" in opened.text(".detail")
    opened.choose("#f-state", "")
    opened.choose("#f-step", "4")
    assert "8 of 48 rollouts" in opened.text(".count")
    opened.choose("#f-group", "00000003")
    assert len(opened.texts(".list li")) == 4
    opened.choose("#f-group", "")
    opened.choose("#f-step", "")
    page.fill("#f-low", "0.5")
    rewards = [float(text) for text in opened.texts(".list .reward")]
    assert rewards
    assert min(rewards) >= 0.5
    page.fill("#f-low", "")
    opened.choose("#f-sort", "high")
    assert opened.text(".keys").startswith("1 of 48")
    rewards = [float(text) for text in opened.texts(".list .reward") if text != "–"]
    assert rewards == sorted(rewards, reverse=True)
    assert opened.texts(".list .reward")[-1] == "–"
    page.fill("#f-text", "no rollout says this")
    assert "No rollout matches" in opened.text(".detail")
    opened.require_quiet()


def test_tokens_are_coloured_by_what_is_chosen_and_tell_their_numbers(open_page, report):
    opened = open_page(report, "#rollouts")
    page = opened.page
    page.fill("#f-text", "🎉")
    assert opened.text(".tokens").startswith("12 é") or "C3" in opened.text(".tokens")
    assert "".join(opened.texts(".token:not(:has(.chip))")) == "12 é🎉 ok"
    assert opened.texts(".token .chip")[-1] == "<eos>"
    classes = "all => all.map((one) => one.className)"
    assert set(page.eval_on_selector_all(".token", classes)) == {"token heat"}
    page.keyboard.press("Escape")
    for key, allowed in (("2", "plus|minus"), ("3", "plus|minus"), ("4", "v[0-5]"), ("5", "")):
        page.keyboard.press(key)
        found = set(page.eval_on_selector_all(".tokens .token", classes))
        assert all(re.fullmatch(f"token ?({allowed})", one) for one in found), (key, found)
    page.keyboard.press("3")
    page.locator(".tokens .token").nth(2).hover()
    told = opened.text(".token-info")
    for words in ("token 3 of", "sampler", "learner − sampler", "ratio", "importance weight", "version v"):
        assert words in told, told
    page.locator(".tokens").focus()
    page.keyboard.press("ArrowRight")
    assert "token 4 of" in opened.text(".token-info")
    opened.require_quiet()


def test_the_group_is_beside_a_rollout_and_opens(open_page, report):
    opened = open_page(report, "#rollouts")
    page = opened.page
    opened.choose("#f-state", "missing")
    cards = page.locator(".siblings button")
    assert cards.count() == 4
    cards.first.click()
    assert opened.shown.endswith("-000")
    assert "48 rollouts" in opened.text(".count")


def test_several_runs_are_drawn_on_common_axes_and_switched_off(open_page, tmp_path):
    full_run(tmp_path / "a")
    full_run(tmp_path / "b", config=run_config(name="other", seed=3), ledger=False)
    opened = open_page(write_page([tmp_path / "a", tmp_path / "b"], tmp_path / "both.html"))
    page = opened.page
    loss = page.locator('figure[data-title="Loss"]').first
    assert loss.locator("path.line:not(.pale)").count() == 2
    assert opened.texts('figure[data-title="Loss"] .legend >> nth=0')[0].startswith("quickstart")
    toggle = page.locator("#run-toggles button").last
    toggle.click()
    assert loss.locator("path.line:not(.pale)").count() == 1
    assert toggle.get_attribute("aria-pressed") == "false"
    toggle.click()
    assert loss.locator("path.line:not(.pale)").count() == 2
    for axis in ("sampled tokens", "wall time", "steps"):
        page.get_by_text(axis, exact=True).last.click()
        assert loss.locator("path.line:not(.pale)").count() == 2
    page.click("#tab-time")
    assert page.locator("#ledger-table").is_visible()
    page.click("#tab-rollouts")
    opened.choose("#f-run", "1")
    assert "run other" in opened.text(".facts")
    opened.require_quiet()


def test_hostile_text_is_shown_and_not_run(open_page, report):
    opened = open_page(report, "#rollouts")
    opened.page.fill("#f-text", "alert(1)")
    assert EVIL in "".join(opened.texts(".token:not(:has(.chip))"))
    opened.require_quiet()


def test_the_policy_holds_where_escaping_fails(open_page, report, tmp_path):
    """Even markup that got into the page runs nothing and fetches nothing."""
    evil = "<script>window.hacked = 1</script><img src='https://example.com/x' onerror='window.hacked = 2'>"
    broken = tmp_path / "broken.html"
    broken.write_text(report.read_text().replace('<div id="charts">', f'{evil}<div id="charts">', 1))
    opened = open_page(broken)
    assert opened.page.evaluate("window.hacked") is None
    assert any("Content Security Policy" in complaint for complaint in opened.complaints)
    refused = opened.page.evaluate(
        """() => { try { document.body.innerHTML = "<b>x</b>"; return null; } catch (error) { return error.name; } }"""
    )
    assert refused == "TypeError"
    assert opened.page.locator("figure").count() > 5


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(open_page, report, scheme):
    opened = open_page(report, color_scheme=scheme)
    red, green, blue = opened.page.evaluate(
        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    )
    assert (red + green + blue > 600) == (scheme == "light")


def test_a_run_without_anything_opens(open_page, tmp_path):
    make_run(tmp_path)
    opened = open_page(write_report(tmp_path))
    for part in ("time", "rollouts", "configuration", "curves"):
        opened.page.click(f"#tab-{part}")
    assert "No step was finished" in opened.text("#panel-curves")
    opened.require_quiet()


def test_a_run_of_10_000_steps_opens_quickly(open_page, tmp_path):
    folder = make_run(tmp_path, steps=1)
    values = {f"seconds/{stage}": 0.2 for stage in ("sample", "score", "learn", "sync", "step")} | {"loss": 0.5}
    lines = (MetricsLine(step=n, phase="train", time_s=float(n), values=values) for n in range(1, 10_001))
    folder.metrics_file.write_text("".join(line.to_json() for line in lines))
    weights = np.linspace(-1, 1, 500).astype(np.float32)
    rows = []
    for number in range(400):
        row = rollout(number, number / 400, text="x" * 500, group_id=str(number // 8), importance_weights_L=weights)
        completion = type(row.scored.rollout.completion)(
            token_ids_L=np.full(500, 9, np.int32),
            logprobs_L=-np.abs(np.random.default_rng(number).normal(0, 1, 500)).astype(np.float32),
            versions_L=np.full(500, 4, np.int32),
            stop_reason="length",
        )
        object.__setattr__(row.scored.rollout, "completion", completion)
        rows.append(row)
    write_rollouts(tmp_path, 5, rows)
    path = write_page([tmp_path], tmp_path / "big.html", max_rollouts=400)
    assert path.stat().st_size < 8_000_000
    begun = time.perf_counter()
    opened = open_page(path)
    opened.page.locator('figure[data-title="Loss"] path.line').first.wait_for(state="attached")
    opened.page.click("#tab-rollouts")
    assert "320 rollouts" in opened.text(".count")
    assert time.perf_counter() - begun < DEADLINE_MS / 1000
    opened.require_quiet()
