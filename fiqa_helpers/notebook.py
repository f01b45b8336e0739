"""The first and the last call of every notebook: parameters checked, noise quieted, run card written."""

import logging
import os
import re
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fiqa_helpers.errors import WorkshopError, install_notebook_handler
from fiqa_helpers.paths import Workspace
from fiqa_helpers.profiles import Profile, load_profile
from fiqa_helpers.runcard import read_card, write_card

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


def start(namespace: dict, number: str) -> "Run":
    """Begin notebook `number` ("04"): call it once, with `globals()`, right after the parameters cell.

    Raises:
        WorkshopError: a parameter of the wrong type or with a misspelt name, or an impossible profile.
    """
    install_notebook_handler()
    quiet()
    parameters = check_parameters(namespace)
    profile = load_profile(parameters["profile"], parameters["overrides"])
    run = Run(number, parameters, profile, Workspace(parameters["workdir"]))
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
            WorkshopError: it was not run in this workspace, or with another model, data or prompt.
        """
        card = read_card(self._card_path(number))
        if card is None:
            raise WorkshopError(
                f"Notebook {NOTEBOOKS[number]} has not been run in {self.workspace.root}: run it first."
            )
        there = card.get("profile", {})
        for key in ("model", "model_revision", "data", "prompt"):
            if there.get(key) != getattr(self.profile, key):
                raise WorkshopError(
                    f"Notebook {NOTEBOOKS[number]} was run with {key} = {there.get(key)!r} and this one has "
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
        from fiqa_helpers import machine

        card = write_card(
            self._card_path(self.number),
            notebook=NOTEBOOKS[self.number],
            parameters=self.parameters,
            profile=asdict(self.profile),
            device=machine.describe(),
            started=self.started,
            seconds=round(time.time() - self.started, 1),
            peak_memory_gib=machine.peak_memory_gib(),
            figure=figure,
            files=[self.workspace.shown(path) for path in files or []],
            facts=facts,
        )
        print(f"{self.profile.banner()}\n{figure}")
        print(
            f"Notebook {self.number} took {card['seconds'] / 60:.1f} minutes and at most "
            f"{card['peak_memory_gib']:.1f} GiB; its run card is "
            f"{self.workspace.shown(self._card_path(self.number))}."
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
                raise WorkshopError(f"There is no parameter {name}: this notebook has {', '.join(kinds)}.")
    for name, kind in kinds.items():
        value = namespace[name]
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise WorkshopError(
                f"Parameter {name} is {value!r}, a {type(value).__name__}: it must be a {kind.__name__}"
                + (", so pass it with papermill -y or -f, not -p." if isinstance(value, str) else ".")
            )
    return {name: namespace[name] for name in kinds}


def is_interactive() -> bool:
    """True when a Jupyter server started this kernel for a person; papermill and nbmake: False."""
    return "JPY_SESSION_NAME" in os.environ


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
    for name in ("nemo_automodel", "torchao", "torch.utils._pytree", "transformers", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)
