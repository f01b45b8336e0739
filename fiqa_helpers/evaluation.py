"""Run the FiQA benchmark with the NeMo Evaluator SDK, and go on where a killed run ended.

The SDK keeps an append-only log of answers and skips those that it has, but it does not see that a model
has changed. So each combination of weights, prompts, decoding and rows gets a log folder of its own, named by
a hash.
"""

import asyncio
import hashlib
import json
import logging
import mmap
import os
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fiqa_helpers import metrics
from fiqa_helpers.errors import WorkshopError
from fiqa_helpers.eval_progress import EVERY, EvalProgress
from fiqa_helpers.runcard import read_card, write_json

if TYPE_CHECKING:
    from datasets import Dataset

    from fiqa_helpers.paths import Workspace
    from fiqa_helpers.profiles import Profile
    from fiqa_helpers.similarity import Similarity
    from fiqa_helpers.solvers import EndpointSolver, ModelSolver

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

    from fiqa_helpers.benchmark import register_fiqa

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
