"""What notebook 06 keeps: tuned models, rivals and floors on the 100 test rows; ten minutes on one GPU.

    python benchmarks/kept_evaluation.py --out notebooks/precomputed/kept_evaluation.json

SmolLM2 in fp32: the untuned model under both prompts, three seeds of profile `laptop` and the reference
recipe, each with the guard and without; the untuned model with three training answers as examples. Each arm
is kept in FILE.answers.json and not made again; FILE has the scores.
"""

import argparse
import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import pandas as pd
import torch
from notebook_trainer import notebook_trainer
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from fiqa_helpers import base, data, evaluate, metrics, model, profiles, rows, run
from fiqa_helpers.generate import GUARD, generate_answers
from fiqa_helpers.machinery import machine
from fiqa_helpers.machinery.fast import attention_implementation

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAPTOP = profiles.planned_profile("laptop", f"{{device: {DEVICE}}}")
REFERENCE = "{model: packaged, data: packaged, dtype: float32, layout: padded}"  # of profile gpu80
SEEDS = (42, 43, 44)
RIVALS = ("untuned plain", "untuned chat")
TOKENS = 128  # of an answer
LOOP = 0.1  # an answer that repeats more of its 4-grams goes round in circles
FORUM = "Answer like a person in a forum, in at most 60 words."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    run.quiet()
    splits, tokenizer = data.load_fiqa("packaged"), model.load_tokenizer(LAPTOP)
    trainings = {f"laptop, seed {seed}": replace(LAPTOP, seed=seed) for seed in SEEDS}
    trainings["reference recipe"] = replace(profiles.planned_profile("gpu80", REFERENCE), device=DEVICE)
    tested, score = list(splits["test"]), scorer()
    questions = [row["question"] for row in tested]
    kept = args.out.with_suffix(".answers.json")
    done = base.read_card(kept) or {}
    for load, ways in arms(trainings, tokenizer, splits["train"]):
        missing = ways.keys() - done.keys()
        lm = load() if missing else None
        for name in sorted(missing, key=[*ways].index):
            answers = ask(lm, tokenizer, questions, *ways[name])
            found = score([answer.text for answer in answers], tested)
            found["stopped"] = [float(answer.stopped) for answer in answers]
            if name in trainings or name in RIVALS:
                profile = replace(LAPTOP, prompt=ways[name][0])
                found["nll"] = evaluate.reference_nll(lm, tokenizer, tested, profile)
            done[name] = {"rows": found.to_dict("list"), "answers": [answer.text for answer in answers]}
            base.write_json(kept, done)
            print(f"{name}: {means(found)}", flush=True)
    texts = metrics.floors(tested) | {"people": [row["ground_truths"][0] for row in tested]}
    about = {"device": machine.describe(), "versions": base.versions(), "tested": len(tested)}
    about |= {"tokens": TOKENS, "trained": {name: asdict(profile) for name, profile in trainings.items()}}
    about["floors"] = {name: means(score(texts[name], tested)) for name in texts}
    about |= compared({name: pd.DataFrame(arm["rows"]) for name, arm in done.items()})
    args.out.write_text(json.dumps(about, separators=(",", ":")) + "\n", encoding="utf-8")


def arms(trainings, tokenizer, train):
    """(how a model is loaded, {arm: (prompt style, guard, text before the question)}) of each model."""
    short = [row for row in train if 30 <= len(row["ground_truths"][0].split()) <= 60][:3]
    examples = "\n\n".join(f"Question: {r['question']}\n\nAnswer: {r['ground_truths'][0]}" for r in short)
    ways = {
        "untuned plain": ("plain", GUARD),
        "untuned chat": ("chat", GUARD),
        "untuned plain, 3 examples": ("plain", GUARD, f"{rows.SYSTEM_TEXT}\n\n{examples}"),
        "untuned chat, 3 examples": ("chat", GUARD, f"{FORUM}\n\n{examples}"),
        "untuned plain, no guard": ("plain", 0),
        "untuned chat, no guard": ("chat", 0),
    }
    yield lambda: model.load_base(LAPTOP), ways
    for name, profile in trainings.items():
        ways = {name: ("plain", GUARD), f"{name}, no guard": ("plain", 0)}
        yield lambda profile=profile: trained(profile, tokenizer, train), ways


