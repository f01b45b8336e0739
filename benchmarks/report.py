"""Write README's lines on speed, benchmarks/SPEED.md and docs/images/speed.png from benchmarks/results/.

    python benchmarks/report.py

A test holds both pages against the files, so a figure there is always one that was measured.
"""

import json
from pathlib import Path

from contenders import VERSIONS

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
README, SPEED = HERE.parent / "README.md", HERE / "SPEED.md"
BEGIN, END = "<!-- speed: written by benchmarks/report.py -->", "<!-- end of speed -->"
ANCHOR = """\
As an outside anchor, NVIDIA publishes **12,473 tokens/s** (402 TFLOP/s, 0.41 of 989) for LoRA on Llama-3 8B, one H100:
full sequences of 4,096 tokens, 32 of them a step, all linear layers, r 16, Transformer Engine and Triton kernels, no
gradient clipping ([NeMo AutoModel's performance summary](https://docs.nvidia.com/nemo/automodel/latest/performance-summary.html),
first in October 2025). It counts attention's operations as well, and trains every token."""


def read(name: str) -> dict:
    """One result file; empty where it has not been measured."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def measured() -> dict[str, dict]:
    """The rows of gpu.json that have a result, by name."""
    return {run["name"]: run for run in read("gpu")["runs"] if "error" not in run}


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


# -- one GPU


def readme_lines() -> list[str]:
    """What README says about one GPU: six lines."""
    runs, date = measured(), read("gpu")["date"]
    ours = [run for name, run in runs.items() if name.startswith("gpu")]
    peers = [run for name, run in runs.items() if not name.startswith("gpu")]
    best = max(peers, key=lambda run: run["tokens_per_second"])
    ahead = best["tokens_per_second"] > runs["gpu80"]["tokens_per_second"]
    said = [
        f"{run['title'].removeprefix('this workshop, ')} {run['tokens_per_second']:,.0f} "
        f"in {run['peak_reserved_gib']:.1f} GiB"
        for run in ours
    ]
    first = runs["gpu80"]
    return [
        f"Real tokens a second on one {first['machine']['gpu']}, {date}, 8B with **random weights** (nothing about",
        f"learning can be read here), rows of FiQA's lengths: {'; '.join(said)}.",
        f"gpu80 makes {first['mfu']:.2f} of the card's own matrix rate, {first['mfu_h100']:.2f} of 989 TFLOP/s.",
        "The peers at their best public settings: "
        + "; ".join(f"{run['title']} {run['tokens_per_second']:,.0f}" for run in peers)
        + ".",
        f"{best['title']} is ahead of gpu80." if ahead else "None of them is ahead of gpu80.",
        "Settings and their sources, Unsloth, NVIDIA's figure: [benchmarks/SPEED.md](benchmarks/SPEED.md).",
    ]


def gpu_lines() -> list[str]:
    """The whole table, where its settings come from, and what stands beside it."""
    runs, found, earlier = list(measured().values()), read("gpu"), read("earlier")
    head = ["how", "tokens/s", "of the card's rate", "of 989 TFLOP/s", "GiB reserved", "tokens a step"]
    rows = [
        [
            run["title"],
            f"{run['tokens_per_second']:,.0f}",
            f"{run['mfu']:.2f}",
            f"{run['mfu_h100']:.2f}",
            f"{run['peak_reserved_gib']:.1f}",
            f"{run['tokens_per_step']:,}",
        ]
        for run in runs
    ]
    machine, rates = runs[0]["machine"], [run["matmul_tflops"] for run in runs]
    missing = [run["name"] for run in found["runs"] if "error" in run]
    lines = [
        *table(head, rows),
        "",
        f"{machine['gpu']}, {found['date']}, one after the other, {runs[0]['steps']} steps each. Its own rate is what a product of",
        f"two 8192 x 8192 bf16 matrices reaches there: {min(rates):.0f} to {max(rates):.0f} TFLOP/s. Versions: "
        + ", ".join(f"{name} {machine[name]}" for name in VERSIONS if name in machine)
        + ".",
        *([f"Not measured in that run: {', '.join(missing)}."] if missing else []),
        "",
        f"Unsloth was not there in that run. On {earlier['date']}, on another card, where gpu80 (then with fused LoRA",
        f"kernels) made {earlier['gpu80']:,.0f} tokens/s: "
        + "; ".join(f"{run['title']} {run['tokens_per_second']:,.0f}" for run in earlier["runs"])
        + f". {earlier['note']}",
        "",
        ANCHOR,
        "",
        *table(["name in contenders.py", "settings from"], [[run["name"], run["source"]] for run in runs]),
    ]
    return lines


# -- the recipe


def recipe_cards() -> dict[str, dict]:
    """Results of recipe_bench.py's `speed`, in its order."""
    from recipe_bench import SPEED as NAMES

    return {name: card for name in NAMES if (card := read(name))}


def share(card: dict, one: dict) -> float:
    """Of N times one GPU's rate."""
    return card["tokens_per_second"] / one["tokens_per_second"] / card["gpus"]


