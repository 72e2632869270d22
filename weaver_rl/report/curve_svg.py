"""Mean reward and held-out accuracy of a run as one SVG that stands alone, for a README. It makes no page."""

from __future__ import annotations

from pathlib import Path

from weaver_rl.report import charts, resources
from weaver_rl.report.charts import Series
from weaver_rl.report.run_data import read_run
from weaver_rl.run_folder import write_atomically

_HEAD, _GAP = 34, 20


def write_curve_svg(run_dir: Path, path: Path) -> None:
    """Writes the mean reward and the held-out accuracy over the steps of training as one SVG that stands alone."""
    run = read_run(run_dir)
    warm_steps = max((line.step for line in run.lines if line.phase == "warm_start"), default=0)
    panels = [
        ("Mean reward", run.points("reward/mean"), 0, None),
        ("Held-out accuracy", run.points("eval/accuracy"), 2, (0.0, 1.0)),
    ]
    body = []
    for index, (title, points, color, y_range) in enumerate(panels):
        left = index * (charts.WIDTH + _GAP)
        body.append(f'<text class="title" x="{left + 14}" y="24">{title}</text>')
        if not points:
            body.append(f'<text x="{left + 52}" y="{_HEAD + 60}">not measured</text>')
            continue
        series = [Series(label=title, points=[(step - warm_steps, value) for step, value in points], color=color)]
        frame, ticks = charts.fit_frame(series, y_range=y_range, origin=(left, _HEAD))
        body.append(charts.axes(frame, ticks) + charts.lines(frame, series))
        body.append(f'<text x="{frame.right}" y="{frame.bottom + 36}" text-anchor="end">training step</text>')
    width, height = 2 * charts.WIDTH + _GAP, _HEAD + charts.HEIGHT + 20
    style = resources.text("colors.css") + resources.text("charts.css").replace("svg text {", "text {")
    write_atomically(
        path,
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f"<style>{style}\n.title {{ font-size: 15px; font-weight: 640; fill: var(--ink); }}</style>"
        f'<rect width="100%" height="100%" rx="12" fill="var(--card)"/>{"".join(body)}</svg>\n',
    )
