"""The evaluation of notebook 06: tuned against untuned on the same rows, scored and compared.

The floors, answers that any model should beat, are scored here too (`score_floors`), by the same metrics.
"""

import asyncio
import hashlib
import json
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fiqa_helpers import metrics
from fiqa_helpers.base import WorkshopError, atomic_writer, write_card, write_json
from fiqa_helpers.data import fingerprint, load_fiqa, normalized, read_processed
from fiqa_helpers.generate import GUARD, Answer, generate_answers
from fiqa_helpers.metrics import METRICS, PRIMARY, Comparison, compare
from fiqa_helpers.model import kept_run
from fiqa_helpers.rows import encode, pack_rows, prompt_text

if TYPE_CHECKING:
    from datasets import Dataset
    from nemo_evaluator import EvalEnvironment, SeedResult, Solver, SolveResult
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fiqa_helpers.base import Workspace
    from fiqa_helpers.metrics import Score
    from fiqa_helpers.profiles import Profile

# --- Rows for a fair test: drawn by chance, and none of them was in the lesson.

CPU_ROWS, GPU_ROWS = 24, 100  # tested unless a number is given: 24 show the method, 100 the claim


def choose_rows(test: "Dataset", rows: int, profile: "Profile") -> list[dict]:
    """`rows` of the test split, drawn with the profile's seed; 0 takes CPU_ROWS or GPU_ROWS.

    A larger number draws the same rows and more. (One row alone is refused by `metrics.floors`.)
    """
    drawn = list(test.shuffle(seed=profile.seed))
    return drawn[: rows or (CPU_ROWS if profile.device == "cpu" else GPU_ROWS)]


def refuse_leak(card: dict, rows: Sequence[dict], workspace: "Workspace") -> str:
    """Hold the rows that an adapter was trained on, as its run card has them, against `rows`.

    The packaged rows are the hub's test split, so an adapter that was trained on them may be tested on the
    packaged test part, and never on the hub's. Questions are compared without case and punctuation. Returns
    in words what was checked, also when the training rows are not to be found here.

    Raises:
        WorkshopError: some of `rows` were trained on.
    """
    trained = training_questions(card, workspace)
    if not trained:
        return "The rows that this adapter was trained on are not here, so a leak cannot be ruled out."
    shared = [row["question"] for row in rows if normalized(row["question"]) in trained]
    if shared:
        raise WorkshopError(
            f"The adapter was trained on {len(shared)} of these {len(rows)} test rows (such as "
            f"{shared[0][:60]!r}), so its figures would mean nothing: take rows that it has not "
            "seen, or train it on the hub's training split."
        )
    known = f"the {len(trained)} training and validation questions of the adapter"
    return f"None of the {len(rows)} test rows is among {known}."


def training_questions(card: dict, workspace: "Workspace") -> set[str]:
    """Questions, normalized, of the training and validation splits that `card` names.

    They are the packaged ones, or those in the workspace if their fingerprint is the card's. Empty when they
    are not to be found.
    """
    trained = card.get("definition", {})
    packaged = trained.get("data") == "packaged"
    with suppress(WorkshopError):  # no such files here
        splits = load_fiqa("packaged") if packaged else read_processed(workspace.data)
        if packaged or fingerprint(splits["train"]) == trained.get("train_sha256"):
            return {normalized(q) for part in ("train", "validation") for q in splits[part]["question"]}
    return set()


def voice_texts(profile: "Profile") -> tuple[list[str], list[str]]:
    """People's whole answers to the packaged training questions, and the untuned model's, which are kept.

    `metrics.train_voice` learns from them. Both are empty, and it is said why, where the model or the rows
    are others than those that were kept.
    """
    if (profile.model, profile.data) != ("packaged", "packaged"):
        print("Voice is not measured: untuned answers are kept for SmolLM2 and the packaged rows alone.")
        return [], []
    kept = json.loads((kept_run() / "untuned_answers.json").read_text(encoding="utf-8"))
    people = [row["ground_truths"][0] for row in load_fiqa("packaged")["train"]]
    return people, [*kept["plain"], *kept["chat"]]


