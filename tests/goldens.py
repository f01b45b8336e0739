#!/usr/bin/env python
"""What a rewrite must not change: `python tests/goldens.py OLD_COMMIT`.

It runs that commit and this tree one after the other on this machine and prints each value that differs.
(Bits differ between processors, so nothing is kept in a file.) Both sides execute their own notebooks on
profile tiny and on six shortened laptop steps; what they leave is compared, beside ids, masks, micro-batches,
chosen sentences, the memory ledger and overrides. At the end this tree reads what the old commit has written.
Exit code 1: something differs. About 15 minutes on two cores.
"""

import argparse
import hashlib
import importlib
import json
import os
import pkgutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
SIX = "{max_steps: 6, eval_rows: 4, eval_steps: 3, sample_steps: 6, max_new_tokens: 16}"
OVERRIDES = """max_steps: 20|max_step: 20|max_steps: 0|max_steps: -1|max_steps: -2|max_steps: true
max_steps: ten|learning_rate: 1e-4|learning_rate: 0|learning_rate: 2|learning_rate: .nan
learning_rate: fast|epochs: 0|epochs: 2|lora_rank: 16|lora_rank: 0|lora_rank: 1.5
lora_targets: [q_proj]|lora_targets: [x_proj]|lora_targets: []|lora_dropout: 0.5
lora_dropout: 1.0|batch_size: 1|batch_size: 0|max_length: 4096|max_length: 8
tokens_per_batch: 64|training: topical|training: reference|training: other
topical_words: 60|topical_words: -1|prompt: chat|prompt: poem|seed: 7|seed: -1|device: tpu
dtype: float16|layout: packed|warmup_ratio: 1.1|model: ''|eval_rows: 0|name: mine"""


def find(*names: str):
    """The first of `names` that some module of the package has: rooms and names may have moved."""
    package = importlib.import_module("fiqa_helpers")
    # lesson rooms first: machinery may use one of their names for something of its own
    modules = [
        m.name for m in pkgutil.walk_packages(package.__path__, "fiqa_helpers.") if "__main__" not in m.name
    ]
    modules.sort(key=lambda name: "machinery" in name or "recipe" in name)
    for name in names:
        for module in modules:
            if name in vars(found := importlib.import_module(module)):
                return vars(found)[name]
    raise LookupError(f"no module has {' or '.join(names)}")


def digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()[:16]


def computed() -> dict:
    """What is computed without a notebook."""
    found = {}
    load_profile, refused = find("load_profile"), find("WorkshopError")
    for text in OVERRIDES.replace("\n", "|").split("|"):
        try:
            load_profile("laptop", f"{{{text}}}")
            found[f"override {text}"] = "accepted"
        except refused:
            found[f"override {text}"] = "refused"
    for name in ("gpu24", "gpu80"):
        ledger = find("predict_memory", "predict")(find("PROFILES")[name], find("nemotron_config")())
        total = ledger["total"] * 2**30 if isinstance(ledger, dict) else ledger.total  # the old one
        found[f"ledger {name}"] = int(total)
    split = find("load_fiqa")("packaged", None)
    found["splits"] = {name: digest(list(rows)) for name, rows in split.items()}
    few = split["train"].take(20)
    found["sentences"] = digest(list(find("topical_answers")(few, 100, find("Similarity")())))
    sys.path.insert(0, "tests")
    made = importlib.import_module("llama3_like")
    llama = made.llama3_like("{{ bos_token }}" + made.LLAMA3_TURNS)
    small = find("load_tokenizer")(load_profile("laptop"))
    for kind, tokenizer in (("smollm2", small), ("llama3", llama)):
        for prompt in ("plain", "chat"):
            profile = load_profile(
                "laptop", f"{{prompt: {prompt}, max_length: 4096, tokens_per_batch: 4096}}"
            )
            rows = list(find("encode_rows")(few, tokenizer, profile))
            found[f"ids {kind} {prompt}"] = digest([[row["input_ids"], row["labels"]] for row in rows])
            for layout in ("padded", "packed"):
                collator = find("StepCollator")(tokenizer.pad_token_id, profile.tokens_per_batch, layout)
                groups = [collator(rows[i : i + 4])["micro_batches"] for i in range(16)]
                plain = [[micro["input_ids"].tolist() for micro in step] for step in groups]
                found[f"micro-batches {kind} {prompt} {layout}"] = digest(plain)
    return found


