#!/usr/bin/env python
"""The schedules in docs/instructor.md, from what a real run took.

`python scripts/instructor_schedule.py WORKDIR "what else the machine did"` takes the seconds of a finished
laptop run over into docs/measured_laptop.json. Without arguments the tables are written again from that file.
"""

import json
import math
import re
import sys
from datetime import datetime, timedelta
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
MEASURED = PROJECT / "docs" / "measured_laptop.json"
GUIDE = PROJECT / "docs" / "instructor.md"

# (part, minutes of talk and predictions, minutes of exercises); a notebook is named by its number.
PLANS = {
    "half-day": (
        "9:00",
        [
            ("Welcome; everybody runs `make check`", 10, 0),
            ("00", 10, 0),
            ("01", 15, 5),
            ("02", 20, 10),
            ("Break", 15, 0),
            ("03", 20, 5),
            ("04", 20, 5),
            ("05", 15, 5),
            ("06", 20, 5),
            ("What we know now; questions", 10, 0),
        ],
    ),
    "full-day": (
        "9:00",
        [
            ("Welcome; everybody runs `make check`", 15, 0),
            ("00", 15, 0),
            ("01", 25, 15),
            ("Break", 15, 0),
            ("02", 30, 20),
            ("03", 25, 15),
            ("Lunch", 60, 0),
            ("04", 25, 25),
            ("05", 20, 15),
            ("Break", 15, 0),
            ("06", 30, 20),
            ("07", 30, 15),
            ("What we know now; questions", 10, 0),
        ],
    ),
}


def measure(workdir: Path, note: str) -> None:
    """Keep seconds, machine and versions of the run cards in `workdir`."""
    cards = [json.loads(path.read_text("utf-8")) for path in sorted(workdir.glob("outputs/run_cards/*.json"))]
    last = cards[-1]
    machine = {key: last["device"][key] for key in ("system", "cpu", "cores", "ram_gib", "python")}
    kept = {
        "profile": last["profile"]["name"],
        "date": last["written"][:10],
        "machine": machine,
        "versions": {name: last["versions"][name] for name in ("torch", "transformers")},
        "git_revision": last["git_revision"],
        "beside_it": note,
        "seconds": {card["notebook"]: card["seconds"] for card in cards},
    }
    MEASURED.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def in_words(measured: dict) -> str:
    """Machine, day and state of the measured run."""
    machine, total = measured["machine"], sum(measured["seconds"].values()) / 60
    return (
        f"Measured on {measured['date']}, profile {measured['profile']}: {machine['cores']} cores of "
        f"{machine['cpu']}, {machine['ram_gib']:.0f} GiB, {machine['system']}, Python {machine['python']}, "
        f"torch {measured['versions']['torch']}; {measured['beside_it']}. All notebooks together: "
        f"{total:.0f} minutes. The column *runs* has these minutes, rounded up for each notebook."
    )


def schedule(name: str, measured: dict) -> str:
    """One schedule as a Markdown table."""
    start, plan = PLANS[name]
    seconds = {notebook[:2]: value for notebook, value in measured["seconds"].items()}
    clock = datetime.strptime(start, "%H:%M")
    lines = ["| from | part | talk, predictions | runs | exercises | minutes |", "|---|---|---|---|---|---|"]
    for part, talk, exercises in plan:
        runs = math.ceil(seconds[part] / 60) if part in seconds else 0
        title = f"notebook {part}" if part in seconds else part
        shown = [str(minutes or "") for minutes in (talk, runs, exercises)]
        both = talk + runs + exercises
        lines.append(f"| {clock:%H:%M} | {title} | {' | '.join(shown)} | {both} |")
        clock += timedelta(minutes=both)
    lines.append(f"| {clock:%H:%M} | end | | | | |")
    return "\n".join(lines)


def guide(text: str, measured: dict) -> str:
    """The guide's text with every generated block made anew."""
    blocks = {name: schedule(name, measured) for name in PLANS} | {"measured": in_words(measured)}
    for name, block in blocks.items():
        pattern = rf"(<!-- {name}: [^>]*-->\n).*?(<!-- end -->)"
        text, count = re.subn(
            pattern, lambda found, b=block: f"{found[1]}{b}\n{found[2]}", text, flags=re.DOTALL
        )
        if count != 1:
            raise SystemExit(f"docs/instructor.md needs one block {name}, and has {count}.")
    return text


if __name__ == "__main__":
    if len(sys.argv) == 3:
        measure(Path(sys.argv[1]), sys.argv[2])
    elif len(sys.argv) != 1:
        sys.exit(__doc__)
    GUIDE.write_text(
        guide(GUIDE.read_text("utf-8"), json.loads(MEASURED.read_text("utf-8"))), encoding="utf-8"
    )
