"""Base models through NeMo AutoModel with PEFT's LoRA, trained adapters, the run kept in the project."""

import contextlib
import ctypes
import gc
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

from fiqa_helpers.base import WorkshopError, Workspace, cache_dir, project_root, read_card
from fiqa_helpers.machinery import assets
from fiqa_helpers.profiles import PROFILES, Profile, disagreement

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# --- Base models through NeMo AutoModel, on GPU and CPU; LoRA by PEFT; parameters counted without weights.

SPARE_TOKENS = ("<|finetune_right_pad_id|>", "<reponame>", "<pad>", "<unk>", "<|endoftext|>")


def model_path(profile: Profile) -> str:
    """What `from_pretrained` is given: a hub id, or a folder (the packaged model's is made on first use)."""
    if made := {"packaged": assets.smollm2_folder, "random": _random_folder}.get(profile.model):
        return str(made())
    folder = Path(profile.model).expanduser()
    return str(folder) if folder.is_dir() else profile.model


def load_tokenizer(profile: Profile) -> "PreTrainedTokenizerBase":
    """The model's tokenizer, with a padding token that is not its end token.

    With pad = eos the end token is masked like padding, and the model never learns to stop.
    """
    from transformers import AutoTokenizer

    with _load_errors(profile):
        tokenizer = AutoTokenizer.from_pretrained(
            model_path(profile), revision=profile.model_revision, trust_remote_code=False
        )
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        known = tokenizer.get_vocab()
        spare = [token for token in SPARE_TOKENS if token in known and token != tokenizer.eos_token]
        if not spare:
            raise WorkshopError(f"{profile.model} has no token to pad with besides its end token.")
        tokenizer.pad_token = spare[0]
    return tokenizer


def base_config(profile: Profile) -> "PretrainedConfig":
    """The base model's architecture, without its weights."""
    from transformers import AutoConfig

    with _load_errors(profile):
        return AutoConfig.from_pretrained(
            model_path(profile), revision=profile.model_revision, trust_remote_code=False
        )


def load_base(profile: Profile, attn_implementation: str = "sdpa") -> "PreTrainedModel":
    """The untuned model in `profile.dtype` on `profile.device`, in eval mode, through NeMo AutoModel.

    `force_hf=True` asks for the Hugging Face class, which has `generate` and takes a PEFT adapter. Code that
    comes with a model is refused (left to itself, NeMo AutoModel runs that of any `nvidia/` repository), and
    so are pickled weights and a checkpoint that lacks some.

    Raises:
        WorkshopError: there is no such model, its files are damaged, or the hub cannot be reached.
    """
    import torch

    dtype = getattr(torch, profile.dtype)
    if profile.model == "random":  # NeMo's import takes ten seconds, which tests need not wait for
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(model_path(profile), dtype=dtype)
        return model.to(profile.device).eval()
    from nemo_automodel import NeMoAutoModelForCausalLM

    with _load_errors(profile), nemo_on_cpu(profile.device), refuse_missing_weights():
        _require_safetensors(profile)
        model = NeMoAutoModelForCausalLM.from_pretrained(
            model_path(profile),
            revision=profile.model_revision,
            trust_remote_code=False,
            dtype=dtype,
            force_hf=True,
            attn_implementation=attn_implementation,
            use_liger_kernel=profile.device == "cuda",
        )
    for parameter in model.parameters():  # NeMo 0.7.0 keeps a checkpoint's dtype where it is the wider one;
        parameter.data = parameter.data.to(dtype)  # not model.to(dtype): RoPE's buffers stay fp32
    return model.to(profile.device).eval()


@contextlib.contextmanager
def nemo_on_cpu(device: str) -> Iterator[None]:
    """Let NeMo AutoModel 0.7.0 load a model to the CPU, with CUDA or without; does nothing for "cuda".

    Its loader asks `torch.cuda.current_device()` twice: for an index to build a device object that a single
    process never uses, then for the device to move the model to. Only those two questions are answered here.
    """
    import torch

    if device == "cuda":
        yield
        return
    answers = iter([0])
    with mock.patch.object(torch.cuda, "current_device", lambda: next(answers, torch.device("cpu"))):
        yield


@contextlib.contextmanager
def refuse_missing_weights() -> Iterator[None]:
    """Make `from_pretrained` fail where the files lack weights of the model, which would stay random.

    transformers (5.18) only warns, and NeMo AutoModel does not pass `output_loading_info` on. Tied weights
    are not missing.
    """
    from transformers import PreTrainedModel

    finalize = PreTrainedModel._finalize_model_loading

    def checked(*loaded):
        report = finalize(*loaded)
        if report.missing_keys:
            raise ValueError(f"weights are missing, such as {min(report.missing_keys)}")
        return report

    with mock.patch.object(PreTrainedModel, "_finalize_model_loading", staticmethod(checked)):
        yield


def _require_safetensors(profile: Profile) -> None:
    """Refuse a model of pickled weights, which can run code when read: NeMo AutoModel falls back to them."""
    from transformers.utils import cached_file

    where = {"revision": profile.model_revision, "_raise_exceptions_for_missing_entries": False}
    files = ("model.safetensors.index.json", "model.safetensors")
    if not any(cached_file(model_path(profile), name, **where) for name in files):
        raise ValueError("it has no safetensors file, and weights in other formats are not loaded")


