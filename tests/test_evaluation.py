"""The benchmark end to end: the SDK, real generation, real MiniLM; kills, resumes and broken adapters."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from fiqa_helpers import data, metrics, profiles
from fiqa_helpers.base import WorkshopError, Workspace
from fiqa_helpers.evaluate import (
    ANSWERS_LOG,
    SCORES_LOG,
    Decoding,
    EndpointSolver,
    ModelSolver,
    choose_rows,
    compare_all,
    comparison_table,
    evaluate,
    floor_means,
    in_words,
    most_changed,
    read_log,
    refuse_leak,
    save_evaluation,
    score_floors,
)

SHORT = Decoding(max_new_tokens=6)


@pytest.fixture(scope="module")
def similarity():
    from fiqa_helpers.metrics import Similarity

    return Similarity()


@pytest.fixture
def workspace(tmp_path):
    return Workspace(str(tmp_path))


@pytest.fixture
def rows(fiqa_rows):
    """Eight rows with short answers, so that embedding them takes no time."""
    return sorted(fiqa_rows, key=lambda row: len(row["ground_truths"][0]))[20:28]


@pytest.fixture
def adapted(tiny_model):
    return with_adapter(tiny_model, profiles.load_profile("tiny"))


def with_adapter(base, profile, noise=0.0):
    """`base` under a fresh adapter, which changes nothing; `noise` is the scale of random weights in it."""
    import torch
    from peft import get_peft_model

    from fiqa_helpers.model import lora_config

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(base, lora_config(profile)).eval()
        make_noise(model, noise)
    return model


def make_noise(model, noise):
    for name, weights in model.named_parameters():
        if "lora_B" in name and noise:
            weights.data.normal_(std=noise)


class Watched(ModelSolver):
    """Keeps the questions of every batch that is generated; nothing else differs."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.batches = []

    def _generate(self, questions):
        self.batches.append(questions)
        return super()._generate(questions)


def solver_for(model, tokenizer, tuned=True, decoding=SHORT, batch_size=3, kind=Watched):
    return kind(model, tokenizer, "plain", decoding, batch_size, tuned)


def both(workspace, rows, model, tokenizer, similarity, decoding=SHORT):
    return [
        evaluate(
            workspace,
            rows,
            solver_for(model, tokenizer, tuned, decoding),
            similarity,
            "tuned" if tuned else "base",
        )
        for tuned in (False, True)
    ]


def test_a_copy_of_the_base_is_no_difference(workspace, rows, adapted, tiny_tokenizer, similarity):
    """An adapter that changes nothing must not win or lose by chance, in any metric."""
    from fiqa_helpers.evaluate import reference_nll

    base, tuned = both(workspace, rows, adapted, tiny_tokenizer, similarity)
    for side, tuned_side in ((base, False), (tuned, True)):
        with solver_for(adapted, tiny_tokenizer, tuned_side).active():
            side.add("nll", reference_nll(adapted, tiny_tokenizer, rows, profiles.load_profile("tiny")))
    found = compare_all(base, tuned)
    assert set(found) == set(metrics.METRICS)
    assert {comparison.verdict for comparison in found.values()} == {"no difference"}
    floors = score_floors(rows, similarity)
    assert "no difference is shown" in in_words(found, floors, len(rows))


def test_an_oracle_is_perfect(workspace, rows, similarity):
    """If the reference itself does not score 1, solver or scorer were handed the wrong row."""
    from nemo_evaluator import SolveResult
    from nemo_evaluator.observability.types import ModelResponse

    class Oracle:
        batch_size, in_batch, stop = 4, 0.0, False

        def identity(self):
            return {"solver": "oracle"}

        def prompt(self, question):
            return question

        async def solve(self, task):
            said = next(row["ground_truths"][0] for row in rows if row["question"] == task.prompt)
            return SolveResult(said, ModelResponse(said, finish_reason="stop", completion_tokens=1))

    found = evaluate(workspace, rows, Oracle(), similarity, "oracle")
    for name in ("similarity", "similarity_cut", "token_f1", "rouge_l", "length_ratio", "stopped"):
        assert found.values(name) == pytest.approx([1.0] * len(rows), abs=1e-5), name
    assert [sample["question"] for sample in found.samples] == [row["question"] for row in rows]


