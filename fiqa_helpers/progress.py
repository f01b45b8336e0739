"""A line of progress on stderr for work of many parts, on a terminal and in a log."""

import contextlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator

LOG_SECONDS = 60  # between two lines where stderr is no terminal


@contextlib.contextmanager
def progress(label: str, unit: str = "cell") -> Iterator[Callable[[int, int, str], None]]:
    """A line on stderr for one notebook: the cell, its heading, the time. (Or other `unit`s of other work.)

    Rewritten each second on a terminal; in a log, one line a minute.
    """
    terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    start, state, stop = time.monotonic(), {"cell": 0, "of": 0, "heading": ""}, threading.Event()

    def line() -> str:
        minutes, seconds = divmod(int(time.monotonic() - start), 60)
        cell = f"{unit} {state['cell']} of {state['of']}"
        return f"{label}  {cell}  {minutes}:{seconds:02d}  {state['heading']}"

    def show() -> None:
        if terminal:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\033[K{line()[:width]}", end="", file=sys.stderr, flush=True)
        else:
            print(line(), file=sys.stderr, flush=True)

    def keep_showing() -> None:
        while not stop.wait(1 if terminal else LOG_SECONDS):
            show()

    def report_cell(cell: int, total: int, heading: str) -> None:
        state.update(cell=cell, of=total, heading=heading)

    if not terminal:
        print(f"{label}  started", file=sys.stderr, flush=True)
    thread = threading.Thread(target=keep_showing, daemon=True)
    thread.start()
    outcome = "failed"
    try:
        yield report_cell
        outcome = "done"
    finally:
        stop.set()
        thread.join()
        state["heading"] = outcome
        show()
        if terminal:
            print(file=sys.stderr)
