"""Where the live panel appears: a JupyterLab cell with two buttons, or a terminal line and one picture.

Both leave the same in the notebook: one line of text and one PNG, no widget.
"""

import base64
import html
import os
import sys
import threading
import time

from fiqa_helpers.panel_view import View, draw_html, draw_line

LINE_EVERY = 10.0  # seconds between two lines of progress


def answer_clicks_while_busy(widget) -> None:
    """Let a widget's events run while a cell is running.

    ipykernel 7.4 sends an event to the thread that last used the widget's channel, which is the busy one;
    without that route it takes the frontend's own, a subshell thread. Older versions have no such route.
    """
    getattr(widget.comm, "__dict__", {})["_reply_subshell_for"] = lambda data, default: default


def show_line(text: str) -> None:
    """Write one line to the process's stderr, past the notebook, which would keep every line as output."""
    copy = getattr(sys.stderr, "_original_stdstream_copy", None)  # ipykernel's way to the terminal
    if copy is not None:
        os.write(copy, f"{text}\n".encode())
        return
    in_kernel = hasattr(sys.stderr, "pub_thread")
    stream = sys.__stderr__ if in_kernel else sys.stderr
    if stream is not None:
        print(text, file=stream, flush=True)


class HeadlessOutput:
    """No person is there: a line of progress on stderr every ten seconds, one text and one PNG at the end."""

    def __init__(self):
        self.stop, self.stop_now, self.sample_now = threading.Event(), threading.Event(), threading.Event()
        self._last = 0.0

    def open(self, fragment: str) -> None:
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
    """A person is there: a bar with two buttons, and the panel below it, redrawn in place."""

    def open(self, fragment: str) -> None:
        import ipywidgets
        from IPython.display import HTML, display

        self._stop = ipywidgets.Button(
            description="Stop",
            icon="stop",
            button_style="danger",
            tooltip="End after this step and keep what was learned",
        )
        self._sample = ipywidgets.Button(
            description="Sample now", icon="comment", tooltip="Ask the three questions after this step"
        )
        self._stop.on_click(self._press_stop)
        self._sample.on_click(self._press_sample)
        self._bar = ipywidgets.HBox([self._stop, self._sample])
        self._top = display(self._bar, display_id=True)
        for button in (self._stop, self._sample):
            answer_clicks_while_busy(button)
        self._view = display(HTML(fragment), display_id=True)

    def wants(self, now: float) -> bool:
        return True

    def show(self, view: View) -> None:
        from IPython.display import HTML

        self._view.update(HTML(draw_html(view)))
        if not self.sample_now.is_set() and self._sample.disabled:
            self._sample.disabled = False
            self._sample.description = "Sample now"

    def close(self, png: bytes, summary: str) -> None:
        data, metadata = picture(png, summary)
        # JupyterLab gives a PNG no alternative text, an <img> keeps its own
        data["text/html"] = (
            f'<img alt="{html.escape(summary)}" style="max-width:100%" '
            f'width="{metadata["image/png"]["width"]}" src="data:image/png;base64,{data["image/png"]}">'
        )
        self._top.update({"text/plain": summary}, raw=True)
        self._view.update(data, metadata=metadata, raw=True)
        for widget in (self._stop, self._sample, self._bar):
            for part in (widget, widget.layout, getattr(widget, "style", None)):
                if part is not None:
                    part.close()

    def _press_stop(self, _) -> None:
        if self.stop.is_set():
            self.stop_now.set()
            self._stop.disabled = True
            self._stop.description = "Stopping ..."
            return
        self.stop.set()
        self._stop.description = "Stop at once"
        self._stop.tooltip = "Don't wait for the end of this step"

    def _press_sample(self, _) -> None:
        self.sample_now.set()
        self._sample.disabled = True
        self._sample.description = "Sampling soon"


def picture(png: bytes, summary: str) -> tuple[dict, dict]:
    """A PNG as display data and metadata, with its alternative text and the size at which it is sharp."""
    width, height = (int.from_bytes(png[at : at + 4]) for at in (16, 20))  # the PNG's header
    shown = 920
    data = {"image/png": base64.b64encode(png).decode(), "text/plain": summary}
    size = {"width": shown, "height": round(shown * height / width), "alt": summary}
    return data, {"image/png": size}
