"""The troubleshooting page and the code: each entry is really said, few messages go without one."""

import ast
import re
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
PAGE = PROJECT / "docs" / "troubleshooting.md"
HOLE = "\0"  # where the code puts a value


def text_of(node: ast.expr, constants: dict[str, str]) -> str:
    """The string that an expression makes, with a HOLE for everything that is only known when it is said."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part, constants) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return text_of(node.value, constants)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left, constants) + text_of(node.right, constants)
    return constants.get(node.id, HOLE) if isinstance(node, ast.Name) else HOLE


def messages() -> dict[str, str]:
    """file:line -> sentence of every WorkshopError in the package, and of the function that words pip's."""
    found = {}
    for path in sorted((PROJECT / "fiqa_helpers").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        constants = {
            node.targets[0].id: node.value.value
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(getattr(node.value, "value", None), str)
        }
        words = [node for node in ast.walk(tree) if getattr(node, "name", "") == "_why_pip_failed"]
        worded = {id(node) for function in words for node in ast.walk(function)}
        for node in ast.walk(tree):
            raised = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "WorkshopError"
            returned = isinstance(node, ast.Return) and id(node) in worded
            if raised or returned:
                value = node.args[0] if raised else node.value
                if value is not None:
                    found[f"{path.name}:{node.lineno}"] = text_of(value, constants).replace(HOLE * 2, HOLE)
    return {where: text for where, text in found.items() if len(text.replace(HOLE, "")) > 12}


def entries() -> list[str]:
    """The first column of every table whose first head is "you see"."""
    tables = re.findall(r"^\| you see \|.*?(?=\n\n)", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    rows = [line for table in tables for line in table.splitlines()[2:]]
    return [re.match(r"\| `([^`]+)` \|", row)[1] for row in rows]


def says(entry: str, message: str) -> bool:
    """Whether the code's `message` can read as `entry`, whose … stand for anything."""
    parts = [re.escape(part) for part in entry.split("…")]
    return re.search(".*".join(parts).strip(), message.replace(HOLE, "<value>"), re.DOTALL) is not None


MESSAGES, ENTRIES = messages(), entries()


def test_the_code_is_read_right():
    """With a parser that finds nothing every test here would pass."""
    assert len(MESSAGES) > 120 and len(ENTRIES) > 100
    assert any(text.startswith("profile is \0: choose") for text in MESSAGES.values())
    assert not says("There is no tractor in …", "There is no adapter in \0: \0.")


@pytest.mark.parametrize("entry", ENTRIES)
def test_each_entry_is_what_the_code_says(entry):
    """A sentence that was reworded in the code is searched for here in vain."""
    assert len(re.sub(r"\W|…", "", entry)) >= 4, "too little text to be found by"
    assert any(says(entry, message) for message in MESSAGES.values()), "no WorkshopError says this any more"


def test_nearly_every_message_has_an_entry():
    """A new error is added in a minute and its explanation forgotten: a few may be missing, not many."""
    missing = {
        where: message.replace(HOLE, "…")
        for where, message in MESSAGES.items()
        if not any(says(entry, message) for entry in ENTRIES if len(re.sub(r"\W|…", "", entry)) > 8)
    }
    print(*(f"no entry: {where} {text}" for where, text in missing.items()), sep="\n")
    assert len(missing) <= len(MESSAGES) // 20, missing


def test_each_fail_line_of_the_checks_is_explained():
    """The table of FAIL lines names the lines that preflight can print, all of them."""
    source = (PROJECT / "fiqa_helpers" / "machinery" / "checks.py").read_text()
    names = set(re.findall(r'(?:Check|_disk|_asset|_packaged|_from_hub)\(\s*"([A-Z][\w ,]+)"', source))
    table = PAGE.read_text("utf-8").partition("| FAIL line |")[2].partition("\n\n")[0]
    explained = {
        name
        for row in table.splitlines()[2:]
        for name in re.split(r", (?=[A-Z][a-z])", row[2:].split(" | ")[0])
    }
    assert names - {"System", "Python"} <= explained | {"Memory, CPU"}, names - explained
