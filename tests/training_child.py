"""Training runs in processes of their own, to be killed: real rows, tokenizer and code, the tiny model.

As a program it reads one JSON job a line from stdin and forks a process for each: what is slow to prepare is
prepared once. A job's file `phase` says in two bytes what the process is doing at which step, so that a kill
can be aimed and what it hit be proven.
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

import torch
from notebook_trainer import notebook_trainer
from transformers import PrinterCallback, TrainerCallback

from fiqa_helpers import data, model, profiles, run
from fiqa_helpers.base import Workspace
from fiqa_helpers.generate import generate_answers
from fiqa_helpers.machinery import checkpoints
from fiqa_helpers.machinery.live import LivePanel
from fiqa_helpers.rows import StepCollator, encode_rows
from fiqa_helpers.trainer import AnswerTrainer

PHASES = ("training", "evaluating", "sampling", "saving")
SHORT = "{max_steps: 8, epochs: 2, train_rows: 9, batch_size: 2, tokens_per_batch: 256, lora_dropout: 0.05}"


def shared(path: str | Path) -> mmap.mmap:
    """The two bytes of `phase`, seen by both processes."""
    with open(path, "r+b") as file:
        return mmap.mmap(file.fileno(), 2)


def train(job: dict, tokenizer, splits) -> None:
    """One run, as notebook 04 does it: begin or resume, train, evaluate, sample, save the adapter."""
    phase, vouch, save = shared(job["phase"]), checkpoints.write_manifest, AnswerTrainer._save_checkpoint

    def announced(self, *args):
        phase[0] = PHASES.index("saving")
        save(self, *args)
        phase[0] = 0

    def die_before(folder: Path) -> None:
        """The kill that nobody could aim: all files of a checkpoint are there, its manifest is not."""
        if folder.name == job.get("dies_before_manifest_of"):
            os.kill(os.getpid(), signal.SIGKILL)
        vouch(folder)

    class Phases(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            phase[0], phase[1] = 0, state.global_step
            if state.global_step == 2 and "signal_in_step_3" in job:
                os.kill(os.getpid(), job["signal_in_step_3"])
            if "megabytes_more" in job:
                now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                most = resource.getrlimit(resource.RLIMIT_AS)[1]
                resource.setrlimit(resource.RLIMIT_AS, (now + job["megabytes_more"] * 2**20, most))

        def on_prediction_step(self, args, state, control, **kwargs):
            phase[0] = PHASES.index("evaluating")

    def answer(questions):
        phase[0] = PHASES.index("sampling")
        longest = profile.max_new_tokens
        answers = generate_answers(
            trainer.model, tokenizer, questions, profile.prompt, longest, temperature=1.0
        )
        phase[0] = 0
        return answers

    # in this forked process only
    AnswerTrainer._save_checkpoint, checkpoints.write_manifest = announced, die_before
    torch.set_num_threads(1)
    profile, workspace = profiles.load_profile("tiny", job["overrides"]), Workspace(job["workdir"])
    splits = splits | {"train": splits["train"].select(range(profile.train_rows))}
    fingerprints = {name: data.fingerprint(part) for name, part in splits.items()}
    begun = checkpoints.open_run(workspace, profile, fingerprints)
    print(f"resuming from {begun.resume_from and begun.resume_from.name}", flush=True)
    how = {"eval_strategy": "steps", "save_strategy": "steps", "eval_on_start": not begun.resume_from}
    how |= {"eval_steps": profile.eval_steps, "save_steps": profile.eval_steps}
    how |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    how |= {"save_total_limit": job.get("keep", 2)}
    collator = StepCollator(tokenizer.pad_token_id, profile.tokens_per_batch, profile.layout)
    rows = [encode_rows(splits[name], tokenizer, profile) for name in ("train", "validation")]
    trainer = notebook_trainer(profile, begun.folder, model.load_base(profile), collator, *rows, **how)
    panel = LivePanel(splits["test"]["question"][:2], answer, profile.sample_steps)
    trainer.add_callback(Phases())
    trainer.add_callback(panel)
    trainer.remove_callback(PrinterCallback)
    with panel:
        trainer.train(resume_from_checkpoint=begun.resume_from)
    best = Path(trainer.state.best_model_checkpoint or "none").name
    card = {"history": trainer.state.log_history, "samples": panel.samples, "best": best}
    checkpoints.save_final(trainer.model, tokenizer, workspace.final_model, **card)


def serve() -> None:
    """Prepare once, then fork a process for each job on stdin; print its id and its exit status."""
    run.quiet()
    tokenizer = model.load_tokenizer(profiles.load_profile("tiny"))
    splits = data.load_fiqa("packaged")
    splits["validation"] = splits["validation"].select(range(6))
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        process = os.fork()
        if process == 0:
            log, code = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1
            os.dup2(log, 1)
            os.dup2(log, 2)
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
        options = {"env": os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, "text": True}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.server = subprocess.Popen([sys.executable, __file__], **pipes, **options)
        assert self.server.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *error: object) -> None:
        self.server.stdin.close()
        self.server.wait(timeout=30)

    def start(self, workdir: Path, **job) -> None:
        """Start one training in `workdir`."""
        workdir.mkdir(parents=True, exist_ok=True)
        phase, self.log = workdir.with_name(".phase"), workdir.with_name(".log")
        phase.write_bytes(bytes(2))
        self.log.write_text("")
        self._phase = shared(phase)
        job = {"overrides": SHORT, "workdir": str(workdir), "phase": str(phase), "log": str(self.log)} | job
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        self.process = int(self.server.stdout.readline())

    def wait(self) -> int:
        """Exit status of the training started last; negative: the signal that ended it."""
        return int(self.server.stdout.readline())

    def said(self) -> list[str]:
        """The lines that it printed."""
        return self.log.read_text(encoding="utf-8").splitlines()

    def run(self, workdir: Path, **job) -> str:
        """Train to the end; returns what was printed."""
        self.start(workdir, **job)
        assert self.wait() == 0, self.said()
        return "\n".join(self.said())

    def alive(self) -> bool:
        return Path(f"/proc/{self.process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"

    def kill_when(self, happened: Callable[[], bool], delay=0.0) -> int:
        """SIGKILL as soon as something has happened, or later; returns the exit status."""
        while not happened():
            assert self.alive(), self.said()
            time.sleep(0.0005)
        time.sleep(delay)
        os.kill(self.process, signal.SIGKILL)
        return self.wait()

    def kill_in(self, workdir: Path, phase: str, delay: float, from_step=0, **job) -> str:
        """SIGKILL a training `delay` seconds after it began `phase` (empty: at all) at `from_step` or later.

        Returns the phase that was hit.
        """
        self.start(workdir, **job)

        def there() -> bool:
            return not phase or (PHASES[self._phase[0]] == phase and self._phase[1] >= from_step)

        assert self.kill_when(there, delay=delay) == -signal.SIGKILL, "it had ended before"
        return PHASES[self._phase[0]]


def result(workdir: Path) -> dict:
    """What a kill must not change: adapter, losses, learning rates, samples. Timings are left out, and the
    mean over the whole run, of which transformers forgets what a resumed one has not seen."""
    folder = workdir / "checkpoints" / "final_model"
    card = json.loads((folder / "run_card.json").read_text(encoding="utf-8"))
    timings = ("_runtime", "_per_second", "train_loss")
    history = [{k: v for k, v in row.items() if not k.endswith(timings)} for row in card["history"]]
    weights = (folder / "adapter_model.safetensors").read_bytes()
    return {"adapter": weights, "history": history, "samples": card["samples"], "best": card["best"]}


if __name__ == "__main__":
    serve()
