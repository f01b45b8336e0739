"""The live panel of notebook 04: a callback that watches the training, samples answers and can stop it.

Importing this module imports transformers.
"""

import base64
import html
import io
import math
import random
import signal
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState, TrainerState

from fiqa_helpers.base import WorkshopError, is_interactive, say
from fiqa_helpers.show import answer_clicks_while_busy, escape, printable, show_line

# --- The live panel's two curves as SVG: losses and learning rate.

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


# --- What the live panel looks like while it runs: HTML and SVG, from plain values only.
#
# Heights never depend on content, colours follow JupyterLab's theme, and the curves differ in marker and
# dash, not in colour alone; in half a window or on a phone the parts stand below one another. Figures and
# answers are two pieces, so that an answer someone reads, scrolls or marks is left alone until there is a
# new one. The picture that stays is drawn in live.py.


@dataclass
class View:
    """Everything that is drawn: seconds, GiB, nats per answer token; None where nothing is known yet."""

    title: str
    phase: str
    step: int
    total: int
    stopped: str | None = None  # why it ended early
    failed: str | None = None  # the name of the exception
    ended: bool = False
    elapsed: float = 0.0
    left: float | None = None
    step_seconds: float | None = None  # how long a step takes
    step_elapsed: float = 0.0  # of the step that runs now
    memory_of: str = "Memory"
    history: list[dict] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)
    untuned: dict | None = None
    latest: dict | None = None
    resumed_at: int = 0
    note: str = ""

    @property
    def outcome(self) -> str:
        """How it stands: "finished 12 steps", "stopped at step 7 of 12 (Stop button)"."""
        where = f"step {self.step} of {self.total}"
        if self.failed:
            return f"failed at {where} ({self.failed})"
        if self.stopped:
            return f"stopped at {where} ({self.stopped})"
        return f"finished {self.step} steps" if self.ended else f"{self.phase}, {where}"

    def points(self, name: str) -> list[tuple[int, float]]:
        """The (step, value) pairs of one column of the history."""
        return [(row["step"], row[name]) for row in self.history if name in row]

    def last(self, name: str) -> float | None:
        """The latest value of a column."""
        return next((row[name] for row in reversed(self.history) if name in row), None)


def clock(seconds: float | None) -> str:
    """Seconds as "48 s", "3:07" or "2:03:07"; a dash when unknown."""
    if seconds is None:
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def describe(view: View) -> str:
    """The panel in one line, for those who can't see the picture: how far it is and what the losses did."""
    parts = [f"{view.title}: {view.outcome}, {clock(view.elapsed)}"]
    for name, words in (("loss", "training loss"), ("eval_loss", "validation loss")):
        values = view.points(name)
        if values:
            parts.append(f"{words} {values[0][1]:.3f} -> {values[-1][1]:.3f}")
    if view.resumed_at:
        parts.append(f"resumed at step {view.resumed_at}")
    if view.note:
        parts.append(view.note)
    return _one_line("; ".join(parts))


def draw_line(view: View) -> str:
    """One line of plain text for a terminal."""
    words = [f"{view.title}: {view.phase}, step {view.step}/{view.total}"]
    figures = (("loss", "loss {:.3f}"), ("eval_loss", "validation {:.3f}"), ("learning_rate", "lr {:.2e}"),
               ("tokens_per_second", "{:,.0f} tokens/s"), ("memory_gib", "{:.1f} GiB"))  # fmt: skip
    words += [form.format(view.last(name)) for name, form in figures if view.last(name) is not None]
    words.append(f"{clock(view.elapsed)} so far")
    if view.left is not None:
        words.append(f"about {clock(view.left)} left")
    return _one_line(", ".join(words))


def _one_line(text: str) -> str:
    """Without line breaks and terminal escapes: an error's message may hold them."""
    return printable(" ".join(text.split()))


