"""A recipe's YAML with its line numbers, refused where NeMo AutoModel would silently ignore a part."""

import difflib
from dataclasses import dataclass, fields
from pathlib import Path

import yaml

from fiqa_helpers.errors import WorkshopError

MODEL_CALL = "nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained"
REQUIRED = (
    "recipe",
    "step_scheduler",
    "model",
    "peft",
    "loss_fn",
    "dataset",
    "dataloader",
    "optimizer",
    "lr_scheduler",
    "checkpoint",
)
IGNORED = {  # sections that nemo-automodel 0.7.0 reads past without a word, or that take the launch over
    "rng": "NeMo ignores it: put `seed: 42` at the top level",
    "slurm": "NeMo ignores it since 0.4: write a batch file with fiqa_helpers.launch.write_sbatch",
    "compile": "NeMo ignores it with fsdp2: set distributed.enable_compile",
    "skypilot": "it would launch the recipe elsewhere: remove it",
    "nemo_run": "it would launch the recipe elsewhere: remove it",
}


@dataclass(frozen=True)
class RecipeFile:
    """A parsed recipe: its values, and the line of each dotted key ("optimizer.lr" -> 97)."""

    path: Path
    values: dict
    lines: dict[str, int]

    def error(self, key: str, sentence: str) -> WorkshopError:
        """`sentence` with the file and the line of `key`, or of the nearest key above it that is there."""
        while key and key not in self.lines:
            key = key.rpartition(".")[0]
        where = f", line {self.lines[key]}" if key else ""
        return WorkshopError(f"{self.path}{where}: {sentence}")

    def get(self, key: str, default: object = None) -> object:
        """The value of a dotted key."""
        found: object = self.values
        for part in key.split("."):
            if not isinstance(found, dict) or part not in found:
                return default
            found = found[part]
        return found

    def whole_number(self, key: str, least: int = 1) -> int:
        """The value of `key` where it must be a whole number.

        Raises:
            WorkshopError: it is something else, or below `least`.
        """
        value = self.get(key)
        if type(value) is not int or value < least:
            raise self.error(key, f"{key} is {value!r}: it must be a whole number from {least} upwards.")
        return value


def read_recipe(path: Path) -> RecipeFile:
    """Parse the recipe at `path`.

    Raises:
        WorkshopError: there is no such file, it is not YAML, or a key stands twice (the last would count).
    """
    try:
        written = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise WorkshopError(
            f"Cannot read the recipe {path} ({reason}): write it with write_recipe."
        ) from None
    lines: dict[str, int] = {}
    try:
        root = yaml.compose(written, yaml.SafeLoader)
        if not isinstance(root, yaml.MappingNode):
            raise WorkshopError(f"{path} is not a recipe: it must be a YAML mapping with sections.")
        _note_lines(root, "", lines, path)
        values = yaml.safe_load(written)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark else ""
        raise WorkshopError(f"{path}{where}: this is not YAML ({error.problem}): correct it there.") from None
    except yaml.YAMLError as error:  # a control character
        raise WorkshopError(f"{path} is not YAML ({str(error).splitlines()[0]}): correct it.") from None
    return RecipeFile(path, values, lines)


def _note_lines(node: yaml.MappingNode, prefix: str, lines: dict[str, int], path: Path) -> None:
    for key_node, value in node.value:
        key, line = f"{prefix}{key_node.value}", key_node.start_mark.line + 1
        if key in lines:
            raise WorkshopError(
                f"{path}, line {line}: {key} stands in line {lines[key]} too, and only the last would count: "
                "keep one."
            )
        lines[key] = line
        if isinstance(value, yaml.MappingNode):
            _note_lines(value, f"{key}.", lines, path)


def refuse_ignored(recipe: RecipeFile) -> None:
    """Refuse sections and keys that NeMo would read past.

    Raises:
        WorkshopError: naming line, key and remedy.
    """
    known = known_keys(recipe)
    for section, value in recipe.values.items():
        if section in IGNORED:
            raise recipe.error(section, f"a section {section} is of no use here, {IGNORED[section]}.")
        if section not in known:
            guess = difflib.get_close_matches(str(section), known, 1)
            hint = f"did you mean {guess[0]}?" if guess else "remove it."
            raise recipe.error(str(section), f"NeMo would ignore the unknown section {section}: {hint}")
        if known[section] is not None:
            _refuse_keys(recipe, section, value, known[section])
    for section, keys in known.items():
        if "." in section and section in recipe.lines:
            _refuse_keys(recipe, section, recipe.get(section), keys)
    for section in REQUIRED:
        if section not in recipe.values:
            raise recipe.error(section, f"the section {section} is missing: write the recipe again.")
    for section in ("validation_dataset", "validation_dataloader"):
        if section not in recipe.values and recipe.values.keys() & {
            "validation_dataset",
            "validation_dataloader",
        }:
            raise recipe.error(section, f"validation needs the section {section} too, or neither of the two.")


