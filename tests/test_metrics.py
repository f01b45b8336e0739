"""Metrics, floors and intervals, on real rows and with the real MiniLM."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fiqa_helpers import metrics, profiles
from fiqa_helpers.base import WorkshopError
from fiqa_helpers.evaluate import voice_texts
from fiqa_helpers.metrics import compare


@pytest.fixture(scope="module")
def similarity():
    return metrics.Similarity()


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
    people, kept = voice_texts(profiles.load_profile("laptop"))
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
    found = compare("similarity", base, tuned)
    assert found.verdict == "better" and 0.02 < found.low < 0.03 < found.high < 0.04
    generator.shuffle(tuned)  # the same values in other pairs
    assert compare("similarity", base, tuned).verdict == "no difference"


def test_verdicts():
    """A lower loss is better; one row, or answers that are the same, are no finding."""
    base, tuned = [3.0, 3.2, 2.9, 3.5, 3.1], [2.8, 3.1, 2.7, 3.2, 2.9]
    found = compare("nll", base, tuned)
    assert found.verdict == "better" and found.difference < 0 and found.win_rate == 1
    assert compare("nll", tuned, base).verdict == "worse"
    equal = compare("similarity", base, base)
    assert (equal.low, equal.high, equal.win_rate, equal.verdict) == (0, 0, 0.5, "no difference")
    assert "no difference is shown" in equal.in_words()
    one = compare("similarity", [0.1], [0.9])
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
        found = compare("similarity", base, tuned, seed)
        covered += found.low <= 0.05 <= found.high
    assert 0.87 <= covered / 100 <= 0.99
