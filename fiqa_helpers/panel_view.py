"""What the live panel looks like while it runs: HTML and SVG, from plain values only.

Heights never depend on content, colours follow JupyterLab's theme, and the curves differ in marker and dash,
not in colour alone; in half a window or on a phone the parts stand below one another. Figures and answers are
two pieces, so that an answer someone reads, scrolls or marks is left alone until there is a new one. The
picture that stays is drawn in panel_picture.py.
"""

import math
from dataclasses import dataclass, field

from fiqa_helpers.panel_chart import BLUE, ORANGE, draw_charts
from fiqa_helpers.show import escape, printable


@dataclass
class View:
    """Everything that is drawn: seconds, GiB, nats per answer token; None where nothing is known yet."""

    title: str
    phase: str
    step: int
    total: int
    stopped: str | None = None  # why it ended early
    failed: str | None = None  # the name of the exception
    ended: bool = False
    elapsed: float = 0.0
    left: float | None = None
    step_seconds: float | None = None  # how long a step takes
    step_elapsed: float = 0.0  # of the step that runs now
    memory_of: str = "Memory"
    history: list[dict] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)
    untuned: dict | None = None
    latest: dict | None = None
    resumed_at: int = 0
    note: str = ""

    @property
    def outcome(self) -> str:
        """How it stands: "finished 12 steps", "stopped at step 7 of 12 (Stop button)"."""
        where = f"step {self.step} of {self.total}"
        if self.failed:
            return f"failed at {where} ({self.failed})"
        if self.stopped:
            return f"stopped at {where} ({self.stopped})"
        return f"finished {self.step} steps" if self.ended else f"{self.phase}, {where}"

    def points(self, name: str) -> list[tuple[int, float]]:
        """The (step, value) pairs of one column of the history."""
        return [(row["step"], row[name]) for row in self.history if name in row]

    def last(self, name: str) -> float | None:
        """The latest value of a column."""
        return next((row[name] for row in reversed(self.history) if name in row), None)


def clock(seconds: float | None) -> str:
    """Seconds as "48 s", "3:07" or "2:03:07"; a dash when unknown."""
    if seconds is None:
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def describe(view: View) -> str:
    """The panel in one line, for those who can't see the picture: how far it is and what the losses did."""
    parts = [f"{view.title}: {view.outcome}, {clock(view.elapsed)}"]
    for name, words in (("loss", "training loss"), ("eval_loss", "validation loss")):
        values = view.points(name)
        if values:
            parts.append(f"{words} {values[0][1]:.3f} -> {values[-1][1]:.3f}")
    if view.resumed_at:
        parts.append(f"resumed at step {view.resumed_at}")
    if view.note:
        parts.append(view.note)
    return _one_line("; ".join(parts))


def draw_line(view: View) -> str:
    """One line of plain text for a terminal."""
    words = [f"{view.title}: {view.phase}, step {view.step}/{view.total}"]
    figures = (("loss", "loss {:.3f}"), ("eval_loss", "validation {:.3f}"), ("learning_rate", "lr {:.2e}"),
               ("tokens_per_second", "{:,.0f} tokens/s"), ("memory_gib", "{:.1f} GiB"))  # fmt: skip
    words += [form.format(view.last(name)) for name, form in figures if view.last(name) is not None]
    words.append(f"{clock(view.elapsed)} so far")
    if view.left is not None:
        words.append(f"about {clock(view.left)} left")
    return _one_line(", ".join(words))


def _one_line(text: str) -> str:
    """Without line breaks and terminal escapes: an error's message may hold them."""
    return printable(" ".join(text.split()))


def _tiles(view: View) -> str:
    validation = [(value, step) for step, value in view.points("eval_loss") if math.isfinite(value)]
    best = "best {:.3f} at step {}".format(*min(validation)) if validation else "not measured yet"
    memory = [value for _, value in view.points("memory_gib")]
    first, rates = view.points("loss"), [value for _, value in view.points("learning_rate")]
    peak_rate = f"highest {max(rates):.2e}" if rates else ""
    tiles = (
        ("Training loss", view.last("loss"), "{:.3f}", f"began at {first[0][1]:.3f}" if first else ""),
        ("Validation loss", view.last("eval_loss"), "{:.3f}", best),
        ("Learning rate", view.last("learning_rate"), "{:.2e}", peak_rate),
        ("Tokens a second", view.last("tokens_per_second"), "{:,.0f}", "padding not counted"),
        (
            view.memory_of,
            view.last("memory_gib"),
            "{:.1f} GiB",
            f"peak {max(memory):.1f} GiB" if memory else "",
        ),
    )
    return "".join(
        f"<div><i>{name}</i><b>{'–' if value is None else form.format(value)}</b><i>{small}</i></div>"
        for name, value, form, small in tiles
    )


