"""Base models through NeMo AutoModel, on GPU and CPU; LoRA by PEFT; parameters counted without weights."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

from fiqa_helpers.errors import WorkshopError
from fiqa_helpers.memory import nemotron_config

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from fiqa_helpers.profiles import Profile


def model_path(profile: "Profile") -> str:
    """What `from_pretrained` is given: a hub id, or a folder (the packaged model's is made on first use)."""
    from fiqa_helpers import assets

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
