"""Metrics and intervals, then the benchmark end to end: the SDK, real generation, real MiniLM, kills."""

import json
import math
import random
import signal
import subprocess
import sys
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fiqa_helpers import data, evaluate, metrics, model, profiles
from fiqa_helpers.base import WorkshopError, Workspace
from fiqa_helpers.evaluate import Decoding, Replay, compare_all, reference_nll, refuse_leak
from fiqa_helpers.generate import Answer
from fiqa_helpers.rows import build_prompt, encode

SHORT = Decoding(max_new_tokens=6)
TINY = replace(profiles.PROFILES["tiny"], max_length=160)


@pytest.fixture(scope="module")
def similarity():
    return metrics.Similarity()


@pytest.fixture(scope="module")
def score(similarity):
    return metrics.make_score(similarity)


@pytest.fixture
def workspace(tmp_path):
    return Workspace(str(tmp_path))


@pytest.fixture
def rows(fiqa_rows):
    """Eight rows with short answers, so that embedding them takes no time."""
    return sorted(fiqa_rows, key=lambda row: len(row["ground_truths"][0]))[20:28]


@pytest.fixture
def batches(monkeypatch):
    """The questions of every batch that is really generated."""
    made, generate = [], evaluate.generate_answers

    def watched(model, tokenizer, questions, *args, **kwargs):
        made.append(questions)
        return generate(model, tokenizer, questions, *args, **kwargs)

    monkeypatch.setattr(evaluate, "generate_answers", watched)
    return made


def with_adapter(base, profile=TINY, noise=0.0):
    """`base` under a fresh adapter, which changes nothing; `noise` is the scale of random weights in it."""
    import torch
    from peft import get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lm = get_peft_model(base, model.lora_config(profile)).eval()
        for name, weights in lm.named_parameters():
            if "lora_B" in name:
                weights.data.normal_(std=noise)
    return lm


def answered(workspace, rows, lm, tokenizer, tuned=True, decoding=SHORT, batch_size=3):
    return evaluate.answer_rows(workspace, rows, lm, tokenizer, "plain", decoding, tuned, batch_size)


def scored(rows, solver, score, label, folder=None):
    prompts = [row["question"] for row in rows]
    return evaluate.evaluate(rows, prompts, solver, score, label, folder or solver.folder)


def both(workspace, rows, lm, tokenizer, score, decoding=SHORT):
    sides = []
    for label in ("base", "tuned"):
        solver = answered(workspace, rows, lm, tokenizer, label == "tuned", decoding)
        sides.append(scored(rows, solver, score, label))
        with evaluate.asked(lm, tuned=label == "tuned"):
            sides[-1].add("nll", reference_nll(lm, tokenizer, rows, TINY))
    return sides


def test_the_best_reference_scores_one_and_silence_nothing(similarity):
    """Averaged over references a perfect answer is not perfect; MiniLM gives the empty text a vector too."""
    references = ["Sell the bonds before the rates rise.", "Pay your credit card in full every month."]
    score = metrics.make_score(similarity, references)
    for reference in references:
        scores = score(reference, references)
        assert scores.pop("repeated") == 0
        assert scores == pytest.approx(dict.fromkeys(scores, 1), abs=1e-5)
    assert set(score("  \n", references).values()) == {0.0}


def test_token_f1_by_hand():
    """Another definition of F1 (sets, stemming, articles) would not be comparable with what is documented."""
    expected = 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)
    assert metrics.token_f1("the cat sat", "The cat, the dog!") == pytest.approx(expected)
    assert metrics.token_f1("d c b a", "a b c d") == 1, "order does not count"
    assert metrics.token_f1("don't", "don") == pytest.approx(2 / 3), "letters and digits only"
    reference = " ".join(f"word{i}" for i in range(180))
    answer = " ".join(reference.split()[:60])
    assert metrics.token_f1(answer, reference) == pytest.approx(0.5), "a short answer loses by its length"
    assert metrics.token_f1(answer, reference, words=60) == 1


