"""The benchmark end to end: the SDK, real generation, real MiniLM; kills, resumes and broken adapters."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from fiqa_helpers import data, evaluate, metrics, profiles
from fiqa_helpers.base import WorkshopError, Workspace
from fiqa_helpers.evaluate import Decoding, Replay, choose_rows, compare_all, reference_nll, refuse_leak
from fiqa_helpers.generate import Answer

SHORT = Decoding(max_new_tokens=6)


@pytest.fixture(scope="module")
def score():
    return metrics.make_score(metrics.Similarity())


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


@pytest.fixture
def batches(monkeypatch):
    """The questions of every batch that is really generated."""
    made, generate = [], evaluate.generate_answers

    def watched(model, tokenizer, questions, *args, **kwargs):
        made.append(questions)
        return generate(model, tokenizer, questions, *args, **kwargs)

    monkeypatch.setattr(evaluate, "generate_answers", watched)
    return made


def with_adapter(base, profile, noise=0.0):
    """`base` under a fresh adapter, which changes nothing; `noise` is the scale of random weights in it."""
    import torch
    from peft import get_peft_model

    from fiqa_helpers.model import lora_config

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(base, lora_config(profile)).eval()
        for name, weights in model.named_parameters():
            if "lora_B" in name and noise:
                weights.data.normal_(std=noise)
    return model


def answered(workspace, rows, model, tokenizer, tuned=True, decoding=SHORT, batch_size=3):
    return evaluate.answer_rows(workspace, rows, model, tokenizer, "plain", decoding, tuned, batch_size)


def scored(rows, solver, score, label, folder=None):
    prompts = [row["question"] for row in rows]
    return evaluate.evaluate(rows, prompts, solver, score, label, folder or solver.folder)


def both(workspace, rows, model, tokenizer, score, decoding=SHORT):
    """Base and tuned, answered, scored and with their NLL."""
    profile = profiles.load_profile("tiny", "{max_length: 160}")
    sides = []
    for label in ("base", "tuned"):
        solver = answered(workspace, rows, model, tokenizer, label == "tuned", decoding)
        sides.append(scored(rows, solver, score, label))
        with evaluate.asked(model, tuned=label == "tuned"):
            sides[-1].add("nll", reference_nll(model, tokenizer, rows, profile))
    return sides


def test_a_copy_of_the_base_is_no_difference(workspace, rows, adapted, tiny_tokenizer, score):
    """An adapter that changes nothing must not win or lose by chance, in any metric."""
    found = compare_all(*both(workspace, rows, adapted, tiny_tokenizer, score))
    assert set(found) == {"similarity", "token_f1", "token_f1_60", "stopped", "repeated", "nll"}
    assert {comparison.verdict for comparison in found.values()} == {"no difference"}
    assert "no difference is shown" in found["similarity"].in_words()


def test_the_base_is_asked_without_the_adapter(workspace, rows, adapted, tiny_tokenizer, tiny_model, batches):
    """A base that is asked with the adapter on equals the tuned model: tuning would seem to do nothing."""
    import torch

    with torch.no_grad():
        for name, weights in adapted.named_parameters():
            if "lora_B" in name:
                weights.normal_(std=0.5)
    base = answered(workspace, rows, adapted, tiny_tokenizer, tuned=False)
    tuned = answered(workspace, rows, adapted, tiny_tokenizer, tuned=True)
    assert [len(batch) for batch in batches] == [3, 3, 2] * 2, "full batches"
    assert base.answers != tuned.answers
    plain = adapted.unload()
    assert answered(Workspace(str(tuned.folder)), rows, plain, tiny_tokenizer).answers == base.answers
    alone = [answered(workspace, [row], plain, tiny_tokenizer).answers[0] for row in rows]
    assert alone == base.answers, "a batch in the wrong order gives a row another's answer"


def test_an_oracle_is_perfect(workspace, rows, score):
    """If the reference itself does not score 1, solver or scorer were handed the wrong row."""
    oracle = Replay([Answer(row["ground_truths"][0], True, 1) for row in rows], workspace.evaluation)
    found = scored(rows, oracle, score, "oracle")
    for name in ("similarity", "token_f1", "token_f1_60", "stopped"):
        assert found.values(name) == pytest.approx([1.0] * len(rows), abs=1e-5), name
    assert [sample["question"] for sample in found.samples] == [row["question"] for row in rows]
    assert found.sdk["summary"]["mean"] == pytest.approx(1, abs=1e-5), "the SDK's own summary agrees"


def test_whatever_decides_the_answers_has_a_folder_of_its_own(
    workspace, rows, adapted, tiny_tokenizer, batches
):
    """The SDK's own resume returns the old answers for a changed adapter: only another folder prevents it."""

    def folder(rows=rows, **kwargs):
        return answered(workspace, rows, adapted, tiny_tokenizer, **kwargs).folder

    base, reverse = folder(tuned=False), folder(rows=rows[::-1])
    others = [base, reverse, folder(), folder(decoding=Decoding(7)), folder(decoding=Decoding(6, 2))]
    weight = next(w for name, w in adapted.named_parameters() if "lora_B" in name)
    weight.data[0, 0] += 1e-3
    others.append(folder())
    adapted.peft_config["default"].lora_alpha += 1
    others.append(folder())
    assert len(set(others)) == len(others)
    before = len(batches)
    assert folder(tuned=False) == base, "the base does not depend on the adapter: its answers can be kept"
    assert len(batches) == before
    adapted.get_input_embeddings().weight.data += 1e-3
    assert folder(tuned=False) != base


