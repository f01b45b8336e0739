"""Which training and decoding settings make the small model better than it was? An honest search.

The 648 packaged rows are in five folds. Each fold is answered by an adapter that has not seen it, trained
with settings that were chosen without it: `inner` trials leave out two neighbouring folds, train on the other
three and measure both, so that the choice for a fold looks only at rows outside of it. The comparison on all
rows is made once, out of fold. What was tried is kept, failures too.

    python benchmarks/recipe_search.py --out FOLDER --workers 10 --minutes 8 --overrides \
        "{device: cuda, dtype: bfloat16, max_length: 1024, tokens_per_batch: 8192, batch_size: 16,
        max_new_tokens: 256}"

A run that is out of time, or killed, goes on with the same command. `recipe_report.py` makes the tables. All
decodings of a trial are generated as one batch, and the workers share the cards: a model this small does not
fill one. Try it first, in a minute or two, with `--rows 100 --cap-steps 5 --settings "reference;beginnings"`.

On a machine with a hand-made environment: the packaged weights are unpacked by `gguf`, which imports
mistral_common where that is installed, and fails where mistral_common lacks its own pycountry.
"""

import argparse
import copy
import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fiqa_helpers import assets, data, metrics, model, notebook, profiles
from fiqa_helpers.answer_filter import LINK, sentences, topical, unquoted
from fiqa_helpers.errors import WorkshopError
from fiqa_helpers.overrides import TARGETS
from fiqa_helpers.runcard import read_card, write_card, write_json
from fiqa_helpers.similarity import Similarity
from fiqa_helpers.solvers import Decoding

FOLDS = 5
MEASURED = ("similarity", "token_f1", "nll", "stopped", "repeated", "tokens")
DECODINGS = {  # keywords of `generate`, for base and tuned alike; all greedy
    "greedy": {},
    "no_repeat": Decoding(no_repeat_ngram_size=4).keywords(),
    "no_repeat, ends": Decoding(no_repeat_ngram_size=4, end_after=100).keywords(),
}
OUTER_SECONDS = 80  # kept for the trials on the folds themselves


@dataclass(frozen=True)
class Setting:
    """What a trial trains with. Answers out of bounds are left out; `first_words` shortens the others."""

    learning_rate: float = 2e-4
    epochs: int = 3
    rank: int = 8  # alpha is four times as much
    all_linear: bool = False
    neftune: float = 0.0  # noise on the embeddings (Jain et al. 2023, arXiv:2310.05914)
    anchor: float = 0.0  # weight of the KL divergence from the frozen base, on answer tokens
    shortest: int = 0  # words
    longest: int = 100_000  # words
    links: bool = True  # whether answers with links are kept
    first_words: int = 0  # whole sentences from the start, at most so many words; 0 is the whole answer
    off_topic: float = 0.0  # share of the answers left out: those least similar to their own question
    topical_words: int = 0  # as first_words, of the sentences most similar to the question, in their order
    unquoted: bool = False  # takes off the CSV quotes that stand around a third of the answers
    prompt: str = "plain"
    most_steps: int = 0  # the schedule ends there; 0 is all of the epochs