def _answer(sample: dict | None, index: int, waiting: str) -> str:
    if sample is None:
        return f"<p class=w>{waiting}</p>"
    end = "ended by itself" if sample["stopped"][index] else "cut at the length limit"
    text = escape(sample["texts"][index]) or "<em>(an empty answer)</em>"
    return f"<p tabindex=0><small>{end}</small>{text}</p>"


def draw_answers(view: View) -> str:
    """The questions, each with the untuned model's answer and the latest one, as HTML."""
    step = f"at step {view.latest['step']}" if view.latest else "while it learns"
    rows = [
        "<div class='h first'>Question</div><div class=h>The untuned model</div>"
        f"<div class=h>The model {step}</div>"
    ]
    for index, question in enumerate(view.questions):
        rows.append(f"<p class=q>{escape(question)}</p>")
        rows.append(_answer(view.untuned, index, "no answer yet"))
        rows.append(_answer(view.latest, index, "no sample yet"))
    return f"<div class=samples>{''.join(rows)}</div>"


def draw_figures(view: View) -> str:
    """Progress, figures and curves as HTML; every piece of text that comes from outside is escaped."""
    share = 100 * view.step / max(view.total, 1)
    goal = 100 * min(view.step + 1, view.total) / max(view.total, 1)
    creep = ""
    if view.step_seconds:  # between two drawings the browser moves the bar on, at the speed of the last step
        creep = f"animation:fiqa-creep {view.step_seconds:.1f}s linear -{view.step_elapsed:.1f}s forwards;"
    left = f"about {clock(view.left)} left" if view.left is not None else "time left: known after one step"
    resumed = f" · resumed at step {view.resumed_at}" if view.resumed_at else ""
    status = escape(_one_line(view.note or view.phase))
    bar = f"--from:{share:.2f}%;--to:{goal:.2f}%;width:{share:.2f}%;{creep}"
    aria = (
        f'aria-label="optimizer steps" aria-valuemin=0 aria-valuemax={view.total} aria-valuenow={view.step}'
    )
    return (
        f'<div class=bar role=progressbar {aria}><u style="{bar}"></u></div>'
        f"<div class=when><span>step {view.step} of {view.total}{resumed} · {status}</span>"
        f"<span>{clock(view.elapsed)} so far · {left}</span></div>"
        f"<div class=tiles>{_tiles(view)}</div>{draw_charts(view, describe(view))}"
    )


def draw_title(view: View) -> str:
    """The panel's heading as HTML."""
    return f"<b>{escape(view.title)}</b>"


