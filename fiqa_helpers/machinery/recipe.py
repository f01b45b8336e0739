"""What recipes/fiqa_lora.yaml names: rows, packed batches, the recipe; a run checked, started, followed.

The engine is NeMo AutoModel 0.7.0 under torchrun; its command line takes `--section.key=value` behind the
file. Importing this module imports nemo_automodel. On a CPU torchrun runs this module itself.
"""

import contextlib
import ctypes
import fnmatch
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from nemo_automodel.cli import app
from nemo_automodel.components._peft.lora import apply_lora_to_linear_modules
from nemo_automodel.components.config._arg_parser import parse_args_and_load_config
from nemo_automodel.recipes._typed_config import RecipeConfig
from nemo_automodel.recipes.llm.train_ft import TrainFinetuneRecipeForNextTokenPrediction
from torch.utils.tensorboard import SummaryWriter
from transformers import AutoConfig, AutoModelForCausalLM

from fiqa_helpers import data, model
from fiqa_helpers.base import WorkshopError, project_root
from fiqa_helpers.machinery.fast import lighten_norms, register_packed_attention
from fiqa_helpers.machinery.live import TRAINING, LivePanel
from fiqa_helpers.machinery.machine import NEMOTRON, cpu_cores, peak_memory_gib
from fiqa_helpers.profiles import PROFILES
from fiqa_helpers.rows import IGNORE_INDEX, Row, encode, pack_rows, split_rows

register_packed_attention()  # before a model with `attn_implementation: packed_varlen` is loaded

# --- What the YAML names: rows, tokenizer, packed batches, the recipe class.


def fiqa_rows(tokenizer, folder: str, split: str, rows: int, prompt: str, max_length: int) -> list[Row]:
    """The first `rows` (-1: all) of a split that notebook 01 wrote to `folder`, with shifted labels."""
    chosen = data.read_processed(Path(folder))[split].to_list()[: None if rows < 0 else rows]
    pairs = ((row["question"], row["ground_truths"][0]) for row in chosen)
    return [shift(encode(*pair, tokenizer, prompt, max_length)) for pair in pairs]


def shift(row: Row) -> Row:
    """A row of n tokens as notebook 04 has it -> the n - 1 positions of a recipe.

    transformers' models compare position i with label i + 1 by themselves. A recipe compares position i with
    label i, so there `labels[i]` is the token after `input_ids[i]`.
    """
    return {"input_ids": list(row["input_ids"][:-1]), "labels": list(row["labels"][1:])}


def load_tokenizer(name: str, revision: str = "main", trust_remote_code: bool = False):
    """The notebooks' tokenizer. NeMo adds `trust_remote_code`; whatever it says, no model's code is run."""
    return model.load_tokenizer(replace(PROFILES["gpu80"], model=name, model_revision=revision))


def packed_collate(rows: Sequence[Row]) -> dict[str, object]:
    """Rows with shifted labels -> one sequence of shape (1, all tokens): no padding.

    `position_ids` restart at 0 in each row, which tells the rows apart; `cu_seq_lens_q` and `_k` (int32,
    rows + 1 offsets) say the same to the attention kernel. Without `use_cache: False` rows would see one
    another.
    """
    pack = pack_rows(rows)
    del pack["logits_to_keep"], pack["shift_labels"]  # here labels are shifted and the loss reads all logits
    return pack | {"use_cache": False}


def unpack(pack: dict[str, object]) -> list[Row]:
    """The rows of a pack of `packed_collate`, in their order."""
    lengths = pack["cu_seq_lens_q"].diff().tolist()
    ids, labels = (pack[name][0].split(lengths) for name in ("input_ids", "labels"))
    return [{"input_ids": a.tolist(), "labels": b.tolist()} for a, b in zip(ids, labels, strict=True)]