def test_what_an_interrupt_and_half_a_line_cost(
    workspace, rows, adapted, tiny_tokenizer, monkeypatch, batches
):
    """A crash costs the answers of one batch; what is appended to half a line would be lost with it."""
    watched = evaluate.generate_answers

    def failing(*args, **kwargs):
        if len(batches) == 2:
            raise KeyboardInterrupt
        return watched(*args, **kwargs)

    monkeypatch.setattr(evaluate, "generate_answers", failing)
    with pytest.raises(KeyboardInterrupt):
        answered(workspace, rows, adapted, tiny_tokenizer)
    batches.clear()
    whole = answered(workspace, rows, adapted, tiny_tokenizer)
    assert [len(batch) for batch in batches] == [2] and len(whole.answers) == len(rows)
    kept = whole.folder / evaluate.KEPT
    lines = kept.read_text().split("\n")
    kept.write_text("\n".join(lines[:5]) + "\n" + lines[5][:30])  # the first line is empty
    for expected in ([3, 1], []):
        batches.clear()
        assert answered(workspace, rows, adapted, tiny_tokenizer).answers == whole.answers
        assert [len(batch) for batch in batches] == expected


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


KILLED = """
import json, sys
from fiqa_helpers import model, profiles
from fiqa_helpers.base import Workspace
from fiqa_helpers.evaluate import Decoding, answer_rows

tokenizer = model.load_tokenizer(profiles.load_profile("tiny"))
rows = json.load(open(sys.argv[2]))
lm = model.tiny_model(tokenizer).eval()
answer_rows(Workspace(sys.argv[1]), rows, lm, tokenizer, "plain", Decoding(40), False, batch_size=2)
"""


def test_a_killed_evaluation_repeats_no_answer(
    workspace, fiqa_rows, tiny_model, tiny_tokenizer, tmp_path, batches
):
    """kill -9 in the middle: whatever was kept is not generated again, and the result is the same."""
    rows = sorted(fiqa_rows, key=lambda row: len(row["ground_truths"][0]))[:40]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(tmp_path / "rows.json")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline, kept = time.monotonic() + 240, {}
    while len(kept) < 5:
        assert process.poll() is None, process.stderr.read().decode()[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.005)
        for file in (workspace.evaluation / "answers").glob(f"*/{evaluate.KEPT}"):
            kept = evaluate.kept_answers(file)
    process.kill()
    process.wait()
    kept = evaluate.kept_answers(file)
    assert 5 <= len(kept) < len(rows), "it was too fast to be killed in the middle"

    options = dict(tuned=False, decoding=Decoding(40), batch_size=2)
    found = answered(workspace, rows, tiny_model.eval(), tiny_tokenizer, **options)
    assert found.folder == file.parent
    asked = {question for batch in batches for question in batch}
    assert asked == {rows[i]["question"] for i in range(len(rows)) if i not in kept}
    fresh = answered(Workspace(str(tmp_path / "fresh")), rows, tiny_model, tiny_tokenizer, **options)
    assert fresh.answers == found.answers


