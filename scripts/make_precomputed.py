"""Make notebooks/precomputed/ out of a finished run: `python scripts/make_precomputed.py WORKDIR`.

WORKDIR holds what notebooks 01 to 06 wrote with one profile: `outputs/` and `checkpoints/final_model/`. Its
run cards are taken over as they are, except for paths of the machine that made them. The adapter is rounded
to bf16, which halves its file; pictures get a palette.
"""

import html
import io
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file, save_file

from fiqa_helpers import metrics, model, show
from fiqa_helpers.base import read_card, write_json
from fiqa_helpers.model import CARD, WEIGHTS

TEMPLATE = Path(__file__).with_name("precomputed_page.md")
NOTEBOOKS = ("01", "02", "03", "04", "05", "06")
PLOTS = ("01_answer_words", "01_topics", "02_token_lengths", "02_padding_waste", "06_differences")


def main() -> None:
    kept = model.kept_run()
    take_over(Path(sys.argv[1]), kept)
    picture = io.BytesIO()
    axes = Figure(figsize=(8, 3.4), layout="constrained").subplots()
    losses = history(kept)[["loss", "eval_loss"]]
    losses.plot(ax=axes, style=[".", "D"], xlabel="optimizer step", ylabel="nats per answer token")
    axes.figure.savefig(picture, dpi=100)
    with_palette(picture, kept / "plots" / "04_losses.png")
    (kept / "label.txt").write_text(f"{label(kept)}.\n", encoding="utf-8")
    (kept / "README.md").write_text(page(kept), encoding="utf-8")


def take_over(workdir: Path, target: Path) -> None:
    """Copy what is kept of a run, without paths of its machine."""
    final = workdir / "checkpoints" / "final_model"
    training = read_card(final / CARD)
    if training is None or not training["finished"]:
        sys.exit(f"{final} holds no finished adapter: run the notebooks first.")
    for folder in ("adapter", "run_cards", "plots"):
        shutil.rmtree(target / folder, ignore_errors=True)
        (target / folder).mkdir(parents=True)
    rounded = {name: weight.to(torch.bfloat16) for name, weight in load_file(final / WEIGHTS).items()}
    save_file(rounded, target / "adapter" / WEIGHTS, {"format": "pt"})  # PEFT loads them back into fp32
    config = read_card(final / "adapter_config.json")
    config["base_model_name_or_path"] = training["profile"]["model"]
    write_json(target / "adapter" / "adapter_config.json", config)
    write_json(target / "adapter" / CARD, training | {"adapter_dtype": "bfloat16, rounded from float32"})
    for number in NOTEBOOKS:
        card = read_card(workdir / "outputs" / "run_cards" / f"{number}.json")
        write_json(target / "run_cards" / f"{number}.json", card | {"parameters": {}, "files": []})
    summary = read_card(workdir / "outputs" / "evaluation" / "summary.json")
    kept = ("written", "profile", "rows", "test_rows", "comparisons", "floors", "versions")
    write_json(target / "evaluation.json", {key: summary[key] for key in kept})
    for name in PLOTS:
        with_palette(workdir / "outputs" / "plots" / f"{name}.png", target / "plots" / f"{name}.png")


def with_palette(source: Path | io.BytesIO, target: Path, colours: int = 24) -> None:
    """A plot as a small PNG; its few colours lose nothing."""
    image = Image.open(source).convert("RGB")
    image.quantize(colours, dither=Image.Dither.NONE).save(target, "PNG", optimize=True)


def history(kept: Path) -> pd.DataFrame:
    """Losses (nats per answer token) and learning rate, one line a step."""
    return pd.DataFrame(read_card(kept / "adapter" / CARD)["panel"]["history"]).set_index("step")


def label(kept: Path) -> str:
    """Which model, data, settings, device and day: shown wherever something of this run is shown."""
    card, device = read_card(kept / "adapter" / CARD), read_card(kept / "run_cards" / "04.json")["device"]
    profile = card["profile"]
    words = profile.get("topical_words")  # an old card has none
    answers = f"{words} words of each answer" if words else "whole answers"
    where = device["gpu"]["name"] if device["gpu"] else f"{device['cores']} cores of {device['cpu']}"
    return (
        f"Precomputed run: SmolLM2-135M-Instruct, packaged FiQA rows, {profile['prompt']} prompt; "
        f"{card['panel']['step']} steps of {profile['batch_size']} rows, {answers}, learning rate "
        f"{profile['learning_rate']:g}, on {where}, {card['written'][:10]}, torch {card['versions']['torch']}"
    )


def page(kept: Path) -> str:
    """The run to read and to teach from, without running anything."""
    cards = (read_card(kept / "run_cards" / f"{number}.json") for number in ("01", "02", "05"))
    one, two, five = (card["facts"] for card in cards)
    validation = history(kept)["eval_loss"].dropna()
    evaluation, greedy = read_card(kept / "evaluation.json"), five["greedy"]
    answers = zip(five["questions"], greedy["base"], greedy["tuned"], strict=True)
    lines = metrics.table(evaluation["comparisons"], evaluation["floors"])
    columns = list(lines[0])
    return TEMPLATE.read_text(encoding="utf-8").format(
        label=label(kept),
        words=one["answer_words"],
        traces=", ".join(f"{name} {share:.1%}" for name, share in one["traces"].items()),
        tokens=two["tokens"],
        useful=", ".join(f"{name} {share:.0%}" for name, share in two["useful"].items()),
        first=validation.iloc[0],
        best=validation.min(),
        best_step=validation.idxmin(),
        last=validation.iloc[-1],
        answers="\n".join(line(map(cell, row)) for row in answers),
        rows=evaluation["rows"],
        test_rows=evaluation["test_rows"],
        head=line(columns),
        rule=line(["---"] * len(columns)),
        metrics="\n".join(line(row[column] for column in columns) for row in lines),
    )


def line(cells: Iterable[str]) -> str:
    """One line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def cell(text: str) -> str:
    """Generated text as the inert content of a Markdown table's cell: no tags, no marks, no formulas."""
    inert = html.escape(" ".join(show.printable(text).split()), quote=False)
    return re.sub(r"[\\$|*_`~\[\]]", lambda sign: f"&#{ord(sign[0])};", inert) or "(nothing)"


if __name__ == "__main__":
    main()
