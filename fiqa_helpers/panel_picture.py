"""The picture that a training run leaves: the live panel's curves and sample answers as one small PNG.

Drawn with matplotlib's object interface, never with pyplot, so that no global state is touched.
"""

import io
import math
import textwrap
import warnings

from fiqa_helpers.panel_chart import BLUE, ORANGE, smooth
from fiqa_helpers.panel_view import View
from fiqa_helpers.show import printable

INK, SOFT, LINE = "#1f2328", "#59636e", "#d0d7de"
SHARPNESS = (
    (130, 128),
    (100, 48),
)  # dots per inch and colours of the palette: the first that is small enough
LIMIT = 70_000  # bytes; a notebook stores 4/3 of it


def draw_png(view: View, headline: str) -> bytes:
    """The picture as PNG bytes, well below 100 kB: losses, learning rate, and the two sets of answers."""
    from matplotlib.figure import Figure

    rows = len(view.questions) if view.untuned or view.latest else 0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a sign that the font lacks is drawn as a box
        figure = Figure(figsize=(9.2, 3.3 + 1.02 * rows), facecolor="white", layout="constrained")
        figure.suptitle(
            headline, x=0.004, ha="left", fontsize=11, fontweight="bold", color=INK, parse_math=False
        )
        upper, lower = figure.subfigures(2, height_ratios=(3.0, max(1.02 * rows, 0.01)))
        _charts(upper, view)
        if rows:
            _samples(lower, view)
        for dots, colours in SHARPNESS:
            figure.savefig(file := io.BytesIO(), format="png", dpi=dots)
            png = _shrink(file, colours)
            if len(png) <= LIMIT:
                break
    return png


def _charts(figure, view: View) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(2.2, 1))
    loss, validation = view.points("loss"), view.points("eval_loss")
    if loss:
        left.plot(*zip(*loss, strict=True), "o", ms=4, mfc="none", color=BLUE, alpha=0.75, label="training")
    if line := smooth(loss, view.total):
        left.plot(*zip(*line, strict=True), "-", lw=2.2, color=BLUE, label="training, smoothed")
    if validation:
        whole = {"clip_on": False, "label": "validation"}  # the marker at step 0 stands on the axis
        left.plot(*zip(*validation, strict=True), "--D", lw=1.8, ms=5, color=ORANGE, **whole)
    broken = [step for step, value in loss + validation if not math.isfinite(value)]
    if broken:
        left.plot(broken, [1.0] * len(broken), "x", color="#d1242f", transform=left.get_xaxis_transform(),
                  clip_on=False, label="not a number")  # fmt: skip
    if loss or validation:
        left.legend(frameon=False, fontsize=8.5, labelcolor=INK)
    if rate := view.points("learning_rate"):
        right.plot(*zip(*rate, strict=True), "-", lw=1.8, color=SOFT)
        right.set_ylim(bottom=0)
    for axes, title in ((left, "Loss, nats per answer token"), (right, "Learning rate")):
        axes.set_title(title, loc="left", fontsize=9.5, fontweight="bold", color=INK)
        axes.set_xlim(0, max(view.total, 1) * 1.01)
        axes.set_xlabel("optimizer step", fontsize=8.5, color=SOFT)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.tick_params(labelsize=8, colors=SOFT, length=0)
        axes.grid(axis="y", color=LINE, lw=0.7)
        axes.set_axisbelow(True)
        for side, spine in axes.spines.items():
            spine.set(visible=side == "bottom", color=SOFT)


def _samples(figure, view: View) -> None:
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set(xlim=(0, 1), ylim=(len(view.questions), -0.22))
    step = f"The model at step {view.latest['step']}" if view.latest else "No sample while it learned"
    for x, head in ((0.0, "Question"), (0.23, "The untuned model"), (0.62, step)):
        axes.text(x, -0.03, head, fontsize=9, fontweight="bold", color=INK, va="bottom")
    for row, question in enumerate(view.questions):
        axes.plot((0, 1), (row, row), color=LINE, lw=0.8)
        _text(axes, 0.0, row, question, 26, "", weight="bold")
        for x, sample in ((0.23, view.untuned), (0.62, view.latest)):
            if sample is not None:
                end = "[ended by itself]" if sample["stopped"][row] else "[cut at the length limit]"
                _text(axes, x, row, sample["texts"][row] or "(an empty answer)", 50, end)


def _text(axes, x: float, row: int, text: str, width: int, end: str, weight: str = "normal") -> None:
    """Five lines of text at most, and a line that says how it ended."""
    lines = textwrap.wrap(printable(" ".join(text.split())), width)
    if len(lines) > 5:
        lines = [*lines[:4], lines[4][: width - 1] + " …"]
    axes.text(x, row + 0.07, "\n".join([*lines, end]), fontsize=7.8, color=INK, va="top", fontweight=weight,
              linespacing=1.25, parse_math=False)  # fmt: skip


def _shrink(file: io.BytesIO, colours: int) -> bytes:
    from PIL import Image

    small = io.BytesIO()
    image = Image.open(file).convert("RGB")
    # MAXCOVERAGE keeps colours of few pixels, such as a marker's, apart
    image = image.quantize(colours, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    image.save(small, "PNG", optimize=True)
    return small.getvalue()
