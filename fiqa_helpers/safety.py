"""What ends a training run early and how: SIGTERM, a loss that is no number, memory or disk used up.

Each ends in one sentence with the step and the way on. Importing this module imports transformers.
"""

import contextlib
import errno
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import TrainerCallback

from fiqa_helpers import checkpoints
from fiqa_helpers.errors import WorkshopError
from fiqa_helpers.storage import say

if TYPE_CHECKING:
    from datasets import Dataset

    from fiqa_helpers.gpu_path import Numbers

GRACE = 5.0  # seconds
PATIENCE = 3  # steps in a row with an exploded loss before the run stops
NO_MEMORY = ("CUDA out of memory", "DefaultCPUAllocator: can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
NO_SPACE = ("os error 28", "No space left on device", "inline_container", "iostream error")


class Terminator(TrainerCallback):
    """Answers SIGTERM (a job's time is over, a container stops) with a checkpoint after the current step.

    Use it as a context manager around the training. Another SIGTERM `GRACE` seconds later ends the process at
    once; one that comes sooner is the same one, sent to a group of processes and passed on by one of them.
    """

    told = False
    _since = 0.0

    def __enter__(self) -> "Terminator":
        self.told = False
        self._before = None
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self._before = signal.signal(signal.SIGTERM, self._hear)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _hear(self, number: int, frame: object) -> None:
        if self.told:
            if time.monotonic() - self._since > GRACE:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                signal.raise_signal(signal.SIGTERM)
            return
        self.told, self._since = True, time.monotonic()
        say("SIGTERM: finishing this step, then writing a checkpoint.")

    def on_step_end(self, args, state, control, **kwargs):
        if self.told and state.global_step < state.max_steps:
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        if self.told and state.global_step < state.max_steps:
            last = checkpoints.newest_complete(Path(args.output_dir))  # none while the loss is exploding
            raise WorkshopError(
                f"Training was told to stop (SIGTERM) after step {state.global_step} of {state.max_steps}: "
                "run this again with the same parameters and it "
                f"{f'goes on from {last.name}' if last else 'begins anew'}."
            )


class LossGuard:
    """Ends a run whose loss or gradient is no number, or whose loss is worse than uniform guessing."""

    def __init__(self, vocabulary: int):
        self.limit = math.log(vocabulary) + 1  # nats; uniform guessing costs log(vocabulary)
        self.bad_steps = 0  # in a row

    def exploded(self, loss: float) -> bool:
        """Take note of a step's loss; True when it has been beyond the limit for `PATIENCE` steps."""
        self.bad_steps = self.bad_steps + 1 if loss > self.limit else 0
        return self.bad_steps >= PATIENCE

    def check(self, found: "Numbers", run: Path, rows: "Dataset", keep: Callable[[Path], None]) -> None:
        """Look at what a step on `rows` has given; `keep` saves the adapter, which is without that step.

        Raises:
            WorkshopError: a number is none, or the loss has exploded; says at which step and rows.
        """
        loss = sum(found.shares)
        pairs = zip(found.micro_batches, found.shares, strict=True)
        bad = [batch for batch, share in pairs if not math.isfinite(share)] or found.micro_batches
        if not math.isfinite(loss) or not math.isfinite(found.norm):
            no_loss = not math.isfinite(loss)
            problem = f"The loss is {loss}" if no_loss else f"The gradient's norm is {found.norm}"
            kept = run / "last_good_adapter"
            with disk_errors(run, kept):
                keep(kept)
            raise WorkshopError(
                f"{problem} at step {found.step} (rows {rows_of(bad, rows)} of the training data): look at "
                f"them or lower learning_rate; the adapter of step {found.step - 1} is kept in {kept}."
            )
        if self.exploded(loss):
            last = checkpoints.newest_complete(run)
            raise WorkshopError(
                f"The loss has exploded ({loss:.1f} at step {found.step}, rows "
                f"{rows_of(found.micro_batches, rows)} of the training data: worse than guessing): lower "
                f"learning_rate; the last good adapter is {last or 'the untrained one'}."
            )


def way_on(run: Path | str) -> str:
    """Which checkpoint is left, for the end of a sentence."""
    last = checkpoints.newest_complete(Path(run))
    return (
        f"{last.name} is intact and the next run goes on from it" if last else "no checkpoint was written yet"
    )


@contextlib.contextmanager
def memory_errors(run: Path | str, step: Callable[[], int], tokens_per_batch: int | None) -> Iterator[None]:
    """Turn an exhausted memory, of the GPU or the machine, into advice.

    The advice is raised outside of the `except` block: an error that holds the old one keeps its frames, and
    with them the memory.
    """
    try:
        yield
        return
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not isinstance(error, MemoryError) and not any(sign in str(error) for sign in NO_MEMORY):
            raise
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    smaller = f" (for example {tokens_per_batch // 2})" if tokens_per_batch else ""
    raise WorkshopError(
        f"Memory ran out at step {step()}: lower tokens_per_batch{smaller} or set gradient_checkpointing: "
        f"true in overrides, or end what else uses the memory; {way_on(run)}."
    )


@contextlib.contextmanager
def disk_errors(run: Path, unfinished: Path | None = None) -> Iterator[None]:
    """Turn a full or read-only disk into one sentence; the `unfinished` folder gives its space back.

    torch reports a full disk as a RuntimeError of its archive writer (inline_container.cc, "unexpected
    pos"), safetensors as an error of its own.
    """
    try:
        yield
        return
    except WorkshopError:
        raise
    except Exception as error:
        number = getattr(error, "errno", None)
        full = number in (errno.ENOSPC, errno.EDQUOT) or any(sign in str(error) for sign in NO_SPACE)
        read_only = number in (errno.EROFS, errno.EACCES) or "os error 30" in str(error)
        if not full and not read_only:
            raise
    lost = ""
    if unfinished:
        shutil.rmtree(unfinished, ignore_errors=True)
        lost = f", so {unfinished.name} could not be saved"
    problem, remedy = ("is full", "free some space") if full else ("cannot be written", "make it writable")
    raise WorkshopError(f"The disk of {run} {problem}{lost}: {remedy} and run this again; {way_on(run)}.")


def rows_of(micro_batches: Sequence[Mapping], dataset: "Dataset") -> list[int]:
    """Row numbers (from 0) in `dataset` of the rows in these micro-batches, padded or packed."""
    wanted = set()
    for batch in micro_batches:
        ids = batch["input_ids"].tolist()
        if "cu_seq_lens_q" in batch:
            limits = batch["cu_seq_lens_q"].tolist()
            wanted |= {tuple(ids[0][a:b]) for a, b in zip(limits, limits[1:], strict=False)}
        else:
            lengths = batch["attention_mask"].sum(dim=1).tolist()
            wanted |= {tuple(row[:n]) for row, n in zip(ids, lengths, strict=True)}
    return [number for number, row in enumerate(dataset["input_ids"]) if tuple(row) in wanted]
