"""Where and how a recipe is started: what fits, the command lines, a batch file for Slurm, a fresh folder.

torchrun starts every form, on one GPU too. (With several GPUs the command `automodel` starts NeMo's own
recipe file instead of the class that the YAML names: launcher/interactive.py of nemo-automodel 0.7.0.)
"""

import re
import shlex
import time
from pathlib import Path

from fiqa_helpers.errors import WorkshopError
from fiqa_helpers.paths import Workspace
from fiqa_helpers.recipe_schema import RecipeFile, read_recipe

MODULE = "nemo_automodel.cli.app"
CPU_MODULE = "fiqa_helpers.recipe_cpu"
PORT = 29500  # of the rendezvous on the first node


def fresh_folder(workspace: Workspace, name: str = "recipe") -> Path:
    """A folder for one recipe run that nothing has been written to, `checkpoints/NAME/TIME`.

    A recipe that finds checkpoints in its folder goes on with that run, without being asked to.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S")
    parent = workspace.checkpoints / name
    for suffix in ["", *(f"-{n}" for n in range(2, 1000))]:
        folder = parent / f"{stamp}{suffix}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:  # another run of this second
            continue
    raise WorkshopError(f"{parent} is full of runs of this second: start again.")


def refuse_batch(recipe: RecipeFile, gpus: int) -> int:
    """Forward passes of a step on each of `gpus` GPUs.

    Raises:
        WorkshopError: the step's rows can't be shared like that; names what can.
    """
    whole = recipe.whole_number("step_scheduler.global_batch_size")
    local = recipe.whole_number("step_scheduler.local_batch_size")
    if gpus < 1 or whole % gpus:
        fit = [str(n) for n in range(1, whole + 1) if whole % n == 0]
        raise recipe.error(
            "step_scheduler.global_batch_size",
            f"{whole} rows of a step can't be shared by {gpus} GPUs: use {', '.join(fit)} GPUs.",
        )
    if whole % (local * gpus):
        fit = [str(n) for n in range(1, whole // gpus + 1) if (whole // gpus) % n == 0]
        raise recipe.error(
            "step_scheduler.local_batch_size",
            f"local_batch_size {local} on {gpus} GPUs does not divide the {whole} rows of a step: "
            f"use {' or '.join(fit)}.",
        )
    return whole // (local * gpus)


def refuse_old_run(recipe: RecipeFile) -> None:
    """Raises:
    WorkshopError: the recipe's folder holds checkpoints, so NeMo would go on with them.
    """
    folder = Path(str(recipe.get("checkpoint.checkpoint_dir", "checkpoints/")))
    if any(folder.glob("epoch_*_step_*")):
        raise recipe.error(
            "checkpoint.checkpoint_dir",
            f"{folder} holds a run and NeMo would go on with it: give the recipe a new folder "
            "(fiqa_helpers.launch.fresh_folder), or pass resume=True if that is what you want.",
        )


def refuse_other_model(recipe: RecipeFile) -> None:
    """Raises:
    WorkshopError: the run to be continued was made with another model; NeMo would begin anew in silence.
    """
    folder = Path(str(recipe.get("checkpoint.checkpoint_dir", "checkpoints/")))
    saved = folder / "LATEST" / "config.yaml"
    if not saved.is_file():
        return
    key = "model.pretrained_model_name_or_path"
    before, now = read_recipe(saved).get(key), recipe.get(key)
    if before != now:
        raise recipe.error(
            key,
            f"the run in {folder} was made with the model {before}, not {now}: use that one, or give the "
            "recipe a new folder (fiqa_helpers.launch.fresh_folder).",
        )


def launch_line(
    path: Path | str, gpus: int = 1, nodes: int = 1, host: str = "", cpu: bool = False, python: str = ""
) -> str:
    """The command that runs the recipe on `gpus` GPUs of each of `nodes` nodes, to be typed on every node.

    `host` is the first node's name as the others reach it. With `cpu` the processes need no GPU.

    Raises:
        WorkshopError: the batch can't be shared like that, or several nodes and no host.
    """
    refuse_batch(read_recipe(Path(path)), gpus * nodes)
    start = f"{shlex.quote(python)} -m torch.distributed.run" if python else "torchrun"
    where = "--standalone"
    if nodes > 1:
        if not re.fullmatch(r"[A-Za-z0-9.-]+", host):
            raise WorkshopError(f"host is {host!r}: it must be the name of the first of the {nodes} nodes.")
        where = f"--nnodes {nodes} --rdzv-id fiqa --rdzv-backend c10d --rdzv-endpoint {host}:{PORT}"
    module = CPU_MODULE if cpu else MODULE
    return f"{start} {where} --nproc-per-node {gpus} -m {module} {shlex.quote(str(path))}"


def write_sbatch(
    path: Path | str,
    target: Path,
    gpus: int = 8,
    nodes: int = 1,
    hours: int = 4,
    partition: str = "",
    account: str = "",
    setup: str = "source .venv/bin/activate",
) -> Path:
    """Write a complete batch file for Slurm to `target`; returns it. `sbatch TARGET` submits it.

    Slurm sends SIGTERM two minutes before the time is up, at which NeMo saves a checkpoint and ends; the job
    then queues itself again and goes on from it, because the folder is the same. `setup` makes the
    environment's programs known.

    Raises:
        WorkshopError: the batch can't be shared like that, or a name with signs that Slurm does not take.
    """
    refuse_batch(read_recipe(Path(path)), gpus * nodes)
    for name, value in (("partition", partition), ("account", account)):
        if not re.fullmatch(r"[A-Za-z0-9_.,-]*", value):
            raise WorkshopError(f"{name} is {value!r}: use letters, digits and . , _ - only.")
    if re.search(r"\s", str(target.resolve())):
        raise WorkshopError(f"{target} has a space in its path, which Slurm does not take: use another.")
    if hours < 1:
        raise WorkshopError(f"hours is {hours}: a job needs at least one.")
    extra = "".join(
        f"#SBATCH --{name}={value}\n"
        for name, value in (("partition", partition), ("account", account))
        if value
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    written = _SBATCH.format(
        nodes=nodes,
        gpus=gpus,
        hours=f"{hours:02}",
        late=3600 * hours - 180,
        extra=extra,
        setup=setup,
        port=PORT,
        module=MODULE,
        logs=target.resolve().parent / "slurm-%j.log",
        recipe=shlex.quote(str(Path(path).resolve())),
        project=shlex.quote(str(Path(__file__).resolve().parent.parent)),
    )
    target.write_text(written, encoding="utf-8")
    return target


_SBATCH = """\
#!/bin/bash
#SBATCH --job-name=fiqa-lora
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={gpus}
#SBATCH --exclusive
#SBATCH --time={hours}:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={logs}
{extra}
set -euo pipefail
cd {project}
{setup}

export HF_HUB_OFFLINE=1  # fetch the model on the login node first: jobs often have no network
export TOKENIZERS_PARALLELISM=false
nodes=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))
head_node=${{nodes[0]}}  # not `| head`: under pipefail a scontrol that still writes would end the job

# one torchrun a node; each starts {gpus} processes, one a GPU
status=0
srun torchrun \\
  --nnodes "$SLURM_NNODES" --nproc-per-node {gpus} \\
  --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head_node:{port}" \\
  -m {module} {recipe} || status=$?

# ended near the time limit: that was Slurm's SIGTERM; the run is saved and goes on when its turn comes again
if (( status != 0 && SECONDS > {late} )); then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""