def deal(rows: Sequence[Row], gpus: int, tokens: int) -> list[list[list[Row]]]:
    """The rows of a step -> for each GPU the groups of its passes, of at most `tokens` tokens each.

    Sixteen rows can be twice as long as another sixteen, and every GPU waits for the last one. So the longest
    row is dealt first, each to the GPU with the fewest tokens (Graham 1969,
    https://doi.org/10.1137/0117039). The gradient sums over all rows, whoever takes them.
    """
    hands: list[list[Row]] = [[] for _ in range(gpus)]
    for row in sorted(rows, key=lambda row: len(row["input_ids"]), reverse=True):
        min(hands, key=lambda hand: sum(len(row["input_ids"]) for row in hand)).append(row)
    return [split_rows(hand, tokens, "packed") for hand in hands]


@contextlib.contextmanager
def end_all_together() -> Iterator[None]:
    """End this process at once on an error, also while it loads a model, so that torchrun ends the others.

    A normal exit waits for NCCL, which waits for the other processes, which wait for this one.
    """
    try:
        yield
    except Exception:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            raise
        sys.excepthook(*sys.exc_info())  # prints it, with the rank
        os._exit(1)


class FiqaRecipe(TrainFinetuneRecipeForNextTokenPrediction):
    """NeMo's recipe for fine-tuning, with a bound on the tokens of a pass and reports that can be followed.

    Every record is in training.jsonl and validation.jsonl at once (NeMo keeps a hundred back) and in
    TensorBoard; `lr` is the rate that the step was taken with (NeMo's is the next step's). A failure of one
    process ends all of them.
    """

    def setup(self) -> None:
        with end_all_together():
            super().setup()
        if torch.cuda.is_available():
            lighten_norms(self.model_parts[0])
        self.tokens_per_pass = self.cfg.get("packing.tokens_per_pass")
        folder = f"{self.checkpointer.config.checkpoint_dir}/tensorboard"
        self.boards = SummaryWriter(folder) if self.dist_env.is_main else None

    def _run_train_optim_step(self, batches, max_grad_norm=None):
        rate = self.optimizer[0].param_groups[0]["lr"]
        rows = [row for batch in batches for row in unpack(batch)]
        everybodys = [rows] * dist.get_world_size()
        dist.all_gather_object(everybodys, rows)
        hands = deal(sum(everybodys, []), dist.get_world_size(), self.tokens_per_pass)
        passes = [packed_collate(group) for group in hands[dist.get_rank()]]
        # FSDP2 gathers weights in every pass, so all processes make as many: without loss where rows ran out
        most = max(map(len, hands))
        idle = packed_collate([{"input_ids": [0, 0], "labels": [IGNORE_INDEX] * 2}])
        record = super()._run_train_optim_step(passes + [idle] * (most - len(passes)), max_grad_norm)
        # NeMo's own memory would be 0 on a CPU, and leave out what torch has reserved on a GPU
        record.metrics |= {"lr": rate, "passes": most, "mem": peak_memory_gib()}
        return record

    def log_train_metrics(self, log_data) -> None:
        super().log_train_metrics(log_data)
        self._write("train", log_data, self.metric_logger_train)

    def log_val_metrics(self, val_name, log_data, metric_logger=None) -> None:
        super().log_val_metrics(val_name, log_data, metric_logger)
        self._write("validation", log_data, metric_logger)

    def _write(self, group: str, record, logger) -> None:
        if self.boards is not None:
            logger.flush()
            for name in {"loss", "lr", "grad_norm", "tps", "mem", "val_loss"} & record.metrics.keys():
                self.boards.add_scalar(f"{group}/{name}", float(record.metrics[name]), record.step + 1)
            self.boards.flush()

    def run_train_validation_loop(self) -> None:
        with end_all_together():
            super().run_train_validation_loop()


# --- A run checked before it starts.


def recipe_file() -> Path:
    """The recipe of this project."""
    return project_root() / "recipes" / "fiqa_lora.yaml"


