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


def test_chunks_fit_the_window_and_lose_nothing(similarity, fiqa_rows):
    """A chunk beyond the window is cut again in silence; one that ends inside a word makes another word."""

    def pieces(text: str) -> int:
        return len(similarity.model.tokenizer(text, add_special_tokens=False, truncation=False)["input_ids"])

    for row in sorted(fiqa_rows, key=lambda row: -len(row["ground_truths"][0]))[:20]:
        text = row["ground_truths"][0]
        chunks = similarity.chunks(text)
        assert sum(length for _, length in chunks) == pieces(text)
        assert all(length <= 254 for _, length in chunks)
        assert "".join("".join(piece.split()) for piece, _ in chunks) == "".join(text.split())
        assert [pieces(piece) for piece, _ in chunks] == [length for _, length in chunks]
    one, other = texts = ["Put it into an index fund.", "A savings account pays little interest."]
    plain = similarity.model.encode(texts, normalize_embeddings=True)
    assert similarity.best(one, [other]) == pytest.approx(float(plain[0] @ plain[1]), abs=1e-6)


def test_repetition_by_hand():
    """A loop must come near 1, ordinary prose at 0, and a text of three words must not divide by zero."""
    assert metrics.repeated("a b c d " * 50) > 0.9
    assert metrics.repeated("one two three four five six seven") == 0
    assert metrics.repeated("only three words") == metrics.repeated("") == 0
    assert metrics.repeated("a b c d a b c d") == pytest.approx(1 / 5)


def test_topic_words_see_the_topic_and_no_stop_words():
    """Counted with its stop words, any English text would be near to any other."""
    judge = metrics.topic_words(["the bonds pay interest to you", "the stocks pay to you", "my rent"])
    near = judge("bonds and interest", ["Interest of bonds", "rent"])
    assert near > judge("bonds", ["my rent and stocks"]) == 0
    assert judge("to the and of", ["to the and of"]) == judge("", ["bonds"]) == 0
    assert judge("stocks", ["rent", "stocks"]) == pytest.approx(1), "the best of several references counts"


def test_windows_are_of_words_alone():
    """Length, quotes or line breaks would tell a forum's post from a model's answer at once."""
    assert metrics.windows("") == [""]
    assert metrics.windows('Don’t "PAY",\n it: 5%') == ["don't pay it"]
    for words, expected in ((500, [20, 20, 20]), (49, [20, 29])):
        parts = metrics.windows(" ".join(["word"] * words))
        assert [len(part.split()) for part in parts] == expected


@pytest.fixture(scope="module")
def voices():
    """(classifier, people's answers, untuned answers): trained on 400 questions, the texts are of others."""
    people, kept = voice_texts(profiles.load_profile("laptop"))
    plain, chat = kept[:500], kept[500:]
    assert len(people) == len(plain) == len(chat) == 500
    return metrics.train_voice(people[:400], plain[:400] + chat[:400]), people[400:], plain[400:]


def mean_voice(voices, texts):
    return sum(metrics.voice(voices, text) for text in texts) / len(texts)


def test_voice_recognises_the_untuned_model_and_nothing_else(voices):
    """Held out, it must tell the two apart; what it can not tell apart must be known, and is shown in 06."""
    classifier, people, untuned = voices
    of_model = mean_voice(classifier, untuned)
    assert mean_voice(classifier, people) > 0.75 and of_model < 0.25
    draw = random.Random(0)
    shuffled = [" ".join(draw.sample(text.split(), len(text.split()))) for text in people]
    assert mean_voice(classifier, shuffled) >= 0.8, "disorder is not the untuned model either"
    opened = [f"I don't think so. But if you ask me, {text}" for text in untuned]
    assert 0 < mean_voice(classifier, opened) - of_model <= 0.35, "an opening phrase is no voice"


def test_without_a_difference_voice_finds_none(voices):
    """A classifier that learned length or order by heart would tell two halves of one kind apart."""
    _, people, untuned = voices
    texts = people[:50] + untuned[:50]
    random.Random(0).shuffle(texts)
    classifier = metrics.train_voice(texts[:50], texts[50:])
    assert mean_voice(classifier, people[50:] + untuned[50:]) == pytest.approx(0.5, abs=0.08)


def test_voice_is_absent_for_other_models_and_rows(capsys):
    """Compared with another model's answers, any text is nobody's voice."""
    assert voice_texts(profiles.load_profile("tiny")) == ([], [])
    assert "Voice is not measured" in capsys.readouterr().out


@given(st.integers(2, 60), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_nobody_gets_their_own_answer(n, seed):
    """A row that keeps its own reference would lift the floor, unnoticed, by one over n."""
    order = metrics.derangement(n, seed)
    assert sorted(order) == list(range(n))
    assert all(order[i] != i for i in range(n))
    assert order == metrics.derangement(n, seed)


def test_floors_are_of_the_same_rows(fiqa_rows):
    """Floors of other rows than the ones under test are no floors: their level differs from row to row."""
    rows = fiqa_rows[40:60]
    found = metrics.floors(rows, seed=3)
    assert found["echo the question"] == [row["question"] for row in rows]
    references = [row["ground_truths"][0] for row in rows]
    assert sorted(found["another row's answer"]) == sorted(references)
    assert all(a != b for a, b in zip(found["another row's answer"], references, strict=True))
    assert {len(answers) for answers in found.values()} == {len(rows)}
    with pytest.raises(WorkshopError, match="at least 2"):  # looking for another row would never end
        metrics.floors(rows[:1])


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
