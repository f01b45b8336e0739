"""Runs side by side: what differs is shown, what cannot be compared is said, nothing in a card is markup."""

import json
import re
from pathlib import Path

import pytest

from fiqa_helpers import model
from fiqa_helpers.__main__ import compare, read_runs
from fiqa_helpers.base import WorkshopError


@pytest.fixture
def two_runs(tmp_path) -> list[str]:
    """The cards of the precomputed run in two workdirs, the second with another rank and another curve."""
    kept = model.load_kept().folder
    for name in ("first", "second"):
        cards, final = (
            tmp_path / name / "outputs" / "run_cards",
            tmp_path / name / "checkpoints" / "final_model",
        )
        cards.mkdir(parents=True)
        final.mkdir(parents=True)
        for path in sorted((kept / "run_cards").glob("*.json")):
            card = json.loads(path.read_text("utf-8"))
            if name == "second":
                card["profile"]["lora_rank"] = 16
            (cards / path.name).write_text(json.dumps(card))
        (final / "run_card.json").write_bytes((kept / "adapter" / "run_card.json").read_bytes())
    return [str(tmp_path / "first"), str(tmp_path / "second")]


def change(folder: str, number: str, **values: object) -> None:
    path = Path(folder) / "outputs" / "run_cards" / f"{number}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_only_what_differs_is_listed(two_runs):
    """Thirty equal settings would bury the one that was changed."""
    text, page = compare(two_runs)
    settings = text.partition("Settings that differ")[2].partition("Results")[0].split()
    assert settings[1:] == ["lora_rank", "first:", "8", "second:", "16"]
    assert "not to be ranked" not in text
    html = page.read_text("utf-8")
    assert page == Path(two_runs[0]) / "outputs" / "compare.html"
    assert html.count("<svg") == 1 and 'aria-label="Validation loss: first' in html
    for number in ("04", "06"):
        assert model.load_kept().notebook(number)["figure"][:30] in text
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", html), "the page loads nothing"


def test_losses_of_other_things_are_not_ranked(two_runs):
    """A lower loss on other rows or of another model is no better run."""
    card = json.loads((Path(two_runs[1]) / "outputs" / "run_cards" / "06.json").read_text())
    change(
        two_runs[1], "06", profile=card["profile"] | {"max_length": 64}, written="2099-01-01T00:00:00+00:00"
    )
    text, page = compare(two_runs)
    assert text.startswith("The runs differ in max_length: losses of different things")
    assert "The runs differ in max_length" in page.read_text("utf-8")


def test_text_of_a_card_is_no_markup(two_runs):
    """A figure or a folder's name may hold anything."""
    change(two_runs[0], "04", figure="<script>alert(1)</script>")
    odd = Path(two_runs[0]).with_name("a<b>&c")
    Path(two_runs[0]).rename(odd)
    _, page = compare([str(odd), two_runs[1]])
    html = page.read_text("utf-8")
    assert "<script" not in html and "<b>" not in html
    assert "&lt;script&gt;" in html and "a&lt;b&gt;&amp;c" in html


def test_runs_of_the_same_name_are_told_apart(two_runs):
    """`try1/run` and `try2/run` are both called run."""
    moved = []
    for folder in two_runs:
        target = Path(folder).parent / f"in_{Path(folder).name}" / "run"
        target.parent.mkdir()
        Path(folder).rename(target)
        moved.append(str(target))
    assert [run.name for run in read_runs(moved)] == moved


def test_a_run_that_has_not_come_to_its_end(two_runs):
    """Comparing after notebook 04 is what people do first."""
    for number in ("05", "06"):
        (Path(two_runs[1]) / "outputs" / "run_cards" / f"{number}.json").unlink()
    text, _ = compare(two_runs)
    assert "second: not run" in text and "second: not evaluated" in text


def test_wrong_folders_are_named(tmp_path, two_runs):
    """The sentence says which folder is no run."""
    with pytest.raises(WorkshopError, match="at least two"):
        compare(two_runs[:1])
    with pytest.raises(WorkshopError, match="nothing here holds no run cards"):
        compare([two_runs[0], str(tmp_path / "nothing here")])