def test_the_end_of_a_long_answer_counts(similarity, fiqa_rows):
    """Cut at 256 word pieces, two answers that differ only in their endings would score the same."""
    longest = max((row["ground_truths"][0] for row in fiqa_rows), key=len)
    beginning = " ".join(longest.split()[:250])
    about_pets = "Cats sleep all day and purr when somebody strokes their soft fur. " * 25
    about_loans = "Fixed rate mortgages protect the borrower when the bank raises its rates. " * 25
    right, wrong = f"{beginning} {about_loans}", f"{beginning} {about_pets}"
    cut = similarity.model.encode([right, wrong])
    assert (cut[0] == cut[1]).all(), "the model itself is short-sighted"
    assert similarity.best(right, [right]) - similarity.best(wrong, [right]) > 0.1
    pieces, lengths = zip(*similarity.chunks(right), strict=True)
    tokens = similarity.model.tokenizer(list(pieces), add_special_tokens=False)["input_ids"]
    assert [len(ids) for ids in tokens] == list(lengths) and max(lengths) <= 254, "cut again in silence"
    assert "".join("".join(piece.split()) for piece in pieces) == "".join(right.split())


def test_voice_recognises_the_untuned_model_by_more_than_its_opening():
    """Held out, it must tell people from the model, and a person's first words must not make a person."""
    people, kept = evaluate.voice_texts(profiles.load_profile("laptop"))
    untuned = kept[400:500]  # the first 500 were asked plainly, the others in the chat prompt
    voices = metrics.train_voice(people[:400], kept[:400] + kept[500:900])

    def mean_voice(texts):
        return sum(metrics.voice(voices, text) for text in texts) / len(texts)

    opened = [f"I don't think so. But if you ask me, {text}" for text in untuned]
    of_model, of_opened = mean_voice(untuned), mean_voice(opened)
    assert mean_voice(people[400:]) > 0.75 and of_model < 0.25
    assert 0 < of_opened - of_model <= 0.35, "an opening phrase is no voice"


