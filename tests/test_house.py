"""The house stays thin: code lines within a budget, imports in one direction, a cheap import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
HOUSE = PROJECT / "fiqa_helpers"
FILES = sorted(HOUSE.rglob("*.py"))

# Reading order, which is the order of imports: a file imports only what stands above it.
ORDER = [
    *("base", "machinery.machine", "machinery.assets", "rows", "show", "profiles", "machinery.fast"),
    *("metrics", "data", "model", "generate", "machinery.checkpoints", "trainer", "machinery.live"),
    *("evaluate", "run", "machinery.recipe", "machinery.ship", "machinery.checks", "__main__"),
]

# sum -> (code lines that it may have, lines that it has today). The second may only fall: lower it with each
# landing, until it is the first.
BUDGET = {
    "lesson rooms": (1700, 1921),
    "machinery": (1400, 1467),
    "files": (23, 22),
    "templates": (250, 250),
    "tests": (7000, 10030),
    "benchmarks": (950, 1225),
    "scripts": (450, 450),
}


def code_lines(source: str) -> int:
    """Lines without blank ones, comments and docstrings."""
    skipped = set()
    for node in ast.walk(ast.parse(source)):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node, clean=False) is not None:
            skipped |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(source.splitlines(), 1)
    return sum(n not in skipped and line.strip() != "" and line.strip()[0] != "#" for n, line in lines)


def room(path: Path) -> str:
    """`machinery.live` for fiqa_helpers/machinery/live.py."""
    return ".".join(path.relative_to(HOUSE).with_suffix("").parts)


def imports(path: Path) -> set[str]:
    """The rooms that a file imports; inside functions and for types alone counts, too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: write whole names, not relative ones"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    named = {name.removeprefix("fiqa_helpers.") for name in found if name.startswith("fiqa_helpers.")}
    return named & {room(file) for file in FILES} - {room(path)}


def sizes() -> dict[str, int]:
    def lines(files) -> int:
        return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)

    code = {file: code_lines(file.read_text(encoding="utf-8")) for file in FILES}
    machinery = {file for file in FILES if "machinery" in file.parts or file.name == "__main__.py"}
    look = [file for file in HOUSE.rglob("*") if file.suffix in (".jinja", ".j2", ".html", ".css", ".js")]
    found = {folder: lines((PROJECT / folder).rglob("*.py")) for folder in ("tests", "benchmarks", "scripts")}
    return found | {
        "lesson rooms": sum(n for file, n in code.items() if file not in machinery),
        "machinery": sum(code[file] for file in machinery),
        "files": len(FILES),
        "templates": lines(look),
    }


@pytest.mark.parametrize("name", BUDGET)
def test_nothing_grows_beyond_its_budget(name):
    """A line here, a special case there: in a year nobody reads the helper any more."""
    budget, today = BUDGET[name]
    there = sizes()[name]
    assert there <= max(budget, today), f"{name}: {there}, budget {budget}, last {today}"


def test_what_counts_as_code():
    """A budget that counts explanations is saved by deleting them."""
    source = '"""Why."""\n\n# so\nx = 1  # and so\n\n\ndef f():\n    """What."""\n    return x\n'
    assert code_lines(source) == 3


def test_a_file_imports_only_what_stands_above_it():
    """Whoever reads the rooms in order meets nothing that was not explained; so there is no circle either."""
    for path in FILES:
        above = ORDER[: ORDER.index(room(path))] if room(path) in ORDER else ORDER
        assert imports(path) <= set(above), room(path)


def test_importing_the_package_is_quick():
    """Half a second for a version number, and seconds before the first cell can say anything."""
    heavy = {"torch", "transformers", "datasets", "peft", "nemo_automodel", "pandas", "matplotlib"}
    code = f"""
import time
begin = time.perf_counter()
import fiqa_helpers
seconds = time.perf_counter() - begin
import sys, fiqa_helpers.run
print(seconds, sorted({heavy!r} & set(sys.modules)))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    seconds, loaded = ran.stdout.split(maxsplit=1)
    assert float(seconds) <= 0.5 and loaded.strip() == "[]", ran.stdout + ran.stderr
