"""Who answers the benchmark's questions: a model in this process, or a URL."""

import asyncio
import json
import os
import urllib.error
import urllib.request
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from fiqa_helpers.benchmark import fingerprint_adapter, fingerprint_base, has_adapter
from fiqa_helpers.errors import WorkshopError
from fiqa_helpers.generation import GUARD, Answer, generate_answers
from fiqa_helpers.prompts import build_prompt

if TYPE_CHECKING:
    from nemo_evaluator import SeedResult, SolveResult
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Decoding:
    """How answers are made; always greedy, so that the same weights give the same answers."""

    max_new_tokens: int = 128
    no_repeat_ngram_size: int = GUARD  # no sequence of so many tokens occurs twice; 0 forbids nothing

    def keywords(self) -> dict[str, object]:
        """What `generate` is given beside the length."""
        return {"no_repeat_ngram_size": self.no_repeat_ngram_size}


class Stopped(BaseException):
    """The person who waits has interrupted: ends `generate` at the next token, past the SDK's retries."""


class ModelSolver:
    """Answers from a model in this process, base or tuned: the base is the adapter switched off.

    The SDK asks for one answer at a time, many at once. Whoever asks waits in a queue, and whole batches of
    `batch_size` are generated together.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        style: str = "plain",
        decoding: Decoding = Decoding(),
        batch_size: int = 8,
        tuned: bool = True,
    ):
        self.model, self.tokenizer, self.style, self.decoding = model, tokenizer, style, decoding
        self.batch_size, self.tuned = batch_size, tuned
        self.in_batch = 0.0  # of the batch in work, answers' worth of tokens that are done
        self.stop = False
        self._waiting: list[tuple[str, asyncio.Future]] = []
        self._worker: asyncio.Task | None = None

    def identity(self) -> dict[str, Any]:
        """What decides the answers besides prompts: weights, adapter, precision, decoding."""
        return {
            "base": fingerprint_base(self.model),
            "adapter": fingerprint_adapter(self.model) if self.tuned else None,
            "precision": f"{self.model.dtype} on {self.model.device.type}",
            "decoding": asdict(self.decoding),
        }

    def prompt(self, question: str) -> str:
        """The text before the answer, as the log keeps it."""
        return build_prompt(question, self.style, self.tokenizer)

    def active(self):
        """Context in which the model is the one to be measured."""
        return nullcontext() if self.tuned or not has_adapter(self.model) else self.model.disable_adapter()

    async def solve(self, task: "SeedResult") -> "SolveResult":
        """Called by the SDK for every row."""
        from nemo_evaluator import SolveResult
        from nemo_evaluator.observability.types import ModelResponse

        answer = asyncio.get_running_loop().create_future()
        self._waiting.append((task.metadata["question"], answer))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        said: Answer = await answer
        reason = "stop" if said.stopped else "length"
        response = ModelResponse(
            said.text, finish_reason=reason, completion_tokens=said.n_tokens, total_tokens=said.n_tokens
        )
        return SolveResult(response=said.text, model_response=response)

    async def _work(self) -> None:
        while self._waiting:
            seen = 0
            while len(self._waiting) > seen:  # let everyone who is about to ask join the batch
                seen = len(self._waiting)
                await asyncio.sleep(0)
            batch, self._waiting = self._waiting[: self.batch_size], self._waiting[self.batch_size :]
            try:
                answers = self._generate([question for question, _ in batch])
                pairs = list(zip(batch, answers, strict=True))
            except BaseException as error:  # hand it to everyone who waits: the SDK decides what to do
                for _, future in batch + self._waiting:
                    if not future.done():
                        future.set_exception(error)
                self._waiting = []
                return
            for (_, future), answer in pairs:
                if not future.done():
                    future.set_result(answer)
            await asyncio.sleep(0)

    def _generate(self, questions: list[str]) -> list[Answer]:
        import torch
        from transformers import StoppingCriteriaList

        made = 0

        def after_token(ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
            nonlocal made
            if self.stop:
                raise Stopped
            made += 1
            self.in_batch = len(questions) * made / self.decoding.max_new_tokens
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        more = {"stopping_criteria": StoppingCriteriaList([after_token]), **self.decoding.keywords()}
        try:
            with self.active():
                length = self.decoding.max_new_tokens
                return generate_answers(self.model, self.tokenizer, questions, self.style, length, **more)
        finally:
            self.in_batch = 0.0


class EndpointSolver:
    """Answers from an OpenAI-compatible URL: `/completions` with the workshop's prompt, greedy, no guard."""

    in_batch = 0.0
    stop = False
    batch_size = 8  # requests at once

    def __init__(
        self,
        url: str,
        name: str,
        tokenizer: "PreTrainedTokenizerBase",
        style: str = "plain",
        max_new_tokens: int = Decoding.max_new_tokens,
    ):
        decoding = Decoding(max_new_tokens, no_repeat_ngram_size=0)  # which its protocol does not know
        self.url, self.name, self.decoding = url.rstrip("/"), name, decoding
        self.style, self.tokenizer = style, tokenizer
        self._solver = None

    def identity(self) -> dict[str, Any]:
        """URL and name: what a server holds under that name cannot be seen from here."""
        return {"url": self.url, "model": self.name, "decoding": asdict(self.decoding)}

    def prompt(self, question: str) -> str:
        """The prompt's text without the BOS token, which the server writes itself."""
        bos = self.tokenizer.bos_token
        text = build_prompt(question, self.style, self.tokenizer)
        return text.removeprefix(bos) if bos and self.style == "chat" else text

    def check(self) -> None:
        """Ask for one token, which a server may first have to load its model for.

        Raises:
            WorkshopError: nobody answers at the URL, or not with this model.
        """
        body = {"model": self.name, "prompt": "Question: What is a bond?", "max_tokens": 1}
        headers = {"Content-Type": "application/json", **_authorization()}
        request = urllib.request.Request(f"{self.url}/completions", json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=600) as reply:
                json.load(reply)["choices"][0]["text"]
        except urllib.error.HTTPError as error:
            said = " ".join(error.read(500).decode("utf-8", "replace").split())
            raise WorkshopError(
                f"{self.url} does not answer for model {self.name!r} ({error.code} {said[:200]}): check the "
                "name that it is served under."
            ) from None
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise WorkshopError(
                f"No OpenAI-compatible server answers at {self.url} "
                f"({getattr(error, 'reason', error)}): start it first; the URL ends in /v1."
            ) from None

    async def solve(self, task: "SeedResult") -> "SolveResult":
        """Called by the SDK for every row; retries and time limits are the SDK's."""
        from nemo_evaluator import CompletionSolver

        if self.stop:
            raise Stopped
        if self._solver is None:  # made here, as it belongs to the running event loop
            self._solver = CompletionSolver(
                self.url,
                self.name,
                api_key=os.environ.get("OPENAI_API_KEY"),
                temperature=0.0,
                max_tokens=self.decoding.max_new_tokens,
            )
        found = await self._solver.solve(task)
        found.response = found.response.strip()
        return found

    async def close(self) -> None:
        """Called by the SDK at the end."""
        if self._solver is not None:
            await self._solver.close()
            self._solver = None


def _authorization() -> dict[str, str]:
    key = os.environ.get("OPENAI_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}
