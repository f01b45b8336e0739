"""How far an evaluation is and how long it will take, without a growing output in the notebook."""

import sys
import time

from fiqa_helpers.notebook import is_interactive
from fiqa_helpers.panel_output import show_line

EVERY = 0.5  # seconds between two looks at the state
LINE_EVERY = 10.0  # seconds between two lines where nobody can see one redrawn


class EvalProgress:
    """Counts answers for the SDK (its `ProgressTracker` protocol) and shows them.

    In JupyterLab one line is redrawn in place, in a terminal too; elsewhere a line goes to the process's
    stderr now and then, past the notebook. What remains at the end is one line.
    """

    def __init__(self, label: str, total: int, reused: int, in_batch=lambda: 0.0):
        self.label, self.total, self.reused, self.in_batch = label, total, reused, in_batch
        self.done = 0
        self.started = time.perf_counter()
        self._last = self.started
        self._handle = None
        self._terminal = sys.stderr.isatty()

    def on_start(self, benchmark: str, total_problems: int, total_repeats: int) -> None:
        """Called by the SDK: nothing to do, the total is known."""

    def on_step(self, *_: object) -> None:
        """Called by the SDK when a row is answered and scored, or was taken from the log."""
        self.done += 1

    def on_phase(self, *_: object) -> None:
        """Called by the SDK when a row enters a phase: rows are counted when they are done."""

    def on_done(self, *_: object, **__: object) -> None:
        """Called by the SDK at the end: `close` says it."""

    def line(self) -> str:
        """The state in words, with the time that is left."""
        ready = min(self.total, max(self.done, self.reused) + self.in_batch())
        new, seconds = ready - self.reused, time.perf_counter() - self.started
        left = f", {duration(seconds / new * (self.total - ready))} left" if new > 0 else ""
        return f"{self.label}: {int(ready)} of {self.total} answers{left}"

    def show(self) -> None:
        """Redraw, from the thread that runs the cell."""
        if is_interactive():
            self._update(self.line())
        elif self._terminal:
            sys.stderr.write(f"\r\x1b[K{self.line()}")
            sys.stderr.flush()
        elif time.perf_counter() - self._last >= LINE_EVERY:
            self._last = time.perf_counter()
            show_line(self.line())

    def close(self) -> None:
        """Leave one line: how many answers in how long, and how many of them were there already."""
        kept = f", {self.reused} of them kept from before" if self.reused else ""
        seconds = time.perf_counter() - self.started
        text = f"{self.label}: {self.total} answers in {duration(seconds)}{kept}"
        if is_interactive():
            self._update(text)
            return
        if self._terminal:
            sys.stderr.write("\r\x1b[K")
        print(text)

    def _update(self, text: str) -> None:
        from IPython.display import display

        data = {"text/plain": text}
        if self._handle is None:
            self._handle = display(data, raw=True, display_id=True)
        else:
            self._handle.update(data, raw=True)


def duration(seconds: float) -> str:
    """Seconds as a person says them: 48 s, 3 min 20 s, 2 h 5 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"
