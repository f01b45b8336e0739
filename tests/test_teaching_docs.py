"""The instructor's pages in step with the notebooks and with what was measured."""

import json
import re
from datetime import datetime
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
EXECUTED = PROJECT / "notebooks" / "executed"
PAGES = [
    *PROJECT.glob("docs/*.md"),
    *PROJECT.glob("*.md"),
    PROJECT / "notebooks" / "precomputed" / "README.md",
]


@pytest.mark.parametrize(("title", "longest"), [("Half a day", 4 * 60), ("A day", 8 * 60)])
def test_a_schedule_adds_up_and_fits_its_day(title, longest):
    """Half a day that takes five hours is no half day; minutes that somebody felt to be right are wrong."""
    guide = (PROJECT / "docs" / "instructor.md").read_text("utf-8")
    lines = guide.partition(f"\n### {title}\n")[2].partition("\n#")[0].splitlines()
    table = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if line[:3] == "| 0" or line[:3] == "| 1"
    ]
    clock = [datetime.strptime(row[0], "%H:%M") for row in table]
    for row, begin, end in zip(table, clock, clock[1:], strict=False):
        assert sum(int(cell or 0) for cell in row[2:5]) == int(row[5]) == (end - begin).seconds / 60, row
    assert (clock[-1] - clock[0]).seconds / 60 <= longest
    runs = {row[1]: int(row[3] or 0) for row in table if row[1].startswith("notebook")}
    assert list(runs)[:7] == [f"notebook {number:02d}" for number in range(7)]
    for path in EXECUTED.glob("0[0-6]*.ipynb"):
        minutes = re.search(r"Notebook (\d\d) took (\d+\.\d) minutes", path.read_text("utf-8"))
        assert runs[f"notebook {minutes[1]}"] >= float(minutes[2])


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_links_between_the_pages_resolve(path):
    """Links to files that were renamed, and to headings that were reworded."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text("utf-8"), flags=re.DOTALL)
    assert "](http:" not in text
    for target in re.findall(r"\]\((?!\w+:)([^)\s]+)", text):
        file, _, anchor = target.partition("#")
        there = path.parent / file if file else path
        if there.parent == EXECUTED and not EXECUTED.exists():
            continue  # written by `make executed`; once it is there, each must be
        assert there.exists(), f"{path.name} links to {target}"
        heads = re.findall(r"^#+ (.+)$", there.read_text("utf-8") if anchor else "", re.MULTILINE)
        anchors = [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads]
        assert not anchor or anchor in anchors, f"{path.name} links to {target}"


def test_what_is_to_be_seen_is_in_its_cell():
    """A box that was closed again, or a cell that was split: the table would send people nowhere."""
    text = (PROJECT / "CONTRIBUTING.md").read_text("utf-8").partition("## Where it is seen")[2]
    cells = re.findall(r"^\| [^|]+ \| `((\d\d)-\w+)` \|", text, re.MULTILINE)
    assert len(cells) >= 15
    for cell, number in cells:
        (path,) = (PROJECT / "notebooks").glob(f"{number}_*.ipynb")
        ids = {found["id"] for found in json.loads(path.read_text("utf-8"))["cells"]}
        assert cell in ids, f"{path.name} has no cell {cell}"
