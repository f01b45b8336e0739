"""NeMo AutoModel's fine-tuning recipe with metrics that can be followed: a recipe's YAML names its class.

Where there is no GPU, torchrun runs this module. Importing it imports nemo_automodel.
"""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from unittest import mock

import torch
import torch.distributed as dist
from nemo_automodel.components.loggers.metric_logger import MetricsSample
from nemo_automodel.recipes.llm.train_ft import TrainFinetuneRecipeForNextTokenPrediction

from fiqa_helpers.model import nemo_on_cpu

# --- NeMo AutoModel's fine-tuning recipe with metrics that can be followed: a recipe's YAML names this
# class.


class FiqaRecipe(TrainFinetuneRecipeForNextTokenPrediction):
    """Trains exactly as its parent; a failure of one process ends all. Three things are added to its reports.

    Every record is written to training.jsonl and validation.jsonl at once (the parent keeps a hundred back),
    the same figures go to TensorBoard (section `tensorboard`, key `log_dir`), and `lr` is the rate that the
    step was taken with (the parent's is the next step's).
    """

    def setup(self) -> None:
        with end_all_together():
            super().setup()
        self.boards = None
        folder = self.cfg.get("tensorboard.log_dir", None)
        if folder and self.dist_env.is_main:
            from torch.utils.tensorboard import SummaryWriter

            self.boards = SummaryWriter(folder)

    def _run_train_optim_step(self, batches, max_grad_norm=None) -> MetricsSample:
        rate = self.optimizer[0].param_groups[0]["lr"]
        record = super()._run_train_optim_step(batches, max_grad_norm)
        record.metrics["lr"] = rate
        if not torch.cuda.is_available():
            from fiqa_helpers.machinery.machine import peak_memory_gib

            record.metrics["mem"] = peak_memory_gib()
        record.metrics["steps"] = self.step_scheduler.max_steps
        return record

    def log_train_metrics(self, log_data) -> None:
        super().log_train_metrics(log_data)
        if self.dist_env.is_main:
            self.metric_logger_train.flush()
            self._to_boards("train", log_data, ("loss", "lr", "grad_norm", "tps", "mem"))

    def log_val_metrics(self, val_name, log_data, metric_logger=None) -> None:
        super().log_val_metrics(val_name, log_data, metric_logger)
        if self.dist_env.is_main and metric_logger is not None:
            metric_logger.flush()
            self._to_boards("validation", log_data, ("val_loss",))

    def run_train_validation_loop(self) -> None:
        with end_all_together():
            try:
                super().run_train_validation_loop()
            finally:
                if self.boards is not None:
                    self.boards.close()

    def _to_boards(self, group: str, record: MetricsSample, names: tuple[str, ...]) -> None:
        if self.boards is None:
            return
        for name in names:
            self.boards.add_scalar(f"{group}/{name}", float(record.metrics[name]), record.step + 1)
        self.boards.flush()


@contextlib.contextmanager
def end_all_together() -> Iterator[None]:
    """Let an error in one of several processes end the run, at once and with its traceback in the log.

    A process that ends normally first waits for its GPU (NCCL), which waits for the other processes, which
    wait for this one: a rank out of memory kept the run going, silently, until the timeout of `dist_env`.
    torchrun ends the others when this one is gone.
    """
    try:
        yield
    except Exception:
        if not (dist.is_initialized() and dist.get_world_size() > 1):
            raise
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


# --- Run a recipe where there is no GPU: `torchrun ... -m fiqa_helpers.machinery.recipe_run recipe.yaml`.
#
# With a GPU it is NeMo AutoModel's own command line and nothing else.


def main() -> int:
    """Run NeMo AutoModel 0.7.0's command line on the arguments of this process.

    Its recipe asks CUDA for the current device twice while it loads the model (`nemo_on_cpu` answers) and
    resets CUDA's memory statistics, of which there are none. Processes talk through gloo.
    """
    import torch
    from nemo_automodel.cli import app

    if torch.cuda.is_available():
        return app.main() or 0
    with nemo_on_cpu(), mock.patch.object(torch.cuda, "reset_peak_memory_stats", lambda *_: None):
        return app.main() or 0


if __name__ == "__main__":
    sys.exit(main())
