"""The notebook's run as a NeMo AutoModel recipe: one YAML file, written from the profile."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from fiqa_helpers import data
from fiqa_helpers.errors import WorkshopError
from fiqa_helpers.recipe_template import MLFLOW, RECIPE, WANDB

if TYPE_CHECKING:
    from fiqa_helpers.notebook import Run
    from fiqa_helpers.profiles import Profile

TRACKERS = ("tensorboard", "wandb", "mlflow")


def write_recipe(run: "Run", path: Path, output: Path, gpus: int = 1, tracker: str = "tensorboard") -> Path:
    """Write the recipe of `run` (its profile, and the rows in its workspace) to `path`; returns `path`.

    Checkpoints and metrics will go to `output`. `gpus` is the number of data-parallel processes, over all
    nodes. With random weights (profile tiny) the model is saved beside the recipe, because a recipe loads its
    model from a folder.

    Raises:
        WorkshopError: the batch can't be shared by that many GPUs, notebook 01 has not been run in the
            workspace, or the tracker is unknown.
    """
    profile, workspace = run.profile, run.workspace
    if tracker not in TRACKERS:
        raise WorkshopError(f"tracker is {tracker!r}: choose one of {', '.join(TRACKERS)}.")
    local = local_batch_size(profile, gpus)
    splits = data.read_processed(workspace.data)
    rows = len(splits["train"])
    rows = min(rows, profile.train_rows) if profile.train_rows >= 0 else rows
    epoch, total, epochs = count_steps(profile, rows, gpus)
    values = {
        "title": profile.title,
        "name": profile.name,
        "rows": rows,
        "processes": "one GPU" if gpus == 1 else f"{gpus} GPUs",
        "dropped": f" {rows % gpus} row(s) do not share out and are left out." if rows % gpus else "",
        "epoch": epoch,
        "total": total,
        "seed": profile.seed,
        "batch": profile.batch_size,
        "local": local,
        "accumulate": profile.batch_size // (local * gpus),
        "epochs": epochs,
        "max_steps": "null" if profile.max_steps < 0 else profile.max_steps,
        "every": min(profile.eval_steps, total),
        "backend": "nccl" if profile.device == "cuda" else "gloo",
        "model": text(model_for_recipe(profile, path.parent)),
        "revision": text(profile.model_revision),
        "dtype": profile.dtype,
        "liger": str(profile.device == "cuda").lower(),
        "targets": json.dumps([f"*.{name}" for name in profile.lora_targets]),
        "rank": profile.lora_rank,
        "alpha": profile.lora_alpha,
        "dropout": number(profile.lora_dropout),
        "checkpointing": str(profile.gradient_checkpointing).lower(),
        "data": text(str(workspace.data)),
        "train_rows": profile.train_rows,
        "eval_rows": profile.eval_rows,
        "prompt": profile.prompt,
        "max_length": profile.max_length,
        "learning_rate": number(profile.learning_rate),
        "warmup": warmup_steps(profile, total),
        "percent": f"{profile.warmup_ratio:.0%}",
        "output": text(str(output)),
        "logs": text(str(output / "tensorboard")),
    }
    written = RECIPE.format(**values) + _tracker(tracker, output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(written, encoding="utf-8")
    return path


def count_steps(profile: "Profile", rows: int, gpus: int = 1) -> tuple[int, int, int]:
    """(steps of an epoch, steps of the run, epochs begun) for `rows` shared by `gpus` processes.

    NeMo AutoModel gives each process the same number of rows and drops the few that are left over, so on one
    GPU the figures are transformers' and on many a step may be missing at the end of an epoch.
    """
    shared = rows // gpus * gpus
    if shared == 0:
        raise WorkshopError(f"{rows} training rows can't be shared by {gpus} GPUs: use fewer GPUs.")
    epoch = math.ceil(shared / profile.batch_size)
    if profile.max_steps < 0:
        return epoch, epoch * profile.epochs, profile.epochs
    return epoch, profile.max_steps, math.ceil(profile.max_steps / epoch)


def warmup_steps(profile: "Profile", total: int) -> int:
    """Steps in which the learning rate rises, counted as transformers does; a recipe wants fewer than all."""
    return min(math.ceil(total * profile.warmup_ratio), total - 1)


def local_batch_size(profile: "Profile", gpus: int = 1) -> int:
    """Rows of one forward pass on each GPU: the most that divide the step's rows and fit the token budget.

    Raises:
        WorkshopError: `gpus` does not divide the batch.
    """
    if gpus < 1 or profile.batch_size % gpus:
        fit = [n for n in range(1, profile.batch_size + 1) if profile.batch_size % n == 0]
        raise WorkshopError(
            f"A step of {profile.batch_size} rows can't be shared by {gpus} GPUs: use "
            f"{', '.join(map(str, fit[:-1]))} or {fit[-1]}, or change batch_size in overrides."
        )
    share = profile.batch_size // gpus
    most = max(1, profile.tokens_per_batch // profile.max_length)
    return max(n for n in range(1, share + 1) if share % n == 0 and n <= most)


def model_for_recipe(profile: "Profile", folder: Path) -> str:
    """What the recipe loads: a hub id or a folder. A random model is saved to `folder/random_model` first."""
    from fiqa_helpers import model

    if profile.model != "random":
        return model.model_path(profile)
    target = folder / "random_model"
    tokenizer = model.load_tokenizer(profile)
    model.tiny_model(tokenizer).save_pretrained(target)
    tokenizer.save_pretrained(target)
    return str(target)


def text(value: str) -> str:
    """`value` as a YAML string, whatever is in it.

    Raises:
        WorkshopError: NeMo AutoModel would read a `$` as the beginning of a variable's name.
    """
    if "$" in value:
        raise WorkshopError(
            f"{value!r} has a $ in it, which a recipe takes for a variable: use another path."
        )
    return json.dumps(value, ensure_ascii=False)


def number(value: float) -> str:
    """`value` so that YAML reads the same float: 2e-05 without a point would be a string."""
    written = repr(float(value))
    mantissa, exponent, power = written.partition("e")
    return f"{mantissa}.0e{power}" if exponent and "." not in mantissa else written


def _tracker(name: str, output: Path) -> str:
    if name == "wandb":
        return WANDB.format(output=text(str(output)))
    if name == "mlflow":
        return MLFLOW.format(output=text(f"sqlite:///{output / 'mlflow.db'}"))
    return ""