def _refuse_keys(recipe: RecipeFile, section: str, value: object, keys: set[str]) -> None:
    if not isinstance(value, dict):
        raise recipe.error(section, f"{section} must be a section with keys, not {value!r}.")
    for key in value:
        if keys and key not in keys:
            guess = difflib.get_close_matches(str(key), keys, 1)
            hint = f"did you mean {guess[0]}?" if guess else f"known are {', '.join(sorted(keys))}."
            raise recipe.error(f"{section}.{key}", f"{section} has no key {key}: {hint}")


def known_keys(recipe: RecipeFile) -> dict[str, set[str] | None]:
    """Section (nested: with dots) -> its keys; an empty set where any key goes, None for a plain value."""
    from nemo_automodel.components._peft.lora import PeftConfig
    from nemo_automodel.components.checkpoint.config import CheckpointingConfig
    from nemo_automodel.components.distributed.config import FSDP2Config
    from nemo_automodel.components.loggers.loggers import MLflowConfig
    from nemo_automodel.components.optim.optimizer import LRSchedulerConfig
    from nemo_automodel.components.training.step_scheduler import StepSchedulerConfig
    from torch.distributed.fsdp import MixedPrecisionPolicy

    def of(config: type, *more: str) -> set[str]:
        return {field.name for field in fields(config)} | {"_target_", *more}

    rows = {"_target_", "folder", "split", "rows", "prompt", "max_length", "shift_labels", "tokenizer"}
    ours = str(recipe.get("dataset._target_", "")).startswith("fiqa_helpers.")
    loader = {"_target_", "collate_fn", "shuffle", "group_by_length", "num_workers", "pin_memory"}
    loader |= {"persistent_workers", "prefetch_factor", "drop_last", "batch_size"}
    # what from_pretrained names, and what it hands on that a person may want
    model = {"_target_", "pretrained_model_name_or_path", "revision", "force_hf", "torch_dtype", "dtype"}
    model |= {"attn_implementation", "use_liger_kernel", "use_sdpa_patching", "cache_dir", "local_files_only"}
    return {
        "recipe": None,
        "seed": None,
        "step_scheduler": of(StepSchedulerConfig, "local_batch_size"),
        "dist_env": {"backend", "timeout_minutes"},
        "model": model,
        "peft": of(PeftConfig),
        "distributed": of(FSDP2Config, "strategy", "dp_size", "dp_replicate_size", "tp_size", "cp_size"),
        "distributed.mp_policy": of(MixedPrecisionPolicy),
        "clip_grad_norm": {"max_norm", "backend"},
        "loss_fn": set(),
        "dataset": rows if ours else set(),
        "dataset.tokenizer": {"_target_", "name", "revision"} if _our_tokenizer(recipe) else set(),
        "dataloader": loader,
        "validation_dataset": rows if ours else set(),
        "validation_dataloader": loader,
        "optimizer": set(),
        "lr_scheduler": of(LRSchedulerConfig),
        "checkpoint": of(CheckpointingConfig, "restore_from"),
        "tensorboard": {"log_dir"},
        "wandb": set(),
        "mlflow": of(MLflowConfig),
    }


def _our_tokenizer(recipe: RecipeFile) -> bool:
    return str(recipe.get("dataset.tokenizer._target_", "")).startswith("fiqa_helpers.")


def refuse_values(recipe: RecipeFile) -> None:
    """Refuse values that don't go together: NeMo takes them, and makes another run or a crash of them.

    Raises:
        WorkshopError: naming line, key and remedy.
    """
    if recipe.get("model._target_") != MODEL_CALL:
        raise recipe.error("model._target_", f"the model must come from {MODEL_CALL}.")
    if recipe.get("model.force_hf") is not True:
        raise recipe.error(
            "model.force_hf", "force_hf must be true, or the adapter would not fit Hugging Face's model."
        )
    if recipe.get("peft.lora_dtype") not in (None, recipe.get("model.torch_dtype")):
        raise recipe.error(
            "peft.lora_dtype", "an adapter in another dtype than the base crashes: remove lora_dtype."
        )
    for mine, models in (("name", "pretrained_model_name_or_path"), ("revision", "revision")):
        key = f"dataset.tokenizer.{mine}"
        if _our_tokenizer(recipe) and recipe.get(key) != recipe.get(f"model.{models}"):
            raise recipe.error(
                key,
                f"the tokenizer's {mine} {recipe.get(key)} and the model's {recipe.get(f'model.{models}')} "
                "must be the same: correct one of the two.",
            )
    dtype = recipe.get("model.torch_dtype", "bfloat16")
    if recipe.get("distributed.mp_policy.param_dtype", "bfloat16") != dtype:
        raise recipe.error(
            "distributed.mp_policy.param_dtype",
            f"NeMo would not compute in the model's {dtype}: set mp_policy.param_dtype to {dtype}.",
        )
    for key in ("tp_size", "cp_size"):
        if recipe.get(f"distributed.{key}", 1) not in (1, None):
            raise recipe.error(f"distributed.{key}", f"this recipe shares rows only: set {key} to 1.")
    if recipe.get("distributed.strategy", "fsdp2") != "fsdp2":
        raise recipe.error("distributed.strategy", "this recipe is made for strategy fsdp2.")
