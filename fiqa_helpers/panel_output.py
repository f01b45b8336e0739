"""Where the live panel appears: a JupyterLab cell with two buttons, or a terminal line and one picture.

Both leave the same in the notebook: one line of text and one PNG, no widget.
"""

import base64
import html
import os
import sys
import threading
import time

from fiqa_helpers.panel_view import STYLE, View, draw_answers, draw_figures, draw_line, draw_title

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
