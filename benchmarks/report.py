"""Write README's lines on speed, benchmarks/SPEED.md and docs/images/speed.png from benchmarks/results/.

    python benchmarks/report.py

The words are in speed.md.j2. A test holds both pages against the files, so a figure there was measured.
"""

import json
from pathlib import Path

import jinja2
from matplotlib.figure import Figure
from recipe_bench import SPEED

HERE = Path(__file__).resolve().parent
README, PAGE = HERE.parent / "README.md", HERE / "SPEED.md"
VERSIONS = ("torch", "triton", "transformers", "peft", "nemo-automodel", "liger-kernel", "trl", "datasets")
BEGIN, END = "<!-- speed: written by benchmarks/report.py -->", "<!-- end of speed -->"


def read(name: str) -> dict:
    """One result file; empty where nothing has been measured."""
    file = HERE / "results" / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def measured() -> list[dict]:
    """All contenders with a result; Unsloth's ran in an environment of its own, where these cannot be."""
    return [run for run in read("gpu")["runs"] + read("unsloth")["runs"] if "error" not in run]


def pages() -> list[str]:
    """README's lines and the whole of SPEED.md."""
    found, cards = read("gpu"), [card for name in SPEED if (card := read(name))]
    for card in cards:
        card["share"] = card["tokens_per_second"] / cards[0]["tokens_per_second"] / card["gpus"]
        card["memory"] = next(value for key, value in card.items() if key.startswith("peak_"))
    runs = measured()
    template = (HERE / "speed.md.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    text = environment.from_string(template).render(
        runs=runs,
        ours=[run for run in runs if run["name"].startswith("gpu")],
        peers=[run for run in runs if not run["name"].startswith("gpu")],
        gpu80=runs[0],
        missing=[run for run in found["runs"] if "error" in run],
        date=found["date"],
        versions=VERSIONS,
        unsloth=read("unsloth"),
        cards=cards,
        one=cards[0],
        agree=read("recipe_agree"),
        resume=read("recipe_resume").get("runs", {}),
        laptop=read("laptop"),
    )
    return text.split("\n=====\n")


def picture() -> None:
    """Bars of tokens/s, labelled, that need no colour."""
    runs = sorted(measured(), key=lambda run: run["tokens_per_second"])
    figure = Figure(figsize=(8, 0.5 * len(runs) + 1), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh([run["title"] for run in runs], [run["tokens_per_second"] for run in runs], color="0.55")
    for bar, run in zip(bars, runs, strict=True):
        bar.set_hatch("//" if run["name"].startswith("gpu") else "")
    axes.bar_label(bars, labels=[f" {run['tokens_per_second']:,.0f}" for run in runs])
    axes.set_xlabel("real tokens a second, 8B model with random weights, one H100", loc="right")
    axes.margins(x=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE.parent / "docs" / "images" / "speed.png", dpi=110)


def main() -> None:
    lines, page = pages()
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    README.write_text(f"{before}{BEGIN}\n{lines}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    PAGE.write_text(page, encoding="utf-8")
    picture()


if __name__ == "__main__":
    main()
