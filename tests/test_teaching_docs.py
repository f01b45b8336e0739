"""The instructor's pages in step with the notebooks and with what was measured."""

import json
import re
import runpy
import time
from datetime import datetime
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
DOCS = PROJECT / "docs"
GUIDE = (DOCS / "instructor.md").read_text("utf-8")
MEASURED = json.loads((DOCS / "measured_laptop.json").read_text("utf-8"))
PAGES = [
    *sorted(DOCS.glob("*.md")),
    *PROJECT.glob("*.md"),
    PROJECT / "notebooks" / "precomputed" / "README.md",
]


def test_the_schedules_come_from_measured_run_cards():
    """Minutes that somebody felt to be right are wrong in the room."""
    script = runpy.run_path(str(PROJECT / "scripts" / "instructor_schedule.py"))
    assert script["guide"](GUIDE, MEASURED) == GUIDE, "run scripts/instructor_schedule.py"
    names = {path.stem for path in (PROJECT / "notebooks").glob("0*.ipynb")}
    assert set(MEASURED["seconds"]) == names
    assert MEASURED["profile"] == "laptop" and MEASURED["machine"]["cores"] >= 1
    assert time.strptime(MEASURED["date"], "%Y-%m-%d")


@pytest.mark.parametrize(("name", "longest"), [("half-day", 4 * 60), ("full-day", 8 * 60)])
def test_a_schedule_adds_up_and_fits_its_day(name, longest):
    """Half a day that takes five hours is no half day."""
    table = re.search(rf"<!-- {name}: .*?-->\n(.*?)\n<!-- end -->", GUIDE, re.DOTALL)[1].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    clock = [datetime.strptime(row[0], "%H:%M") for row in rows]
    for row, begin, end in zip(rows, clock, clock[1:], strict=False):
        assert sum(int(cell or 0) for cell in row[2:5]) == int(row[5]) == (end - begin).seconds / 60
    assert (clock[-1] - clock[0]).seconds / 60 <= longest
    assert [row[1] for row in rows if "notebook" in row[1]][:7] == [f"notebook {n:02d}" for n in range(7)]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_links_between_the_pages_resolve(path):
    """Links to files that were renamed, and to headings that were reworded."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text("utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)", text):
        if re.match(r"[a-z]+:", target):
            assert not target.startswith("http:"), target
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file) if file else path
        assert there.exists(), f"{path.name} links to {target}"
        if anchor:
            heads = re.findall(r"^#+ (.+)$", there.read_text("utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads]
            assert anchor in anchors, f"{path.name} links to {target}"


def test_what_is_to_be_seen_is_in_its_cell():
    """A box that was closed again, or a cell that was split: the table would send people nowhere."""
    text = (PROJECT / "CONTRIBUTING.md").read_text("utf-8").partition("## Where it is seen")[2]
    cells = re.findall(r"^\| [^|]+ \| `((\d\d)-\w+)` \|", text, re.MULTILINE)
    assert len(cells) >= 15
    for cell, number in cells:
        (path,) = (PROJECT / "notebooks").glob(f"{number}_*.ipynb")
        ids = {found["id"] for found in json.loads(path.read_text("utf-8"))["cells"]}
        assert cell in ids, f"{path.name} has no cell {cell}"
