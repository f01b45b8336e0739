"""The troubleshooting page and the code: a sentence that was reworded in the code is searched for in vain."""

import re
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
PAGE = PROJECT / "docs" / "troubleshooting.md"
# All strings of the package's code, those that stand in several pieces put together.
SAID = re.sub(
    r"""["']\s*\n\s*\+?\s*f?["']""",
    "",
    "\n".join(path.read_text(encoding="utf-8") for path in (PROJECT / "fiqa_helpers").rglob("*.py")),
)


def entries() -> list[str]:
    """The first column of every table whose first head is "you see"."""
    tables = re.findall(r"^\| you see \|.*?(?=\n\n)", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    rows = [line for table in tables for line in table.splitlines()[2:]]
    return [re.match(r"\| `([^`]+)` \|", row)[1] for row in rows]


@pytest.mark.parametrize("entry", entries())
def test_each_entry_is_what_the_code_says(entry):
    """`…` stands for what varies; the longest piece between has to stand in the code."""
    piece = max(entry.split("…"), key=len).strip()
    assert len(piece) >= 4, "too little text to be found by"
    assert piece in SAID, "the code says this no more"
