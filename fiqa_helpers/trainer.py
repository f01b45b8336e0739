"""transformers' Trainer with a step's rows in micro-batches, every loss per answer token, an exact resume.

SIGTERM and SIGHUP end a run with a checkpoint; a loss or gradient that is no number stops it.
"""

import contextlib
import math
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, rotate_checkpoints

from fiqa_helpers.base import WorkshopError, disk_errors
from fiqa_helpers.machinery import checkpoints, fast
from fiqa_helpers.rows import IGNORE_INDEX

NO_MEMORY = ("MemoryError", "OutOfMemoryError", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


class AnswerTrainer(Trainer):
    """Trainer whose DataLoader batch is one optimizer step, cut by `StepCollator` into micro-batches.

    Each micro-batch's summed loss is divided by the step's number of answer tokens, so how rows are grouped
    changes neither loss nor gradient; the validation loss is counted in the same way. Schedule, clipping,
    logging, checkpoints and resume are the Trainer's own. A run that was killed and resumed ends bitwise as
    one that was not, on the same machine with the same number of threads.
    """

    def __init__(self, *, args: TrainingArguments, **kwargs):
        # Of several GPUs a Trainer makes one model (torch's DataParallel), which would cut micro-batches
        # apart; there is no public setting for it. Several GPUs are notebook 07's.
        args._n_gpu = min(args.n_gpu, 1)
        args.accelerator_config.non_blocking = args.device.type == "cuda"  # copies batches while it computes
        super().__init__(args=args, **kwargs)
        self.told = ""  # to stop: the name of the signal
        self.limit = math.log(self.model.get_input_embeddings().num_embeddings) + 1  # guessing costs log(n)
        self.bad_steps = torch.zeros((), device=args.device)
        self.forward_copies = fast.ForwardCopies(self.model)
        self.timer, self._tokens = fast.StepTimer(args.device), 0  # since the last log
        if args.device.type == "cuda":
            fast.lighten_norms(self.model)

    def train(self, resume_from_checkpoint: str | Path | None = None, **kwargs):
        """As `Trainer.train`.

        Raises:
            WorkshopError: SIGTERM or SIGHUP, a loss that is no number or exploded, memory or disk used up;
                says at which step, and how to go on.
        """
        run = Path(self.args.output_dir)
        checkpoints.refuse_other_start(run, resume_from_checkpoint)
        try:
            with self._listening():
                return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        except KeyboardInterrupt:  # an interrupted run, too, ends with the best adapter saved so far
            if self.state.best_model_checkpoint:
                self._load_best_model()
            raise
        except (RuntimeError, MemoryError) as error:
            if not any(sign in repr(error) for sign in NO_MEMORY):
                raise
        # Outside of `except`, where the error would keep its frames, and with them the memory.
        torch.cuda.empty_cache()
        raise WorkshopError(
            f"Memory ran out at step {self.state.global_step}: lower tokens_per_batch or set "
            f"gradient_checkpointing: true in overrides; {checkpoints.way_on(run)}."
        )

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """Forward and backward for every micro-batch; returns the step's loss in nats per answer token."""
        self.timer.mark()
        model.train()
        total = torch.zeros((), device=self.args.device)
        for micro_batch in inputs["micro_batches"]:
            with self.forward_copies():
                share = self.loss_sum(model, micro_batch) / num_items_in_batch
                self.accelerator.backward(share)
            total += share.detach()
            mask = micro_batch.get("attention_mask")  # packed rows have none, and no padding
            self._tokens += micro_batch["input_ids"].numel() if mask is None else mask.sum()
            self.control = self.callback_handler.on_substep_end(self.args, self.state, self.control)
        # Saved in the middle of a step, as `enable_jit_checkpoint` does, dropout has drawn already, and the
        # resumed run would be another.
        self.control.should_save |= bool(self.told)
        self.timer.mark()
        return total

    def evaluation_loop(self, dataloader, *args, metric_key_prefix="eval", **kwargs) -> EvalLoopOutput:
        """Validation loss: total negative log-likelihood over total answer tokens, in nats."""
        self.model.eval()
        total, tokens = torch.zeros((), dtype=torch.float64, device=self.args.device), 0
        for batch in dataloader:
            for micro_batch in batch["micro_batches"]:
                with torch.no_grad(), self.forward_copies():
                    total += self.loss_sum(self.model, micro_batch)
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
            tokens += (batch["labels"] != IGNORE_INDEX).sum()
        loss, tokens = (total / tokens).item(), int(tokens)
        metrics = {f"{metric_key_prefix}_loss": loss, f"{metric_key_prefix}_tokens": tokens}
        return EvalLoopOutput(None, None, metrics, num_samples=len(dataloader.dataset))

    def loss_sum(self, model, micro_batch: Mapping) -> torch.Tensor:
        """Summed negative log-likelihood of a micro-batch's answer tokens, in nats."""
        inputs = self._prepare_inputs(micro_batch)
        # A cache would make transformers forget where packed rows begin.
        return model(**inputs, **fast.loss_options(inputs), use_cache=False, num_items_in_batch=1).loss

    # -- a run that goes wrong ends here, before it spoils what was good

    @contextlib.contextmanager
    def _listening(self):
        """SIGTERM (a job's time is over) and SIGHUP (its terminal was closed) end a run with a checkpoint.

        Only `told` is set here: `training_step` then asks for a checkpoint, and `_save_checkpoint` ends the
        run behind it. Whoever ignores a signal (nohup) goes on ignoring it.
        """
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
        for number in [n for n in before if before[n] != signal.SIG_IGN]:
            signal.signal(number, lambda number, _: setattr(self, "told", signal.Signals(number).name))
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _get_grad_norm(self, model, grad_norm=None):
        """A gradient that is no number never reaches the weights.

        Reading the norm here would empty the GPU's queue at every step. So the fused AdamW, the Trainer's
        default, is told by `found_inf`, which it reads on the GPU itself, to skip the step; the run stops at
        the next log or checkpoint.
        """
        norm = torch.as_tensor(super()._get_grad_norm(model, grad_norm), device=self.args.device)
        bad = (~norm.isfinite()).float()
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # inside of accelerate's
        optimizer.grad_scale, optimizer.found_inf = None, bad
        self.bad_steps += bad
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the real (not padding) tokens a second that were trained since the last log."""
        if "loss" in logs:  # it has just been read, so the GPU's queue is empty already
            logs["tokens_per_second"] = float(self._tokens) / self.timer.seconds()
            self._tokens = 0
        super().log(logs, start_time)
        self._stop_if_broken(logs.get("loss", logs.get("eval_loss", 0.0)))

    def _stop_if_broken(self, loss: float = 0.0) -> None:
        if loss <= self.limit and not self.bad_steps.item():
            return
        problem = "A gradient is no number" if loss <= self.limit else f"The loss is {loss:.1f}"
        raise WorkshopError(
            f"{problem} at step {self.state.global_step}: lower learning_rate in overrides and set "
            'on_existing = "fresh".'
        )

    # -- checkpoints

    def _save_checkpoint(self, model, trial) -> None:
        """The Trainer's checkpoint, then its manifest, and only then are older checkpoints deleted."""
        self._stop_if_broken()
        run = Path(self.args.output_dir)
        folder = checkpoints.checkpoint_folder(run, self.state.global_step)
        shutil.rmtree(folder, ignore_errors=True)  # what a kill has left
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        with disk_errors(run, "set workdir to another disk; the checkpoint before is intact"):
            super()._save_checkpoint(model, trial)
            checkpoints.write_manifest(folder)
        self.args.save_total_limit = limit
        rotate_checkpoints(str(run), limit, self.state.best_model_checkpoint)
        if self.told and self.state.global_step < self.state.max_steps:
            raise WorkshopError(
                f"Training was told to stop ({self.told}) after step {self.state.global_step} of "
                f"{self.state.max_steps}: run this again with the same parameters; {checkpoints.way_on(run)}."
            )

    def _load_best_model(self) -> None:
        best = checkpoints.checkpoint_folder(self.args.output_dir, self.state.best_global_step)
        if problem := checkpoints.fault(best):
            print(f"{best.name}, the best by validation loss, is not used: {problem}. The last adapter is.")
            return
        self.state.best_model_checkpoint = str(best)  # in this run's folder, which may have been moved
        super()._load_best_model()

    def _run_epoch(self, *args, **kwargs) -> None:
        """A run that was killed after its last step has nothing left to do: the Trainer would add a step."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