def test_answers_are_made_in_full_batches(workspace, rows, adapted, tiny_tokenizer, similarity):
    """One at a time would take hours on a GPU; a batch in the wrong order gives a row another's answer."""
    from fiqa_helpers.generate import generate_answers

    solver = solver_for(adapted, tiny_tokenizer)
    found = evaluate(workspace, rows, solver, similarity, "tuned")
    assert [len(batch) for batch in solver.batches] == [3, 3, 2]
    for sample, row in zip(found.samples, rows, strict=True):
        alone = generate_answers(adapted, tiny_tokenizer, [row["question"]], "plain", SHORT.max_new_tokens)[0]
        assert (sample["answer"], sample["stopped"]) == (alone.text, alone.stopped)


def test_the_same_evaluation_again_generates_nothing(
    workspace, rows, adapted, tiny_tokenizer, similarity, capsys
):
    """A second run that answers again costs an hour; one that scores otherwise is no repeat."""
    first = evaluate(workspace, rows, solver_for(adapted, tiny_tokenizer), similarity, "tuned")
    solver = solver_for(adapted, tiny_tokenizer)
    again = evaluate(workspace, rows, solver, similarity, "tuned")
    assert solver.batches == [] and again.reused == len(rows)
    assert again.samples == first.samples
    assert "8 of them kept from before" in capsys.readouterr().out


def test_whatever_decides_the_answers_has_a_folder_of_its_own(
    workspace, rows, adapted, tiny_tokenizer, similarity
):
    """The SDK's resume returns the old answers for a changed adapter: only another folder prevents it."""

    def folder(rows=rows, **kwargs):
        solver = solver_for(adapted, tiny_tokenizer, **kwargs)
        found = evaluate(workspace, rows, solver, similarity, "x")
        assert found.reused in (0, len(rows)) and len(solver.batches) == 0 or found.reused == 0
        return found.folder

    base, tuned = folder(tuned=False), folder()
    others = [
        base,
        tuned,
        folder(rows=rows[::-1]),
        folder(decoding=Decoding(7)),
        folder(decoding=Decoding(6, 2)),
    ]
    weight = next(w for name, w in adapted.named_parameters() if "lora_B" in name)
    weight.data[0, 0] += 1e-3
    others.append(folder())
    adapted.peft_config["default"].lora_alpha += 1
    others.append(folder())
    assert len(set(others)) == len(others)
    assert folder(tuned=False) == base, "the base does not depend on the adapter: its answers can be kept"
    embedding = adapted.get_input_embeddings().weight
    embedding.data += 1e-3
    assert folder(tuned=False) != base


def test_a_changed_metric_scores_kept_answers_again(
    workspace, rows, adapted, tiny_tokenizer, similarity, monkeypatch
):
    """Scores of an older definition must not be mixed with new ones, nor cost new answers."""
    first = evaluate(workspace, rows, solver_for(adapted, tiny_tokenizer), similarity, "tuned")
    assert len(read_log(first.folder / SCORES_LOG)) == len(rows)
    monkeypatch.setattr(metrics, "VERSION", metrics.VERSION + 1)
    monkeypatch.setattr(metrics, "repeated", lambda text: 0.125)
    solver = solver_for(adapted, tiny_tokenizer)
    again = evaluate(workspace, rows, solver, similarity, "tuned")
    assert solver.batches == [] and again.values("repeated") == [0.125] * len(rows)


