"""recipes/fiqa_lora.yaml on this machine's GPUs beside notebook 04's trainer: speed, memory, losses.

    python benchmarks/recipe_bench.py FOLDER [--minutes 7] [--kill]

The 8B architecture with random weights (16 GB, written to FOLDER/model once), rows of FiQA's lengths: neither
changes a speed or a byte. Each run of RUNS is a process of its own and leaves FOLDER/recipe_NAME.json, as
long as there is time for it. `--small` tries the script with two narrow layers on any CPU.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from contenders import rows  # noqa: E402

from fiqa_helpers.base import write_card  # noqa: E402
from fiqa_helpers.profiles import PROFILES  # noqa: E402

WARM = 3  # steps that are not timed: kernels are chosen and memory is found in them
CHUNKED = "--loss_fn._target_=nemo_automodel.components.loss.chunked_ce.ChunkedCrossEntropy"
RUNS = {  # name: (GPUs, rows of a step, what else stands behind the file); in the order of importance
    "1gpu": (1, 16, []),
    "2gpu_ddp": (2, 32, []),
    "2gpu_fsdp2": (2, 32, ["--distributed.strategy=fsdp2"]),
    "2gpu_ddp_same_step": (2, 16, []),
    "1gpu_chunked_loss": (1, 16, [CHUNKED, "--loss_fn.compile=false"]),
    "2gpu_fsdp2_same_step": (2, 16, ["--distributed.strategy=fsdp2"]),
}
ON_A_CPU = ["--dist_env.backend=gloo", "--model.attn_implementation=sdpa", "--model.use_liger_kernel=false"]


def length_rows(tokenizer, split: str, rows_of=rows, **settings) -> list[dict]:
    """What the recipe trains on here: random tokens, as long as FiQA's rows, with shifted labels."""
    from fiqa_helpers.machinery.recipe import shift

    return [shift(row) for row in (rows_of() if split == "train" else rows_of().take(8))]


def make_model(folder: Path, small: bool) -> None:
    """The random model, under a tokenizer that only has the vocabulary's size: nothing is tokenized here."""
    from random_8b import write_random_8b
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"<{number}>": number for number in range(128_256)}
    ends = dict(bos_token="<128000>", eos_token="<128009>", pad_token="<128004>")
    backend = Tokenizer(models.WordLevel(words, unk_token="<0>"))
    write_random_8b(folder, PreTrainedTokenizerFast(tokenizer_object=backend, **ends), small)


def notebook(model: Path, steps: int) -> dict:
    """Notebook 04's trainer on one GPU: real tokens a second after warm-up, losses, memory."""
    import torch
    from notebook_trainer import notebook_trainer
    from transformers import TrainerCallback

    from fiqa_helpers.rows import StepCollator

    profile = replace(PROFILES["gpu80"], model=str(model), max_steps=steps)
    if not torch.cuda.is_available():
        profile = replace(profile, device="cpu", dtype="float32", layout="padded")
    collator, tokens, ends = StepCollator(128_004, profile.tokens_per_batch, profile.layout), [], []

    def counted(chosen: list[dict]) -> dict:
        tokens.append(sum(len(row["input_ids"]) - 1 for row in chosen))  # as a recipe's shifted rows count
        return collator(chosen)

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())  # the step's loss has been read: the device is done

    trainer = notebook_trainer(profile, model.parent / "notebook", rows(), rows().take(8), counted, [Clock()])
    trainer.train()
    return {
        "tokens_per_second": round(sum(tokens[WARM : len(ends)]) / (ends[-1] - ends[WARM - 1]), 1),
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),  # 0 without a GPU
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
    }


def behind(model: Path, output: Path, gpus: int, batch: int, steps: int, more: list[str]) -> list[str]:
    """What stands behind recipes/fiqa_lora.yaml for a run."""
    import torch

    changes = [
        f"--model.pretrained_model_name_or_path={model}",
        f"--dataset.tokenizer.name={model}",
        "--dataset._target_=recipe_bench.length_rows",
        "--validation_dataset._target_=recipe_bench.length_rows",
        f"--step_scheduler.global_batch_size={batch}",
        f"--step_scheduler.local_batch_size={batch // gpus}",
        f"--step_scheduler.max_steps={steps}",
        f"--step_scheduler.val_every_steps={steps}",
        f"--step_scheduler.ckpt_every_steps={steps // 2}",
        "--lr_scheduler.lr_warmup_steps=2",
        f"--checkpoint.checkpoint_dir={output}",
    ]
    return [*changes, *more, *([] if torch.cuda.is_available() else ON_A_CPU)]


def start(changes: list[str], gpus: int, log: Path) -> subprocess.Popen:
    """torchrun in a process of its own; its output goes to `log`."""
    from fiqa_helpers.machinery import recipe

    threads = str(max(1, (os.cpu_count() or 1) // gpus))
    environment = os.environ | {"OMP_NUM_THREADS": threads, "TQDM_DISABLE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")]
    )
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        return subprocess.Popen(recipe.launch(changes, gpus), stdout=out, stderr=out, env=environment)


def trained(folder: Path) -> list[dict]:
    """The steps of a run: loss, tokens, seconds, passes and memory of each."""
    from fiqa_helpers.machinery.recipe import read_metrics

    steps = [row for row in read_metrics(folder) if "loss" in row]
    return [row | {"seconds": row["tokens"] / row["tokens_per_second"]} for row in steps]