@given(st.integers(2, 60), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_nobody_gets_their_own_answer(n, seed):
    """A row that keeps its own reference would lift the floor, unnoticed, by one over n."""
    order = metrics.derangement(n, seed)
    assert sorted(order) == list(range(n))
    assert all(order[i] != i for i in range(n))


def test_a_real_gain_is_seen_and_pairing_is_why():
    """Unpaired, the spread between questions hides a small gain that every row shows."""
    generator = random.Random(0)
    base = [generator.uniform(0, 1) for _ in range(40)]
    tuned = [value + 0.03 + generator.gauss(0, 0.01) for value in base]
    found = metrics.compare("similarity", base, tuned)
    assert found.verdict == "better" and 0.02 < found.low < 0.03 < found.high < 0.04
    generator.shuffle(tuned)  # the same values in other pairs
    assert metrics.compare("similarity", base, tuned).verdict == "no difference"


def test_verdicts():
    """A lower loss is better; one row, or answers that are the same, are no finding."""
    base, tuned = [3.0, 3.2, 2.9, 3.5, 3.1], [2.8, 3.1, 2.7, 3.2, 2.9]
    found = metrics.compare("nll", base, tuned)
    assert found.verdict == "better" and found.difference < 0 and found.win_rate == 1
    assert metrics.compare("nll", tuned, base).verdict == "worse"
    equal = metrics.compare("similarity", base, base)
    assert (equal.low, equal.high, equal.win_rate, equal.verdict) == (0, 0, 0.5, "no difference")
    assert "no difference is shown" in equal.in_words()
    one = metrics.compare("similarity", [0.1], [0.9])
    assert math.isnan(one.low) and one.verdict == "no difference"
    with pytest.raises(WorkshopError, match="at least 2"):  # looking for another row's answer would never end
        metrics.floors([{"question": "", "ground_truths": [""]}])


def test_the_interval_covers_as_often_as_it_says():
    """An interval with a wrong percentile or a wrong axis still looks plausible; its coverage does not."""
    generator = random.Random(1)
    covered = 0
    for seed in range(100):
        base = [generator.uniform(0, 1) for _ in range(60)]
        tuned = [value + generator.gauss(0.05, 0.2) for value in base]
        found = metrics.compare("similarity", base, tuned, seed)
        covered += found.low <= 0.05 <= found.high
    assert 0.87 <= covered / 100 <= 0.99


def test_a_copy_of_the_base_is_no_difference(workspace, rows, tiny_model, tiny_tokenizer, score):
    """An adapter that changes nothing must not win or lose by chance, in any metric."""
    found = compare_all(*both(workspace, rows, with_adapter(tiny_model), tiny_tokenizer, score))
    assert set(found) == {"similarity", "token_f1", "token_f1_60", "stopped", "repeated", "nll"}
    assert {comparison.verdict for comparison in found.values()} == {"no difference"}
    assert "no difference is shown" in found["similarity"].in_words()


def test_the_base_is_asked_without_the_adapter(workspace, rows, tiny_model, tiny_tokenizer, batches):
    """With it on, base and tuned are equal, and tuning seems to do nothing; a batch must keep its order."""
    adapted = with_adapter(tiny_model, noise=0.5)
    base = answered(workspace, rows, adapted, tiny_tokenizer, tuned=False)
    assert base.answers != answered(workspace, rows, adapted, tiny_tokenizer).answers
    assert [len(batch) for batch in batches] == [3, 3, 2] * 2, "full batches"
    plain = adapted.unload()
    assert base.answers == [answered(workspace, [row], plain, tiny_tokenizer).answers[0] for row in rows]


def test_an_oracle_is_perfect(workspace, rows, score):
    """If the reference itself does not score 1, solver or scorer were handed the wrong row."""
    oracle = Replay([Answer(row["ground_truths"][0], True, 1) for row in rows], workspace.evaluation)
    found = scored(rows, oracle, score, "oracle")
    for name in ("similarity", "token_f1", "token_f1_60", "stopped"):
        assert found.values(name) == pytest.approx([1.0] * len(rows), abs=1e-5), name
    assert [sample["question"] for sample in found.samples] == [row["question"] for row in rows]
    assert found.sdk["summary"]["mean"] == pytest.approx(1, abs=1e-5), "the SDK's own summary agrees"


def test_what_decides_the_answers_has_its_own_folder(workspace, rows, tiny_model, tiny_tokenizer, batches):
    """The SDK's own resume returns the old answers for a changed adapter: only another folder prevents it."""
    adapted = with_adapter(tiny_model)

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
    batches.clear()
    assert folder(tuned=False) == base, "the base does not depend on the adapter: its answers can be kept"
    assert not batches
    adapted.get_input_embeddings().weight.data += 1e-3
    assert folder(tuned=False) != base


KILLED = """
import json, os, sys
from fiqa_helpers import evaluate, model, profiles
from fiqa_helpers.base import Workspace

tokenizer = model.load_tokenizer(profiles.load_profile("tiny"))
rows, made, generate = json.loads(sys.argv[2]), [], evaluate.generate_answers

def killed_at_the_third_batch(*args, **kwargs):
    made.append(generate(*args, **kwargs) if len(made) < 2 else os.kill(os.getpid(), 9))
    return made[-1]

evaluate.generate_answers, lm = killed_at_the_third_batch, model.tiny_model(tokenizer).eval()
evaluate.answer_rows(Workspace(sys.argv[1]), rows, lm, tokenizer, "plain", evaluate.Decoding(6), False, 3)
"""


def test_a_killed_evaluation_repeats_no_answer(workspace, rows, tiny_model, tiny_tokenizer, batches):
    """kill -9 in the middle, and half a line written: only what was not kept is made, and nothing is lost."""
    command = [sys.executable, "-c", KILLED, str(workspace.root), json.dumps(rows)]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    (kept,) = (workspace.evaluation / "answers").glob(f"*/{evaluate.KEPT}")
    kept.write_text(kept.read_text()[:-20])
    for left in (rows[5:], []):
        batches.clear()
        found = answered(workspace, rows, tiny_model.eval(), tiny_tokenizer, tuned=False)
        assert sum(batches, []) == [row["question"] for row in left] and found.folder == kept.parent
    fresh = answered(Workspace(str(workspace.root / "fresh")), rows, tiny_model, tiny_tokenizer, tuned=False)
    assert fresh.answers == found.answers


def test_reference_nll_is_the_models_own_loss(tiny_model, tiny_tokenizer, rows):
    """Padding, the shift by one or a row mixed up with its neighbour would all give plausible numbers."""
    import torch

    def by_hand(reference):
        row = encode(rows[0]["question"], reference, tiny_tokenizer, "plain", 200)
        with torch.no_grad():
            logits = tiny_model(torch.tensor([row["input_ids"]])).logits[0]
        places = [i for i, label in enumerate(row["labels"]) if label != -100]
        chosen = [-logits[i - 1].log_softmax(-1)[row["labels"][i]].item() for i in places]
        return sum(chosen) / len(chosen)

    profile = replace(TINY, max_length=200)
    own, other = rows[0]["ground_truths"][0], rows[1]["ground_truths"][0]
    several = [{"question": rows[0]["question"], "ground_truths": [own, other]}]
    assert reference_nll(tiny_model, tiny_tokenizer, rows[:1], profile) == pytest.approx([by_hand(own)])
    best = min(by_hand(own), by_hand(other))
    assert reference_nll(tiny_model, tiny_tokenizer, several, profile) == pytest.approx([best], abs=1e-5)
    assert len(set(reference_nll(tiny_model, tiny_tokenizer, rows, profile))) == len(rows)


def test_an_adapter_is_not_tested_on_its_lessons(workspace, fiqa_rows):
    """The packaged rows are the hub's test split: trained on one, tested on the other, it has seen most.

    Rows from a folder are known through notebook 01's files; where they are from elsewhere it is said.
    """
    splits = data.load_fiqa("packaged")
    card = {"definition": {"data": "packaged", "train_sha256": "of answers cut to their topic"}}
    assert "None of the 100" in refuse_leak(card, list(splits["test"]), workspace)
    disguised = [{"question": f"  {splits['train'][0]['question'].upper()}?!"}]
    for rows, said in ((fiqa_rows, "548 of these 648"), (disguised, "1 of these 1")):
        with pytest.raises(WorkshopError, match=said):
            refuse_leak(card, rows, workspace)
    own = {split: splits[split].select(range(10)) for split in splits}
    data.write_processed(own, workspace.data)
    card = {"definition": {"train_sha256": data.fingerprint(own["train"])}}
    with pytest.raises(WorkshopError, match="10 of these 10"):
        refuse_leak(card, list(own["train"]), workspace)
    assert "None of the 10" in refuse_leak(card, list(own["test"]), workspace)
    for unknown in ({}, {"definition": {"train_sha256": "0" * 64}}):
        assert "cannot be ruled out" in refuse_leak(unknown, list(own["test"]), workspace)


class Completions(BaseHTTPRequestHandler):
    """The OpenAI protocol's completions: the model `base` answers every prompt with its question."""

    asked: ClassVar[list[dict]] = []

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(request)
        text = " " + request["prompt"].split("Question: ")[1].removesuffix("\n\nAnswer:")
        choice = {"text": text, "finish_reason": "stop"}
        self.send_response(200 if request["model"] == "base" else 404)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [choice], "usage": {"completion_tokens": 5}}).encode())


