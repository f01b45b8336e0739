"""recipes/fiqa_lora.yaml on this machine's GPUs beside notebook 04's trainer.

    python benchmarks/recipe_bench.py speed FOLDER    # the 8B architecture, random weights, FiQA's lengths
    python benchmarks/recipe_bench.py agree FOLDER    # SmolLM2's real weights: losses, validation, PEFT
    python benchmarks/recipe_bench.py resume FOLDER   # after `agree`: killed (SIGKILL) and started again

Each run is a process of its own and each part writes its result to `--out` as soon as it has it. Runs that
need more GPUs than there are are left out. `--small` tries a part with two narrow layers on a CPU.
"""

import argparse
import contextlib
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

from contenders import FOLDER, WARM_UP, random_folder, rows  # noqa: E402

from fiqa_helpers.base import write_card  # noqa: E402
from fiqa_helpers.profiles import PROFILES, load_profile  # noqa: E402

FSDP2 = ["--distributed.strategy=fsdp2"]
CHUNKED = "--loss_fn._target_=nemo_automodel.components.loss.chunked_ce.ChunkedCrossEntropy"
SPEED = {  # result file: (GPUs, rows of a step, what else stands behind the recipe)
    "recipe": (1, 16, []),
    "recipe_2gpu": (2, 32, []),
    "recipe_4gpu": (4, 64, []),
    "recipe_2gpu_fsdp2": (2, 32, FSDP2),
    "recipe_4gpu_fsdp2": (4, 64, FSDP2),
    "recipe_2gpu_same_step": (2, 16, []),
    "recipe_4gpu_same_step": (4, 16, []),
    "recipe_chunked_loss": (1, 16, [CHUNKED, "--loss_fn.compile=false"]),
}
AGREE = {"ddp_1": (1, []), "ddp_2": (2, []), "fsdp2_2": (2, FSDP2), "ddp_4": (4, []), "fsdp2_4": (4, FSDP2)}
STEPS, SAVED = 60, 20  # of AGREE; a checkpoint every so many
ON_A_CPU = ["--dist_env.backend=gloo", "--model.attn_implementation=sdpa", "--model.use_liger_kernel=false"]


# -- runs of the recipe


def length_rows(tokenizer, split: str, rows_of=rows, **settings) -> list[dict]:
    """What `speed` trains on: random tokens, as long as FiQA's rows, with shifted labels."""
    from fiqa_helpers.machinery.recipe import shift

    return [shift(row) for row in (rows_of() if split == "train" else rows_of().take(8))]


def behind(model: Path, output: Path, gpus: int, batch: int, steps: int, saved: int) -> list[str]:
    """What stands behind recipes/fiqa_lora.yaml for any run here."""
    changes = {
        "model.pretrained_model_name_or_path": model,
        "dataset.tokenizer.name": model,
        "step_scheduler.global_batch_size": batch,
        "step_scheduler.local_batch_size": batch // gpus,
        "step_scheduler.max_steps": steps,
        "step_scheduler.val_every_steps": steps,
        "step_scheduler.ckpt_every_steps": saved,
        "lr_scheduler.lr_warmup_steps": -(-steps // 10),
        "checkpoint.checkpoint_dir": output,
    }
    return [f"--{name}={value}" for name, value in changes.items()] + ([] if cards() else ON_A_CPU)


def random_rows(model: Path, output: Path, gpus: int, batch: int, steps: int) -> list[str]:
    """Behind the recipe for a run of `speed`, on `length_rows`."""
    ours = [f"--{name}._target_=recipe_bench.length_rows" for name in ("dataset", "validation_dataset")]
    return [*behind(model, output, gpus, batch, steps, steps), *ours]


def cards() -> int:
    """GPUs of this machine."""
    import torch

    return torch.cuda.device_count()


def start(changes: list[str], gpus: int, first: int = 0) -> subprocess.Popen:
    """torchrun in a process of its own, on `gpus` GPUs from number `first`; run.log has its output."""
    from fiqa_helpers.machinery import recipe

    folder_of(changes).mkdir(parents=True, exist_ok=True)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(cards())))
    environment = os.environ | {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // gpus // 2)),
        "TQDM_DISABLE": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")]),
        "CUDA_VISIBLE_DEVICES": ",".join(visible.split(",")[first : first + gpus]),
    }
    with (folder_of(changes) / "run.log").open("ab") as log:
        options = dict(stdout=log, stderr=log, env=environment, preexec_fn=recipe.end_with_parent)
        return subprocess.Popen(recipe.launch(changes, gpus), **options)