def trained(profile, tokenizer, train):
    """The model after notebook 04's training with `profile`, as it is at the last step."""
    if profile.training == "topical":
        train = data.topical_answers(train, profile.topical_words, metrics.Similarity(device=DEVICE)).take(
            profile.train_rows
        )
    encoded = rows.encode_rows(train, tokenizer, profile)
    collator = rows.StepCollator(tokenizer.pad_token_id, profile.tokens_per_batch, profile.layout)
    with tempfile.TemporaryDirectory() as folder:
        more = {"num_train_epochs": profile.epochs}
        base_model = model.load_base(profile, attention_implementation(profile.layout, profile.device))
        trainer = notebook_trainer(profile, folder, base_model, collator, encoded, **more)
        trainer.train()
    print(f"trained {trainer.state.global_step} steps", flush=True)
    return trainer.model.eval()


def ask(lm, tokenizer, questions, style, guard=GUARD, before=rows.SYSTEM_TEXT) -> list:
    with mock.patch.object(rows, "SYSTEM_TEXT", before):
        return generate_answers(lm, tokenizer, questions, style, TOKENS, no_repeat_ngram_size=guard)


def scorer():
    """(texts, rows) -> a line a row: notebook 06's metrics, voice by stop words, nearness to the question."""
    people, untuned = evaluate.voice_texts(LAPTOP)
    minilm = metrics.Similarity(device=DEVICE)
    score = metrics.make_score(minilm, people, metrics.train_voice(people, untuned))

    def stop_words(text: str) -> str:
        words = " ".join(metrics.windows(text)).split()
        return " ".join(word for word in words if word in ENGLISH_STOP_WORDS)

    stops = metrics.train_voice([*map(stop_words, people)], [*map(stop_words, untuned)])

    def scores(text: str, row: dict) -> dict[str, float]:
        found = score(text, row["ground_truths"])
        found["voice_stop_words"] = metrics.voice(stops, stop_words(text))
        return found | {"question": minilm.best(text, [row["question"]])}

    return lambda texts, tested: pd.DataFrame(map(scores, texts, tested))


def compared(arms: dict[str, pd.DataFrame]) -> dict:
    """Means of every arm, differences to the rivals (mean, low, high), and which rows the laptop gains."""
    for end in ("", ", no guard"):
        arms[f"laptop{end}"] = sum(arms[f"laptop, seed {seed}{end}"] for seed in SEEDS) / len(SEEDS)
    against = {}
    for name, arm in arms.items():
        rivals = [rival + ", no guard" * name.endswith(", no guard") for rival in RIVALS]
        against[name] = {rival: differences(arms[rival], arm) for rival in rivals if rival != name}
    plain = arms["untuned plain"]
    fails = (plain["stopped"] == 0) | (plain["repeated"] > LOOP)
    gains = {
        kind: {"rows": int(rows.sum())} | differences(plain[rows], arms["laptop"][rows])
        for kind, rows in (("untuned fails", fails), ("untuned ends", ~fails))
    }
    all_means = {name: means(arm) for name, arm in arms.items()}
    return {"means": all_means, "against": against, "gains": gains}


def differences(before: pd.DataFrame, after: pd.DataFrame) -> dict[str, list[float]]:
    found = {}
    for name in before.columns.intersection(after.columns) if len(before) else ():
        known = name if name in metrics.METRICS else metrics.PRIMARY
        one = metrics.compare(known, before[name], after[name])
        found[name] = [round(value, 4) for value in (one.difference, one.low, one.high)]
    return found


def means(arm: pd.DataFrame) -> dict[str, float]:
    return arm.mean().round(3).to_dict()


if __name__ == "__main__":
    main()
