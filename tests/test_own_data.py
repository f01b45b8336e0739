"""The page about your own data: its file is well formed, and its commands do what it says."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
PAGE = PROJECT / "docs" / "your_own_data.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """The page's shell commands in their order, run by this Python."""
    lines = [shlex.split(line) for block in blocks("sh") for line in block.splitlines()]
    assert all(words[0] == "python" for words in lines)
    return [[sys.executable, *words[1:]] for words in lines]


@pytest.mark.slow
@pytest.mark.notebooks
@pytest.mark.timeout(3000)
def test_the_page_works_from_file_to_adapter(tmp_path):
    """Every command of the page in its order, on the real small model, from an empty folder.

    Only the second try, which is there to be compared, is trained for two steps instead of twenty.
    """
    for name in ("fiqa_helpers", "notebooks", "docs", "pyproject.toml", "constraints.txt"):
        source = PROJECT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    (script,) = blocks("python")
    (tmp_path / "use_adapter.py").write_text(script, encoding="utf-8")
    said = []
    for command in commands():
        if "mine2" in command and "run" in command:
            command = [word.replace("max_steps: 20", "max_steps: 2") for word in command]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}{done.stderr[-3000:]}"
        said.append(done.stdout)
    print(*said, sep="\n")
    losses = re.search(r"validation loss ([\d.]+) -> ([\d.]+)", said[1])
    assert float(losses[2]) < float(losses[1]) - 1, "forty rows in one voice are learned quickly"
    assert "Ask at any lantern desk." in said[3], "the tuned model has taken over the voice of the rows"
    assert re.search(r"^lora_rank +8 +16$", said[-1], re.MULTILINE)
