"""The live panel of notebook 04: a callback that watches the training, samples answers and can stop it.

How it looks stands in live.html.j2 and live.css. Importing this module imports transformers.
"""

import io
import math
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path

import jinja2
import pandas
import psutil
import torch
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from tqdm import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from fiqa_helpers.base import WorkshopError, is_interactive
from fiqa_helpers.show import Picture, answer_clicks_while_busy, escape, printable, show_line

HERE = Path(__file__).parent
EVERY, SELDOM = 0.5, 10.0  # seconds between two drawings, at least and at most; a log gets a line as seldom
SHARE = 0.005  # of the time may go into drawing
MEMORY_OF = {True: "GPU memory, reserved", False: "Memory, this process"}
TRAINING, EVALUATING, SAMPLING = "training", "evaluating on held-out rows", "answering the questions"
LOGGED = ("loss", "eval_loss", "learning_rate", "tokens_per_second")
BLUE, ORANGE, INK = "#2f7fc4", "#cf6a16", "#444c56"
WAS_AWAY = "The page was reloaded meanwhile: Run All Cells fills in the rest, nothing is trained again."


class StopTraining(KeyboardInterrupt):
    """Stop was pressed in a sample or an evaluation: raised at the next forward pass."""


class LivePanel(TrainerCallback, ExportableState):
    """Curves, figures and sample answers of a running Trainer, with buttons to stop and to sample now.

    Give it to the Trainer as a callback and train inside `with panel:`. In JupyterLab it is drawn while the
    training runs, also on a page that was reloaded meanwhile; elsewhere (papermill, nbmake, a script) it
    writes a line to stderr every ten seconds. What stays is one line of text and one picture. Stop ends the
    training after the step at hand, with a checkpoint, or in an evaluation at once; the interrupt button
    (KeyboardInterrupt) ends the block at once, without an error. `panel.stopped` says why training ended
    early, `panel.step` where.
    History and samples travel in the checkpoints' trainer_state.json, so that a resumed run shows all.

    Args:
        questions: the questions to sample, normally three.
        answer: gives the answers of the model in memory to a list of questions, as objects with `.text` and
            `.stopped` (did it end by itself).
        sample_steps: sample every so many optimizer steps and after the last; 0: only the untuned model.
        png: where to save the picture.
    """

    def __init__(
        self,
        questions: Sequence[str],
        answer: Callable[[list[str]], list],
        sample_steps: int,
        title: str = "Training",
        png: Path | None = None,
    ):
        self.questions, self.answer, self.sample_steps = list(questions), answer, sample_steps
        self.title, self.png, self.live = title, png, is_interactive()
        self.memory_of = MEMORY_OF[torch.cuda.is_available()]
        self.history: list[dict] = []  # a dict per step: "step", "memory_gib" and those of LOGGED that came
        self.samples: list[dict] = []  # "step" (0: the untuned model), "texts", "stopped"
        self.step = self.total = self.resumed_at = 0
        self.stopped: str | None = None  # "Stop button" or "interrupted"
        self.failed: str | None = None  # the exception's name
        self.note, self.phase = "", "starting"
        self.stop, self.sample_now = threading.Event(), threading.Event()
        self.earlier_seconds = 0.0  # of the run before it was resumed
        self.opened = self._loop = time.perf_counter()
        self.closed: float | None = None
        self.drawing_seconds = self._next_drawing = 0.0

    def __enter__(self) -> "LivePanel":
        if self.closed is not None:  # the model in memory is no longer untuned, and the curve would be two
            raise WorkshopError("This cell has trained already: restart the kernel and run all cells.")
        self.opened = time.perf_counter()
        self._while_open = ExitStack()
        if self.live:
            self._open()
            self._while_open.enter_context(reachable())
        return self

    def __exit__(self, kind, error, traceback) -> bool:
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        # an impatient second press of the interrupt button must not spoil the first
        self._while_open.callback(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, signal.SIG_IGN))
        with self._while_open:
            if interrupted or (self.stop.is_set() and self.step < self.total):
                self.stopped = "Stop button" if self.stop.is_set() else "interrupted"
            elif kind is not None:
                self.failed = kind.__name__
            made = min(len(self.samples), len(self.points("eval_loss")))
            if self.stopped and self.questions and made < 2:  # 04 compares the first with the last
                self.note = "there is no second sample or evaluation yet: run the notebook again to go on"
            self.closed = time.perf_counter()
            self._close()
        return interrupted

    @property
    def outcome(self) -> str:
        """How it stands: "finished 12 steps", "stopped at step 7 of 12 (Stop button)"."""
        where = f"step {self.step} of {self.total}"
        if self.failed or self.stopped:
            return f"{'failed' if self.failed else 'stopped'} at {where} ({self.failed or self.stopped})"
        return f"finished {self.step} steps" if self.closed else f"{self.phase}, {where}"

    @property
    def summary(self) -> str:
        """One line that says how it stands: the picture's alternative text and a terminal's line."""
        parts = [f"{self.title}: {self.outcome}, {self.clock}"]
        for name, words in (("loss", "training loss"), ("eval_loss", "validation loss")):
            if points := self.points(name):
                parts.append(f"{words} {points[0][1]:.3f} -> {points[-1][1]:.3f}")
        if self.resumed_at:
            parts.append(f"resumed at step {self.resumed_at}")
        text = "; ".join([*parts, self.note] if self.note else parts)
        # an error's message may hold line breaks and terminal escapes
        return printable(" ".join(text.split()))

    # Trainer's events, in the order in which they come

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step > 0:
            self._restore(state.stateful_callbacks.get("LivePanel", {}).get("attributes", {}))
        self.step, self.total, self.resumed_at = state.global_step, state.max_steps, state.global_step
        state.stateful_callbacks["LivePanel"] = self.state()  # Trainer expects the entry when it saves
        hook = model.get_input_embeddings().register_forward_pre_hook(self._at_forward)
        self._while_open.callback(hook.remove)
        if not any(sample["step"] == 0 for sample in self.samples):
            with model.disable_adapter():  # that of a resumed run is no longer untuned
                self._sample(model, 0)
            self.samples.sort(key=lambda sample: sample["step"])
        if self.stop.is_set():  # there is no step yet after which Trainer could stop
            raise StopTraining
        self._loop = time.perf_counter()
        self.show(TRAINING, force=True)

    def on_substep_end(self, args, state, control, **kwargs):
        self.show(TRAINING)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.step = state.global_step
        on_gpu = next(model.parameters()).is_cuda
        self.memory_of = MEMORY_OF[on_gpu]
        used = torch.cuda.memory_reserved() if on_gpu else psutil.Process().memory_info().rss
        self._note_down(memory_gib=used / 2**30)
        due = self.sample_steps > 0 and (self.step % self.sample_steps == 0 or self.step >= self.total)
        if (due or self.sample_now.is_set()) and not self.stop.is_set():
            self._sample(model, self.step)
        if self.stop.is_set() and self.step < self.total:  # Trainer's own way to end, with a checkpoint
            control.should_training_stop, control.should_evaluate = True, False
            control.should_save = args.save_strategy != "no"
        self.show(EVALUATING if control.should_evaluate else TRAINING)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self._note_down(**{name: float(logs[name]) for name in LOGGED if name in logs})
        self.show(EVALUATING if control.should_evaluate else TRAINING, force="eval_loss" in logs)

    def on_prediction_step(self, args, state, control, **kwargs):
        self.show(EVALUATING)

    def _sample(self, model, step: int) -> None:
        """Ask the model in memory; a sample that fails is noted, it doesn't end the training."""
        self.show(SAMPLING, force=True)
        try:
            with torch.random.fork_rng(), torch.no_grad():  # the training goes on bitwise as it would have
                model.eval()
                answers = self.answer(self.questions)
            texts, ended = [str(a.text) for a in answers], [bool(a.stopped) for a in answers]
            self.samples.append({"step": step, "texts": texts, "stopped": ended})
        except StopTraining:
            self.note = f"the sample at step {step} was broken off by Stop"
        except Exception as error:
            self.note = f"sampling failed at step {step} ({type(error).__name__}: {error})"
        finally:
            model.train()
            self.sample_now.clear()
        self.show(TRAINING, force=True)

    def _at_forward(self, module, inputs) -> None:
        """Before each forward pass: Stop ends a sample or an evaluation at once, a step is finished."""
        if self.stop.is_set() and not module.training:
            raise StopTraining

    # What it remembers, and what travels in the checkpoints. (Trainer's own way to restore callbacks would
    # build a new panel, which nobody shows.)

    def state(self) -> dict:
        """All of it as plain values; `recall` takes the "attributes" back."""
        kept = {"history": self.history, "samples": self.samples, "seconds": self.seconds}
        return {"args": {}, "attributes": {**kept, "step": self.step, "total": self.total}}

    def recall(self, kept: dict) -> None:
        """Show a run that finished earlier, from its `state()["attributes"]`; nothing is trained."""
        self._restore(kept)
        self.step, self.total = kept.get("step", 0), kept.get("total", 0)
        self.note = "this run finished earlier, nothing was trained again"

    def _restore(self, kept: dict) -> None:
        self.history, self.samples = list(kept.get("history", [])), list(kept.get("samples", []))
        self.earlier_seconds = kept.get("seconds", 0.0)

    def _note_down(self, **values: float) -> None:
        """Add figures to this step's line of the history."""
        if not self.history or self.history[-1]["step"] != self.step:
            self.history.append({"step": self.step})
        self.history[-1].update(values)

    # Plain values for the template and the picture

    @property
    def seconds(self) -> float:
        """Time since the run began, with the time before a resume."""
        return self.earlier_seconds + (self.closed or time.perf_counter()) - self.opened

    def points(self, name: str) -> list[tuple[int, float]]:
        """The (step, value) pairs of one column of the history, without infinite ones and NaN."""
        return [(row["step"], row[name]) for row in self.history if math.isfinite(row.get(name, math.nan))]

    @property
    def clock(self) -> str:
        """Time so far, and how long it will take at this pace."""
        so_far, done = tqdm.format_interval(self.seconds), self.step - self.resumed_at
        if self.closed or done <= 0:
            return so_far if self.closed else f"{so_far} so far"
        left = (time.perf_counter() - self._loop) / done * (self.total - self.step)
        return f"{so_far} so far, about {tqdm.format_interval(left)} left"

    def chart(self, width: int, *columns: str) -> "Chart":
        """The frame of a chart for these columns of the history."""
        return Chart(width, self.total, [value for name in columns for _, value in self.points(name)])

    def smoothed(self) -> list[tuple[int, float]]:
        """Training loss as a moving average over a sixth of the run, without the pull of its start."""
        losses = pandas.Series(dict(self.points("loss")), dtype=float)
        return list(losses.ewm(span=max(4, min(50, self.total / 6))).mean().items())

    # Where it is seen: a cell of JupyterLab with two buttons, or a terminal's line

    def show(self, phase: str, force: bool = False) -> None:
        """Draw now, unless it was done a moment ago or would take more than its share of the time."""
        self.phase = "stopping after this step" if self.stop.is_set() else phase
        began, work = time.perf_counter(), time.thread_time()
        if began < self._next_drawing and not (force and self.live):
            return
        if self.live:
            self._draw()
        else:
            show_line(self.summary)
        ended = time.perf_counter()
        self.drawing_seconds += ended - began
        # by processor time: on a busy machine the clock also counts waiting, and the panel would stand still
        pause = max(EVERY, (time.thread_time() - work) / SHARE) if self.live else SELDOM
        self._next_drawing = ended + min(pause, SELDOM)

    def _draw(self) -> None:
        pieces = template()
        self._figures.value, self._answers.value = pieces.figures(self), pieces.answers(self)
        # the buttons stay enabled: one that is disabled drops the keyboard's place on the page
        self._sample_button.description = "Sampling soon" if self.sample_now.is_set() else "Sample now"

    def _open(self) -> None:
        from IPython.display import Javascript, display
        from ipywidgets import HTML, Button, HBox, VBox

        self._stop_button = Button(description="Stop", icon="stop", button_style="danger")
        self._stop_button.tooltip = "End after this step and keep what was learned"
        self._sample_button = Button(description="Sample now", icon="comment")
        self._sample_button.tooltip = "Ask the questions after this step"
        self._stop_button.on_click(self._press_stop)
        self._sample_button.on_click(self._press_sample)
        buttons = [self._stop_button, self._sample_button][: 2 if self.questions else 1]
        head = HBox([HTML(f"<b>{escape(self.title)}</b>"), *buttons], layout={"flex_flow": "row wrap"})
        head.add_class("fiqa-head")
        self._figures, self._answers = HTML(), HTML()
        style = HTML(f"<style>{(HERE / 'live.css').read_text()}</style>", layout={"display": "none"})
        self._box = VBox([style, head, self._figures, self._answers])
        self._box.add_class("fiqa-panel")
        self._draw()
        self._panel_output = display(self._box, display_id=True)
        self._picture_output = display(Javascript(SAVE), display_id=True)
        for button in buttons:
            answer_clicks_while_busy(button)

    def _press_stop(self, _) -> None:
        self.stop.set()
        self._stop_button.description = "Stopping ..."

    def _press_sample(self, _) -> None:
        self.sample_now.set()
        self._sample_button.description = "Sampling soon"

    def _close(self) -> None:
        """Put a picture and a line of text in place of the panel, and save the picture."""
        from IPython import get_ipython
        from IPython.display import display

        began, png = time.perf_counter(), draw_png(self)
        self.drawing_seconds += time.perf_counter() - began
        shown = Picture(png, self.summary)
        if self.live:
            # first the picture, then the text for the panel: the page is never shorter, and so doesn't scroll
            self._picture_output.update(shown)
            self._panel_output.update({"text/plain": self.summary}, raw=True)
            # a page that was away gets no outputs of this cell any more: it finds the picture in the widget
            self._figures.value = f"{shown.html}<p>{WAS_AWAY}</p>"
            self._box.children = [self._box.children[0], self._figures, self._answers]
        else:
            print(self.summary)
            if get_ipython() is not None:
                display(shown)
        with suppress(OSError):  # on a full disk the error that ended the training says more
            if self.png is not None:
                Path(self.png).write_bytes(png)


