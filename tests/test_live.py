"""The live panel over real, small training runs; in a browser it is tested in tests/browser/."""

import contextlib
import math
import re
import subprocess
import sys
import threading

import nbformat
import pytest
from bs4 import BeautifulSoup
from hypothesis import given, settings
from hypothesis import strategies as st
from panel_training import QUESTIONS, at_step, make_model, make_trainer, sampler, write_notebook

from fiqa_helpers.base import WorkshopError
from fiqa_helpers.machinery import live
from fiqa_helpers.machinery.live import LivePanel
from fiqa_helpers.show import printable

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> \"quoted\" & $x_1$ 'single' </p></div>"


def draw_html(panel: LivePanel) -> str:
    """What is put into the page: figures and answers."""
    return str(live.template().figures(panel) + live.template().answers(panel))


def run_with_panel(folder, steps=8, resume=None, answer=None, before=None, sample_steps=4):
    """Train the small model under a panel, `before(panel, trainer)` first; returns panel, trainer, model."""
    model = make_model()
    panel = LivePanel(QUESTIONS, answer or sampler(model), sample_steps, "Small", folder / "picture.png")
    trainer = make_trainer(folder, [panel], steps, model=model)
    if before:
        before(panel, trainer)
    with panel:
        trainer.train(resume_from_checkpoint=resume)
    return panel, trainer, model


def adapter(model) -> list:
    return [value.tolist() for name, value in model.named_parameters() if "lora" in name]


# What stays in a notebook


