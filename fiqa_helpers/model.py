"""Base models through NeMo AutoModel with PEFT's LoRA, trained adapters, the run kept in the project."""

import contextlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

from fiqa_helpers.base import WorkshopError, Workspace, project_root, read_card
from fiqa_helpers.machinery.checkpoints import MANIFEST, fault, model_files
from fiqa_helpers.machinery.machine import nemotron_config
from fiqa_helpers.profiles import MUST_AGREE, REFERENCE, from_card

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from matplotlib.figure import Figure
    from peft import LoraConfig
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from fiqa_helpers.profiles import Profile

# --- Base models through NeMo AutoModel, on GPU and CPU; LoRA by PEFT; parameters counted without weights.


def model_path(profile: "Profile") -> str:
    """What `from_pretrained` is given: a hub id, or a folder (the packaged model's is made on first use)."""
    from fiqa_helpers.machinery import assets

    if profile.model in ("packaged", "random"):  # random weights still use the packaged tokenizer
        return str(assets.smollm2_folder())
    folder = Path(profile.model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise WorkshopError(f"{folder} holds no config.json: model must be a Hugging Face model folder.")
        return str(folder)
    if profile.model.startswith((".", "/", "~")):
        raise WorkshopError(f"There is no folder {folder}: set model to a model's folder or a hub id.")
    return profile.model


def load_tokenizer(profile: "Profile") -> "PreTrainedTokenizerBase":
    """The model's tokenizer, with a padding token that is not its end token.

    With pad = eos the end token is masked like padding, and the model never learns to stop.
    """
    from transformers import AutoTokenizer

    with _load_errors(profile):
        tokenizer = AutoTokenizer.from_pretrained(
            model_path(profile), revision=profile.model_revision, trust_remote_code=False
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        unused = ("<|finetune_right_pad_id|>", "<reponame>", "<pad>", "<unk>", "<|endoftext|>")
        known = tokenizer.get_vocab()
        spare = [token for token in unused if token in known and token != tokenizer.eos_token]
        if not spare:
            raise WorkshopError(
                f"{profile.model}: its tokenizer has no token to pad with besides its end token."
            )
        tokenizer.pad_token = spare[0]
    return tokenizer


def base_config(profile: "Profile") -> "PretrainedConfig":
    """The base model's architecture, without its weights."""
    from transformers import AutoConfig

    if profile.model == "random":
        return tiny_model(load_tokenizer(profile)).config
    with _load_errors(profile):
        return AutoConfig.from_pretrained(
            model_path(profile), revision=profile.model_revision, trust_remote_code=False
        )


def load_base(profile: "Profile", attn_implementation: str = "sdpa") -> "PreTrainedModel":
    """The untuned model in `profile.dtype` on `profile.device`, in eval mode, through NeMo AutoModel.

    `force_hf=True` asks for the Hugging Face class, which has `generate` and takes a PEFT adapter. Code that
    comes with a model is refused (left to itself, NeMo AutoModel runs that of any `nvidia/` repository), and
    so are weights that are not safetensors.

    Raises:
        WorkshopError: there is no such model, its files are damaged, or the hub cannot be reached.
    """
    import torch

    dtype = getattr(torch, profile.dtype)
    if profile.model == "random":
        return _cast(tiny_model(load_tokenizer(profile)), dtype).to(profile.device).eval()
    from nemo_automodel import NeMoAutoModelForCausalLM

    path = model_path(profile)
    with _load_errors(profile), nemo_on_cpu():
        _require_safetensors(path, profile.model_revision)
        model = NeMoAutoModelForCausalLM.from_pretrained(
            path,
            revision=profile.model_revision,
            trust_remote_code=False,
            dtype=dtype,
            force_hf=True,
            attn_implementation=attn_implementation,
            use_liger_kernel=torch.cuda.is_available(),
        )
    _refuse_other_weights(model, path)
    return _cast(model, dtype).to(profile.device).eval()


def _cast(model: "PreTrainedModel", dtype: "torch.dtype") -> "PreTrainedModel":
    """The model with its weights in `dtype`. Buffers (RoPE's frequencies) keep their fp32, unlike in `.to()`.

    NeMo AutoModel 0.7.0 keeps a checkpoint's dtype where it is wider than the one that is asked for.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


@contextlib.contextmanager
def nemo_on_cpu() -> Iterator[None]:
    """Let NeMo AutoModel 0.7.0 load a model without CUDA; does nothing where CUDA is there.

    Its loader asks `torch.cuda.current_device()` twice: for an index to build a device object that a single
    process never uses, then for the device to move the model to. Only those two questions are answered here.
    """
    import torch

    if torch.cuda.is_available():
        yield
        return
    answers = iter([0])
    with mock.patch.object(torch.cuda, "current_device", lambda: next(answers, torch.device("cpu"))):
        yield


def lora_config(profile: "Profile") -> "LoraConfig":
    """The profile's LoRA settings for PEFT (Hu et al. 2021, https://arxiv.org/abs/2106.09685)."""
    from peft import LoraConfig

    return LoraConfig(
        r=profile.lora_rank,
        lora_alpha=profile.lora_alpha,
        lora_dropout=profile.lora_dropout,
        target_modules=list(profile.lora_targets),
        task_type="CAUSAL_LM",
    )


def reference_config() -> "PretrainedConfig":
    """The 8B model's architecture, from the JSON in this package.

    Sizes are the model card's. RoPE scaling is the parent model's, Llama 3.1 8B: it has no parameters, so
    counts and speed do not depend on it.
    """
    from transformers import AutoConfig

    values = nemotron_config()
    values.pop("_comment")
    return AutoConfig.for_model(values.pop("model_type"), **values)


def count_parameters(config: "PretrainedConfig", lora: "LoraConfig") -> tuple[int, int]:
    """(trainable, base) parameters of `config` with `lora`, on the meta device: no memory, no weights."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        base = model.num_parameters()
        trainable, _ = get_peft_model(model, lora).get_nb_trainable_parameters()
    return trainable, base


def tiny_model(tokenizer: "PreTrainedTokenizerBase", seed: int = 0) -> "PreTrainedModel":
    """A 2-layer random fp32 Llama over `tokenizer`'s vocabulary, for tests. The RNG is left alone."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def _require_safetensors(path: str, revision: str) -> None:
    """Refuse a model of pickled weights, which NeMo AutoModel would fall back to."""
    from transformers.utils import cached_file

    if Path(path).is_dir():
        if not any(Path(path).glob("*.safetensors")):
            raise WorkshopError(f"{path} has no safetensors file: weights in other formats are not loaded.")
        return
    with contextlib.suppress(OSError):  # the index of weights in several files
        cached_file(path, "model.safetensors.index.json", revision=revision)
        return
    cached_file(path, "model.safetensors", revision=revision)


def _refuse_other_weights(model: "PreTrainedModel", path: str) -> None:
    """Refuse a folder whose weights are another architecture's: loading leaves the model's own random."""
    from safetensors import safe_open

    stored = set()
    for file in Path(path).glob("*.safetensors"):  # a hub id has none: what is there belongs together
        with safe_open(file, "pt") as weights:
            stored.update(weights.keys())
    if stored and stored.isdisjoint(model.state_dict()):
        raise WorkshopError(
            f"{path} holds weights of another architecture than its config.json ({model.config.model_type}): "
            "copy the model's folder again."
        )


@contextlib.contextmanager
def _load_errors(profile: "Profile") -> Iterator[None]:
    """Turn a failed download or a broken folder into one sentence."""
    import torch
    from safetensors import SafetensorError

    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
        if Path(profile.model).expanduser().is_dir():
            remedy = "check that its files are whole and belong to one causal language model"
        else:
            remedy = (
                "check the name and the connection to the hub, or set model in overrides to a local folder"
            )
        raise WorkshopError(f"Cannot load {profile.model} ({reason}): {remedy}.") from error


# --- Is this folder a whole adapter of notebook 04, for this base model? Asked before anything is loaded.

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
CARD = "run_card.json"
REMEDY = "run notebook 04_train first (or again)"


def check_adapter(folder: Path, profile: "Profile") -> dict:
    """The run card of the adapter in `folder`, once everything about it fits `profile`.

    Only safetensors are accepted: a pickled `adapter_model.bin` can run code when it is loaded.

    Raises:
        WorkshopError: no adapter, an incomplete or damaged one, or one for another base model, data set or
            prompt; says which and what to do.
    """
    if not folder.is_dir():
        raise WorkshopError(f"There is no adapter in {folder}: {REMEDY}.")
    names = {path.name for path in folder.iterdir()}
    if not names:
        raise WorkshopError(f"{folder} is empty: {REMEDY}.")
    if WEIGHTS not in names:
        unsafe = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl")))
        if unsafe:
            raise WorkshopError(
                f"{folder} holds its weights as {unsafe[0]}, a pickle that could run code when it is loaded: "
                f"save the adapter as safetensors, or {REMEDY}."
            )
        raise WorkshopError(f"{folder} holds no {WEIGHTS}: {REMEDY}.")
    _check_config(folder)
    shapes = _check_weights(folder)
    card = read_card(folder / CARD)
    if card is None or not isinstance(card.get("profile"), dict):
        raise WorkshopError(f"{folder / CARD} is missing or damaged, so the base model is unknown: {REMEDY}.")
    for key in MUST_AGREE:
        trained = card["profile"].get(key, getattr(REFERENCE, key))  # an older card does not name all of them
        here = getattr(profile, key)
        if trained != here:
            raise WorkshopError(
                f"The adapter in {folder} was trained with {key} = {trained!r} and this run has {here!r}: "
                "give this notebook the profile and overrides of notebook 04, or train again."
            )
    trained = card.get("definition", {}).get("model_files", "")
    here = model_files(profile)
    if trained != here and min(len(trained), len(here)) >= 40:  # hashes: of a folder, or of a commit
        raise WorkshopError(
            f"The adapter in {folder} was trained on other weights of {profile.model} ({trained[:12]}, here "
            f"{here[:12]}): set model or model_revision in overrides to those, or train again."
        )
    damage = fault(folder) if (folder / MANIFEST).is_file() else None
    if damage:
        raise WorkshopError(f"The adapter in {folder} is damaged ({damage}): {REMEDY}.")
    _check_shapes(folder, profile, shapes)
    return card


def files_of(folder: Path) -> list[dict[str, object]]:
    """Each file of an adapter's folder with its size in MB (10^6 bytes), the largest first."""
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    ordered = sorted(sizes.items(), key=lambda item: -item[1])
    return [{"file": name, "MB": round(size / 1e6, 3)} for name, size in ordered]


def _check_config(folder: Path) -> None:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind = config.get("peft_type")
    except (OSError, ValueError, AttributeError):
        raise WorkshopError(f"{folder / CONFIG} is missing or damaged: {REMEDY}.") from None
    if kind != "LORA":
        raise WorkshopError(f"{folder / CONFIG} describes a {kind} adapter and LORA is needed: {REMEDY}.")


def _check_weights(folder: Path) -> dict[str, list[int]]:
    """Name and shape of each tensor. The file's header says how long it must be: a cut file fails here."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0][:100]
        raise WorkshopError(
            f"{folder / WEIGHTS} is not a whole safetensors file ({reason}): {REMEDY}."
        ) from None
    if not any("lora_" in name for name in shapes):
        raise WorkshopError(f"{folder / WEIGHTS} holds no LoRA weights: {REMEDY}.")
    return shapes


def _check_shapes(folder: Path, profile: "Profile", shapes: dict[str, list[int]]) -> None:
    """Weights of another architecture load with a warning, or end in a traceback: hold them against those
    that PEFT makes for this base model, on the meta device, where neither needs memory."""
    import torch
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    config = base_config(profile)
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's: the base model lay in another folder
            tuned = get_peft_model(
                AutoModelForCausalLM.from_config(config), PeftConfig.from_pretrained(folder)
            )
        needed = {name: list(tensor.shape) for name, tensor in get_peft_model_state_dict(tuned).items()}
    except (ValueError, TypeError, RuntimeError) as error:  # such as: no layer of that name
        raise WorkshopError(
            f"{folder / CONFIG} does not fit {profile.model} ({str(error).splitlines()[0][:100]}): {REMEDY}."
        ) from None
    other = sorted(name for name in {**needed, **shapes} if needed.get(name) != shapes.get(name))
    if other:
        raise WorkshopError(
            f"The adapter in {folder} was made for another model than {profile.model} ({other[0]} is "
            f"{shapes.get(other[0], 'missing')} and must be {needed.get(other[0], 'absent')}): {REMEDY}."
        )


# --- Real runs that are kept in the repository, to be taught from where their notebooks were not run.
#
# Their files lie in `notebooks/precomputed/`, written by `scripts/make_precomputed.py` out of a finished
# run. The run in its folder `case_study/` went wrong, which is what it is kept for.

BLUE, ORANGE = "#0072B2", "#E69F00"


@dataclass(frozen=True)
class KeptRun:
    """The run in `folder`: its label, losses, answers and evaluation."""

    folder: Path

    @cached_property
    def training(self) -> dict:
        """The run card of the adapter, as notebook 04 wrote it."""
        return self._card("adapter", CARD)

    @cached_property
    def label(self) -> str:
        """Which model, data, settings, device and day: shown wherever something of this run is shown."""
        profile, device = self.training["profile"], self.notebook("04")["device"]
        known = from_card(profile)
        words = known.banner()
        kept = f"{known.topical_words} words of each answer" if known.topical_words else "whole answers"
        where = (device["gpu"] or {}).get("name") or f"{device['cores']} cores of {device['cpu']}"
        panel = self.training["panel"]
        return (
            f"Precomputed run: {words.partition('): ')[2]}; {panel['step']} steps of {profile['batch_size']} "
            f"rows, {kept}, learning rate {profile['learning_rate']:g}, on {where}, "
            f"{self.training['written'][:10]}, torch {self.training['versions']['torch']}"
        )

    def notebook(self, number: str) -> dict:
        """The run card of one of its notebooks, "01" to "06"."""
        return self._card("run_cards", f"{number}.json")

    @cached_property
    def evaluation(self) -> dict:
        """The summary of notebook 06: comparisons and floors."""
        return self._card("evaluation.json")

    def history(self) -> "pd.DataFrame":
        """Losses (nats per answer token) and learning rate, one line a step."""
        import pandas as pd

        return pd.DataFrame(self.training["panel"]["history"]).set_index("step")

    def _card(self, *parts: str) -> dict:
        card = read_card(self.folder.joinpath(*parts))
        if card is None:
            raise WorkshopError(
                f"{self.folder.joinpath(*parts)} is missing or damaged: take it from the repository again."
            )
        return card


def load_kept() -> KeptRun:
    """The precomputed run of this repository: profile laptop, evaluated on all 100 test rows.

    Raises:
        WorkshopError: later, when a file of it is asked for and missing.
    """
    return KeptRun(project_root() / "notebooks" / "precomputed")


def case_study() -> KeptRun:
    """A run of which only the loss became better: whole answers, and decoding without the guard."""
    return KeptRun(load_kept().folder / "case_study")


def adapter_folder(workspace: Workspace, profile: "Profile") -> Path:
    """Notebook 04's adapter in `workspace`; where it was not run, the precomputed one, which is announced.

    The precomputed adapter serves only profiles with its own model, data, prompt and training answers. For
    others the folder of notebook 04 is returned although it is empty, and `check_adapter` says what to run.
    """
    own, kept = workspace.final_model, load_kept()
    card = read_card(kept.folder / "adapter" / CARD)
    if own.exists() or card is None:
        return own
    kept_profile = asdict(REFERENCE) | card["profile"]
    if any(kept_profile[key] != getattr(profile, key) for key in MUST_AGREE):
        return own
    print(f"Notebook 04 was not run in this workdir, so this is not your adapter.\n{kept.label}.")
    return kept.folder / "adapter"


def draw_losses(kept: KeptRun, own: "pd.DataFrame | None" = None) -> tuple["Figure", str]:
    """(figure, alt text): losses of the precomputed run, and the validation loss of `own` history beside."""
    from matplotlib.figure import Figure

    history = kept.history()
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.plot(history["loss"].dropna(), ".", color=BLUE, alpha=0.4, label="precomputed: training")
    validation = history["eval_loss"].dropna()
    axes.plot(validation, "--D", color=ORANGE, ms=5, label="precomputed: validation")
    alt = f"Validation loss of the precomputed run: {validation.iloc[0]:.3f} at step {validation.index[0]}, "
    alt += f"lowest {validation.min():.3f} at step {validation.idxmin()}, last {validation.iloc[-1]:.3f}."
    if own is not None and len(mine := own["eval_loss"].dropna()):
        axes.plot(mine, "-s", color="black", ms=5, label="your run: validation")
        alt += f" Yours: {mine.iloc[0]:.3f}, then {mine.min():.3f}."
    axes.set(xlabel="optimizer step", ylabel="loss, nats per answer token")
    axes.legend(frameon=False)
    return figure, alt