BRIEF = Setting(5e-4, 2, shortest=20, links=False, first_words=100, unquoted=True)
TOPICAL = replace(BRIEF, first_words=0, topical_words=60)
WIDE = replace(TOPICAL, rank=16, all_linear=True)
SETTINGS = {  # the most promising first, as time may run out
    "reference": Setting(),
    "beginnings": BRIEF,
    "topical sentences": TOPICAL,
    "topical sentences, all linear": WIDE,
    "topical 100 words, all linear": replace(WIDE, topical_words=100),
    "topical 150 words, all linear": replace(WIDE, topical_words=150),
    "topical 120 words, nearer half, all linear": replace(WIDE, topical_words=120, off_topic=0.5, epochs=4),
    "topical 120 words, from 40, all linear": replace(WIDE, topical_words=120, shortest=40),
    "topical 120 words, 3 epochs, all linear": replace(WIDE, topical_words=120, epochs=3),
    "topical 200 words, all linear": replace(WIDE, topical_words=200),
    "topical 100 words": replace(TOPICAL, topical_words=100),
    "topical sentences, half the rows": replace(TOPICAL, off_topic=0.5, epochs=4),
    "beginnings, all linear": replace(BRIEF, rank=16, all_linear=True),
    "beginnings, half the rows": replace(BRIEF, off_topic=0.5, epochs=4),
    "topical sentences, 4 epochs": replace(TOPICAL, epochs=4),
    "topical sentences, chat": replace(TOPICAL, prompt="chat"),
    "topical 30 words": replace(TOPICAL, topical_words=30),
    "short answers only": Setting(5e-4, 3, shortest=20, longest=120, links=False),
    "beginnings, anchored": replace(BRIEF, anchor=0.5),
    "beginnings, faster": replace(BRIEF, learning_rate=1e-3),
    "beginnings, slower": replace(BRIEF, learning_rate=2e-4),
    "answers up to 200 words": Setting(5e-4, 2, shortest=20, longest=200, links=False),
    "beginnings of 60 words": replace(BRIEF, first_words=60),
    "beginnings, NEFTune": replace(BRIEF, neftune=5.0),
    "chat, beginnings": replace(BRIEF, prompt="chat"),
    "beginnings, 4 epochs": replace(BRIEF, epochs=4),
    "gentle": Setting(learning_rate=5e-5),
    "fast, one epoch": Setting(learning_rate=1e-3, epochs=1),
    "all linear": Setting(rank=16, all_linear=True),
    "anchored": Setting(anchor=0.5),
    "NEFTune": Setting(neftune=5.0),
    "chat": Setting(prompt="chat"),
}