def test_headless_leaves_one_picture_one_text_and_lines_on_stderr(tmp_path):
    """Under papermill, progress could pile up as outputs, widgets leave state, or nobody see a thing."""
    write_notebook(tmp_path / "panel.ipynb", 16, 0.7)
    command = [sys.executable, "-m", "papermill", "panel.ipynb", "out.ipynb", "--no-progress-bar"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    notebook = nbformat.read(tmp_path / "out.ipynb", 4)
    train = next(cell for cell in notebook.cells if cell.id == "train")
    text, shown = train.outputs
    assert re.match(r"Small: finished 16 steps, [\d:]+; training loss .* -> .*", text.text)
    assert sorted(shown.data) == ["image/png", "text/plain"]
    assert shown.metadata["image/png"]["alt"] == text.text.strip()
    assert "widgets" not in notebook.metadata
    lines = re.findall(r"Small: .*?, step (\d+) of 16, .* so far", done.stderr)
    seconds = train.metadata["papermill"]["duration"]
    assert 2 <= len(lines) <= 2 + seconds / 10, done.stderr  # at the beginning and every ten seconds
    assert "step" not in done.stdout


def test_interrupt_in_a_real_kernel_lets_the_next_cell_run(tmp_path):
    """The interrupt could end in a traceback, or leave the panel unusable for the cells that follow."""
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(kernel_name="python3", cwd=str(tmp_path))
    write_notebook(tmp_path / "panel.ipynb", 200, 0.5)
    said = {}
    try:
        for cell in nbformat.read(tmp_path / "panel.ipynb", 4).cells:
            if cell.id == "train":
                threading.Timer(3, manager.interrupt_kernel).start()
            outputs = said[cell.id] = []
            reply = client.execute_interactive(cell.source, timeout=120, output_hook=outputs.append)
            assert reply["content"]["status"] == "ok", outputs
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    kinds = ("stream", "display_data", "error")
    shown = [out["msg_type"] for out in said["train"] if out["msg_type"] in kinds]
    assert shown == ["display_data", "display_data"]
    (text,) = [out["content"]["text"] for out in said["after"] if out["msg_type"] == "stream"]
    assert re.match(r"after: stopped at step \d+ of 200 \(interrupted\)", text)


# What the training learns


def test_sampling_does_not_change_the_training(tmp_path):
    """Sampling at a temperature draws from the global random state: dropout and row order would change."""
    press = lambda panel, trainer: trainer.add_callback(at_step(5, panel.sample_now.set))  # noqa: E731
    panel, _, sampled = run_with_panel(tmp_path / "with", before=press)
    model = make_model()
    make_trainer(tmp_path / "without", [], 8, model=model).train()
    assert [sample["step"] for sample in panel.samples] == [0, 4, 6, 8]  # Sample now: after that step
    assert len({tuple(sample["texts"]) for sample in panel.samples}) == 4  # and each one differs
    assert adapter(sampled) == adapter(model)


def test_the_untuned_answers_are_those_of_the_base_model(tmp_path):
    """A fresh adapter must change nothing, or the left column would not show the base model."""
    model, training = make_model(), []
    with model.disable_adapter():
        base = [answer.text for answer in sampler(model, temperature=0)(QUESTIONS)]

    def answer(questions):
        training.append(model.training)
        return sampler(model, temperature=0)(questions)

    panel = LivePanel(QUESTIONS, answer, 0)
    with panel:
        make_trainer(tmp_path, [panel], 2, model=model).train()
    assert panel.samples[0]["step"] == 0 and panel.samples[0]["texts"] == base
    assert training == [False]


def test_history_and_samples_survive_a_resume(tmp_path):
    """After a kill the curve could begin in the middle, or the untuned answers be a half-trained model's."""
    whole, _, model = run_with_panel(tmp_path, steps=12)
    panel, _, fresh = run_with_panel(tmp_path, steps=12, resume=str(tmp_path / "checkpoint-8"))
    figures = ("step", "loss", "eval_loss", "learning_rate")
    histories = [[[row.get(name) for name in figures] for row in p.history] for p in (panel, whole)]
    assert histories[0] == histories[1]
    assert [sample["step"] for sample in panel.samples] == [0, 4, 8, 12]
    assert panel.samples[:3] == whole.samples[:3]
    assert panel.resumed_at == 8 and panel.seconds > whole.seconds / 2
    assert adapter(model) == adapter(fresh)


def test_errors_in_a_sample_are_told_and_others_raised(tmp_path):
    """Hours of training could be lost to a sample; or a crash be hidden and its adapter saved."""
    panel, trainer, _ = run_with_panel(tmp_path, answer=lambda questions: 1 / 0)
    assert trainer.state.global_step == 8
    assert "sampling failed at step 8 (ZeroDivisionError: division by zero)" in panel.summary
    with pytest.raises(ZeroDivisionError):
        run_with_panel(tmp_path, before=lambda _, trainer: trainer.add_callback(at_step(2, lambda: 1 / 0)))


# Stopping


def test_stop_ends_after_the_step_at_hand_with_a_checkpoint(tmp_path):
    """Stop could be obeyed late, leave no checkpoint, or let a due evaluation run for minutes first."""

    def stop(panel, trainer):
        trainer.args.save_steps = 16  # an evaluation is due at step 12, a checkpoint is not
        trainer.add_callback(at_step(11, panel.stop.set))

    panel, trainer, model = run_with_panel(tmp_path, 16, before=stop)
    assert trainer.state.global_step == 12 and panel.outcome == "stopped at step 12 of 16 (Stop button)"
    assert (tmp_path / "checkpoint-12" / "adapter_model.safetensors").is_file()
    assert "eval_loss" not in panel.history[-1] and "loss" in panel.history[-1]
    stopped = adapter(model)  # the cell alone again would train from step 0 and call its answers untuned
    with pytest.raises(WorkshopError, match="restart the kernel"), panel:
        trainer.train()
    assert adapter(model) == stopped
    again, trainer, _ = run_with_panel(tmp_path, 16, resume=str(tmp_path / "checkpoint-12"))
    assert again.stopped is None and trainer.state.global_step == 16  # the checkpoint doesn't hold the stop


def test_stop_interrupts_samples_and_evaluations(tmp_path):
    """An evaluation or a sample may take a minute: Stop must not wait for its end."""

    def stop_in_sample(panel, trainer):
        def answer(questions):
            if panel.step:
                panel.stop.set()
            return sampler(trainer.model)(questions)

        panel.answer = answer

    panel, trainer, model = run_with_panel(tmp_path / "sample", 40, before=stop_in_sample)
    assert panel.outcome == "stopped at step 4 of 40 (Stop button)"
    assert [sample["step"] for sample in panel.samples] == [0]  # the second was broken off
    assert "no second sample or evaluation" in panel.summary
    assert model.training and trainer.state.global_step == 4

    def stop_in_evaluation(panel, trainer):
        step = trainer.prediction_step
        trainer.prediction_step = lambda *args, **kwargs: panel.stop.set() or step(*args, **kwargs)

    panel, trainer, _ = run_with_panel(tmp_path / "evaluation", 40, before=stop_in_evaluation)
    assert panel.outcome == "stopped at step 4 of 40 (Stop button)"
    assert "eval_loss" not in panel.history[-1]


# What is drawn


def example(**changes) -> LivePanel:
    """A panel in the middle of a run, its texts hostile, without a Trainer."""
    panel = LivePanel([HOSTILE] * 3, None, 4, HOSTILE)
    steps = [{"step": i, "loss": 3.4 - 0.03 * i, "learning_rate": 2e-3, "memory_gib": 2} for i in range(1, 8)]
    panel.history = [{"step": 0, "eval_loss": 3.37}, *steps]
    answers = {"texts": [HOSTILE] * 3, "stopped": [True, False, True]}
    panel.samples = [{"step": 0, **answers}, {"step": 6, **answers}]
    panel.step, panel.total, panel.phase, panel.note = 7, 12, "training", HOSTILE
    for name, value in changes.items():
        setattr(panel, name, value)
    return panel


def test_text_from_outside_is_escaped_everywhere():
    """A question, an answer, the title or an error message could become markup in the reader's notebook."""
    page = BeautifulSoup(draw_html(example()), "html.parser")
    picture = BeautifulSoup(live.Picture(b"", example().summary).html, "html.parser")
    assert not page.find_all(["script", "img"]) and not picture.find_all("script")
    assert not page.find_all(onerror=True) and not picture.find_all(onerror=True)
    assert page.get_text().count(HOSTILE) == 3 + 6 + 1  # questions, answers, note
    said = page.find(role="img")["aria-label"]
    assert said.count(HOSTILE) == 2 and "training loss 3.370 -> 3.190; validation loss" in said
    assert not {"\x1b", "\n"} & set(example(note="failed:\n\x1b[31mred").summary)


@settings(max_examples=60)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\r\x00"), min_size=1, max_size=80))
def test_any_text_comes_back_as_it_was(text):
    """Escaping could lose or double signs; only control characters may change, to a visible sign."""
    sample = {"step": 1, "texts": [text], "stopped": [True]}
    page = draw_html(example(questions=["q"], samples=[sample], title="t", note=""))
    assert printable(text) in BeautifulSoup(page, "html.parser").get_text()


def test_the_first_step_explains_its_rate():
    """The schedule begins at zero: a tile "0, highest 0" looks like a training that learns nothing."""
    page = draw_html(example(history=[{"step": 1, "loss": 3.0, "learning_rate": 0.0}]))
    assert "warm-up begins at 0" in page and "highest" not in page


def test_a_long_or_broken_history_is_drawn_small():
    """NaN in coordinates empties a chart; a picture of a thousand steps must not blow the notebook up."""
    steps = range(1, 1033)
    history = [{"step": i, "loss": 2 + math.sin(i * i) / 9, "learning_rate": 1e-4} for i in steps]
    broken = [{"step": 1032, "eval_loss": 2.2}, {"step": 1033, "loss": math.nan, "eval_loss": math.inf}]
    panel = example(history=history + broken, total=1032)
    page = draw_html(panel)
    numbers = re.findall(r'(?:d|x|y)="([^"]*)"', page)
    assert numbers and not any("nan" in value or "inf" in value for value in numbers)
    assert 10_000 < len(live.draw_png(panel)) * 4 / 3 < 95_000 and len(page) < 60_000


def test_drawing_is_cheap_and_throttled(tmp_path, monkeypatch):
    """Drawing at each of a thousand fast steps would cost more than the steps."""
    drawn = []
    monkeypatch.setattr(LivePanel, "_draw", lambda panel: drawn.append(len(draw_html(panel))))
    for name in ("_open", "_close"):  # no page
        monkeypatch.setattr(LivePanel, name, lambda panel: None)
    monkeypatch.setattr(live, "reachable", contextlib.nullcontext)
    panel, _, _ = run_with_panel(tmp_path, 40, before=lambda panel, _: setattr(panel, "live", True))
    most = panel.seconds / live.EVERY + 2 * len(panel.samples) + 40 / 4 + 2
    assert 5 < len(drawn) <= most
    assert panel.drawing_seconds / len(drawn) < 0.03
