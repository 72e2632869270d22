"""Pictures of a report for the README: its curves, and one rollout token by token. It knows the page, not the run.

    python -m benchmarks.report_screenshot runs/quickstart docs

writes docs/report.png and docs/report_rollouts.png. It needs a Chromium, playwright's client and Pillow.
"""

from __future__ import annotations

import argparse
import io
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from weaver_rl.errors import UserError
from weaver_rl.report import write_page

WIDTH = 1400
MAX_BYTES = 300_000
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def main() -> None:
    """Takes both pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("directory", type=Path, help="where the pictures go")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        page = write_page([chosen.run], Path(directory) / "report.html")
        take(page, chosen.directory)


def take(report: Path, directory: Path) -> None:
    """Opens the report as its readers do and takes the pictures."""
    from playwright.sync_api import Page, sync_playwright

    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        raise UserError(f"no browser is installed; looked for {', '.join(BROWSERS)}")

    def rollout(page: Page) -> None:
        page.select_option("#f-sort", "advantage")
        page.locator("#f-sort").blur()
        page.locator(".tokens .token").first.hover()

    def curves(page: Page) -> None:
        page.locator('figure[data-title="Reward"] svg').hover(position={"x": 250, "y": 60})

    views: tuple[tuple[str, str, int, Callable[[Page], None]], ...] = (
        ("report.png", "#curves", 1000, curves),
        ("report_rollouts.png", "#rollouts", 1000, rollout),
    )
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        for name, part, height, prepare in views:
            page = browser.new_page(viewport={"width": WIDTH, "height": height})
            page.goto(report.as_uri() + part)
            prepare(page)
            save(page.screenshot(), directory / name)
            page.close()
        browser.close()


def save(png: bytes, path: Path) -> None:
    """Writes a picture as small as it gets without loss."""
    from PIL import Image

    Image.open(io.BytesIO(png)).convert("RGB").save(path, optimize=True)
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path} has {path.stat().st_size} bytes; at most {MAX_BYTES} belong into the repository")
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
