"""The live panel over real, small training runs; in a browser it is tested in tests/browser/."""

import json
import math
import os
import re
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from panel_training import QUESTIONS, Answer, make_model, make_trainer, sampler

from fiqa_helpers.base import WorkshopError
from fiqa_helpers.machinery.live import (
    STYLE,
    View,
    clock,
    describe,
    draw_answers,
    draw_figures,
    draw_line,
    draw_png,
    draw_title,
    limits,
    smooth,
    ticks,
)
from fiqa_helpers.show import printable

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> \"quoted\" & $x_1$ 'single' </p></div>"


def draw_html(view: View) -> str:
    """The panel's three pieces as one page."""
    return draw_title(view) + draw_figures(view) + draw_answers(view)


def run_with_panel(folder, steps=8, resume=None, answer=None, before=None, **options):
    """Train the small model under a panel; returns panel, trainer and model."""
    from fiqa_helpers.machinery.live import LivePanel

    model = make_model()
    panel = LivePanel(QUESTIONS, answer or sampler(model), 4, "Small", folder / "picture.png", live=False)
    trainer = make_trainer(folder, [panel], steps, model=model, **options)
    if before:
        before(panel, trainer)
    with panel:
        trainer.train(resume_from_checkpoint=resume)
    return panel, trainer, model


def adapter(model) -> dict:
    """The adapter's tensors, by name."""
    return {name: value.detach().clone() for name, value in model.named_parameters() if "lora" in name}


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(left[name].equal(right[name]) for name in left)


