"""The evaluation of notebook 06: tuned against untuned on the same rows, scored, tabulated and drawn."""

import asyncio
import hashlib
import json
import logging
import mmap
import os
import re
import urllib.error
import urllib.request
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fiqa_helpers import metrics
from fiqa_helpers.base import WorkshopError, atomic_writer, read_card, write_card, write_json
from fiqa_helpers.data import fingerprint, load_with_report, read_processed
from fiqa_helpers.generate import GUARD, Answer, generate_answers
from fiqa_helpers.metrics import FEW_ROWS, METRICS, PRIMARY, Comparison, compare
from fiqa_helpers.rows import IGNORE_INDEX, build_prompt, encode
from fiqa_helpers.show import EVERY, EvalProgress

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from nemo_evaluator import EvalEnvironment, SeedResult, SolveResult
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fiqa_helpers.base import Workspace
    from fiqa_helpers.metrics import Similarity
    from fiqa_helpers.profiles import Profile
    from fiqa_helpers.show import Shown

# --- No marks for answers that were in the lesson: an adapter is not tested on rows that it was trained on.


def refuse_leak(card: dict, rows: Sequence[dict], workspace: "Workspace") -> str:
    """Hold the rows that an adapter was trained on, as its run card has them, against `rows`.

    The packaged rows are the hub's test split, so an adapter that was trained on them may be tested on the
    packaged test part, and never on the hub's. Questions are compared without case and punctuation. Returns
    in words what was checked, also when the training rows are not to be found here.

    Raises:
        WorkshopError: some of `rows` were trained on.
    """
    trained = training_questions(card, workspace)
    if trained is None:
        return "The rows that this adapter was trained on are not here, so a leak cannot be ruled out."
    tested = [normalized(row["question"]) for row in rows]
    shared = [question for question in tested if question in trained]
    if shared:
        raise WorkshopError(
            f"The adapter was trained on {len(shared)} of these {len(tested)} test rows (such as "
            f"{shared[0][:60]!r}), so its figures would mean nothing: take rows that it has not "
            "seen, or train it on the hub's training split."
        )
    return (
        f"None of the {len(tested)} test questions is among the {len(trained)} that the adapter learned from."
    )


def training_questions(card: dict, workspace: "Workspace") -> set[str] | None:
    """Questions, normalized, of the training and validation splits that `card` names.

    It names them by fingerprint; the rows are looked for in the workspace and in the packaged ones. A card
    without fingerprints may still say that the data was packaged. None when the rows are not to be found.
    """
    definition = card.get("definition", {})
    splits = ("train", "validation")
    wanted = {split: definition[f"{split}_sha256"] for split in splits if f"{split}_sha256" in definition}
    packaged = definition.get("data", card.get("profile", {}).get("data")) == "packaged"
    if "train" not in wanted and not packaged:
        return None
    for load in (lambda: read_processed(workspace.data), lambda: load_with_report("packaged")[0]):
        try:
            found = load()
        except WorkshopError:
            continue
        if wanted and all(fingerprint(found[split]) == digest for split, digest in wanted.items()):
            break
    else:
        if not packaged:
            return None
        found = load_with_report("packaged")[0]
    return {normalized(question) for split in splits for question in found[split]["question"]}


def normalized(question: str) -> str:
    """Two questions are the same when these are: case, punctuation and spaces don't count."""
    return " ".join(re.findall(r"\w+", question.casefold())) or question


# --- How likely a model finds the reference answers: a measure that needs no generated text.

LOGIT_TOKENS = 2048  # tokens of one forward pass at most: logits over a large vocabulary are big


def reference_nll(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[dict],
    profile: "Profile",
    kept: Path | None = None,
) -> list[float]:
    """Negative log-likelihood of each row's first reference, in nats per token, end token included.

    Rows are cut at `profile.max_length` as in training. `kept` is a file to keep the result in; when it holds
    the values of as many rows already, nothing is computed.
    """
    found = read_card(kept) if kept else None
    if found and found.get("max_length") == profile.max_length and len(found["nll"]) == len(rows):
        return found["nll"]
    values = _compute(model, tokenizer, rows, profile)
    if kept:
        write_json(kept, {"max_length": profile.max_length, "nll": values})
    return values


