"""The whole tutorial without a browser: papermill through the notebooks, progress, a table at the end."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fiqa_helpers.errors import WorkshopError
from fiqa_helpers.paths import Workspace, project_root
from fiqa_helpers.progress import progress
from fiqa_helpers.runcard import read_card
from fiqa_helpers.storage import disk_errors


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
    from fiqa_helpers.checks import kernel_python

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