def folder_of(changes: list[str]) -> Path:
    return next(Path(text.partition("=")[2]) for text in changes if "checkpoint_dir=" in text)


def kill_all(torchrun: subprocess.Popen) -> None:
    """SIGKILL a torchrun and the processes it started, each of which has a session of its own."""
    import psutil

    family = psutil.Process(torchrun.pid).children(recursive=True)
    torchrun.kill()
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(family, timeout=60)
    torchrun.wait()


def ended(process: subprocess.Popen, folder: Path, seconds: float = 300) -> list[dict]:
    """The steps of a run once it has ended: loss, tokens, seconds, passes and memory of each.

    Raises:
        RuntimeError: it failed or took too long, with the first error of its log.
    """
    from fiqa_helpers.machinery.recipe import read_metrics, why_it_failed

    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        kill_all(process)
        code = "out of time"
    if code:
        print((folder / "run.log").read_text(errors="replace")[-3000:], flush=True)
        raise RuntimeError(f"{code}: {why_it_failed(folder / 'run.log')}")
    steps = [row for row in read_metrics(folder) if "loss" in row]
    return [row | {"seconds": row["tokens"] / row["tokens_per_second"]} for row in steps]


def train(changes: list[str], gpus: int) -> list[dict]:
    """The steps of one run, from its start to its end."""
    return ended(start(changes, gpus), folder_of(changes))


def undisturbed(steps: list[dict]) -> list[dict]:
    """Steps to be timed: kernels are chosen in the first ones; one after an evaluation has waited for it."""
    pairs = zip(steps[WARM_UP:], steps[WARM_UP - 1 :], strict=False)
    return [row for row, before in pairs if "eval_loss" not in before]


# -- speed


def speed(args: argparse.Namespace) -> None:
    from fiqa_helpers.machinery import machine

    ends = time.monotonic() + 60 * args.minutes
    model = random_folder(args.folder / "small", small=True) if args.small else FOLDER
    if not args.small:  # in a process of its own, so that the GPU is free afterwards
        subprocess.run(
            [sys.executable, "-c", "import contenders; contenders.random_folder()"], cwd=HERE, check=True
        )
    beside = args.folder / "gpu80.json"
    if cards():
        command = [sys.executable, HERE / "contenders.py", "gpu80", beside, "--steps", str(args.steps)]
        subprocess.run(command)
    notebook = json.loads(beside.read_text())["tokens_per_second"] if beside.exists() else None
    print(f"notebook 04's trainer: {notebook} tokens/s", flush=True)
    names, longest = args.only.split(",") if args.only else [*SPEED], 45.0
    for name in names:
        gpus, batch, more = SPEED[name]
        began = time.monotonic()
        if gpus > max(cards(), args.small) or began + longest > ends:
            print(f"{name}: too few GPUs, or no time left", flush=True)
            continue
        try:
            steps = train([*random_rows(model, args.folder / name, gpus, batch, args.steps), *more], gpus)
        except RuntimeError as error:
            print(f"{name}: {error}", flush=True)
            continue
        timed = undisturbed(steps)
        card = {
            "benchmark": "recipe",
            "gpus": gpus,
            "global_batch_size": batch,
            "local_batch_size": batch // gpus,
            "strategy": "fsdp2" if more == FSDP2 else "ddp",
            "behind": more,
            "device": machine.describe(),
            "profile": asdict(PROFILES["gpu80"]),
            "weights": "random",
            "tokens_per_second": round(sum(r["tokens"] for r in timed) / sum(r["seconds"] for r in timed), 1),
            "seconds_per_step_median": round(statistics.median(row["seconds"] for row in timed), 4),
            "steps_timed": len(timed),
            "passes": [row["passes"] for row in steps],
            "peak_reserved_gib_first_gpu": round(max(row["memory_gib"] for row in steps), 2),
            "losses": [row["loss"] for row in steps],
            "notebook_tokens_per_second": notebook,
        }
        write_card(args.out / f"{name}.json", **card)
        longest = max(longest, time.monotonic() - began)
        print(f"{name}: {card['tokens_per_second']:,.0f} tokens/s, losses {card['losses'][:3]}", flush=True)