def _compute(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", rows: Sequence[dict], profile: "Profile"
) -> list[float]:
    import torch

    from fiqa_helpers.rows import pad_rows, split_rows

    encoded = [
        encode(row["question"], row["ground_truths"][0], tokenizer, profile.prompt, profile.max_length)
        | {"row": i}
        for i, row in enumerate(rows)
    ]
    budget = max(profile.max_length, min(profile.tokens_per_batch, LOGIT_TOKENS))
    values = [0.0] * len(encoded)
    was_training = model.training
    model.eval()
    try:
        for group in split_rows(encoded, budget, "padded"):
            batch = {
                name: tensor.to(model.device)
                for name, tensor in pad_rows(group, tokenizer.pad_token_id).items()
            }
            labels = batch.pop("labels")
            with torch.no_grad():
                logits = model(**batch, use_cache=False).logits
            for place, row in enumerate(group):
                wanted = labels[place, 1:] != IGNORE_INDEX  # logits at a position predict the next token
                loss = torch.nn.functional.cross_entropy(
                    logits[place, :-1][wanted].float(), labels[place, 1:][wanted]
                )
                values[row["row"]] = loss.item()
    finally:
        model.train(was_training)
    return values


# --- FiQA as a benchmark of the NeMo Evaluator SDK, and hashes that tell one model from another.

AT_ONCE = 4096  # references embedded in one call


def register_fiqa(
    rows: Sequence[dict], prompts: Sequence[str], similarity: "Similarity"
) -> "EvalEnvironment":
    """Register `rows` (`question`, `ground_truths`) as the environment `fiqa` and return it.

    Semantic similarity is the SDK's reward, so its own summary gives the primary metric; the other metrics
    are in the scoring details of each sample.
    """
    from nemo_evaluator import ScorerInput, SeedResult, benchmark, get_environment, scorer

    references = [text for row in rows for text in row["ground_truths"]]
    for start in range(0, len(references), AT_ONCE):  # in a few large batches now, not one by one later
        for cut in (False, True):
            similarity.embed(references[start : start + AT_ONCE], cut)

    def seed(row: dict, index: int) -> SeedResult:
        # The SDK keeps this for each row, in memory and in its log: no second copy of the references.
        about = {"row": index, "question": row["question"]}
        return SeedResult(prompt=prompts[index], expected_answer=row["ground_truths"][0], metadata=about)

    @benchmark(name="fiqa", dataset=lambda: [dict(row) for row in rows], seed_fn=seed)
    @scorer
    def score(sample: ScorerInput) -> dict[str, float]:
        scores = metrics.score(sample.response, rows[sample.metadata["row"]]["ground_truths"], similarity)
        return {"reward": scores[metrics.PRIMARY], **scores}

    return get_environment("fiqa")


