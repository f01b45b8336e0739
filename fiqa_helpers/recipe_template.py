"""The text of a recipe, with the reason for each setting that is not NeMo AutoModel's own choice.

A change here is a change of every recipe: tests hold the figures against the notebook's run.
"""

RECIPE = """\
# LoRA on FiQA as a NeMo AutoModel 0.7.0 recipe, written from profile {name} ({title}).
# {rows} training rows on {processes}: {epoch} optimizer steps an epoch, {total} in all.{dropped}
# Change the profile and write it again, or edit it here; fiqa_helpers.recipe_check.check_recipe says what the
# file would do, and refuses what NeMo would silently ignore.

# NeMo's fine-tuning recipe; ours only adds that metrics are written at once, and TensorBoard
recipe: fiqa_helpers.recipe_run.FiqaRecipe

seed: {seed}  # here, at the top level: NeMo ignores a section rng

step_scheduler:
  global_batch_size: {batch}  # rows of one optimizer step, over all GPUs
  local_batch_size: {local}  # rows of one forward pass on one GPU; {accumulate} pass(es) make a step
  num_epochs: {epochs}  # begun; max_steps may end the run in the middle of one
  max_steps: {max_steps}  # null: all epochs
  ckpt_every_steps: {every}  # adapter, optimizer and place in the data; also after the last step
  val_every_steps: {every}  # the loss of all rows of validation_dataset, per answer token
  save_checkpoint_every_epoch: false  # NeMo would save at the end of each epoch too

dist_env:
  backend: {backend}
  timeout_minutes: 30  # NeMo's 1 is too short while the first process downloads 16 GB

model:
  _target_: nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained
  pretrained_model_name_or_path: {model}
  revision: {revision}
  force_hf: true  # the Hugging Face class, as in notebook 03: the adapter fits it name by name
  torch_dtype: {dtype}  # of the base and, in a recipe, of the adapter; the notebooks keep fp32 adapters
  attn_implementation: sdpa  # rows are padded here; the notebooks pack them on a GPU, which is faster
  use_liger_kernel: {liger}  # fused norm, MLP and RoPE on a GPU

peft:
  _target_: nemo_automodel.components._peft.lora.PeftConfig
  target_modules: {targets}
  dim: {rank}  # the rank r
  alpha: {alpha}  # the update is scaled by alpha / dim
  dropout: {dropout}
  dropout_position: pre  # before A, as PEFT does; NeMo's default is post
  lora_A_init: uniform  # PEFT's; NeMo's default is xavier

distributed:
  strategy: fsdp2  # shards the base model over the GPUs; does nothing on one
  tp_size: 1  # no layer is cut apart: rows are shared, and so the batch rule above holds
  cp_size: 1
  activation_checkpointing: {checkpointing}  # true: less memory, slower
  mp_policy:  # left out, NeMo casts to bf16 whatever torch_dtype says
    _target_: torch.distributed.fsdp.MixedPrecisionPolicy
    param_dtype: {dtype}
    reduce_dtype: float32  # gradients are added up over the GPUs in fp32
    cast_forward_inputs: false

clip_grad_norm:
  max_norm: 1.0  # as the Trainer does

loss_fn:  # per answer token over the whole step, as in notebook 04
  _target_: nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy

dataset:
  _target_: fiqa_helpers.recipe_data.fiqa_rows
  folder: {data}  # what notebook 01 wrote
  split: train
  rows: {train_rows}  # -1: all
  prompt: {prompt}
  max_length: {max_length}  # tokens of a row, prompt and answer together
  tokenizer:
    _target_: fiqa_helpers.recipe_data.load_tokenizer
    name: {model}
    revision: {revision}

dataloader:
  _target_: torchdata.stateful_dataloader.StatefulDataLoader
  collate_fn: nemo_automodel.components.datasets.utils.default_collater
  shuffle: true  # by `seed`, to the same order as the Trainer's
  # group_by_length: true  # less padding: rows of similar length share a forward pass; drops a few more rows

validation_dataset:
  _target_: fiqa_helpers.recipe_data.fiqa_rows
  folder: {data}
  split: validation
  rows: {eval_rows}
  prompt: {prompt}
  max_length: {max_length}

validation_dataloader:
  _target_: torchdata.stateful_dataloader.StatefulDataLoader
  collate_fn: nemo_automodel.components.datasets.utils.default_collater
  shuffle: false

optimizer:  # the Trainer's AdamW
  _target_: torch.optim.AdamW
  lr: {learning_rate}  # the peak; write 2.0e-4, as YAML takes 2e-4 for a text
  betas: [0.9, 0.999]
  eps: 1.0e-8
  weight_decay: 0.0

lr_scheduler:
  lr_decay_style: linear  # NeMo's default is cosine
  lr_warmup_steps: {warmup}  # {percent} of {total} steps, rounded up as transformers does
  init_lr: 0.0  # NeMo's default is a tenth of lr
  min_lr: 0.0  # NeMo's default is a hundredth of lr

checkpoint:
  enabled: true
  checkpoint_dir: {output}  # a second run in this folder goes on with the first
  model_save_format: safetensors  # adapter_model.safetensors, which PEFT loads
  max_recent_checkpoints: 3

tensorboard:  # ours: `tensorboard --logdir` shows it
  log_dir: {logs}
"""

WANDB = """
wandb:
  project: fiqa-lora
  mode: offline  # nothing leaves this machine; `wandb sync` later, or `online`
  dir: {output}
"""

MLFLOW = """
mlflow:
  experiment_name: fiqa-lora
  tracking_uri: {output}  # a file; the address of a server sends it there
"""
