"""`python -m fiqa_helpers COMMAND`: run the notebooks, check the machine, ask both models, compare runs.

Exit codes: 0 done, 1 refused or failed (one sentence says why), 2 wrong usage, 130 Ctrl-C.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import papermill
import psutil
import yaml
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from typer import Argument, Option, Typer

from fiqa_helpers import generate, model, show
from fiqa_helpers.base import WorkshopError, Workspace, disk_errors, project_root, read_card
from fiqa_helpers.machinery import checks
from fiqa_helpers.profiles import load_profile, planned_profile
from fiqa_helpers.run import start as start_notebook

app = Typer(help=__doc__, add_completion=False, pretty_exceptions_enable=False)
ProfileName = Annotated[str, Option("--profile", help="laptop, gpu24, gpu80; auto: the largest that fits")]
Overrides = Annotated[str, Option(metavar="YAML", help='replaces settings of the profile: "{max_steps: 20}"')]
Workdir = Annotated[str, Option(metavar="FOLDER", help="where runs write; default: the project's folder")]
Only = Annotated[str, Option(metavar="NN", help="notebooks to run: 04, or 01,02, or 00-03, or 04-")]
Own = Annotated[list[str], Option("-p", metavar="NAME=VALUE", help="a notebook's own parameter: -p rows=48")]
Offline = Annotated[bool, Option("--offline", help="the night before: model and data are on this disk")]
Questions = Annotated[list[str], Argument(metavar="QUESTION...", help="in quotation marks")]
Folders = Annotated[list[str], Argument(metavar="FOLDER...", help="what was --workdir of a try")]

told: list[int] = []  # the signals that were passed on


@app.command()
def run(
    profile: ProfileName = "auto",
    overrides: Overrides = "",
    workdir: Workdir = "",
    only: Only = "",
    own: Own = (),
) -> None:
    """Execute the notebooks in order; ends with a table of results."""
    load_profile(profile, overrides)  # a wrong one is refused before a kernel starts
    workspace = Workspace(workdir)
    notebooks = choose(project_root() / "notebooks", only)
    # The kernel works in the project's folder: a relative workdir is the caller's.
    values = {"profile": profile, "overrides": overrides, "workdir": workdir and str(workspace.root)}
    values |= {name: yaml.safe_load(value) for name, _, value in (text.partition("=") for text in own)}
    known = {notebook: papermill.inspect_notebook(str(notebook)) for notebook in notebooks}
    if unknown := values.keys() - set().union(*known.values()):
        raise WorkshopError(f"-p {unknown.pop()}: no such parameter in {', '.join(p.stem for p in known)}.")
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # before a kernel of that name in the user's own folder
    fits, found = checks.kernel()
    if not fits:
        raise WorkshopError(f"{found}, not {sys.executable}: {checks.KERNEL}.")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # SIGHUP: the terminal was closed
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it
            signal.signal(number, pass_on)
    for position, (notebook, names) in enumerate(known.items(), start=1):
        label = f"[{position}/{len(known)}] {notebook.stem}"
        execute(notebook, workspace, {name: values[name] for name in names if name in values}, label)
    print()
    for notebook in notebooks:
        if card := read_card(workspace.run_cards / f"{notebook.name[:2]}.json"):
            print(f"{card['notebook']:20} {card['seconds'] / 60:5.1f} min  {card['figure']}")
    print(f"\nExecuted notebooks: {workspace.outputs / 'executed'}")


def choose(folder: Path, only: str = "") -> list[Path]:
    """The numbered notebooks of `folder` in order, or those that `only` names: "04", "01,02", "00-03", "04-".

    Raises:
        WorkshopError: `only` names a notebook that is not there.
    """
    notebooks = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    wanted = set()
    for part in only.split(",") if only else ["00-"]:
        first, dash, last = part.partition("-")
        named = [path for path in notebooks if first <= path.name[:2] <= (last or ("99" if dash else first))]
        if not named:
            raise WorkshopError(f"--only names {part!r}, and there is no such notebook in {folder}.")
        wanted.update(named)
    return sorted(wanted)


def execute(notebook: Path, workspace: Workspace, values: dict, label: str) -> None:
    """Run one notebook with `values` as parameters.

    What was executed stays in outputs/executed/ either way. A terminal sees papermill's bar, a log one line.

    Raises:
        WorkshopError: a cell failed, the kernel died, the disk is full, or a signal came.
    """
    output = workspace.outputs / "executed" / notebook.name
    output.parent.mkdir(exist_ok=True)
    if not sys.stderr.isatty():
        print(f"{label} ...", file=sys.stderr)
    why = f"`--only {notebook.name[:2]}-` begins with it again."
    try:
        with disk_errors(output.parent, "set workdir to another folder, then run the same command again"):
            papermill.execute_notebook(
                notebook,
                output,
                parameters=values,
                kernel_name="python3",
                progress_bar={"desc": label, "disable": None},  # None: where no terminal is
                cwd=project_root(),
                # ipykernel's own log: a warning about local ports, a traceback when it is interrupted.
                extra_arguments=["--IPKernelApp.log_level=50"],
            )
        if not told:
            return
    except PapermillExecutionError as error:
        why = f"{error.ename}: {error.evalue}\nExecuted so far: {output}".removeprefix("WorkshopError: ")
    except DeadKernelError:
        if not told:
            why = "its kernel died, most often because memory ran out: lower tokens_per_batch with overrides."
    raise WorkshopError(f"{notebook.stem} stopped: {why}")


def pass_on(number: int, frame: object) -> None:
    """Pass a signal on to the kernel, and go on waiting for it; papermill would end and leave it behind.

    A kernel that trains finishes its step, writes a checkpoint and says how to go on; another one ends at
    once. A second Ctrl-C kills; a second SIGTERM waits for the checkpoint.
    """
    kernels = psutil.Process().children()
    if not kernels:  # it has not started yet: nothing is lost
        raise KeyboardInterrupt
    if not told:
        kernels[0].terminate()
    elif number == signal.SIGINT:
        kernels[0].kill()
    told.append(number)


@app.command()
def check(
    profile: ProfileName = "auto", overrides: Overrides = "", workdir: Workdir = "", offline: Offline = False
) -> None:
    """Print one line for each requirement, for bug reports too. Exit code 1: one is not met."""
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first imported
    results = checks.checks(Workspace(workdir), planned_profile(profile, overrides), offline)
    print(checks.report(results))
    sys.exit(int(not all(result.ok for result in results)))


@app.command()
def ask(
    questions: Questions, profile: ProfileName = "auto", overrides: Overrides = "", workdir: Workdir = ""
) -> None:
    """Answer with the untuned and the tuned model side by side, as notebook 05 does.

    It needs the adapter of notebook 04. Without one, a precomputed adapter answers where model, data, prompt
    and training answers are its own, and says so.
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

    print("Loading the base model and the adapter; then both answer ...", file=sys.stderr)
    tuned = PeftModel.from_pretrained(model.load_base(profile), folder)
    asked = (tuned, tokenizer, questions, profile.prompt, profile.max_new_tokens)
    with tuned.disable_adapter():
        answers = {"base": generate.generate_answers(*asked)}
    print(show.answers(questions, answers | {"tuned": generate.generate_answers(*asked)}).text)


