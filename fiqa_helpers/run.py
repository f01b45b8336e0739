"""How a notebook begins, what it hands on to the next one, and a line of progress for work of many parts."""

import contextlib
import difflib
import logging
import os
import re
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fiqa_helpers.base import (
    WorkshopError,
    Workspace,
    a_type,
    disk_errors,
    install_notebook_handler,
    is_interactive,
    read_card,
    shown,
    write_card,
)
from fiqa_helpers.profiles import MUST_AGREE, REFERENCE, Profile, load_profile

# --- The first and the last call of every notebook: parameters checked, noise quieted, run card written.

NOTEBOOKS = {
    "00": "00_start_here",
    "01": "01_explore_fiqa",
    "02": "02_format_prompts",
    "03": "03_set_up_lora",
    "04": "04_train",
    "05": "05_generate",
    "06": "06_evaluate",
    "07": "07_scale_out",
}

RANGES = {  # of the notebooks' own parameters; those of a profile are in profiles.py
    "example": (-1, 100_000_000),
    "rows_per_batch": (1, 4096),
    "n_questions": (1, 100),
    "first_row": (0, 100_000_000),
    "temperature": (0.0, 10.0),
    "sampling_seed": (0, 2**32 - 1),
    "rows": (0, 100_000_000),
    "no_repeat_ngram_size": (0, 1000),
    "recipe_steps": (-1, 1_000_000),
    "processes": (1, 4096),
}
CHOICES = {"on_existing": ("resume", "fresh"), "tracker": ("tensorboard", "wandb", "mlflow")}


def start(namespace: dict, number: str) -> "Run":
    """Begin notebook `number` ("04"): call it once, with `globals()`, right after the parameters cell.

    Raises:
        WorkshopError: a parameter of the wrong type, out of range or misspelt, or an impossible profile.
    """
    # Threads that wait for each other go to sleep. The default, waiting busily, made generation ten times
    # slower on two cores that other programs use too. Read when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    install_notebook_handler()
    quiet()
    parameters = check_parameters(namespace)
    profile = load_profile(parameters["profile"], parameters["overrides"])
    run = Run(number, parameters, profile, Workspace(parameters["workdir"]))
    run.workspace.run_cards  # noqa: B018  made now: a folder that can't be written should not end a long run
    print(profile.banner())
    return run


@dataclass
class Run:
    """One execution of one notebook."""

    number: str
    parameters: dict
    profile: Profile
    workspace: Workspace
    started: float = field(default_factory=time.time)

    def needs(self, number: str) -> dict:
        """The run card of an earlier notebook.

        Raises:
            WorkshopError: it was not run in this workspace, or with another model, data, prompt or training.
        """
        card = read_card(self._card_path(number))
        there = card.get("profile") if card else None
        if not isinstance(there, dict):
            raise WorkshopError(
                f"Notebook {NOTEBOOKS[number]} has not been run in {self.workspace.root}: run it first."
            )
        for key in MUST_AGREE:
            before = there.get(key, getattr(REFERENCE, key))  # an older card does not name all of them
            if before != getattr(self.profile, key):
                raise WorkshopError(
                    f"Notebook {NOTEBOOKS[number]} was run with {key} = {before!r} and this one has "
                    f"{getattr(self.profile, key)!r}: give both the same profile and overrides."
                )
        return card

    def save_plot(self, figure, name: str, alt: str):
        """Save a matplotlib figure as `outputs/plots/NAME.png` and return it for display, with alt text."""
        from IPython.display import Image

        path = self.workspace.plots / f"{name}.png"
        figure.savefig(path, dpi=100)
        return Image(path.read_bytes(), format="png", alt=alt)

    def finish(self, figure: str, files: list[Path] | None = None, **facts: object) -> None:
        """Write the run card: `figure` is the main result in a few words, `facts` its numbers."""
        from fiqa_helpers.machinery import machine

        path = self._card_path(self.number)
        with disk_errors(path.parent, "set the parameter workdir to another folder"):
            card = write_card(
                path,
                notebook=NOTEBOOKS[self.number],
                parameters=self.parameters,
                profile=asdict(self.profile),
                device=machine.describe(),
                started=self.started,
                seconds=round(time.time() - self.started, 1),
                peak_memory_gib=machine.peak_memory_gib(),
                figure=figure,
                files=[self.workspace.shown(file) for file in files or []],
                facts=facts,
            )
        print(f"{self.profile.banner()}\n{figure}")
        print(
            f"Notebook {self.number} took {card['seconds'] / 60:.1f} minutes and at most "
            f"{card['peak_memory_gib']:.1f} GiB; its run card is "
            f"{self.workspace.shown(path)}."
        )

    def _card_path(self, number: str) -> Path:
        return self.workspace.run_cards / f"{number}.json"


def check_parameters(namespace: dict) -> dict:
    """The notebook's parameters (name -> value), held against the annotations of its parameters cell.

    papermill's `-p FLAG false` injects the *string* "false", which is true, and a misspelt name only
    warns: both are errors here.

    Raises:
        WorkshopError: naming the parameter, what it is and what it must be.
    """
    kinds = dict(namespace.get("__annotations__", {}))
    for source in namespace.get("In", []):
        if not source.startswith("# Parameters\n"):  # papermill's mark on the cell it injects
            continue
        for name in re.findall(r"^(\w+) = ", source, re.MULTILINE):
            if name not in kinds:
                near = difflib.get_close_matches(name.lower(), kinds, n=1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                raise WorkshopError(
                    f"There is no parameter {name}{hint}: this notebook has {', '.join(kinds)}."
                )
    for name, kind in kinds.items():
        value = namespace[name]
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise WorkshopError(
                f"Parameter {name} is {shown(value)}, {a_type(type(value))}: it must be {a_type(kind)}"
                + (", so pass it with papermill -y or -f, not -p." if isinstance(value, str) else ".")
            )
        low, high = RANGES.get(name, (None, None))
        if low is not None and not low <= value <= high:  # also refuses nan
            raise WorkshopError(f"Parameter {name} is {value}: it must lie between {low} and {high}.")
        if name == "recipe_steps" and value == 0:
            raise WorkshopError("Parameter recipe_steps is 0: set how many, or -1 for all of the profile's.")
        if name in CHOICES and value not in CHOICES[name]:
            raise WorkshopError(f"Parameter {name} is {value!r}: choose one of {', '.join(CHOICES[name])}.")
    return {name: namespace[name] for name in kinds}


def quiet() -> None:
    """Silence the library messages that a reader can do nothing about; errors still show."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if is_interactive() else "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # each bar is a widget left in the file
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE" if not is_interactive() else "TQDM_MININTERVAL", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    for module in (
        "torch",
        "torchao",
        "peft",
        "nemo_automodel",
        "megatron_fsdp",
        "transformers",
        "liger_kernel",
    ):
        warnings.filterwarnings("ignore", category=UserWarning, module=module)
    for name in ("nemo_automodel", "torchao", "torch.utils._pytree", "transformers", "httpx", "liger_kernel"):
        logging.getLogger(name).setLevel(logging.ERROR)


# --- A line of progress on stderr for work of many parts, on a terminal and in a log.

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