def check_recipe(changes: Sequence[str] = (), gpus: int = 1, tokenizer=None) -> dict[str, object]:
    """Build all of a run but its weights, without a GPU, and say what it would do; nothing is started.

    `changes` are what stands behind the file, `--section.key=value`. `tokenizer` stands in for the recipe's
    own where the hub can't be reached. Returns rows, steps, learning_rates (one for each
    step), lora_modules, trainable and base_parameters, batch (the first of the first GPU) and folder.

    Raises:
        WorkshopError: a key that NeMo would read past, rows that can't be shared by the GPUs, a layer that is
            not there, a folder that holds a run, data or model missing, or what NeMo itself refuses.
    """
    try:  # NeMo names the file, and prints an error before it raises it
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            config, ours = (parse_args_and_load_config(str(recipe_file()), argv) for argv in ([*changes], []))
            # "" is the top of the file; in the other sections NeMo itself refuses unknown keys
            for name in ("", "model", "distributed", "dist_env", "packing"):
                found, known = ({*(c.get(name) if name else c).to_dict()} for c in (config, ours))
                if unknown := found - known - {"wandb", "mlflow", "mp_policy"}:
                    said = f"{name or 'The file'} has no {min(unknown)}: it has {', '.join(sorted(known))}."
                    raise WorkshopError(said)
            return _build(config, RecipeConfig(config), gpus, tokenizer)
    except Exception as error:  # NeMo raises all kinds, bare ones too
        raise WorkshopError(f"This run can't be built: {error}") from error


def _build(config, recipe: RecipeConfig, gpus: int, tokenizer) -> dict[str, object]:
    folder = Path(config.get("checkpoint.checkpoint_dir"))
    if any(folder.glob("epoch_*_step_*")):
        raise WorkshopError(f"{folder} holds a run, and NeMo would go on with it: name a new checkpoint_dir.")
    name = config.get("model.pretrained_model_name_or_path")
    kind = model.reference_config() if name == NEMOTRON else AutoConfig.from_pretrained(name)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(kind)
        base = skeleton.num_parameters()
        apply_lora_to_linear_modules(skeleton, recipe.peft.instantiate())
    adapted = [name for name, part in skeleton.named_modules() if hasattr(part, "lora_A")]
    for pattern in recipe.peft.target_modules:
        if not fnmatch.filter(adapted, pattern):
            raise WorkshopError(f"peft.target_modules: {pattern} matches no layer: NeMo would leave it out.")
    tokenizer = tokenizer or recipe.dataset.tokenizer.instantiate()
    loader = recipe.dataloader.build(tokenizer=tokenizer, dp_rank=0, dp_world_size=gpus)
    scheduler = replace(recipe.step_scheduler, preemption_signal=None)  # no signal handler in this process
    steps = scheduler.build(loader, gpus, config.get("step_scheduler.local_batch_size"))
    optimizer = recipe.optimizer.build(skeleton, is_peft=True)
    schedule, rates = recipe.lr_scheduler.build(optimizer, steps)[0], []
    for _ in range(min(steps.max_steps, steps.num_epochs * steps.epoch_len)):
        rates.append(optimizer[0].param_groups[0]["lr"])
        schedule.step(1)
    return {
        "rows": len(loader.dataset),
        "steps": len(rates),
        "learning_rates": rates,
        "lora_modules": adapted,
        "trainable": sum(p.numel() for p in skeleton.parameters() if p.requires_grad),
        "base_parameters": base,
        "batch": next(iter(loader)),
        "folder": folder,
    }


# --- Start a run in processes of its own, and follow it.


def on_cpu(changes: Sequence[str]) -> bool:
    """Whether a run takes the CPU: without a GPU, or where gloo is asked for, as for profile laptop."""
    return "--dist_env.backend=gloo" in changes or not torch.cuda.is_available()


def launch(changes: Sequence[str] = (), gpus: int = 1) -> list[str]:
    """The command, word by word, for `gpus` GPUs of this machine, or on a CPU for as many processes."""
    module = "fiqa_helpers.machinery.recipe" if on_cpu(changes) else "nemo_automodel.cli.app"
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"]
    return [*start, "-m", module, str(recipe_file()), *changes]


