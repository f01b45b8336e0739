"""What readers see of tokens and answers: marked without colour alone, escaped, readable as plain text."""

import re
from html.parser import HTMLParser

import pytest

from fiqa_helpers import rows, show
from fiqa_helpers.generate import Answer


class Page(HTMLParser):
    """Text and tags as a browser reads them."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.open, self.text, self.underlined = [], [], "", ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("br", "col"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        self.text += data
        if "u" in self.open:
            self.underlined += data


@pytest.fixture
def row(tiny_tokenizer) -> dict:
    return rows.encode("Is $5 < $7 & why?", "Yes: $5 <b>is</b> less.\nTruly 🏦.", tiny_tokenizer)


def test_trained_tokens_are_marked_without_colour(row, tiny_tokenizer):
    """Without styles (GitHub) or HTML (a terminal), it must still say which tokens carry loss."""
    shown = show.tokens(row, tiny_tokenizer)
    bare = Page(re.sub(r"""style=(".*?"|'.*?')""", "", shown.html))
    trained = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    tokens = [tiny_tokenizer.decode([i]).replace(" ", "·").replace("\n", "↵") for i in trained]
    assert bare.underlined.removeprefix("bold and underlined") == "".join(tokens)
    assert tokens[-1] == tiny_tokenizer.eos_token
    head, *strip = repr(shown).split("\n")
    assert head.startswith(f"{len(trained)} of {len(row['labels'])} tokens carry loss")
    assert "".join(strip).endswith("Answer:" + "".join(f"[{token}]" for token in tokens))
    assert max(map(len, strip)) <= 100


def test_hidden_tokens_are_counted_and_said(row, tiny_tokenizer):
    """A strip that silently begins in the middle would look like the whole row."""
    whole, part = show.tokens(row, tiny_tokenizer), show.tokens(row, tiny_tokenizer, hide_first=27)
    assert "The first 27 tokens are left out here." in part.text and "left out" not in whole.text
    assert len(Page(part.html).text) < len(Page(whole.html).text)
    assert part.text.split(" tokens carry")[0] == whole.text.split(" tokens carry")[0]


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "</td></table><h1>broken out</h1>",
        "& &lt; \"quoted\" 'single'",
        "from $80 to $95, or \\(x\\)",  # MathJax would make formulas of it
    ],
)
def test_generated_text_is_never_markup(text):
    """A notebook renders HTML: markup in an answer, a question or a name would run or break the table."""
    answers = show.answers([text], {text: [Answer(text, True, 3)], "reference": [text]}, caption=text)
    seen = Page(answers.html)
    assert not {"script", "img", "h1"} & set(seen.tags) and seen.tags.count("table") == 1
    assert seen.text.count(text) == answers.text.count(text) == 5
    assert not re.search(r"\$[^<]|\\\(", answers.html)


def test_control_characters_are_made_visible():
    """A terminal obeys escape sequences in the text form, and bidi marks turn a line around."""
    shown = show.answers(["q"], {"m": [Answer("a\x1b[31mred\u202eback\nnext", True, 9)]})
    for form in (shown.text, shown.html):
        assert "\x1b" not in form and "\u202e" not in form
        assert form.count("\ufffd") == 2


def test_each_answer_says_how_it_ended_and_the_table_reads_aloud():
    """Whether a model stops is half the story; a screen reader announces headers and the caption."""
    columns = {"base": [Answer("", True, 1), Answer("x", False, 48)], "reference": ["r1", ""]}
    shown = show.answers(["one", "two"], columns, caption="Greedy")
    for form in (Page(shown.html).text, shown.text):
        assert "Greedy" in form and form.count("(nothing)") == 2
        assert "stopped by itself after 1 token)" in form and "cut off at 48 tokens)" in form
        assert form.count("token") == 2, "a reference did not end by itself"
    assert shown.html.count('scope="col"') == 3 and shown.html.count('scope="row"') == 2
    with pytest.raises(ValueError):  # a shorter column must not shift answers to other questions
        show.answers(["one", "two"], {"base": [Answer("x", True, 1)]})
