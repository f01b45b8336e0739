"""Run the FiQA benchmark with the NeMo Evaluator SDK, and go on where a killed run ended.

The SDK keeps an append-only log of answers and skips those that it has, but it does not see that a model
has changed. So each combination of weights, prompts, decoding and rows gets a log folder of its own, named by
a hash.
"""

import asyncio
import hashlib
import json
import logging
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
    from fiqa_helpers.paths import Workspace
    from fiqa_helpers.similarity import Similarity
    from fiqa_helpers.solvers import EndpointSolver, ModelSolver

ANSWERS_LOG = "inference_log.jsonl"  # the SDK's names
SCORES_LOG = "verified_log.jsonl"


@dataclass(frozen=True)
class Evaluated:
    """One model's answers to the rows, scored."""

    label: str
    folder: Path  # the SDK's logs
    samples: list[dict]  # one a row: answer, tokens, and every metric by name
    reused: int  # answers that an earlier run had left
    definition: dict  # what the folder's name is the hash of

    def values(self, metric: str) -> list[float]:
        """The metric of every row, in order."""
        return [sample[metric] for sample in self.samples]


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

    if hasattr(solver, "check"):
        solver.check()
    prompts = [solver.prompt(row["question"]) for row in rows]
    folder, definition = open_folder(workspace, rows, prompts, solver.identity())
    try:
        with FileLock(folder / ".lock", timeout=0):
            environment = register_fiqa(rows, prompts, similarity)
            reused = len(prepare_logs(folder))
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
    answered = read_log(folder / ANSWERS_LOG)
    samples = [_sample(i, row, answered.get(i), scored[i], label) for i, row in enumerate(rows)]
    return Evaluated(label, folder, samples, reused, definition)


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


def prepare_logs(folder: Path) -> dict[int, dict]:
    """Make the SDK's logs fit to go on with, and return the answers that they hold.

    A kill can leave half a line, to which the SDK would glue the next record; and scores of an older
    definition of the metrics are dropped, so that kept answers are scored anew.
    """
    for name in (ANSWERS_LOG, SCORES_LOG):
        path = folder / name
        if path.exists() and not (content := path.read_bytes()).endswith(b"\n"):
            with path.open("r+b") as file:
                file.truncate(content.rfind(b"\n") + 1)
    marker = folder / "metrics.json"
    if read_card(marker) != {"version": metrics.VERSION}:
        (folder / SCORES_LOG).unlink(missing_ok=True)
        write_json(marker, {"version": metrics.VERSION})
    return read_log(folder / ANSWERS_LOG)


def read_log(path: Path) -> dict[int, dict]:
    """Records of one of the SDK's logs by row number; {} when there is none."""
    if not path.exists():
        return {}
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return {record["problem_idx"]: record for record in records if "problem_idx" in record}


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
            "The GPU's memory is full: lower tokens_per_batch or max_new_tokens in overrides and run again; "
            "answers so far are kept."
        )
    return cause if isinstance(cause, Exception) else error
