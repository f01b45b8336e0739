"""What the live panel remembers of a run: figures per step and sample answers, kept in the checkpoints."""

import time

from transformers.trainer_callback import ExportableState, TrainerState

LOGGED = ("loss", "eval_loss", "learning_rate", "tokens_per_second")


class PanelRecord(ExportableState):
    """History and samples of a training run.

    Trainer writes `state()` into each checkpoint's trainer_state.json, from where a resumed run takes it.
    (Trainer's `restore_callback_states_from_checkpoint` would build a new callback, which nobody shows.)
    """

    def __init__(self):
        self.history: list[dict] = []  # a dict per step: "step", "memory_gib" and those of LOGGED that came
        self.samples: list[dict] = []  # "step" (0: the untuned model), "texts", "stopped"
        self.step = self.total = 0
        self.earlier_seconds = 0.0  # of the run before it was resumed
        self.opened, self.closed = time.perf_counter(), None

    @property
    def seconds(self) -> float:
        """Time since the run began, with the time before a resume."""
        return self.earlier_seconds + (self.closed or time.perf_counter()) - self.opened

    def state(self) -> dict:
        """All of it as plain values; `restore` takes the "attributes" back."""
        kept = {"history": self.history, "samples": self.samples, "seconds": self.seconds}
        return {"args": {}, "attributes": {**kept, "step": self.step, "total": self.total}}

    def restore(self, kept: dict) -> None:
        """Take over the "attributes" of a `state()`."""
        self.history, self.samples = list(kept.get("history", [])), list(kept.get("samples", []))
        self.earlier_seconds = kept.get("seconds", 0.0)
        self.step, self.total = kept.get("step", 0), kept.get("total", 0)

    def join(self, state: TrainerState) -> None:
        """Take over a training that begins or goes on, from a checkpoint with a record or without one."""
        name = type(self).__name__
        if state.global_step > 0:
            self.restore(state.stateful_callbacks.get(name, {}).get("attributes", {}))
            if not self.history:
                for row in state.log_history:
                    self.note_down(row["step"], **{key: row[key] for key in LOGGED if key in row})
        self.step, self.total = state.global_step, state.max_steps
        state.stateful_callbacks[name] = self.state()  # Trainer expects the entry when it saves

    def note_down(self, step: int, **values: float) -> None:
        """Add figures to a step's line of the history."""
        if not values:
            return
        if not self.history or self.history[-1]["step"] != step:
            self.history.append({"step": step})
        self.history[-1].update(values)
