"""Answers from a model, batched or as they are written in the playground of notebook 05."""

import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fiqa_helpers.base import WorkshopError
from fiqa_helpers.show import answer_clicks_while_busy, escape

if TYPE_CHECKING:
    import ipywidgets
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fiqa_helpers.profiles import Profile

# --- Answers from a model: batched, with whether each stopped by itself.

GUARD = 4  # no sequence of so many tokens occurs twice in an answer: small models loop without it


@dataclass(frozen=True)
class Answer:
    """A generated answer; `stopped` is whether the model ended it, not the length limit."""

    text: str
    stopped: bool
    n_tokens: int


def generate_answers(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    questions: Sequence[str],
    style: str = "plain",
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    no_repeat_ngram_size: int = GUARD,
    **generate_kwargs: object,
) -> list[Answer]:
    """One answer a question, in one batch. `temperature` 0 is greedy decoding.

    No sequence of `no_repeat_ngram_size` tokens occurs twice, the prompt's counted; 0 switches that off.

    The model is returned to the mode it was in, and the global random state is left as it was, so that
    sampling in the middle of a training run does not change the run. Other keywords go to `generate`.
    """
    import torch

    from fiqa_helpers.rows import encode_prompt

    if not questions:
        return []
    ids = [encode_prompt(question, tokenizer, style) for question in questions]
    inputs = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt").to(model.device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(seed)
            output = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                use_cache=True,
                no_repeat_ngram_size=no_repeat_ngram_size,
                **sampling,
                **generate_kwargs,
            )
    finally:
        model.train(was_training)
    return [_answer(row, tokenizer) for row in output[:, inputs["input_ids"].shape[1] :].tolist()]