def _tiles(view: View) -> str:
    validation = [(value, step) for step, value in view.points("eval_loss") if math.isfinite(value)]
    best = "best {:.3f} at step {}".format(*min(validation)) if validation else "not measured yet"
    memory = [value for _, value in view.points("memory_gib")]
    first, rates = view.points("loss"), [value for _, value in view.points("learning_rate")]
    peak_rate = f"highest {max(rates):.2e}" if rates else ""
    tiles = (
        ("Training loss", view.last("loss"), "{:.3f}", f"began at {first[0][1]:.3f}" if first else ""),
        ("Validation loss", view.last("eval_loss"), "{:.3f}", best),
        ("Learning rate", view.last("learning_rate"), "{:.2e}", peak_rate),
        ("Tokens a second", view.last("tokens_per_second"), "{:,.0f}", "padding not counted"),
        (
            view.memory_of,
            view.last("memory_gib"),
            "{:.1f} GiB",
            f"peak {max(memory):.1f} GiB" if memory else "",
        ),
    )
    return "".join(
        f"<div><i>{name}</i><b>{'–' if value is None else form.format(value)}</b><i>{small}</i></div>"
        for name, value, form, small in tiles
    )


def _answer(sample: dict | None, index: int, waiting: str) -> str:
    if sample is None:
        return f"<p class=w>{waiting}</p>"
    end = "ended by itself" if sample["stopped"][index] else "cut at the length limit"
    text = escape(sample["texts"][index]) or "<em>(an empty answer)</em>"
    return f"<p tabindex=0><small>{end}</small>{text}</p>"


def draw_answers(view: View) -> str:
    """The questions, each with the untuned model's answer and the latest one, as HTML."""
    step = f"at step {view.latest['step']}" if view.latest else "while it learns"
    rows = [
        "<div class='h first'>Question</div><div class=h>The untuned model</div>"
        f"<div class=h>The model {step}</div>"
    ]
    for index, question in enumerate(view.questions):
        rows.append(f"<p class=q>{escape(question)}</p>")
        rows.append(_answer(view.untuned, index, "no answer yet"))
        rows.append(_answer(view.latest, index, "no sample yet"))
    return f"<div class=samples>{''.join(rows)}</div>"


def draw_figures(view: View) -> str:
    """Progress, figures and curves as HTML; every piece of text that comes from outside is escaped."""
    share = 100 * view.step / max(view.total, 1)
    goal = 100 * min(view.step + 1, view.total) / max(view.total, 1)
    creep = ""
    if view.step_seconds:  # between two drawings the browser moves the bar on, at the speed of the last step
        creep = f"animation:fiqa-creep {view.step_seconds:.1f}s linear -{view.step_elapsed:.1f}s forwards;"
    left = f"about {clock(view.left)} left" if view.left is not None else "time left: known after one step"
    resumed = f" · resumed at step {view.resumed_at}" if view.resumed_at else ""
    status = escape(_one_line(view.note or view.phase))
    bar = f"--from:{share:.2f}%;--to:{goal:.2f}%;width:{share:.2f}%;{creep}"
    aria = (
        f'aria-label="optimizer steps" aria-valuemin=0 aria-valuemax={view.total} aria-valuenow={view.step}'
    )
    return (
        f'<div class=bar role=progressbar {aria}><u style="{bar}"></u></div>'
        f"<div class=when><span>step {view.step} of {view.total}{resumed} · {status}</span>"
        f"<span>{clock(view.elapsed)} so far · {left}</span></div>"
        f"<div class=tiles>{_tiles(view)}</div>{draw_charts(view, describe(view))}"
    )


def draw_title(view: View) -> str:
    """The panel's heading as HTML."""
    return f"<b>{escape(view.title)}</b>"


