"""The files around the code: container, git hooks, licence, citation. What they name must be there."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import nbformat
import pytest
import yaml
from checkout import PROJECT, checkout, new_shell


def read(name: str) -> str:
    return (PROJECT / name).read_text(encoding="utf-8")


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile as (instruction, rest) pairs."""
    lines = re.sub(r"^\s*#.*\n", "", read("Dockerfile"), flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines if line.strip())]


def test_dockerfile_copies_what_there_is(tmp_path):
    """No engine has built it: at least every file that it copies must exist, and come before it is used."""
    copied = [word for name, rest in instructions() if name == "COPY" for word in shlex.split(rest)[:-1]]
    assert copied[-1] == "." and all((PROJECT / name).exists() for name in copied)
    before = copied[:-1]
    # `make env` on these files alone: a fake Python that records pip's calls stands for the base image's.
    for name in before:
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (PROJECT / name).is_dir() else shutil.copy
        copy(PROJECT / name, target)
    stand_in = tmp_path / "python"
    stand_in.write_text(
        "#!/bin/sh\n"
        'if [ "$1 $2" = "-m venv" ]; then\n'
        '  mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; touch "$3/pyvenv.cfg"\n'
        "fi\n"
        'case "$2" in pip) echo "$@" >>calls ;; esac\n'
        f'if [ "$1" = -I ]; then "{sys.executable}" "$@" >/dev/null && echo "$0"; fi\n'
    )
    stand_in.chmod(0o755)
    run = subprocess.run(
        ["make", "env"],
        cwd=tmp_path,
        env=new_shell(tmp_path, VENV=str(tmp_path / "env"), PYTHON=str(stand_in)),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "-c constraints.txt" in (tmp_path / "calls").read_text()
    assert {"README.md", "LICENSE"} <= set(before), "setuptools reads them when pip installs the project"


def test_dockerfile_runs_the_same_commands(project):
    """A second way to install would drift from the Makefile's; a published port would be open to others."""
    kinds = dict(instructions())
    assert kinds["RUN"] == "make env"
    assert json.loads(kinds["CMD"])[:2] == ["make", "lab"]
    assert re.search(r"FROM python:3\.1[23]-", read("Dockerfile"))
    assert "VENV=/opt/fiqa-workshop" in kinds["ENV"]
    published = re.findall(r"docker run.* -p (\S+)", read("Dockerfile") + read("README.md"))
    assert published and all(address.startswith("127.0.0.1:") for address in published)
    ignored = set(read(".dockerignore").splitlines())
    written = [line.strip("/") for line in read(".gitignore").splitlines() if line.startswith("/")]
    assert {name for name in written if name != "dist"} <= ignored, "what runs write would go into the image"


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A clone in which `git commit` runs the hooks."""
    folder = checkout(tmp_path_factory.mktemp("hooks"))
    for arguments in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *arguments], cwd=folder, check=True)
    return folder


def pre_commit(clone, *arguments: str) -> subprocess.CompletedProcess:
    """pre-commit with a cache of its own, and every proxy leading nowhere."""
    nowhere = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
    environment = new_shell(
        clone, PRE_COMMIT_HOME=str(clone.parent / "pre-commit"), **nowhere, PIP_NO_INDEX="1"
    )
    command = [sys.executable, "-m", "pre_commit", *arguments]
    return subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("left_out", ["notebook-style", pytest.param("", marks=pytest.mark.slow)])
def test_hooks_pass_on_what_is_committed_without_a_network(clone, monkeypatch, left_out):
    """Hooks that a project does not pass itself, or that want to download something, get switched off.

    (The quick tests leave out the hook that runs a file of tests which they run anyway.)
    """
    monkeypatch.setenv("SKIP", left_out)
    run = pre_commit(clone, "run", "--all-files")
    assert run.returncode == 0, run.stdout + run.stderr
    hooks = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"][0]["hooks"]
    assert run.stdout.count("Passed") == len(hooks) - bool(left_out)


def test_hooks_find_what_they_are_for(clone):
    """An output in a notebook and an unused import; the ids of cells, which links rest on, must be kept."""
    path = clone / "notebooks" / "01_explore_fiqa.ipynb"
    clean = path.read_bytes()
    notebook = nbformat.read(path, as_version=4)
    cell = next(cell for cell in notebook.cells if cell.cell_type == "code")
    cell.execution_count, cell.outputs = 7, [nbformat.v4.new_output("stream", text="a private figure")]
    nbformat.write(notebook, path)
    module = clone / "fiqa_helpers" / "base.py"
    module.write_text("import this_is_unused\n" + module.read_text())
    subprocess.run(["git", "add", "-A"], cwd=clone, check=True)
    run = pre_commit(clone, "run", "ruff", "--files", str(module))
    assert run.returncode == 1 and "F401" in run.stdout
    run = pre_commit(clone, "run", "nbstripout", "--files", str(path))
    assert run.returncode == 1 and "files were modified" in run.stdout
    assert path.read_bytes() == clean


@pytest.mark.parametrize("there", ["an environment", "none"])
def test_hooks_take_the_environment_that_is_there(tmp_path, there):
    """git runs hooks with whatever Python is first on PATH, often one without ruff."""
    if there == "an environment":
        (tmp_path / ".venv" / "bin").mkdir(parents=True)
        (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text("#!/bin/sh\necho another\n")
    (tmp_path / "bin" / "python").chmod(0o755)
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    command = [str(PROJECT / "scripts" / "python.sh"), "-c", "print('its own')"]
    said = subprocess.check_output(command, cwd=tmp_path, env=environment, text=True)
    assert said.strip() == ("its own" if there == "an environment" else "another")
