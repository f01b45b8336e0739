"""`make lab` as typed: JupyterLab opens on the workshop, and leaves the person's own one alone."""

import contextlib
import secrets
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from browser import READY, SHOTS, free_port, server
from checkout import PROJECT, checkout, new_shell


@contextlib.contextmanager
def make_lab(tmp_path_factory, *options: str, more: str = ""):
    """`make lab` in a copy of the checkout, in a home without Jupyter's folders: (address, copy, home)."""
    folder, home = checkout(tmp_path_factory.mktemp("checkout")), tmp_path_factory.mktemp("home")
    port, token = free_port(), secrets.token_hex(16)
    arguments = f"--no-browser --ServerApp.port={port} --ServerApp.port_retries=0 {more} "
    arguments += f"--IdentityProvider.token={token} --LabApp.expose_app_in_browser=True"
    environment = new_shell(folder, HOME=str(home), JUPYTER_RUNTIME_DIR=str(home / "runtime"))
    for name in ("CONFIG_DIR", "DATA_DIR"):
        environment.pop(f"JUPYTER_{name}", None)
    for name in ("SETTINGS_DIR", "WORKSPACES_DIR"):
        environment.pop(f"JUPYTERLAB_{name}", None)
    command, address = ["make", "lab", f"ARGS={arguments}", *options], f"http://127.0.0.1:{port}"
    with server(command, f"{address}/api/status?token={token}", folder, environment, home / "server.log"):
        yield f"{address}/?token={token}", folder, home


def open_page(page, address: str) -> None:
    page.goto(address)
    page.wait_for_selector(".jp-NotebookPanel .jp-Notebook", timeout=120_000)
    page.evaluate(READY)
    SHOTS.mkdir(parents=True, exist_ok=True)


def setting(page, plugin: str, name: str):
    """The default of one of JupyterLab's settings."""
    found = f"(await jupyterapp.serviceManager.settings.fetch('@jupyterlab/{plugin}'))"
    return page.evaluate(f"async () => {found}.schema.properties.{name}.default")


def test_it_opens_on_the_first_notebook_with_its_contents(tmp_path_factory, page):
    """Without a layout it opens a list of files and asks about news; or it spoils what is not its own."""
    called = []
    page.on("request", lambda request: called.append(request.url))
    with make_lab(tmp_path_factory) as (address, folder, home):
        with pytest.raises(urllib.error.HTTPError, match="403"):  # without its token
            urllib.request.urlopen(address.replace("/?token=", "/api/contents?token=no"))
        port = urlsplit(address).port
        listening = {place.laddr for place in psutil.net_connections() if place.status == "LISTEN"}
        assert [place.ip for place in listening if place.port == port] == ["127.0.0.1"]
        open_page(page, address)
        where = page.evaluate("() => jupyterapp.shell.currentWidget.context.path")
        assert where == "notebooks/00_start_here.ipynb"
        contents = page.locator(".jp-TableOfContents:visible")
        contents.get_by_text("Checkpoint").wait_for(timeout=30_000)
        assert contents.get_by_text("00 · Start here").is_visible()
        page.screenshot(path=SHOTS / "lab-opened.png")
        assert page.locator(".jp-toast-message, .Toastify__toast").count() == 0  # "would you like news"
        assert setting(page, "notebook-extension:tracker", "kernelShutdown") is True
        assert setting(page, "docmanager-extension:plugin", "autosaveInterval") == 15
        page.evaluate("() => jupyterapp.commands.execute('filebrowser:activate')")
        page.locator(".jp-DirListing-item", has_text="04_train.ipynb").wait_for(timeout=30_000)
        page.goto("about:blank")
    elsewhere = [url for url in called if "//127.0.0.1" not in url and not url.startswith(("data:", "blob:"))]
    assert not elsewhere, elsewhere
    assert list((folder / "outputs" / "jupyterlab").glob("workshop-*"))  # its layout is kept in the project
    assert not [path for path in Path(home, ".jupyter").rglob("lab/**/*") if path.is_file()]
    for path in (PROJECT / "notebooks").glob("*.ipynb"):  # no widget state or trust marks in them
        assert (folder / "notebooks" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.slow
def test_an_idle_kernel_ends_and_what_was_typed_stays(tmp_path_factory, page):
    """Kernels of notebooks that were left pile up to much memory; ending them could lose what was typed."""
    often = "--MappingKernelManager.cull_interval=1"
    with make_lab(tmp_path_factory, "IDLE=5", more=often) as (address, _, _):
        open_page(page, address)
        page.evaluate(TYPE)
        page.get_by_text("No Kernel").first.wait_for(timeout=60_000)
        assert page.locator(".jp-Dialog").count() == 0
        assert page.get_by_text("my_answer = 42").is_visible()
        page.screenshot(path=SHOTS / "lab-culled.png")


TYPE = """() => {
  const cell = jupyterapp.shell.currentWidget.content.model.cells.get(2);
  cell.sharedModel.setSource('my_answer = 42');
}"""