# The class names `fiqa-` are on the widgets around the pieces, see live.py.
STYLE = f"""
.fiqa-panel{{--ink:var(--jp-ui-font-color1,#1f2328);--soft:var(--jp-ui-font-color2,#59636e);
--line:var(--jp-border-color2,#d0d7de);--card:var(--jp-layout-color2,#f6f8fa);box-sizing:border-box;
width:100%;max-width:920px;margin:2px 0;padding:12px 18px;border:1px solid var(--line);border-radius:8px;
color:var(--ink);container-type:inline-size}}
.fiqa-panel .widget-html{{width:auto;margin:0}}
.fiqa-panel .widget-html-content{{min-width:0;font:13px/1.4 var(--jp-ui-font-family,system-ui,sans-serif)}}
.fiqa-panel .widget-html-content *{{box-sizing:border-box}}
.fiqa-panel .fiqa-head{{align-items:center;margin-bottom:6px;overflow:hidden}}
.fiqa-panel .fiqa-head .widget-html{{flex:1 1 260px;min-width:0;font-size:15px}}
.fiqa-panel .fiqa-head b{{font-size:15px}}
.fiqa-panel .fiqa-head .jupyter-button{{margin:2px 0 2px 8px}}
.fiqa-panel .bar{{height:8px;border-radius:4px;background:var(--line);overflow:hidden}}
.fiqa-panel .bar u{{display:block;height:8px;border-radius:4px;background:{BLUE}}}
@keyframes fiqa-creep{{from{{width:var(--from)}}to{{width:var(--to)}}}}
@media (prefers-reduced-motion:reduce){{.fiqa-panel .bar u{{animation:none!important}}}}
.fiqa-panel .when{{display:flex;gap:16px;height:26px;padding-top:4px;color:var(--soft);white-space:nowrap;
font-variant-numeric:tabular-nums}}
.fiqa-panel .when span:first-child{{flex:1;min-width:0;overflow:hidden;text-overflow:ellipsis}}
.fiqa-panel .tiles{{display:grid;grid-template-columns:repeat(5,1fr);gap:8px;margin:4px 0 12px}}
.fiqa-panel .tiles div{{min-width:0;height:66px;padding:6px 10px;border-radius:6px;background:var(--card)}}
.fiqa-panel .tiles b{{display:block;font-size:18px;line-height:23px;font-weight:600;
font-variant-numeric:tabular-nums}}
.fiqa-panel .tiles i{{display:block;font-style:normal;font-size:11px;line-height:15px;color:var(--soft);
white-space:nowrap;overflow:hidden;text-overflow:ellipsis}}
.fiqa-panel .charts{{display:grid;grid-template-columns:560fr 284fr;gap:8px 40px}}
.fiqa-panel .charts>div{{min-width:0}}
.fiqa-panel header{{display:flex;flex-wrap:wrap;justify-content:space-between;gap:0 12px}}
.fiqa-panel .key{{display:flex;align-items:center;gap:0 5px;font-size:12px;color:var(--soft)}}
.fiqa-panel .key svg:not(:first-child){{margin-left:10px}}
.fiqa-panel svg{{overflow:visible;font-family:inherit}}
.fiqa-panel .charts>div>svg{{display:block;width:100%}}
.fiqa-panel .n{{font-size:11.5px;fill:var(--soft)}}
.fiqa-panel .e{{text-anchor:end}} .fiqa-panel .m{{text-anchor:middle}}
.fiqa-panel .g{{stroke:var(--line);stroke-width:1}} .fiqa-panel .a{{stroke:var(--soft);stroke-width:1}}
.fiqa-panel .o{{fill:none;stroke:{BLUE};stroke-width:1.3}}
.fiqa-panel .s{{fill:none;stroke:{BLUE};stroke-width:2.6;stroke-linejoin:round}}
.fiqa-panel .v{{fill:none;stroke:{ORANGE};stroke-width:2;stroke-dasharray:7 4}}
.fiqa-panel .d{{fill:{ORANGE};stroke:none}} .fiqa-panel .r{{fill:none;stroke:var(--soft);stroke-width:2}}
.fiqa-panel .x{{fill:none;stroke:var(--jp-error-color1,#d1242f);stroke-width:2}}
.fiqa-panel .samples{{display:grid;grid-template-columns:2fr 3.4fr 3.4fr;gap:0 16px;margin-top:8px}}
.fiqa-panel .h{{padding-bottom:3px;font-weight:600;border-bottom:1px solid var(--line)}}
.fiqa-panel .samples p{{height:91px;margin:0;padding:5px 0 0;overflow:auto;
border-bottom:1px solid var(--line);
font-size:12px;line-height:17px;white-space:pre-wrap;overflow-wrap:anywhere}}
.fiqa-panel .samples .q{{font-weight:600}} .fiqa-panel .samples .w{{color:var(--soft)}}
.fiqa-panel small{{float:right;height:17px;margin-left:8px;padding:0 6px;border:1px solid var(--line);
border-radius:8px;font-size:11px;line-height:15px;color:var(--soft);white-space:nowrap}}
@container (max-width:640px){{
.fiqa-panel .tiles{{grid-template-columns:repeat(3,1fr)}}
.fiqa-panel .charts{{grid-template-columns:1fr}}
.fiqa-panel .charts>div:last-child{{max-width:300px}}
.fiqa-panel .samples{{grid-template-columns:1fr 1fr}}
.fiqa-panel .first{{display:none}}
.fiqa-panel .samples .q{{grid-column:1/-1;height:auto;border:none}}
.fiqa-panel .samples p:not(.q){{height:125px}}}}
@container (max-width:440px){{
.fiqa-panel .when{{flex-direction:column;gap:0;height:44px}}
.fiqa-panel .when span:first-child{{flex:none}}
.fiqa-panel .tiles{{grid-template-columns:1fr 1fr}}
.fiqa-panel .tiles div{{padding:6px}}
.fiqa-panel .charts>div:first-child .n{{font-size:20px}}
.fiqa-panel .charts>div:first-child .below{{display:none}}
.fiqa-panel small{{float:none;display:block;width:fit-content;max-width:100%;margin:0 0 2px;padding:0 4px;
overflow:hidden;text-overflow:ellipsis}}
.fiqa-panel .samples p:not(.q){{height:176px}}}}
""".replace("\n", "")


