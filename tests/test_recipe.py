"""A generated recipe is the notebook's run, the check refuses what is not, launches are checked first."""

import math
import os
import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiqa_helpers import data, model
from fiqa_helpers.base import WorkshopError, Workspace
from fiqa_helpers.machinery import recipe
from fiqa_helpers.machinery.recipe import check_recipe, read_recipe
from fiqa_helpers.profiles import PROFILES, REFERENCE, load_profile
from fiqa_helpers.rows import IGNORE_INDEX, encode_rows
from fiqa_helpers.run import Run


@pytest.fixture(scope="module")
def run(tmp_path_factory, fiqa_rows):
    """Notebook 07 of profile tiny, in a workspace whose rows notebook 01 could have written."""
    workspace = Workspace(str(tmp_path_factory.mktemp("recipe")))
    data.write_processed(data.load_with_report("packaged")[0], workspace.data)
    return Run("07", {}, load_profile("tiny"), workspace)


@pytest.fixture(scope="module")
def tiny_recipe(run):
    """The recipe of profile tiny on one process."""
    return recipe.write_recipe(run, run.workspace.root / "tiny.yaml", run.workspace.root / "out")


@pytest.fixture(scope="module")
def tiny_report(tiny_recipe):
    """What the check says about it."""
    return check_recipe(tiny_recipe)


# -- the same run as the notebook's


@pytest.fixture(scope="module")
def notebook_rows(run, tiny_tokenizer):
    """The rows that notebook 04 trains on with profile tiny."""
    rows = data.read_processed(run.workspace.data)["train"].select(range(run.profile.train_rows))
    return encode_rows(rows, tiny_tokenizer, run.profile)


def test_rows_tokens_and_supervised_positions(run, notebook_rows, tiny_tokenizer):
    """Another prompt, another cut or a shift by two would train something else and look fine."""
    found = recipe.fiqa_rows(
        tiny_tokenizer,
        str(run.workspace.data),
        rows=run.profile.train_rows,
        max_length=run.profile.max_length,
    )
    assert len(found) == len(notebook_rows) == run.profile.train_rows
    for mine, theirs in zip(found, notebook_rows, strict=True):
        assert mine["input_ids"] == theirs["input_ids"][:-1]
        # both predict the same token from the same position: transformers' models shift the labels themselves
        recipes = {(i, label) for i, label in enumerate(mine["labels"]) if label != IGNORE_INDEX}
        trainers = {(i - 1, label) for i, label in enumerate(theirs["labels"]) if label != IGNORE_INDEX}
        assert recipes == trainers


def test_unshifted_rows_are_the_notebooks(notebook_rows):
    """The flag must do nothing else."""
    row = notebook_rows[0]
    plain = recipe.recipe_row(row, shift_labels=False)
    assert (plain["input_ids"], plain["labels"]) == (row["input_ids"], row["labels"])


@pytest.mark.parametrize("gpus", [1, 2])
def test_each_step_has_the_trainers_rows(gpus, run, tiny_tokenizer, tiny_model, tmp_path):
    """In every epoch, for any seed, on any number of GPUs: another shuffle would be another curve."""
    from nemo_automodel.components.config.loader import load_yaml_config
    from nemo_automodel.recipes._typed_config import RecipeConfig
    from transformers import TrainingArguments

    from fiqa_helpers.rows import StepCollator
    from fiqa_helpers.trainer import AnswerTrainer

    profile = replace(run.profile, seed=7, epochs=3, max_steps=-1, train_rows=22)
    rows = encode_rows(data.read_processed(run.workspace.data)["train"].take(22), tiny_tokenizer, profile)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=profile.batch_size,
        seed=7,
        use_cpu=True,
        report_to="none",
        remove_unused_columns=False,
    )
    collator, steps = StepCollator(tiny_tokenizer.pad_token_id, profile.tokens_per_batch, profile.layout), []

    def taken(chosen: list[dict]) -> dict:
        steps.append(sorted(tuple(row["input_ids"][:-1]) for row in chosen))
        return collator(chosen)

    trainer = AnswerTrainer(model=tiny_model, args=arguments, train_dataset=rows, data_collator=taken)
    trainers = trainer.get_train_dataloader()
    path = recipe.write_recipe(replace(run, profile=profile), tmp_path / "r.yaml", tmp_path / "o", gpus)
    config = RecipeConfig(load_yaml_config(str(path)))
    recipes = [
        config.dataloader.build(tokenizer=tiny_tokenizer, dp_rank=rank, dp_world_size=gpus)
        for rank in range(gpus)
    ]
    for epoch in range(profile.epochs):
        steps.clear()
        trainers.set_epoch(epoch)
        assert len(list(trainers)) == 6
        for loader in recipes:
            loader.sampler.set_epoch(epoch)
        for wanted, batches in zip(steps, zip(*recipes, strict=True), strict=True):
            found = [
                tuple(ids[mask == 1].tolist())
                for batch in batches
                for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
            ]
            assert sorted(found) == wanted


