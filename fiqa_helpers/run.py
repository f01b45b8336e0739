"""How a notebook begins and ends: parameters checked, settings that travel, noise quieted, a run card.

`Run.finish` puts together what a notebook's run card says; `base.write_card` writes it.
"""

import logging
import os
import re
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fiqa_helpers import base
from fiqa_helpers.base import WorkshopError, Workspace, read_card
from fiqa_helpers.machinery import machine
from fiqa_helpers.profiles import Profile, disagreement, load_profile, profile_name
from fiqa_helpers.show import Picture, style_page

_NAMES = "00_start_here 01_explore_fiqa 02_format_prompts 03_set_up_lora 04_train 05_generate 06_evaluate"
NOTEBOOKS = {name[:2]: name for name in [*_NAMES.split(), "07_scale_out"]}

# Smallest value of parameters that Python would take and understand otherwise: rows[:-1] are all but one.
LOWEST = {"example": -1, "first_row": 0, "rows": 0, "rows_per_batch": 1, "n_questions": 1, "processes": 1}

# Libraries whose user warnings and log messages a reader can do nothing about.
CHATTY = ("torchao", "peft", "nemo_automodel", "megatron_fsdp", "transformers", "liger_kernel", "httpx")
CHATTY += ("torch", "torch.utils._pytree")


def start(namespace: dict, number: str) -> "Run":
    """Begin notebook `number` ("04"): call it once, with `globals()`, right after the parameters cell.

    If the parameter `overrides` is empty, the run card of the notebook before gives them.

    Raises:
        WorkshopError: a parameter of the wrong type or misspelt, an impossible profile, or asserts skipped.
    """
    # Threads that wait for each other go to sleep. The default, waiting busily, made generation ten times
    # slower on two cores that other programs use too. Read when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    quiet()
    if not __debug__:
        raise WorkshopError("PYTHONOPTIMIZE (or -O) skips every check of a notebook: unset it and restart.")
    parameters = check_parameters(namespace)
    workspace = Workspace(parameters["workdir"])
    name = profile_name(parameters["profile"])
    if not parameters["overrides"].strip():
        parameters["overrides"] = travelled(number, name, workspace)
    profile = load_profile(name, parameters["overrides"])
    if base.is_interactive():
        style_page()
    print(profile.banner())
    return Run(number, parameters, profile, workspace)


def travelled(number: str, profile: str, workspace: Workspace) -> str:
    """The overrides of the last notebook before `number` that was run here, if with `profile`; says so."""
    cards = [read_card(workspace.run_cards / f"{before}.json") for before in NOTEBOOKS if before < number]
    match [card for card in cards if card][-1:]:
        case [{"profile": {"name": name}, "parameters": {"overrides": str(found)}, "notebook": before}]:
            if name == profile and found.strip(" {}"):
                print(f'overrides = "{found}", as in notebook {before}; set it to "{{}}" for none.')
                return found
    return ""


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
        name = NOTEBOOKS[number]
        card = read_card(self.workspace.run_cards / f"{number}.json") or {}
        there = card.get("profile")
        if not isinstance(there, dict):
            raise WorkshopError(f"Notebook {name} has not been run in {self.workspace.root}: run it first.")
        if differing := disagreement(there, self.profile):
            raise WorkshopError(
                f"Notebook {name} was run with {differing}: give both the same profile and overrides."
            )
        return card

    def save_plot(self, figure, name: str, alt: str):
        """Save a matplotlib figure as `outputs/plots/NAME.png` and return it for display, with alt text."""
        path = self.workspace.plots / f"{name}.png"
        figure.savefig(path, dpi=100)
        return Picture(path.read_bytes(), alt)

    def finish(self, figure: str, files: list[Path] | None = None, **facts: object) -> None:
        """Put the run card together and have it written: `figure` is the main result in a few words, `facts`
        its numbers, `files` what the notebook has made.
        """
        path = self.workspace.run_cards / f"{self.number}.json"
        minutes, peak = (time.time() - self.started) / 60, machine.peak_memory_gib(self.profile.device)
        with base.disk_errors(path.parent, "set the parameter workdir to another folder"):
            base.write_card(
                path,
                notebook=NOTEBOOKS[self.number],
                parameters=self.parameters,
                profile=asdict(self.profile),
                device=machine.describe(),
                seconds=round(60 * minutes, 1),
                peak_memory_gib=peak,
                figure=figure,
                files=[self.workspace.shown(file) for file in files or []],
                facts=facts,
            )
        took = f"Notebook {self.number} took {minutes:.1f} minutes and at most {peak:.1f} GiB"
        card = self.workspace.shown(path)
        print(f"{self.profile.banner()}\n{figure}\n{took}; its run card is {card}.")


def check_parameters(namespace: dict) -> dict:
    """The notebook's parameters (name -> value), held against the annotations of its parameters cell.

    papermill's `-p FLAG false` injects the *string* "false", which is true, and a misspelt name only
    warns: both are errors here.

    Raises:
        WorkshopError: naming the parameter, what it is and what it must be.
    """
    kinds = dict(namespace.get("__annotations__", {}))
    injected = [cell for cell in namespace.get("In", []) if cell.startswith("# Parameters\n")]  # by papermill
    for name in re.findall(r"^(\w+) = ", "\n".join(injected), re.MULTILINE):
        if name not in kinds:
            raise WorkshopError(f"There is no parameter {name}: this notebook has {', '.join(kinds)}.")
    for name, kind in kinds.items():
        value = namespace[name]
        if type(value) is not kind and (kind, type(value)) != (float, int):
            how = " (papermill: pass it with -y or -f, not -p)" if isinstance(value, str) else ""
            raise WorkshopError(f"Parameter {name} is {value!r:.80}: it must be {kind.__name__}{how}.")
        if name in LOWEST and value < LOWEST[name]:
            raise WorkshopError(f"Parameter {name} is {value}: it must be {LOWEST[name]} or more.")
    return {name: namespace[name] for name in kinds}


def quiet() -> None:
    """Silence the library messages that a reader can do nothing about; errors still show."""
    if not base.is_interactive():  # every redrawing of a bar would be kept in the executed file
        os.environ.setdefault("TQDM_DISABLE", "1")
        sys.modules.setdefault("tqdm.notebook", None)  # widgets, which that does not reach: tqdm.auto prints
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # each bar is a widget left in the file
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    for name in CHATTY:
        warnings.filterwarnings("ignore", category=UserWarning, module=name)
        logging.getLogger(name).setLevel(logging.ERROR)
