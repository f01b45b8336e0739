"""Figures of an evaluation. Each comes with a sentence that says the same, and reads in black and white."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fiqa_helpers.metrics import METRICS, PRIMARY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fiqa_helpers.evaluation import Evaluated
    from fiqa_helpers.intervals import Comparison

BASE, TUNED = "#1f5a94", "#c65d00"  # also told apart by marker: circle and triangle
LINES = ((0, (6, 2)), (0, (1, 1.5)), (0, (4, 1.5, 1, 1.5)), (0, (2, 4)))  # of the floors


def differences(base: "Evaluated", tuned: "Evaluated", found: "Comparison") -> tuple["Figure", str]:
    """Every row's paired difference, their mean and its 95 % interval: (figure, alternative text)."""
    import numpy as np

    values = np.array(tuned.values(found.metric)) - np.array(base.values(found.metric))
    title = METRICS[found.metric].title
    figure, axes = _figure(3.2)
    bins = np.histogram_bin_edges(values, bins=max(8, min(40, len(values) // 4)))
    counts, _, _ = axes.hist(values, bins=bins, color="0.8", edgecolor="0.35")
    axes.plot(values, np.full(len(values), -0.06 * counts.max()), "|", color="black", markersize=9)
    axes.axvspan(found.low, found.high, facecolor="none", edgecolor=TUNED, hatch="///", linewidth=1.2)
    axes.axvline(found.difference, color=TUNED, linewidth=2.2)
    axes.axvline(0, color="black", linestyle=(0, (5, 3)), linewidth=1.2)
    axes.set_title(
        f"mean {found.difference:+.3f} (line), 95 % interval {found.low:+.3f} to {found.high:+.3f} (hatched)"
        f", {found.rows} rows",
        fontsize=9,
        loc="left",
    )
    axes.set_ylim(-0.14 * counts.max(), 1.08 * counts.max())
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel(f"{title}: tuned minus base (dashed: no difference)")
    axes.set_ylabel("rows")
    alt = (
        f"Histogram of {found.rows} paired differences in {title}, from {values.min():+.3f} to "
        f"{values.max():+.3f}. Their mean is {found.difference:+.3f} with 95 % interval {found.low:+.3f} to "
        f"{found.high:+.3f}, which {'contains' if found.low <= 0 <= found.high else 'excludes'} zero."
    )
    return figure, alt


def against_length(base: "Evaluated", tuned: "Evaluated", floors: dict[str, float]) -> tuple["Figure", str]:
    """Similarity against the answer's words, floors as lines: (figure, alternative text)."""
    import numpy as np

    figure, axes = _figure(3.8)
    said = []
    for side, color, marker in ((base, BASE, "o"), (tuned, TUNED, "^")):
        words = np.array([len(sample["answer"].split()) for sample in side.samples])
        similarity = np.array(side.values(PRIMARY))
        face = "none" if side is base else color
        label = f"{side.label} (mean {similarity.mean():.2f}, median {np.median(words):.0f} words)"
        size = 34 if len(words) < 100 else 14
        axes.scatter(words, similarity, marker=marker, facecolor=face, edgecolor=color, s=size, label=label)
        said.append(
            f"{side.label}: mean {similarity.mean():.3f}, median length {np.median(words):.0f} words, "
            f"correlation of length and similarity {_correlation(words, similarity):+.2f}"
        )
    _lines(axes, floors)
    axes.set_xlabel("words of the answer")
    axes.set_ylabel("semantic similarity")
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.18), ncols=2, fontsize=8, frameon=False)
    values = ", ".join(f"{name} {value:.3f}" for name, value in floors.items())
    return figure, f"Similarity against answer length. {'; '.join(said)}. Floors as lines: {values}."


def _lines(axes: "Axes", floors: dict[str, float]) -> None:
    """A horizontal line for each floor with its name at the right end, names kept apart."""
    low, high = axes.get_ylim()
    low, high = min(low, *floors.values()) - 0.03, max(high, *floors.values()) + 0.03
    axes.set_ylim(low, high)
    previous = float("-inf")
    for style, (name, value) in zip(LINES, sorted(floors.items(), key=lambda item: item[1]), strict=False):
        axes.axhline(value, color="0.3", linestyle=style, linewidth=1.3)
        place = max(value, previous + 0.055 * (high - low))
        axes.annotate(
            f"{name} {value:.2f}",
            (1.01, place),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8,
            annotation_clip=False,
        )
        previous = place


def _correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's r; 0 where one of the two does not vary."""
    import numpy as np

    return float(np.corrcoef(x, y)[0, 1]) if np.std(x) and np.std(y) else 0.0


def _figure(height: float) -> tuple["Figure", "Axes"]:
    """An empty figure outside pyplot, which would keep it in memory and show it twice."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