# The class names `fiqa-` are on the widgets around the pieces, see panel_output.py.
STYLE = f"""
.fiqa-panel{{--ink:var(--jp-ui-font-color1,#1f2328);--soft:var(--jp-ui-font-color2,#59636e);
--line:var(--jp-border-color2,#d0d7de);--card:var(--jp-layout-color2,#f6f8fa);box-sizing:border-box;
width:100%;max-width:920px;margin:2px 0;padding:12px 18px;border:1px solid var(--line);border-radius:8px;
color:var(--ink);container-type:inline-size}}
.fiqa-panel .widget-html{{width:auto;margin:0}}
.fiqa-panel .widget-html-content{{min-width:0;font:13px/1.4 var(--jp-ui-font-family,system-ui,sans-serif)}}
.fiqa-panel .widget-html-content *{{box-sizing:border-box}}
.fiqa-panel .fiqa-head{{align-items:center;margin-bottom:6px;overflow:hidden}}
.fiqa-panel .fiqa-head .widget-html{{flex:1 1 260px;min-width:0;font-size:15px}}
.fiqa-panel .fiqa-head b{{font-size:15px}}
.fiqa-panel .fiqa-head .jupyter-button{{margin:2px 0 2px 8px}}
.fiqa-panel .bar{{height:8px;border-radius:4px;background:var(--line);overflow:hidden}}
.fiqa-panel .bar u{{display:block;height:8px;border-radius:4px;background:{BLUE}}}
@keyframes fiqa-creep{{from{{width:var(--from)}}to{{width:var(--to)}}}}
@media (prefers-reduced-motion:reduce){{.fiqa-panel .bar u{{animation:none!important}}}}
.fiqa-panel .when{{display:flex;gap:16px;height:26px;padding-top:4px;color:var(--soft);white-space:nowrap;
font-variant-numeric:tabular-nums}}
.fiqa-panel .when span:first-child{{flex:1;min-width:0;overflow:hidden;text-overflow:ellipsis}}
.fiqa-panel .tiles{{display:grid;grid-template-columns:repeat(5,1fr);gap:8px;margin:4px 0 12px}}
.fiqa-panel .tiles div{{min-width:0;height:66px;padding:6px 10px;border-radius:6px;background:var(--card)}}
.fiqa-panel .tiles b{{display:block;font-size:18px;line-height:23px;font-weight:600;
font-variant-numeric:tabular-nums}}
.fiqa-panel .tiles i{{display:block;font-style:normal;font-size:11px;line-height:15px;color:var(--soft);
white-space:nowrap;overflow:hidden;text-overflow:ellipsis}}
.fiqa-panel .charts{{display:grid;grid-template-columns:560fr 284fr;gap:8px 40px}}
.fiqa-panel .charts>div{{min-width:0}}
.fiqa-panel header{{display:flex;flex-wrap:wrap;justify-content:space-between;gap:0 12px}}
.fiqa-panel .key{{display:flex;align-items:center;gap:0 5px;font-size:12px;color:var(--soft)}}
.fiqa-panel .key svg:not(:first-child){{margin-left:10px}}
.fiqa-panel svg{{overflow:visible;font-family:inherit}}
.fiqa-panel .charts>div>svg{{display:block;width:100%}}
.fiqa-panel .n{{font-size:11.5px;fill:var(--soft)}}
.fiqa-panel .e{{text-anchor:end}} .fiqa-panel .m{{text-anchor:middle}}
.fiqa-panel .g{{stroke:var(--line);stroke-width:1}} .fiqa-panel .a{{stroke:var(--soft);stroke-width:1}}
.fiqa-panel .o{{fill:none;stroke:{BLUE};stroke-width:1.3}}
.fiqa-panel .s{{fill:none;stroke:{BLUE};stroke-width:2.6;stroke-linejoin:round}}
.fiqa-panel .v{{fill:none;stroke:{ORANGE};stroke-width:2;stroke-dasharray:7 4}}
.fiqa-panel .d{{fill:{ORANGE};stroke:none}} .fiqa-panel .r{{fill:none;stroke:var(--soft);stroke-width:2}}
.fiqa-panel .x{{fill:none;stroke:var(--jp-error-color1,#d1242f);stroke-width:2}}
.fiqa-panel .samples{{display:grid;grid-template-columns:2fr 3.4fr 3.4fr;gap:0 16px;margin-top:8px}}
.fiqa-panel .h{{padding-bottom:3px;font-weight:600;border-bottom:1px solid var(--line)}}
.fiqa-panel .samples p{{height:91px;margin:0;padding:5px 0 0;overflow:auto;
border-bottom:1px solid var(--line);
font-size:12px;line-height:17px;white-space:pre-wrap;overflow-wrap:anywhere}}
.fiqa-panel .samples .q{{font-weight:600}} .fiqa-panel .samples .w{{color:var(--soft)}}
.fiqa-panel small{{float:right;height:17px;margin-left:8px;padding:0 6px;border:1px solid var(--line);
border-radius:8px;font-size:11px;line-height:15px;color:var(--soft);white-space:nowrap}}
@container (max-width:640px){{
.fiqa-panel .tiles{{grid-template-columns:repeat(3,1fr)}}
.fiqa-panel .charts{{grid-template-columns:1fr}}
.fiqa-panel .charts>div:last-child{{max-width:300px}}
.fiqa-panel .samples{{grid-template-columns:1fr 1fr}}
.fiqa-panel .first{{display:none}}
.fiqa-panel .samples .q{{grid-column:1/-1;height:auto;border:none}}
.fiqa-panel .samples p:not(.q){{height:125px}}}}
@container (max-width:440px){{
.fiqa-panel .when{{flex-direction:column;gap:0;height:44px}}
.fiqa-panel .when span:first-child{{flex:none}}
.fiqa-panel .tiles{{grid-template-columns:1fr 1fr}}
.fiqa-panel .tiles div{{padding:6px}}
.fiqa-panel .charts>div:first-child .n{{font-size:20px}}
.fiqa-panel .charts>div:first-child .below{{display:none}}
.fiqa-panel small{{float:none;display:block;width:fit-content;max-width:100%;margin:0 0 2px;padding:0 4px;
overflow:hidden;text-overflow:ellipsis}}
.fiqa-panel .samples p:not(.q){{height:176px}}}}
""".replace("\n", "")
