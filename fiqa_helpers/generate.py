"""Answers from a model, each cut at its end token: batched, or as written in notebook 05's playground."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fiqa_helpers.base import WorkshopError
from fiqa_helpers.rows import encode_prompt
from fiqa_helpers.show import answer_clicks_while_busy, answers, escape

if TYPE_CHECKING:
    import pandas as pd
    from ipywidgets import VBox
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

    An answer ends at the tokenizer's end token or after `max_new_tokens`; `_answer` cuts what stands behind.

    No sequence of `no_repeat_ngram_size` tokens occurs twice, the prompt's counted; 0 switches that off.

    The model is returned to the mode it was in, and the global random state is left as it was, so that
    sampling in the middle of a training run does not change the run. Other keywords go to `generate`.

    Raises:
        WorkshopError: a question with its answer is longer than what the model reads.
    """
    import torch

    if not questions:
        return []
    ids = prompts(questions, tokenizer, style, model.config, max_new_tokens)
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


def prompts(questions: Sequence[str], tokenizer, style: str, config, max_new_tokens: int) -> list[list[int]]:
    """Token ids of one prompt a question, for a model with the configuration `config`.

    Raises:
        WorkshopError: a question with its answer is longer than what the model reads.
    """
    ids = [encode_prompt(question, tokenizer, style) for question in questions]
    if max(map(len, ids)) + max_new_tokens > config.max_position_embeddings:
        raise WorkshopError(
            f"A prompt of {max(map(len, ids)):,} tokens and {max_new_tokens:,} of an answer do not fit the "
            f"{config.max_position_embeddings:,} that this model reads: shorten the question."
        )
    return ids