@contextlib.contextmanager
def _load_errors(profile: Profile) -> Iterator[None]:
    """Turn whatever a failed download or a broken folder ends in into one sentence."""
    import torch

    try:
        yield
    except (WorkshopError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # also a TypeError, of a field that this version of transformers does not know
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
        raise WorkshopError(
            f"Cannot load {profile.model} ({reason}): check the name and the connection to the hub, or set "
            "model in overrides to a folder that holds one whole model."
        ) from error


def lora_config(profile: Profile) -> "LoraConfig":
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
    from transformers import LlamaConfig

    return LlamaConfig.from_json_file(Path(__file__).with_name("nemotron_8b_config.json"))


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

    config = LlamaConfig.from_json_file(Path(__file__).with_name("tiny_config.json"))
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config.update({"vocab_size": len(tokenizer), **tokens})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def _random_folder() -> Path:
    """Folder of `tiny_model` with SmolLM2's tokenizer, made on first use: what profile tiny loads."""
    folder = cache_dir() / "random_llama"

    def make(work: Path) -> Path:
        tokenizer = load_tokenizer(PROFILES["laptop"])
        tokenizer.save_pretrained(work / "model")
        tiny_model(tokenizer).save_pretrained(work / "model")
        return work / "model"

    assets.make_once(folder, folder.is_dir, make)
    return folder


def free_memory() -> str:
    """Give back what nothing refers to any more, after `del model`; says in a sentence what is still held.

    A model is a web of objects that refer to one another, so `gc` has to find it; then PyTorch (on a GPU)
    and the C library (on Linux) still keep the freed memory for themselves until they are told.
    """
    import psutil
    import torch

    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another system's C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    held = f"This process holds {psutil.Process().memory_info().rss / 2**30:.2f} GiB, libraries included"
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        held += f", and {torch.cuda.memory_reserved() / 2**30:.2f} GiB on the GPU"
    return f"{held}."


# --- Is this folder a whole adapter of notebook 04, for this base model? Asked before anything is loaded.

WEIGHTS = "adapter_model.safetensors"
CARD = "run_card.json"
REMEDY = "run notebook 04_train first (or again)"


def check_adapter(folder: Path, profile: Profile) -> dict:
    """The run card of the adapter in `folder`, once everything about it fits `profile`.

    Only safetensors are accepted: a pickled `adapter_model.bin` can run code when it is loaded.

    Raises:
        WorkshopError: no adapter, half of one, or one for another base model, data set, prompt or
            training answers.
    """
    card = read_card(folder / CARD) or {}
    trained = card.get("profile")
    if not (folder / WEIGHTS).is_file() or not isinstance(trained, dict):
        raise WorkshopError(
            f"There is no adapter in {folder} ({WEIGHTS}, {CARD}; pickled weights are not loaded): {REMEDY}."
        )
    if differing := disagreement(trained, profile):
        raise WorkshopError(
            f"The adapter in {folder} was trained by a run with {differing}: give this notebook the profile "
            "and overrides of notebook 04, or train again."
        )
    check_fit(folder, base_config(profile))
    return card


def check_fit(folder: Path, config: "PretrainedConfig") -> None:
    """Hold the weights in `folder` against those that PEFT would make for `config`, on the meta device.

    PEFT loads half an adapter with a warning, and one of another architecture without a word: what is tuned
    then is less than it seems, or nothing.

    Raises:
        WorkshopError: a file is damaged, or a weight is missing, superfluous or of another shape.
    """
    import torch
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's: the base model lay in another folder
            adapter = PeftConfig.from_pretrained(folder)
            tuned = get_peft_model(AutoModelForCausalLM.from_config(config), adapter)
        needed = {name: list(tensor.shape) for name, tensor in get_peft_model_state_dict(tuned).items()}
    except Exception as error:  # a cut file, no JSON, a layer that this model does not have, ...
        reason = str(error).strip().splitlines()[0][:200]
        raise WorkshopError(f"{folder} is no whole adapter for this model ({reason}): {REMEDY}.") from error
    other = sorted(name for name in {**needed, **found} if needed.get(name) != found.get(name))
    if other:
        raise WorkshopError(
            f"The adapter in {folder} is half or was made for another model ({len(other)} weights misfit: "
            f"{other[0]} is {found.get(other[0], 'missing')}, must be {needed.get(other[0], 'absent')}): "
            f"{REMEDY}."
        )


# --- Real runs that are kept in the repository, to be taught from where their notebooks were not run.
#
# Their files lie in `notebooks/precomputed/`, written by `scripts/make_precomputed.py` out of a finished
# run. The run in its folder `case_study/` went wrong, which is what it is kept for.


def kept_run() -> Path:
    """Folder of the precomputed run: profile laptop. Its `label.txt` says whose; it is shown with the run."""
    return project_root() / "notebooks" / "precomputed"


def adapter_folder(workspace: Workspace, profile: Profile) -> Path:
    """Notebook 04's adapter in `workspace`; where it was not run, the precomputed one, which is announced.

    The precomputed adapter serves only profiles with its own model, data, prompt and training answers. For
    others the folder of notebook 04 is returned although it is empty, and `check_adapter` says what to run.
    """
    own, kept = workspace.final_model, kept_run() / "adapter"
    if own.exists() or disagreement(read_card(kept / CARD)["profile"], profile):
        return own
    print("Notebook 04 was not run in this workdir, so this is not your adapter.")
    print((kept_run() / "label.txt").read_text())
    return kept
