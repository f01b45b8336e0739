"""A private JupyterLab on 127.0.0.1, and a notebook in it as Chromium shows it.

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
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
SHOTS = Path(__file__).resolve().parents[2] / "outputs" / "screenshots"
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
  .map(c => ({id: c.id, source: c.sharedModel.getSource(), count: c.executionCount,
    outputs: c.outputs.toJSON()}))"""
SHUT_DOWN = "async () => await window.jupyterapp?.shell.currentWidget?.sessionContext?.shutdown()"


def chromium() -> str | None:
    """Chromium's path: $CHROMIUM, else what the system has; None without one."""
    return os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def server(command: list[str], url: str, folder: Path, environment: dict, log_file: Path):
    """A JupyterLab in a process group of its own, from when `url` answers to the end of the block."""
    with open(log_file, "w") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            end = time.monotonic() + 120
            while True:
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(url, timeout=5).close()
                    break
                late = process.poll() is not None or time.monotonic() > end
                assert not late, f"JupyterLab did not start:\n{log_file.read_text()[-3000:]}"
                time.sleep(0.2)
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):  # it never came up
                os.killpg(process.pid, signal.SIGTERM)  # the server ends its kernels too
            process.wait(60)


@contextlib.contextmanager
def jupyterlab(folder: Path, theme: str = "JupyterLab Light"):
    """Serve `folder`; gives address and token. Everything the server writes is in a temporary home."""
    with tempfile.TemporaryDirectory(prefix="jupyterlab-", ignore_cleanup_errors=True) as home:
        quiet = {"fetchNews": "false", "checkForUpdates": False}  # no pop-up, no network
        for plugin, values in {"notification": quiet, "themes": {"theme": theme}}.items():
            path = Path(home, f"settings/@jupyterlab/apputils-extension/{plugin}.jupyterlab-settings")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(values), encoding="utf-8")
        own = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
        own = {name: f"{home}/{name}" for name in (*own, "JUPYTERLAB_WORKSPACES_DIR")}
        own["JUPYTERLAB_SETTINGS_DIR"] = f"{home}/settings"
        token, port = secrets.token_hex(16), free_port()
        command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1"]
        command += [f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}"]
        command += [f"--ServerApp.root_dir={folder}", "--LabApp.expose_app_in_browser=True"]
        address = f"http://127.0.0.1:{port}"
        status = f"{address}/api/status?token={token}"
        with server(command, status, folder, os.environ | own, Path(home, "server.log")):
            yield address, token


class Notebook:
    """A notebook that is open in JupyterLab, its kernel ready."""

    def __init__(self, page, address: str, token: str, name: str):
        self.page, self.name = page, name
        page.goto(f"{address}/lab/tree/{name}?token={token}&reset")
        page.wait_for_selector(".jp-NotebookPanel .jp-Notebook", timeout=120_000)
        self.wait_for_kernel()
        self.command("application:toggle-left-area")  # the file list, in the way of the screenshots

    def command(self, name: str, wait: bool = True) -> None:
        """Run one of JupyterLab's commands, as its menus and buttons do."""
        go = f"window.jupyterapp.commands.execute('{name}')"
        self.page.evaluate(f"async () => {{ await {go} }}" if wait else f"() => {{ {go} }}")

    def wait_for_kernel(self) -> None:
        self.page.evaluate(READY)

    def run_all(self, seconds: float = 0) -> None:
        """Start Run All, and wait for its end if `seconds` are given."""
        self.page.evaluate(RUN_ALL)
        if seconds:
            self.wait_until_done(seconds)

    def wait_until_done(self, seconds: float) -> None:
        self.page.wait_for_function(DONE, timeout=1000 * seconds)

    def close(self) -> None:
        """End the kernel (a model's memory) and the page."""
        self.page.evaluate(SHUT_DOWN)
        self.page.close()

    @property
    def running(self) -> bool:
        return self.page.evaluate("() => window.ran === undefined")

    def cells(self) -> list[dict]:
        """The code cells: id, source, execution count and outputs as nbformat keeps them."""
        return self.page.evaluate(CELLS)

    def errors(self) -> list[str]:
        """What went wrong: error outputs of cells and error dialogs on the page."""
        found = [out for cell in self.cells() for out in cell["outputs"] if out["output_type"] == "error"]
        dialogs = self.page.locator(".jp-Dialog").all_inner_texts()
        return [f"{out['ename']}: {out['evalue']}" for out in found] + dialogs

    def text(self, cell_id: str = "") -> str:
        """All plain text that a cell, or all of them, printed or displayed."""
        outputs = [out for cell in self.cells() if cell_id in ("", cell["id"]) for out in cell["outputs"]]
        texts = [out.get("text") or out.get("data", {}).get("text/plain", "") for out in outputs]
        return "\n".join(text if isinstance(text, str) else "".join(text) for text in texts)

    def save(self, folder: Path) -> dict:
        """Save as Ctrl+S does and read the file back."""
        self.command("docmanager:save")
        return json.loads((folder / self.name).read_text(encoding="utf-8"))

    def show(self, selector: str) -> None:
        """Scroll to the first element that fits, as a reader would."""
        self.page.evaluate("s => document.querySelector(s)?.scrollIntoView({block: 'center'})", selector)

    def shot(self, name: str, of: str | None = None, only: str | None = None) -> None:
        """A screenshot in outputs/screenshots: the page where `of` is found, or the element `only` alone."""
        if of is not None:
            self.show(of)
        SHOTS.mkdir(parents=True, exist_ok=True)
        (self.page if only is None else self.page.locator(only)).screenshot(path=SHOTS / f"{name}.png")
