"""Watching a Trainer without changing what it does: sampling, other progress displays, memory."""

import random
import signal
import threading
from contextlib import contextmanager
from pathlib import Path

from fiqa_helpers.storage import say


def remove_progress_callbacks(trainer) -> None:
    """Take away the Trainer's progress bar, table and printed logs: the live panel shows all that."""
    from transformers import PrinterCallback, ProgressCallback
    from transformers.utils.notebook import NotebookProgressCallback

    for callback in (PrinterCallback, ProgressCallback, NotebookProgressCallback):
        trainer.remove_callback(callback)


@contextmanager
def undisturbed(model):
    """Evaluation mode and own random states inside; afterwards training goes on bitwise as it would have."""
    import numpy
    import torch

    was_training = model.training
    states = random.getstate(), numpy.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            model.eval()
            yield
    finally:
        model.train(was_training)
        random.setstate(states[0])
        numpy.random.set_state(states[1])


@contextmanager
def uninterrupted():
    """Ignore the interrupt button for a moment: an impatient second press must not spoil the first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler or signal.default_int_handler)


def save_picture(path: Path, png: bytes) -> None:
    """Write the picture. A disk that is full is only noted: the error that ended the training says more."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png)
    except OSError as error:
        path.unlink(missing_ok=True)
        say(f"The picture {path.name} could not be saved: {error.strerror}.")


def as_sample(step: int, answers: list) -> dict:
    """The answers (objects with `.text` and `.stopped`) of the model at `step`, as plain values for JSON."""
    texts, stopped = [str(answer.text) for answer in answers], [bool(answer.stopped) for answer in answers]
    return {"step": step, "texts": texts, "stopped": stopped}


def memory_gib() -> float:
    """Memory of this process in GiB: reserved on the GPU if there is one, else resident."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.memory_reserved() / 2**30
    import psutil

    return psutil.Process().memory_info().rss / 2**30


def memory_of() -> str:
    """What `memory_gib` measures, in words."""
    import torch

    return "GPU memory, reserved" if torch.cuda.is_available() else "Memory, this process"
