"""What readers see of tokens and answers: marked without colour alone, escaped, readable as plain text."""

import os
import re
import sys

import pytest
from bs4 import BeautifulSoup

from fiqa_helpers import rows, show
from fiqa_helpers.generate import Answer


def page_of(shown: show.Shown) -> BeautifulSoup:
    """The page as a browser reads it."""
    return BeautifulSoup(shown.html, "html.parser")


def test_trained_tokens_are_marked_without_colour(tiny_tokenizer):
    """Without styles (GitHub) or HTML (a terminal), it must still say which tokens carry loss."""
    row = rows.encode("Is $5 < $7 & why?", "Yes: $5 <b>is</b> less.\nTruly 🏦.", tiny_tokenizer)
    shown = show.tokens(row, tiny_tokenizer)
    _, *underlined = page_of(shown).find_all("u")  # the first explains it
    trained = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    tokens = [tiny_tokenizer.decode([i]).replace(" ", "·").replace("\n", "↵") for i in trained]
    assert [mark.get_text() for mark in underlined] == tokens and tokens[-1] == tiny_tokenizer.eos_token
    head, *strip = shown.text.split("\n")
    assert head.startswith(f"{len(trained)} of {len(row['labels'])} tokens carry loss")
    assert "".join(strip).endswith("Answer:" + "".join(f"[{token}]" for token in tokens))


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script> <img src=x onerror=alert(1)>",
        "</td></table><h1>broken out</h1> & &lt; \"quoted\" 'single'",
        "from $80 to $95, or \\(x\\)",  # MathJax would make formulas of it
    ],
)
def test_generated_text_is_never_markup(text):
    """A notebook renders HTML: markup in an answer, a question or a name would run or break the table."""
    answers = show.answers([text], {text: [Answer(text, True, 3)], "reference": [text]}, caption=text)
    page = page_of(answers)
    assert not page.find_all(["script", "img", "h1"]) and len(page.find_all("table")) == 1
    assert page.get_text().count(text) == answers.text.count(text) == 5
    assert not re.search(r"\$[^<]|\\\(", answers.html)


def test_control_characters_are_made_visible():
    """A terminal obeys escape sequences in the text form, and bidi marks turn a line around."""
    shown = show.answers(["q"], {"m": [Answer("a\x1b[31mred\u202eback\nnext", True, 9)]})
    for form in (shown.text, shown.html):
        assert "\x1b" not in form and "\u202e" not in form and form.count("\ufffd") == 2


def test_each_answer_says_how_it_ended():
    """Whether a model stops is half the story; a reference did not end by itself."""
    shown = show.answers(
        ["one", "two"], {"base": [Answer("", True, 1), Answer("x", False, 48)], "r": ["", "y"]}
    )
    for form in (page_of(shown).get_text(), shown.text):
        assert form.count("(nothing)") == 2 and form.count("token") == 2
        assert "stopped by itself after 1 token)" in form and "cut off at 48 tokens)" in form


def test_a_closed_terminal_stops_nothing(monkeypatch):
    """ssh broke off: the line of progress raised an error before the training had saved its checkpoint."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as gone:
        monkeypatch.setattr(sys, "__stderr__", gone)
        show.show_line("step 1 of 24")