# --- Where the live panel appears: a JupyterLab cell with two buttons, or a terminal line and one picture.
#
# Both leave the same in the notebook: one line of text and one PNG, no widget.

LINE_EVERY = 10.0  # seconds between two lines of progress


class HeadlessOutput:
    """No person is there: a line of progress on stderr every ten seconds, one text and one PNG at the end."""

    def __init__(self):
        self.stop, self.stop_now, self.sample_now = threading.Event(), threading.Event(), threading.Event()
        self._last = 0.0

    def open(self, view: View) -> None:
        """Nothing to show yet."""

    def wants(self, now: float) -> bool:
        return now - self._last >= LINE_EVERY

    def show(self, view: View) -> None:
        self._last = time.perf_counter()
        show_line(draw_line(view))

    def close(self, png: bytes, summary: str) -> None:
        from IPython import get_ipython

        if get_ipython() is None:
            print(summary)
            return
        from IPython.display import display

        data, metadata = picture(png, summary)
        display({"text/plain": summary}, raw=True)
        display(data, metadata=metadata, raw=True)


class JupyterOutput(HeadlessOutput):
    """A person is there: the panel as one widget, of which only what has changed is sent to the page."""

    def open(self, view: View) -> None:
        from IPython.display import display
        from ipywidgets import HTML, Button, HBox, VBox

        self._stop = Button(
            description="Stop",
            icon="stop",
            button_style="danger",
            tooltip="End after this step and keep what was learned",
        )
        self._sample = Button(
            description="Sample now", icon="comment", tooltip="Ask the three questions after this step"
        )
        self._stop.on_click(self._press_stop)
        self._sample.on_click(self._press_sample)
        head = HBox([HTML(draw_title(view)), self._stop, self._sample])
        head.layout.flex_flow = "row wrap"
        head.add_class("fiqa-head")
        self._figures, self._answers = HTML(), HTML()
        style = HTML(f"<style>{STYLE}</style>", layout={"display": "none"})
        self._box = VBox([style, head, self._figures, self._answers])
        self._box.add_class("fiqa-panel")
        self.show(view)
        self._top = display(self._box, display_id=True)
        for button in (self._stop, self._sample):
            answer_clicks_while_busy(button)

    def wants(self, now: float) -> bool:
        return True

    def show(self, view: View) -> None:
        self._figures.value, self._answers.value = draw_figures(view), draw_answers(view)
        # The buttons stay enabled: one that is disabled drops the keyboard's place on the page.
        self._sample.description = "Sampling soon" if self.sample_now.is_set() else "Sample now"

    def close(self, png: bytes, summary: str) -> None:
        from IPython.display import display

        data, metadata = picture(png, summary)
        # JupyterLab gives a PNG no alternative text, an <img> keeps its own
        data["text/html"] = (
            f'<img alt="{html.escape(summary)}" style="max-width:100%" '
            f'width="{metadata["image/png"]["width"]}" src="data:image/png;base64,{data["image/png"]}">'
        )
        # first the picture, then the text for the panel: the page is never shorter, and so doesn't scroll
        display(data, metadata=metadata, raw=True)
        self._top.update({"text/plain": summary}, raw=True)
        _close(self._box)

    def _press_stop(self, _) -> None:
        if self.stop.is_set():
            self.stop_now.set()
            self._stop.description = "Stopping ..."
            return
        self.stop.set()
        self._stop.description = "Stop at once"
        self._stop.tooltip = "Don't wait for the end of this step"

    def _press_sample(self, _) -> None:
        self.sample_now.set()
        self._sample.description = "Sampling soon"


