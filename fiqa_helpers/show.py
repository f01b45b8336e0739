"""Tokens and answers as a reader sees them: escaped HTML in a notebook, plain text everywhere else."""

import base64
import contextlib
import html
import os
import sys
import textwrap
from collections.abc import Mapping, Sequence

from fiqa_helpers.base import is_interactive
from fiqa_helpers.rows import IGNORE_INDEX

# Dark text on a light ground of its own, readable in a light and in a dark JupyterLab, and in grey.
_TRAINED = "padding:0 1px;background:#ffe08a;color:#111;font-weight:bold;text-decoration:underline"
_READ = "padding:0 1px;border:1px dotted #888"
_STRIP = "line-height:1.9;font-family:monospace;overflow-wrap:anywhere"
_TABLE = "width:100%;table-layout:fixed;color:inherit;text-align:left;vertical-align:top"
_CELL = "text-align:left;vertical-align:top;white-space:pre-wrap;overflow-wrap:break-word"
# For a whole page: JupyterLab's own rule breaks lines inside numbers; pictures turn dark with the theme.
_PAGE = (
    "<style>.jp-Notebook .jp-OutputArea-output pre{word-break:normal} .fiqa-picture{max-width:100%} "
    '[data-jp-theme-light="false"] .fiqa-picture{filter:invert(.93) hue-rotate(180deg)}</style>'
)
_TEXT_WIDTH = 100  # characters of a line in the plain-text form


class Shown:
    """Something to display: JupyterLab takes the HTML, a terminal, a diff or a screen reader the text."""

    def __init__(self, html: str, text: str):
        self.html, self.text = html, text

    def _repr_mimebundle_(self, **_: object) -> dict[str, str]:
        return {"text/html": self.html, "text/plain": self.text}


class Picture(Shown):
    """A PNG to display, with its alternative text wherever it is shown.

    JupyterLab gives a PNG the text "Image", so a person gets an <img> as well.
    """

    def __init__(self, png: bytes, alt: str):
        self.png = base64.b64encode(png).decode()
        image = f'alt="{html.escape(alt)}" src="data:image/png;base64,{self.png}"'
        super().__init__(f'<img class="fiqa-picture" {image}>', alt)

    def _repr_mimebundle_(self, **_: object) -> tuple[dict, dict]:
        shown = super()._repr_mimebundle_() if is_interactive() else {"text/plain": self.text}
        return shown | {"image/png": self.png}, {"image/png": {"alt": self.text}}


def escape(text: str) -> str:
    """`text` as inert HTML: no tags, no control characters, and no formulas out of dollar amounts.

    JupyterLab typesets what stands between two dollar signs as mathematics, which eats sentences such as
    "from $80 to $95". A dollar sign in an element of its own is left alone
    (https://docs.mathjax.org/en/stable/input/tex/delimiters.html).
    """
    return html.escape(printable(text)).replace("$", "<span>$</span>").replace("\\", "<span>\\</span>")


def printable(text: str) -> str:
    """`text` with control and direction-changing characters replaced by the sign for unknown characters."""
    return "".join(sign if sign.isprintable() or sign in "\n\t" else "\ufffd" for sign in text)


def tokens(row: Mapping[str, Sequence[int]], tokenizer) -> Shown:
    """An encoded row (`input_ids`, `labels`) token by token; those that carry loss stand out.

    They are bold, underlined and on a ground of their own in HTML, and in [brackets] in text, so nothing
    depends on colour. `·` is a space that belongs to its token, `↵` a line break.
    """
    trained = [label != IGNORE_INDEX for label in row["labels"]]
    caption = f"{sum(trained)} of {len(trained)} tokens carry loss, those"
    marked, plain = [], []
    for token, carries_loss in zip(row["input_ids"], trained, strict=True):
        text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
        text = printable(text.replace("\n", "↵").replace(" ", "·"))
        # <u> survives where style attributes are stripped
        tag, style = ("u", _TRAINED) if carries_loss else ("span", _READ)
        marked.append(f'<{tag} style="{style}">{escape(text)}</{tag}>')
        plain.append(f"[{text}]" if carries_loss else text)
    page = f'<p>{caption} <u style="{_TRAINED}">bold and underlined</u>; the others are only read.</p>'
    page += f'<p style="{_STRIP}">{"&#8203;".join(marked)}</p>'
    strip = textwrap.fill("".join(plain), _TEXT_WIDTH, break_on_hyphens=False)
    return Shown(page, f"{caption} in [brackets]; the others are only read.\n{strip}")


def answers(
    questions: Sequence[str],
    columns: Mapping[str, Sequence],
    caption: str = "Answers side by side",
) -> Shown:
    """One row per question, one column per entry of `columns` (name -> an answer for each question).

    Under every generated answer (`generate.Answer`) stands whether the model ended it and how long it is;
    text that is a plain `str`, such as a reference answer, stands alone.

    Raises:
        ValueError: a column has not one answer for each question.
    """
    heads = "".join(f'<th scope="col" style="{_CELL}">{escape(name)}</th>' for name in ["Question", *columns])
    body, text = "", [caption]
    for number, (question, *row) in enumerate(zip(questions, *columns.values(), strict=True), 1):
        body += f'<tr><th scope="row" style="{_CELL}">{escape(question)}</th>'
        text.append(f"\n{number}. {printable(question)}")
        for name, answer in zip(columns, row, strict=True):
            said, how = (answer, "") if isinstance(answer, str) else (answer.text, f" ({ending(answer)})")
            note = f"<br><i>{how}</i>" if how else ""
            body += f'<td style="{_CELL}">{escape(said) or "<i>(nothing)</i>"}{note}</td>'
            lines = textwrap.fill(printable(said) or "(nothing)", _TEXT_WIDTH - 4)
            text.append(f"  {name}{how}:\n{textwrap.indent(lines, '    ')}")
        body += "</tr>"
    page = f'<table style="{_TABLE}"><caption style="text-align:left">{escape(caption)}</caption>'
    page += f'<col style="width:20%"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>'
    return Shown(page, "\n".join(text))


def ending(answer) -> str:
    """How a generated answer ended: "stopped by itself after 34 tokens", "cut off at 48 tokens"."""
    how = "stopped by itself after" if answer.stopped else "cut off at"
    return f"{how} {answer.n_tokens} token{'' if answer.n_tokens == 1 else 's'}"


def style_page() -> None:
    """Give JupyterLab's page the look that outputs need; for a notebook that a person sees live."""
    from IPython.display import HTML, display

    display(HTML(_PAGE))


def show_line(text: str) -> None:
    """Write one line to the process's stderr, past the notebook, which would keep every line as output."""
    terminal = getattr(sys.stderr, "_original_stdstream_copy", None)  # ipykernel has put a pipe in its place
    with contextlib.suppress(OSError):  # the terminal was closed, and the training has a checkpoint to write
        os.write(terminal or sys.__stderr__.fileno(), f"{text}\n".encode())


def answer_clicks_while_busy(widget) -> None:
    """Let a widget's events run while a cell is running.

    ipykernel 7.4 sends an event to the thread that last used the widget's channel, which is the busy one;
    without that route it takes the frontend's own, a subshell thread. Older versions have no such route.
    """
    getattr(widget.comm, "__dict__", {})["_reply_subshell_for"] = lambda data, default: default
