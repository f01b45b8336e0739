"""`make lab` as typed, a notebook in it as Chromium shows it, and the live panel on its page.

The waits are for JupyterLab's own promises (application, document, session, kernel) and for what appears on
the page, never for a time.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import nbformat
from checkout import PROJECT, checkout, new_shell

from fiqa_helpers.base import cache_dir

NAMES = {path.name[:2]: path.name for path in sorted((PROJECT / "notebooks").glob("0[0-6]_*.ipynb"))}
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
SHOTS = PROJECT / "outputs" / "screenshots"
READY = """async () => {
  const app = window.jupyterapp; await app.restored;
  const tab = app.shell.currentWidget; await tab.context.ready; await tab.revealed;
  await tab.sessionContext.ready; await tab.sessionContext.session.kernel.info;
}"""
RUN_ALL = """() => {
  window.ran = undefined;
  window.jupyterapp.commands.execute('notebook:run-all-cells').then(ok => { window.ran = ok ?? true });
}"""
DONE = """() => window.ran !== undefined
  && window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status === 'idle'"""
CELLS = """() => [...window.jupyterapp.shell.currentWidget.content.model.cells].filter(c => c.type === 'code')
  .map(c => ({id: c.id, count: c.executionCount, outputs: c.outputs.toJSON()}))"""
SHUT_DOWN = "async () => await window.jupyterapp?.serviceManager.sessions.shutdownAll().catch(() => {})"


def chromium() -> str | None:
    """Chromium's path: $CHROMIUM, else what the system has; None without one."""
    return os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


@contextlib.contextmanager
def make_lab(folder: Path, *options: str):
    """`make lab` in a copy of the checkout and an empty home beside it; gives address and token."""
    home = checkout(folder).with_name("home")
    home.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token, address = secrets.token_hex(16), f"http://127.0.0.1:{port}"
    arguments = (
        f"--no-browser --ServerApp.port={port} --ServerApp.port_retries=0 --IdentityProvider.token={token}"
    )
    arguments += " --LabApp.expose_app_in_browser=True --MappingKernelManager.cull_interval=1"
    environment = new_shell(folder, HOME=str(home), FIQA_CACHE=str(cache_dir()))
    environment = {name: value for name, value in environment.items() if not name.startswith("JUPYTER")}
    command, log = ["make", "lab", f"ARGS={arguments}", *options], home / "server.log"
    with log.open("w") as out:  # in a process group of its own
        server = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=out, stderr=out, start_new_session=True
        )
    try:
        end = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{address}/api/status?token={token}", timeout=5).close()
                break
            late = server.poll() is not None or time.monotonic() > end
            assert not late, f"JupyterLab did not start:\n{log.read_text()[-3000:]}"
            time.sleep(0.2)
        yield address, token
    finally:
        with contextlib.suppress(ProcessLookupError):  # it never came up
            os.killpg(server.pid, signal.SIGTERM)  # the server ends its kernels too
        server.wait(60)


def place(folder: Path, workdir: Path, number: str, last="", first="", name="", **parameters) -> str:
    """Copy notebook `number` into `folder` as `name`, with parameters as papermill injects them.

    `first` and `last` are sources of cells to add after the parameters and at the end: what a test arranges
    in the kernel, and what it wants to read from there.
    """
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    values = {"profile": "laptop", "workdir": str(workdir), **parameters}
    notebook = parameterize_notebook(load_notebook_node(str(PROJECT / "notebooks" / NAMES[number])), values)
    tags = [cell.metadata.get("tags", []) for cell in notebook.cells]
    at = 1 + next(i for i, found in enumerate(tags) if "injected-parameters" in found)
    notebook.cells.insert(at, nbformat.v4.new_code_cell(first or "pass", id="first"))
    notebook.cells.append(nbformat.v4.new_code_cell(last or "pass", id="last"))
    name = name or f"{workdir.name}_{NAMES[number]}"
    (folder / name).write_text(json.dumps(notebook), encoding="utf-8")
    return name


class Notebook:
    """A notebook that is open in JupyterLab, its kernel ready."""

    def __init__(self, page, address: str, token: str, name: str):
        self.page, self.name = page, name
        page.goto(f"{address}/lab/tree/{name}?token={token}&reset")
        page.wait_for_selector(".jp-NotebookPanel .jp-Notebook", timeout=120_000)
        page.evaluate(READY)
        self.command("application:toggle-left-area")  # the file list, in the way of the screenshots

    def command(self, name: str, **arguments) -> None:
        """Run one of JupyterLab's commands, as its menus and buttons do."""
        go = f"window.jupyterapp.commands.execute('{name}', {json.dumps(arguments)})"
        self.page.evaluate(f"async () => {{ await {go} }}")

    def run_all(self, seconds: float = 0) -> None:
        """Start Run All, and wait for its end if `seconds` are given."""
        self.page.evaluate(RUN_ALL)
        if seconds:
            self.wait_until_done(seconds)

    def wait_until_done(self, seconds: float) -> None:
        self.page.wait_for_function(DONE, timeout=1000 * seconds)

    def outputs(self, cell_id: str = "") -> list[dict]:
        """The outputs of a cell, or of all of them, as nbformat keeps them."""
        cells = self.page.evaluate(CELLS)
        return [out for cell in cells if cell_id in ("", cell["id"]) for out in cell["outputs"]]

    def errors(self) -> list[str]:
        """What went wrong: error outputs, cells that were not run, dialogs on the page."""
        found = [
            f"{out['ename']}: {out['evalue']}" for out in self.outputs() if out["output_type"] == "error"
        ]
        found += [f"{cell['id']} was not run" for cell in self.page.evaluate(CELLS) if not cell["count"]]
        return found + self.page.locator(".jp-Dialog").all_inner_texts()

    def text(self, cell_id: str = "") -> str:
        """All plain text that a cell, or all of them, printed or displayed."""
        texts = [
            out.get("text") or out.get("data", {}).get("text/plain", "") for out in self.outputs(cell_id)
        ]
        return "\n".join(text if isinstance(text, str) else "".join(text) for text in texts)

    def shot(self, name: str, of: str | None = None, only: str | None = None) -> None:
        """A screenshot in outputs/screenshots: the page where `of` is found, or the element `only` alone."""
        if of is not None:  # scroll there, as a reader would
            self.page.evaluate("s => document.querySelector(s)?.scrollIntoView({block: 'center'})", of)
        SHOTS.mkdir(parents=True, exist_ok=True)
        (self.page if only is None else self.page.locator(only)).screenshot(path=SHOTS / f"{name}.png")


PANEL = ".fiqa-panel"
STEP = "Number(document.querySelector('.fiqa-panel .bar')?.getAttribute('aria-valuenow') ?? -1)"


def at_step(page, step: int, seconds: int = 300) -> int:
    """Wait until the panel shows at least `step` optimizer steps done; gives what it shows."""
    page.wait_for_function(f"() => {STEP} >= {step}", timeout=1000 * seconds)
    return page.evaluate(f"() => {STEP}")


def press(page, label: str) -> None:
    page.locator(f"{PANEL} .jupyter-button", has_text=label).click()
