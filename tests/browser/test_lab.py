"""`make lab` as typed: JupyterLab opens on the workshop, and leaves the person's own one alone."""

import contextlib
import os
import secrets
import signal
import socket
import subprocess

import pytest
from browser import READY, SHOTS, _await
from checkout import checkout, new_shell


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    with make_lab(tmp_path_factory) as lab:
        yield lab


@contextlib.contextmanager
def make_lab(tmp_path_factory, *options: str, more: str = ""):
    """`make lab` in a copy of the checkout, in a home without Jupyter's folders: (address, copy, home)."""
    folder, home = checkout(tmp_path_factory.mktemp("checkout")), tmp_path_factory.mktemp("home")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    arguments = (
        f"--no-browser --ServerApp.port={port} --ServerApp.port_retries=0 --IdentityProvider.token={token}"
    )
    arguments += f" --LabApp.expose_app_in_browser=True {more}"
    environment = new_shell(folder, HOME=str(home), JUPYTER_RUNTIME_DIR=str(home / "runtime"))
    for name in (
        "JUPYTER_CONFIG_DIR",
        "JUPYTER_DATA_DIR",
        "JUPYTERLAB_SETTINGS_DIR",
        "JUPYTERLAB_WORKSPACES_DIR",
    ):
        environment.pop(name, None)
    with (home / "server.log").open("w+") as log:
        command = ["make", "lab", f"ARGS={arguments}", *options]
        server = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            _await(server, f"http://127.0.0.1:{port}/api/status?token={token}", 120, log)
            yield f"http://127.0.0.1:{port}/?token={token}", folder, home
        finally:
            with contextlib.suppress(ProcessLookupError):  # it never came up: the log says why
                os.killpg(server.pid, signal.SIGTERM)
            server.wait(60)


def test_it_opens_on_the_first_notebook_with_its_contents(opened, page):
    """Without a layout JupyterLab opens a list of files; without settings it asks about news first."""
    address, folder, home = opened
    called = []
    page.on("request", lambda request: called.append(request.url))
    page.goto(address)
    page.wait_for_selector(".jp-NotebookPanel .jp-Notebook", timeout=120_000)
    page.evaluate(READY)
    assert (
        page.evaluate("() => jupyterapp.shell.currentWidget.context.path") == "notebooks/00_start_here.ipynb"
    )
    contents = page.locator(".jp-TableOfContents:visible")
    contents.get_by_text("Checkpoint").wait_for(timeout=30_000)
    assert contents.get_by_text("00 · Start here").is_visible()
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / "lab-opened.png")
    assert page.locator(".jp-toast-message, .Toastify__toast").count() == 0  # "would you like to get news"
    tracker = "(await jupyterapp.serviceManager.settings.fetch('@jupyterlab/notebook-extension:tracker'))"
    assert page.evaluate(f"async () => {tracker}.schema.properties.kernelShutdown.default") is True
    saving = "(await jupyterapp.serviceManager.settings.fetch('@jupyterlab/docmanager-extension:plugin'))"
    assert page.evaluate(f"async () => {saving}.schema.properties.autosaveInterval.default") == 15
    page.evaluate("() => jupyterapp.commands.execute('filebrowser:activate')")
    page.locator(".jp-DirListing-item", has_text="04_train.ipynb").wait_for(timeout=30_000)
    page.screenshot(path=SHOTS / "lab-files.png")
    elsewhere = [url for url in called if "//127.0.0.1" not in url and not url.startswith(("data:", "blob:"))]
    assert not elsewhere, elsewhere


def test_it_keeps_its_layout_in_the_project_and_touches_no_settings_of_the_user(opened):
    """A workshop that overwrites somebody's JupyterLab settings is not opened twice."""
    _, folder, home = opened
    assert list((folder / "outputs" / "jupyterlab").glob("workshop-*"))
    written = [path for path in (home / ".jupyter").rglob("*") if path.is_file()]
    assert not [path for path in written if "lab" in path.parts], written


def test_the_notebooks_stay_as_they_are(opened):
    """Opening must not write widget state or trust marks into the files under version control."""
    _, folder, _ = opened
    from checkout import PROJECT

    for path in (PROJECT / "notebooks").glob("*.ipynb"):
        assert (folder / "notebooks" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.slow
def test_an_idle_kernel_ends_and_what_was_typed_stays(tmp_path_factory, page):
    """Kernels of notebooks that were left pile up to much memory; ending them could lose what was typed."""
    often = "--MappingKernelManager.cull_interval=1"
    with make_lab(tmp_path_factory, "IDLE=5", more=often) as (address, _, _):
        page.goto(address)
        page.wait_for_selector(".jp-NotebookPanel .jp-Notebook", timeout=120_000)
        page.evaluate(READY)
        page.evaluate(TYPE)
        page.get_by_text("No Kernel").first.wait_for(timeout=60_000)
        assert page.locator(".jp-Dialog").count() == 0
        assert page.get_by_text("my_answer = 42").is_visible()
        page.screenshot(path=SHOTS / "lab-culled.png")


TYPE = """() => {
  const cell = jupyterapp.shell.currentWidget.content.model.cells.get(2);
  cell.sharedModel.setSource('my_answer = 42');
}"""
