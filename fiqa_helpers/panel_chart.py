"""The live panel's two curves as SVG: losses and learning rate."""

import html
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fiqa_helpers.panel_view import View

BLUE, ORANGE = "#2f7fc4", "#cf6a16"  # 3:1 or better on white and on JupyterLab's dark grey
LOSS_WIDTH, RATE_WIDTH, HEIGHT = 560, 284, 212  # of the two charts, in SVG units
GUTTER, TOP, PLOT = 46, 10, 168  # room for the labels, the plot's upper edge and its height
KEEP = 240  # points of a curve that are drawn at most


def smooth(points: Sequence[tuple[int, float]], total: int) -> list[tuple[int, float]]:
    """Exponential moving average without the pull of its start; values that are no number are left out.

    It looks back over about a sixth of the run, 4 to 50 points (the bias correction is Adam's).
    """
    keep = 1 - 2 / (max(4.0, min(50.0, total / 6)) + 1)
    average, weight, line = 0.0, 0.0, []
    for step, value in points:
        if math.isfinite(value):
            average = keep * average + (1 - keep) * value
            weight = keep * weight + (1 - keep)
            line.append((step, average / weight))
    return line


def ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers inside [low, high], about `wanted` of them."""
    raw = (high - low) / wanted
    if not (math.isfinite(raw) and raw > 0):
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    size = next(k * power for k in (1, 2, 2.5, 5, 10) if k * power >= raw * 0.999)
    first = math.ceil(low / size - 1e-9)
    return [k * size for k in range(first, math.floor(high / size + 1e-9) + 1)]


def limits(values: Sequence[float]) -> tuple[float, float]:
    """A range around the finite values with a little air."""
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    air = 0.08 * (high - low) or 0.05 * abs(high) or 0.5
    return low - air, high + air


def thin(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most about KEEP points, with the last one."""
    stride = len(points) // KEEP + 1
    kept = list(points[::stride])
    return kept if not points or kept[-1] == points[-1] else [*kept, points[-1]]


class Axes:
    """A chart's frame in the SVG: grid, tick labels and the way from data to coordinates."""

    def __init__(self, width: int, total: int, values: Sequence[float], zero: bool = False):
        self.width, self.w = width, width - GUTTER - 9  # half of the last label
        self.total = max(total, 1)
        low, self.high = limits(values)
        self.low = 0.0 if zero else low

    def at(self, step: float, value: float) -> tuple[float, float]:
        share = (value - self.low) / (self.high - self.low)
        return GUTTER + step / self.total * self.w, TOP + PLOT * (1 - share)

    def draw(self, curves: str) -> str:
        """The chart with `curves` in its frame."""
        parts, values = [], ticks(self.low, self.high)
        digits = max((len(f"{value:.4g}".partition(".")[2]) for value in values), default=0)
        for value in values:
            _, y = self.at(0, value)
            parts.append(f'<path class="g" d="M{GUTTER} {y:.1f}h{self.w}"/>')
            parts.append(f'<text x="{GUTTER - 7}" y="{y + 4:.1f}" class="n e">{value:.{digits}f}</text>')
        for step in ticks(0, self.total, 6):
            if step == int(step):
                x, _ = self.at(step, self.low)
                parts.append(f'<text x="{x:.1f}" y="{TOP + PLOT + 17}" class="n m">{int(step)}</text>')
        parts.append(f'<path class="a" d="M{GUTTER} {TOP + PLOT}h{self.w}"/>')
        middle = GUTTER + self.w / 2
        parts.append(f'<text x="{middle:.0f}" y="{TOP + PLOT + 33}" class="n m below">optimizer step</text>')
        return f'<svg viewBox="0 0 {self.width} {HEIGHT}">{"".join(parts)}{curves}</svg>'

    def line(self, points: Sequence[tuple[int, float]], style: str) -> str:
        """A polyline, broken where a value is no number."""
        runs, run = [], []
        for step, value in thin(points):
            if math.isfinite(value):
                run.append("{:.1f},{:.1f}".format(*self.at(step, value)))
            elif run:
                runs, run = [*runs, run], []
        return "".join(
            f'<polyline class="{style}" points="{" ".join(run)}"/>' for run in [*runs, run] if len(run) > 1
        )

    def marks(self, points: Sequence[tuple[int, float]], style: str, path: str) -> str:
        spots = [self.at(step, value) for step, value in thin(points) if math.isfinite(value)]
        return "".join(f'<path class="{style}" d="M{x:.1f} {y:.1f}{path}"/>' for x, y in spots)

    def crosses(self, points: Sequence[tuple[int, float]]) -> str:
        """A cross at the upper edge for each value that is no number."""
        spots = [self.at(step, self.high)[0] for step, value in points if not math.isfinite(value)][:KEEP]
        return "".join(f'<path class="x" d="M{x - 4:.1f} {TOP - 4}l8 8m0 -8l-8 8"/>' for x in spots)


CIRCLE = "m-2.6 0a2.6 2.6 0 1 0 5.2 0a2.6 2.6 0 1 0 -5.2 0"
DIAMOND = "m0 -5l5 5l-5 5l-5 -5z"
LEGEND = (
    f'<svg viewBox="0 0 12 12" width="12" height="12"><path class="o" d="M6 6{CIRCLE}"/></svg>training'
    '<svg viewBox="0 0 24 12" width="24" height="12"><path class="s" d="M0 6h24"/></svg>smoothed'
    '<svg viewBox="0 0 28 12" width="28" height="12"><path class="v" d="M0 6h28"/>'
    f'<path class="d" d="M14 6{DIAMOND}"/></svg>validation'
)


def draw_charts(view: "View", summary: str) -> str:
    """Losses and learning rate side by side; `summary` is what a screen reader says instead."""
    loss, validation, rate = (view.points(name) for name in ("loss", "eval_loss", "learning_rate"))
    left = Axes(LOSS_WIDTH, view.total, [value for _, value in loss + validation])
    right = Axes(RATE_WIDTH, view.total, [value for _, value in rate], zero=True)
    curves = (
        left.marks(loss, "o", CIRCLE)
        + left.line(smooth(loss, view.total), "s")
        + left.line(validation, "v")
        + left.marks(validation, "d", DIAMOND)
        + left.crosses(loss + validation)
    )
    return (
        f'<div class=charts role=img aria-label="{html.escape(summary)}">'
        f"<div><header><b>Loss, nats per answer token</b><span class=key>{LEGEND}</span></header>"
        f"{left.draw(curves)}</div>"
        f"<div><header><b>Learning rate</b></header>{right.draw(right.line(rate, 'r'))}</div></div>"
    )