def test_half_a_line_is_no_answer(workspace, rows, adapted, tiny_tokenizer, similarity):
    """The SDK appends to half a line that a kill has left, and so loses the next answer as well."""
    whole = evaluate(workspace, rows, solver_for(adapted, tiny_tokenizer), similarity, "tuned")
    log = whole.folder / ANSWERS_LOG
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:4]) + lines[4][:40])
    (whole.folder / SCORES_LOG).write_bytes((whole.folder / SCORES_LOG).read_bytes()[:-30])
    kept = read_log_keys(lines[:4])
    solver = solver_for(adapted, tiny_tokenizer)
    again = evaluate(workspace, rows, solver, similarity, "tuned")
    asked = [question for batch in solver.batches for question in batch]
    assert len(asked) == len(rows) - len(kept)
    assert [s["answer"] for s in again.samples] == [s["answer"] for s in whole.samples]
    assert len(read_log(log)) == len(rows)


def read_log_keys(lines):
    return [record["problem_idx"] for record in map(json.loads, lines) if "problem_idx" in record]


def test_a_failure_is_an_error_and_not_a_bad_answer(workspace, rows, adapted, tiny_tokenizer, similarity):
    """The SDK can score a failed request as 0: a crash would be reported as a model that got worse."""

    class Failing(Watched):
        def _generate(self, questions):
            if len(self.batches) == 2:
                raise ValueError("out of order")
            return super()._generate(questions)

    solver = solver_for(adapted, tiny_tokenizer, kind=Failing)
    started = time.monotonic()
    with pytest.raises(ValueError, match="out of order"):
        evaluate(workspace, rows, solver, similarity, "tuned")
    assert time.monotonic() - started < 20, "the SDK has waited to try again"
    mended = solver_for(adapted, tiny_tokenizer)
    found = evaluate(workspace, rows, mended, similarity, "tuned")
    assert found.reused == 6 and [len(batch) for batch in mended.batches] == [2]


def test_a_full_gpu_is_said_in_one_sentence(workspace, rows, adapted, tiny_tokenizer, similarity):
    """Out of memory arrives wrapped in the SDK's error: a reader needs the remedy, not forty frames."""
    import torch

    class Full(Watched):
        def _generate(self, questions):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(WorkshopError, match="memory is full.*answers so far are kept"):
        evaluate(workspace, rows, solver_for(adapted, tiny_tokenizer, kind=Full), similarity, "tuned")


def test_rows_for_this_machine(fiqa_rows):
    """A misread number of rows would test on all of them for an hour, or on one and call it a result."""
    from datasets import Dataset

    test = Dataset.from_list(fiqa_rows[:100])
    laptop, gpu = profiles.PROFILES["laptop"], profiles.PROFILES["gpu80"]
    assert [len(choose_rows(test, n, laptop)) for n in (0, 2, 30, 1000)] == [24, 2, 30, 100]
    assert len(choose_rows(test, 0, gpu)) == 100
    many = choose_rows(test, 30, laptop)
    assert many[:2] == choose_rows(test, 2, gpu) != fiqa_rows[:2]  # drawn; more rows keep the first
    assert choose_rows(test, 30, replace(laptop, seed=43)) != many
    for wrong in (1, -1):
        with pytest.raises(WorkshopError, match="at least 2"):
            choose_rows(test, wrong, laptop)


def test_an_interrupt_ends_at_the_next_token(workspace, rows, adapted, tiny_tokenizer, similarity):
    """Otherwise the square button waits for the last answer, or leaves a thread that generates on."""

    class Interrupting(Watched):
        def _generate(self, questions):
            if self.batches:
                os.kill(os.getpid(), signal.SIGINT)
            return super()._generate(questions)

    long = Decoding(max_new_tokens=120)
    solver = solver_for(adapted, tiny_tokenizer, decoding=long, kind=Interrupting)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background job
    try:
        with pytest.raises(KeyboardInterrupt):
            evaluate(workspace, rows, solver, similarity, "tuned")
    finally:
        signal.signal(signal.SIGINT, handler)
    assert len(solver.batches) == 2 and solver.stop
    (folder,) = (workspace.evaluation / "answers").iterdir()
    assert len(read_log(folder / ANSWERS_LOG)) == 3
    again = Watched(adapted, tiny_tokenizer, "plain", long, 3)
    assert evaluate(workspace, rows, again, similarity, "tuned").reused == 3


