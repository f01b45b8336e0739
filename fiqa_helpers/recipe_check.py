"""Does a recipe do what it should? Everything but the weights is built, without a GPU."""

import contextlib
import fnmatch
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from fiqa_helpers.errors import WorkshopError
from fiqa_helpers.launch import refuse_batch, refuse_old_run, refuse_other_model
from fiqa_helpers.recipe_data import fault_of_batch
from fiqa_helpers.recipe_schema import RecipeFile, read_recipe, refuse_ignored, refuse_values
from fiqa_helpers.recipe_values import refuse_nonsense

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class RecipeReport:
    """What a recipe would do. Learning rates are one for each optimizer step, in order."""

    path: Path
    gpus: int
    rows: int
    accumulation: int  # forward passes that make a step, on each GPU
    steps_per_epoch: int
    steps: int
    learning_rates: list[float]
    lora_modules: list[str]
    trainable: int
    base_parameters: int
    batch: dict[str, tuple[int, ...]]  # shapes of the first batch on the first GPU
    trained_tokens: int  # in that batch
    trained_text: str  # the beginning of what the first row is trained on
    tokenizer: str

    def __str__(self) -> str:
        peak = max(self.learning_rates)
        return (
            f"{self.path.name} on {'one GPU' if self.gpus == 1 else f'{self.gpus} GPUs'}: {self.rows} rows, "
            f"{self.steps_per_epoch} steps an epoch, {self.steps} in all; accumulation {self.accumulation}\n"
            f"learning rate {self.learning_rates[0]:.1e} -> {peak:.1e} at step "
            f"{self.learning_rates.index(peak) + 1} -> {self.learning_rates[-1]:.1e}\n"
            f"LoRA on {len(self.lora_modules)} layers: {self.trainable:,} trainable of "
            f"{self.base_parameters:,} parameters\n"
            f"first batch {self.batch.get('input_ids')} with {self.trained_tokens} trained tokens (tokenizer "
            f"{self.tokenizer}), the first row from {self.trained_text!r}"
        )


def check_recipe(
    path: Path | str,
    gpus: int = 1,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    resume: bool = False,
) -> RecipeReport:
    """Build everything of a recipe but the weights and report it; nothing is launched or written.

    `tokenizer` stands in for the recipe's own where the hub can't be reached. With `resume` the folder of
    checkpoints may hold a run, which the recipe would go on with.

    Raises:
        WorkshopError: what is wrong, in which line or file, and the remedy.
    """
    recipe = read_recipe(Path(path))
    with _quiet():
        refuse_ignored(recipe)
        refuse_nonsense(recipe)
        refuse_values(recipe)
        refuse_batch(recipe, gpus)
        refuse_other_model(recipe) if resume else refuse_old_run(recipe)
        return _build(recipe, gpus, tokenizer)


def _build(recipe: RecipeFile, gpus: int, tokenizer: "PreTrainedTokenizerBase | None") -> RecipeReport:
    import torch
    from nemo_automodel.components.config.loader import load_yaml_config
    from nemo_automodel.recipes._typed_config import RecipeConfig

    _refuse_targets(recipe)
    config = RecipeConfig(load_yaml_config(str(recipe.path)))
    for tracker in ("wandb", "mlflow"):
        if tracker in recipe.values and find_spec(tracker) is None:
            raise recipe.error(
                tracker, f"{tracker} is not installed: `pip install {tracker}`, or remove the section."
            )
    with _errors_of(recipe, "model"):
        skeleton = _skeleton(str(recipe.get("model.pretrained_model_name_or_path")))
    base = sum(p.numel() for p in skeleton.parameters())
    with _errors_of(recipe, "peft"), torch.device("meta"):
        modules = _add_lora(recipe, skeleton, config.peft.instantiate())
    trainable = sum(p.numel() for p in skeleton.parameters() if p.requires_grad)
    with _errors_of(recipe, "dataset"):
        tokenizer = tokenizer or config.dataset.tokenizer.instantiate()
        loader = config.dataloader.build(tokenizer=tokenizer, dp_rank=0, dp_world_size=gpus)
        for other in config.validation_dataloaders.values():
            other.build(tokenizer=tokenizer, dp_rank=0, dp_world_size=gpus)
        batch = next(iter(loader))
    if problem := fault_of_batch(batch, tokenizer.eos_token_id, recipe.get("dataset.max_length", 2048)):
        raise recipe.error("dataset", problem)
    with _errors_of(recipe, "step_scheduler"):
        local = recipe.whole_number("step_scheduler.local_batch_size")
        settings = replace(config.step_scheduler, preemption_signal=None)  # no signal handler in this process
        steps = settings.build(loader, gpus, local)
        total = min(steps.max_steps, steps.num_epochs * steps.epoch_len)
    with _errors_of(recipe, "optimizer"):
        _refuse_rate(recipe)
        optimizer = config.optimizer.build(skeleton, is_peft=True)
    _refuse_warmup(recipe, total)
    with _errors_of(recipe, "lr_scheduler"):
        schedule = config.lr_scheduler.build(optimizer, steps)[0]
        rates = []
        for _ in range(total):
            rates.append(optimizer[0].param_groups[0]["lr"])
            schedule.step(1)
    with _errors_of(recipe, "loss_fn"):
        config.loss_fn.build()
    with _errors_of(recipe, "checkpoint"):
        assert config.checkpoint.checkpoint_dir
    labels = batch["labels"][0]
    return RecipeReport(
        path=recipe.path,
        gpus=gpus,
        rows=len(loader.dataset),
        accumulation=steps.grad_acc_steps,
        steps_per_epoch=steps.epoch_len,
        steps=total,
        learning_rates=rates,
        lora_modules=modules,
        trainable=trainable,
        base_parameters=base,
        batch={name: tuple(values.shape) for name, values in batch.items()},
        trained_tokens=int((batch["labels"] != -100).sum()),
        trained_text=tokenizer.decode(labels[labels != -100][:12]),
        tokenizer=Path(tokenizer.name_or_path).name,
    )


