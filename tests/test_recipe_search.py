"""The recipe search: no choice looks at the rows that it is judged by, and decodings are what they say."""

import json
import random
import sys

import pytest

from fiqa_helpers.generation import generate_answers

NOISE = random.Random(0)


@pytest.fixture(scope="module", autouse=True)
def scripts(project):
    """benchmarks/ is a folder of scripts, no package."""
    sys.path.insert(0, str(project / "benchmarks"))
    yield
    sys.path.remove(str(project / "benchmarks"))


@pytest.fixture(scope="module")
def search():
    import recipe_search

    return recipe_search


def columns(search, rows, gain):
    """Made-up metrics of `rows` rows under every decoding; `gain` is added to what should rise."""
    one = {
        "similarity": [0.4 + gain + NOISE.uniform(-0.05, 0.05) for _ in range(rows)],
        "token_f1": [0.2 + gain + NOISE.uniform(-0.05, 0.05) for _ in range(rows)],
        "nll": [3.0 - gain] * rows,
        "stopped": [1] * rows,
        "repeated": [0.0] * rows,
        "tokens": [50] * rows,
    }
    return dict.fromkeys(search.DECODINGS, one)


def results(search, out, gains, rows=20):
    """The files of a search: base answers, and inner trials that gain `gains[name](pair, fold)`."""
    (out / "base").mkdir()
    for fold in range(search.FOLDS):
        base = columns(search, rows, 0.0)
        (out / "base" / f"{fold}.json").write_text(json.dumps({"plain": base, "chat": base}))
        (out / "inner" / str(fold)).mkdir(parents=True)
        for name, gain in gains.items():
            parts = [columns(search, rows, gain(fold, place)) for place in (fold, (fold + 1) % search.FOLDS)]
            joined = {
                decoding: {
                    metric: parts[0][decoding][metric] + parts[1][decoding][metric] for metric in found
                }
                for decoding, found in parts[0].items()
            }
            (out / "inner" / str(fold) / f"{name}.json").write_text(json.dumps({"found": joined}))


def test_the_choice_for_a_fold_does_not_see_it(search, tmp_path):
    """A setting that shines on fold 2 alone must not be chosen for it: that is picking by the test."""
    shines = {
        "reference": lambda pair, fold: 0.1,
        "beginnings": lambda pair, fold: 0.9 if fold == 2 or 2 not in (pair, (pair + 1) % 5) else -0.1,
    }
    results(search, tmp_path, shines)
    assert search.choose(tmp_path, 2)["setting"] == "reference"
    assert search.choose(tmp_path, 4)["setting"] == "beginnings"


def test_damage_is_not_chosen_for_its_similarity(search, tmp_path):
    """More similarity at the price of answers that never end is what the search is there to avoid."""
    results(search, tmp_path, {"reference": lambda *_: 0.1, "beginnings": lambda *_: 0.3})
    for path in (tmp_path / "inner").glob("*/beginnings.json"):
        trial = json.loads(path.read_text())
        for found in trial["found"].values():
            found["stopped"] = [0] * len(found["stopped"])
        path.write_text(json.dumps(trial))
    chosen = search.choose(tmp_path, 0)
    assert chosen["setting"] == "reference"
    assert chosen["beyond doubt"]


def test_a_gain_in_one_metric_is_not_bought_with_the_other(search, tmp_path):
    """With nothing beyond doubt, the choice by similarity alone took the settings that lose token F1."""
    results(search, tmp_path, {"reference": lambda *_: 0.01, "beginnings": lambda *_: 0.3})
    for path in (tmp_path / "inner").glob("*/beginnings.json"):
        trial = json.loads(path.read_text())
        for found in trial["found"].values():
            found["token_f1"] = [value - 0.4 for value in found["token_f1"]]
        path.write_text(json.dumps(trial))
    assert search.choose(tmp_path, 0)["setting"] == "reference"


def test_a_setting_that_time_cut_off_is_no_candidate(search, tmp_path):
    """Half a setting's trials would be compared with whole ones, on other rows."""
    results(search, tmp_path, {"reference": lambda *_: 0.1, "beginnings": lambda *_: 0.3})
    (tmp_path / "inner" / "0" / "beginnings.json").unlink()
    assert search.choose(tmp_path, 0)["setting"] == "reference"
    assert search.choose(tmp_path, 3)["setting"] == "beginnings"


def test_side_by_side_is_each_decoding_alone(search, tiny_model, tiny_tokenizer):
    """Decodings that share a batch must not touch one another's rows, or start to count at another place."""
    from transformers import LogitsProcessorList

    questions = ["What is a bond?", "Should I sell?"]
    end = tiny_tokenizer.eos_token_id
    processors = LogitsProcessorList([search.side_by_side(search.DECODINGS, len(questions), end)])
    length = 120  # beyond the point where ending is made more likely
    made = generate_answers(
        tiny_model,
        tiny_tokenizer,
        questions * len(search.DECODINGS),
        "plain",
        length,
        logits_processor=processors,
    )
    for i, wanted in enumerate(search.DECODINGS.values()):
        alone = generate_answers(tiny_model, tiny_tokenizer, questions, "plain", length, **wanted)
        assert made[2 * i : 2 * i + 2] == alone
    assert len({answer.text for answer in made}) > len(questions), "the decodings do not differ"


def test_training_rows_are_shortened_at_sentences(search):
    """An answer cut in a sentence teaches to end there; a filter the wrong way round keeps the bad ones."""
    assert search.beginning("One two. Three four! Five six?", 4) == "One two. Three four!"
    assert search.beginning("A first sentence of many words. Two.", 3) == "A first sentence of many words."
    rows = [
        {"question": "q", "ground_truths": [text]}
        for text in ("short", "see http://x.y " + "word " * 30, "word " * 30, "word " * 500)
    ]
    setting = search.Setting(shortest=20, longest=100, links=False)
    assert search.prepared(rows, setting) == [rows[2]]
    assert search.prepared(rows, search.Setting()) == rows
    quoted = [{"question": "q", "ground_truths": ['"Buy ""low"". Sell high."']}]
    (row,) = search.prepared(quoted, search.Setting(unquoted=True, first_words=2))
    assert row["ground_truths"] == ['Buy "low".']


def test_training_answers_on_their_topic(search):
    """Sentences in the wrong order, or the rows farthest from their question, would be what is learned."""
    from fiqa_helpers.similarity import Similarity

    answer = "I like tea. A mortgage is a loan for a house. It rained. The house secures the mortgage loan."
    rows = [
        {"question": "What is a mortgage loan?", "ground_truths": [text]} for text in (answer, "It rained.")
    ]
    setting = search.Setting(topical_words=15, off_topic=0.5)
    (row,) = search.prepared(rows, setting, Similarity())
    assert row["ground_truths"] == ["A mortgage is a loan for a house. The house secures the mortgage loan."]


def test_the_laptop_search_confirms_on_rows_that_nobody_has_looked_at():
    """One of the 100 rows that the setting was chosen on among the 548 would make the confirmation none."""
    import recipe_laptop

    *folds, looked_at = recipe_laptop.rows_in_folds()
    questions = [{row["question"] for row in rows} for rows in (*folds, looked_at)]
    assert [len(rows) for rows in questions] == [110] * 3 + [109] * 2 + [100]
    assert len(set.union(*questions)) == 648