# -- the same losses on any number of GPUs, and as notebook 04


def smollm2(args: argparse.Namespace):
    """(profile, folder of its model): the reference settings, SmolLM2's real weights, packaged rows.

    In bf16, as Nemotron's files are: NeMo keeps the type of the files.
    """
    from transformers import AutoModelForCausalLM

    from fiqa_helpers import model

    named = ("tiny", "") if args.small else ("gpu80", "{model: packaged, data: packaged}")
    profile = replace(load_profile(*named), max_steps=args.steps, eval_rows=48)
    folder = args.folder / "smollm2"
    if not folder.exists():
        weights = AutoModelForCausalLM.from_pretrained(model.model_path(profile), dtype=profile.dtype)
        weights.save_pretrained(folder)
        model.load_tokenizer(profile).save_pretrained(folder)
    return replace(profile, model=str(folder)), folder


def real_rows(args: argparse.Namespace, output: Path, gpus: int) -> list[str]:
    """Behind the recipe for a run of `agree`."""
    profile, model = smollm2(args)
    changes = behind(model, output, gpus, profile.batch_size, args.steps, min(SAVED, args.steps // 2))
    for name, count in (("dataset", profile.train_rows), ("validation_dataset", profile.eval_rows)):
        changes += [f"--{name}.folder={args.folder / 'fiqa'}", f"--{name}.rows={count}"]
        changes += [f"--{name}.max_length={profile.max_length}"]
    return [*changes, f"--model.torch_dtype={profile.dtype}", f"--optimizer.lr={profile.learning_rate}"]


def agree(args: argparse.Namespace) -> None:
    from fiqa_helpers import data

    (args.folder / "fiqa").mkdir(exist_ok=True)
    data.write_processed(data.load_fiqa("packaged"), args.folder / "fiqa")
    found = {}
    command = [sys.executable, __file__, "notebook", args.folder, "--steps", str(args.steps)]
    subprocess.run([*command, *["--small"] * args.small], check=True)
    found["notebook"] = json.loads((args.folder / "notebook.json").read_text())
    for wave in waves(AGREE, max(cards(), 2 * args.small)):
        going = {}
        for name, gpus, more, first in wave:
            going[name] = start([*real_rows(args, args.folder / name, gpus), *more], gpus, first)
        for name, process in going.items():
            try:
                steps = ended(process, args.folder / name)
            except RuntimeError as error:
                print(f"{name}: {error}", flush=True)
                continue
            found[name] = {
                "losses": [row["loss"] for row in steps],
                "validation_loss": [row["eval_loss"] for row in steps if "eval_loss" in row][-1],
            }
        write_agreement(args, found)
    for name in found.keys() & AGREE.keys():
        found[name]["validation_loss_in_peft"] = peft_loss(args, args.folder / name / "LATEST" / "model")
    write_agreement(args, found)


def waves(runs: dict, count: int) -> list[list[tuple]]:
    """`runs` in groups that run side by side, each on GPUs of its own: (name, GPUs, behind, first GPU)."""
    made, first = [[]], 0
    for name, (gpus, more) in runs.items():
        if gpus > count:
            continue
        if first + gpus > count:
            made.append([])
            first = 0
        made[-1].append((name, gpus, more, first))
        first += gpus
    return made


def write_agreement(args: argparse.Namespace, found: dict) -> None:
    """`found` with distances: the first 20 steps and the validation loss from notebook 04's."""
    notebook = found["notebook"]
    for name, run in found.items():
        steps = zip(run["losses"][:20], notebook["losses"][:20], strict=True)
        run["largest_step_difference"] = round(max(abs(a - b) for a, b in steps), 5)
        run["validation_difference"] = round(run["validation_loss"] - notebook["validation_loss"], 5)
        print(name, {key: value for key, value in run.items() if key != "losses"}, flush=True)
    profile, _ = smollm2(args)
    write_card(args.out / "recipe_agree.json", benchmark="recipe_agree", profile=asdict(profile), runs=found)


def notebook(args: argparse.Namespace) -> None:
    """Notebook 04's trainer on the rows of `agree`, on one GPU."""
    from notebook_trainer import logged, notebook_trainer

    from fiqa_helpers import data, model
    from fiqa_helpers.machinery.fast import attention_implementation
    from fiqa_helpers.rows import StepCollator, encode_rows

    profile, _ = smollm2(args)
    tokenizer, splits = model.load_tokenizer(profile), data.read_processed(args.folder / "fiqa")
    train = splits["train"] if profile.train_rows < 0 else splits["train"].take(profile.train_rows)
    rows = [encode_rows(split, tokenizer, profile) for split in (train, splits["validation"])]
    collator = StepCollator(tokenizer.pad_token_id, profile.tokens_per_batch, profile.layout)
    base = model.load_base(profile, attention_implementation(profile.layout, profile.device))
    trainer = notebook_trainer(profile, args.folder / "notebook", base, collator, *rows)
    trainer.train()
    found = {"losses": logged(trainer), "validation_loss": trainer.evaluate()["eval_loss"]}
    (args.folder / "notebook.json").write_text(json.dumps(found))


def peft_loss(args: argparse.Namespace, adapter: Path) -> float:
    """The validation loss of a recipe's adapter on the base model, by transformers and PEFT alone."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from fiqa_helpers import data, model
    from fiqa_helpers.rows import IGNORE_INDEX, encode_rows, pad_rows

    profile, base = smollm2(args)
    tokenizer = model.load_tokenizer(profile)
    held_out = data.read_processed(args.folder / "fiqa")["validation"].take(profile.eval_rows)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=profile.dtype).to(profile.device)
    tuned, total, tokens = PeftModel.from_pretrained(plain, adapter).eval(), 0.0, 0
    for row in encode_rows(held_out, tokenizer, profile):
        batch = {name: value.to(profile.device) for name, value in pad_rows([row], 0).items()}
        with torch.no_grad():
            total += tuned(**batch, num_items_in_batch=1).loss.item()
        tokens += sum(label != IGNORE_INDEX for label in row["labels"])
    return total / tokens


# -- killed and resumed


def resume(args: argparse.Namespace) -> None:
    """`ddp_2` and `fsdp2_2` again, killed after their first checkpoint, and started again to the end."""
    whole = json.loads((args.out / "recipe_agree.json").read_text())["runs"]
    found = {}
    for name in ("ddp_2", "fsdp2_2"):
        folder = args.folder / f"{name}_killed"
        changes = [*real_rows(args, folder, 2), *AGREE[name][1]]
        process, ends = start(changes, 2), time.monotonic() + 120
        while process.poll() is None and not (folder / "LATEST").exists() and time.monotonic() < ends:
            time.sleep(0.02)
        kill_all(process)
        for file in folder.glob("*.jsonl"):  # so that only the resumed run's lines are read
            file.rename(folder / f"killed_{file.name}.txt")
        saved = int((folder / "LATEST").resolve().name.rpartition("_")[2]) + 1
        steps = train(changes, 2)
        pairs = [(row["loss"], whole[name]["losses"][row["step"] - 1]) for row in steps]
        found[name] = {
            "saved_after_step": saved,
            "went_on_at_step": steps[0]["step"],
            "largest_step_difference": round(max(abs(a - b) for a, b in pairs), 5),
            "last_losses": pairs[-1],
            "validation_losses": [steps[-1]["eval_loss"], whole[name]["validation_loss"]],
        }
        print(name, found[name], flush=True)
        write_card(args.out / "recipe_resume.json", benchmark="recipe_resume", runs=found)


def main() -> None:
    parts = {"speed": speed, "agree": agree, "resume": resume, "notebook": notebook}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=parts, help="notebook is a piece of agree")
    parser.add_argument("folder", type=Path, help="for models and runs")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for the result files")
    parser.add_argument("--steps", type=int, help=f"optimizer steps (speed 14, else {STEPS})")
    parser.add_argument(
        "--minutes", type=float, default=9, help="of speed: begin no run that would end later"
    )
    parser.add_argument("--only", default="", help="of speed: names of result files, with commas")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try this on a CPU")
    args = parser.parse_args()
    args.folder, args.out = args.folder.resolve(), args.out.resolve()
    args.steps = args.steps or (14 if args.part == "speed" else STEPS)
    for folder in (args.folder, args.out):
        folder.mkdir(parents=True, exist_ok=True)
    parts[args.part](args)


if __name__ == "__main__":
    main()
