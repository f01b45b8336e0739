"""Render the executed notebooks and the pages of docs/ as a static site: `make book`.

`make_book.py [WORKDIR]` shows what ran in WORKDIR, and notebooks/executed where nothing did, and writes
WORKDIR/outputs/book. Nothing is executed.
"""

import re
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat
from executed import with_outputs
from sphinx.cmd.build import build_main

from fiqa_helpers.base import WorkshopError, Workspace, project_root

CONTENTS = """
```{{toctree}}
:hidden:
:caption: {caption}
{pages}
```
"""


def make_book(workspace: Workspace) -> Path:
    """Render the notebooks, as they ran, and the project's pages; returns the first page.

    Raises:
        WorkshopError: a notebook was executed nowhere, or ended with an error.
    """
    book = workspace.outputs / "book"
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "source")
        stage(project_root(), workspace, source)
        settings = ["-c", str(project_root() / "docs"), "-d", f"{scratch}/doctrees"]
        if status := build_main(["-b", "html", *settings, str(source), f"{scratch}/html"]):
            raise WorkshopError(f"Sphinx ended with status {status}: its messages stand above.")
        shutil.rmtree(book, ignore_errors=True)
        shutil.copytree(Path(scratch, "html"), book)
    return book / "index.html"


def stage(project: Path, workspace: Workspace, source: Path) -> None:
    """Lay out the book's pages in `source` as the project does, so that their links go on working."""
    pages = ("docs", "notebooks", "benchmarks")
    for folder in (*pages, "fiqa_helpers", "recipes", "scripts", "tests"):  # what pages link to
        left_out = ["executed", "adapter", "conf.py", "_static", "*.ipynb" if folder in pages else "*.md"]
        shutil.copytree(project / folder, source / folder, ignore=shutil.ignore_patterns(*left_out))
    for page in [*project.glob("*.md"), *project.glob("LICENSE"), *project.glob("CITATION.cff")]:
        shutil.copy(page, source)
    notebooks = sorted((project / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    for path in notebooks:
        notebook = with_alternative_texts(with_outputs(path, workspace))
        nbformat.write(notebook, source / "notebooks" / path.name)
    solutions = sorted((project / "notebooks" / "solutions").glob("[0-9][0-9]_*.ipynb"))
    for path in solutions:
        shutil.copy(path, source / "notebooks" / "solutions")
    for folder in (source, source / "notebooks" / "precomputed"):
        (folder / "README.md").rename(folder / "index.md")
    for page in (*source.rglob("*.md"), *source.rglob("*.ipynb")):
        text = page.read_text(encoding="utf-8").replace("notebooks/executed/", "notebooks/")
        page.write_text(re.sub(r"(\]\((?!https:)[^)\s]*)README\.md", r"\1index.md", text), encoding="utf-8")
    others = [path.relative_to(source) for path in sorted(source.rglob("*.md"))]
    contents = {
        "Notebooks": [f"notebooks/{path.stem}" for path in notebooks],
        "More": [path.with_suffix("") for path in others if path.name != "index.md" or path.parent.name],
        "Solutions": [f"notebooks/solutions/{path.stem}" for path in solutions],
    }
    with (source / "index.md").open("a", encoding="utf-8") as file:
        for caption, names in contents.items():
            file.write(CONTENTS.format(caption=caption, pages="\n".join(map(str, names))))


def with_alternative_texts(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """`notebook`; what `save_plot` and the live panel say of a picture is put where myst-nb reads it."""
    for cell in notebook.cells:
        pictures = [output for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
        if pictures:
            alt = " ".join(picture.metadata["image/png"]["alt"] for picture in pictures)
            cell.metadata["mystnb"] = {"image": {"alt": alt}}
    return notebook


if __name__ == "__main__":
    try:
        print(f"Book    {make_book(Workspace(*sys.argv[1:]))}")
    except WorkshopError as error:
        sys.exit(str(error))