# --- Answers are made in batches and kept as soon as they exist: a killed evaluation repeats none.
#
# Each combination of weights, prompts, decoding and rows has a folder of its own, named by a hash: the
# answers of another adapter are never taken for these.


@dataclass(frozen=True)
class Decoding:
    """How answers are made; always greedy, so that the same weights give the same answers."""

    max_new_tokens: int = 128
    no_repeat_ngram_size: int = GUARD  # no sequence of so many tokens occurs twice; 0 forbids nothing


@dataclass(frozen=True)
class Replay:
    """A solver for the NeMo Evaluator that hands out answers made before: one for each row, in order."""

    answers: list[Answer]
    folder: Path

    async def solve(self, task: "SeedResult") -> "SolveResult":
        """Called by the SDK for every row."""
        from nemo_evaluator import SolveResult
        from nemo_evaluator.observability.types import ModelResponse

        said = self.answers[task.metadata["row"]]
        reason = "stop" if said.stopped else "length"
        response = ModelResponse(said.text, finish_reason=reason, completion_tokens=said.n_tokens)
        return SolveResult(response=said.text, model_response=response)


def prompt_texts(
    rows: Sequence[dict], tokenizer: "PreTrainedTokenizerBase", style: str = "plain"
) -> list[str]:
    """What each row's model reads, as text without the BOS token where the tokenizer writes it itself."""
    return [prompt_text(row["question"], tokenizer, style) for row in rows]


def answer_rows(
    workspace: "Workspace",
    rows: Sequence[dict],
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    style: str,
    decoding: Decoding,
    tuned: bool,
    batch_size: int = 0,
) -> Replay:
    """One answer a row by the tuned model, or by its base with the adapter off; kept ones are not made again.

    `batch_size` rows are answered together; 0 takes 24 on a CPU and 64 on a GPU.
    """
    from tqdm import tqdm

    known = identity(model, tuned) | asdict(decoding)
    folder = answers_folder(workspace, rows, prompt_texts(rows, tokenizer, style), known)
    answers = kept_answers(folder / KEPT)
    left = [i for i in range(len(rows)) if i not in answers]
    label, size = "tuned" if tuned else "base", batch_size or (24 if model.device.type == "cpu" else 64)
    with asked(model, tuned):
        for start in tqdm(range(0, len(left), size), desc=f"{label}: batches of {size}", leave=False):
            batch = left[start : start + size]
            questions = [rows[i]["question"] for i in batch]
            made = generate_answers(model, tokenizer, questions, style, **asdict(decoding))
            answers |= dict(zip(batch, made, strict=True))
            with (folder / KEPT).open("a", encoding="utf-8") as file:
                file.writelines(f"\n{json.dumps({'row': i} | asdict(answers[i]))}" for i in batch)
    print(f"{label}: {len(rows)} answers, {len(rows) - len(left)} of them kept from before")
    return Replay([answers[i] for i in range(len(rows))], folder)


KEPT = "answers.jsonl"


def kept_answers(file: Path) -> dict[int, Answer]:
    """Answers by row; a line that a kill has cut in half is none. Each record begins a line of its own."""
    answers = {}
    for line in file.read_text(encoding="utf-8").split("\n") if file.exists() else ():
        with suppress(ValueError):
            record = json.loads(line)
            answers[record["row"]] = Answer(record["text"], record["stopped"], record["n_tokens"])
    return answers


def answers_folder(workspace: "Workspace", rows: Sequence[dict], prompts: Sequence[str], known: dict) -> Path:
    """The folder that belongs to exactly these rows, these prompts and what is `known` of the model."""
    read = fingerprint([{"prompt": prompt} for prompt in prompts])
    definition = {"rows": fingerprint(rows), "prompts": read} | known
    name = hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()[:16]
    folder = workspace.evaluation / "answers" / name
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "definition.json", definition)
    return folder