PROGRESS = """
from fiqa_helpers.show import EvalProgress
progress = EvalProgress("base", 40, 10)
for i in range(40):
    progress.on_step()
    progress._last -= 60
    progress.show()
progress.close()
"""


@pytest.mark.parametrize("person", [True, False])
def test_progress_leaves_one_line_in_a_notebook(person, monkeypatch, tmp_path, capfd):
    """A line for every step would bury the notebook; a lost last line would leave no result."""
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("JPY_SESSION_NAME", "x") if person else monkeypatch.delenv("JPY_SESSION_NAME", False)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(PROGRESS)])
    NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    (output,) = notebook.cells[0].outputs
    text = output.data["text/plain"] if person else output.text.rstrip()
    assert text.startswith("base: 40 answers in ") and text.endswith("10 of them kept from before")
    assert "\n" not in text
    assert person or "base: 39 of 40 answers, 0 s left" in capfd.readouterr().err


def test_time_left_counts_what_is_in_work(monkeypatch):
    """Kept answers cost nothing: counted as work they would promise an end that is far too near."""
    from fiqa_helpers import show

    now = [100.0]
    monkeypatch.setattr(show.time, "perf_counter", lambda: now[0])
    progress = show.EvalProgress("tuned", 100, reused=40, in_batch=lambda: 5.0)
    for _ in range(45):
        progress.on_step()
    now[0] += 10
    assert progress.line() == "tuned: 50 of 100 answers, 50 s left"  # 10 new ones in 10 s, 50 to go
    assert [show.duration(t) for t in (59, 200, 7500)] == ["59 s", "3 min 20 s", "2 h 5 min"]


def test_two_at_once_are_refused(workspace, rows, adapted, tiny_tokenizer, similarity):
    """Two processes that append to one log would answer everything twice."""
    from filelock import FileLock

    found = evaluate(workspace, rows, solver_for(adapted, tiny_tokenizer), similarity, "tuned")
    with FileLock(found.folder / ".lock"), pytest.raises(WorkshopError, match="Another process"):
        evaluate(workspace, rows, solver_for(adapted, tiny_tokenizer), similarity, "tuned")


KILLED = """
import json, sys
from fiqa_helpers import model, profiles
from fiqa_helpers.evaluate import evaluate
from fiqa_helpers.base import Workspace
from fiqa_helpers.metrics import Similarity
from fiqa_helpers.evaluate import Decoding, ModelSolver

profile = profiles.load_profile("tiny")
tokenizer = model.load_tokenizer(profile)
rows = json.load(open(sys.argv[2]))
solver = ModelSolver(model.tiny_model(tokenizer), tokenizer, "plain", Decoding(40), 2)
evaluate(Workspace(sys.argv[1]), rows, solver, Similarity(), "base")
"""


def test_a_killed_evaluation_repeats_no_answer(
    workspace, fiqa_rows, tiny_model, tiny_tokenizer, similarity, tmp_path
):
    """kill -9 in the middle: whatever was in the log is not generated again, and the result is the same."""
    rows = sorted(fiqa_rows, key=lambda row: len(row["ground_truths"][0]))[:18]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(tmp_path / "rows.json")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 240
    logs = []
    while not (logs and logs[0].read_bytes().count(b"problem_idx") >= 5):
        assert process.poll() is None, process.stderr.read().decode()[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.005)
        logs = list((workspace.evaluation / "answers").glob(f"*/{ANSWERS_LOG}"))
    process.kill()
    process.wait()
    lines = logs[0].read_bytes().splitlines(keepends=True)
    kept = set(read_log_keys([line for line in lines if line.endswith(b"\n")]))
    assert 5 <= len(kept) < len(rows), "it was too fast to be killed in the middle"

    solver = solver_for(tiny_model, tiny_tokenizer, decoding=Decoding(40), batch_size=2)
    found = evaluate(workspace, rows, solver, similarity, "base")
    asked = {question for batch in solver.batches for question in batch}
    assert found.folder == logs[0].parent and found.reused == len(kept)
    assert asked == {rows[i]["question"] for i in range(len(rows)) if i not in kept}
    whole = solver_for(tiny_model, tiny_tokenizer, decoding=Decoding(40), batch_size=2)
    fresh = evaluate(Workspace(str(tmp_path / "fresh")), rows, whole, similarity, "base")
    assert [s["answer"] for s in fresh.samples] == [s["answer"] for s in found.samples]


