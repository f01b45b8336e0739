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

# Start, how many stars an exercise may have, how many exercises of a notebook, and the parts, each with its
# minutes of talk and predictions. A notebook is named by its number; its minutes of exercises stand in it.
PLANS = {
    "half-day": (
        *("9:00", 1, 1),
        "Welcome; everybody runs `make check` 10 | 00 10 | 01 15 | 02 25 | Break 15 | 03 20 | 04 20 | 05 15"
        " | 06 20 | What we know now; questions 10",
    ),
    "full-day": (
        *("9:00", 2, 3),
        "Welcome; everybody runs `make check` 15 | 00 15 | 01 25 | Break 15 | 02 35 | 03 30 | Lunch 60"
        " | 04 30 | 05 20 | Break 15 | 06 30 | 07 30 | What we know now; questions 15",
    ),
}


def exercises(number: str, stars: int, most: int) -> int:
    """Minutes of the first exercises of a notebook, at most `most`, none with more than `stars` stars."""
    (path,) = (PROJECT / "notebooks").glob(f"{number}_*.ipynb")
    found = re.findall(r"### Exercise \d · (★+) \((\d+) min\)", path.read_text("utf-8"))
    return sum([int(minutes) for marks, minutes in found if len(marks) <= stars][:most])


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
    start, stars, most, plan = PLANS[name]
    seconds = {notebook[:2]: value for notebook, value in measured["seconds"].items()}
    clock = datetime.strptime(start, "%H:%M")
    lines = ["| from | part | talk, predictions | runs | exercises | minutes |", "|---|---|---|---|---|---|"]
    for step in plan.split(" | "):
        part, _, minutes = step.rpartition(" ")
        talk = int(minutes)
        runs = math.ceil(seconds[part] / 60) if part in seconds else 0
        tasks = exercises(part, stars, most) if part in seconds else 0
        title = f"notebook {part}" if part in seconds else part
        shown = [str(count or "") for count in (talk, runs, tasks)]
        lines.append(f"| {clock:%H:%M} | {title} | {' | '.join(shown)} | {talk + runs + tasks} |")
        clock += timedelta(minutes=talk + runs + tasks)
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