def _answer(ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> Answer:
    """Cut generated ids at the first end token, which is found by id and never by searching the text."""
    stopped = tokenizer.eos_token_id in ids
    ids = ids[: ids.index(tokenizer.eos_token_id)] if stopped else ids
    return Answer(tokenizer.decode(ids, skip_special_tokens=True).strip(), stopped, len(ids))


# --- The blind test of notebook 05: whose answer is this?

UNTUNED = "untuned"  # the one name that the classifier of `metrics.train_voice` knows


def blind_cards(
    questions: Sequence[str],
    answers: Mapping[str, Sequence[str]],
    voice: Callable[[str], float] | None = None,
    seed: int = 0,
) -> "pd.DataFrame":
    """Ten of all `answers`, 60 words each, in random order: question, text, truth, and what `voice` gives it.

    `answers` holds under each name, `UNTUNED` among them, one answer for each of `questions`.
    """
    import pandas as pd

    cards = pd.DataFrame(answers, index=pd.Index(questions, name="question"))
    cards = cards.melt(var_name="truth", value_name="text", ignore_index=False).reset_index()
    cards["text"] = [" ".join(text.split()[:60]) for text in cards["text"]]
    cards["voice"] = [f"{voice(text):.2f}" if voice else "not measured" for text in cards["text"]]
    return cards.sample(min(10, len(cards)), random_state=seed, ignore_index=True)


def blind_test(cards: "pd.DataFrame") -> "VBox":
    """The cards to guess at, for a person. A guess turns its card and counts; a second one does not."""
    import ipywidgets as w

    guesses = {}

    def box(card) -> "VBox":
        buttons, told = w.ToggleButtons(options=sorted(set(cards["truth"])), value=None), w.HTML()

        def turn(change: dict) -> None:
            guesses.setdefault(card.Index, change["new"] == card.truth)
            score = f"You: {sum(guesses.values())} of {len(guesses)} right."
            told.value = f"It is: {card.truth}. {score} Its voice (under 0.5: {UNTUNED}): {card.voice}."

        buttons.observe(turn, "value")
        return w.VBox([w.HTML(f"<b>{escape(card.question)}</b><br>{escape(card.text)}"), buttons, told])

    return w.VBox([box(card) for card in cards.itertuples()])


# --- The playground of notebook 05: ask a question, read the base and the tuned answer as they are written.

EXAMPLE = "Should I pay off my mortgage early or invest the extra money?"


class Playground:
    """A question box, temperature and length, and both answers side by side: display its `box`.

    Widgets leave state in a saved notebook, so it is for people only: build it when `is_interactive()`.

    `model` is a `PeftModel`. The base answer is its own with the adapter switched off, which is not safe in
    two threads at once: the two are written one after the other, and a cell that uses the model should wait
    until they are. Both are drawn with the same seed.
    """

    def __init__(self, model: "PeftModel", tokenizer: "PreTrainedTokenizerBase", profile: "Profile"):
        import ipywidgets as w

        self.model, self.tokenizer, self.style = model, tokenizer, profile.prompt
        self.worker = threading.Thread()
        self.cancel = threading.Event()
        new = profile.max_new_tokens
        self.question = w.Textarea(EXAMPLE, description="Question", rows=2, layout={"width": "100%"})
        self.temperature = w.FloatSlider(0.0, min=0.0, max=1.5, step=0.1, description="Temperature")
        self.length = w.IntSlider(new, min=8, max=4 * new, step=8, description="Tokens")
        self.ask = w.Button(description="Answer", icon="play", button_style="primary")
        self.stop = w.Button(description="Stop", icon="stop")
        self.status, self.answers = w.HTML(), w.HTML()
        controls = w.HBox([self.temperature, self.length, self.ask, self.stop])
        controls.layout.flex_flow = "row wrap"  # half a window or a phone: below one another
        self.box = w.VBox([self.question, controls, self.status, self.answers])
        self.ask.on_click(lambda _: self.start())
        self.stop.on_click(lambda _: self.cancel.set())  # ends both after the token at hand
        for widget in (self.question, self.temperature, self.length, self.ask, self.stop):
            answer_clicks_while_busy(widget)
        self._say("Temperature 0 is greedy decoding: the same question gives the same answer.")

    def start(self) -> None:
        """Begin to answer in a thread of its own, so that the page and the kernel stay free.

        The buttons stay enabled and say why nothing happens: a disabled button drops the keyboard's focus.
        """
        question = self.question.value.strip()
        busy = self.worker.is_alive()
        if busy or not question:
            self._say("Still writing: wait, or press Stop." if busy else "Type a question first.")
            return
        self.cancel.clear()
        values = (question, self.temperature.value, self.length.value)
        self.worker = threading.Thread(target=self._work, args=values, name="playground", daemon=True)
        self.worker.start()

    def _work(self, question: str, temperature: float, length: int) -> None:
        began = time.perf_counter()
        said: dict[str, Answer | str] = {"base model": "", "tuned model": ""}
        try:
            for name in said:
                self._say(f"The {name} is writing ...")
                more = {"stopping_criteria": [self._each_token(question, said, name)]}
                with nullcontext() if name == "tuned model" else self.model.disable_adapter():
                    (said[name],) = generate_answers(
                        self.model, self.tokenizer, [question], self.style, length, temperature, **more
                    )
                self._draw(question, said)
            ending = "Stopped" if self.cancel.is_set() else "Done"
            self._say(f"{ending} after {time.perf_counter() - began:.1f} s.")
        except Exception as error:  # a thread's error would otherwise be seen by nobody
            self._say(f"It failed: {type(error).__name__}: {error}")

    def _each_token(self, question: str, said: dict, name: str):
        """A stopping criterion, which transformers asks after each token: it draws, and says when to stop."""
        prompt = len(encode_prompt(question, self.tokenizer, self.style))

        def after_token(ids, scores, **_):
            text = self.tokenizer.decode(ids[0, prompt:], skip_special_tokens=True)
            self._draw(question, said | {name: text.strip()})
            return ids.new_full((1,), self.cancel.is_set(), dtype=bool)

        return after_token

    def _say(self, text: str) -> None:
        self.status.value = f'<span role="status">{escape(text)}</span>'

    def _draw(self, question: str, said: dict) -> None:
        columns = {name: [answer] for name, answer in said.items()}
        self.answers.value = answers([question], columns, "Your question").html
