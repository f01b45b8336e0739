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

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--no-first-run",
]
SHOTS = Path(__file__).resolve().parents[2] / "outputs" / "screenshots"


def chromium() -> str | None:
    """Chromium's path: $CHROMIUM, else what the system has; None without one."""
    return os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


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

SOURCES = """() => [...window.jupyterapp.shell.currentWidget.content.model.cells]
  .map(c => ({id: c.id, source: c.sharedModel.getSource()}))"""


@contextlib.contextmanager
def jupyterlab(folder: Path, theme: str = "JupyterLab Light", seconds: float = 120):
    """Serve `folder`; gives address and token. Everything the server writes is in a temporary home."""
    with tempfile.TemporaryDirectory(prefix="jupyterlab-", ignore_cleanup_errors=True) as home:
        _settings(
            home, "notification", {"fetchNews": "false", "checkForUpdates": False}
        )  # no pop-up, no network
        _settings(home, "themes", {"theme": theme})
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        token, address = secrets.token_hex(16), f"http://127.0.0.1:{port}"
        command = [
            *(
                sys.executable,
                "-m",
                "jupyterlab",
                "--no-browser",
                "--allow-root",
                "--ip=127.0.0.1",
                f"--port={port}",
            ),
            *(
                "--ServerApp.port_retries=0",
                f"--IdentityProvider.token={token}",
                f"--ServerApp.root_dir={folder}",
            ),
            "--LabApp.expose_app_in_browser=True",
        ]
        with open(f"{home}/server.log", "w+") as log:
            server = subprocess.Popen(
                command, env=_environment(home), stdout=log, stderr=log, start_new_session=True
            )
            try:
                _await(server, f"{address}/api/status?token={token}", seconds, log)
                yield address, token
            finally:
                server.send_signal(signal.SIGTERM)  # it ends its kernels too
                try:
                    server.wait(30)
                except subprocess.TimeoutExpired:
                    server.kill()


def _environment(home: str) -> dict:
    own = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "run",
           "IPYTHONDIR": "ipython", "JUPYTERLAB_SETTINGS_DIR": "settings",
           "JUPYTERLAB_WORKSPACES_DIR": "workspaces"}  # fmt: skip
    return {**os.environ, **{name: f"{home}/{folder}" for name, folder in own.items()}}


def _settings(home: str, plugin: str, values: dict) -> None:
    path = Path(home, f"settings/@jupyterlab/apputils-extension/{plugin}.jupyterlab-settings")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values), encoding="utf-8")


def _await(server: subprocess.Popen, url: str, seconds: float, log) -> None:
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(url, timeout=5).close()
            return
        if server.poll() is not None or time.monotonic() > end:
            log.seek(0)
            raise RuntimeError(f"JupyterLab did not start:\n{log.read()[-3000:]}")
        time.sleep(0.2)


class Notebook:
    """A notebook that is open in JupyterLab, its kernel ready."""

    def __init__(self, page, address: str, token: str, name: str):
        self.page, self.name = page, name
        page.goto(f"{address}/lab/tree/{name}?token={token}&reset")
        page.wait_for_selector(".jp-NotebookPanel .jp-Notebook", timeout=120_000)
        page.evaluate(READY)
        self.command("application:toggle-left-area")  # the file list, in the way of the screenshots

    def command(self, name: str, wait: bool = True) -> None:
        """Run one of JupyterLab's commands, as its menus and buttons do."""
        go = f"window.jupyterapp.commands.execute('{name}')"
        self.page.evaluate(f"async () => {{ await {go} }}" if wait else f"() => {{ {go} }}")

    def run_all(self) -> None:
        """Start Run All; `wait_until_done` waits for it."""
        self.page.evaluate(RUN_ALL)

    def wait_until_done(self, seconds: float) -> None:
        self.page.wait_for_function(DONE, timeout=1000 * seconds)

    def wait_for_kernel(self) -> None:
        """After a restart."""
        self.page.evaluate(READY)

    def close(self) -> None:
        """End the kernel (a model's memory) and the page."""
        self.page.evaluate(
            "async () => await window.jupyterapp.shell.currentWidget.sessionContext.shutdown()"
        )
        self.page.close()

    @property
    def running(self) -> bool:
        return self.page.evaluate("() => window.ran === undefined")

    def cells(self) -> list[dict]:
        """The code cells: id, execution count and outputs as nbformat keeps them."""
        return self.page.evaluate(CELLS)

    def sources(self) -> list[dict]:
        """All cells: id and source."""
        return self.page.evaluate(SOURCES)

    def errors(self) -> list[str]:
        """What went wrong: error outputs of cells and error dialogs on the page."""
        found = [out for cell in self.cells() for out in cell["outputs"] if out["output_type"] == "error"]
        dialogs = self.page.locator(".jp-Dialog").all_inner_texts()
        return [f"{out['ename']}: {out['evalue']}" for out in found] + dialogs

    def text(self, cell_id: str) -> str:
        """All plain text that a cell printed or displayed."""
        cell = next(cell for cell in self.cells() if cell["id"] == cell_id)
        texts = [out.get("text") or out.get("data", {}).get("text/plain", "") for out in cell["outputs"]]
        return "\n".join(text if isinstance(text, str) else "".join(text) for text in texts)

    def save(self, folder: Path) -> dict:
        """Save as Ctrl+S does and read the file back."""
        self.command("docmanager:save")
        return json.loads((folder / self.name).read_text(encoding="utf-8"))

    def show(self, selector: str) -> None:
        """Scroll to the first element that fits, as a reader would."""
        self.page.evaluate("s => document.querySelector(s)?.scrollIntoView({block: 'center'})", selector)

    def shot(self, name: str, of: str | None = None, only: str | None = None) -> Path:
        """A screenshot in outputs/screenshots: the page where `of` is found, or the element `only` alone."""
        if of is not None:
            self.show(of)
        SHOTS.mkdir(parents=True, exist_ok=True)
        path = SHOTS / f"{name}.png"
        (self.page if only is None else self.page.locator(only)).screenshot(path=path)
        return path