def _close(widget) -> None:
    """Take a widget, its parts and their state out of the notebook."""
    for part in (*getattr(widget, "children", ()), widget.layout, getattr(widget, "style", None)):
        if part is not None:
            _close(part) if hasattr(part, "layout") else part.close()
    widget.close()


def picture(png: bytes, summary: str) -> tuple[dict, dict]:
    """A PNG as display data and metadata, with its alternative text and the size at which it is sharp."""
    width, height = (int.from_bytes(png[at : at + 4]) for at in (16, 20))  # the PNG's header
    shown = 920
    data = {"image/png": base64.b64encode(png).decode(), "text/plain": summary}
    size = {"width": shown, "height": round(shown * height / width), "alt": summary}
    return data, {"image/png": size}


# --- The picture that a training run leaves: the live panel's curves and sample answers as one small PNG.
#
# Drawn with matplotlib's object interface, never with pyplot, so that no global state is touched.

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


# --- What the live panel remembers of a run: figures per step and sample answers, kept in the checkpoints.

LOGGED = ("loss", "eval_loss", "learning_rate", "tokens_per_second")


class PanelRecord(ExportableState):
    """History and samples of a training run.

    Trainer writes `state()` into each checkpoint's trainer_state.json, from where a resumed run takes it.
    (Trainer's `restore_callback_states_from_checkpoint` would build a new callback, which nobody shows.)
    """

    def __init__(self):
        self.history: list[dict] = []  # a dict per step: "step", "memory_gib" and those of LOGGED that came
        self.samples: list[dict] = []  # "step" (0: the untuned model), "texts", "stopped"
        self.step = self.total = 0
        self.earlier_seconds = 0.0  # of the run before it was resumed
        self.opened, self.closed = time.perf_counter(), None

    @property
    def seconds(self) -> float:
        """Time since the run began, with the time before a resume."""
        return self.earlier_seconds + (self.closed or time.perf_counter()) - self.opened

    def state(self) -> dict:
        """All of it as plain values; `restore` takes the "attributes" back."""
        kept = {"history": self.history, "samples": self.samples, "seconds": self.seconds}
        return {"args": {}, "attributes": {**kept, "step": self.step, "total": self.total}}

    def restore(self, kept: dict) -> None:
        """Take over the "attributes" of a `state()`."""
        self.history, self.samples = list(kept.get("history", [])), list(kept.get("samples", []))
        self.earlier_seconds = kept.get("seconds", 0.0)
        self.step, self.total = kept.get("step", 0), kept.get("total", 0)

    def join(self, state: TrainerState) -> None:
        """Take over a training that begins or goes on, from a checkpoint with a record or without one."""
        name = type(self).__name__
        if state.global_step > 0:
            self.restore(state.stateful_callbacks.get(name, {}).get("attributes", {}))
            if not self.history:
                for row in state.log_history:
                    self.note_down(row["step"], **{key: row[key] for key in LOGGED if key in row})
        self.step, self.total = state.global_step, state.max_steps
        state.stateful_callbacks[name] = self.state()  # Trainer expects the entry when it saves

    def note_down(self, step: int, **values: float) -> None:
        """Add figures to a step's line of the history."""
        if not values:
            return
        if not self.history or self.history[-1]["step"] != step:
            self.history.append({"step": step})
        self.history[-1].update(values)