def test_reference_nll_is_the_models_own_loss(tiny_model, tiny_tokenizer, rows):
    """Padding, the shift by one or a row mixed up with its neighbour would all give plausible numbers."""
    import torch

    from fiqa_helpers.evaluate import reference_nll
    from fiqa_helpers.rows import encode

    profile = profiles.load_profile("tiny", "{max_length: 200, tokens_per_batch: 800}")
    found = reference_nll(tiny_model, tiny_tokenizer, rows, profile)
    for row, value in zip(rows, found, strict=True):
        encoded = encode(row["question"], row["ground_truths"][0], tiny_tokenizer, "plain", 200)
        with torch.no_grad():
            loss = tiny_model(**{name: torch.tensor([ids]) for name, ids in encoded.items()}).loss
        assert value == pytest.approx(loss.item(), abs=1e-4)
    assert len(set(found)) == len(rows)


def test_kept_nll_is_not_used_for_another_cut(tiny_model, tiny_tokenizer, rows, tmp_path):
    """A file of values for other lengths or other rows would be taken for this model's."""
    from fiqa_helpers.evaluate import reference_nll

    kept, short = tmp_path / "nll.json", profiles.load_profile("tiny", "{max_length: 100}")
    first = reference_nll(tiny_model, tiny_tokenizer, rows, short, kept)
    kept.write_text(kept.read_text().replace(str(first[0]), "99.0"))
    assert reference_nll(None, None, rows, short, kept)[0] == 99.0
    long = profiles.load_profile("tiny")
    assert reference_nll(tiny_model, tiny_tokenizer, rows, long, kept)[0] != 99.0


def test_an_adapter_is_not_tested_on_its_lessons(workspace, fiqa_rows):
    """The packaged rows are the hub's test split: trained on one, tested on the other, it has seen most."""
    splits, _ = data.load_with_report("packaged")
    card = {
        "definition": {
            f"{split}_sha256": data.fingerprint(splits[split]) for split in ("train", "validation")
        }
    }
    assert "None of the 100" in refuse_leak(card, list(splits["test"]), workspace)
    with pytest.raises(WorkshopError, match="548 of these 648"):
        refuse_leak(card, fiqa_rows, workspace)
    disguised = [{"question": f"  {splits['train'][0]['question'].upper()}?!"}]
    with pytest.raises(WorkshopError, match="1 of these 1"):
        refuse_leak(card, disguised, workspace)


def test_a_leak_is_found_in_rows_of_ones_own(workspace, fiqa_rows):
    """Training rows from a folder are known through notebook 01's files; from elsewhere it must be said."""
    splits, _ = data.load_with_report("packaged")
    own = {split: splits[split].select(range(10)) for split in splits}
    data.write_processed(own, workspace.data)
    card = {"definition": {"train_sha256": data.fingerprint(own["train"])}}
    with pytest.raises(WorkshopError, match="10 of these 10"):
        refuse_leak(card, list(own["train"]), workspace)
    assert "None of the 10" in refuse_leak(card, list(own["test"]), workspace)
    with pytest.raises(WorkshopError, match="10 of these 10"):  # an older card, without fingerprints
        refuse_leak({"profile": {"data": "packaged"}}, list(own["train"]), workspace)
    for unknown in ({}, {"definition": {"train_sha256": "0" * 64}}, {"profile": {"data": "hub"}}):
        assert "cannot be ruled out" in refuse_leak(unknown, list(own["test"]), workspace)