INTERVAL = "{base:.2f} -> {tuned:.2f} ({low:+.2f} to {high:+.2f}, {rows} rows)"
RESULTS = {  # of notebook 06's comparisons: title, and how it is written
    "similarity": ("topic, 95 %", INTERVAL),
    "voice": ("voice", "{base:.2f} -> {tuned:.2f}"),
    "stopped": ("ended by itself", "{base:.0%} -> {tuned:.0%}"),
}


@app.command()
def compare(folders: Folders) -> None:
    """Lay tries side by side, a column each, from their run cards: what came out, which settings differ."""
    import pandas

    tries, head = {}, ["notebook 04", *(title for title, _ in RESULTS.values()), "last notebook"]
    for folder in folders:
        paths = sorted(Path(folder).glob("outputs/run_cards/*.json"))
        cards = {path.stem: card for path in paths if (card := read_card(path))}
        found = cards.get("06", {}).get("facts", {}).get("comparisons", {})
        one = {title: how.format(**found[name]) for name, (title, how) in RESULTS.items() if name in found}
        if cards:
            last = max(cards.values(), key=lambda card: card.get("written", ""))
            one |= {"last notebook": last["notebook"], **last["profile"]}
        tries[folder] = one | ({"notebook 04": cards["04"]["figure"]} if "04" in cards else {})
    table = pandas.DataFrame(tries).map(str, na_action="ignore")
    changed = [name for name in table.index if name not in head and table.loc[name].nunique() > 1]
    print(table.reindex([*head, *changed]).to_string(na_rep="-"))


def main(arguments: list[str] | None = None) -> None:
    """Run one command and end the process with its exit code."""
    sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 gets a ? instead of a traceback
    try:
        app(arguments, prog_name="python -m fiqa_helpers")
    except (WorkshopError, yaml.YAMLError) as error:
        print(f"\n{error}", file=sys.stderr)
        sys.exit(130 if signal.SIGINT in told else 1)


if __name__ == "__main__":
    main()
