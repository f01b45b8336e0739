"""A hundred thousand rows: bounded memory, and time that grows with the rows, from files to intervals."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

FEW, MANY = 10_000, 100_000
MOST_GIB, VECTORS_GIB = 1.5, 0.42

STAGES = """
import json, random, re, sys, time
from pathlib import Path


def now(): return int(re.search(r"VmRSS:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) / 2**20
def peak(): return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) / 2**20


def stage(name, work):
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    start, before = time.process_time(), now()
    result = work()
    measured[name] = {"seconds": time.process_time() - start, "gib": peak() - before, "above": peak() - base}
    return result


measured = {}
"""
TOKENIZE = """
from fiqa_helpers import rows, data, model, profiles
profile = profiles.load_profile("tiny", "{max_length: 2048, tokens_per_batch: 8192, batch_size: 16}")
tokenizer = model.load_tokenizer(profile)
import datasets, torch
data.load_with_report("packaged")
rows.encode("question", "answer", tokenizer)
base = now()
splits = stage("load", lambda: data.load_fiqa(sys.argv[1]))
encoded = stage("tokenize", lambda: rows.encode_rows(splits["train"], tokenizer, profile))
collate = rows.StepCollator(tokenizer.pad_token_id, profile.tokens_per_batch, "packed")
loader = torch.utils.data.DataLoader(encoded, batch_size=16, collate_fn=collate)
stage("batches", lambda: sum(len(step["micro_batches"]) for step in loader))
print(json.dumps({"rows": len(encoded), "stages": measured}))
"""
COMPARE = """
from fiqa_helpers.evaluate import read_log
from fiqa_helpers.metrics import compare
compare("similarity", [0.1, 0.2, 0.3], [0.2, 0.2, 0.5])
base, n = now(), int(sys.argv[2])
draw = random.Random(0)
scores = [[draw.random() for _ in range(n)] for _ in range(2)]
stage("compare", lambda: compare("similarity", *scores))
log = Path(sys.argv[1])
with log.open("w") as file:
    for i in range(n):
        file.write(json.dumps({"problem_idx": i, "response": "word " * 80}) + "\\n")
stage("read log", lambda: read_log(log))
print(json.dumps({"rows": n, "stages": measured}))
"""


EVALUATE = """
import numpy
from fiqa_helpers.evaluate import evaluate
from fiqa_helpers.generate import Answer
from fiqa_helpers.base import Workspace
from fiqa_helpers.metrics import Similarity
from fiqa_helpers.evaluate import Decoding, ModelSolver
import nemo_evaluator, rouge_score.rouge_scorer


class AtOnce(ModelSolver):  # both models, the one that answers and the one that embeds, take no time here
    def _generate(self, questions):
        return [Answer(f"pay off the debt, then ask again: {question}", True, 20) for question in questions]

    def identity(self):
        return {"model": "none"}


def encode(texts, **options):
    return numpy.random.default_rng(len(texts)).standard_normal((len(texts), 384), dtype="float32")


similarity = Similarity()
similarity.model.encode = encode
solver = AtOnce(None, None, "plain", Decoding(64, 0), 64, tuned=False)
solver.prompt = lambda question: question
work = Workspace(sys.argv[2])
rows = [json.loads(line) for line in open(sys.argv[1], encoding="utf-8")]
evaluate(work, rows[:64], solver, similarity, "warm-up")
similarity._known.clear()
base = now()
stage("evaluate", lambda: evaluate(work, rows, solver, similarity, "base"))
again = stage("again", lambda: evaluate(work, rows, solver, similarity, "base"))
assert again.reused == len(rows)
print(json.dumps({"rows": len(rows), "stages": measured}))
"""


def measure(code: str, *arguments: str) -> dict:
    done = subprocess.run([sys.executable, "-c", STAGES + code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    for name, stage in result["stages"].items():
        print(f"{result['rows']:7,} {name:9} {stage['seconds']:6.1f} s {stage['above']:5.2f} GiB more")
    return result["stages"]


def write_rows(path: Path, number: int, fiqa_rows: list[dict]) -> Path:
    """`number` synthetic rows: words drawn from the real ones, answers as long as theirs."""
    draw = random.Random(number)
    words = [word for row in fiqa_rows for word in row["ground_truths"][0].split()]
    lengths = [len(row["ground_truths"][0].split()) for row in fiqa_rows]
    with path.open("w", encoding="utf-8") as file:
        for i in range(number):
            question = f"{' '.join(draw.choices(words, k=10))} {i}?"
            answer = " ".join(draw.choices(words, k=draw.choice(lengths)))
            file.write(json.dumps({"question": question, "ground_truths": [answer]}) + "\n")
    return path


def check(few: dict, many: dict, most_gib: float = MOST_GIB) -> None:
    for name, stage in many.items():
        assert stage["above"] <= most_gib, name
        assert stage["seconds"] < 1.6 * MANY / FEW * few[name]["seconds"] + 2, name  # CPU time


def test_reading_and_tokenizing(tmp_path, fiqa_rows, smollm2):
    """A data set twenty times FiQA's size must train on a laptop's memory."""
    few, many = (
        measure(TOKENIZE, str(write_rows(tmp_path / f"{n}.jsonl", n, fiqa_rows))) for n in (FEW, MANY)
    )
    check(few, many)


def test_evaluating(tmp_path, fiqa_rows):
    """The SDK keeps logs, prompts and results of all rows; a second run reads them back, answers nothing."""
    few, many = (
        measure(EVALUATE, str(write_rows(tmp_path / f"{n}.jsonl", n, fiqa_rows)), str(tmp_path / f"w{n}"))
        for n in (2_000, 20_000)  # ROUGE alone takes 3 ms a row
    )
    # the vectors kept have a limit of their own, what is left grows with the rows
    check(few, many, most_gib=VECTORS_GIB + (MOST_GIB - VECTORS_GIB) * 20_000 / MANY)


def test_comparing_answers(tmp_path):
    """A bootstrap that draws all resamples at once would need 8 GB a metric, its jackknife 80."""
    few, many = (measure(COMPARE, str(tmp_path / "answers.jsonl"), str(n)) for n in (FEW, MANY))
    check(few, many)