def test_items_can_be_taken_twice(run, tiny_tokenizer):
    """NeMo's collater takes the fillers out of an item: in a second epoch they would be missing."""
    from nemo_automodel.components.datasets.utils import default_collater

    rows = recipe.fiqa_rows(tiny_tokenizer, str(run.workspace.data), rows=8, max_length=512)
    first, second = (default_collater([rows[i] for i in range(8)]) for _ in range(2))
    assert first["input_ids"].equal(second["input_ids"])
    padding = first["attention_mask"] == 0
    assert padding.any()
    assert (first["input_ids"][padding] == tiny_tokenizer.pad_token_id).all()
    assert (first["labels"][padding] == IGNORE_INDEX).all()


def test_loss_of_a_step(run, notebook_rows, tiny_tokenizer, tiny_model):
    """The recipe's loss on its batch is the Trainer's on the notebook's batch, to the last digits."""
    import torch
    from nemo_automodel.components.datasets.utils import default_collater
    from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy

    from fiqa_helpers.rows import StepCollator

    rows = [notebook_rows[i] for i in range(run.profile.batch_size)]
    step = StepCollator(tiny_tokenizer.pad_token_id, run.profile.tokens_per_batch, "padded")(rows)
    items = recipe.RecipeRows([recipe.recipe_row(row) for row in rows], tiny_tokenizer.pad_token_id)
    batch = default_collater([items[i] for i in range(len(items))])
    tokens = int((batch["labels"] != IGNORE_INDEX).sum())
    assert tokens == int((step["labels"] != IGNORE_INDEX).sum())
    with torch.no_grad():
        trainers = sum(tiny_model(**micro, num_items_in_batch=tokens).loss for micro in step["micro_batches"])
        logits = tiny_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        recipes = MaskedCrossEntropy()(logits, batch["labels"], num_label_tokens=tokens)
    assert recipes.item() == pytest.approx(trainers.item(), rel=1e-6)


def test_lora_modules_and_parameters(run, tiny_report, tiny_model):
    """NeMo matches patterns, PEFT name endings: both must find the same layers."""
    from peft import get_peft_model

    tuned = get_peft_model(tiny_model, model.lora_config(run.profile))
    layers = {
        name.removeprefix("base_model.model.")
        for name, module in tuned.named_modules()
        if hasattr(module, "lora_A")
    }
    assert set(tiny_report.lora_modules) == layers
    trainable, everything = tuned.get_nb_trainable_parameters()
    assert (tiny_report.trainable, tiny_report.base_parameters) == (trainable, everything - trainable)


@pytest.fixture(scope="module")
def big_report(run, tiny_tokenizer):
    """The check of the 8B recipe for one GPU, without its weights and with the small model's tokenizer."""
    big = replace(run, profile=PROFILES["gpu80"])
    path = recipe.write_recipe(big, run.workspace.root / "big.yaml", run.workspace.root / "big")
    return check_recipe(path, tokenizer=tiny_tokenizer)


def test_reference_adapter_of_the_8b_model(big_report):
    """6,815,744 trainable parameters, counted by NeMo's LoRA on the meta device."""
    assert (big_report.trainable, big_report.base_parameters) == (6_815_744, 8_030_261_248)
    counted = model.count_parameters(model.reference_config(), model.lora_config(REFERENCE))
    assert counted == (big_report.trainable, big_report.base_parameters)


