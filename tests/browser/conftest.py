"""Fixtures of the browser tests: one JupyterLab for all, a fresh page for each."""

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from browser import SHUT_DOWN, make_lab  # noqa: E402


@pytest.fixture(scope="session")
def served(tmp_path_factory) -> Path:
    """The copy of the checkout that JupyterLab serves."""
    return tmp_path_factory.mktemp("lab") / "served"


@pytest.fixture(scope="session")
def lab(served, browser):
    with make_lab(served) as (address, token):
        yield address, token


@pytest.fixture
def page(browser):
    context = browser.new_context(viewport={"width": 1360, "height": 1080})
    page = context.new_page()
    yield page
    page.evaluate(SHUT_DOWN)  # a kernel holds a model's memory until it is told to end
    context.close()