def left(workdir: Path) -> dict:
    """What a run of the notebooks has left: files of rows, losses of each step, adapter, answers, scores."""
    found = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for path in workdir.glob("data/*_processed.json")
    }
    final = workdir / "checkpoints" / "final_model"
    found["adapter"] = hashlib.sha256((final / "adapter_model.safetensors").read_bytes()).hexdigest()[:16]
    config = json.loads((final / "adapter_config.json").read_text())
    kept = {key: config[key] for key in ("r", "lora_alpha", "lora_dropout")}
    found["adapter config"] = kept | {"target_modules": sorted(config["target_modules"])}
    panel = json.loads((final / "run_card.json").read_text())["panel"]
    keys = ("step", "loss", "eval_loss", "learning_rate", "grad_norm")
    found["history"] = [{key: row[key] for key in keys if key in row} for row in panel["history"]]
    found["samples"] = [sample["texts"] for sample in panel["samples"]]
    cards = workdir / "outputs" / "run_cards"
    if (cards / "05.json").is_file():
        found["greedy answers"] = json.loads((cards / "05.json").read_text())["facts"]["greedy"]
    if (cards / "06.json").is_file():
        scores = json.loads((cards / "06.json").read_text())["facts"]["comparisons"]
        found["scores"] = {
            metric: {side: round(row[side], 4) for side in ("base", "tuned", "low", "high")}
            for metric, row in scores.items()
        }
    return found


def run(tree: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "fiqa_helpers", "run", *arguments]
    done = subprocess.run(command, cwd=tree, env=environment(tree), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{tree}: {' '.join(arguments)}\n{done.stdout[-1000:]}{done.stderr[-3000:]}")


def environment(tree: Path) -> dict:
    return os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def collect(tree: Path, folder: Path) -> dict:
    command = [sys.executable, str(Path(__file__).resolve()), "--computed"]
    done = subprocess.run(command, cwd=tree, env=environment(tree), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{tree}: {done.stderr[-3000:]}")
    found = {"computed": json.loads(done.stdout.splitlines()[-1])}
    for profile, overrides in (("tiny", "{}"), ("laptop", SIX)):
        workdir = folder / profile
        only = "01-06" if profile == "tiny" else "01-05"
        run(tree, "--profile", profile, "--overrides", overrides, "--workdir", str(workdir), "--only", only)
        found[profile] = left(workdir)
    return found


def differences(old: object, new: object, name: str = "") -> list[str]:
    """A line for each value that differs; what only the new side has does not count."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [f"{name}: {str(old)[:150]} -> {str(new)[:150]}"]
    return [line for key in old for line in differences(old[key], new.get(key), f"{name} {key}")]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", nargs="?", help="commit to compare with")
    parser.add_argument("--computed", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.computed:
        sys.path.insert(0, os.getcwd())
        print(json.dumps(computed()))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        git = ["git", "-C", str(HERE), "worktree"]
        subprocess.run([*git, "add", "--detach", "-q", str(folder / "tree"), options.old], check=True)
        try:
            old, new = collect(folder / "tree", folder / "old"), collect(HERE, folder / "new")
            read = folder / "old" / "tiny"  # what the old commit wrote, read by this tree
            run(HERE, "--profile", "tiny", "--overrides", "{}", "--workdir", str(read), "--only", "05,06")
            found = differences(old, new) + differences(old["tiny"], left(read), "read by the new")
        finally:
            subprocess.run([*git, "remove", "--force", str(folder / "tree")], check=False)
    print("\n".join(sorted(found)) or "Nothing differs.")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
