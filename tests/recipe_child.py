"""Recipes for tests: adapters that begin alike, though NeMo draws each rank its own; one that fails."""

import atexit
import time

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from fiqa_helpers.machinery.recipe import FiqaRecipe


def same_start(model: torch.nn.Module) -> None:
    """Give every matrix A of a LoRA model the numbers that its name has in any other such model."""
    random = torch.Generator().manual_seed(0)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_A" not in name:
            continue
        whole = (torch.rand(parameter.shape, generator=random) - 0.5) / 4
        with torch.no_grad():
            if isinstance(parameter.data, DTensor):
                mine = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
                parameter.data.to_local().copy_(mine.to_local())
            else:
                parameter.data.copy_(whole)


class SameStart(FiqaRecipe):
    """`FiqaRecipe` whose adapters begin with the same numbers, however many processes share them."""

    def setup(self) -> None:
        super().setup()
        if self.step_scheduler.step == 0:  # not resumed
            same_start(self.model_parts[0])


class OneRankFails(FiqaRecipe):
    """`FiqaRecipe` whose last process runs out of memory at step 2, and then does not get out of its exit."""

    def _run_train_optim_step(self, batches, max_grad_norm=None):
        last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
        if last and self.step_scheduler.step == 1:
            atexit.register(time.sleep, 900)  # as NCCL waits for the other ranks
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 438.00 MiB.")
        return super()._run_train_optim_step(batches, max_grad_norm)