def test_reference_nll_is_the_models_own_loss(tiny_model, tiny_tokenizer, rows):
    """Padding, the shift by one or a row mixed up with its neighbour would all give plausible numbers."""
    import torch

    from fiqa_helpers.rows import encode

    def by_hand(reference):
        row = encode(rows[0]["question"], reference, tiny_tokenizer, "plain", 200)
        with torch.no_grad():
            logits = tiny_model(torch.tensor([row["input_ids"]])).logits[0]
        places = [i for i, label in enumerate(row["labels"]) if label != -100]
        chosen = [-logits[i - 1].log_softmax(-1)[row["labels"][i]].item() for i in places]
        return sum(chosen) / len(chosen)

    profile = profiles.load_profile("tiny", "{max_length: 200}")
    own, other = rows[0]["ground_truths"][0], rows[1]["ground_truths"][0]
    several = [{"question": rows[0]["question"], "ground_truths": [own, other]}]
    alone = reference_nll(tiny_model.train(), tiny_tokenizer, rows[:1], profile)
    assert alone == pytest.approx([by_hand(own)])
    assert tiny_model.training, "the model is given back as it was"
    tiny_model.eval()
    best = min(by_hand(own), by_hand(other))
    assert reference_nll(tiny_model, tiny_tokenizer, several, profile) == pytest.approx([best], abs=1e-5)
    assert len(set(reference_nll(tiny_model, tiny_tokenizer, rows, profile))) == len(rows)


def test_an_adapter_is_not_tested_on_its_lessons(workspace, fiqa_rows):
    """The packaged rows are the hub's test split: trained on one, tested on the other, it has seen most.

    Rows from a folder are known through notebook 01's files; where they are from elsewhere it is said.
    """
    splits = data.load_fiqa("packaged")
    card = {"definition": {"train_sha256": data.fingerprint(splits["train"])}}
    assert "None of the 100" in refuse_leak(card, list(splits["test"]), workspace)
    disguised = [{"question": f"  {splits['train'][0]['question'].upper()}?!"}]
    for rows, said in ((fiqa_rows, "548 of these 648"), (disguised, "1 of these 1")):
        with pytest.raises(WorkshopError, match=said):
            refuse_leak(card, rows, workspace)
    own = {split: splits[split].select(range(10)) for split in splits}
    data.write_processed(own, workspace.data)
    card = {"definition": {"train_sha256": data.fingerprint(own["train"])}}
    for known in (card, {"profile": {"data": "packaged"}}):  # an older card has no fingerprints
        with pytest.raises(WorkshopError, match="10 of these 10"):
            refuse_leak(known, list(own["train"]), workspace)
    assert "None of the 10" in refuse_leak(card, list(own["test"]), workspace)
    for unknown in ({}, {"definition": {"train_sha256": "0" * 64}}, {"profile": {"data": "hub"}}):
        assert "cannot be ruled out" in refuse_leak(unknown, list(own["test"]), workspace)


