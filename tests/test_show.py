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


def page(shown: show.Shown) -> Page:
    return Page(shown._repr_mimebundle_()["text/html"])


@pytest.fixture
def row(tiny_tokenizer) -> dict:
    return rows.encode("Is $5 < $7 & why?", "Yes: $5 <b>is</b> less.\nTruly.", tiny_tokenizer)


def test_trained_tokens_are_marked_without_colour(row, tiny_tokenizer):
    """Stripped of its styles (GitHub, a grey print) the strip must still say which tokens carry loss."""
    bare = Page(re.sub(r"""style=(".*?"|'.*?')""", "", show.tokens(row, tiny_tokenizer).html))
    trained = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    wanted = tiny_tokenizer.decode(trained).replace(" ", "·").replace("\n", "↵")
    assert bare.underlined.removeprefix("bold and underlined") == wanted
    assert wanted.endswith(tiny_tokenizer.eos_token)


def test_text_form_brackets_the_trained_tokens(row, tiny_tokenizer):
    """A terminal and a screen reader get no HTML: nothing may be lost there."""
    shown = show.tokens(row, tiny_tokenizer)
    head, strip = repr(shown).split("\n", 1)
    strip = strip.replace("\n", "")
    n = sum(label != -100 for label in row["labels"])
    assert head.startswith(f"{n} of {len(row['labels'])} tokens carry loss")
    assert len(re.findall(r"\[[^\[\]]*\]", strip)) == n
    assert strip.endswith(f"[{tiny_tokenizer.eos_token}]")
    assert "Answer:[·Yes]" in strip
    assert max(map(len, repr(shown).splitlines()[1:])) <= 100


def test_hidden_tokens_are_counted_and_said(row, tiny_tokenizer):
    """A strip that silently begins in the middle would look like the whole row."""
    whole, part = show.tokens(row, tiny_tokenizer), show.tokens(row, tiny_tokenizer, hide_first=27)
    assert "The first 27 tokens are left out here." in part.text
    assert "left out" not in whole.text
    assert len(page(part).text) < len(page(whole).text)
    assert part.text.split(" tokens carry")[0] == whole.text.split(" tokens carry")[0]


def test_characters_cut_between_tokens_do_not_break_the_page(tiny_tokenizer):
    """A byte-level token may be a third of a character: decoding it alone gives no valid text."""
    row = rows.encode("€ or 元?", "Both 🏦.", tiny_tokenizer)
    shown = show.tokens(row, tiny_tokenizer)
    shown.html.encode("utf-8")
    assert page(shown).open == []


HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</td></table><h1>broken out</h1>",
    "& &lt; \"quoted\" 'single'",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_generated_text_is_never_markup(text):
    """A notebook renders HTML: markup in an answer, a question or a name would run or break the table."""
    answers = show.answers([text], {text: [Answer(text, True, 3)], "reference": [text]}, caption=text)
    seen = page(answers)
    assert seen.open == []
    assert not {"script", "img", "h1"} & set(seen.tags)
    assert seen.tags.count("table") == 1
    assert seen.text.count(text) == 5
    assert answers.text.count(text) == 5


def test_dollars_are_not_formulas():
    """MathJax joins what stands between two dollar signs of one text: "from $80 to $95" lost its words."""
    shown = show.answers(["q"], {"m": [Answer("from $80 to $95, or \\(x\\)", True, 9)]})
    assert not re.search(r"\$[^<]", shown.html)
    assert "\\(" not in shown.html
    assert "from $80 to $95, or \\(x\\)" in page(shown).text


def test_control_characters_are_made_visible():
    """A terminal obeys escape sequences in the text form, and bidi marks turn a line around."""
    shown = show.answers(["q"], {"m": [Answer("a\x1b[31mred\u202eback\nnext", True, 9)]})
    for form in (shown.text, shown.html):
        assert "\x1b" not in form
        assert "\u202e" not in form
        assert form.count("\ufffd") == 2


def test_each_answer_says_how_it_ended():
    """Cut off and stopped look alike in the text alone, and whether a model stops is half the story."""
    shown = show.answers(
        ["one", "two"],
        {"base": [Answer("", True, 1), Answer("x", False, 48)], "reference": ["r1", ""]},
    )
    for form in (page(shown).text, shown.text):
        assert "stopped by itself after 1 token" in form
        assert "1 tokens" not in form
        assert "cut off at 48 tokens" in form
        assert form.count("(nothing)") == 2
        assert form.count("token") == 2, "a reference did not end by itself"


def test_a_missing_answer_is_an_error():
    """A shorter column must not shift answers to other questions."""
    with pytest.raises(ValueError):
        show.answers(["one", "two"], {"base": [Answer("x", True, 1)]})


def test_table_reads_aloud():
    """A screen reader announces rows and columns from scoped headers and the caption."""
    shown = show.answers(["q1"], {"base": ["a"], "tuned": ["b"]}, caption="Greedy")
    assert shown.html.count('scope="col"') == 3
    assert shown.html.count('scope="row"') == 1
    assert "<caption" in shown.html
    assert "Greedy" in page(shown).text