def recipe_run(name: str, args: argparse.Namespace, seconds: float) -> dict:
    """One run of RUNS, as a card; a failure is a result too."""
    from fiqa_helpers.machinery import machine
    from fiqa_helpers.machinery.recipe import why_it_failed

    gpus, batch, more = RUNS[name]
    folder = args.folder / name
    changes = behind(args.folder / "model", folder, gpus, batch, args.steps, more)
    process = start(changes, gpus, folder / "run.log")
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        kill_all(process)
    card = {
        "benchmark": "recipe",
        "gpus": gpus,
        "global_batch_size": batch,
        "local_batch_size": batch // gpus,
    }
    card |= {"strategy": "fsdp2" if "fsdp2" in name else "ddp", "behind": more, "device": machine.describe()}
    card |= {"profile": asdict(PROFILES["gpu80"]), "weights": "random"}
    steps = trained(folder)
    # a step after an evaluation or a checkpoint has waited for it
    timed = [
        row for row, before in zip(steps[WARM:], steps[WARM - 1 :], strict=False) if "eval_loss" not in before
    ]
    if process.returncode or not timed:
        return card | {"error": why_it_failed(folder / "run.log"), "log": tail(folder / "run.log")}
    return card | {
        "tokens_per_second": round(sum(r["tokens"] for r in timed) / sum(r["seconds"] for r in timed), 1),
        "seconds_per_step_median": round(statistics.median(row["seconds"] for row in timed), 4),
        "steps_timed": len(timed),
        "passes": [row["passes"] for row in steps],
        "peak_allocated_gib_first_gpu": round(max(row["memory_gib"] for row in steps), 2),
        "losses": [row["loss"] for row in steps],
        "steps": steps,
    }


def tail(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:]


def kill_all(torchrun: subprocess.Popen) -> None:
    """SIGKILL a torchrun and the processes it started, each of which has a session of its own."""
    import psutil

    family = psutil.Process(torchrun.pid).children(recursive=True)
    torchrun.kill()
    for process in family:
        process.kill()
    psutil.wait_procs(family, timeout=60)
    torchrun.wait()


def kill_and_resume(name: str, args: argparse.Namespace, seconds: float) -> dict:
    """The run `name` again, all of it killed after its first checkpoint, and started again to its end."""
    gpus, batch, more = RUNS[name]
    folder, ends = args.folder / f"{name}_killed", time.monotonic() + seconds
    more = [*more, "--peft.dropout=0.0"]
    changes = behind(args.folder / "model", folder, gpus, batch, args.steps, more)
    process = start(changes, gpus, folder / "run.log")
    while process.poll() is None and not (folder / "LATEST").exists() and time.monotonic() < ends:
        time.sleep(0.1)
    kill_all(process) if process.poll() is None else None
    before = trained(folder)
    for file in folder.glob("*.jsonl"):  # so that only the resumed run's lines are read
        file.rename(folder / f"killed_{file.name}.txt")
    code = start(changes, gpus, folder / "run.log").wait(max(1, ends - time.monotonic()))
    after = trained(folder)
    return {
        "exit_code": code,
        "steps_before": [row["step"] for row in before],
        "losses_before": [row["loss"] for row in before],
        "steps_after": [row["step"] for row in after],
        "losses_after": [row["loss"] for row in after],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="for the model, the runs and the results")
    parser.add_argument("--steps", type=int, default=14, help="optimizer steps of each, 3 of them to warm up")
    parser.add_argument("--minutes", type=float, default=7, help="begin no run that would end later")
    parser.add_argument("--only", default=",".join(RUNS), help="names of RUNS, with commas")
    parser.add_argument(
        "--kill", action="store_true", help="also kill and resume both strategies on two GPUs"
    )
    parser.add_argument("--small", action="store_true", help="two narrow layers, to try this on a CPU")
    parser.add_argument("--notebook-to", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.folder = args.folder.resolve()
    if args.notebook_to:
        args.notebook_to.write_text(json.dumps(notebook(args.folder / "model", args.steps)))
        return
    began, longest = time.monotonic(), 60.0

    def left() -> float:
        return 60 * args.minutes - (time.monotonic() - began)

    args.folder.mkdir(parents=True, exist_ok=True)
    if not (args.folder / "model").is_dir():
        make_model(args.folder / "model", args.small)
    print(f"the model is there after {time.monotonic() - began:.0f} s", flush=True)
    beside = args.folder / "notebook.json"
    line = [
        sys.executable,
        __file__,
        str(args.folder),
        "--steps",
        str(args.steps),
        "--notebook-to",
        str(beside),
    ]
    subprocess.run(line, timeout=max(1, left()), check=False)
    trainer = json.loads(beside.read_text()) if beside.is_file() else {}
    print(f"notebook 04's trainer: {trainer} after {time.monotonic() - began:.0f} s", flush=True)
    for name in args.only.split(","):
        if left() < longest:
            print(f"{name}: no time left", flush=True)
            continue
        started = time.monotonic()
        card = recipe_run(name, args, left())
        card["notebook_tokens_per_second"] = trainer.get("tokens_per_second")
        write_card(args.folder / f"recipe_{name}.json", **card)
        longest = max(longest, time.monotonic() - started)
        shown = card.get("error") or (
            f"{card['tokens_per_second']:,.0f} tokens/s, {card['peak_allocated_gib_first_gpu']} GiB, "
            f"passes {card['passes']}, losses {card['losses'][:3]}"
        )
        print(f"{name}: {shown} [{time.monotonic() - started:.0f} s]\n{card.get('log', '')}", flush=True)
    for name in ("2gpu_ddp", "2gpu_fsdp2") if args.kill else ():
        if left() > 2 * longest:
            found = kill_and_resume(name, args, left())
            write_card(args.folder / f"recipe_{name}_killed.json", benchmark="recipe_killed", **found)
            print(f"{name}, killed and resumed: {found}", flush=True)


if __name__ == "__main__":
    main()
