"""The live panel of notebook 04: a callback that watches the training, samples answers and can stop it.

Importing this module imports transformers. panel_view.py draws, panel_output.py shows.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import TrainerCallback

from fiqa_helpers.errors import WorkshopError
from fiqa_helpers.notebook import is_interactive
from fiqa_helpers.panel_guard import (
    as_sample,
    memory_gib,
    memory_of,
    remove_progress_callbacks,
    save_picture,
    undisturbed,
    uninterrupted,
)
from fiqa_helpers.panel_output import HeadlessOutput, JupyterOutput
from fiqa_helpers.panel_picture import draw_png
from fiqa_helpers.panel_record import LOGGED, PanelRecord
from fiqa_helpers.panel_view import View, describe

__all__ = ["LivePanel", "StopTraining", "remove_progress_callbacks"]

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