# --- Watching a Trainer without changing what it does: sampling, other progress displays, memory.


def remove_progress_callbacks(trainer) -> None:
    """Take away the Trainer's progress bar, table and printed logs: the live panel shows all that."""
    from transformers import PrinterCallback, ProgressCallback
    from transformers.utils.notebook import NotebookProgressCallback

    for callback in (PrinterCallback, ProgressCallback, NotebookProgressCallback):
        trainer.remove_callback(callback)


@contextmanager
def undisturbed(model):
    """Evaluation mode and own random states inside; afterwards training goes on bitwise as it would have."""
    import numpy
    import torch

    was_training = model.training
    states = random.getstate(), numpy.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            model.eval()
            yield
    finally:
        model.train(was_training)
        random.setstate(states[0])
        numpy.random.set_state(states[1])


@contextmanager
def uninterrupted():
    """Ignore the interrupt button for a moment: an impatient second press must not spoil the first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler or signal.default_int_handler)


def save_picture(path: Path, png: bytes) -> None:
    """Write the picture. A disk that is full is only noted: the error that ended the training says more."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png)
    except OSError as error:
        path.unlink(missing_ok=True)
        say(f"The picture {path.name} could not be saved: {error.strerror}.")


def as_sample(step: int, answers: list) -> dict:
    """The answers (objects with `.text` and `.stopped`) of the model at `step`, as plain values for JSON."""
    texts, stopped = [str(answer.text) for answer in answers], [bool(answer.stopped) for answer in answers]
    return {"step": step, "texts": texts, "stopped": stopped}