@pytest.mark.parametrize("name", ["tiny", "big"])
def test_steps_and_learning_rates_are_the_trainers(
    name, run, tiny_report, big_report, tiny_tokenizer, tiny_model, tmp_path
):
    """Notebook 04's own Trainer, asked for the number of its steps and the rate of each."""
    from datasets import Dataset
    from transformers import TrainingArguments

    from fiqa_helpers.rows import StepCollator
    from fiqa_helpers.trainer import AnswerTrainer

    profile, report = (run.profile, tiny_report) if name == "tiny" else (PROFILES["gpu80"], big_report)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=profile.batch_size,
        num_train_epochs=profile.epochs,
        max_steps=profile.max_steps,
        learning_rate=profile.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=profile.warmup_ratio,
        use_cpu=True,
        report_to="none",
        remove_unused_columns=False,
    )
    trainer = AnswerTrainer(
        model=tiny_model,
        args=arguments,
        train_dataset=Dataset.from_dict(
            {"input_ids": [[1, 2]] * report.rows, "labels": [[1, 2]] * report.rows}
        ),
        data_collator=StepCollator(tiny_tokenizer.pad_token_id, 512, "padded"),
    )
    epoch = len(trainer.get_train_dataloader())
    total = profile.max_steps if profile.max_steps > 0 else epoch * profile.epochs
    assert (report.steps_per_epoch, report.steps) == (epoch, total)
    trainer.create_optimizer_and_scheduler(total)
    rates = []
    for _ in range(total):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert report.learning_rates == pytest.approx(rates, rel=1e-12)


def test_the_optimizer_is_the_trainers(run, tiny_recipe, tiny_model, tmp_path):
    """A weight decay or a clipping norm of NeMo's own would be another run with the same schedule."""
    from nemo_automodel.components.config.loader import load_yaml_config
    from nemo_automodel.recipes._typed_config import RecipeConfig
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(tmp_path), learning_rate=run.profile.learning_rate, use_cpu=True, report_to="none"
    )
    trainers = Trainer(model=tiny_model, args=arguments).create_optimizer()
    recipes = RecipeConfig(load_yaml_config(str(tiny_recipe))).optimizer.build(tiny_model, is_peft=True)[0]
    assert type(recipes) is type(trainers)
    for name in ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize"):
        found = {group[name] for group in recipes.param_groups}
        assert found == {group[name] for group in trainers.param_groups}, name
    assert read_recipe(tiny_recipe).get("clip_grad_norm.max_norm") == arguments.max_grad_norm


def test_reference_run_has_1032_steps():
    """5,500 rows, three epochs, 16 rows a step; many GPUs may lose a step and the count says so."""
    assert recipe.count_steps(REFERENCE, 5500) == (344, 1032, 3)
    assert recipe.count_steps(REFERENCE, 5500, 16)[1] == 1029


@given(rows=st.integers(1, 300), gpus=st.integers(1, 8), share=st.integers(1, 6), epochs=st.integers(1, 3))
def test_counted_steps_are_nemos(rows, gpus, share, epochs):
    """NeMo's own loader and scheduler, whatever the numbers: the schedule is built on this count."""
    from nemo_automodel.components.datasets.loader import ParallelAwareDataloader
    from nemo_automodel.components.training.step_scheduler import StepScheduler

    profile = replace(REFERENCE, batch_size=gpus * share, epochs=epochs)
    if rows < gpus:
        with pytest.raises(WorkshopError, match="can't be shared"):
            recipe.count_steps(profile, rows, gpus)
        return
    local = recipe.local_batch_size(profile, gpus)
    loader = ParallelAwareDataloader(list(range(rows)), dp_rank=0, dp_world_size=gpus, batch_size=local)
    found = StepScheduler(
        gpus * share, local, gpus, loader, num_epochs=epochs, preemption_signal=None, ckpt_every_steps=1
    )
    assert recipe.count_steps(profile, rows, gpus) == (found.epoch_len, found.max_steps, epochs)


