"""The files around the code: container and git hooks. What they name must be there."""

import json
import os
import re
import shlex
import subprocess
import sys

import nbformat
import pytest
import yaml
from checkout import PROJECT, checkout, new_shell


def test_the_dockerfile_names_what_there_is():
    """No engine has built it: a file copied too late, or another way to install than the Makefile's."""
    text = (PROJECT / "Dockerfile").read_text(encoding="utf-8")
    steps = re.findall(r"^([A-Z]+) (.*)$", text.replace("\\\n", " "), re.MULTILINE)
    before = steps[: steps.index(("RUN", "make env"))]
    copied = [name for kind, rest in before if kind == "COPY" for name in shlex.split(rest)[:-1]]
    assert all((PROJECT / name).exists() for name in copied) and ("COPY", ". .") in steps
    assert {"Makefile", "scripts", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"} <= set(copied)
    assert json.loads(dict(steps)["CMD"])[:2] == ["make", "lab"]
    published = re.findall(r"docker run.* -p (\S+)", text + (PROJECT / "README.md").read_text("utf-8"))
    assert published and all(address.startswith("127.0.0.1:") for address in published)
    ignored, written = ((PROJECT / f".{tool}ignore").read_text().splitlines() for tool in ("docker", "git"))
    assert {line.strip("/") for line in written if line.startswith("/")} - {"dist"} <= set(ignored)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A clone in which `git commit` runs the hooks."""
    folder = checkout(tmp_path_factory.mktemp("hooks"))
    for arguments in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *arguments], cwd=folder, check=True)
    return folder


def pre_commit(clone, *arguments: str, **more: str) -> subprocess.CompletedProcess:
    """pre-commit with a cache of its own, and every proxy leading nowhere."""
    nowhere = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
    more |= {"PRE_COMMIT_HOME": str(clone.parent / "pre-commit"), "PIP_NO_INDEX": "1"}
    command = [sys.executable, "-m", "pre_commit", "run", *arguments]
    return subprocess.run(
        command, cwd=clone, env=new_shell(clone, **nowhere, **more), capture_output=True, text=True
    )


def test_hooks_pass_on_what_is_committed_without_a_network(clone):
    """Hooks that a project does not pass itself, or that want to download something, get switched off.

    (The hook that runs a file of tests is left out: those are run anyway.)
    """
    run = pre_commit(clone, "--all-files", SKIP="notebook-style")
    assert run.returncode == 0, run.stdout + run.stderr
    hooks = yaml.safe_load((PROJECT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert run.stdout.count("Passed") == len(hooks) - 1


def test_hooks_find_what_they_are_for(clone):
    """An output in a notebook and an unused import; the ids of cells, which links rest on, must be kept."""
    path, module = clone / "notebooks" / "01_explore_fiqa.ipynb", clone / "fiqa_helpers" / "base.py"
    clean = path.read_bytes()
    notebook = nbformat.read(path, as_version=4)
    cell = next(cell for cell in notebook.cells if cell.cell_type == "code")
    cell.execution_count, cell.outputs = 7, [nbformat.v4.new_output("stream", text="a private figure")]
    nbformat.write(notebook, path)
    module.write_text("import this_is_unused\n" + module.read_text())
    subprocess.run(["git", "add", "-A"], cwd=clone, check=True)
    assert "F401" in pre_commit(clone, "ruff", "--files", str(module)).stdout
    assert "files were modified" in pre_commit(clone, "nbstripout", "--files", str(path)).stdout
    assert path.read_bytes() == clean


@pytest.mark.parametrize("there", ["an environment", "none"])
def test_hooks_take_the_environment_that_is_there(tmp_path, there):
    """git runs hooks with whatever Python is first on PATH, often one without ruff."""
    pythons = [tmp_path / "bin", *([tmp_path / ".venv" / "bin"] if there == "an environment" else [])]
    for folder in pythons:
        folder.mkdir(parents=True)
        (folder / "python").write_text(f"#!/bin/sh\necho {folder.parent.name}\n")
        (folder / "python").chmod(0o755)
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    said = subprocess.check_output(
        [PROJECT / "scripts" / "python.sh"], cwd=tmp_path, env=environment, text=True
    )
    assert said.strip() == pythons[-1].parent.name
