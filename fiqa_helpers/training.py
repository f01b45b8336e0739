"""transformers' Trainer, with a step's rows in micro-batches and every loss per answer token."""

import time
from collections.abc import Mapping

import torch
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput, rotate_checkpoints

from fiqa_helpers import checkpoints
from fiqa_helpers.prompts import IGNORE_INDEX


class AnswerTrainer(Trainer):
    """Trainer whose DataLoader batch is one optimizer step, cut by `StepCollator` into micro-batches.

    Each micro-batch's summed loss is divided by the step's number of answer tokens, so how rows are grouped
    changes neither loss nor gradient. The rest (schedule, clipping, logging, evaluation, checkpoints,
    resume) is the Trainer's own.
    """

    _tokens, _seconds = 0, 0.0  # trained since the last log

    def train(self, *args, **kwargs):
        """As the Trainer's; an interrupted run, too, ends with the best adapter that it has saved so far."""
        try:
            return super().train(*args, **kwargs)
        except KeyboardInterrupt:
            if self.state.best_model_checkpoint:
                self._load_best_model()
            raise

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """Forward and backward for every micro-batch; returns the step's loss in nats per answer token."""
        model.train()
        started = time.perf_counter()
        loss = torch.zeros((), device=self.args.device)
        for micro_batch in inputs["micro_batches"]:
            part = self._loss_sum(model, micro_batch) / num_items_in_batch
            self.accelerator.backward(part)
            loss += part.detach()
            self.control = self.callback_handler.on_substep_end(self.args, self.state, self.control)
        self._tokens += sum(_real_tokens(micro_batch) for micro_batch in inputs["micro_batches"])
        loss.item()  # waits for the device, so that the time below is the step's
        self._seconds += time.perf_counter() - started
        return loss

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Validation loss: total negative log-likelihood over total answer tokens, in nats."""
        self.model.eval()
        total, tokens = 0.0, 0
        for batch in dataloader:
            for micro_batch in batch["micro_batches"]:
                with torch.no_grad():
                    total += self._loss_sum(self.model, micro_batch).item()
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
            tokens += int((batch["labels"] != IGNORE_INDEX).sum())
        metrics = {f"{metric_key_prefix}_loss": total / tokens, f"{metric_key_prefix}_tokens": tokens}
        return EvalLoopOutput(None, None, metrics, num_samples=len(dataloader.dataset))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the real (not padding) tokens a second that were trained since the last log."""
        if "loss" in logs and self._seconds:
            logs["tokens_per_second"] = self._tokens / self._seconds
            self._tokens, self._seconds = 0, 0.0
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Mapping) -> int:
        """6 operations for a token and parameter, the Trainer's own estimate, over all micro-batches."""
        tokens = sum(_real_tokens(micro_batch) for micro_batch in inputs["micro_batches"])
        return 6 * tokens * self.model.num_parameters(exclude_embeddings=True)

    def _loss_sum(self, model, micro_batch: Mapping) -> torch.Tensor:
        """Summed negative log-likelihood of a micro-batch's answer tokens, in nats."""
        inputs = self._prepare_inputs(micro_batch)
        with self.compute_loss_context_manager():
            # A cache would make transformers forget where packed rows begin.
            return model(**inputs, use_cache=False, num_items_in_batch=1).loss

    def _save_checkpoint(self, model, trial) -> None:
        """The Trainer's checkpoint, then its manifest, and only then are older checkpoints deleted."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        run = self._get_output_dir(trial=trial)
        checkpoints.write_manifest(checkpoints.checkpoint_folder(run, self.state.global_step))
        rotate_checkpoints(run, limit, self.state.best_model_checkpoint)


def _real_tokens(micro_batch: Mapping) -> int:
    """Tokens that are not padding."""
    mask = micro_batch.get("attention_mask")
    return int(micro_batch["input_ids"].numel() if mask is None else mask.sum())
