"""`python -m fiqa_helpers COMMAND`: run the notebooks, check the machine, ask both models, compare runs.

Exit codes: 0 done, 1 refused or failed (one sentence says why), 2 wrong usage, 130 Ctrl-C.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import papermill
import psutil
import typer
import yaml
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from fiqa_helpers import generate, model, show
from fiqa_helpers.base import WorkshopError, Workspace, disk_errors, project_root, read_card
from fiqa_helpers.machinery import checks
from fiqa_helpers.profiles import PROFILES, SETTINGS, from_card, load_profile, planned_profile
from fiqa_helpers.run import start as start_notebook

app = typer.Typer(help=__doc__, add_completion=False, pretty_exceptions_enable=False)
Option = typer.Option
ProfileName = Annotated[str, Option("--profile", help="laptop, gpu24, gpu80; auto: the largest that fits")]
Overrides = Annotated[str, Option(metavar="YAML", help='replaces settings of the profile: "{max_steps: 20}"')]
Workdir = Annotated[str, Option(metavar="FOLDER", help="where runs write; default: the project's folder")]
Only = Annotated[str, Option(metavar="NN", help="notebooks to run: 04, or 01,02, or 00-03, or 04-")]
Fresh = Annotated[bool, Option("--fresh", help="train anew instead of resuming a run that was stopped")]
Own = Annotated[list[str], Option("-p", metavar="NAME=VALUE", help="a notebook's own parameter: -p rows=48")]
Offline = Annotated[bool, Option("--offline", help="the night before: model and data are on this disk")]
Questions = Annotated[list[str], typer.Argument(metavar="QUESTION...", help="in quotation marks")]
Folders = Annotated[list[str], typer.Argument(metavar="FOLDER...", help="what was --workdir of a try")]


@app.command()
def run(
    profile: ProfileName = "auto",
    overrides: Overrides = "",
    workdir: Workdir = "",
    only: Only = "",
    fresh: Fresh = False,
    parameters: Own = (),
) -> None:
    """Execute the notebooks in order; ends with a table of results."""
    load_profile(profile, overrides)  # a wrong one is refused before a kernel starts
    workspace = Workspace(workdir)
    notebooks = choose(project_root() / "notebooks", only)
    own = own_parameters(notebooks, parameters, fresh)
    use_own_kernel()
    # The kernel works in the project's folder: a relative workdir is the caller's.
    common = {"profile": profile, "overrides": overrides, "workdir": workdir and str(workspace.root)}
    for position, notebook in enumerate(notebooks, start=1):
        label = f"[{position}/{len(notebooks)}] {notebook.stem}"
        execute(notebook, workspace, common | own[notebook], label)
    print()
    for path in [workspace.run_cards / f"{notebook.name[:2]}.json" for notebook in notebooks]:
        if card := read_card(path):
            print(f"{card['notebook']:20} {card['seconds'] / 60:5.1f} min  {card['figure']}")
    print(f"\nExecuted notebooks: {workspace.outputs / 'executed'}")


def choose(folder: Path, only: str = "") -> list[Path]:
    """The numbered notebooks of `folder` in order, or those that `only` names: "04", "01,02", "00-03", "04-".

    Raises:
        WorkshopError: `only` names a notebook that is not there.
    """
    notebooks = {path.name[:2]: path for path in sorted(folder.glob("[0-9][0-9]_*.ipynb"))}
    wanted = set()
    for part in only.replace(",", " ").split():
        first, dash, last = part.partition("-")
        last = last or ("99" if dash else first)
        numbers = {number for number in notebooks if first.zfill(2) <= number <= last.zfill(2)}
        if not numbers:
            raise WorkshopError(f"--only names {part!r}, no such notebook: known are {', '.join(notebooks)}.")
        wanted |= numbers
    return [notebooks[number] for number in sorted(wanted or notebooks)]


def own_parameters(notebooks: list[Path], given: list[str], fresh: bool = False) -> dict[Path, dict]:
    """What each notebook gets of `given` (texts NAME=VALUE, the value as YAML): what its parameters cell has.

    `fresh` is for those that can resume; the others have nothing to begin anew.

    Raises:
        WorkshopError: none of `notebooks` has a parameter of that name.
    """
    known = {notebook: set(papermill.inspect_notebook(str(notebook))) for notebook in notebooks}
    values = {name: yaml.safe_load(value) for name, _, value in (text.partition("=") for text in given)}
    if unknown := values.keys() - set.union(*known.values()):
        stems = ", ".join(notebook.stem for notebook in notebooks)
        raise WorkshopError(f"-p {unknown.pop()}: no such parameter in {stems}.")
    values |= {"on_existing": "fresh"} if fresh else {}
    return {path: {name: values[name] for name in names & values.keys()} for path, names in known.items()}


def use_own_kernel() -> None:
    """Have Jupyter take this environment's kernel, and not one of that name in the user's own folder.

    Raises:
        WorkshopError: it takes another one all the same.
    """
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
    fits, found = checks.kernel()
    if not fits:
        raise WorkshopError(f"{found}, not {sys.executable}: {checks.KERNEL}.")


def execute(notebook: Path, workspace: Workspace, values: dict, label: str) -> None:
    """Run one notebook with `values` as parameters.

    What was executed stays in outputs/executed/ either way. A terminal sees papermill's bar, a log one line.

    Raises:
        WorkshopError: a cell failed, the kernel died, the disk is full, or Jupyter has no fitting kernel.
    """
    output = workspace.outputs / "executed" / notebook.name
    output.parent.mkdir(exist_ok=True)
    paths = [str(path).replace("{", "{{").replace("}", "}}") for path in (notebook, output)]
    disk = disk_errors(output.parent, "set workdir to another folder, then run the same command again")
    if not sys.stderr.isatty():
        typer.echo(f"{label} ...", err=True)
    try:
        with disk, passing_signals_on() as told:
            papermill.execute_notebook(
                *paths,  # papermill formats them: braces are doubled
                parameters=values,
                kernel_name="python3",
                progress_bar={"desc": label, "disable": None},  # None: where no terminal is
                cwd=project_root(),
                # ipykernel's own log: a warning about local ports, a traceback when it is interrupted.
                extra_arguments=["--IPKernelApp.log_level=50"],
            )
        return
    except PapermillExecutionError as error:
        why = f"{error.ename}: {error.evalue}\nExecuted so far: {output}".removeprefix("WorkshopError: ")
    except DeadKernelError:
        why = "its kernel died, most often because memory ran out: lower tokens_per_batch with overrides."
        if told:
            why = f"{signal.Signals(told[0]).name} came; `--only {notebook.name[:2]}-` begins with it again."
    if signal.SIGINT in told:
        typer.echo(f"\n{notebook.stem} stopped: {why}", err=True)
        raise typer.Exit(130)
    raise WorkshopError(f"{notebook.stem} stopped: {why}")


@contextlib.contextmanager
def passing_signals_on() -> Iterator[list[int]]:
    """Pass Ctrl-C, SIGTERM and SIGHUP (the terminal was closed) on to the kernel, and go on waiting for it.

    A kernel that trains finishes its step, writes a checkpoint and says how to go on; another one ends at
    once. papermill alone would end and leave its kernel behind. Hands out the list of what came.
    """
    told: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        kernels = psutil.Process().children()
        if not kernels:  # it has not started yet: nothing is lost
            raise KeyboardInterrupt
        if not told:
            kernels[0].terminate()
        elif number == signal.SIGINT:  # a second Ctrl-C: at once; a second SIGTERM waits for the checkpoint
            kernels[0].kill()
        told.append(number)

    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores one
    before = {number: signal.signal(number, pass_on) for number in heard}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@app.command()
def check(
    profile: ProfileName = "auto", overrides: Overrides = "", workdir: Workdir = "", offline: Offline = False
) -> None:
    """Print one line for each requirement, for bug reports too. Exit code 1: one is not met."""
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first imported
    results = checks.checks(Workspace(workdir), planned_profile(profile, overrides), offline)
    print(checks.report(results))
    raise typer.Exit(int(not all(result.ok for result in results)))


@app.command()
def ask(
    questions: Questions, profile: ProfileName = "auto", overrides: Overrides = "", workdir: Workdir = ""
) -> None:
    """Answer with the untuned and the tuned model side by side, as notebook 05 does.

    It needs the adapter of notebook 04. Without one, a precomputed adapter answers where model, data and
    prompt are its own, and says so.
    """
    values = {"profile": profile, "overrides": overrides, "workdir": workdir}
    begun = start_notebook(values | {"__annotations__": dict.fromkeys(values, str)}, "05")
    profile = begun.profile
    folder = model.adapter_folder(begun.workspace, profile)
    model.check_adapter(folder, profile)
    tokenizer = model.load_tokenizer(profile)
    # Refused before the weights are loaded, if a question is too long.
    generate.prompts(questions, tokenizer, profile.prompt, model.base_config(profile), profile.max_new_tokens)
    from peft import PeftModel  # takes seconds

    typer.echo("Loading the base model and the adapter; then both answer ...", err=True)
    tuned = PeftModel.from_pretrained(model.load_base(profile), folder)
    asked = (tuned, tokenizer, questions, profile.prompt, profile.max_new_tokens)
    with tuned.disable_adapter():
        answers = {"base": generate.generate_answers(*asked)}
    print(show.answers(questions, answers | {"tuned": generate.generate_answers(*asked)}))


@app.command()
def compare(folders: Folders) -> None:
    """List tries beside one another, from their run cards: who, what came out, what was changed."""
    head = "who|notebook 04|topic, 95 % interval|voice|ended|last notebook|profile, changed settings"
    lines = [head.split("|")]
    lines += map(line_of, folders)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def line_of(folder: str) -> list[str]:
    """One try of `compare`: what notebook 06 found, how far it came, and its newest settings."""
    paths = sorted(Path(folder).glob("outputs/run_cards/*.json"))
    cards = {path.stem: card for path in paths if (card := read_card(path))}
    if not cards:
        return [folder, *[""] * 5, "no run cards here"]
    shapes = {
        "similarity": "{base:.2f} -> {tuned:.2f} ({low:+.2f} to {high:+.2f}, {rows} rows)",
        "voice": "{base:.2f} -> {tuned:.2f}",
        "stopped": "{base:.0%} -> {tuned:.0%}",
    }
    found = cards.get("06", {"facts": {}})["facts"].get("comparisons", {})
    results = [shape.format(**found[name]) if name in found else "-" for name, shape in shapes.items()]
    last = max(cards.values(), key=lambda card: card["written"])
    profile = from_card(last["profile"])
    here, usual = (vars(settings) for settings in (profile, PROFILES[profile.name]))
    changed = [f"{name} {here[name]}" for name in SETTINGS if here[name] != usual[name]]
    loss = cards.get("04", {"figure": "-"})["figure"]
    return [folder, loss, *results, last["notebook"], ", ".join([profile.name, *changed])]


def main(arguments: list[str] | None = None) -> None:
    """Run one command and end the process with its exit code."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal without UTF-8 gets a ? instead of a traceback
    try:
        app(arguments, prog_name="python -m fiqa_helpers")
    except WorkshopError as error:
        print(f"\n{error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
