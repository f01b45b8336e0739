"""Runs beside each other, from their run cards: what was set differently, and what came out."""

import html
import io
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from fiqa_helpers.adapters import CARD
from fiqa_helpers.errors import WorkshopError
from fiqa_helpers.metrics import METRICS
from fiqa_helpers.notebook import NOTEBOOKS
from fiqa_helpers.paths import Workspace
from fiqa_helpers.runcard import read_card
from fiqa_helpers.storage import atomic_writer

if TYPE_CHECKING:
    import pandas as pd

SAME_LOSS = ("model", "model_revision", "data", "prompt", "max_length", "eval_rows")
# Told apart in grey too.
LOOKS = (("#0072B2", "-o"), ("#E69F00", "--s"), ("#000000", ":D"), ("#999999", "-.^"))
STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;display:block;overflow-x:auto;margin:1rem 0}
td,th{border-bottom:1px solid #8888;padding:.3rem .7rem;text-align:left;vertical-align:top}
svg{max-width:100%;height:auto;background:#fff}"""


@dataclass(frozen=True)
class RunCards:
    """What one workdir holds: the cards of its notebooks (number -> card), and the card of its adapter."""

    name: str
    cards: dict[str, dict]
    training: dict

    @cached_property
    def settings(self) -> dict[str, object]:
        """Profile, versions, code and device of the newest notebook, name -> value."""
        newest = max(self.cards.values(), key=lambda card: card["written"])
        device = newest["device"]
        gpu = (device["gpu"] or {}).get("name")
        return {
            **{name: value for name, value in newest["profile"].items() if name != "title"},
            **{f"{name} (version)": value for name, value in newest["versions"].items()},
            "git revision": newest["git_revision"],
            "device": gpu or f"{device['cores']} cores of {device['cpu']}",
        }

    @cached_property
    def validation(self) -> dict[int, float]:
        """Validation loss by optimizer step."""
        history = self.training.get("panel", {}).get("history", [])
        return {row["step"]: row["eval_loss"] for row in history if "eval_loss" in row}


def read_runs(folders: list[str]) -> list[RunCards]:
    """The runs in these workdirs, named by as much of their paths as tells them apart.

    Raises:
        WorkshopError: fewer than two, or one without run cards.
    """
    if len(folders) < 2:
        raise WorkshopError("One run alone cannot be compared: name at least two workdirs.")
    runs = []
    for folder in folders:
        root = Path(folder).expanduser().resolve()
        found = {number: read_card(root / "outputs" / "run_cards" / f"{number}.json") for number in NOTEBOOKS}
        cards = {number: card for number, card in found.items() if card}
        if not cards:
            raise WorkshopError(f"{root} holds no run cards: name folders that were the workdir of a run.")
        training = read_card(root / "checkpoints" / "final_model" / CARD) or {}
        runs.append(RunCards(root.name, cards, training))
    if len({run.name for run in runs}) < len(runs):
        runs = [RunCards(name, run.cards, run.training) for name, run in zip(folders, runs, strict=True)]
    return runs


def settings_table(runs: list[RunCards]) -> "pd.DataFrame":
    """The settings in which the runs differ, one line each, one column a run."""
    import pandas as pd

    table = pd.DataFrame({run.name: {k: str(v) for k, v in run.settings.items()} for run in runs})
    return table[table.nunique(axis=1, dropna=False) > 1].fillna("")


def results_table(runs: list[RunCards]) -> "pd.DataFrame":
    """Main figure and minutes of each notebook, one column a run."""
    import pandas as pd

    def words(card: dict | None) -> str:
        return f"{card['figure']} ({card['seconds'] / 60:.1f} min)" if card else "not run"

    lines = {NOTEBOOKS[n]: [words(run.cards.get(n)) for run in runs] for n in NOTEBOOKS}
    table = pd.DataFrame(lines, index=[run.name for run in runs]).T
    return table[(table != "not run").any(axis=1)]


def evaluation_table(runs: list[RunCards]) -> "pd.DataFrame":
    """Tuned minus base with its interval, for every metric of notebook 06 and every run that has them."""
    import pandas as pd

    columns = {}
    for run in runs:
        found = run.cards.get("06", {}).get("facts", {}).get("comparisons", {})
        columns[run.name] = {
            METRICS[name].title: f"{row['difference']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f}), "
            f"{row['verdict']}, {row['rows']} rows"
            for name, row in found.items()
            if name in METRICS
        }
    return pd.DataFrame(columns, dtype=object).fillna("not evaluated")


def caution(runs: list[RunCards]) -> str:
    """What keeps the losses of these runs from being compared; empty when nothing does."""
    changed = [name for name in SAME_LOSS if len({str(run.settings.get(name)) for run in runs}) > 1]
    if not changed:
        return ""
    return f"The runs differ in {', '.join(changed)}: losses of different things are not to be ranked."


def draw_validation(runs: list[RunCards]) -> str:
    """Validation losses of all runs as SVG, with a text for those who don't see it; empty without any."""
    from matplotlib.figure import Figure

    lines = [(run, run.validation) for run in runs if run.validation]
    if not lines:
        return ""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots()
    for number, (run, points) in enumerate(lines):
        colour, look = LOOKS[number % len(LOOKS)]
        axes.plot(list(points), list(points.values()), look, color=colour, label=run.name)
    axes.set(xlabel="optimizer step", ylabel="validation loss, nats per answer token")
    axes.xaxis.get_major_locator().set_params(integer=True)
    for text in axes.legend(frameon=False).get_texts():
        text.set_parse_math(False)
    figure.savefig(file := io.StringIO(), format="svg", metadata={"Date": None})
    svg = file.getvalue()[file.getvalue().index("<svg") :]
    said = "; ".join(f"{run.name} {min(points.values()):.3f} at its best" for run, points in lines)
    return svg.replace("<svg", f'<svg role="img" aria-label="Validation loss: {html.escape(said)}"', 1)


def compare(folders: list[str]) -> tuple[str, Path]:
    """Compare the runs in `folders`: (tables as text, the page), the page in `outputs/` of the first folder.

    Raises:
        WorkshopError: as `read_runs`, or the page cannot be written.
    """
    runs = read_runs(folders)
    tables = {
        "Settings that differ": settings_table(runs),
        "Results": results_table(runs),
        "Evaluation: tuned minus base, with 95 % interval": evaluation_table(runs),
    }
    text, parts = [], []
    if warning := caution(runs):
        text.append(warning)
        parts.append(f"<p><strong>{html.escape(warning)}</strong></p>")
    parts.append(draw_validation(runs))
    for title, table in tables.items():
        text.append(f"\n{title}\n{'-' * len(title)}")
        for name, row in table.iterrows():
            text += [str(name), *(f"    {run}: {value}" for run, value in row.items())]
        parts += [f"<h2>{title}</h2>", table.to_html(border=0) if len(table) else "<p>none</p>"]
    names = " · ".join(html.escape(run.name) for run in runs)
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Runs compared: {names}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
        f"<h1>Runs compared</h1><p>{names}</p>{''.join(parts)}</html>\n"
    )
    path = Workspace(folders[0]).outputs / "compare.html"
    with atomic_writer(path) as file:
        file.write(page)
    return "\n".join(text), path
