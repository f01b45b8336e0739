"""Training runs in processes of their own, to be killed: real rows, tokenizer and code, the tiny model.

`python training_child.py serve` reads one JSON job a line from stdin. What is slow to prepare is prepared
once; each job is a forked process; its process id and exit status are printed. The job's file `phase` says in
two bytes what the process is doing at which step, so that a kill can be aimed and what it hit be proven.
"""

import contextlib
import json
import mmap
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

TRAINING, EVALUATING, SAMPLING, SAVING = b"TESC"
PHASES = {TRAINING: "training", EVALUATING: "evaluating", SAMPLING: "sampling", SAVING: "saving"}


@contextlib.contextmanager
def memory_limit(megabytes_more: int | None):
    """Let this process take so much more memory inside the block; None: any."""
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    if megabytes_more is not None:
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + megabytes_more * 2**20, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def train(job: dict, prepared: dict) -> None:
    """One run, as notebook 04 does it: begin or resume, train, evaluate, sample, save the adapter."""
    import torch
    from peft import get_peft_model
    from torch.utils.tensorboard import SummaryWriter
    from transformers import TrainerCallback, TrainingArguments, set_seed
    from transformers.integrations import TensorBoardCallback

    from fiqa_helpers import data, model, profiles
    from fiqa_helpers.base import Workspace
    from fiqa_helpers.generate import generate_answers
    from fiqa_helpers.machinery import checkpoints
    from fiqa_helpers.machinery.live import LivePanel, remove_progress_callbacks
    from fiqa_helpers.rows import StepCollator, encode_rows
    from fiqa_helpers.trainer import AnswerTrainer

    with open(job["phase"], "r+b") as file:
        phase = mmap.mmap(file.fileno(), 2)

    class Announcing(AnswerTrainer):
        def _save_checkpoint(self, *args):
            phase[0] = SAVING
            super()._save_checkpoint(*args)
            phase[0] = TRAINING

        def training_step(self, *args):
            with memory_limit(job.get("megabytes_more")):
                return super().training_step(*args)

    vouch = checkpoints.write_manifest

    def die_before(folder: Path) -> None:
        """The kill that nobody could aim: all files of a checkpoint are there, its manifest is not."""
        if folder.name == job.get("dies_before_manifest_of"):
            os.kill(os.getpid(), signal.SIGKILL)
        vouch(folder)

    checkpoints.write_manifest = die_before  # in this forked process only

    class Phases(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            phase[0], phase[1] = TRAINING, state.global_step

        def on_prediction_step(self, args, state, control, **kwargs):
            phase[0] = EVALUATING

    torch.set_num_threads(1)
    profile, workspace = profiles.load_profile("tiny", job.get("overrides", "")), Workspace(job["workdir"])
    tokenizer, splits = prepared["tokenizer"], prepared["splits"]
    rows = {"train": splits["train"].select(range(profile.train_rows)), "validation": splits["validation"]}
    encoded = {split: encode_rows(part, tokenizer, profile) for split, part in rows.items()}
    run = checkpoints.open_run(workspace, profile, {s: data.fingerprint(part) for s, part in rows.items()})
    if run.final_card:
        print("finished before")
        return
    print(f"resuming from {run.resume_from and run.resume_from.name}")
    set_seed(profile.seed)
    tuned = get_peft_model(model.load_base(profile), model.lora_config(profile))

    def answer(questions):
        phase[0] = SAMPLING
        answers = generate_answers(
            tuned, tokenizer, questions, max_new_tokens=profile.max_new_tokens, temperature=1.0
        )
        phase[0] = TRAINING
        return answers

    writer = SummaryWriter(workspace.logs / "train", flush_secs=job.get("flush_seconds", 120))
    png = workspace.plots / "04_training.png"
    panel = LivePanel(splits["test"]["question"][:2], answer, profile.sample_steps, png=png)
    arguments = TrainingArguments(
        output_dir=str(run.folder),
        per_device_train_batch_size=profile.batch_size,
        per_device_eval_batch_size=8,
        num_train_epochs=profile.epochs,
        max_steps=profile.max_steps,
        learning_rate=profile.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=profile.warmup_ratio,
        eval_strategy="steps",
        eval_steps=profile.eval_steps,
        eval_on_start=run.resume_from is None,
        save_steps=profile.eval_steps,
        save_total_limit=job.get("save_total_limit", 2),
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_steps=job.get("logging_steps", 1),
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        use_cpu=True,
        seed=profile.seed,
        disable_tqdm=True,
        report_to="none",
    )
    trainer = Announcing(
        model=tuned,
        args=arguments,
        train_dataset=encoded["train"],
        eval_dataset=encoded["validation"],
        data_collator=StepCollator(tokenizer.pad_token_id, profile.tokens_per_batch, profile.layout),
        callbacks=[Phases(), panel, TensorBoardCallback(writer)],
    )
    remove_progress_callbacks(trainer)
    with panel:
        trainer.train(resume_from_checkpoint=run.resume_from)
    checkpoints.save_final(
        tuned,
        tokenizer,
        workspace.final_model,
        definition=run.definition,
        finished=panel.stopped is None,
        history=trainer.state.log_history,
        samples=panel.samples,
        best=Path(trainer.state.best_model_checkpoint or "none").name,
    )
    print("finished")


def serve() -> None:
    """Prepare once, then fork a process for each job on stdin."""
    import torch  # noqa: F401
    from peft import get_peft_model  # noqa: F401

    from fiqa_helpers import data, model, profiles, run, trainer  # noqa: F401
    from fiqa_helpers.machinery import live  # noqa: F401

    run.quiet()
    tokenizer = model.load_tokenizer(profiles.load_profile("tiny"))
    splits = data.load_with_report("packaged")[0]
    splits["validation"] = splits["validation"].select(range(6))
    prepared = {"tokenizer": tokenizer, "splits": splits}
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        process = os.fork()
        if process == 0:
            log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            code = 1
            try:
                train(job, prepared)
                code = 0
            except BaseException as error:  # as a notebook shows it: name and sentence
                print(f"{type(error).__name__}: {error}")
            sys.stdout.flush()
            os._exit(code)
        print(process, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


class Trainings:
    """The parent's side: start jobs, watch their phase, kill them."""

    def __init__(self):
        command = [sys.executable, __file__, "serve"]
        self.server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.server.stdout.readline() == "ready\n"

    def start(self, workdir: Path, **job) -> int:
        """Start one training in `workdir`; returns its process id."""
        workdir.mkdir(parents=True, exist_ok=True)
        self.phase_file, self.log = workdir / ".phase", workdir / ".log"
        self.phase_file.write_bytes(bytes([TRAINING, 0]))
        with open(self.phase_file, "r+b") as file:
            self._phase = mmap.mmap(file.fileno(), 2)
        job |= {"workdir": str(workdir), "phase": str(self.phase_file), "log": str(self.log)}
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        self.process = int(self.server.stdout.readline())
        return self.process

    def wait(self) -> int:
        """Exit status of the training started last; negative: the signal that ended it."""
        return int(self.server.stdout.readline())

    def run(self, workdir: Path, **job) -> str:
        """Train to the end; returns what was printed."""
        self.start(workdir, **job)
        code = self.wait()
        said = self.log.read_text(encoding="utf-8")
        assert code == 0, said
        return said

    def phase(self) -> str:
        return PHASES[self._phase[0]]

    def step(self) -> int:
        return self._phase[1]

    def kill_in(
        self, workdir: Path, phase: str | None, delay: float, from_step: int = 0, **job
    ) -> str | None:
        """SIGKILL a training `delay` seconds after it began `phase` at `from_step` or later (None: at all).

        Returns the phase that was hit, or None when the training had ended before.
        """
        process = self.start(workdir, **job)
        while phase and not (self.phase() == phase and self.step() >= from_step) and self.alive(process):
            time.sleep(0.0002)
        time.sleep(delay)
        os.kill(process, signal.SIGKILL)
        hit = self.phase()
        return hit if self.wait() == -signal.SIGKILL else None

    def alive(self, process: int) -> bool:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"

    def __enter__(self) -> "Trainings":
        return self

    def __exit__(self, *error: object) -> None:
        self.server.stdin.close()
        self.server.wait(timeout=30)


def result(workdir: Path) -> dict:
    """What a kill must not change: adapter, losses, learning rates, samples. Timings are left out, and the
    mean over the whole run, of which transformers forgets what a resumed one has not seen."""
    folder = workdir / "checkpoints" / "final_model"
    card = json.loads((folder / "run_card.json").read_text(encoding="utf-8"))
    timings = ("_runtime", "_per_second", "train_loss")
    history = [{k: v for k, v in row.items() if not k.endswith(timings)} for row in card["history"]]
    weights = (folder / "adapter_model.safetensors").read_bytes()
    return {"adapter": weights, "history": history, "samples": card["samples"], "best": card["best"]}


if __name__ == "__main__" and sys.argv[1:] == ["serve"]:
    serve()
