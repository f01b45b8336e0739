"""Start a recipe in processes of its own, follow it from its metrics, find the adapter that it leaves.

Importing this module imports transformers, as live.py does: the run is shown in the panel of notebook 04.
"""

import contextlib
import ctypes
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from fiqa_helpers.errors import WorkshopError
from fiqa_helpers.launch import launch_line
from fiqa_helpers.live import EVALUATING, TRAINING, LivePanel
from fiqa_helpers.recipe_check import check_recipe
from fiqa_helpers.recipe_schema import read_recipe
from fiqa_helpers.storage import disk_errors

POLL = 0.3  # seconds between two looks at the metrics
PATIENCE = 60  # seconds that a stopped run is given to save its checkpoint
OUT_OF_MEMORY = (
    "set activation_checkpointing: true in the recipe's section distributed, or a smaller local_batch_size; "
)


class RecipePanel(LivePanel):
    """The live panel for a run in other processes: no samples, figures from its metrics files."""

    def __init__(self, title: str, png: Path | None = None, live: bool | None = None):
        super().__init__([], lambda questions: [], 0, title, png, live)

    def __enter__(self) -> "RecipePanel":
        super().__enter__()
        if (button := getattr(self._output, "_sample", None)) is not None:
            button.layout.display = "none"  # the model is in other processes: nobody to ask
        return self

    def take(self, folder: Path) -> None:
        """Show what the run's metrics files hold by now. Steps are counted from 1, as the Trainer does."""
        self.history = read_metrics(folder)
        trained = [row for row in self.history if "loss" in row]
        if trained:
            self.step, self.total = trained[-1]["step"], trained[-1]["steps"]
            self._step_seconds = trained[-1].get("seconds")
        self._show(EVALUATING if self.step == self.total else TRAINING)

    def wants_to_stop(self) -> bool:
        """Was the Stop button pressed?"""
        return self._output.stop.is_set()

    def waits(self, phase: str) -> None:
        """Say what is going on before there are metrics."""
        self._show(phase)


def read_metrics(folder: Path) -> list[dict]:
    """Lines of training.jsonl and validation.jsonl joined by step, in the panel's words and units.

    A half line, which its writer has not finished, waits for the next look. A step that a resumed run took
    again counts once, as taken last.
    """
    rows: dict[int, dict] = {}
    names = {
        "training": {"loss": "loss", "lr": "learning_rate", "tps": "tokens_per_second", "mem": "memory_gib"},
        "validation": {"val_loss": "eval_loss"},
    }
    for file, columns in names.items():
        with contextlib.suppress(FileNotFoundError):
            for line in (folder / f"{file}.jsonl").read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):
                    record = json.loads(line)
                    row = rows.setdefault(record["step"] + 1, {"step": record["step"] + 1})
                    row |= {ours: record[theirs] for theirs, ours in columns.items()}
                    if "steps" in record:
                        row |= {"steps": record["steps"]}
                        row |= {"seconds": record["num_tokens_per_step"] / max(record["tps"], 1e-9)}
    return [rows[step] for step in sorted(rows)]


def run_recipe(
    path: Path | str, panel: RecipePanel, processes: int = 1, cpu: bool = False, resume: bool = False
) -> Path:
    """Run the recipe on this machine and show it in `panel`; returns the folder of the adapter it left.

    The output of all processes goes to `run.log` in the recipe's checkpoint folder. Stop (the button or an
    interrupt) asks NeMo for a checkpoint and ends the run.

    Raises:
        WorkshopError: what `check_recipe` refuses, before any process is started; or the run failed.
    """
    check_recipe(path, processes, resume=resume)
    folder = Path(read_recipe(Path(path)).get("checkpoint.checkpoint_dir"))
    with disk_errors(folder, "give the recipe another checkpoint_dir"):
        folder.mkdir(parents=True, exist_ok=True)
    line = launch_line(path, processes, cpu=cpu, python=sys.executable)
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
    cores = max(1, (os.cpu_count() or 1) // processes)
    environment.setdefault("OMP_NUM_THREADS", str(cores))  # torchrun's own choice is 1
    with open(folder / "run.log", "ab") as log, panel:
        began = log.tell()
        process = subprocess.Popen(
            shlex.split(line),
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # the interrupt button is for the panel, which asks NeMo to stop
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
        try:
            _follow(process, panel, folder)
        finally:
            _end(process)
            panel.take(folder)
        if process.returncode != 0 and not panel.stopped:
            raise WorkshopError(why_it_failed(folder / "run.log", began))
    return newest_adapter(folder)


def _follow(process: subprocess.Popen, panel: RecipePanel, folder: Path) -> None:
    while process.poll() is None:
        if (folder / "training.jsonl").exists():
            panel.take(folder)
        else:
            panel.waits("starting the processes and loading the model")
        if panel.wants_to_stop():
            panel.stopped = "Stop button"
            return
        time.sleep(POLL)


def _end(process: subprocess.Popen) -> None:
    """Ask a run that still goes to save and stop; end it for good if it does not."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            kill_all(process.pid)
    process.wait()


def kill_all(pid: int) -> None:
    """SIGKILL a torchrun and the processes it started, each of which has a session of its own."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        torchrun = psutil.Process(pid)
        family = [*torchrun.children(recursive=True), torchrun]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family[:-1], timeout=PATIENCE)


def _die_with_parent() -> None:
    """When the kernel dies, torchrun gets SIGTERM and ends its processes (prctl(2), PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def why_it_failed(log: Path, began: int = 0) -> str:
    """One sentence from a run's log: the error that came first, which is seldom in the last line."""
    with log.open("rb") as file:
        file.seek(began)
        written = file.read().decode(errors="replace")
    pattern = r"^(?:\[rank\d+\]:\s*)?((?:\w+\.)*\w*(?:Error|Exception|Interrupt)): ?(.*)$"
    for kind, reason in re.findall(pattern, written, re.MULTILINE):
        if "ChildFailedError" not in kind and reason:
            said = reason if kind.endswith("WorkshopError") else f"{kind.rpartition('.')[2]}: {reason}"
            remedy = OUT_OF_MEMORY if "OutOfMemoryError" in kind else ""
            return f"The recipe failed ({said[:300].rstrip('.')}): {remedy}look at {log}."
    return f"The recipe failed: look at the last lines of {log}."


def newest_adapter(folder: Path) -> Path:
    """The PEFT adapter in the newest checkpoint of a recipe run.

    Raises:
        WorkshopError: the run has saved none.
    """
    found = folder / "LATEST" / "model"
    if not (found / "adapter_model.safetensors").is_file():
        raise WorkshopError(
            f"{folder} holds no checkpoint with an adapter: did the run end before its first?"
        )
    return found.resolve()
