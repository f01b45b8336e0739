"""Speed and memory of this workshop beside its peers: `make bench`, or `python benchmarks/bench.py`.

With an NVIDIA GPU: the 8B model with random weights, every contender of `contenders.py`, one after the other,
each in a process of its own. Without one: the laptop profile beside TRL on the same rows and steps
(`laptop.py`). Results go to benchmarks/results/, from which `report.py` makes README's lines, SPEED.md and a
plot.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from contenders import CONTENDERS

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(CONTENDERS), help="names of contenders, with commas")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps of each, 3 of them to warm up")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for the result files")
    parser.add_argument("--minutes", type=float, default=8, help="stop there; what is missing then is named")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    import torch

    if torch.cuda.is_available():
        on_gpu(args)
    else:
        subprocess.run([sys.executable, HERE / "laptop.py", "--out", args.out / "laptop.json"], check=True)


def on_gpu(args: argparse.Namespace) -> None:
    ends = time.monotonic() + 60 * args.minutes
    started, found = time.strftime("%Y-%m-%d"), []
    if {"nemo-native", "nemo-recipe"} & {*args.only.split(",")}:
        subprocess.run(
            [sys.executable, "-c", "import contenders; contenders.random_folder()"], cwd=HERE, check=True
        )
    for name in args.only.split(","):
        began = time.monotonic()
        card = run(name, args, ends - began)
        found.append(card)
        said = (
            card.get("error") or f"{card['tokens_per_second']:,.0f} tokens/s, {card['mfu']:.2f} of the rate"
        )
        print(f"{name}: {said} [{time.monotonic() - began:.0f} s]", flush=True)
        (args.out / "gpu.json").write_text(json.dumps({"date": started, "runs": found}, indent=1) + "\n")


def run(name: str, args: argparse.Namespace, seconds: float) -> dict:
    """The result of one contender; a failure is a result too, with the last line of what it said."""
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "result.json", Path(folder) / "log"
        steps = CONTENDERS[name].get("steps", args.steps)
        command = [sys.executable, HERE / "contenders.py", name, out, "--steps", str(steps)]
        with log.open("w") as said:
            try:
                subprocess.run(command, stdout=said, stderr=said, timeout=max(1, seconds))
            except subprocess.TimeoutExpired:
                said.write("\nout of time\n")
        if out.exists():
            return json.loads(out.read_text())
        print(log.read_text()[-2000:], flush=True)
        last = log.read_text().strip().splitlines()
    return {"name": name, "error": last[-1][:300] if last else "it said nothing"}


if __name__ == "__main__":
    main()
