"""Fixtures of the browser tests: one JupyterLab for all, a fresh page for each."""

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from browser import jupyterlab  # noqa: E402


def pytest_collection_modifyitems(items):
    """Everything here is marked `browser`; the fixture of that name skips where Chromium is missing."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def served(tmp_path_factory) -> Path:
    """The folder that JupyterLab serves; nothing is ever saved in the checkout."""
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="session")
def lab(served, browser):
    with jupyterlab(served) as (address, token):
        yield address, token


@pytest.fixture
def page(browser):
    context = browser.new_context(viewport={"width": 1360, "height": 1080})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    yield page
    # a kernel holds a model's memory until it is told to end
    page.evaluate("async () => await window.jupyterapp?.shell.currentWidget?.sessionContext?.shutdown()")
    context.close()