class Search:
    """One worker: the model, the rows in folds, and the files of its trials."""

    settings, decodings = SETTINGS, DECODINGS

    def __init__(self, args: argparse.Namespace):
        from rouge_score.rouge_scorer import RougeScorer

        self.args, self.out = args, Path(args.out)
        self.profile = profiles.load_profile(args.profile, args.overrides)
        self.folds = load_folds(args.rows)
        self.tokenizer = model.load_tokenizer(self.profile)
        self.model = model.load_base(self.profile)
        self.similarity = Similarity(device=self.profile.device)
        self.rouge = RougeScorer(["rouge1"], use_stemmer=False)
        self.slowest = 0.0  # seconds of a trial

    def base(self, fold: int) -> None:
        """The untuned model's answers to a fold, under every prompt and decoding, to `base/FOLD.json`."""
        path = self.out / "base" / f"{fold}.json"
        if path.exists():
            return
        styles = sorted({SETTINGS[name].prompt for name in self.args.settings})
        write_json(path, {style: self.measure(self.model, self.folds[fold], style, True) for style in styles})

    def inner(self, pair: int, name: str) -> None:
        """A setting on the three folds outside of `pair`, measured on its two, to `inner/PAIR/NAME.json`."""
        path = self.out / "inner" / str(pair) / f"{name}.json"
        if path.exists():
            return
        if time.time() + self.slowest > self.args.deadline - OUTER_SECONDS:
            print(f"Pair {pair}: out of time before {name!r}.", flush=True)
            return
        left_out = (pair, (pair + 1) % FOLDS)
        write_json(path, self.trial(name, left_out, seed=pair, keep_answers=False))

    def outer(self, fold: int) -> None:
        """The reference setting and the chosen one on the four other folds, measured on `fold`."""
        path = self.out / "outer" / f"{fold}.json"
        done = read_card(path) or {}
        if "chosen" not in done:
            done["chosen"] = choose(self.out, fold)
        for name in dict.fromkeys(["reference", done["chosen"]["setting"]]):
            if name not in done:
                done[name] = self.trial(name, (fold,), seed=FOLDS + fold, keep_answers=True)
                write_json(path, done)

    def trial(self, name: str, left_out: tuple[int, ...], seed: int, keep_answers: bool) -> dict:
        """Train `name` on the folds that are not left out and measure it on those that are."""
        setting, started = self.settings[name], time.time()
        rows = [row for fold in range(FOLDS) if fold not in left_out for row in self.folds[fold]]
        try:
            tuned, log = self.train(setting, prepared(rows, setting, self.similarity), seed)
            merged = copy.deepcopy(tuned).merge_and_unload()
            self.model = tuned.unload()
            trained = time.time()
            measured = [row for fold in left_out for row in self.folds[fold]]
            found = self.measure(merged, measured, setting.prompt, keep_answers)
        except WorkshopError as error:  # a loss that exploded is a result, too
            return {"setting": asdict(setting), "failed": str(error)}
        seconds = {"training": round(trained - started, 1), "measuring": round(time.time() - trained, 1)}
        self.slowest = max(self.slowest, time.time() - started)
        print(f"{left_out} {name}: {log['steps']} steps, loss {log['loss']:.3f}, {seconds}", flush=True)
        return {"setting": asdict(setting), **log, "seconds": seconds, "folds": left_out, "found": found}

    def train(self, setting: Setting, rows: list[dict], seed: int) -> tuple:
        """(the model with an adapter trained on `rows`, what the Trainer says of it)."""
        from datasets import Dataset
        from peft import get_peft_model
        from transformers import TrainingArguments, set_seed

        from fiqa_helpers.batching import StepCollator
        from fiqa_helpers.prompts import encode_rows

        profile = replace(
            self.profile,
            lora_rank=setting.rank,
            lora_alpha=4 * setting.rank,
            lora_targets=TARGETS if setting.all_linear else self.profile.lora_targets,
            prompt=setting.prompt,
        )
        steps = setting.epochs * math.ceil(len(rows) / profile.batch_size)
        steps = min(steps, setting.most_steps or steps, self.args.cap_steps or steps)
        set_seed(profile.seed + seed)
        tuned = get_peft_model(self.model, model.lora_config(profile))
        arguments = TrainingArguments(
            output_dir=str(self.out / "trainer"),
            per_device_train_batch_size=profile.batch_size,
            max_steps=steps,
            learning_rate=setting.learning_rate,
            warmup_steps=profile.warmup_ratio,
            neftune_noise_alpha=setting.neftune or None,
            save_strategy="no",
            logging_steps=5,
            remove_unused_columns=False,
            use_cpu=profile.device == "cpu",
            seed=profile.seed + seed,
            disable_tqdm=True,
            report_to="none",
        )
        trainer = anchored_trainer(setting.anchor)(
            model=tuned,
            args=arguments,
            train_dataset=encode_rows(Dataset.from_list(rows), self.tokenizer, profile),
            data_collator=StepCollator(self.tokenizer.pad_token_id, profile.tokens_per_batch, "padded"),
        )
        found = trainer.train()
        return tuned.eval(), {"rows": len(rows), "steps": found.global_step, "loss": found.training_loss}

    def measure(self, model, rows: list[dict], style: str, keep_answers: bool) -> dict:
        """Of each decoding, the metrics as columns over `rows`: {"no_repeat": {"similarity": [...], ...}}."""
        from fiqa_helpers.reference_nll import reference_nll

        free_memory()
        answers = self.answers(model, rows, style)
        nll = reference_nll(model, self.tokenizer, rows, replace(self.profile, prompt=style))
        texts = [answer.text.strip() for column in answers.values() for answer in column]
        self.similarity.embed(texts + [text for row in rows for text in row["ground_truths"]])  # in one go
        found = {}
        for name, column in answers.items():
            columns = {metric: [] for metric in MEASURED} | {"nll": nll}
            for answer, row in zip(column, rows, strict=True):
                text, references = answer.text.strip(), row["ground_truths"]
                columns["similarity"].append(self.similarity.best(text, references)[0])
                columns["token_f1"].append(self.rouge.score_multi(references, text)["rouge1"].fmeasure)
                columns["repeated"].append(metrics.repeated(text))
                columns["stopped"].append(answer.stopped)
                columns["tokens"].append(answer.n_tokens)
            found[name] = {metric: [round(v, 4) for v in values] for metric, values in columns.items()}
            if keep_answers:
                found[name]["answer"] = [answer.text for answer in column]
        free_memory()
        return found

    def answers(self, model, rows: list[dict], style: str) -> dict[str, list]:
        """Every decoding's answers to `rows`, all decodings side by side in one batch."""
        from transformers import LogitsProcessorList

        from fiqa_helpers.generation import generate_answers

        found = {name: [] for name in self.decodings}
        at_once = self.args.batch // len(found)
        for start in range(0, len(rows), at_once):
            questions = [row["question"] for row in rows[start : start + at_once]]
            made = generate_answers(
                model,
                self.tokenizer,
                questions * len(found),
                style,
                self.profile.max_new_tokens,
                logits_processor=LogitsProcessorList(
                    [side_by_side(self.decodings, len(questions), self.tokenizer.eos_token_id)]
                ),
            )
            for i, column in enumerate(found.values()):
                column += made[i * len(questions) : (i + 1) * len(questions)]
        return found


