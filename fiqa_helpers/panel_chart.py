"""The live panel's two curves as SVG: losses and learning rate."""

import html
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fiqa_helpers.panel_view import View

BLUE, ORANGE = "#2f7fc4", "#cf6a16"  # 3:1 or better on white and on JupyterLab's dark grey
WIDTH, HEIGHT = 884, 236  # of the SVG, in its own units
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

    def __init__(
        self, box: tuple[int, int, int, int], total: int, values: Sequence[float], zero: bool = False
    ):
        self.left, self.y, self.w, self.h = box
        self.x = self.left + 46  # room for the labels
        self.w -= 46
        self.total = max(total, 1)
        low, self.high = limits(values)
        self.low = 0.0 if zero else low

    def at(self, step: float, value: float) -> tuple[float, float]:
        share = (value - self.low) / (self.high - self.low)
        return self.x + step / self.total * self.w, self.y + self.h * (1 - share)

    def frame(self, title: str) -> str:
        parts = [f'<text x="{self.left}" y="{self.y - 14}" class="t">{title}</text>']
        values = ticks(self.low, self.high)
        digits = max((len(f"{value:.4g}".partition(".")[2]) for value in values), default=0)
        for value in values:
            _, y = self.at(0, value)
            parts.append(f'<path class="g" d="M{self.x} {y:.1f}h{self.w}"/>')
            parts.append(f'<text x="{self.x - 7}" y="{y + 4:.1f}" class="n e">{value:.{digits}f}</text>')
        for step in ticks(0, self.total, 6):
            if step == int(step):
                x, _ = self.at(step, self.low)
                parts.append(f'<text x="{x:.1f}" y="{self.y + self.h + 17}" class="n m">{int(step)}</text>')
        parts.append(f'<path class="a" d="M{self.x} {self.y + self.h}h{self.w}"/>')
        middle, below = self.x + self.w / 2, self.y + self.h + 32
        parts.append(f'<text x="{middle:.0f}" y="{below}" class="n m">optimizer step</text>')
        return "".join(parts)

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
        return "".join(f'<path class="x" d="M{x - 4:.1f} {self.y - 4}l8 8m0 -8l-8 8"/>' for x in spots)


CIRCLE = "m-2.6 0a2.6 2.6 0 1 0 5.2 0a2.6 2.6 0 1 0 -5.2 0"
DIAMOND = "m0 -5l5 5l-5 5l-5 -5z"


def draw_svg(view: "View", summary: str) -> str:
    """Losses on the left, learning rate on the right; `summary` is what a screen reader says instead."""
    loss, validation, rate = (view.points(name) for name in ("loss", "eval_loss", "learning_rate"))
    left = Axes((0, 34, 560, 168), view.total, [value for _, value in loss + validation])
    right = Axes((600, 34, 284, 168), view.total, [value for _, value in rate], zero=True)
    legend = (
        f'<path class="o" d="M304 16{CIRCLE}"/><text x="312" y="20" class="n">training</text>'
        '<path class="s" d="M372 16h24"/><text x="401" y="20" class="n">smoothed</text>'
        f'<path class="v" d="M467 16h28"/><path class="d" d="M481 16{DIAMOND}"/>'
        '<text x="501" y="20" class="n">validation</text>'
    )
    curves = (
        left.marks(loss, "o", CIRCLE)
        + left.line(smooth(loss, view.total), "s")
        + left.line(validation, "v")
        + left.marks(validation, "d", DIAMOND)
        + left.crosses(loss + validation)
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(summary)}">'
        f"{left.frame('Loss, nats per answer token')}{legend}{curves}"
        f"{right.frame('Learning rate')}{right.line(rate, 'r')}</svg>"
    )
