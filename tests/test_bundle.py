"""The stick: what `make bundle` packs, and that it is enough where no network is."""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from fiqa_helpers.machinery.assets import ASSETS

LOOPBACK = """
import fcntl, os, socket, struct, sys
with socket.socket() as s:  # bring up lo, the only interface here: Jupyter's kernels talk over 127.0.0.1
    fcntl.ioctl(s, 0x8914, struct.pack("16sh", b"lo", 0x1 | 0x40))
os.execvp(sys.argv[1], sys.argv[1:])
"""


def bundle(project: Path, target: Path, **environment: str) -> subprocess.CompletedProcess:
    """scripts/bundle.sh, with this environment's Python."""
    environment = os.environ | {"FIQA_VENV": sys.prefix} | environment
    command = [project / "scripts" / "bundle.sh", str(target)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.notebooks
@pytest.mark.timeout(3000)
def test_the_stick_is_enough_without_a_network(project, tmp_path):
    """Unpacked, with an empty cache and no network at all: 00 to 02, then 05 and 06 from files."""
    if subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode:
        pytest.skip("unshare --net is not available here")
    packed = bundle(project, tmp_path / "stick" / "fiqa-workshop.tar")
    assert packed.returncode == 0, packed.stderr
    with tarfile.open(tmp_path / "stick" / "fiqa-workshop.tar") as archive:
        owners = {(entry.uid, entry.uname) for entry in archive.getmembers()}
        assert owners == {(0, "root")}, "a person's name"
        names = {name.removeprefix("fiqa-workshop/") for name in archive.getnames()}
        archive.extractall(tmp_path, filter="data")
    assert {f"wheels/{asset.wheel}" for asset in ASSETS.values()} | {"constraints.txt", "Makefile"} <= names
    assert not [name for name in names if re.match(r"\.git/|data/|outputs/|checkpoints/|\.venv", name)]
    folder = tmp_path / "fiqa-workshop"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FIQA", "HF_", "PIP_"))}
    environment = kept | {"FIQA_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(folder)}
    blocked = ["unshare", "--net", sys.executable, "-c", LOOPBACK, sys.executable, "-m", "fiqa_helpers"]

    def workshop(*arguments: str) -> str:
        command = [*blocked, *arguments, "--profile", "laptop"]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr[-3000:]
        return done.stdout

    assert "to be taken out of" in workshop("check", "--offline")
    workshop("run", "--only", "00,01,02")
    assert re.search(r"05_generate +\d.*\n06_evaluate +\d", workshop("run", "--only", "05,06"))
    assert not (folder / "checkpoints" / "final_model").exists()
    executed = (folder / "outputs" / "executed" / "05_generate.ipynb").read_text("utf-8")
    assert "Notebook 04 was not run in this workdir" in executed and "Precomputed run: " in executed


def test_a_damaged_wheel_is_not_packed(project, tmp_path):
    """Twenty laptops would refuse it, one after another. No archive is left, nor half of one."""
    (tmp_path / "wheels").mkdir()
    for asset in ASSETS.values():
        (tmp_path / "wheels" / asset.wheel).write_bytes(b"PK damaged")
    target = tmp_path / "stick" / "bundle.tar"
    done = bundle(project, target, FIQA_WHEELS=str(tmp_path / "wheels"), PIP_NO_INDEX="1")
    assert done.returncode != 0 and "DO NOT MATCH THE HASHES" in done.stderr
    assert not target.exists() and not list(tmp_path.glob("stick/*"))