# The curves: SVG while it runs, one PNG at the end


class Chart:
    """The frame of an SVG chart, 212 units high; its plot from 10 to 178, and from 46 to 9 before the edge.

    Without values, the frame is empty.
    """

    def __init__(self, width: int, total: int, values: Sequence[float]):
        low, high = min(values, default=0.0), max(values, default=1.0)
        air = 0.08 * (high - low) or 0.05 * abs(high) or 0.5
        self.width, self.total = width, max(total, 1)
        self.low, self.high = low - air if low > 0 else low, high + air  # a rate of zero stands on the axis
        ticks = round_numbers(self.low, self.high, 4)
        digits = max((len(f"{tick:.4g}".partition(".")[2]) for tick in ticks), default=0)
        self.rows = [(round(self.y(tick), 1), f"{tick:.{digits}f}") for tick in ticks]
        steps = round_numbers(0, self.total, 6, integer=True)
        self.columns = [(round(self.x(step), 1), round(step)) for step in steps]

    def x(self, step: float) -> float:
        return 46 + step / self.total * (self.width - 55)

    def y(self, value: float) -> float:
        return 178 - 168 * (value - self.low) / (self.high - self.low)

    def path(self, points: Sequence[tuple[int, float]], mark: str = "") -> str:
        """SVG path commands: a line, or a mark at each point."""
        seen = [*points[:: len(points) // 240 + 1], *points[-1:]]  # more are not
        parts = [f"{self.x(step):.1f} {self.y(value):.1f}{mark}" for step, value in seen]
        return "M" + ("M" if mark else "L").join(parts) if parts else ""


def round_numbers(low: float, high: float, wanted: int, integer: bool = False) -> list[float]:
    """Round numbers inside [low, high], about `wanted` of them."""
    locator = MaxNLocator(wanted, steps=[1, 2, 2.5, 5, 10], integer=integer)
    return [tick for tick in locator.tick_values(low, high) if low <= tick <= high]


def draw_png(panel: LivePanel) -> bytes:
    """The picture that stays: losses and learning rate. (The answers are shown as text.)

    Drawn with matplotlib's object interface, never with pyplot, so that no global state is touched.
    """
    figure = Figure(figsize=(9.2, 3.3), facecolor="white", layout="constrained")
    title = {"x": 0.004, "ha": "left", "fontweight": "bold", "color": INK, "parse_math": False}
    figure.suptitle(f"{panel.title}: {panel.outcome}", **title)
    left, right = figure.subplots(1, 2, width_ratios=(2.2, 1))
    for axes, points, look, more in (
        (left, panel.points("loss"), "o", {"mfc": "none", "color": BLUE, "label": "training"}),
        (left, panel.smoothed(), "-", {"lw": 2.2, "color": BLUE, "label": "smoothed"}),
        (left, panel.points("eval_loss"), "--D", {"clip_on": False, "color": ORANGE, "label": "validation"}),
        (right, panel.points("learning_rate"), "-", {"color": INK}),
    ):
        axes.plot([step for step, _ in points], [value for _, value in points], look, **more)
    left.legend(frameon=False)
    for axes, title in ((left, "Loss, nats per answer token"), (right, "Learning rate")):
        axes.set_title(title, loc="left", fontsize=10)
        axes.set(xlim=(0, max(panel.total, 1) * 1.01), xlabel="optimizer step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(whole := io.BytesIO(), dpi=100)
    # it is kept in the notebook; MAXCOVERAGE keeps colours of few pixels, such as a marker's, apart
    picture = Image.open(whole).convert("RGB").quantize(64, Image.Quantize.MAXCOVERAGE)
    picture.save(small := io.BytesIO(), "PNG", optimize=True)
    return small.getvalue()


@cache
def template():
    """The panel's pieces as functions that give HTML; whatever text is put in is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        finalize=lambda value: Markup(escape(value)) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("live.html.j2").module


# A page that is opened anew while the cell runs sends these on the shell channel. They would wait behind the
# cell, and the page say "Loading widget ..." until the training is over.
KINDS = ("kernel_info_request", "comm_info_request", "comm_open", "comm_msg", "comm_close")
# The widget must be in the file before a reload: JupyterLab's own shortcut, just after the panel is shown.
SAVE = """setTimeout(() => ['ctrlKey', 'metaKey'].forEach(key => document.body.dispatchEvent(
  new KeyboardEvent('keydown', {key: 's', code: 'KeyS', keyCode: 83, bubbles: true, [key]: true}))), 800)"""


@contextmanager
def reachable():
    """While a cell runs, answer a page that opens anew, in a thread (subshell) of ipykernel 7.

    It replaces two methods of ipykernel for the time, one of them by a private name (tried with 7.4.0); a
    kernel without subshells is left alone.
    """
    from IPython import get_ipython

    kernel, thread, subshell = get_ipython().kernel, threading.local(), []
    if not getattr(kernel, "_supports_kernel_subshells", False):
        yield
        return
    manager, session = kernel.shell_channel_thread.manager, kernel.session
    plain, route = session.deserialize, manager.get_shell_channel_to_subshell_socket

    def deserialize(msg, content=True, copy=True):
        message = plain(msg, content=content, copy=copy)
        if threading.current_thread() is kernel.shell_channel_thread:
            thread.kind = message["header"]["msg_type"]
        elif subshell and threading.current_thread() is manager._cache.get(subshell[0]):
            message["header"]["subshell_id"] = subshell[0]  # dispatch_shell asserts that they agree
        return message

    def socket(subshell_id):  # called in the shell channel's thread, right after deserialize
        if subshell_id is None and getattr(thread, "kind", "") in KINDS:
            if not subshell:
                subshell.append(manager._create_subshell())
            subshell_id = subshell[0]
        return route(subshell_id)

    session.deserialize, manager.get_shell_channel_to_subshell_socket = deserialize, socket
    try:
        yield
    finally:
        del session.deserialize, manager.get_shell_channel_to_subshell_socket
