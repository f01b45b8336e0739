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


def changes(profile, folder, base, output, processes: int = 1) -> list[str]:
    """What stands behind recipes/fiqa_lora.yaml for `profile` on a CPU, as in notebook 07."""
    return [
        f"--model.pretrained_model_name_or_path={base}",
        f"--dataset.tokenizer.name={base}",
        f"--model.torch_dtype={profile.dtype}",
        "--model.attn_implementation=sdpa",
        "--model.use_liger_kernel=false",
        "--dist_env.backend=gloo",
        f"--dataset.folder={folder}",
        f"--dataset.rows={profile.train_rows}",
        f"--dataset.max_length={profile.max_length}",
        f"--validation_dataset.folder={folder}",
        f"--validation_dataset.rows={profile.eval_rows}",
        f"--validation_dataset.max_length={profile.max_length}",
        f"--packing.tokens_per_pass={profile.tokens_per_batch}",
        f"--step_scheduler.global_batch_size={profile.batch_size}",
        f"--step_scheduler.local_batch_size={profile.batch_size // processes}",
        f"--step_scheduler.max_steps={profile.max_steps}",
        f"--step_scheduler.ckpt_every_steps={profile.eval_steps}",
        f"--step_scheduler.val_every_steps={profile.eval_steps}",
        f"--optimizer.lr={profile.learning_rate}",
        "--lr_scheduler.lr_warmup_steps=1",
        f"--peft.dropout={profile.lora_dropout}",
        f"--checkpoint.checkpoint_dir={output}",
    ]


FSDP2 = [  # NeMo would compute in bf16 if its precision were not named
    "--distributed.strategy=fsdp2",
    "--distributed.mp_policy._target_=torch.distributed.fsdp.MixedPrecisionPolicy",
    "--distributed.mp_policy.param_dtype=float32",
]
