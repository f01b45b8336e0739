"""`python -m fiqa_helpers COMMAND`: run the notebooks, check the machine, ask both models, compare runs.

Exit codes: 0 done, 1 refused or failed (one sentence says why), 2 wrong usage, 130 Ctrl-C.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import papermill
import psutil
import typer
import yaml
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from tqdm import tqdm

from fiqa_helpers import generate, model, rows, show
from fiqa_helpers.base import WorkshopError, Workspace, disk_errors, project_root, read_card
from fiqa_helpers.machinery import checks
from fiqa_helpers.profiles import load_profile, planned_profile
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
Folders = Annotated[list[str], typer.Argument(metavar="FOLDER...", help="what was --workdir of a run")]


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
    own = own_parameters(notebooks, [*parameters, *(["on_existing=fresh"] if fresh else [])])
    use_own_kernel()
    # The kernel works in the project's folder: a relative workdir is the caller's.
    common = {"profile": profile, "overrides": overrides, "workdir": workdir and str(workspace.root)}
    table = []
    for position, notebook in enumerate(notebooks, start=1):
        start = time.time()
        label = f"[{position}/{len(notebooks)}] {notebook.stem}"
        figure = execute(notebook, workspace, common | own[notebook], label)
        table.append(f"{notebook.stem:20} {(time.time() - start) / 60:5.1f} min  {figure}")
    print("", *table, f"\nExecuted notebooks: {workspace.outputs / 'executed'}", sep="\n")


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


def own_parameters(notebooks: list[Path], given: list[str]) -> dict[Path, dict]:
    """What each notebook gets of `given` (texts NAME=VALUE, the value as YAML): what its parameters cell has.

    Raises:
        WorkshopError: none of `notebooks` has a parameter of that name.
    """
    own = {notebook: {} for notebook in notebooks}
    for text in given:
        name, _, value = text.partition("=")
        having = [notebook for notebook in notebooks if name in papermill.inspect_notebook(str(notebook))]
        if not having:
            raise WorkshopError(f"{text}: no such parameter in {', '.join(path.stem for path in notebooks)}.")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            raise WorkshopError(f"-p {text}: {value!r} is no YAML value.") from None
        for notebook in having:
            own[notebook][name] = parsed
    return own


def use_own_kernel() -> None:
    """Have Jupyter take this environment's kernel, and not one of that name in the user's own folder.

    Raises:
        WorkshopError: it takes another one all the same.
    """
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
    kernel = checks.check_kernel()
    if not kernel.ok:
        raise WorkshopError(f"{kernel.detail}: {kernel.remedy}.")


def execute(notebook: Path, workspace: Workspace, values: dict, label: str) -> str:
    """Run one notebook with `values` as parameters; returns the main figure of its run card.

    What was executed stays in outputs/executed/ either way.

    Raises:
        WorkshopError: a cell failed, the kernel died, the disk is full, or Jupyter has no fitting kernel.
    """
    output = workspace.outputs / "executed" / notebook.name
    output.parent.mkdir(exist_ok=True)
    paths = [str(path).replace("{", "{{").replace("}", "}}") for path in (notebook, output)]
    disk = disk_errors(output.parent, "set workdir to another folder, then run the same command again")
    start = time.time()
    try:
        with disk, passing_signals_on() as told, signs_of_life(label):
            papermill.execute_notebook(
                *paths,  # papermill formats them: braces are doubled
                parameters=values,
                kernel_name="python3",
                progress_bar={"desc": label} if sys.stderr.isatty() else False,
                cwd=project_root(),
                # ipykernel's own log: a warning about local ports, a traceback when it is interrupted.
                extra_arguments=["--IPKernelApp.log_level=50"],
            )
    except PapermillExecutionError as error:
        kind = "" if error.ename == "WorkshopError" else f"{error.ename}: "
        why = f"{kind}{error.evalue}\nExecuted so far: {output}"
    except DeadKernelError:
        why = "its kernel died, most often because memory ran out: lower tokens_per_batch with overrides."
        if told:
            why = f"{signal.Signals(told[0]).name} came; `--only {notebook.name[:2]}-` begins with it again."
    else:
        path = workspace.run_cards / f"{notebook.name[:2]}.json"
        card = read_card(path) if path.is_file() and path.stat().st_mtime >= start - 1 else None
        return card["figure"] if card else "no run card was written"
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
        if not kernels:  # it has not started yet
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise WorkshopError("Told to stop before the kernel had started: nothing was lost.")
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


@contextlib.contextmanager
def signs_of_life(label: str, seconds: float = 60) -> Iterator[None]:
    """One line when a notebook begins and one a minute: a log says which one runs, and that it does."""
    start, ended = time.monotonic(), threading.Event()

    def keep_saying() -> None:
        tqdm.write(f"{label}  started", file=sys.stderr)
        while not ended.wait(seconds):
            tqdm.write(f"{label}  {(time.monotonic() - start) / 60:.0f} min", file=sys.stderr)

    threading.Thread(target=keep_saying, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


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
    questions: Questions,
    profile: ProfileName = "auto",
    overrides: Overrides = "",
    workdir: Workdir = "",
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
    longest = max(len(rows.encode_prompt(question, tokenizer, profile.prompt)) for question in questions)
    room = model.base_config(profile).max_position_embeddings - profile.max_new_tokens
    if longest > room:  # transformers would answer past the model's context, and badly
        raise WorkshopError(f"A question has {longest:,} tokens, and there is room for {room:,}: shorten it.")
    typer.echo("Loading the base model and the adapter; then both answer ...", err=True)
    from peft import PeftModel  # takes seconds

    tuned = PeftModel.from_pretrained(model.load_base(profile), folder)
    asked = (tuned, tokenizer, questions, profile.prompt, profile.max_new_tokens)
    with tuned.disable_adapter():
        answers = {"base": generate.generate_answers(*asked)}
    print(show.answers(questions, answers | {"tuned": generate.generate_answers(*asked)}))


@app.command()
def compare(folders: Folders) -> None:
    """Print what was set differently in two or more runs, and what came out, from their run cards."""
    import pandas as pd

    settings, results = {}, {}
    for folder in folders:
        paths = sorted(Path(folder).glob("outputs/run_cards/*.json"))
        cards = [card for path in paths if (card := read_card(path))]
        if not cards:
            raise WorkshopError(f"{folder} holds no run cards: name what was the workdir of a run.")
        card = max(cards, key=lambda card: card["written"])
        device = card["device"] | {"gpu": (card["device"]["gpu"] or {}).get("name", "none")}
        settings[folder] = {**card["profile"], **card["versions"], **device, "git": card["git_revision"]}
        results[folder] = {c["notebook"]: f"{c['figure']} ({c['seconds'] / 60:.1f} min)" for c in cards}
    table = pd.DataFrame(settings).astype(str)
    differing = table[table.nunique(axis=1) > 1]
    tables = {"Settings that differ": differing, "Results": pd.DataFrame(results).fillna("not run")}
    for title, table in tables.items():
        print(f"\n{title}\n{'-' * len(title)}")
        for name, row in table.iterrows():
            print(name, *(f"    {folder}: {value}" for folder, value in row.items()), sep="\n")
    if unlike := {"model", "data", "prompt", "max_length", "eval_rows"} & set(differing.index):
        print(f"\nThe runs differ in {', '.join(sorted(unlike))}: their losses are not to be ranked.")


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