def recipe_readme_lines() -> list[str]:
    """What README says about many GPUs: four lines."""
    cards = recipe_cards()
    one = cards["recipe"]
    beside = one["tokens_per_second"] / one["notebook_tokens_per_second"]
    more = [
        f"{card['tokens_per_second']:,.0f} on {card['gpus']} with `{card['strategy']}` "
        f"({share(card, one):.0%} of {card['gpus']} times)"
        for card in cards.values()
        if card["local_batch_size"] == 16 and card["gpus"] > 1
    ]
    return [
        "As a NeMo AutoModel recipe (notebook 07), rows packed, 16 rows a GPU and step, on one host with such cards,",
        f"{one['written'][:10]}: {one['tokens_per_second']:,.0f} tokens/s on one GPU ({beside:.2f} of notebook 04's there);",
        f"{'; '.join(more)}.",
        "With 16 rows a step in all, memory, losses, kills: [benchmarks/SPEED.md](benchmarks/SPEED.md).",
    ]


def recipe_lines() -> list[str]:
    """The recipe's tables: speed and memory, agreement, resume."""
    cards = recipe_cards()
    one = cards["recipe"]
    head = ["GPUs", "rows a step", "tokens/s", "of N times one", "seconds a step", "GiB on the first"]
    rows = []
    for name, card in cards.items():
        note = ", chunked loss" if "chunked" in name else ""
        memory = next(value for key, value in card.items() if key.startswith("peak_"))
        rows.append(
            [
                f"{card['gpus']}, {card['strategy']}{note}",
                str(card["global_batch_size"]),
                f"{card['tokens_per_second']:,.0f}",
                f"{share(card, one):.0%}",
                f"{card['seconds_per_step_median']:.2f}",
                f"{memory:.1f}",
            ]
        )
    lines = [
        *table(head, rows),
        "",
        f"{one['device']['gpu']['name']}, {one['written'][:10]}; notebook 04's trainer made "
        f"{one['notebook_tokens_per_second']:,.0f} tokens/s in the same call.",
    ]
    return [*lines, *agreement_lines()]


def agreement_lines() -> list[str]:
    """SmolLM2's real weights: losses on 1, 2 and 4 GPUs, notebook 04's validation loss, kills."""
    runs, resumed = read("recipe_agree").get("runs", {}), read("recipe_resume").get("runs", {})
    if not runs:
        return []
    head = ["SmolLM2, real weights", "first 20 steps apart from one GPU's", "validation loss", "the same in PEFT"]
    rows = [
        [
            "notebook 04's trainer" if name == "notebook" else name.replace("_", ", ") + " GPU(s)",
            f"{run['largest_step_difference']:.4f}",
            f"{run['validation_loss']:.4f}",
            f"{run['validation_loss_in_peft']:.4f}" if "validation_loss_in_peft" in run else "",
        ]
        for name, run in runs.items()
    ]
    kills = [
        f"{name.split('_')[0]} killed after the checkpoint of step {run['saved_after_step']} went on at step "
        f"{run['went_on_at_step']} and ended {abs(run['last_losses'][0] - run['last_losses'][1]):.4f} from the whole run's loss"
        for name, run in resumed.items()
    ]
    return ["", *table(head, rows), "", *([f"Two GPUs, SIGKILL: {'; '.join(kills)}."] if kills else [])]


def laptop_lines() -> list[str]:
    """The laptop profile beside TRL, in words."""
    found = read("laptop")
    machine, ratios = found["machine"], found["ratios"]
    span = {name: f"{min(times):.0f} to {max(times):.0f} s" for name, times in found["seconds"].items()}
    return [
        f"On {machine['cores']} cores ({machine['cpu']}), profile `laptop` takes {found['ratio_median']:.2f} of the time of",
        f"TRL's SFTTrainer for the same rows and {found['steps']} steps: {span['ours']} against {span['trl']}, in turns,",
        f"median of {len(ratios)} ratios ({min(ratios):.2f} to {max(ratios):.2f}). {found['date']}, torch {machine['torch']}, "
        f"trl {machine['trl']}.",
    ]


def pages() -> tuple[str, str]:
    """README's lines and the whole of SPEED.md."""
    lines = ["# Speed and memory, measured", "", "Written by `benchmarks/report.py` from `benchmarks/results/`.", ""]
    lines += ["## One GPU", "", *gpu_lines(), "", "## NeMo AutoModel's recipe on several GPUs (notebook 07)", ""]
    lines += [*recipe_lines(), "", "## A laptop", "", *laptop_lines(), ""]
    return "\n".join([*readme_lines(), "", *recipe_readme_lines()]), "\n".join(lines)


def picture() -> None:
    """Bars of tokens/s, labelled, that need no colour."""
    from matplotlib.figure import Figure

    runs = list(measured().values())[::-1]
    figure = Figure(figsize=(8, 0.5 * len(runs) + 1), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh([run["title"] for run in runs], [run["tokens_per_second"] for run in runs], color="0.55")
    for bar, run in zip(bars, runs, strict=True):
        bar.set_hatch("//" if run["name"].startswith("gpu") else "")
    axes.bar_label(bars, labels=[f" {run['tokens_per_second']:,.0f}" for run in runs])
    axes.set_xlabel("real tokens a second, 8B model with random weights, one H100")
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE.parent / "docs" / "images" / "speed.png", dpi=110)


def main() -> None:
    lines, page = pages()
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    README.write_text(f"{before}{BEGIN}\n{lines}\n{END}{after}", encoding="utf-8")
    SPEED.write_text(page, encoding="utf-8")
    picture()


if __name__ == "__main__":
    main()
