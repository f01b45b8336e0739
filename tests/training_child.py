"""Training runs in processes of their own, to be killed: real rows, tokenizer and code, the tiny model.

`python training_child.py serve` reads one JSON job a line from stdin. What is slow to prepare is prepared
once; each job is a forked process; its process id and exit status are printed. The job's file `phase` says in
two bytes what the process is doing at which step, so that a kill can be aimed and what it hit be proven.
"""

import json
import mmap
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

TRAINING, EVALUATING, SAMPLING, SAVING = b"TESC"
PHASES = {TRAINING: "training", EVALUATING: "evaluating", SAMPLING: "sampling", SAVING: "saving"}


def shared(path: str | Path) -> mmap.mmap:
    """The two bytes of `phase`, seen by both processes."""
    with open(path, "r+b") as file:
        return mmap.mmap(file.fileno(), 2)


def limit_memory(megabytes_more: int) -> None:
    """Let this process take only so much more memory."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (now + megabytes_more * 2**20, most))


def train(job: dict, tokenizer, splits) -> None:
    """One run, as notebook 04 does it: begin or resume, train, evaluate, sample, save the adapter."""
    import torch
    from peft import get_peft_model
    from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed

    from fiqa_helpers import data, model, profiles
    from fiqa_helpers.base import Workspace
    from fiqa_helpers.generate import generate_answers
    from fiqa_helpers.machinery import checkpoints
    from fiqa_helpers.machinery.live import LivePanel
    from fiqa_helpers.rows import StepCollator, encode_rows
    from fiqa_helpers.trainer import AnswerTrainer

    phase = shared(job["phase"])

    class Announcing(AnswerTrainer):
        def _save_checkpoint(self, *args):
            phase[0] = SAVING
            super()._save_checkpoint(*args)
            phase[0] = TRAINING

        def training_step(self, *args):
            if "megabytes_more" in job:
                limit_memory(job["megabytes_more"])
            return super().training_step(*args)

    class Phases(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            phase[0], phase[1] = TRAINING, state.global_step

        def on_prediction_step(self, args, state, control, **kwargs):
            phase[0] = EVALUATING

    vouch = checkpoints.write_manifest

    def die_before(folder: Path) -> None:
        """The kill that nobody could aim: all files of a checkpoint are there, its manifest is not."""
        if folder.name == job.get("dies_before_manifest_of"):
            os.kill(os.getpid(), signal.SIGKILL)
        vouch(folder)

    checkpoints.write_manifest = die_before  # in this forked process only
    torch.set_num_threads(1)
    profile, workspace = profiles.load_profile("tiny", job["overrides"]), Workspace(job["workdir"])
    rows = {"train": splits["train"].select(range(profile.train_rows)), "validation": splits["validation"]}
    encoded = {split: encode_rows(part, tokenizer, profile) for split, part in rows.items()}
    run = checkpoints.open_run(workspace, profile, {s: data.fingerprint(part) for s, part in rows.items()})
    print(f"resuming from {run.resume_from and run.resume_from.name}")
    set_seed(profile.seed)
    tuned = get_peft_model(model.load_base(profile), model.lora_config(profile))

    def answer(questions):
        phase[0] = SAMPLING
        longest = profile.max_new_tokens
        answers = generate_answers(tuned, tokenizer, questions, max_new_tokens=longest, temperature=1.0)
        phase[0] = TRAINING
        return answers

    png = workspace.plots / "04_training.png"
    panel = LivePanel(splits["test"]["question"][:2], answer, profile.sample_steps, png=png)
    arguments = TrainingArguments(
        output_dir=str(run.folder),
        per_device_train_batch_size=profile.batch_size,
        num_train_epochs=profile.epochs,
        max_steps=profile.max_steps,
        learning_rate=profile.learning_rate,
        warmup_steps=profile.warmup_ratio,
        eval_strategy="steps",
        eval_steps=profile.eval_steps,
        eval_on_start=run.resume_from is None,
        save_steps=profile.eval_steps,
        save_total_limit=job.get("save_total_limit", 2),
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_steps=1,
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
        callbacks=[Phases(), panel],
    )
    trainer.remove_callback(PrinterCallback)
    with panel:
        trainer.train(resume_from_checkpoint=run.resume_from)
    card = {"history": trainer.state.log_history, "samples": panel.samples}
    card["best"] = Path(trainer.state.best_model_checkpoint or "none").name
    card |= {"definition": run.definition, "finished": panel.stopped is None}
    checkpoints.save_final(tuned, tokenizer, workspace.final_model, **card)


def serve() -> None:
    """Prepare once, then fork a process for each job on stdin."""
    from fiqa_helpers import data, model, profiles, run, trainer  # noqa: F401
    from fiqa_helpers.machinery import live  # noqa: F401

    run.quiet()
    tokenizer = model.load_tokenizer(profiles.load_profile("tiny"))
    splits = data.load_fiqa("packaged")
    splits["validation"] = splits["validation"].select(range(6))
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
                train(job, tokenizer, splits)
                code = 0
            except BaseException as error:  # as a notebook shows it: name and sentence
                print(f"{type(error).__name__}: {error}")
            sys.stdout.flush()
            os._exit(code)
        print(process, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


class Trainings:
    """The parent's side: start jobs, watch their phase, kill them."""

    def __enter__(self) -> "Trainings":
        command = [sys.executable, __file__, "serve"]
        self.server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.server.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *error: object) -> None:
        self.server.stdin.close()
        self.server.wait(timeout=30)

    def start(self, workdir: Path, **job) -> int:
        """Start one training in `workdir`; returns its process id."""
        workdir.mkdir(parents=True, exist_ok=True)
        phase, self.log = workdir / ".phase", workdir / ".log"
        phase.write_bytes(bytes([TRAINING, 0]))
        self._phase = shared(phase)
        job |= {"workdir": str(workdir), "phase": str(phase), "log": str(self.log)}
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

    def alive(self) -> bool:
        return Path(f"/proc/{self.process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"

    def wait_for(self, happened: Callable[[], bool]) -> None:
        """Until something has happened while the training goes on."""
        while not happened():
            assert self.alive(), self.log.read_text()
            time.sleep(0.001)

    def kill_in(
        self, workdir: Path, phase: str | None, delay: float, from_step: int = 0, **job
    ) -> str | None:
        """SIGKILL a training `delay` seconds after it began `phase` at `from_step` or later (None: at all).

        Returns the phase that was hit, or None when the training had ended before.
        """
        process = self.start(workdir, **job)
        while phase and self.alive() and (PHASES[self._phase[0]] != phase or self._phase[1] < from_step):
            time.sleep(0.0002)
        time.sleep(delay)
        os.kill(process, signal.SIGKILL)
        hit = PHASES[self._phase[0]]
        return hit if self.wait() == -signal.SIGKILL else None


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
