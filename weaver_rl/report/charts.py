"""Line charts as SVG text: scales, round ticks, lines. It does not know runs, files or pages."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

Point = tuple[float, float]

MAX_POINTS = 600
"""Points drawn per line; of more, each bucket keeps its lowest and highest."""
SMOOTH_FROM = 150
"""Lines of more points than this are drawn pale, with their moving average on top."""

WIDTH, HEIGHT = 560, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 10, 28


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line, or one layer of a stack. `color` is the number of a colour of the page's palette."""

    label: str
    points: Sequence[Point]
    color: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """The drawing area and its scales: from data to pixels."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    log: bool = False
    width: int = WIDTH
    height: int = HEIGHT
    origin: Point = field(default=(0.0, 0.0))

    @property
    def left(self) -> float:
        return self.origin[0] + _LEFT

    @property
    def right(self) -> float:
        return self.origin[0] + self.width - _RIGHT

    @property
    def top(self) -> float:
        return self.origin[1] + _TOP

    @property
    def bottom(self) -> float:
        return self.origin[1] + self.height - _BOTTOM

    def x(self, value: float) -> float:
        low, high = self.x_range
        return round(self.left + (value - low) / (high - low) * (self.right - self.left), 1)

    def y(self, value: float) -> float:
        low, high = self.y_range
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(max(value, low))
        return round(self.bottom - (value - low) / (high - low) * (self.bottom - self.top), 1)


def round_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """About that many multiples of 1, 2, 2.5 or 5 times a power of ten, covering low to high."""
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return [low]
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next((power * factor for factor in (1, 2, 2.5, 5, 10) if span / (power * factor) <= about), power * 10)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def powers_of_ten(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)
    stride = max(1, math.ceil((last - first) / 5))
    return [10.0**exponent for exponent in range(first, last + stride, stride)]


def short_number(value: float) -> str:
    """A number for an axis or a label: 0, 0.25, 12k, 2M, 1e-5."""
    if value < 0:
        return f"\u2212{short_number(-value)}"
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= limit:
            divisor = 1e3 if suffix == "k" else limit
            return f"{value / divisor:.4g}{suffix}"
    if 0 < value < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"


def thinned(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """The points, or of too many the extremes of each bucket: no spike is lost."""
    if len(points) <= limit:
        return list(points)
    kept: list[Point] = []
    size = 2 * len(points) / limit
    for bucket in range(limit // 2):
        chunk = points[round(bucket * size) : round((bucket + 1) * size)]
        low, high = min(chunk, key=lambda point: point[1]), max(chunk, key=lambda point: point[1])
        kept += sorted({low, high})
    return kept


def moving_average(points: Sequence[Point]) -> list[Point]:
    """Centred, over a fortieth of the points on either side, fewer at the ends: the first and last stay as they are."""
    most = max(1, len(points) // 40)
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    smooth = []
    for index, (x, _) in enumerate(points):
        reach = min(most, index, len(points) - 1 - index)
        start, end = index - reach, index + reach + 1
        smooth.append((x, (sums[end] - sums[start]) / (end - start)))
    return smooth


def fit_frame(
    series: Sequence[Series],
    *,
    y_range: tuple[float, float] | None = None,
    from_zero: bool = False,
    log: bool = False,
    width: int = WIDTH,
    height: int = HEIGHT,
    origin: Point = (0.0, 0.0),
) -> tuple[Frame, list[float]]:
    """Scales that hold all points, and the ticks of the y axis."""
    values = [y for one in series for _, y in one.points]
    if log and (positive := [value for value in values if value > 0]):
        y_ticks = powers_of_ten(min(positive), max(positive))
    else:
        log = False
        y_ticks = round_ticks(*(y_range or _widened([0.0, *values] if from_zero else values)))
    frame = Frame(
        x_range=_x_range(series),
        y_range=(y_ticks[0], y_ticks[-1]),
        log=log,
        width=width,
        height=height,
        origin=origin,
    )
    return frame, y_ticks


def lines(frame: Frame, series: Sequence[Series]) -> str:
    drawn = []
    for one in reversed(series):
        points = thinned(one.points)
        if len(one.points) > SMOOTH_FROM:
            drawn.append(_path(frame, points, f"line c{one.color} pale"))
            points = thinned(moving_average(one.points))
        drawn.append(_path(frame, points, f"line c{one.color}"))
        if len(points) <= 25:
            drawn += [
                f'<circle class="dot c{one.color}" cx="{frame.x(x)}" cy="{frame.y(y)}" r="3"/>' for x, y in points
            ]
    return "".join(drawn)


def axes(frame: Frame, y_ticks: Sequence[float]) -> str:
    parts = []
    for tick in y_ticks:
        y = frame.y(tick)
        kind = "base" if tick == y_ticks[0] else "grid"
        parts.append(f'<line class="{kind}" x1="{frame.left}" x2="{frame.right}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{frame.left - 8}" y="{y + 4}" text-anchor="end">{short_number(tick)}</text>')
    low, high = frame.x_range
    for tick in round_ticks(low, high, 6):
        if low <= tick <= high and tick == round(tick):
            parts.append(
                f'<text x="{frame.x(tick)}" y="{frame.bottom + 18}" text-anchor="middle">{short_number(tick)}</text>'
            )
    return "".join(parts)


def _path(frame: Frame, points: Sequence[Point], classes: str) -> str:
    moves = " ".join(f"{'M' if index == 0 else 'L'}{frame.x(x)} {frame.y(y)}" for index, (x, y) in enumerate(points))
    return f'<path class="{html.escape(classes)}" d="{moves}"/>' if points else ""


def _x_range(series: Sequence[Series]) -> tuple[float, float]:
    steps = [x for one in series for x, _ in one.points]
    low, high = min(steps), max(steps)
    return (low, high) if high > low else (low - 1, high + 1)


def _widened(values: Sequence[float]) -> tuple[float, float]:
    """A range that is never empty; from zero when the values lie near it."""
    low, high = min(values), max(values)
    if low == high:
        margin = abs(low) * 0.5 or 1.0
        return low - margin, high + margin
    if 0 < low < 0.35 * high:
        low = 0.0
    return low, high
