"""Real runs that are kept in the repository, to be taught from where their notebooks were not run.

Their files lie in `notebooks/precomputed/`, written by `scripts/make_precomputed.py` out of a finished run.
The run in its folder `case_study/` went wrong, which is what it is kept for.
"""

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from fiqa_helpers.adapters import CARD
from fiqa_helpers.errors import WorkshopError
from fiqa_helpers.paths import Workspace, project_root
from fiqa_helpers.profiles import MUST_AGREE, REFERENCE
from fiqa_helpers.runcard import read_card

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from fiqa_helpers.profiles import Profile

BLUE, ORANGE = "#0072B2", "#E69F00"


@dataclass(frozen=True)
class KeptRun:
    """The run in `folder`: its label, losses, answers and evaluation."""

    folder: Path

    @cached_property
    def training(self) -> dict:
        """The run card of the adapter, as notebook 04 wrote it."""
        return self._card("adapter", CARD)

    @cached_property
    def label(self) -> str:
        """Which model, data, settings, device and day: shown wherever something of this run is shown."""
        from fiqa_helpers.profiles import Profile

        profile, device = self.training["profile"], self.notebook("04")["device"]
        names = Profile.__dataclass_fields__
        known = Profile(**{n: profile.get(n, getattr(REFERENCE, n)) for n in names})
        words = known.banner()
        kept = f"{known.topical_words} words of each answer" if known.topical_words else "whole answers"
        where = (device["gpu"] or {}).get("name") or f"{device['cores']} cores of {device['cpu']}"
        panel = self.training["panel"]
        return (
            f"Precomputed run: {words.partition('): ')[2]}; {panel['step']} steps of {profile['batch_size']} "
            f"rows, {kept}, learning rate {profile['learning_rate']:g}, on {where}, "
            f"{self.training['written'][:10]}, torch {self.training['versions']['torch']}"
        )

    def notebook(self, number: str) -> dict:
        """The run card of one of its notebooks, "01" to "06"."""
        return self._card("run_cards", f"{number}.json")

    @cached_property
    def evaluation(self) -> dict:
        """The summary of notebook 06: comparisons and floors."""
        return self._card("evaluation.json")

    def history(self) -> "pd.DataFrame":
        """Losses (nats per answer token) and learning rate, one line a step."""
        import pandas as pd

        return pd.DataFrame(self.training["panel"]["history"]).set_index("step")

    def _card(self, *parts: str) -> dict:
        card = read_card(self.folder.joinpath(*parts))
        if card is None:
            raise WorkshopError(
                f"{self.folder.joinpath(*parts)} is missing or damaged: take it from the repository again."
            )
        return card


def load() -> KeptRun:
    """The precomputed run of this repository: profile laptop, evaluated on all 100 test rows.

    Raises:
        WorkshopError: later, when a file of it is asked for and missing.
    """
    return KeptRun(project_root() / "notebooks" / "precomputed")


def case_study() -> KeptRun:
    """A run of which only the loss became better: whole answers, and decoding without the guard."""
    return KeptRun(load().folder / "case_study")


def adapter_folder(workspace: Workspace, profile: "Profile") -> Path:
    """Notebook 04's adapter in `workspace`; where it was not run, the precomputed one, which is announced.

    The precomputed adapter serves only profiles with its own model, data, prompt and training answers. For
    others the folder of notebook 04 is returned although it is empty, and `check_adapter` says what to run.
    """
    own, kept = workspace.final_model, load()
    card = read_card(kept.folder / "adapter" / CARD)
    if own.exists() or card is None:
        return own
    kept_profile = asdict(REFERENCE) | card["profile"]
    if any(kept_profile[key] != getattr(profile, key) for key in MUST_AGREE):
        return own
    print(f"Notebook 04 was not run in this workdir, so this is not your adapter.\n{kept.label}.")
    return kept.folder / "adapter"


def draw_losses(kept: KeptRun, own: "pd.DataFrame | None" = None) -> tuple["Figure", str]:
    """(figure, alt text): losses of the precomputed run, and the validation loss of `own` history beside."""
    from matplotlib.figure import Figure

    history = kept.history()
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.plot(history["loss"].dropna(), ".", color=BLUE, alpha=0.4, label="precomputed: training")
    validation = history["eval_loss"].dropna()
    axes.plot(validation, "--D", color=ORANGE, ms=5, label="precomputed: validation")
    alt = f"Validation loss of the precomputed run: {validation.iloc[0]:.3f} at step {validation.index[0]}, "
    alt += f"lowest {validation.min():.3f} at step {validation.idxmin()}, last {validation.iloc[-1]:.3f}."
    if own is not None and len(mine := own["eval_loss"].dropna()):
        axes.plot(mine, "-s", color="black", ms=5, label="your run: validation")
        alt += f" Yours: {mine.iloc[0]:.3f}, then {mine.min():.3f}."
    axes.set(xlabel="optimizer step", ylabel="loss, nats per answer token")
    axes.legend(frameon=False)
    return figure, alt