def identity(model: "PreTrainedModel", tuned: bool = True) -> dict[str, object]:
    """What tells a model from another: hashes of 64 values of each base weight and of the whole adapter."""
    import torch

    base, adapter = hashlib.sha256(), hashlib.sha256()
    for name, weights in model.named_parameters():
        if "lora_" in name:
            adapter.update(name.encode() + weights.detach().cpu().view(torch.uint8).numpy().tobytes())
            continue
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        values = weights.detach().flatten()[:: max(1, weights.numel() // 64)][:64].float().cpu()
        base.update(f"{plain} {tuple(weights.shape)}".encode() + values.numpy().tobytes())
    found = {"base": base.hexdigest(), "precision": f"{model.dtype} on {model.device.type}"}
    if tuned and hasattr(model, "disable_adapter"):
        settings = model.peft_config[model.active_adapter].to_dict()
        found |= {"adapter": adapter.hexdigest()} | {key: settings[key] for key in ADAPTER_SETTINGS}
    return found


ADAPTER_SETTINGS = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")


def asked(model: "PreTrainedModel", tuned: bool) -> AbstractContextManager:
    """Context in which the tuned model, or its base with the adapter off, is the one that is asked."""
    return nullcontext() if tuned or not hasattr(model, "disable_adapter") else model.disable_adapter()


# --- How likely a model finds the reference answers: a measure that needs no generated text.


def reference_nll(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", rows: Sequence[dict], profile: "Profile"
) -> list[float]:
    """Negative log-likelihood of each row's likeliest reference, in nats per token, end token included.

    Rows are cut at `profile.max_length` as in training. They go through the model one at a time (side by
    side with padding took a quarter longer on a CPU), and logits are computed for the answer alone. The
    model is in evaluation mode afterwards.
    """
    import torch

    def nats(question: str, reference: str) -> float:
        row = pack_rows([encode(question, reference, tokenizer, profile.prompt, profile.max_length)])
        names = ("input_ids", "labels", "logits_to_keep", "shift_labels")
        inputs = {name: row[name].to(model.device) for name in names}
        with torch.no_grad():
            return model(**inputs, use_cache=False).loss.item()

    model.eval()
    return [min(nats(row["question"], text) for text in row["ground_truths"]) for row in rows]


# --- FiQA as a benchmark of the NeMo Evaluator SDK.


@dataclass(frozen=True)
class Evaluated:
    """One model's answers to the rows, scored."""

    label: str
    folder: Path  # the SDK's logs
    samples: list[dict]  # one a row: answer, tokens, and every metric by name
    sdk: dict  # the SDK's own scores: their mean is that of the primary metric

    def values(self, metric: str) -> list[float]:
        """The metric of every row, in order."""
        return [sample[metric] for sample in self.samples]

    def add(self, metric: str, values: Sequence[float]) -> None:
        """Give every row one more metric, in order."""
        for sample, value in zip(self.samples, values, strict=True):
            sample[metric] = value


def register_fiqa(rows: Sequence[dict], prompts: Sequence[str], score: "Score") -> "EvalEnvironment":
    """Register `rows` (`question`, `ground_truths`) as the environment `fiqa` and return it.

    `score` is what `metrics.make_score` returns. Semantic similarity is the SDK's reward, so its own summary
    gives the primary metric; the other metrics are in the scoring details of each sample.
    """
    from nemo_evaluator import ScorerInput, SeedResult, benchmark, get_environment, scorer

    def seed(row: dict, index: int) -> SeedResult:
        return SeedResult(prompts[index], expected_answer=row["ground_truths"][0], metadata={"row": index})

    @benchmark(name="fiqa", dataset=lambda: [dict(row) for row in rows], seed_fn=seed)
    @scorer
    def all_metrics(sample: ScorerInput) -> dict[str, float]:
        scores = score(sample.response, rows[sample.metadata["row"]]["ground_truths"])
        return {"reward": scores[PRIMARY], **scores}

    return get_environment("fiqa")


def evaluate(
    rows: Sequence[dict],
    prompts: Sequence[str],
    solver: "Solver",
    score: "Score",
    label: str,
    folder: Path,
) -> Evaluated:
    """Score the answers of `solver`, a `Replay` or one of the SDK's own, with the SDK; its logs in `folder`.

    Raises:
        WorkshopError: a row has no answer; the SDK scores a failed request as 0, a bad answer.
    """
    from nemo_evaluator import run_evaluation

    benchmark, settings = register_fiqa(rows, prompts, score), {"benchmark": "fiqa"}
    run = run_evaluation(benchmark, solver, step_log_dir=folder, max_system_retries=1, config=settings)
    logging.getLogger("nemo_evaluator").setLevel(logging.CRITICAL)  # failures are raised below
    with ThreadPoolExecutor(1) as pool:  # a notebook's own event loop is busy with the cell
        bundle = pool.submit(asyncio.run, run).result()
    log = map(json.loads, (folder / "inference_log.jsonl").read_text("utf-8").strip().split("\n"))
    answered = {record["problem_idx"]: record for record in log if "problem_idx" in record}
    samples = []
    for result in sorted(bundle["_results"], key=lambda result: result["problem_idx"]):
        row, scores = result["problem_idx"], result["scoring_details"]
        if row not in answered or "error_category" in scores:
            raise WorkshopError(
                f"{label} gave no answer to row {row} ({scores.get('error', 'nothing was logged')}): "
                "put that right and run again."
            )
        said = answered[row]
        about = {"row": row, "question": rows[row]["question"], "answer": said["response"].strip()}
        about |= {"tokens": said["completion_tokens"], "stopped": float(said["finish_reason"] == "stop")}
        samples.append(about | {name: scores[name] for name in METRICS if name in scores})
    return Evaluated(label, folder, samples, bundle["benchmark"]["scores"])


# --- From two evaluations to what a reader is told: comparisons, floors, files.

Floors = dict[str, list[dict[str, float]]]  # name of the floor -> the metrics of every row


def score_floors(rows: Sequence[dict], score: "Score", seed: int = 0) -> Floors:
    """The floors of `metrics.floors`, scored on the same `rows` by the same metrics as the answers."""
    references = [row["ground_truths"] for row in rows]
    return {
        name: [score(answer, texts) for answer, texts in zip(answers, references, strict=True)]
        for name, answers in metrics.floors(rows, seed).items()
    }


def floor_means(floors: Floors) -> dict[str, dict[str, float]]:
    """Name of each floor -> the mean of every metric."""
    import pandas as pd

    return {name: pd.DataFrame(scores).mean().to_dict() for name, scores in floors.items()}


def compare_all(base: Evaluated, tuned: Evaluated, seed: int = 0) -> dict[str, Comparison]:
    """Tuned minus base in every metric that both have."""
    shared = [name for name in METRICS if name in base.samples[0] and name in tuned.samples[0]]
    return {name: compare(name, base.values(name), tuned.values(name), seed) for name in shared}


def save_evaluation(
    workspace: "Workspace",
    rows: Sequence[dict],
    base: Evaluated,
    tuned: Evaluated,
    floors: Floors,
    comparisons: dict[str, Comparison],
    **about: object,
) -> list[Path]:
    """Write `samples.jsonl`, one line a row, and `summary.json` to `outputs/evaluation`; returns both."""
    samples, summary = workspace.evaluation / "samples.jsonl", workspace.evaluation / "summary.json"
    with atomic_writer(samples) as file:
        for i, row in enumerate(rows):
            line = {"row": i, "question": row["question"], "references": list(row["ground_truths"])}
            line |= {side.label: side.samples[i] for side in (base, tuned)}
            line["floors"] = {name: scores[i] for name, scores in floors.items()}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    about |= {"rows": len(rows), "floors": floor_means(floors)}
    about["comparisons"] = {name: asdict(found) for name, found in comparisons.items()}
    write_card(summary, **about)
    return [samples, summary]
