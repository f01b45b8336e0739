"""Speed and memory of this workshop beside its peers: `make bench`, or `python benchmarks/bench.py`.

With an NVIDIA GPU: the 8B model with random weights, every contender of `contenders.py`, one after the other,
each in a process of its own. Without one: the laptop profile beside TRL on the same rows and steps
(`laptop.py`). Results go to benchmarks/results/, from which `report.py` makes the README's table and a plot.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="names of contenders, with commas (default: all)")
    parser.add_argument("--steps", type=int, default=15, help="optimizer steps of each, 3 of them to warm up")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the result files")
    parser.add_argument("--seconds", type=float, default=600, help="longest time for one contender")
    parser.add_argument("--peer-path", default="", help="PYTHONPATH of Unsloth, which needs older versions")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    import torch

    if torch.cuda.is_available():
        on_gpu(args)
    else:
        subprocess.run([sys.executable, HERE / "laptop.py", "--out", args.out / "laptop.json"], check=True)


def on_gpu(args: argparse.Namespace) -> None:
    sys.path.insert(0, str(HERE))
    from contenders import CONTENDERS

    names = args.only.split(",") if args.only else list(CONTENDERS)
    found, began = [], time.strftime("%Y-%m-%d")
    for name in names:
        started = time.monotonic()
        print(f"{name}: {CONTENDERS[name][0]} ...", flush=True)
        card = run(name, args)
        found.append(card)
        said = card.get("error") or (
            f"{card['tokens_per_second']:,.0f} tokens/s, MFU {card['mfu']:.2f}, "
            f"{card['peak_reserved_gib']:.1f} GiB reserved"
        )
        print(f"{name}: {said} [{time.monotonic() - started:.0f} s]", flush=True)
        (args.out / "gpu.json").write_text(json.dumps({"date": began, "runs": found}, indent=1) + "\n")


def run(name: str, args: argparse.Namespace) -> dict:
    """The result of one contender; a failure is a result too, with the end of what it said."""
    environment = dict(os.environ)
    if name.startswith("unsloth") and args.peer_path:
        environment["PYTHONPATH"] = args.peer_path
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, str(HERE / "contenders.py"), name, str(out), "--steps", str(args.steps)]
        with open(args.out / f"{name}.log", "w") as log:
            try:
                subprocess.run(
                    command, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=args.seconds
                )
            except subprocess.TimeoutExpired:
                log.write("\nstopped: out of time\n")
        if out.exists():
            return json.loads(out.read_text())
    last = (args.out / f"{name}.log").read_text().strip().splitlines()
    return {"name": name, "error": last[-1][:300] if last else "it said nothing"}


if __name__ == "__main__":
    main()
