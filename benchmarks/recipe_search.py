"""Which training and decoding settings make the small model better than it was? An honest search.

Every one of the 648 packaged rows is answered by an adapter that has not seen it (5 folds, out of fold), and
whatever is chosen is chosen inside a fold's own training part. So the final comparison is made once, on rows
that took part in no decision. What was tried is kept, failures too: one JSON file per trial.

    python benchmarks/recipe_search.py --out FOLDER --overrides "{device: cuda, max_length: 1024}" --minutes 9

A run that is out of time, or killed, goes on with the same command. `--report` prints what is there so far.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fiqa_helpers import notebook, profiles
from fiqa_helpers.evaluation import Evaluated, evaluate
from fiqa_helpers.evaluation_report import compare_all, score_floors, table
from fiqa_helpers.paths import Workspace
from fiqa_helpers.reference_nll import reference_nll
from fiqa_helpers.runcard import write_card
from fiqa_helpers.solvers import Decoding, ModelSolver

FOLDS = 5
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
REPORTED = ("similarity", "token_f1", "nll", "stopped", "repeated")


@dataclass(frozen=True)
class Setting:
    """What one trial trains with. An answer outside the limits of length, or with a link, may be left out."""

    learning_rate: float = 2e-4
    steps: int = 94  # three epochs of 500 rows in steps of 16
    rank: int = 8
    all_linear: bool = False
    neftune: float = 0.0  # noise on the embeddings (Jain et al. 2023, arXiv:2310.05914)
    anchor: float = 0.0  # weight of the KL divergence from the frozen base, on answer tokens
    shortest: int = 0  # words
    longest: int = 100_000  # words
    links: bool = True


SETTINGS = {
    "reference": Setting(),
    "gentle": Setting(learning_rate=5e-5),
    "gentle, one epoch": Setting(learning_rate=1e-4, steps=31),
    "fast, short": Setting(learning_rate=1e-3, steps=31),
    "all linear": Setting(learning_rate=2e-4, rank=16, all_linear=True),
    "all linear, gentle": Setting(learning_rate=5e-5, rank=16, all_linear=True),
    "filtered": Setting(shortest=20, longest=300, links=False),
    "filtered, short answers": Setting(shortest=20, longest=120, links=False),
    "neftune": Setting(neftune=5.0),
    "anchored": Setting(anchor=0.5),
    "anchored, filtered": Setting(anchor=0.5, shortest=20, longest=300, links=False),
    "anchored, all linear, filtered": Setting(
        rank=16, all_linear=True, anchor=0.5, shortest=20, longest=300, links=False
    ),
}
NO_REPEAT = (0, 4)  # no_repeat_ngram_size


class Search:
    """The model, the rows in folds, and the trials in a folder."""

    def __init__(self, args: argparse.Namespace):
        from fiqa_helpers import data, model
        from fiqa_helpers.similarity import Similarity

        self.args = args
        self.deadline = time.monotonic() + 60 * args.minutes
        self.profile = profiles.load_profile(args.profile, args.overrides)
        self.workspace = Workspace(args.out)
        self.trials = self.workspace.outputs / "trials"
        self.trials.mkdir(exist_ok=True)
        splits = data.load_fiqa("packaged")
        rows = [row for split in ("train", "validation", "test") for row in splits[split]][
            : args.rows or None
        ]
        self.folds = [rows[fold::FOLDS] for fold in range(FOLDS)]
        self.tokenizer = model.load_tokenizer(self.profile)
        self.base = model.load_base(self.profile)
        self.similarity = Similarity(device=self.profile.device)

    def training_part(self, fold: int) -> list[dict]:
        return [row for other in range(FOLDS) if other != fold for row in self.folds[other]]

    def trial(self, fold: int, name: str, kind: str, no_repeat: tuple[int, ...]) -> dict:
        """Train `name` and measure it: `inner` on a tenth of the training part, `outer` on the fold."""
        path = self.trials / f"{fold}-{kind}-{name.replace(', ', '_').replace(' ', '-')}.json"
        if path.exists():
            return json.loads(path.read_text())
        if time.monotonic() > self.deadline:
            print(f"Out of time before {path.stem}: the same command goes on from here.")
            sys.exit(3)
        part = self.training_part(fold)
        train, measured = (part, self.folds[fold]) if kind == "outer" else (part[::10], part[::10])
        if kind == "inner":
            train = [row for i, row in enumerate(part) if i % 10]
        started = time.monotonic()
        tuned = self.train(SETTINGS[name], train, fold)
        try:
            found = {
                str(n): self.measure(tuned, measured, Decoding(self.profile.max_new_tokens, n))
                for n in no_repeat
            }
        finally:
            self.base = tuned.unload()
        seconds = round(time.monotonic() - started, 1)
        card = dict(
            fold=fold, kind=kind, name=name, setting=asdict(SETTINGS[name]), seconds=seconds, found=found
        )
        write_card(path, profile=asdict(self.profile), **card)
        return json.loads(path.read_text())

    def train(self, setting: Setting, rows: list[dict], fold: int):
        """The base with an adapter trained on `rows`; the same call gives the same adapter."""
        from datasets import Dataset
        from peft import get_peft_model
        from transformers import TrainingArguments, set_seed

        from fiqa_helpers.batching import StepCollator
        from fiqa_helpers.model import lora_config
        from fiqa_helpers.prompts import encode_rows

        def wanted(answer: str) -> bool:
            link = "http" in answer or "www." in answer
            return setting.shortest <= len(answer.split()) <= setting.longest and (setting.links or not link)

        profile = replace(
            self.profile,
            lora_rank=setting.rank,
            lora_alpha=4 * setting.rank,
            lora_targets=ALL_LINEAR if setting.all_linear else self.profile.lora_targets,
        )
        kept = Dataset.from_list([row for row in rows if wanted(row["ground_truths"][0])])
        set_seed(profile.seed + fold)
        model = get_peft_model(self.base, lora_config(profile))
        arguments = TrainingArguments(
            output_dir=str(self.workspace.checkpoints / "search"),
            per_device_train_batch_size=16,
            max_steps=min(setting.steps, self.args.cap_steps or setting.steps),
            learning_rate=setting.learning_rate,
            warmup_steps=0.1,
            neftune_noise_alpha=setting.neftune or None,
            save_strategy="no",
            logging_steps=10,
            remove_unused_columns=False,
            use_cpu=profile.device == "cpu",
            seed=profile.seed + fold,
            disable_tqdm=True,
            report_to="none",
        )
        trainer = anchored_trainer(setting.anchor)(
            model=model,
            args=arguments,
            train_dataset=encode_rows(kept, self.tokenizer, profile),
            data_collator=StepCollator(self.tokenizer.pad_token_id, profile.tokens_per_batch, "padded"),
        )
        trainer.train()
        return model.eval()

    def measure(self, tuned, rows: list[dict], decoding: Decoding) -> list[dict]:
        """Samples of base and tuned on `rows`: [{"base": {...}, "tuned": {...}}, ...]."""
        sides = []
        for is_tuned in (False, True):
            batch = 6 if self.profile.device == "cpu" else 64
            solver = ModelSolver(tuned, self.tokenizer, self.profile.prompt, decoding, batch, is_tuned)
            label = "tuned" if is_tuned else "base"
            side = evaluate(self.workspace, rows, solver, self.similarity, label)
            with solver.active():
                kept = side.folder / "reference_nll.json"
                side.add("nll", reference_nll(tuned, self.tokenizer, rows, self.profile, kept))
            sides.append(side.samples)
        return [{"base": base, "tuned": tuned} for base, tuned in zip(*sides, strict=True)]

    def choose(self, fold: int) -> tuple[str, int]:
        """The setting and decoding that gained most similarity inside the fold, damage excluded."""
        candidates = []
        for name in self.args.settings:
            found = self.trial(fold, name, "inner", NO_REPEAT)["found"]
            for n, pairs in found.items():
                gain = {metric: difference(pairs, metric) for metric in REPORTED}
                stops = sum(pair["tuned"]["stopped"] for pair in pairs) / len(pairs)
                sound = gain["nll"] < 0 and gain["repeated"] <= 0 and gain["token_f1"] > 0 and stops >= 0.95
                candidates.append((sound, gain["similarity"], name, int(n)))
        *_, name, n = max(candidates)
        return name, n


def anchored_trainer(weight: float):
    """AnswerTrainer, or one whose loss also holds the answers' distributions near the frozen base's."""
    import torch

    from fiqa_helpers.prompts import IGNORE_INDEX
    from fiqa_helpers.training import AnswerTrainer

    class Anchored(AnswerTrainer):
        def _loss_sum(self, model, micro_batch):
            loss = super()._loss_sum(model, micro_batch)
            if not model.training:
                return loss
            inputs = self._prepare_inputs(micro_batch)
            answer = inputs.pop("labels")[:, 1:] != IGNORE_INDEX
            tuned = model(**inputs, use_cache=False).logits[:, :-1][answer].float().log_softmax(-1)
            with torch.no_grad(), model.disable_adapter():
                base = model(**inputs, use_cache=False).logits[:, :-1][answer].float().log_softmax(-1)
            return loss + weight * torch.nn.functional.kl_div(tuned, base, reduction="sum", log_target=True)

    return Anchored if weight else AnswerTrainer


def difference(pairs: list[dict], metric: str) -> float:
    """Mean of tuned minus base."""
    return sum(pair["tuned"][metric] - pair["base"][metric] for pair in pairs) / len(pairs)


def report(folder: Path) -> None:
    """Every trial so far, as a Markdown table."""
    print("| fold | kind | setting | no_repeat | rows | s | " + " | ".join(REPORTED) + " |")
    print("|" + "---|" * (6 + len(REPORTED)))
    for path in sorted(folder.glob("*.json")):
        trial = json.loads(path.read_text())
        for n, pairs in trial["found"].items():
            gains = " | ".join(f"{difference(pairs, metric):+.4f}" for metric in REPORTED)
            print(
                f"| {trial['fold']} | {trial['kind']} | {trial['name']} | {n} | {len(pairs)} | "
                f"{trial['seconds']:.0f} | {gains} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="folder for trials and answers")
    parser.add_argument("--profile", default="laptop")
    parser.add_argument("--overrides", default="", help="YAML, as in the notebooks")
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no trial after so many minutes")
    parser.add_argument("--settings", type=lambda text: text.split(";"), default=list(SETTINGS), help="a;b;c")
    parser.add_argument("--rows", type=int, default=0, help="use so many rows (0: all 648)")
    parser.add_argument("--cap-steps", type=int, default=0, help="at most so many steps, to try the script")
    parser.add_argument("--report", action="store_true", help="print the trials so far and stop")
    args = parser.parse_args()
    if args.report:
        report(Workspace(args.out).outputs / "trials")
        return
    notebook.quiet()
    search = Search(args)
    rows, pairs, chosen = [], [], {}
    for fold in range(FOLDS):
        name, n = search.choose(fold)
        chosen[fold] = {"setting": name, "no_repeat_ngram_size": n}
        print(f"Fold {fold}: chosen {name!r}, no_repeat_ngram_size {n}")
        pairs += search.trial(fold, name, "outer", (n,))["found"][str(n)]
        rows += search.folds[fold]
    base, tuned = [
        Evaluated(side, Path(), [pair[side] for pair in pairs], 0, {}, {}) for side in ("base", "tuned")
    ]
    comparisons = compare_all(base, tuned)
    floors = score_floors(rows, search.similarity)
    print(table(comparisons, floors).to_string())
    write_card(
        search.workspace.outputs / "recipe.json",
        chosen=chosen,
        rows=len(rows),
        comparisons={name: found.as_row() for name, found in comparisons.items()},
    )


if __name__ == "__main__":
    main()