@pytest.fixture
def server():
    """A local server of the OpenAI protocol's completions; it answers every prompt with its question."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(request)
            text = " " + request["prompt"].split("Question: ")[1].removesuffix("\n\nAnswer:")
            choice = {"text": text, "finish_reason": "stop"}
            body = json.dumps({"choices": [choice], "usage": {"completion_tokens": 5}}).encode()
            self.send_response(200 if request["model"] == "base" else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=found.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{found.server_port}/v1", asked
    found.shutdown()
    found.server_close()


def test_an_endpoint_gets_the_workshops_own_prompt_and_its_failure_is_no_zero(
    workspace, rows, tiny_tokenizer, score, server, nemotron_tokenizer
):
    """Asked in another form, or not greedily, it is another model; a crash would pass for a worse one."""
    from nemo_evaluator import CompletionSolver
    from nemo_evaluator.errors import GracefulError

    from fiqa_helpers.rows import build_prompt

    url, asked = server
    prompts = evaluate.prompt_texts(rows, tiny_tokenizer)

    def served(name):
        solver = CompletionSolver(url, name, temperature=0.0, max_tokens=16)
        return evaluate.evaluate(rows, prompts, solver, score, name, workspace.evaluation)

    found = served("base")
    sent = sorted((request["prompt"], request["temperature"], request["max_tokens"]) for request in asked)
    assert sent == sorted((build_prompt(row["question"]), 0.0, 16) for row in rows)
    echo = evaluate.score_floors(rows, score)["echo the question"]
    assert found.values("similarity") == pytest.approx([scores["similarity"] for scores in echo])
    (chat,) = evaluate.prompt_texts(rows[:1], nemotron_tokenizer, "chat")
    assert not chat.startswith(nemotron_tokenizer.bos_token), "the server writes it: there would be two"
    with pytest.raises((WorkshopError, RuntimeError)):
        served("tuned")

    class Broken:
        async def solve(self, task):
            raise GracefulError("no answer today")

    with pytest.raises(WorkshopError, match="gave no answer to row 0.*no answer today"):
        scored(rows[:2], Broken(), score, "broken", workspace.evaluation)


def test_files_hold_every_row_and_the_plot_says_what_it_shows(
    workspace, rows, adapted, tiny_tokenizer, score
):
    """A summary without its rows cannot be checked, and a figure without words is not there for everyone."""
    base, tuned = both(workspace, rows, adapted, tiny_tokenizer, score)
    tuned.add("similarity", [0.9, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.1])
    floors = evaluate.score_floors(rows, score)
    found = compare_all(base, tuned)
    files = evaluate.save_evaluation(workspace, rows, base, tuned, floors, found, profile="tiny")
    lines = [json.loads(line) for line in files[0].read_text().splitlines()]
    assert [line["question"] for line in lines] == [row["question"] for row in rows]
    summary = json.loads(files[1].read_text())
    for side in ("base", "tuned"):
        mean = sum(line[side]["similarity"] for line in lines) / len(lines)
        assert summary["comparisons"]["similarity"][side] == pytest.approx(mean)
    echo = sum(line["floors"]["echo the question"]["similarity"] for line in lines) / len(lines)
    assert summary["floors"]["echo the question"]["similarity"] == pytest.approx(echo)
    table = metrics.table(summary["comparisons"], summary["floors"])
    assert table[0]["metric"] == "semantic similarity" and table[0]["echo the question"] == f"{echo:.3f}"
    figure, alt = evaluate.draw_differences(base, tuned, found["similarity"])
    figure.savefig(workspace.plots / "a.png")
    assert f"{found['similarity'].difference:+.3f}" in alt and "zero" in alt


@pytest.mark.slow
def test_a_broken_adapter_is_reported_as_worse(workspace, fiqa_rows, smollm2, score):
    """The whole point: an adapter of random weights on the real model must not pass for a fine-tuned one."""
    from fiqa_helpers import model

    profile = profiles.load_profile("laptop", "{max_length: 160}")
    tokenizer = model.load_tokenizer(profile)
    broken = with_adapter(model.load_base(profile), profile, noise=0.3)
    rows = list(data.load_fiqa("packaged")["test"].select(range(10)))
    found = compare_all(*both(workspace, rows, broken, tokenizer, score, Decoding(24)))
    assert {found[name].verdict for name in ("similarity", "token_f1", "nll")} == {"worse"}
    assert found["similarity"].win_rate < 0.3