def side_by_side(decodings: dict[str, dict], rows: int, end: int):
    """A logits processor that treats each `rows` rows of the batch by the next of `decodings`."""
    import torch
    from transformers import ExponentialDecayLengthPenalty, LogitsProcessorList

    made: list = []

    def process(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not made:  # the first token: what is there is the prompt
            for wanted in decodings.values():
                parts = LogitsProcessorList()
                if "no_repeat_ngram_size" in wanted:
                    parts.append(no_repeat(wanted["no_repeat_ngram_size"]))
                if "exponential_decay_length_penalty" in wanted:
                    decay = wanted["exponential_decay_length_penalty"]
                    parts.append(ExponentialDecayLengthPenalty(decay, end, ids.shape[1]))
                made.append(parts)
        groups = zip(made, ids.split(rows), scores.split(rows), strict=True)
        return torch.cat([parts(part, values) for parts, part, values in groups])

    return process


def no_repeat(size: int):
    """transformers' NoRepeatNGramLogitsProcessor without its Python loop, which keeps the GPU waiting."""
    import torch

    def process(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] < size:
            return scores
        grams = ids.unfold(1, size, 1)
        begun = (grams[..., :-1] == ids[:, None, 1 - size :]).all(-1)
        times = torch.zeros_like(scores).scatter_add_(1, grams[..., -1], begun.to(scores.dtype))
        return scores.masked_fill(times > 0, -math.inf)

    return process


def anchored_trainer(weight: float):
    """AnswerTrainer, or one whose loss also holds the answers' distributions near the frozen base's."""
    import torch

    from fiqa_helpers.prompts import IGNORE_INDEX
    from fiqa_helpers.training import AnswerTrainer

    class Anchored(AnswerTrainer):
        def loss_sum(self, model, micro_batch):
            inputs = self._prepare_inputs(micro_batch)
            labels = inputs.pop("labels")[:, 1:]
            answer = labels != IGNORE_INDEX
            tuned = model(**inputs, use_cache=False).logits[:, :-1][answer].float().log_softmax(-1)
            with torch.no_grad(), model.disable_adapter():
                base = model(**inputs, use_cache=False).logits[:, :-1][answer].float().log_softmax(-1)
            loss = torch.nn.functional.nll_loss(tuned, labels[answer], reduction="sum")
            return loss + weight * torch.nn.functional.kl_div(tuned, base, reduction="sum", log_target=True)

    return Anchored if weight else AnswerTrainer


def prepared(rows: list[dict], setting: Setting, similarity: Similarity | None = None) -> list[dict]:
    """The training rows as the setting wants them: filtered, answers cleaned and shortened.

    `similarity` is needed where the setting asks what an answer has to do with its question.
    """
    kept = []
    for row in rows:
        answer = row["ground_truths"][0]
        sized = setting.shortest <= len(answer.split()) <= setting.longest
        if sized and (setting.links or not LINK.search(answer)):
            answer = unquoted(answer) if setting.unquoted else answer
            kept.append({"question": row["question"], "ground_truths": [answer]})
    if setting.off_topic:
        near = [similarity.best(row["question"], row["ground_truths"])[0] for row in kept]
        least = sorted(near)[int(setting.off_topic * len(near))]
        kept = [row for row, value in zip(kept, near, strict=True) if value >= least]
    for row in kept:
        answer = row["ground_truths"][0]
        if setting.first_words:
            row["ground_truths"] = [beginning(answer, setting.first_words)]
        if setting.topical_words:
            row["ground_truths"] = [topical(row["question"], answer, setting.topical_words, similarity)]
    return kept


def beginning(answer: str, words: int) -> str:
    """Whole sentences from the start of `answer`, at most `words` words, but at least one sentence."""
    found = sentences(answer)
    kept = found[:1]
    for sentence in found[1:]:
        if len(" ".join([*kept, sentence]).split()) > words:
            break
        kept.append(sentence)
    return " ".join(kept)


def choose(out: Path, fold: int) -> dict:
    """The setting and decoding for `fold`, from the inner trials that neither trained on it nor measured it.

    Of those that beat the base under the same prompt and decoding beyond doubt (similarity and token F1 two
    standard errors up, reference NLL down, repetition not as much up, 95 % stopped), the one with the most
    similar answers; if there is none, the one that is nearest to it in the worse of similarity and token F1.
    """
    candidates = [(rank(pairs), name, decoding) for name, decoding, pairs in inner_results(out, fold)]
    if not candidates:
        raise WorkshopError(f"{out} holds no inner trial that leaves out fold {fold}: run the search longer.")
    order, name, decoding = max(candidates)
    return {
        "setting": name,
        "decoding": decoding,
        "beyond doubt": order[0],
        "candidates": len(candidates),
    }


def rank(pairs: dict[str, tuple[list, list]]) -> tuple[bool, bool, float]:
    """What candidates are ordered by, of {metric: (base, tuned)}: see `choose`."""
    gain, error = {}, {}
    for metric in MEASURED:
        values = [t - b for b, t in zip(*pairs[metric], strict=True)]
        gain[metric] = sum(values) / len(values)
        error[metric] = math.sqrt(sum((v - gain[metric]) ** 2 for v in values)) / len(values)
    stops = sum(pairs["stopped"][1]) / len(pairs["stopped"][1])
    no_worse = gain["repeated"] <= 2 * error["repeated"]
    sound = gain["nll"] < 0 and no_worse and stops >= 0.95
    worse = min(gain[metric] / max(error[metric], 1e-9) for metric in ("similarity", "token_f1"))
    similar = sum(pairs["similarity"][1]) / len(pairs["similarity"][1])
    return sound and worse > 2, sound, similar if sound and worse > 2 else worse


def inner_results(out: Path, fold: int | None = None):
    """(setting, decoding, {metric: (base, tuned)}) of all inner trials, or what a choice for `fold` may see.

    The pairs beside `fold` leave it out of training; of their two folds the other one is measured.
    """
    base = {place: read_card(out / "base" / f"{place}.json") for place in range(FOLDS)}
    seen = [(pair, place) for pair in range(FOLDS) for place in (pair, (pair + 1) % FOLDS)]
    if fold is not None:
        seen = [(fold, (fold + 1) % FOLDS), ((fold - 1) % FOLDS, (fold - 1) % FOLDS)]
    for name, setting in SETTINGS.items():
        trials = {pair: read_trial(out, pair, name) for pair, _ in seen}
        if any("found" not in trial for trial in trials.values()):
            continue  # one part failed, or time ran out
        for decoding in DECODINGS:
            pairs = {metric: ([], []) for metric in MEASURED}
            for pair, place in seen:
                columns = base[place][setting.prompt][decoding]
                rows = len(columns["nll"])
                cut = slice(rows) if pair == place else slice(-rows, None)
                for metric, (before, after) in pairs.items():
                    before += columns[metric]
                    after += trials[pair]["found"][decoding][metric][cut]
            yield name, decoding, pairs


def read_trial(out: Path, pair: int, name: str) -> dict:
    """What an inner trial has found; {} if it was not run."""
    return read_card(out / "inner" / str(pair) / f"{name}.json") or {}


def load_folds(rows: int = 0) -> list[list[dict]]:
    """The packaged rows (or the first so many) in five folds."""
    splits = data.load_fiqa("packaged")
    found = [row for split in ("train", "validation", "test") for row in splits[split]][: rows or None]
    return [found[fold::FOLDS] for fold in range(FOLDS)]


def free_memory() -> None:
    """Give back what this worker's allocator keeps: the card is shared."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def wait_for(paths: list[Path]) -> None:
    """Return when all are there; the other workers write them."""
    patience = time.time() + 600
    while not all(path.exists() for path in paths):
        if time.time() > patience:
            raise WorkshopError("Another worker has not finished: look at its log, then start again.")
        time.sleep(0.2)


def work(args: argparse.Namespace) -> None:
    """What one worker does: the next task that nobody has taken, and outer trials when all are done."""
    search = Search(args)
    claims = search.out / "claims" / args.run

    def claim(task: str) -> bool:
        try:
            (claims / task).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    for fold in range(FOLDS):
        if claim(f"base {fold}"):
            search.base(fold)
    for name in args.settings:
        for pair in range(FOLDS):
            if claim(f"{name} {pair}"):
                search.inner(pair, name)
    claim(f"done {args.worker}")
    wait_for([claims / f"done {number}" for number in range(args.workers)])
    for fold in range(FOLDS):
        if claim(f"outer {fold}"):
            search.outer(fold)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="folder for the results")
    parser.add_argument("--profile", default="laptop")
    parser.add_argument("--overrides", default="", help="YAML, as in the notebooks")
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no inner trial that ends later")
    parser.add_argument("--settings", type=lambda text: text.split(";"), default=list(SETTINGS), help="a;b;c")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the devices")
    parser.add_argument("--batch", type=int, default=780, help="answers in one generate")
    parser.add_argument("--rows", type=int, default=0, help="use so many rows (0: all 648)")
    parser.add_argument("--cap-steps", type=int, default=0, help="at most so many steps, to try the script")
    parser.add_argument("--worker", type=int, default=-1, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--run", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    notebook.quiet()
    if args.worker >= 0:
        work(args)
        return
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # workers that spin take each other's cores
    from torch.cuda import device_count

    started, out, run = time.time(), Path(args.out), str(os.getpid())
    for name in ("base", "outer", f"claims/{run}", *(f"inner/{pair}" for pair in range(FOLDS))):
        (out / name).mkdir(parents=True, exist_ok=True)
    assets.minilm_folder(), assets.fiqa_test_file(), assets.smollm2_folder()  # once, before the workers
    common = ["--deadline", str(started + 60 * args.minutes), "--run", run]
    gpus = max(1, device_count())
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], *common, "--worker", str(number)],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": str(number % gpus)},
        )
        for number in range(args.workers)
    ]
    failed = [worker.args[-1] for worker in workers if worker.wait()]
    shutil.rmtree(out / "claims")
    profile = asdict(profiles.load_profile(args.profile, args.overrides))
    seconds = round(time.time() - started)
    write_card(out / "search.json", seconds=seconds, arguments=sys.argv[1:], profile=profile, failed=failed)
    print(json.dumps({"seconds": seconds, "failed workers": failed}))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
