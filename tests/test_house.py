"""The house stays thin: code lines within a budget, imports in one direction."""

import ast
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
HOUSE = PROJECT / "fiqa_helpers"
FILES = sorted(HOUSE.rglob("*.py"))

# Reading order, which is the order of imports: a file imports only what stands above it.
ORDER = [
    *("base", "machinery.machine", "machinery.assets", "rows", "show", "profiles", "machinery.fast"),
    *("metrics", "data", "model", "generate", "machinery.checkpoints", "trainer", "machinery.live"),
    *("evaluate", "run", "machinery.recipe", "machinery.ship", "machinery.checks", "__main__"),
]

# What each sum may have: lines of code in the rooms and the machinery, and all lines elsewhere.
BUDGET = {
    "lesson rooms": 1700,
    "machinery": 1400,
    "files": 23,
    "templates": 250,
    "tests": 7000,
    "benchmarks": 950,
    "scripts": 450,
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
    def lines(folder: str, pattern: str) -> int:
        return sum(len(file.read_text("utf-8").splitlines()) for file in (PROJECT / folder).rglob(pattern))

    code = {file: code_lines(file.read_text(encoding="utf-8")) for file in FILES}
    machinery = [n for file, n in code.items() if "machinery" in file.parts or file.name == "__main__.py"]
    return {folder: lines(folder, "*.py") for folder in ("tests", "benchmarks", "scripts")} | {
        "lesson rooms": sum(code.values()) - sum(machinery),
        "machinery": sum(machinery),
        "files": len(FILES),
        "templates": sum(lines("fiqa_helpers", f"*.{kind}") for kind in ("jinja", "j2", "html", "css", "js")),
    }


def test_nothing_grows_beyond_its_budget():
    """A line here, a special case there: in a year nobody reads the helper any more."""
    over = {name: n for name, n in sizes().items() if n > BUDGET[name]}
    assert not over, f"{over}, and the budget is {BUDGET}"


def test_a_file_imports_only_what_stands_above_it():
    """Whoever reads the rooms in order meets nothing that was not explained; so there is no circle either."""
    assert {path.parent for path in FILES} == {HOUSE, HOUSE / "machinery"}, "no deeper folders"
    for path in FILES:
        above = ORDER[: ORDER.index(room(path))] if room(path) in ORDER else ORDER
        assert imports(path) <= set(above), room(path)