def _refuse_targets(recipe: RecipeFile) -> None:
    """Each name of a function or class in the file must lead somewhere, and the recipe to one that trains."""
    from nemo_automodel.cli.utils import resolve_recipe_name
    from nemo_automodel.components.config.loader import _resolve_target
    from nemo_automodel.components.launcher.interactive import resolve_recipe_cls
    from nemo_automodel.recipes.llm.train_ft import TrainFinetuneRecipeForNextTokenPrediction as Parent

    for key in recipe.lines:
        if key.endswith(("._target_", ".collate_fn")):
            try:
                _resolve_target(recipe.get(key))
            except Exception as error:
                raise recipe.error(
                    key, f"there is no {recipe.get(key)} ({_first_line(error)}): correct it."
                ) from None
    try:
        found = resolve_recipe_cls(resolve_recipe_name(str(recipe.get("recipe"))))
    except Exception as error:
        raise recipe.error(
            "recipe", f"there is no recipe {recipe.get('recipe')!r} ({_first_line(error)})."
        ) from None
    if not (isinstance(found, type) and issubclass(found, Parent)):
        raise recipe.error("recipe", f"{found.__name__} is no recipe for fine-tuning: use FiqaRecipe.")


def _skeleton(name: str):
    """The model's architecture on the meta device; the 8B one also without the hub."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from fiqa_helpers.model import reference_config
    from fiqa_helpers.profiles import NEMOTRON

    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise WorkshopError(f"there is no folder {name}: name a model's folder or a hub id")
    try:  # what is on this machine, and the 8B model's architecture from this package: no waiting for the hub
        config = AutoConfig.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):
        config = reference_config() if name == NEMOTRON else AutoConfig.from_pretrained(name)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _add_lora(recipe: RecipeFile, skeleton, peft) -> list[str]:
    """Attach NeMo's LoRA to `skeleton`; names of the layers. A pattern that matches none is refused."""
    import torch
    from nemo_automodel.components._peft.lora import apply_lora_to_linear_modules

    linear = [name for name, module in skeleton.named_modules() if isinstance(module, torch.nn.Linear)]
    for pattern in peft.target_modules:
        if not fnmatch.filter(linear, pattern):
            ends = sorted({f"*.{name.rpartition('.')[2]}" for name in linear})
            raise recipe.error(
                "peft.target_modules",
                f"{pattern} matches no layer of the model and NeMo would leave it out: choose of "
                f"{', '.join(ends)}.",
            )
    apply_lora_to_linear_modules(skeleton, peft)
    found = [name for name, module in skeleton.named_modules() if hasattr(module, "lora_A")]
    if not found:
        raise recipe.error("peft.target_modules", "no layer would get an adapter: name some layers.")
    return found


def _refuse_rate(recipe: RecipeFile) -> None:
    rate = recipe.get("optimizer.lr")
    if not isinstance(rate, float | int) or not 0 < rate < 1:
        raise recipe.error("optimizer.lr", f"lr is {rate!r}: it must be a number below 1, such as 2.0e-4.")


def _refuse_warmup(recipe: RecipeFile, total: int) -> None:
    warmup = recipe.get("lr_scheduler.lr_warmup_steps")
    if warmup is not None and recipe.whole_number("lr_scheduler.lr_warmup_steps", 0) >= total:
        raise recipe.error(
            "lr_scheduler.lr_warmup_steps", f"warm-up takes {warmup} of {total} steps: it must be shorter."
        )


@contextlib.contextmanager
def _errors_of(recipe: RecipeFile, section: str) -> Iterator[None]:
    """Turn what a section fails with into one sentence with its line."""
    try:
        yield
    except WorkshopError as error:
        if str(recipe.path) in str(error):
            raise
        raise recipe.error(section, str(error)) from None
    except Exception as error:
        raise recipe.error(
            section, f"{section} can't be built ({_first_line(error)}): correct it."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """NeMo narrates what it builds; a report follows."""
    logger = logging.getLogger("nemo_automodel")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
