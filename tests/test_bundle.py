"""The stick: what is packed, and that it is enough where no network is."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from fiqa_helpers import __main__ as cli
from fiqa_helpers import base
from fiqa_helpers.base import WorkshopError
from fiqa_helpers.machinery.assets import ASSETS, local_wheel

LOOPBACK = """
import fcntl, os, socket, struct, sys
with socket.socket() as s:  # bring up lo, the only interface here: Jupyter's kernels talk over 127.0.0.1
    fcntl.ioctl(s, 0x8914, struct.pack("16sh", b"lo", 0x1 | 0x40))
os.execvp(sys.argv[1], sys.argv[1:])
"""


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """The real archive, with the real wheels (fetched once into the cache)."""
    return cli.make_bundle(tmp_path_factory.mktemp("stick") / "fiqa-workshop.tar")


@pytest.mark.slow
def test_everything_that_a_room_needs_is_in_it(packed, project):
    """A stick without its constraints or one wheel is noticed in front of twenty people."""
    with tarfile.open(packed) as archive:
        entries = archive.getmembers()
    names = {entry.name.removeprefix("fiqa-workshop/") for entry in entries}
    assert all(entry.name.startswith("fiqa-workshop/") for entry in entries)
    needed = {"constraints.txt", "pyproject.toml", "Makefile", "README.md", "START_HERE.txt"}
    needed |= {f"wheels/{asset.wheel}" for asset in ASSETS.values()}
    needed |= {str(path.relative_to(project)) for path in (project / "notebooks").glob("0*.ipynb")}
    needed |= {"notebooks/precomputed/adapter/adapter_model.safetensors"}
    assert needed <= names
    assert not [name for name in names if re.match(r"(\.git/|data/|outputs/|checkpoints/|\.venv)", name)]
    assert {(entry.uid, entry.uname) for entry in entries} == {(0, "")}
    assert all(entry.isfile() for entry in entries)
    (script,) = (entry for entry in entries if entry.name.endswith("scripts/make_env.sh"))
    assert script.mode & 0o100, "make could not start it"
    assert 190e6 < packed.stat().st_size < 220e6


@pytest.mark.slow
@pytest.mark.notebooks
@pytest.mark.timeout(3000)
def test_the_stick_is_enough_without_a_network(packed, tmp_path):
    """Unpacked, with an empty cache and no network at all: 00 to 02, then 05 and 06 from files."""
    if subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode:
        pytest.skip("unshare --net is not available here")
    with tarfile.open(packed) as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / "fiqa-workshop"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FIQA", "HF_", "PIP_"))}
    environment = kept | {"FIQA_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(folder)}
    blocked = ["unshare", "--net", sys.executable, "-c", LOOPBACK, sys.executable]

    def workshop(*arguments: str) -> str:
        command = [*blocked, "-m", "fiqa_helpers", *arguments]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr[-3000:]
        return done.stdout

    said = workshop("preflight", "--profile", "laptop")
    assert "to be taken out of" in said and "FAIL" not in said.replace("FAIL  Browser", "")
    workshop("run", "--profile", "laptop", "--only", "00,01,02")
    said = workshop("run", "--profile", "laptop", "--only", "05,06")
    assert not (folder / "checkpoints" / "final_model").exists()
    executed = (folder / "outputs" / "executed" / "05_generate.ipynb").read_text("utf-8")
    assert "Notebook 04 was not run in this workdir" in executed and "Precomputed run: " in executed
    assert re.search(r"05_generate +\d.*\n06_evaluate +\d", said)


def clone(project: Path, folder: Path) -> Path:
    """A small git clone that counts as the project."""
    for name in ("fiqa_helpers/base.py", "notebooks/00_start_here.ipynb"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(project / name, folder / name)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    subprocess.run(["git", "add", "fiqa_helpers", "notebooks"], cwd=folder, check=True)
    return folder


def test_only_what_git_knows_is_packed(project, tmp_path):
    """Data, checkpoints and private notes of the instructor stay at home; a deleted file is no error."""
    folder = clone(project, tmp_path)
    (folder / "notes.txt").write_text("marks of the participants")
    (folder / "notebooks" / "00_start_here.ipynb").unlink()
    assert cli.project_files(folder) == [folder / "fiqa_helpers" / "base.py"]


def test_outside_a_clone_there_is_one_sentence(tmp_path):
    """An unpacked archive has no git: it cannot be told what belongs to the project."""
    with pytest.raises(WorkshopError, match="is no git clone"):
        cli.project_files(tmp_path)


def test_a_damaged_wheel_is_not_packed(tmp_path, monkeypatch):
    """Twenty laptops would refuse it, one after another."""
    asset = ASSETS["fiqa_test"]
    (tmp_path / "stick").mkdir()
    (tmp_path / "stick" / asset.wheel).write_bytes(b"PK damaged")
    monkeypatch.setenv("FIQA_WHEELS", str(tmp_path / "stick"))
    with pytest.raises(WorkshopError, match="does not have the pinned SHA-256 and is not packed"):
        cli.get_wheel("fiqa_test", tmp_path / "kept")
    assert not (tmp_path / "kept" / asset.wheel).exists()


def test_wheels_beside_the_project_are_found(project, tmp_path, monkeypatch):
    """In the room nobody sets a variable: the unpacked archive is enough."""
    folder = clone(project, tmp_path)
    asset = ASSETS["minilm"]
    (folder / "wheels").mkdir()
    (folder / "wheels" / asset.wheel).write_bytes(b"")
    monkeypatch.delenv("FIQA_WHEELS", raising=False)
    monkeypatch.chdir(folder)
    assert base.project_root() == folder
    assert local_wheel(asset) == folder / "wheels" / asset.wheel
    assert local_wheel(ASSETS["smollm2"]) is None
