"""Write the README's speed tables and docs/images/speed.png and curves.png from benchmarks/results/.

    python benchmarks/report.py

A test holds the README against the files, so a figure there is always one that was measured.
"""

import json
from pathlib import Path

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
IMAGES = HERE.parent / "docs" / "images"
VERSIONS = ("torch", "triton", "transformers", "peft", "trl", "liger-kernel")
BEGIN, END = "<!-- speed: written by benchmarks/report.py -->", "<!-- end of speed -->"


def load() -> dict:
    """{"date": ..., "runs": [one for each contender]}"""
    return read("gpu")


def read(name: str) -> dict:
    return json.loads((HERE / "results" / f"{name}.json").read_text(encoding="utf-8"))


def section(results: dict) -> str:
    """The table and what is to be known about it, as Markdown."""
    runs = [run for run in results["runs"] if "error" not in run]
    missing = [run["name"] for run in results["runs"] if "error" in run]
    machine = runs[0]["machine"]
    rates = [run["matmul_tflops"] for run in runs]
    best = runs[0]["tokens_per_second"]
    lines = [
        "| how | tokens/s | MFU | peak GiB reserved | gpu80 is faster by |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {run['title']} | {run['tokens_per_second']:,.0f} | {run['mfu']:.2f} | "
        f"{run['peak_reserved_gib']:.1f} | {best / run['tokens_per_second']:.1f} x |"
        for run in runs
    ]
    lines += [
        "",
        f"Measured {results['date']} on one {machine['gpu']},",
        f"in one run, {runs[0]['steps']} steps each:",
        "the exact 8B architecture with **random weights** (speed and memory do not depend on them; nothing",
        "about learning can be read here), rows of FiQA's lengths, 16 a step, real tokens counted.",
        "MFU is the share of this card's own bf16 matrix rate,",
        f"{min(rates):.0f} to {max(rates):.0f} TFLOP/s. Versions: {versions(machine)};",
        "those pinned here are newer in torch and triton.",
    ]
    if unsloth := [run["machine"] for run in runs if run["name"].startswith("unsloth")]:
        lines += [f"Unsloth {unsloth[0]['unsloth']} needs its own: {versions(unsloth[0])}."]
    lines += [
        "Settings: [benchmarks/contenders.py](benchmarks/contenders.py); what was tried:",
        "[benchmarks/LOG.md](benchmarks/LOG.md).",
        *rewritten_lines(),
        "",
        *recipe_lines(),
        "",
        *laptop_lines(),
    ]
    if missing:
        lines += ["", f"Not measured, as the time on the card ran out: {', '.join(missing)}."]
    return "\n".join(lines)


def versions(machine: dict) -> str:
    return ", ".join(f"{name} {machine[name]}" for name in VERSIONS if name in machine)


def rewritten_lines() -> list[str]:
    """Profiles gpu80 and gpu24 after the fused LoRA kernels had left, beside the code of the table."""
    found = read("without_fused_lora")
    ratios = {
        name: f"{run['new']['tokens_per_second'] / run['old']['tokens_per_second']:.2f}"
        for name, run in found["runs"].items()
    }
    memory = [f"{run['new']['peak_reserved_with_evaluation_gib']:.1f}" for run in found["runs"].values()]
    return [
        f"Since then the fused LoRA kernels have left the code: on one card, {found['date']}, gpu80 runs at",
        f"{ratios['gpu80']} and gpu24 at {ratios['gpu24']} of the speed with them,",
        f"in {' and '.join(memory)} GiB.",
    ]


def recipe_lines() -> list[str]:
    """The table of the recipe on one and two GPUs."""
    cards = [read("recipe"), read("recipe_2gpu"), read("recipe_2gpu_fsdp2")]
    one = cards[0]["tokens_per_second"]
    lines = [
        "The same training as a NeMo AutoModel recipe (notebook 07), rows packed, 16 rows a GPU and step,",
        f"random weights, on one host with two such cards, {cards[0]['written'][:10]};",
        f"notebook 04's trainer made {cards[0]['notebook_tokens_per_second']:,.0f} tokens/s there:",
        "",
        "| GPUs | tokens/s | GiB allocated on the first | of N times one GPU's rate |",
        "|---|---|---|---|",
    ]
    for card in cards:
        share = card["tokens_per_second"] / one / card["gpus"]
        cells = [f"{card['gpus']}, {card['strategy']}", f"{card['tokens_per_second']:,.0f}"]
        cells += [f"{card['peak_allocated_gib_first_gpu']:.1f}", f"{share:.0%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def laptop_lines() -> list[str]:
    """The laptop profile beside TRL, in words."""
    found = read("laptop")
    machine, ratios, median = found["machine"], found["ratios"], found["ratio_median"]
    span = {name: f"{min(times):.0f} to {max(times):.0f} s" for name, times in found["seconds"].items()}
    return [
        f"On {machine['cores']} cores ({machine['cpu']}), profile `laptop` takes {median:.2f} of the time of",
        f"TRL's SFTTrainer for the same rows and {found['steps']} steps:",
        f"{span['ours']} against {span['trl']},",
        f"in turns, median of {len(ratios)} ratios ({min(ratios):.2f} to {max(ratios):.2f}).",
        f"{found['date']}, torch {machine['torch']}, trl {machine['trl']}.",
    ]


def curves_picture() -> None:
    """Training and validation loss of the packed and the padded run, one over the other."""
    from matplotlib.figure import Figure

    found = read("curves")
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots()
    looks = {"padded": {"lw": 3, "color": "0.7"}, "packed": {"lw": 1, "color": "0"}}
    for name, look in looks.items():
        run = found["runs"][name]
        steps = range(1, len(run["training"]) + 1)
        axes.plot(steps, run["training"], label=f"{name}: training", **look)
        places = [found["profile"]["eval_steps"] * i for i in range(len(run["validation"]))]
        axes.plot(places, run["validation"], "sD"[name == "packed"], label=f"{name}: validation", **look)
    axes.set(xlabel="optimizer step", ylabel="loss, nats per answer token")
    axes.legend(frameon=False, ncols=2)
    figure.savefig(IMAGES / "curves.png", dpi=110)


def picture(results: dict) -> None:
    """Bars of tokens/s, labelled, that need no colour."""
    from matplotlib.figure import Figure

    runs = [run for run in results["runs"] if "error" not in run][::-1]
    figure = Figure(figsize=(8, 0.5 * len(runs) + 1), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh([run["title"] for run in runs], [run["tokens_per_second"] for run in runs], color="0.55")
    for bar, run in zip(bars, runs, strict=True):
        bar.set_hatch("//" if run["name"].startswith("gpu") else "")
    axes.bar_label(bars, labels=[f" {run['tokens_per_second']:,.0f}" for run in runs])
    axes.set_xlabel("real tokens a second, 8B model with random weights, one H100")
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(IMAGES / "speed.png", dpi=110)


def main() -> None:
    results = load()
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}\n{section(results)}\n{END}{after}", encoding="utf-8")
    picture(results)
    curves_picture()


if __name__ == "__main__":
    main()