def notebook_file(folder: Path, sources: dict[str, str]) -> Path:
    setup = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})"
    cells = [
        nbformat.v4.new_code_cell(source, id=name) for name, source in {"path": setup, **sources}.items()
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    path = folder / "panel.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)
    return path


TRAIN = """
import panel_training as t
from fiqa_helpers.machinery.live import LivePanel
model = t.make_model()
panel = LivePanel(t.QUESTIONS, t.sampler(model), 4, "Small")
trainer = t.make_trainer({run!r}, [panel], steps={steps}, seconds={seconds}, model=model, eval_on_start=True)
"""


# What stays in a notebook


def test_headless_leaves_one_picture_one_text_and_lines_on_stderr(tmp_path):
    """Under papermill, progress could pile up as outputs, widgets leave state, or nobody see a thing."""
    make = TRAIN.format(run=str(tmp_path / "run"), steps=24, seconds=0.7)
    path = notebook_file(tmp_path, {"make": make, "train": "with panel:\n    trainer.train();"})
    environment = {name: value for name, value in os.environ.items() if name != "JPY_SESSION_NAME"}
    done = subprocess.run(
        [sys.executable, "-m", "papermill", path, tmp_path / "out.ipynb", "--no-progress-bar"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    notebook = nbformat.read(tmp_path / "out.ipynb", 4)
    train = next(cell for cell in notebook.cells if cell["id"] == "train")
    assert [(out.output_type, sorted(out.data)) for out in train.outputs] == [
        ("display_data", ["text/plain"]),
        ("display_data", ["image/png", "text/plain"]),
    ]
    text, picture = train.outputs
    assert re.match(r"Small: finished 24 steps, [\d:]+( s)?; training loss .* -> .*", text.data["text/plain"])
    assert picture.metadata["image/png"]["alt"] == text.data["text/plain"]
    assert len(json.dumps(train.outputs)) <= 100_000
    assert "widgets" not in notebook.metadata
    lines = re.findall(r"Small: .*?, step (\d+)/24, .* so far", done.stderr)
    assert 2 <= len(lines) <= 2 + seconds_of(train) / 10, (
        done.stderr
    )  # at the beginning and every ten seconds
    assert "step" not in done.stdout


def seconds_of(cell) -> float:
    """How long papermill says that a cell ran."""
    return cell.metadata["papermill"]["duration"]


def test_interrupt_in_a_real_kernel_lets_the_next_cell_run(tmp_path):
    """The interrupt could end in a traceback, or leave the panel unusable for the cells that follow."""
    from jupyter_client.manager import start_new_kernel

    make = TRAIN.format(run=str(tmp_path / "run"), steps=200, seconds=0.5)
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(tmp_path))
    try:

        def run(code: str, on_output=None) -> list:
            outputs = []

            def keep(message):
                if message["msg_type"] in ("stream", "display_data", "error"):
                    outputs.append(message)

            reply = client.execute_interactive(code, timeout=120, output_hook=keep)
            return [reply["content"]["status"], outputs]

        assert run(f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n{make}")[0] == "ok"
        timer = threading.Timer(6, manager.interrupt_kernel)
        timer.start()
        status, outputs = run("with panel:\n    trainer.train()")
        assert status == "ok" and [out["msg_type"] for out in outputs] == ["display_data", "display_data"]
        status, outputs = run("print(panel.stopped, panel.step == trainer.state.global_step, panel.outcome)")
        assert status == "ok"
        assert re.match(r"interrupted True stopped at step \d+ of 200", outputs[0]["content"]["text"])
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_trainers_own_progress_is_gone(tmp_path, capsys):
    """Trainer prints a dict per log line with disable_tqdm, and draws a table in notebooks without it."""
    run_with_panel(tmp_path, steps=4)
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and out.startswith("Small: finished 4 steps")


# What the training learns


def test_sampling_does_not_change_the_training(tmp_path):
    """Sampling at a temperature draws from the global random state: dropout and row order would change."""
    panel, _, sampled = run_with_panel(tmp_path / "with")
    model = make_model()
    make_trainer(tmp_path / "without", [], 8, model=model).train()
    assert len({tuple(sample["texts"]) for sample in panel.samples}) == 3  # it did sample, and differently
    assert same(adapter(sampled), adapter(model))


def test_sampling_leaves_mode_and_random_states_as_they_were():
    """Dropout could stay switched off after a sample, or a step draw other numbers than without it."""
    import random

    import numpy
    import torch

    from fiqa_helpers.machinery.live import undisturbed

    def drawn():
        return random.random(), numpy.random.random(), torch.rand(1).item()

    model = make_model().train()
    torch.manual_seed(3), numpy.random.seed(3), random.seed(3)
    expected = drawn()
    torch.manual_seed(3), numpy.random.seed(3), random.seed(3)
    with pytest.raises(StopIteration), undisturbed(model):
        assert not model.training
        drawn()
        raise StopIteration
    assert model.training and drawn() == expected


def test_the_untuned_answers_are_those_of_the_base_model(tmp_path):
    """A fresh adapter must change nothing, or the left column would not show the base model."""
    model = make_model()
    with model.disable_adapter():
        base = [answer.text for answer in sampler(model, temperature=0)(QUESTIONS)]
    asked = []

    def answer(questions):
        asked.append(model.training)
        return sampler(model, temperature=0)(questions)

    from fiqa_helpers.machinery.live import LivePanel

    panel = LivePanel(QUESTIONS, answer, 0, live=False)
    with panel:
        make_trainer(tmp_path, [panel], 2, model=model).train()
    assert panel.samples[0]["step"] == 0 and panel.samples[0]["texts"] == base
    assert asked == [False]


def test_history_and_samples_survive_a_resume(tmp_path):
    """After a kill the curve could begin in the middle, or the untuned answers be a half-trained model's."""
    whole, _, model = run_with_panel(tmp_path, steps=12)
    asked = []
    fresh = make_model()

    def answer(questions):
        asked.append(len(asked))
        return sampler(fresh)(questions)

    from fiqa_helpers.machinery.live import LivePanel

    panel = LivePanel(QUESTIONS, answer, 4, live=False)
    trainer = make_trainer(tmp_path, [panel], 12, model=fresh)
    with panel:
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    figures = ("step", "loss", "eval_loss", "learning_rate")
    assert [[row.get(name) for name in figures] for row in panel.history] == [
        [row.get(name) for name in figures] for row in whole.history
    ]
    assert [sample["step"] for sample in panel.samples] == [0, 4, 8, 12]
    assert panel.samples[:3] == whole.samples[:3] and asked == [0]
    assert panel.resumed_at == 8 and panel.seconds > whole.seconds / 2
    assert same(adapter(model), adapter(fresh))


def test_a_checkpoint_without_a_panel_can_be_resumed_with_one(tmp_path):
    """Trainer then finds no entry for the panel and fails at the next checkpoint with a KeyError."""
    make_trainer(tmp_path, [], 12).train()
    panel, trainer, _ = run_with_panel(tmp_path, 12, resume=str(tmp_path / "checkpoint-4"))
    assert [row["step"] for row in panel.history] == list(range(1, 13))
    assert [sample["step"] for sample in panel.samples] == [0, 8, 12]
    assert (
        "LivePanel"
        in json.loads((tmp_path / "checkpoint-12/trainer_state.json").read_text())["stateful_callbacks"]
    )


def test_a_sample_that_fails_is_told_and_ends_nothing(tmp_path):
    """Hours of training could be lost to an error in a sample; or the error never be seen."""

    def answer(questions):
        if made:
            raise RuntimeError("out of memory")
        made.append(1)
        return [Answer("fine", True)] * 3

    made = []
    panel, trainer, _ = run_with_panel(tmp_path, 8, answer=answer)
    assert trainer.state.global_step == 8
    assert "sampling failed at step 8 (RuntimeError: out of memory)" in panel.summary


# Stopping


class At:
    """Calls a function when the trainer reaches a step's beginning."""

    def __new__(cls, step, function):
        from transformers import TrainerCallback

        class Caller(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == step:
                    function()

        return Caller()


def test_stop_ends_after_the_step_at_hand_with_a_checkpoint(tmp_path):
    """Stop could be obeyed late, leave no checkpoint, or let a due evaluation run for minutes first."""
    panel, trainer, _ = run_with_panel(
        tmp_path, 16, before=lambda panel, trainer: trainer.add_callback(At(11, panel.request_stop))
    )
    assert trainer.state.global_step == 12 and panel.step == 12
    assert panel.stopped == "Stop button" and panel.outcome == "stopped at step 12 of 16 (Stop button)"
    assert (tmp_path / "checkpoint-12" / "adapter_model.safetensors").is_file()
    assert "eval_loss" not in panel.history[-1] and "loss" in panel.history[-1]
    again, trainer, _ = run_with_panel(tmp_path, 16, resume=str(tmp_path / "checkpoint-12"))
    assert again.stopped is None and trainer.state.global_step == 16  # the checkpoint doesn't hold the stop


def test_stop_interrupts_samples_and_evaluations(tmp_path):
    """An evaluation or a sample may take a minute: Stop must not wait for its end."""
    model = make_model()
    tokens = []

    def answer(questions):
        if model.training is False and len(tokens) == 1:
            panel.request_stop()
        tokens.append(1)
        return sampler(model)(questions)

    from fiqa_helpers.machinery.live import LivePanel

    panel = LivePanel(QUESTIONS, answer, 4, live=False)
    trainer = make_trainer(tmp_path, [panel], 40, model=model)
    with panel:
        trainer.train()
    assert panel.outcome == "stopped at step 4 of 40 (Stop button)"
    assert [sample["step"] for sample in panel.samples] == [0]  # the second was broken off
    assert model.training and trainer.state.global_step == 4

    def stop_in_evaluation(panel, trainer):
        step = trainer.prediction_step
        trainer.prediction_step = lambda *args, **kwargs: panel.request_stop() or step(*args, **kwargs)

    panel, trainer, _ = run_with_panel(tmp_path / "evaluation", 40, before=stop_in_evaluation)
    assert panel.outcome == "stopped at step 4 of 40 (Stop button)"
    assert "eval_loss" not in panel.history[-1]


def test_an_impatient_second_interrupt_changes_nothing(tmp_path, monkeypatch):
    """While the last picture is drawn, a second interrupt would leave a traceback and a half-closed panel."""
    import signal

    from fiqa_helpers.machinery import live

    real = live.draw_png
    monkeypatch.setattr(live, "draw_png", lambda *args: signal.raise_signal(signal.SIGINT) or real(*args))
    panel, _, _ = run_with_panel(
        tmp_path,
        40,
        before=lambda panel, trainer: trainer.add_callback(At(3, lambda: signal.raise_signal(signal.SIGINT))),
    )
    assert panel.outcome == "stopped at step 3 of 40 (interrupted)" and panel.png.is_file()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_the_second_press_ends_inside_a_step(tmp_path):
    """With long steps a person wants out now; the weights must be those of the last whole step."""

    def twice(panel, trainer):
        trainer.add_callback(At(5, lambda: panel.request_stop(at_once=True)))

    panel, trainer, model = run_with_panel(tmp_path / "stopped", 40, before=twice)
    assert panel.outcome == "stopped at step 5 of 40 (Stop button)"
    reference = make_model()
    # the same schedule, ended after five whole steps
    panel, _, reference = run_with_panel(
        tmp_path / "whole", 40, before=lambda panel, trainer: trainer.add_callback(At(4, panel.request_stop))
    )
    assert panel.step == 5 and same(adapter(model), adapter(reference))


def test_sample_now_is_answered_after_the_step(tmp_path):
    """The request could wait for the next regular sample, or be answered at every step from then on."""
    panel, _, _ = run_with_panel(
        tmp_path, 8, before=lambda panel, trainer: trainer.add_callback(At(5, panel.request_sample))
    )
    assert [sample["step"] for sample in panel.samples] == [0, 4, 6, 8]


def test_other_errors_are_not_swallowed(tmp_path):
    """A panel that hides a crash would let a notebook save an adapter that never trained."""

    def crash():
        raise ValueError("broken rows")

    with pytest.raises(ValueError, match="broken rows"):
        run_with_panel(tmp_path, 8, before=lambda panel, trainer: trainer.add_callback(At(2, crash)))


def test_the_training_cell_alone_is_not_run_twice(tmp_path):
    """Run again after Stop, it would train the tuned model from step 0 and call its answers untuned."""
    panel, trainer, model = run_with_panel(
        tmp_path, 8, before=lambda panel, trainer: trainer.add_callback(At(2, panel.request_stop))
    )
    before = adapter(model)
    with pytest.raises(WorkshopError, match="restart the kernel"), panel:
        trainer.train()
    assert same(adapter(model), before) and panel.outcome == "stopped at step 3 of 8 (Stop button)"


def test_a_finished_run_is_shown_without_training(tmp_path):
    """Run All after a finished run must show that run, and say that nothing was trained."""
    first, _, _ = run_with_panel(tmp_path, 8)
    from fiqa_helpers.machinery.live import LivePanel

    panel = LivePanel(QUESTIONS, None, 4, "Small", live=False)
    with panel:
        panel.recall(json.loads(json.dumps(first.state()["attributes"])))
    assert panel.history == first.history and panel.samples == first.samples
    assert panel.outcome == "finished 8 steps" and "nothing was trained again" in panel.summary


# What is drawn


def example(**changes) -> View:
    history = [{"step": 0, "eval_loss": 3.37}]
    for step in range(1, 8):
        history.append({"step": step, "loss": 3.4 - 0.03 * step, "learning_rate": 2e-3, "memory_gib": 2.0})
    samples = {"texts": [HOSTILE] * 3, "stopped": [True, False, True]}
    values = {
        "title": HOSTILE,
        "phase": "training",
        "step": 7,
        "total": 12,
        "history": history,
        "questions": [HOSTILE] * 3,
        "untuned": {"step": 0, **samples},
        "latest": {"step": 6, **samples},
        "note": HOSTILE,
    }
    return View(**{**values, **changes})


class Page(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, source: str):
        super().__init__()
        self.tags, self.texts, self.attributes = [], [], []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_data(self, data):
        self.texts.append(data)


def test_text_from_outside_is_escaped_everywhere():
    """A question, an answer, the title or an error message could become markup in the reader's notebook."""
    page, plain = Page(draw_html(example())), Page(draw_html(example(title="t", note="", questions=["q"] * 3,
                                                                     untuned=None, latest=None)))  # fmt: skip
    assert "script" not in page.tags and "img" not in page.tags and "onerror" not in page.attributes
    assert set(page.tags) <= set(plain.tags) | {"small"}
    assert "".join(page.texts).count(HOSTILE) == 3 + 6 + 2


def test_dollars_are_no_formula_and_control_characters_no_commands():
    """JupyterLab typesets "$80 to $95" as mathematics and colours text by its terminal escapes."""
    answer = {"step": 1, "texts": ["from $80 to $95 \x1b[31mred"], "stopped": [True]}
    view = example(questions=["q"], untuned=None, latest=answer, title="t", note="failed:\n\x1b[31mred")
    page = draw_html(view)
    assert "$80 to $" not in page and "from $80 to $95" in "".join(Page(page).texts)
    for shown in (page, describe(view), draw_line(example(phase="\x1b[31mred\n"))):
        assert "\x1b" not in shown
    assert "\n" not in describe(view)


@settings(max_examples=60)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\r\x00"), min_size=1, max_size=80))
def test_any_text_comes_back_as_it_was(text):
    """Escaping could lose or double signs; only control characters may change, to a visible sign."""
    sample = {"step": 1, "texts": [text], "stopped": [True]}
    page = Page(draw_html(example(questions=["q"], untuned=None, latest=sample, title="t", note="")))
    assert printable(text) in "".join(page.texts)


def test_a_broken_loss_is_drawn_as_such():
    """NaN or infinity in coordinates empties the whole chart in a browser, and breaks matplotlib's limits."""
    history = [
        {"step": step, "loss": loss} for step, loss in enumerate([3.0, math.nan, 2.9, math.inf, 2.8], 1)
    ]
    page = draw_html(example(history=history))
    assert page.count('class="x"') == 2
    numbers = re.findall(r'(?:points|d|x|y)="([^"]*)"', page)
    assert numbers and not any("nan" in value or "inf" in value for value in numbers)
    assert len(draw_png(example(history=history), "broken")) > 10_000
    nothing = [{"step": step, "loss": math.nan} for step in (1, 2)]
    assert "nan" in describe(example(history=nothing)) and draw_png(example(history=nothing), "all broken")


def test_curves_differ_without_colour():
    """Readers who see no colours, and grey prints, need markers and dashes."""
    page = STYLE + draw_html(example())
    assert re.search(r"\.v\{[^}]*stroke-dasharray", page) and not re.search(r"\.s\{[^}]*dasharray", page)
    assert (
        page.count('class="o"') == 7 + 1 and page.count('class="d"') == 1 + 1
    )  # with one each in the legend


def test_the_panel_has_a_text_alternative():
    """A screen reader would find an unnamed picture."""
    page = draw_html(example(title="Small"))
    assert 'role=img aria-label="Small: training, step 7 of 12' in page
    assert "training loss 3.370 -&gt; 3.190; validation loss 3.370 -&gt; 3.370" in page


def test_the_picture_stays_small():
    """The picture is stored in the notebook: long answers and a thousand steps must not blow it up."""
    history = [
        {"step": step, "loss": 2 + math.sin(step * step) / 9, "learning_rate": 1e-4}
        for step in range(1, 1033)
    ]
    history += [{"step": 1033 + 1, "eval_loss": 2.2}]
    texts = ["Whether an index fund or a mortgage payment is better depends on many things. " * 20] * 3
    sample = {"step": 1, "texts": texts, "stopped": [False] * 3}
    png = draw_png(example(history=history, total=1034, untuned=sample, latest=sample), "long")
    assert len(png) * 4 / 3 < 95_000
    assert len(draw_html(example(history=history, total=1034))) < 60_000


def test_drawing_is_cheap_and_throttled(tmp_path, monkeypatch):
    """Drawing at each of a thousand fast steps would cost more than the steps."""
    from fiqa_helpers.machinery import live

    drawn = []

    class Output(live.HeadlessOutput):
        def wants(self, now):
            return True

        def show(self, view):
            drawn.append(len(draw_html(view)))

    monkeypatch.setattr(live, "HeadlessOutput", Output)
    panel, _, _ = run_with_panel(tmp_path, 40)
    most = panel.seconds / live.EVERY + 2 * len(panel.samples) + 40 / 4 + 2
    print(f"{len(drawn)} drawings, {1000 * panel.drawing_seconds / len(drawn):.2f} ms each")
    assert 5 < len(drawn) <= most
    assert panel.drawing_seconds / len(drawn) < 0.02


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_lie_in_the_range(low, size):
    """Ticks outside the axes would be drawn over the text around it."""
    found = ticks(low, low + size)
    assert len(found) <= 8
    assert all(
        low - 1e-6 * (abs(low) + size) <= tick <= low + size + 1e-6 * (abs(low) + size) for tick in found
    )


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=20))
def test_limits_hold_every_finite_value(values):
    """A flat curve or one broken value must not give an empty or infinite axis."""
    low, high = limits(values)
    assert math.isfinite(low) and math.isfinite(high) and low < high
    assert all(low <= value <= high for value in values if math.isfinite(value))


def test_smoothing_has_no_pull_to_zero_and_skips_broken_values():
    """A moving average that begins at zero draws a fall that never happened."""
    assert smooth([(step, 3.0) for step in range(5)], 100) == [
        (step, pytest.approx(3.0)) for step in range(5)
    ]
    assert [step for step, _ in smooth([(1, 3.0), (2, math.nan), (3, 2.0)], 10)] == [1, 3]


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "–"), (0, "0 s"), (59.6, "1:00"), (187, "3:07"), (7387, "2:03:07")]
)
def test_clock(seconds, text):
    """Minutes and seconds could be rounded apart, as in 0:60."""
    assert clock(seconds) == text


def test_the_terminal_line_names_what_is_known():
    """Figures that are not there yet must not be shown as zero."""
    assert draw_line(example(title="Small", history=[])) == "Small: training, step 7/12, 0 s so far"