def memory_gib() -> float:
    """Memory of this process in GiB: reserved on the GPU if there is one, else resident."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.memory_reserved() / 2**30
    import psutil

    return psutil.Process().memory_info().rss / 2**30


def memory_of() -> str:
    """What `memory_gib` measures, in words."""
    import torch

    return "GPU memory, reserved" if torch.cuda.is_available() else "Memory, this process"


# --- The live panel of notebook 04: a callback that watches the training, samples answers and can stop it.

EVERY, SELDOM = 0.5, 10.0  # seconds between two drawings, at least and at most
SHARE = 0.005  # of the time may go into drawing
TRAINING, EVALUATING, SAMPLING = "training", "evaluating on held-out rows", "answering the questions"


class StopTraining(KeyboardInterrupt):
    """Stop was pressed in a sample or an evaluation, or twice in a step: raised at the next forward pass."""


class LivePanel(TrainerCallback, PanelRecord):
    """Curves, figures and sample answers of a running Trainer, with buttons to stop and to sample now.

    Give it to the Trainer as a callback and train inside `with panel:`. In JupyterLab it is drawn while the
    training runs; elsewhere (papermill, nbmake, a script) it writes a line to stderr every ten seconds and
    leaves one line of text and one picture. Stop ends the training after the step at hand, with a checkpoint;
    the interrupt button (KeyboardInterrupt) ends the block at once, without an error. `panel.stopped` says
    why training ended early, `panel.step` where. History and samples travel in the checkpoints'
    trainer_state.json, so that a resumed run shows the whole curve.

    Args:
        questions: the questions to sample, normally three.
        answer: gives the answers of the model in memory to a list of questions, as objects with `.text` and
            `.stopped` (did it end by itself).
        sample_steps: sample every so many optimizer steps and after the last; 0: only the untuned model.
        png: where to save the picture.
        live: draw in the notebook while it runs; None: when a person is there.
    """

    def __init__(
        self,
        questions: Sequence[str],
        answer: Callable[[list[str]], list],
        sample_steps: int,
        title: str = "Training",
        png: Path | None = None,
        live: bool | None = None,
    ):
        super().__init__()
        self.questions, self.answer, self.sample_steps = list(questions), answer, sample_steps
        self.title, self.png = title, png
        self.resumed_at = 0
        self.stopped: str | None = None  # "Stop button" or "interrupted"
        self.failed: str | None = None  # the exception's name
        self.note, self.phase = "", "starting"
        self.drawing_seconds = self.picture_seconds = 0.0  # while it runs, and for the last picture
        self._loop = time.perf_counter()
        self._step_began = self._step_seconds = None
        self._next_drawing, self._hook = 0.0, None
        self._output = JupyterOutput() if (is_interactive() if live is None else live) else HeadlessOutput()

    def __enter__(self) -> "LivePanel":
        if self.closed is not None:  # the model in memory is no longer untuned, and the curve would be two
            raise WorkshopError("This cell has trained already: restart the kernel and run all cells.")
        self.opened = time.perf_counter()
        self._output.open(self.view())
        return self

    def __exit__(self, kind, error, traceback) -> bool:
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        if self._hook is not None:
            self._hook.remove()
        if interrupted:
            self.stopped = self.stopped or "interrupted"
        elif kind is not None:
            self.failed = kind.__name__
        with uninterrupted():
            self._close()
        return interrupted

    def _close(self) -> None:
        """Put the picture and a line of text in place of the panel."""
        self.closed = time.perf_counter()
        png = draw_png(self.view(), f"{self.title}: {self.outcome}")
        self.picture_seconds = time.perf_counter() - self.closed
        self._output.close(png, self.summary)
        if self.png is not None:
            save_picture(Path(self.png), png)

    @property
    def outcome(self) -> str:
        """How it stands: "finished 12 steps", "stopped at step 7 of 12 (Stop button)"."""
        return self.view().outcome

    @property
    def summary(self) -> str:
        """One line that says what the picture shows: its alternative text."""
        return describe(self.view())

    def recall(self, stored: dict) -> None:
        """Show a run that finished earlier, from its `state()["attributes"]`; nothing is trained."""
        self.restore(stored)
        self.note = "this run finished earlier, nothing was trained again"

    # Trainer's events, in the order in which they come

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.join(state)
        self.resumed_at = self.step
        self._hook = model.get_input_embeddings().register_forward_pre_hook(self._at_forward)
        if not any(sample["step"] == 0 for sample in self.samples):
            self._sample_untuned(model)
        self._loop = time.perf_counter()
        self._show(TRAINING, force=True)

    def on_step_begin(self, args, state, control, **kwargs):
        self._step_began = time.perf_counter()

    def on_substep_end(self, args, state, control, **kwargs):
        self._show(TRAINING)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.step = state.global_step
        self._step_seconds, self._step_began = time.perf_counter() - self._step_began, None
        self.note_down(self.step, memory_gib=memory_gib())
        due = self.sample_steps > 0 and (self.step % self.sample_steps == 0 or self.step >= self.total)
        if (due or self._output.sample_now.is_set()) and not self._output.stop.is_set():
            self._sample(model, self.step)
        self._obey(args, control)
        self._show(EVALUATING if control.should_evaluate else TRAINING)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.note_down(self.step, **{name: float(logs[name]) for name in LOGGED if name in logs})
        self._obey(args, control)
        self._show(EVALUATING if control.should_evaluate else TRAINING, force="eval_loss" in logs)

    def on_prediction_step(self, args, state, control, **kwargs):
        self._show(EVALUATING)

    def on_save(self, args, state, control, **kwargs):
        self._obey(args, control, saved=True)
        self._show(TRAINING)

    def _sample(self, model, step: int) -> None:
        """Ask the model in memory; a sample that fails is noted, it doesn't end the training."""
        self._show(SAMPLING, force=True)
        try:
            with undisturbed(model):
                self.samples.append(as_sample(step, self.answer(self.questions)))
        except StopTraining:
            return
        except Exception as error:
            self.note = f"sampling failed at step {step} ({type(error).__name__}: {error})"
            return
        finally:
            self._output.sample_now.clear()
        self._show(TRAINING, force=True)

    def _sample_untuned(self, model) -> None:
        """The untuned model's answers: a fresh LoRA adapter adds nothing, a resumed one is switched off."""
        if self.step == 0:
            self._sample(model, 0)
        elif hasattr(model, "disable_adapter"):
            with model.disable_adapter():
                self._sample(model, 0)
        self.samples.sort(key=lambda sample: sample["step"])
        if self._output.stop.is_set():  # there is no step yet after which Trainer could stop
            raise StopTraining

    def request_stop(self, at_once: bool = False) -> None:
        """What the Stop button does; `at_once`, its second press. Safe to call from another thread."""
        self._output.stop.set()
        if at_once:
            self._output.stop_now.set()

    def request_sample(self) -> None:
        """What the Sample now button does. Safe to call from another thread."""
        self._output.sample_now.set()

    def _obey(self, args, control, saved: bool = False) -> None:
        """Turn a pressed Stop button into Trainer's own way of ending: after this step, with a checkpoint."""
        if not self._output.stop.is_set() or self.step >= self.total:
            return
        self.stopped = "Stop button"
        control.should_training_stop = True
        control.should_evaluate = False
        control.should_save = not saved and args.save_strategy != "no"

    def _at_forward(self, module, inputs) -> None:
        """Before each forward pass: end a sample or an evaluation at once, a step at the second press."""
        if self._output.stop_now.is_set() or (self._output.stop.is_set() and not module.training):
            self.stopped = "Stop button"
            raise StopTraining

    def view(self) -> View:
        """What there is to draw now."""
        done = self.step - self.resumed_at
        each = (time.perf_counter() - self._loop) / done if done else None
        within = self.phase == TRAINING and self._step_began is not None
        stopping = self._output.stop.is_set() and self.closed is None
        return View(
            title=self.title,
            phase="stopping after this step" if stopping else self.phase,
            step=self.step,
            total=self.total,
            stopped=self.stopped,
            failed=self.failed,
            ended=self.closed is not None,
            elapsed=self.seconds,
            left=each * (self.total - self.step) if each else None,
            step_seconds=self._step_seconds if self.phase == TRAINING else None,
            step_elapsed=time.perf_counter() - self._step_began if within else 0.0,
            memory_of=memory_of(),
            history=self.history,
            questions=self.questions,
            untuned=next((sample for sample in self.samples if sample["step"] == 0), None),
            latest=next((sample for sample in reversed(self.samples) if sample["step"] > 0), None),
            resumed_at=self.resumed_at,
            note=self.note,
        )

    def _show(self, phase: str, force: bool = False) -> None:
        """Draw now, unless it was done a moment ago or would take more than its share of the time."""
        self.phase = phase
        began, work = time.perf_counter(), time.thread_time()
        if not self._output.wants(began) or (began < self._next_drawing and not force):
            return
        self._output.show(self.view())
        ended = time.perf_counter()
        self.drawing_seconds += ended - began
        # by processor time: on a busy machine the clock also counts waiting, and the panel would stand still
        self._next_drawing = ended + min(max(EVERY, (time.thread_time() - work) / SHARE), SELDOM)
