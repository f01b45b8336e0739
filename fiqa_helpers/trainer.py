"""The Trainer of notebook 04, and what keeps a training from ending badly."""

import contextlib
import errno
import math
import pickle
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput, rotate_checkpoints

from fiqa_helpers.base import WorkshopError, read_card, say, write_json
from fiqa_helpers.machinery import checkpoints, fast
from fiqa_helpers.machinery.checkpoints import decisive_arguments, refuse_other_arguments
from fiqa_helpers.machinery.fast import ForwardCopies
from fiqa_helpers.rows import IGNORE_INDEX

if TYPE_CHECKING:
    from datasets import Dataset

    from fiqa_helpers.machinery.fast import Numbers

# --- What ends a training run early and how: SIGTERM, a loss that is no number, memory or disk used up.
#
# Each ends in one sentence with the step and the way on. Importing this module imports transformers.

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
            with save_errors(run, kept):
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
def save_errors(run: Path, unfinished: Path | None = None) -> Iterator[None]:
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


# --- transformers' Trainer: a step's rows in micro-batches, every loss per answer token, an exact resume.

TOTALS = "totals.json"  # in a checkpoint: what the Trainer forgets when it resumes


class AnswerTrainer(Trainer):
    """Trainer whose DataLoader batch is one optimizer step, cut by `StepCollator` into micro-batches.

    Each micro-batch's summed loss is divided by the step's number of answer tokens, so how rows are grouped
    changes neither loss nor gradient. The rest (schedule, clipping, logging, evaluation, checkpoints,
    resume) is the Trainer's own. A run that was killed and resumed ends bitwise as one that was not, on the
    same machine with the same number of threads.
    """

    _tokens = 0  # trained since the last log
    _rehearsed = False
    _resumed_from: Path | None = None  # until the sums of its first part are restored

    def __init__(self, *, args: TrainingArguments, **kwargs):
        fast.prepare(args)
        super().__init__(args=args, **kwargs)
        self.terminator = Terminator()
        self.add_callback(self.terminator)
        self.guard = LossGuard(self.model.get_input_embeddings().num_embeddings)
        self.forward_copies = ForwardCopies(self.model)
        self.watch, self.timer = fast.Watch(), fast.StepTimer(self.args.device)

    def train(self, resume_from_checkpoint: str | Path | None = None, **kwargs):
        """As `Trainer.train`.

        Raises:
            WorkshopError: SIGTERM, a loss that is no number or exploded, memory or disk used up, or a
                checkpoint written with other arguments; says at which step, and how to go on.
        """
        resume = str(resume_from_checkpoint) if resume_from_checkpoint else None
        run = Path(self.args.output_dir)
        checkpoints.refuse_other_start(run, resume)
        if resume:
            written_with = (read_card(Path(resume) / TOTALS) or {}).get("arguments", {})
            refuse_other_arguments(Path(resume).name, written_with, self._arguments())
        tokens = getattr(self.data_collator, "tokens_per_batch", None)
        explained = memory_errors(run, lambda: self.state.global_step, tokens)
        fused_layers = fast.fused_layers(self.model, self.args.device)
        with self.terminator, save_errors(run), explained, fused_layers:
            try:
                return super().train(resume_from_checkpoint=resume, **kwargs)
            except pickle.UnpicklingError:  # torch refuses everything but tensors and plain values
                raise WorkshopError(
                    f"{Path(resume).name} holds something else than tensors, which could run code: "
                    "it is not used; delete it if you do not know where it comes from."
                ) from None
            except KeyboardInterrupt:  # an interrupted run, too, ends with the best adapter saved so far
                if self.state.best_model_checkpoint:
                    self._load_best_model()
                raise

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """Forward and backward for every micro-batch; returns the step's loss in nats per answer token."""
        self._settle()
        self.timer.start()
        model.train()
        self._step_inputs, self._shares = inputs["micro_batches"], []
        for micro_batch in self._step_inputs:
            with self.forward_copies():
                share = self.loss_sum(model, micro_batch) / num_items_in_batch
                self.accelerator.backward(share)
            self._shares.append(share.detach())
            self.control = self.callback_handler.on_substep_end(self.args, self.state, self.control)
        self._tokens += sum(_real_tokens(micro_batch) for micro_batch in self._step_inputs)
        self.timer.stop()
        return torch.stack(self._shares).sum()

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Validation loss: total negative log-likelihood over total answer tokens, in nats."""
        self._settle(wait=True)
        self.model.eval()
        total, tokens = torch.zeros((), dtype=torch.float64, device=self.args.device), 0
        for batch in dataloader:
            for micro_batch in batch["micro_batches"]:
                with torch.no_grad(), self.forward_copies():
                    total += self.loss_sum(self.model, micro_batch)
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
            tokens += int((batch["labels"] != IGNORE_INDEX).sum())
        metrics = {f"{metric_key_prefix}_loss": total.item() / tokens, f"{metric_key_prefix}_tokens": tokens}
        return EvalLoopOutput(None, None, metrics, num_samples=len(dataloader.dataset))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the real (not padding) tokens a second that were trained since the last log."""
        self._settle(wait=True)
        seconds = self.timer.seconds() if "loss" in logs else 0
        if seconds:
            logs["tokens_per_second"] = self._tokens / seconds
            self._tokens = 0
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Mapping) -> int:
        """6 operations for a token and parameter, the Trainer's own estimate, over all micro-batches."""
        tokens = sum(_real_tokens(micro_batch) for micro_batch in inputs["micro_batches"])
        return 6 * tokens * self.model.num_parameters(exclude_embeddings=True)

    def loss_sum(self, model, micro_batch: Mapping) -> torch.Tensor:
        """Summed negative log-likelihood of a micro-batch's answer tokens, in nats."""
        inputs = self._prepare_inputs(micro_batch)
        with self.compute_loss_context_manager():
            options = fast.loss_options(inputs)
            # A cache would make transformers forget where packed rows begin.
            return model(**inputs, **options, use_cache=False, num_items_in_batch=1).loss

    # -- a loss that is no number, or out of bounds

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        known = torch.stack(self._shares).sum() if norm is None else norm
        self.watch.add(self.state.global_step + 1, self._shares, known, self._step_inputs, self.optimizer)
        self._settle()
        return norm

    def _settle(self, wait: bool = False) -> None:
        """Stop before a step spoils the adapter: what is known of the steps is looked at here."""
        for found in self.watch.known(wait):
            self.guard.check(found, Path(self.args.output_dir), self.train_dataset, self._keep_adapter)

    def _keep_adapter(self, folder: Path) -> None:
        self.model.zero_grad()
        self.model.save_pretrained(folder)

    # -- checkpoints

    def _save_checkpoint(self, model, trial) -> None:
        """The Trainer's checkpoint, then its manifest, and only then are older checkpoints deleted."""
        self._settle(wait=True)
        run = self._get_output_dir(trial=trial)
        folder = checkpoints.checkpoint_folder(run, self.state.global_step)
        if self.guard.bad_steps or checkpoints.fault(folder) is None:
            return  # never vouch for an exploding adapter, never write over a good checkpoint
        if folder.exists():
            checkpoints.report_and_set_aside(folder, "it is of an earlier, interrupted run")
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with save_errors(folder.parent, folder):
                super()._save_checkpoint(model, trial)
                write_json(folder / TOTALS, self._totals())
                checkpoints.write_manifest(folder)
        finally:
            self.args.save_total_limit = limit
        rotate_checkpoints(run, limit, self.state.best_model_checkpoint)

    def _totals(self) -> dict:
        """Loss sums between two logs, and the arguments that this run depends on."""
        return {
            "loss_since_log": self._tr_loss.item(),
            "loss_total": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "arguments": self._arguments(),
        }

    def _arguments(self) -> dict[str, object]:
        return decisive_arguments(self.args, getattr(self.model, "peft_config", {}), train=self.train_dataset)

    def _init_training_state(self, max_steps, steps_per_epoch, epochs, resume_from_checkpoint, trial):
        found = super()._init_training_state(
            max_steps, steps_per_epoch, epochs, resume_from_checkpoint, trial
        )
        self._resumed_from = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        if self._resumed_from:
            # the Trainer has dropped a path that is gone, as it is when the folder was moved
            stored = read_card(self._resumed_from / TRAINER_STATE_NAME) or {}
            self._trust_only_intact_best(stored.get("best_model_checkpoint"))
            if self.state.global_step >= max_steps:  # killed after its last step: the Trainer would add one
                return epochs, 0
        return found

    def _evaluate(self, trial, ignore_keys_for_eval, skip_scheduler=False):
        """`eval_on_start` is for a start: a resumed run has that loss in its history already."""
        if skip_scheduler and self._resumed_from:
            return None
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    def _run_epoch(self, *args, **kwargs) -> None:
        self._restore_totals()
        if not self._rehearsed:
            fast.rehearse(self, self.args.per_device_train_batch_size)
            self._rehearsed = True
        super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, *args, **kwargs):
        self._settle(wait=True)
        self._restore_totals()  # of a run that was killed after its last step
        return super()._finalize_training(*args, **kwargs)

    def _restore_totals(self) -> None:
        """Give back, once, the loss sums that the Trainer has set to zero."""
        if self._resumed_from:
            totals = read_card(self._resumed_from / TOTALS) or {}
            self._tr_loss += totals.get("loss_since_log", 0.0)
            self._total_loss_scalar = totals.get("loss_total", 0.0)
            self._globalstep_last_logged = totals.get("last_logged", self.state.global_step)
            self._resumed_from = None

    def _load_best_model(self) -> None:
        self._trust_only_intact_best(self.state.best_model_checkpoint)
        if self.state.best_model_checkpoint:
            super()._load_best_model()

    def _trust_only_intact_best(self, recorded: str | None) -> None:
        """Look for the best checkpoint in this run's folder, which may have moved; take it only if intact."""
        if not recorded:
            return
        run, state = Path(self.args.output_dir), self.state
        folder = run / Path(recorded).name
        problem = checkpoints.fault(folder)
        if problem:
            checkpoints.report_and_set_aside(folder, problem)
            found = checkpoints.best_complete(run, state.log_history)
            state.best_global_step, state.best_metric = found or (None, None)
            folder = checkpoints.checkpoint_folder(run, found[0]) if found else None
            print(
                f"The best adapter was in {Path(recorded).name}; of those intact it is "
                f"{folder.name if folder else 'the last one'}."
            )
        state.best_model_checkpoint = str(folder) if folder else None


def _real_tokens(micro_batch: Mapping) -> int:
    """Tokens that are not padding."""
    mask = micro_batch.get("attention_mask")
    return int(micro_batch["input_ids"].numel() if mask is None else mask.sum())