@pytest.fixture
def server():
    """A local server of the OpenAI protocol's completions; it answers every prompt with its question."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def reply(self, content, status=200):
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if request["max_tokens"] == 1 and request["model"] in ("base", "breaks"):  # the check before it
                self.reply({"choices": [{"text": "A"}]})
                return
            if request["model"] != "base":
                self.reply({"error": f"there is no {request['model']}"}, status=404)
                return
            asked.append(request)
            text = " " + request["prompt"].split("Question: ")[1].removesuffix("\n\nAnswer:")
            self.reply(
                {"choices": [{"text": text, "finish_reason": "stop"}], "usage": {"completion_tokens": 5}}
            )

    found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=found.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{found.server_port}/v1", asked
    found.shutdown()
    found.server_close()


def test_an_endpoint_gets_the_workshops_own_prompt(workspace, rows, tiny_tokenizer, similarity, server):
    """A served model that is asked in another form, or not greedily, is not the model that was trained."""
    from fiqa_helpers.rows import build_prompt

    url, asked = server
    solver = EndpointSolver(url, "base", tiny_tokenizer, "plain", SHORT.max_new_tokens)
    found = evaluate(workspace, rows, solver, similarity, "base")
    assert sorted(request["prompt"] for request in asked) == sorted(
        build_prompt(row["question"]) for row in rows
    )
    assert {(request["temperature"], request["max_tokens"]) for request in asked} == {(0.0, 6)}
    floors = score_floors(rows, similarity)
    assert found.values("similarity") == pytest.approx([s["similarity"] for s in floors["echo the question"]])
    again = EndpointSolver(url, "base", tiny_tokenizer, "plain", SHORT.max_new_tokens)
    assert evaluate(workspace, rows, again, similarity, "base").reused == len(asked) == len(rows)


def test_a_server_that_fails_is_named(workspace, rows, tiny_tokenizer, similarity, server):
    """A dead or refusing server must not become a table of zeros."""
    url, _ = server
    with pytest.raises(WorkshopError, match="404.*there is no tuned"):
        evaluate(workspace, rows, EndpointSolver(url, "tuned", tiny_tokenizer), similarity, "tuned")
    with pytest.raises(WorkshopError, match="gave no answer to row 0"):
        evaluate(workspace, rows, EndpointSolver(url, "breaks", tiny_tokenizer), similarity, "tuned")
    with pytest.raises(WorkshopError, match="No OpenAI-compatible server"):
        EndpointSolver("http://127.0.0.1:9/v1", "base", tiny_tokenizer).check()


def test_files_hold_every_row_and_the_plots_say_what_they_show(
    workspace, rows, adapted, tiny_tokenizer, similarity
):
    """A summary without its rows cannot be checked, and a figure without words is not there for everyone."""
    from fiqa_helpers import evaluate

    make_noise(adapted, 0.5)
    base, tuned = both(workspace, rows, adapted, tiny_tokenizer, similarity)
    floors = score_floors(rows, similarity)
    found = compare_all(base, tuned)
    samples, summary = save_evaluation(workspace, rows, base, tuned, floors, found, profile="tiny")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [line["question"] for line in lines] == [row["question"] for row in rows]
    means = json.loads(summary.read_text())
    for side in ("base", "tuned"):
        mean = sum(line[side]["similarity"] for line in lines) / len(lines)
        assert means["comparisons"]["similarity"][side] == pytest.approx(mean)
        assert means["evaluator"][side]["summary"]["mean"] == pytest.approx(mean)  # the SDK agrees
    echo = sum(line["floors"]["echo the question"]["similarity"] for line in lines) / len(lines)
    assert means["floors"]["echo the question"]["similarity"] == pytest.approx(echo)
    assert len(comparison_table(found, floors)) == len(found)
    figure, alt = evaluate.draw_differences(base, tuned, found["similarity"])
    figure.savefig(workspace.plots / "a.png")
    assert f"{found['similarity'].difference:+.3f}" in alt and "zero" in alt
    figure, alt = evaluate.draw_by_length(base, tuned, floor_means(floors, "similarity"))
    figure.savefig(workspace.plots / "b.png")
    assert all(name in alt for name in floors)


def test_changed_answers_are_shown_escaped(workspace, rows, adapted, tiny_tokenizer, similarity):
    """Generated text that reaches the page as HTML runs there; best and worst must not be swapped either."""
    base, tuned = both(workspace, rows, adapted, tiny_tokenizer, similarity)
    base.add("similarity", [0.5] * 8)
    tuned.add("similarity", [0.9, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.1])
    tuned.add("answer", ["<script>alert(1)</script>"] * 8)
    best, worst = most_changed(base, tuned, 1)
    assert "<script>" not in best.html and "&lt;script&gt;" in best.html
    assert "+0.400" in best.text and rows[0]["question"][:20] in best.text
    assert "-0.400" in worst.text and rows[7]["question"][:20] in worst.text


@pytest.mark.slow
def test_a_broken_adapter_is_reported_as_worse(workspace, fiqa_rows, smollm2, similarity):
    """The whole point: an adapter of random weights on the real model must not pass for a fine-tuned one."""
    from fiqa_helpers import model
    from fiqa_helpers.evaluate import reference_nll

    profile = profiles.load_profile("laptop", "{max_length: 160}")
    tokenizer = model.load_tokenizer(profile)
    broken = with_adapter(model.load_base(profile), profile, noise=0.3)
    rows = list(data.load_with_report("packaged")[0]["test"].select(range(10)))
    base, tuned = both(workspace, rows, broken, tokenizer, similarity, Decoding(24))
    for side, is_tuned in ((base, False), (tuned, True)):
        with solver_for(broken, tokenizer, is_tuned).active():
            side.add("nll", reference_nll(broken, tokenizer, rows, profile))
    found = compare_all(base, tuned)
    assert {found[name].verdict for name in ("similarity", "token_f1", "rouge_l", "nll")} == {"worse"}
    assert found["similarity"].win_rate < 0.3


@pytest.mark.slow
def test_a_served_model_gives_the_answers_of_the_same_model_here(
    workspace, fiqa_rows, smollm2, similarity, tmp_path
):
    """Another prompt, a second BOS or sampling on the way to a server would change the answers."""
    import socket

    from fiqa_helpers import model

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = os.path.join(os.path.dirname(sys.executable), "transformers")
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    with open(tmp_path / "server.log", "wb") as log:
        server = subprocess.Popen([program, "serve", str(smollm2), *options], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 300
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert server.poll() is None and time.monotonic() < deadline, (
                tmp_path / "server.log"
            ).read_text()[-3000:]
            time.sleep(0.5)
        rows = sorted(fiqa_rows, key=lambda row: len(row["ground_truths"][0]))[30:34]
        profile = profiles.load_profile("laptop")
        tokenizer = model.load_tokenizer(profile)
        decoding = Decoding(16, no_repeat_ngram_size=0)  # a server has no guard
        endpoint = EndpointSolver(f"http://127.0.0.1:{port}/v1", str(smollm2), tokenizer, "plain", 16)
        there = evaluate(workspace, rows, endpoint, similarity, "served")
    finally:
        server.kill()
        server.wait()
    here = evaluate(
        workspace,
        rows,
        solver_for(model.load_base(profile), tokenizer, decoding=decoding),
        similarity,
        "here",
    )
    assert there.folder != here.folder
    for served, own in zip(there.samples, here.samples, strict=True):
        assert (served["answer"], served["stopped"]) == (own["answer"], own["stopped"])


def answers(url):
    import urllib.request

    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False