def test_settings_reach_the_file(run, tmp_path):
    """A changed profile that leaves the recipe as it was would run the old one."""
    strange = replace(
        run.profile,
        learning_rate=2e-05,
        lora_rank=3,
        lora_alpha=5,
        lora_dropout=0.25,
        lora_targets=("gate_proj",),
        seed=7,
        max_length=99,
        prompt="chat",
        epochs=2,
        max_steps=-1,
        gradient_checkpointing=True,
    )
    path = recipe.write_recipe(
        replace(run, profile=strange), tmp_path / 'a "b" #c' / "r.yaml", tmp_path / "o"
    )
    found = read_recipe(path)
    expected = {
        "optimizer.lr": 2e-05,
        "peft.dim": 3,
        "peft.alpha": 5,
        "peft.dropout": 0.25,
        "peft.target_modules": ["*.gate_proj"],
        "seed": 7,
        "dataset.max_length": 99,
        "validation_dataset.prompt": "chat",
        "step_scheduler.num_epochs": 2,
        "step_scheduler.max_steps": None,
        "distributed.activation_checkpointing": True,
        "checkpoint.checkpoint_dir": str(tmp_path / "o"),
        "model.pretrained_model_name_or_path": str(tmp_path / 'a "b" #c' / "random_model"),
    }
    assert {key: found.get(key) for key in expected} == expected


@given(value=st.floats(1e-12, 1.0))
def test_numbers_survive_yaml(value):
    """YAML reads 2e-05 as a string and NeMo would multiply it."""
    import yaml

    assert yaml.safe_load(recipe.number(value)) == value


# -- the check