def fingerprint_base(model: "PreTrainedModel") -> str:
    """Hash over names, shapes and 64 values of each weight tensor, adapter left out: cheap also for 8B."""
    total = hashlib.sha256()
    for name, weights in model.named_parameters():
        if "lora_" in name:
            continue
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        values = weights.detach().flatten()[:: max(1, weights.numel() // 64)][:64].float().cpu()
        total.update(f"{plain} {tuple(weights.shape)}".encode() + values.numpy().tobytes())
    return total.hexdigest()


def fingerprint_adapter(model: "PreTrainedModel") -> str | None:
    """Hash over every weight and setting of the active adapter; None for a model without one."""
    import torch

    if not has_adapter(model):
        return None
    from peft import get_peft_model_state_dict

    settings = model.peft_config[model.active_adapter].to_dict()
    for key in ("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"):
        settings.pop(key, None)  # where it came from, not what it does
    total = hashlib.sha256(json.dumps(settings, sort_keys=True, default=_plain).encode())
    for name, weights in sorted(get_peft_model_state_dict(model).items()):
        total.update(name.encode() + weights.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def has_adapter(model: "PreTrainedModel") -> bool:
    """Whether `model` is a PEFT model whose adapter can be switched off."""
    return hasattr(model, "disable_adapter") and bool(getattr(model, "peft_config", None))


def _plain(value: object) -> object:
    return sorted(value) if isinstance(value, set) else str(value)


# --- Who answers the benchmark's questions: a model in this process, or a URL.


@dataclass(frozen=True)
class Decoding:
    """How answers are made; always greedy, so that the same weights give the same answers."""

    max_new_tokens: int = 128
    no_repeat_ngram_size: int = GUARD  # no sequence of so many tokens occurs twice; 0 forbids nothing

    def keywords(self) -> dict[str, object]:
        """What `generate` is given beside the length."""
        return {"no_repeat_ngram_size": self.no_repeat_ngram_size}


class Stopped(BaseException):
    """The person who waits has interrupted: ends `generate` at the next token, past the SDK's retries."""


class ModelSolver:
    """Answers from a model in this process, base or tuned: the base is the adapter switched off.

    The SDK asks for one answer at a time, many at once. Whoever asks waits in a queue, and whole batches of
    `batch_size` are generated together.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        style: str = "plain",
        decoding: Decoding = Decoding(),
        batch_size: int = 8,
        tuned: bool = True,
    ):
        self.model, self.tokenizer, self.style, self.decoding = model, tokenizer, style, decoding
        self.batch_size, self.tuned = batch_size, tuned
        self.in_batch = 0.0  # of the batch in work, answers' worth of tokens that are done
        self.stop = False
        self._waiting: list[tuple[str, asyncio.Future]] = []
        self._worker: asyncio.Task | None = None

    def identity(self) -> dict[str, Any]:
        """What decides the answers besides prompts: weights, adapter, precision, decoding."""
        return {
            "base": fingerprint_base(self.model),
            "adapter": fingerprint_adapter(self.model) if self.tuned else None,
            "precision": f"{self.model.dtype} on {self.model.device.type}",
            "decoding": asdict(self.decoding),
        }

    def prompt(self, question: str) -> str:
        """The text before the answer, as the log keeps it."""
        return build_prompt(question, self.style, self.tokenizer)

    def active(self):
        """Context in which the model is the one to be measured."""
        return nullcontext() if self.tuned or not has_adapter(self.model) else self.model.disable_adapter()

    async def solve(self, task: "SeedResult") -> "SolveResult":
        """Called by the SDK for every row."""
        from nemo_evaluator import SolveResult
        from nemo_evaluator.observability.types import ModelResponse

        answer = asyncio.get_running_loop().create_future()
        self._waiting.append((task.metadata["question"], answer))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        said: Answer = await answer
        reason = "stop" if said.stopped else "length"
        response = ModelResponse(
            said.text, finish_reason=reason, completion_tokens=said.n_tokens, total_tokens=said.n_tokens
        )
        return SolveResult(response=said.text, model_response=response)

    async def _work(self) -> None:
        while self._waiting:
            seen = 0
            while len(self._waiting) > seen:  # let everyone who is about to ask join the batch
                seen = len(self._waiting)
                await asyncio.sleep(0)
            batch, self._waiting = self._waiting[: self.batch_size], self._waiting[self.batch_size :]
            try:
                answers = self._generate([question for question, _ in batch])
                pairs = list(zip(batch, answers, strict=True))
            except BaseException as error:  # hand it to everyone who waits: the SDK decides what to do
                for _, future in batch + self._waiting:
                    if not future.done():
                        future.set_exception(error)
                self._waiting = []
                return
            for (_, future), answer in pairs:
                if not future.done():
                    future.set_result(answer)
            await asyncio.sleep(0)

    def _generate(self, questions: list[str]) -> list[Answer]:
        import torch
        from transformers import StoppingCriteriaList

        made = 0

        def after_token(ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
            nonlocal made
            if self.stop:
                raise Stopped
            made += 1
            self.in_batch = len(questions) * made / self.decoding.max_new_tokens
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        more = {"stopping_criteria": StoppingCriteriaList([after_token]), **self.decoding.keywords()}
        try:
            with self.active():
                length = self.decoding.max_new_tokens
                return generate_answers(self.model, self.tokenizer, questions, self.style, length, **more)
        finally:
            self.in_batch = 0.0


class EndpointSolver:
    """Answers from an OpenAI-compatible URL: `/completions` with the workshop's prompt, greedy, no guard."""

    in_batch = 0.0
    stop = False
    batch_size = 8  # requests at once

    def __init__(
        self,
        url: str,
        name: str,
        tokenizer: "PreTrainedTokenizerBase",
        style: str = "plain",
        max_new_tokens: int = Decoding.max_new_tokens,
    ):
        decoding = Decoding(max_new_tokens, no_repeat_ngram_size=0)  # which its protocol does not know
        self.url, self.name, self.decoding = url.rstrip("/"), name, decoding
        self.style, self.tokenizer = style, tokenizer
        self._solver = None

    def identity(self) -> dict[str, Any]:
        """URL and name: what a server holds under that name cannot be seen from here."""
        return {"url": self.url, "model": self.name, "decoding": asdict(self.decoding)}

    def prompt(self, question: str) -> str:
        """The prompt's text without the BOS token, which the server writes itself."""
        bos = self.tokenizer.bos_token
        text = build_prompt(question, self.style, self.tokenizer)
        return text.removeprefix(bos) if bos and self.style == "chat" else text

    def check(self) -> None:
        """Ask for one token, which a server may first have to load its model for.

        Raises:
            WorkshopError: nobody answers at the URL, or not with this model.
        """
        body = {"model": self.name, "prompt": "Question: What is a bond?", "max_tokens": 1}
        headers = {"Content-Type": "application/json", **_authorization()}
        request = urllib.request.Request(f"{self.url}/completions", json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=600) as reply:
                json.load(reply)["choices"][0]["text"]
        except urllib.error.HTTPError as error:
            said = " ".join(error.read(500).decode("utf-8", "replace").split())
            raise WorkshopError(
                f"{self.url} does not answer for model {self.name!r} ({error.code} {said[:200]}): check the "
                "name that it is served under."
            ) from None
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise WorkshopError(
                f"No OpenAI-compatible server answers at {self.url} "
                f"({getattr(error, 'reason', error)}): start it first; the URL ends in /v1."
            ) from None

    async def solve(self, task: "SeedResult") -> "SolveResult":
        """Called by the SDK for every row; retries and time limits are the SDK's."""
        from nemo_evaluator import CompletionSolver

        if self.stop:
            raise Stopped
        if self._solver is None:  # made here, as it belongs to the running event loop
            self._solver = CompletionSolver(
                self.url,
                self.name,
                api_key=os.environ.get("OPENAI_API_KEY"),
                temperature=0.0,
                max_tokens=self.decoding.max_new_tokens,
            )
        found = await self._solver.solve(task)
        found.response = found.response.strip()
        return found

    async def close(self) -> None:
        """Called by the SDK at the end."""
        if self._solver is not None:
            await self._solver.close()
            self._solver = None


def _authorization() -> dict[str, str]:
    key = os.environ.get("OPENAI_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


# --- Run the FiQA benchmark with the NeMo Evaluator SDK, and go on where a killed run ended.
#
# The SDK keeps an append-only log of answers and skips those that it has, but it does not see that a model
# has changed. So each combination of weights, prompts, decoding and rows gets a log folder of its own,
# named by a hash.

ANSWERS_LOG = "inference_log.jsonl"  # the SDK's names
SCORES_LOG = "verified_log.jsonl"
CPU_ROWS, GPU_ROWS = 24, 100  # tested unless a number is given: 24 show the method, 100 the claim


@dataclass(frozen=True)
class Evaluated:
    """One model's answers to the rows, scored."""

    label: str
    folder: Path  # the SDK's logs
    samples: list[dict]  # one a row: answer, tokens, and every metric by name
    reused: int  # answers that an earlier run had left
    definition: dict  # what the folder's name is the hash of
    sdk: dict  # the SDK's own summary: its headline reward is the primary metric

    def values(self, metric: str) -> list[float]:
        """The metric of every row, in order."""
        return [sample[metric] for sample in self.samples]

    def add(self, metric: str, values: Sequence[float]) -> None:
        """Give every row one more metric, in order."""
        for sample, value in zip(self.samples, values, strict=True):
            sample[metric] = value


def choose_rows(test: "Dataset", rows: int, profile: "Profile") -> list[dict]:
    """`rows` of the test split, drawn with the profile's seed; 0 takes CPU_ROWS or GPU_ROWS.

    A larger number draws the same rows and more.

    Raises:
        WorkshopError: `rows` is 1 or negative.
    """
    if rows == 1 or rows < 0:
        raise WorkshopError(f"rows is {rows}: take at least 2, or 0 for what this machine has time for.")
    count = rows or (CPU_ROWS if profile.device == "cpu" else GPU_ROWS)
    return list(test.shuffle(seed=profile.seed).take(min(count, len(test))))


def evaluate(
    workspace: "Workspace",
    rows: Sequence[dict],
    solver: "ModelSolver | EndpointSolver",
    similarity: "Similarity",
    label: str,
) -> Evaluated:
    """Answer and score each of `rows` (`question`, `ground_truths`); the same call again answers nothing.

    Raises:
        WorkshopError: the model or the server failed, or another process evaluates the same right now.
    """
    from filelock import FileLock, Timeout
    from nemo_evaluator import run_evaluation

    prompts = [solver.prompt(row["question"]) for row in rows]
    folder, definition = open_folder(workspace, rows, prompts, solver.identity())
    try:
        with FileLock(folder / ".lock", timeout=0):
            reused = len(prepare_logs(folder))
            if reused < len(rows) and hasattr(solver, "check"):
                solver.check()
            environment = register_fiqa(rows, prompts, similarity)
            progress = EvalProgress(label, len(rows), reused, lambda: solver.in_batch)
            bundle = _in_thread(
                run_evaluation(
                    environment,
                    solver,
                    progress=progress,
                    max_concurrent=2 * solver.batch_size,  # the next batch waits while one is made
                    step_log_dir=folder,
                    resume=True,
                    max_system_retries=1,
                    config={"benchmark": "fiqa"},
                ),
                solver,
                progress,
            )
            progress.close()
    except Timeout:
        raise WorkshopError(
            f"Another process evaluates the same model on the same rows in {folder}: wait for it or end it."
        ) from None
    scored = {result["problem_idx"]: result for result in bundle["_results"]}
    answered = read_log(folder / ANSWERS_LOG, ("response", "completion_tokens", "finish_reason"))
    samples = [_sample(i, row, answered.get(i), scored[i], label) for i, row in enumerate(rows)]
    scores = bundle["benchmark"]["scores"]
    sdk = {name: scores[name] for name in ("mean_reward", "summary") if name in scores}
    return Evaluated(label, folder, samples, reused, definition, sdk)


def open_folder(
    workspace: "Workspace", rows: Sequence[dict], prompts: Sequence[str], identity: dict
) -> tuple[Path, dict]:
    """The log folder that belongs to exactly these rows, prompts and this model: (folder, definition)."""
    from fiqa_helpers.data import fingerprint

    definition = {
        "rows": fingerprint([dict(row) for row in rows]),
        "prompts": fingerprint([{"prompt": prompt} for prompt in prompts]),
        **identity,
    }
    name = hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()[:16]
    folder = workspace.evaluation / "answers" / name
    folder.mkdir(parents=True, exist_ok=True)
    if read_card(folder / "definition.json") is None:
        write_json(folder / "definition.json", definition)
    return folder, definition


def prepare_logs(folder: Path) -> set[int]:
    """Make the SDK's logs fit to go on with, and return the numbers of the rows that they hold an answer to.

    A kill can leave half a line, to which the SDK would glue the next record. Scores are dropped, so that
    kept answers are scored anew, when the metrics were defined otherwise or when a scored answer is missing.
    """
    for name in (ANSWERS_LOG, SCORES_LOG):
        path = folder / name
        if path.exists() and path.stat().st_size:
            with path.open("r+b") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                whole = content.rfind(b"\n") + 1
            os.truncate(path, whole)
    answers, scores = (set(read_log(folder / name, ())) for name in (ANSWERS_LOG, SCORES_LOG))
    marker = folder / "metrics.json"
    if read_card(marker) != {"version": metrics.VERSION} or not scores <= answers:
        (folder / SCORES_LOG).unlink(missing_ok=True)
        write_json(marker, {"version": metrics.VERSION})
    return answers


def read_log(path: Path, fields: Sequence[str] | None = None) -> dict[int, dict]:
    """Records of one of the SDK's logs by row number, damaged lines left out; {} when there is none.

    Of each record only `fields` are kept: a log of many rows, with prompts and references, is large.
    """
    records = {}
    if not path.exists():
        return records
    with path.open("rb") as log:
        for line in log:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if "problem_idx" in record:
                kept = record if fields is None else {name: record[name] for name in fields}
                records[record["problem_idx"]] = kept
    return records


def _sample(index: int, row: dict, answered: dict | None, scored: dict, label: str) -> dict:
    """One row's result. The SDK scores a failed request as 0; here it is an error, not a bad answer."""
    details = scored["scoring_details"]
    if answered is None or "error_category" in details:
        raise WorkshopError(
            f"{label} gave no answer to row {index} ({details.get('error', 'nothing was logged')}): "
            "put that right and run again; answers so far are kept."
        )
    return {
        "row": index,
        "question": row["question"],
        "answer": answered["response"],
        "tokens": answered["completion_tokens"],
        "stopped": float(answered["finish_reason"] == "stop"),
        **{name: details[name] for name in metrics.METRICS if name in details},
    }


def _in_thread(run: Coroutine, solver: "ModelSolver | EndpointSolver", progress: EvalProgress) -> dict:
    """The result of `run`, in an event loop of its own: a notebook's loop is busy with the cell.

    This thread shows the progress meanwhile, and an interrupt ends the generation at the next token.
    """
    logger = logging.getLogger("nemo_evaluator")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # failures are raised as one sentence below
    solver.stop = False
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(asyncio.run, run)
        try:
            while not wait([future], timeout=EVERY).done:
                progress.show()
            return future.result()
        except KeyboardInterrupt:
            solver.stop = True
            wait([future])
            raise
        except RuntimeError as error:
            raise _explained(error) from error
        finally:
            logger.setLevel(level)


def _explained(error: RuntimeError) -> Exception:
    """The SDK's wrapper around the first failure, taken off; memory errors in one sentence."""
    cause = error.__cause__ or error
    if type(cause).__name__ == "OutOfMemoryError":
        return WorkshopError(
            "The GPU's memory is full: lower max_new_tokens in overrides or end what else uses it, and run "
            "again; answers so far are kept."
        )
    return cause if isinstance(cause, Exception) else error


# --- From two evaluations to what a reader is told: comparisons, floors, changed answers, files.

Floors = dict[str, list[dict[str, float]]]  # name of the floor -> the metrics of every row


def score_floors(rows: Sequence[dict], similarity: "Similarity", seed: int = 0) -> Floors:
    """The floors of `metrics.floors`, scored on the same `rows` by the same metrics as the answers."""
    answers = metrics.floors(rows, seed)
    texts = [answer for column in answers.values() for answer in column]
    for cut in (False, True):  # all at once: many texts of a batch cost little more than one
        similarity.embed(texts + [text for row in rows for text in row["ground_truths"]], cut)
    return {
        name: [
            metrics.score(answer, row["ground_truths"], similarity)
            for answer, row in zip(column, rows, strict=True)
        ]
        for name, column in answers.items()
    }


def floor_means(floors: Floors, metric: str) -> dict[str, float]:
    """Mean of one metric for each floor; {} for a metric that a floor has no value of."""
    return {
        name: sum(scores[metric] for scores in rows) / len(rows)
        for name, rows in floors.items()
        if metric in rows[0]
    }


def compare_all(base: "Evaluated", tuned: "Evaluated", seed: int = 0) -> dict[str, Comparison]:
    """Tuned minus base in every metric that both have."""
    shared = [name for name in METRICS if name in base.samples[0] and name in tuned.samples[0]]
    return {name: compare(name, base.values(name), tuned.values(name), seed) for name in shared}


def comparison_table(comparisons: dict[str, Comparison], floors: Floors) -> "pd.DataFrame":
    """One line per metric: both means, the difference with its interval, and the floors beside them."""
    import pandas as pd

    lines = []
    for name, found in comparisons.items():
        line = {
            "metric": METRICS[name].title,
            "better": {1: "higher", -1: "lower", 0: "neither"}[METRICS[name].better],
            "base": f"{found.base:.3f}",
            "tuned": f"{found.tuned:.3f}",
            "difference": f"{found.difference:+.3f}",
            "95 % interval": f"{found.low:+.3f} to {found.high:+.3f}",
            "rows won": f"{found.win_rate:.0%}" if METRICS[name].better else "",
            "verdict": found.verdict,
        }
        means = floor_means(floors, name)
        lines.append(line | {floor: f"{means[floor]:.3f}" if means else "" for floor in floors})
    return pd.DataFrame(lines).set_index("metric")


def in_words(comparisons: dict[str, Comparison], floors: Floors, all_rows: int) -> str:
    """What the primary metric allows one to say, and what it does not. `all_rows` are there to be tested."""
    found, means = comparisons[PRIMARY], floor_means(floors, PRIMARY)
    lines = [found.in_words()[:1].upper() + found.in_words()[1:]]
    half = (found.high - found.low) / 2
    if half > 0:
        lines.append(
            f"{found.rows} rows leave {half:.3f} to each side; a gain of 0.03 would need some "
            f"{found.needed_rows(0.03):,} rows to stand out."
        )
    if found.rows < FEW_ROWS:
        finding = found.verdict in ("better", "worse")
        means_what = (
            "a hint, to be tested on more rows" if finding else "how little is known, not who is better"
        )
        lines.append(
            f"With fewer than {FEW_ROWS} rows even this interval is too narrow rather than too wide: "
            f"what it shows is {means_what}."
        )
    if found.rows < all_rows:
        lines.append(f"This is a subset: {found.rows} of {all_rows} test rows.")
    best = max(means, key=means.get)
    stands = {
        side: "below" if getattr(found, side) < means[best] else "not below" for side in ("base", "tuned")
    }
    lines.append(
        f"The highest floor is {best!r} with {means[best]:.3f}: the base model's {found.base:.3f} is "
        f"{stands['base']} it, the tuned model's {found.tuned:.3f} is {stands['tuned']} it."
    )
    return "\n".join(lines)


def most_changed(base: "Evaluated", tuned: "Evaluated", count: int = 5) -> tuple["Shown", "Shown"]:
    """The rows whose similarity rose and fell most, both answers in full: (best, worst) for display."""
    from fiqa_helpers import show

    gain = [t - b for b, t in zip(base.values(PRIMARY), tuned.values(PRIMARY), strict=True)]
    order = sorted(range(len(gain)), key=lambda i: (-gain[i], i))
    count = min(count, len(order) // 2)

    def shown(rows: list[int], caption: str) -> "Shown":
        questions = [
            f"{base.samples[i]['question']}\n\nsimilarity {base.samples[i][PRIMARY]:.3f} -> "
            f"{tuned.samples[i][PRIMARY]:.3f} ({gain[i]:+.3f})"
            for i in rows
        ]
        columns = {
            side.label: [
                Answer(side.samples[i]["answer"], bool(side.samples[i]["stopped"]), side.samples[i]["tokens"])
                for i in rows
            ]
            for side in (base, tuned)
        }
        return show.answers(questions, columns, caption)

    best = shown(order[:count], f"The {count} best changes in similarity")
    return best, shown(order[::-1][:count], f"The {count} worst changes in similarity")


def save_evaluation(
    workspace: "Workspace",
    rows: Sequence[dict],
    base: "Evaluated",
    tuned: "Evaluated",
    floors: Floors,
    comparisons: dict[str, Comparison],
    **about: object,
) -> list[Path]:
    """Write `samples.jsonl`, one line a row, and `summary.json` to `outputs/evaluation`; returns both."""
    samples, summary = workspace.evaluation / "samples.jsonl", workspace.evaluation / "summary.json"
    with atomic_writer(samples) as file:
        for i, row in enumerate(rows):
            line = {"row": i, "question": row["question"], "references": list(row["ground_truths"])}
            for side, evaluated in (("base", base), ("tuned", tuned)):
                line[side] = {k: v for k, v in evaluated.samples[i].items() if k not in line}
            line["floors"] = {name: scores[i] for name, scores in floors.items()}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    write_card(
        summary,
        rows=len(rows),
        comparisons={name: found.as_row() for name, found in comparisons.items()},
        floors={
            name: {metric: floor_means(floors, metric)[name] for metric in floors[name][0]} for name in floors
        },
        evaluator={side.label: side.sdk for side in (base, tuned)},
        definitions={side.label: side.definition for side in (base, tuned)},
        logs={side.label: workspace.shown(side.folder) for side in (base, tuned)},
        metric_version=metrics.VERSION,
        **about,
    )
    return [samples, summary]


# --- Figures of an evaluation. Each comes with a sentence that says the same, and reads in black and white.

BASE, TUNED = "#1f5a94", "#c65d00"  # also told apart by marker: circle and triangle
LINES = ((0, (6, 2)), (0, (1, 1.5)), (0, (4, 1.5, 1, 1.5)), (0, (2, 4)))  # of the floors


def draw_differences(base: "Evaluated", tuned: "Evaluated", found: "Comparison") -> tuple["Figure", str]:
    """Every row's paired difference, their mean and its 95 % interval: (figure, alternative text)."""
    import numpy as np

    values = np.array(tuned.values(found.metric)) - np.array(base.values(found.metric))
    title = METRICS[found.metric].title
    figure, axes = _figure(3.2)
    bins = np.histogram_bin_edges(values, bins=max(8, min(40, len(values) // 4)))
    counts, _, _ = axes.hist(values, bins=bins, color="0.8", edgecolor="0.35")
    axes.plot(values, np.full(len(values), -0.06 * counts.max()), "|", color="black", markersize=9)
    axes.axvspan(found.low, found.high, facecolor="none", edgecolor=TUNED, hatch="///", linewidth=1.2)
    axes.axvline(found.difference, color=TUNED, linewidth=2.2)
    axes.axvline(0, color="black", linestyle=(0, (5, 3)), linewidth=1.2)
    axes.set_title(
        f"mean {found.difference:+.3f} (line), 95 % interval {found.low:+.3f} to {found.high:+.3f} (hatched)"
        f", {found.rows} rows",
        fontsize=9,
        loc="left",
    )
    axes.set_ylim(-0.14 * counts.max(), 1.08 * counts.max())
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel(f"{title}: tuned minus base (dashed: no difference)")
    axes.set_ylabel("rows")
    alt = (
        f"Histogram of {found.rows} paired differences in {title}, from {values.min():+.3f} to "
        f"{values.max():+.3f}. Their mean is {found.difference:+.3f} with 95 % interval {found.low:+.3f} to "
        f"{found.high:+.3f}, which {'contains' if found.low <= 0 <= found.high else 'excludes'} zero."
    )
    return figure, alt


def draw_by_length(base: "Evaluated", tuned: "Evaluated", floors: dict[str, float]) -> tuple["Figure", str]:
    """Similarity against the answer's words, floors as lines: (figure, alternative text)."""
    import numpy as np

    figure, axes = _figure(3.8)
    said = []
    for side, color, marker in ((base, BASE, "o"), (tuned, TUNED, "^")):
        words = np.array([len(sample["answer"].split()) for sample in side.samples])
        similarity = np.array(side.values(PRIMARY))
        face = "none" if side is base else color
        label = f"{side.label} (mean {similarity.mean():.2f}, median {np.median(words):.0f} words)"
        size = 34 if len(words) < 100 else 14
        axes.scatter(words, similarity, marker=marker, facecolor=face, edgecolor=color, s=size, label=label)
        said.append(
            f"{side.label}: mean {similarity.mean():.3f}, median length {np.median(words):.0f} words, "
            f"correlation of length and similarity {_correlation(words, similarity):+.2f}"
        )
    _lines(axes, floors)
    axes.set_xlabel("words of the answer")
    axes.set_ylabel("semantic similarity")
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.18), ncols=2, fontsize=8, frameon=False)
    values = ", ".join(f"{name} {value:.3f}" for name, value in floors.items())
    return figure, f"Similarity against answer length. {'; '.join(said)}. Floors as lines: {values}."


def _lines(axes: "Axes", floors: dict[str, float]) -> None:
    """A horizontal line for each floor with its name at the right end, names kept apart."""
    low, high = axes.get_ylim()
    low, high = min(low, *floors.values()) - 0.03, max(high, *floors.values()) + 0.03
    axes.set_ylim(low, high)
    previous = float("-inf")
    for style, (name, value) in zip(LINES, sorted(floors.items(), key=lambda item: item[1]), strict=False):
        axes.axhline(value, color="0.3", linestyle=style, linewidth=1.3)
        place = max(value, previous + 0.055 * (high - low))
        axes.annotate(
            f"{name} {value:.2f}",
            (1.01, place),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8,
            annotation_clip=False,
        )
        previous = place


def _correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's r; 0 where one of the two does not vary."""
    import numpy as np

    return float(np.corrcoef(x, y)[0, 1]) if np.std(x) and np.std(y) else 0.0


def _figure(height: float) -> tuple["Figure", "Axes"]:
    """An empty figure outside pyplot, which would keep it in memory and show it twice."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
