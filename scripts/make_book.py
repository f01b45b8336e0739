"""Render the executed notebooks and the pages of docs/ as a static site: `make book`.

`make_book.py [WORKDIR]` reads WORKDIR/outputs/executed and writes WORKDIR/outputs/book; nothing is executed.
"""

import re
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat
from sphinx.cmd.build import build_main

from fiqa_helpers.base import WorkshopError, Workspace, project_root

CONTENTS = """
```{{toctree}}
:hidden:
:caption: {caption}
{pages}
```
"""
NOT_EXECUTED = "> This notebook was not executed in the run that this book shows, so its results are missing."


def make_book(executed: Path, book: Path) -> Path:
    """Render the notebooks in `executed` and the project's pages into `book`; returns its first page.

    Raises:
        WorkshopError: nothing was executed yet, or a notebook ended with an error.
    """
    if not list(executed.glob("[0-9][0-9]_*.ipynb")):
        raise WorkshopError(f"There is no executed notebook in {executed}: run `make run` first.")
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "source")
        stage(project_root(), executed, source)
        settings = ["-c", str(project_root() / "docs"), "-d", f"{scratch}/doctrees"]
        if status := build_main(["-b", "html", *settings, str(source), f"{scratch}/html"]):
            raise WorkshopError(f"Sphinx ended with status {status}: its messages stand above.")
        shutil.rmtree(book, ignore_errors=True)
        shutil.copytree(Path(scratch, "html"), book)
    return book / "index.html"


def stage(project: Path, executed: Path, source: Path) -> None:
    """Lay out the book's pages in `source` as the project does, so that their links go on working."""
    shutil.copytree(project / "docs", source / "docs", ignore=shutil.ignore_patterns("conf.py", "_static"))
    for page in [*project.glob("*.md"), *project.glob("LICENSE"), *project.glob("CITATION.cff")]:
        shutil.copy(page, source)
    notebooks = sorted((project / "notebooks").rglob("[0-9][0-9]_*.ipynb"))
    notebooks = [path for path in notebooks if ".ipynb_checkpoints" not in path.parts]
    for path in notebooks:
        target = source / path.relative_to(project)
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(prepared(path, executed / path.name), target)
    for folder in ("benchmarks", "fiqa_helpers", "recipes", "scripts", "tests"):  # what pages link to
        no_pages = shutil.ignore_patterns("*.ipynb" if folder == "benchmarks" else "*.md")
        shutil.copytree(project / folder, source / folder, ignore=no_pages)
    kept = Path("notebooks", "precomputed")
    shutil.copytree(project / kept, source / kept, ignore=shutil.ignore_patterns("adapter"))
    shutil.copytree(project / "notebooks" / "figures", source / "notebooks" / "figures")
    for folder in (source, source / kept):
        (folder / "README.md").rename(folder / "index.md")
    for page in (*source.rglob("*.md"), *source.rglob("*.ipynb")):
        text = page.read_text(encoding="utf-8")
        page.write_text(re.sub(r"(\]\((?!https:)[^)\s]*)README\.md", r"\1index.md", text), encoding="utf-8")
    names = [path.relative_to(project).with_suffix("").as_posix() for path in notebooks]
    solutions = [name for name in names if name.startswith("notebooks/solutions/")]
    others = sorted(path.relative_to(source).with_suffix("").as_posix() for path in source.rglob("*.md"))
    contents = {
        "Notebooks": [name for name in names if name not in solutions],
        "More": [name for name in others if name != "index"],
        "Solutions": solutions,
    }
    with (source / "index.md").open("a", encoding="utf-8") as file:
        for caption, pages in contents.items():
            file.write(CONTENTS.format(caption=caption, pages="\n".join(pages)))


def prepared(path: Path, executed: Path) -> nbformat.NotebookNode:
    """The executed notebook, its pictures' alternative texts where myst-nb reads them.

    One that was not executed, such as a solution, comes as it is, and says so.

    Raises:
        WorkshopError: it ended with an error, or before its last cell.
    """
    if path.parent.name != "notebooks" or not executed.is_file():
        notebook = nbformat.read(path, as_version=4)
        if path.parent.name == "notebooks":
            print(f"{path.stem} was not executed: it comes without results.", file=sys.stderr)
            notebook.cells.insert(1, nbformat.v4.new_markdown_cell(NOT_EXECUTED))
        return notebook
    notebook = nbformat.read(executed, as_version=4)
    heading = path.stem
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and cell.source.startswith("#"):
            heading = cell.source.splitlines()[0].lstrip("# ")
        if cell.cell_type != "code" or not cell.source.strip():
            continue
        if cell.execution_count is None or any(out.output_type == "error" for out in cell.outputs):
            raise WorkshopError(
                f"{executed} did not run to its end ({heading}): run `make run ONLY={path.name[:2]}` first."
            )
        texts = [text for output in cell.outputs if (text := alternative_text(output, heading))]
        if texts:
            cell.metadata["mystnb"] = {"image": {"alt": " ".join(texts)}}
    return notebook


def alternative_text(output: nbformat.NotebookNode, heading: str) -> str:
    """What the notebook says of a picture (`save_plot`, the live panel), or where it stands; else ""."""
    kinds = [kind for kind in output.get("data", {}) if kind.startswith("image/")]
    if not kinds or "text/html" in output.data:
        return ""
    return output.metadata.get(kinds[0], {}).get("alt", "") or f"Picture in the section {heading}"


if __name__ == "__main__":
    outputs = Workspace(*sys.argv[1:]).outputs
    try:
        print(f"Book    {make_book(outputs / 'executed', outputs / 'book')}")
    except WorkshopError as error:
        sys.exit(str(error))