def _answer(ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> Answer:
    """Cut generated ids at the first end token, which is found by id and never by searching the text."""
    stopped = tokenizer.eos_token_id in ids
    if stopped:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    return Answer(tokenizer.decode(ids, skip_special_tokens=True).strip(), stopped, len(ids))


# --- The playground of notebook 05: ask a question, read the base and the tuned answer as they are written.
#
# Widgets leave state in a saved notebook, so it is for people only: build it when
# `notebook.is_interactive()`.

EVERY = 0.1  # seconds between two redraws while tokens arrive
WRITING = "writing ..."
EXAMPLE = "Should I pay off my mortgage early or invest the extra money?"


def playground(
    model: "PeftModel", tokenizer: "PreTrainedTokenizerBase", profile: "Profile"
) -> "ipywidgets.VBox":
    """A question box, temperature and length, and both answers side by side: display what it returns.

    Both answers are drawn with the same seed. The base answer is the same model's with its adapter switched
    off, which is not safe in two threads at once: the two are written one after the other, and a cell that
    uses the model should wait until they are.

    Raises:
        WorkshopError: the model has no adapter to switch off.
    """
    if not hasattr(model, "disable_adapter"):
        raise WorkshopError("The playground needs a PEFT model, whose adapter it can switch off and on.")
    return Playground(model, tokenizer, profile).box


class Playground:
    """The widgets and the thread that fills them."""

    def __init__(self, model, tokenizer, profile):
        import ipywidgets

        self.model, self.tokenizer, self.profile = model, tokenizer, profile
        self.worker: threading.Thread | None = None
        self._cancel = threading.Event()
        wide, longest = {"style": {"description_width": "110px"}}, 4 * profile.max_new_tokens
        self.question = ipywidgets.Textarea(
            EXAMPLE, description="Question", rows=2, layout={"width": "calc(100% - 6px)"}, **wide
        )
        self.temperature = ipywidgets.FloatSlider(
            0.0, min=0.0, max=1.5, step=0.1, description="Temperature", readout_format=".1f", **wide
        )
        self.length = ipywidgets.IntSlider(
            profile.max_new_tokens, min=8, max=longest, step=8, description="Longest, tokens", **wide
        )
        self.ask = ipywidgets.Button(description="Answer", icon="play", button_style="primary")
        self.stop = ipywidgets.Button(description="Stop", icon="stop")
        self.status = ipywidgets.HTML()
        self.answers = [ipywidgets.HTML(layout={"flex": "1 1 300px", "width": "auto"}) for _ in range(2)]
        controls = ipywidgets.HBox([self.temperature, self.length, self.ask, self.stop])
        columns = ipywidgets.HBox(self.answers)
        for line in (controls, columns):  # half a window or a phone: below one another
            line.layout.flex_flow = "row wrap"
        self.box = ipywidgets.VBox(
            [self.question, controls, self.status, columns],
            layout={"width": "100%", "max_width": "920px"},
        )
        self.ask.on_click(lambda _: self.start())
        self.stop.on_click(lambda _: self.halt())
        for widget in (self.question, self.temperature, self.length, self.ask, self.stop):
            answer_clicks_while_busy(widget)
        self._say("0 is greedy decoding: the same question gives the same answer.")
        for column in (0, 1):
            self._write(column, "", "not asked yet")

    def start(self) -> None:
        """Begin to answer in a thread of its own, so that the page and the kernel stay free."""
        # The buttons stay enabled and say why nothing happens: a button that is disabled drops the keyboard.
        question = self.question.value.strip()
        if self.busy:
            self._say("Still writing: wait, or press Stop.")
            return
        if not question:
            self._say("Type a question first.")
            return
        self._cancel.clear()
        values = (question, self.temperature.value, self.length.value)
        self.worker = threading.Thread(target=self._work, args=values, name="playground", daemon=True)
        self.worker.start()

    def halt(self) -> None:
        """End both answers after the token at hand."""
        if self.busy:
            self._cancel.set()
        else:
            self._say("Nothing to stop: no answer is being written.")

    @property
    def busy(self) -> bool:
        """Whether answers are being written."""
        return self.worker is not None and self.worker.is_alive()

    def _work(self, question: str, temperature: float, length: int) -> None:
        began = time.perf_counter()
        try:
            for column in (0, 1):
                self._write(column, "", "waiting")
            for column in (0, 1):
                self._say(f"The {('base', 'tuned')[column]} model is writing ...")
                self._answer(column, question, temperature, length)
            ending = "Stopped" if self._cancel.is_set() else "Done"
            self._say(f"{ending} after {time.perf_counter() - began:.1f} s.")
        except Exception as error:  # a thread's error would otherwise be seen by nobody
            self._say(f"It failed: {type(error).__name__}: {error}")

    def _answer(self, column: int, question: str, temperature: float, length: int) -> None:
        if self._cancel.is_set():
            self._write(column, "", "stopped")
            return
        with self.model.disable_adapter() if column == 0 else nullcontext():
            (answer,) = generate_answers(
                self.model,
                self.tokenizer,
                [question],
                self.profile.prompt,
                length,
                temperature,
                streamer=self._streamer(column),
                stopping_criteria=[lambda ids, scores, **_: self._cancelled(ids)],
            )
        end = (
            "ended by itself"
            if answer.stopped
            else "stopped"
            if self._cancel.is_set()
            else "cut at the limit"
        )
        self._write(column, answer.text, f"{answer.n_tokens} tokens, {end}")

    def _cancelled(self, ids):
        import torch

        return torch.full((ids.shape[0],), self._cancel.is_set(), device=ids.device)

    def _streamer(self, column: int):
        """transformers' streamer, which writes into a column what is final of the text so far."""
        from transformers import TextStreamer

        playground, so_far, drawn = self, [], [0.0]

        class Column(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                so_far.append(text)
                if time.perf_counter() - drawn[0] >= EVERY:
                    playground._write(column, "".join(so_far).strip(), WRITING)
                    drawn[0] = time.perf_counter()

        return Column(self.tokenizer, skip_prompt=True, skip_special_tokens=True)

    def _say(self, text: str) -> None:
        self.status.value = f'<span role="status">{escape(text)}</span>'

    def _write(self, column: int, text: str, end: str) -> None:
        name = ("Base model", "Tuned model")[column]
        off = "" if text else " disabled"
        kind = "grows" if end == WRITING else "whole"
        self.answers[column].value = (
            f'<style>{STYLE}</style><section class="fiqa-answer" aria-label="{name}"><header><b>{name}</b>'
            f'<small>{escape(end)}</small><button{off} onclick="{COPY}" aria-label="Copy the answer of '
            f'the {name.lower()}">Copy</button></header>'
            f'<div class="{kind}" tabindex="0"><p>{escape(text)}</p></div></section>'
        )


# Browsers offer the clipboard on https and 127.0.0.1; elsewhere the text is selected and copied the old way.
COPY = (
    "const p = this.closest('section').querySelector('p'); "
    "const done = () => { this.textContent = 'Copied' }; "
    "if (navigator.clipboard) { navigator.clipboard.writeText(p.textContent).then(done) } "
    "else { getSelection().selectAllChildren(p); document.execCommand('copy'); done() }"
)
STYLE = """
.fiqa-answer{margin:4px 6px 4px 0;padding:8px 12px;border:1px solid var(--jp-border-color2,#d0d7de);
border-radius:8px;color:var(--jp-ui-font-color1,#1f2328);font-size:13px;line-height:1.45}
.fiqa-answer header{display:flex;align-items:center;gap:10px}
.fiqa-answer small{flex:1;color:var(--jp-ui-font-color2,#59636e)}
.fiqa-answer div{height:190px;margin:6px 0 0;overflow:auto}
.fiqa-answer .grows{display:flex;flex-direction:column-reverse}
.fiqa-answer .grows p{margin:0 0 auto}
.fiqa-answer p{margin:0;white-space:pre-wrap;overflow-wrap:anywhere}
.fiqa-answer button{font-size:12px;color:inherit;background:var(--jp-layout-color2,#f6f8fa);cursor:pointer;
border:1px solid var(--jp-border-color2,#d0d7de);border-radius:4px;padding:1px 10px}
.fiqa-answer button:disabled{opacity:.5;cursor:default}
""".replace("\n", "")