def test_an_endpoint_gets_our_own_prompt(workspace, rows, tiny_tokenizer, score, nemotron_tokenizer):
    """Asked in another form, or with a second BOS, it is another model."""
    from nemo_evaluator import CompletionSolver

    def served(name):
        solver = CompletionSolver(f"http://127.0.0.1:{server.server_port}/v1", name, max_tokens=16)
        return evaluate.evaluate(rows, prompts, solver, score, name, workspace.evaluation)

    prompts = evaluate.prompt_texts(rows, tiny_tokenizer)
    with ThreadingHTTPServer(("127.0.0.1", 0), Completions) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        found = served("base")
        sent = sorted(request["prompt"] for request in Completions.asked)
        with pytest.raises((WorkshopError, RuntimeError)):
            served("tuned")
        server.shutdown()
    assert sent == sorted(build_prompt(row["question"]) for row in rows)
    echo = evaluate.score_floors(rows, score)["echo the question"]
    assert found.values("similarity") == pytest.approx([scores["similarity"] for scores in echo])
    (chat,) = evaluate.prompt_texts(rows[:1], nemotron_tokenizer, "chat")
    assert not chat.startswith(nemotron_tokenizer.bos_token), "the server writes it: there would be two"
    (chat,) = evaluate.prompt_texts(rows[:1], tiny_tokenizer, "chat")
    assert chat.startswith("<|im_start|>"), "SmolLM2's BOS, which its tokenizer does not add"


def test_a_failure_is_an_error_and_not_a_bad_answer(workspace, rows, score):
    """The SDK scores a request that failed as 0: a crash would pass for a worse model."""
    from nemo_evaluator.errors import GracefulError

    class Broken:
        async def solve(self, task):
            raise GracefulError("no answer today")

    with pytest.raises(WorkshopError, match="gave no answer to row 0.*no answer today"):
        scored(rows[:2], Broken(), score, "broken", workspace.evaluation)


@pytest.mark.slow
def test_a_broken_adapter_is_reported_as_worse(workspace, fiqa_rows, smollm2, score):
    """The whole point: an adapter of random weights on the real model must not pass for a fine-tuned one."""
    profile = profiles.load_profile("laptop", "{max_length: 160}")
    tokenizer = model.load_tokenizer(profile)
    broken = with_adapter(model.load_base(profile), profile, noise=0.3)
    rows = list(data.load_fiqa("packaged")["test"].select(range(10)))
    found = compare_all(*both(workspace, rows, broken, tokenizer, score, Decoding(24)))
    assert {found[name].verdict for name in ("similarity", "token_f1", "nll")} == {"worse"}
    assert found["similarity"].win_rate < 0.3