def follow(process: subprocess.Popen, folder: Path, panel: LivePanel) -> None:
    """Show what `process` writes to `folder` in `panel`, until it has ended or Stop is pressed."""
    going = True
    while going:
        going = process.poll() is None and not panel.stop.wait(0.3)
        panel.history = read_metrics(folder)
        panel.step = max((row["step"] for row in panel.history), default=0)
        panel.show(TRAINING)


def read_metrics(folder: Path) -> list[dict]:
    """Lines of training.jsonl and validation.jsonl joined by step (from 1), in the panel's words.

    A half line at the end waits. A step that a resumed run took again counts once, as taken last.
    """
    rows: dict[int, dict] = {}
    training = {"loss": "loss", "lr": "learning_rate", "tps": "tokens_per_second", "mem": "memory_gib"}
    training |= {"num_tokens_per_step": "tokens", "passes": "passes"}
    for name, columns in (("training", training), ("validation", {"val_loss": "eval_loss"})):
        file = folder / f"{name}.jsonl"
        for line in file.read_text().split("\n")[:-1] if file.exists() else []:
            record = json.loads(line)
            row = rows.setdefault(record["step"] + 1, {"step": record["step"] + 1})
            row |= {ours: record[theirs] for theirs, ours in columns.items()}
    return [rows[step] for step in sorted(rows)]


def run_recipe(changes: Sequence[str], panel: LivePanel, gpus: int = 1) -> Path:
    """Check, start and follow a run on this machine; returns the folder of the PEFT adapter that it left.

    The output of all processes goes to `run.log` beside the checkpoints. Stop (the button or an interrupt)
    asks NeMo for a checkpoint and ends the run.

    Raises:
        WorkshopError: what `check_recipe` refuses, before any process starts; or the run failed.
    """
    report = check_recipe(changes, gpus)
    folder, panel.total = report["folder"], report["steps"]
    folder.mkdir(parents=True, exist_ok=True)
    for earlier in folder.glob("*.jsonl"):  # of an attempt that ended before its first checkpoint
        earlier.unlink()
    threads = str(cpu_cores() // gpus or 1)  # torchrun's own choice is one
    environment = os.environ | {"OMP_NUM_THREADS": threads, "TQDM_DISABLE": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": ""} if on_cpu(changes) else {}
    with (folder / "run.log").open("wb") as log, panel:
        options = dict(stdout=log, stderr=log, env=environment, start_new_session=True)
        process = subprocess.Popen(launch(changes, gpus), preexec_fn=end_with_parent, **options)
        try:
            follow(process, folder, panel)
        finally:
            process.send_signal(signal.SIGTERM)  # does nothing to one that has ended
            process.wait(90)  # torchrun itself kills, after 30 s, a process that doesn't save and end
            follow(process, folder, panel)  # once more
    adapter = folder / "LATEST" / "model"
    if (process.returncode and not panel.stopped) or not (adapter / "adapter_model.safetensors").is_file():
        raise WorkshopError(why_it_failed(folder / "run.log"))
    return adapter.resolve()


def end_with_parent() -> None:
    """When the kernel dies, torchrun gets SIGTERM and ends its processes (PR_SET_PDEATHSIG; Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def why_it_failed(log: Path) -> str:
    """One sentence: the error that came first in the log, which is seldom in its last line."""
    # torchrun's own ChildFailedError says nothing
    pattern = r"^(?:\[rank\d+\]:\s*)?(?:\w+\.)*(?!ChildFailed)(\w+(?:Error|Exception)): (.+)$"
    found = re.search(pattern, log.read_text(errors="replace"), re.MULTILINE)
    kind, reason = found.groups() if found else ("killed", "no error in its log")
    remedy = "halve --packing.tokens_per_pass; " if kind == "OutOfMemoryError" else ""
    return f"The recipe failed ({kind}: {reason[:300].rstrip('.')}): {remedy}look at {log}."


if __name__ == "__main__":  # on a CPU: what NeMo asks CUDA while it loads a model is answered
    with model.nemo_on_cpu("cpu"), mock.patch.object(torch.cuda, "reset_peak_memory_stats", lambda *_: None):
        sys.exit(app.main())