MISTAKES = {  # name: (what to replace, with what, what the sentence must say)
    "rng": ("\nseed: 42", "\nrng: {seed: 1}\nseed: 42", "rng.*top level"),
    "slurm": ("\nseed: 42", "\nslurm: {nodes: 2}\nseed: 42", "slurm.*write_sbatch"),
    "compile": ("\nseed: 42", "\ncompile: {enabled: true}\nseed: 42", "enable_compile"),
    "section misspelt": ("\noptimizer:", "\noptimiser:", "did you mean optimizer"),
    "key misspelt": ("dropout_position: pre", "dropout_postion: pre", "did you mean dropout_position"),
    "key in lr_scheduler": ("  min_lr: 0.0", "  minimum_lr: 0.0", "minimum_lr"),
    "key of the data": ("  max_length: 128", "  max_lenght: 128", "did you mean max_length"),
    "given twice": ("\nseed: 42", "\nseed: 1\nseed: 42", "stands in line"),
    "layer that is not there": ("*.q_proj", "*.query", r"\*\.query matches no layer"),
    "batch": ("local_batch_size: 4", "local_batch_size: 3", "use 1 or 2 or 4"),
    "batch of nothing": ("local_batch_size: 4", "local_batch_size: 0", "whole number"),
    "batch in words": ("global_batch_size: 4", "global_batch_size: four", "whole number"),
    "rate in words": ("lr: 0.002", "lr: fast", "lr is 'fast'"),
    "rate negative": ("lr: 0.002", "lr: -0.002", "lr is -0.002"),
    "rate as YAML reads it": ("lr: 0.002", "lr: 2e-3", "lr is '2e-3'.*such as 2.0e-4"),
    "warm-up too long": ("lr_warmup_steps: 1", "lr_warmup_steps: 4", "warm-up takes 4 of 4"),
    "decay unknown": ("lr_decay_style: linear", "lr_decay_style: lineal", "lineal"),
    "NeMo's own class": ("force_hf: true", "force_hf: false", "force_hf must be true"),
    "adapter dtype": ("  alpha: 32", "  alpha: 32\n  lora_dtype: bfloat16", "remove lora_dtype"),
    "precision": ("param_dtype: float32", "param_dtype: bfloat16", "not compute in the model's float32"),
    "function": ("fiqa_helpers.machinery.recipe.fiqa_rows", "fiqa_helpers.machinery.recipe.x", "there is no"),
    "recipe class": ("recipe_run.FiqaRecipe", "recipe_run.Recipe", "there is no recipe"),
    "unshifted": ("  split: train", "  split: train\n  shift_labels: false", "leave shift_labels true"),
    "split": ("  split: train", "  split: training", "split is .training.*one of train"),
    "tensor parallel": ("tp_size: 1", "tp_size: 2", "set tp_size to 1"),
    "not a section": ("\nseed: 42", "\nseed: 42\nclip_grad_norm: 5", "stands in line|must be a section"),
    "mlflow": ("\nseed: 42", "\nmlflow: {experiment_name: x}\nseed: 42", "mlflow is not installed"),
    "broken YAML": ("\nseed: 42", "\nseed: [42", "not YAML"),
    "tab": ("\nseed: 42", "\nseed:\n\tvalue: 42", "not YAML"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_refused(name, tiny_recipe, tmp_path):
    """One sentence that names the file, the line and the remedy, and nothing is written or started."""
    before, after, words = MISTAKES[name]
    text = tiny_recipe.read_text()
    assert before in text, "the recipe has changed: so must this test"
    path = tmp_path / "edited.yaml"
    path.write_text(text.replace(before, after))
    with pytest.raises(WorkshopError) as refused:
        check_recipe(path)
    said = str(refused.value)
    assert re.search(words, said), said
    assert re.match(rf"{re.escape(str(path))}, line \d+: ", said), said
    assert "\n" not in said
    assert os.listdir(tmp_path) == ["edited.yaml"]


FREE_TEXT = ("folder", "checkpoint_dir", "log_dir")  # any text could be meant


def test_no_line_is_read_past(tiny_recipe, tmp_path):
    """Each key of the file misspelt, each value made nonsense: NeMo took 21 of these without a word."""
    lines = tiny_recipe.read_text().splitlines()
    path = tmp_path / "edited.yaml"
    section, tried = 0, 0
    for number, line in enumerate(lines, 1):
        found = re.match(r"( *)(\w+):( [^#\n]*)?", line)
        if not found:
            continue
        indent, key, value = found.groups()
        section = number if not indent else section
        edits = [f"{indent}{key}x:{value or ''}"]
        if (value or "").strip() and key not in FREE_TEXT:
            edits.append(f"{indent}{key}: nonsense")
        for edit in edits:
            path.write_text("\n".join([*lines[: number - 1], edit, *lines[number:]]))
            with pytest.raises(WorkshopError) as refused:
                check_recipe(path)
            said, tried = str(refused.value), tried + 1
            assert "edited.yaml" in said, (edit, said)
            line_said = int(re.search(r"line (\d+)", said)[1]) if "line " in said else 0
            # a required key that is gone has no line, and of two values that don't fit the other may be named
            right = {number, section, 0} if edit == edits[0] else {number}
            assert line_said in right or "must be the same" in said, (edit, said)
    assert tried > 100


def test_the_line_is_the_right_one(tiny_recipe, tmp_path):
    """A wrong line number sends people to the wrong place."""
    lines = tiny_recipe.read_text().splitlines()
    number = next(i for i, line in enumerate(lines, 1) if line.startswith("  dropout_position"))
    lines[number - 1] = "  dropout_postion: pre"
    path = tmp_path / "edited.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(WorkshopError, match=f"line {number}:"):
        check_recipe(path)


@pytest.mark.parametrize("section", ["peft", "lr_scheduler", "validation_dataloader"])
def test_a_missing_section_is_named(section, tiny_recipe, tmp_path):
    """Without peft NeMo would train all of the model, without a schedule at one rate; both in silence."""
    text = re.sub(rf"^{section}:\n(?:[ #].*\n)+", "", tiny_recipe.read_text(), flags=re.MULTILINE)
    assert f"\n{section}:" not in text
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(WorkshopError, match=f"r.yaml.*section {section}"):
        check_recipe(path)


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just text", "\x00"])
def test_no_recipe_at_all(text, tmp_path):
    """A wrong file under the right name."""
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(WorkshopError, match="r.yaml"):
        check_recipe(path)


def test_missing_files_are_named(run, tiny_recipe, tmp_path):
    """No recipe, no data, no model: each is said before anything is built that takes long."""
    with pytest.raises(WorkshopError, match="none.yaml.*write_recipe"):
        check_recipe(tmp_path / "none.yaml")
    path = tmp_path / "r.yaml"
    text = tiny_recipe.read_text()
    path.write_text(text.replace(str(run.workspace.data), str(tmp_path / "elsewhere")))
    with pytest.raises(WorkshopError, match="train_processed.json is missing.*01_explore_fiqa"):
        check_recipe(path)
    path.write_text(text.replace("random_model", "other_model"))
    with pytest.raises(WorkshopError, match="line .*there is no folder .*other_model"):
        check_recipe(path)


def test_a_tokenizer_that_pads_with_its_end_token_is_refused(tiny_recipe, tmp_path):
    """The end token would be masked like padding, and the model would never learn to stop."""
    path = tmp_path / "r.yaml"
    text = tiny_recipe.read_text()
    changed = text.replace(
        "    _target_: fiqa_helpers.machinery.recipe.load_tokenizer\n    name:",
        "    _target_: transformers.AutoTokenizer.from_pretrained\n    pad_token: <|im_end|>\n"
        "    pretrained_model_name_or_path:",
    )
    assert changed != text
    path.write_text(changed)
    with pytest.raises(WorkshopError, match="pads with its end token"):
        check_recipe(path)


def test_an_old_run_is_not_continued_by_accident(run, tmp_path):
    """NeMo goes on with whatever is in the folder."""
    path = recipe.write_recipe(run, tmp_path / "r.yaml", tmp_path / "out")
    check_recipe(path)
    (tmp_path / "out" / "epoch_0_step_1").mkdir(parents=True)
    with pytest.raises(WorkshopError, match="holds a run.*fresh_folder"):
        check_recipe(path)
    assert check_recipe(path, resume=True).steps == 4


def test_no_signal_handler_is_left(tiny_report):
    """NeMo's scheduler would catch SIGTERM in the notebook's kernel, which could not be ended any more."""
    import signal

    assert signal.getsignal(signal.SIGTERM) in (signal.SIG_DFL, signal.default_int_handler)


# -- launches


def test_gpus_must_share_the_batch(run, tiny_recipe):
    """Said before anything is launched, with the numbers that fit."""
    with pytest.raises(WorkshopError, match="16 rows can't be shared by 3 GPUs: use 1, 2, 4, 8 or 16"):
        recipe.local_batch_size(REFERENCE, 3)
    assert [recipe.local_batch_size(REFERENCE, n) for n in (1, 2, 4, 8, 16)] == [4, 4, 4, 2, 1]
    with pytest.raises(WorkshopError, match=r"line \d+: local_batch_size 4 on 2 GPUs.*use 1 or 2"):
        recipe.launch_line(tiny_recipe, gpus=2)
    with pytest.raises(WorkshopError, match="4 rows of a step can't be shared by 6 GPUs"):
        recipe.write_sbatch(tiny_recipe, run.workspace.root / "x.sbatch", gpus=3, nodes=2)
    assert not (run.workspace.root / "x.sbatch").exists()


def test_launch_lines(run, tmp_path):
    """What people paste: one GPU, one node, two nodes, also from a path with a space."""
    folder = tmp_path / "a b"
    path = recipe.write_recipe(
        replace(run, profile=PROFILES["gpu80"]), folder / "r.yaml", folder / "o", gpus=16
    )
    one = shlex.split(recipe.launch_line(path))
    assert one == ["torchrun", "--standalone", "--nproc-per-node", "1", "-m", recipe.MODULE, str(path)]
    two = shlex.split(recipe.launch_line(path, gpus=8, nodes=2, host="node-1"))
    assert two[:3] == ["torchrun", "--nnodes", "2"]
    assert two[two.index("--rdzv-endpoint") + 1] == "node-1:29500"
    for host in ("", "a b", "x;reboot"):
        with pytest.raises(WorkshopError, match="first of the 2 nodes"):
            recipe.launch_line(path, gpus=8, nodes=2, host=host)


def test_torchrun_takes_the_options(run, tmp_path):
    """torch's own parser reads the line: an option of another version would end the launch."""
    from torch.distributed.run import get_args_parser

    path = recipe.write_recipe(run, tmp_path / "r.yaml", tmp_path / "o", gpus=4)
    line = shlex.split(recipe.launch_line(path, gpus=1, nodes=4, host="node-1"))
    found = get_args_parser().parse_args(line[1:])
    assert (found.nnodes, found.nproc_per_node, found.rdzv_endpoint) == ("4", "1", "node-1:29500")
    assert found.module
    assert found.training_script == recipe.MODULE


def test_batch_file(run, tmp_path):
    """bash runs the whole file, with a `srun` that prints what it is given: quotes, variables, order."""
    path = recipe.write_recipe(
        replace(run, profile=PROFILES["gpu80"]), tmp_path / "r.yaml", tmp_path / "o", 16
    )
    batch = recipe.write_sbatch(
        path, tmp_path / "r.sbatch", gpus=8, nodes=2, hours=3, partition="a100", setup="true"
    )
    text = batch.read_text()
    directives = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", text, re.MULTILINE))
    assert directives["nodes"] == "2"
    assert directives["gpus-per-node"] == "8"
    assert directives["time"] == "03:00:00"
    assert directives["partition"] == "a100"
    assert "account" not in directives
    assert text.index("#SBATCH --partition") < text.index("set -euo"), (
        "Slurm stops reading at the first command"
    )
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "srun").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    # a reader that leaves after the first line would end this scontrol, and under pipefail the job
    (tools / "scontrol").write_text("#!/bin/bash\necho node-7; sleep 0.2; echo node-8\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node-[7-8]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "99"}
    done = subprocess.run(
        ["bash", str(batch)],
        env={**os.environ, **slurm, "PATH": f"{tools}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.split("\n")
    assert said[0] == "torchrun"
    assert said[said.index("--rdzv-endpoint") + 1] == "node-7:29500"
    assert said[said.index("--nnodes") + 1] == "2"
    assert said[said.index("-m") + 1 : -1] == [recipe.MODULE, str(path)]


@pytest.mark.parametrize(
    ("seconds", "ends_with", "requeued"), [(7150, 1, True), (7150, 0, False), (60, 1, False)]
)
def test_a_job_that_ran_out_of_time_queues_itself_again(seconds, ends_with, requeued, tiny_recipe, tmp_path):
    """Slurm does not requeue a job at its time limit; one that fails early must not come back for ever."""
    batch = recipe.write_sbatch(tiny_recipe, tmp_path / "r.sbatch", gpus=1, hours=2, setup="true")
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "srun").write_text(f"#!/bin/bash\nexit {ends_with}\n")
    (tools / "scontrol").write_text('#!/bin/bash\necho "node-1"\necho "$@" >>"$SAID"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node-1", "SLURM_NNODES": "1", "SLURM_JOB_ID": "99"}
    more = {"PATH": f"{tools}:{os.environ['PATH']}", "SAID": str(tmp_path / "said"), "SECONDS": str(seconds)}
    done = subprocess.run(["bash", str(batch)], env={**os.environ, **slurm, **more}, capture_output=True)
    assert done.returncode == ends_with
    assert ("requeue 99" in (tmp_path / "said").read_text().splitlines()) is requeued


@pytest.mark.parametrize("value", ["a b", "x\n#SBATCH --uid=0", "$(id)"])
def test_batch_file_takes_no_commands(value, tiny_recipe, tmp_path):
    """A name from a form must not become a directive or a command."""
    with pytest.raises(WorkshopError, match="partition"):
        recipe.write_sbatch(tiny_recipe, tmp_path / "r.sbatch", gpus=1, partition=value)
    assert not (tmp_path / "r.sbatch").exists()


def test_fresh_folders_differ(run):
    """Two runs of the same second would share their checkpoints."""
    folders = [recipe.fresh_folder(run.workspace) for _ in range(5)]
    assert len(set(folders)) == 5
    assert not any(list(folder.iterdir()) for folder in folders)


def test_trackers(run, tmp_path):
    """One parameter; TensorBoard always, and what is added stays on this machine."""
    for tracker, offline in (("wandb", "mode: offline"), ("mlflow", "sqlite:///")):
        path = recipe.write_recipe(run, tmp_path / f"{tracker}.yaml", tmp_path / "o", tracker=tracker)
        found = read_recipe(path)
        assert found.get("tensorboard.log_dir") == str(tmp_path / "o" / "tensorboard")
        assert offline in path.read_text()
        assert isinstance(found.get(tracker), dict)
    with pytest.raises(WorkshopError, match="tensorboard, wandb, mlflow"):
        recipe.write_recipe(run, tmp_path / "x.yaml", tmp_path / "o", tracker="comet")


def test_a_dollar_in_a_path(run, tmp_path):
    """NeMo would take it for an environment variable, in the middle of the run's start."""
    with pytest.raises(WorkshopError, match=r"has a \$ in it"):
        recipe.write_recipe(run, tmp_path / "x.yaml", tmp_path / "$HOME")


def test_the_mean_of_a_schedule_is_half_its_peak(big_report):
    """A linear rise and fall: a last check by hand of what both libraries agree on."""
    mean = sum(big_report.learning_rates) / big_report.steps
    assert math.isclose(mean, max(big_report.learning_rates) / 2, rel_tol=0.01)
    assert Path(big_report.path).name == "big.yaml"
