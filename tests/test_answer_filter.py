"""Training answers by `longest_answer` and `topical_words`: what is left, and that this was measured."""

import sys

import pytest
from datasets import Dataset

from fiqa_helpers.answer_filter import short_answers, topical_answers, unquoted
from fiqa_helpers.errors import WorkshopError
from fiqa_helpers.profiles import load_profile
from fiqa_helpers.similarity import Similarity

TEXT = "Pay off the debt that costs most. " * 4  # 28 words


def rows(*answers):
    return Dataset.from_list([{"question": f"q{i}", "ground_truths": [a]} for i, a in enumerate(answers)])


def test_quotes_of_the_csv_go_and_others_stay():
    """Half a pair of quotes is worse than both: only a text that begins and ends in one is unpacked."""
    assert unquoted('"Buy ""low""."') == 'Buy "low".'
    assert unquoted('He said "sell" twice.') == 'He said "sell" twice.'
    assert unquoted('"') == '"'


def test_rows_that_are_left():
    """A filter the wrong way round would train on the links and throw the answers away."""
    made = short_answers(rows("Yes.", f"See https://x.y {TEXT}", TEXT, f'"{TEXT}"', TEXT * 9), 200)
    assert made["question"] == ["q2", "q3"]
    assert [row["ground_truths"] for row in made] == [[TEXT], [TEXT.strip()]]


def test_it_is_what_the_laptop_search_has_measured(project, fiqa_rows):
    """The recommended setting and the measured one could drift apart: RECIPE.md would speak of another."""
    sys.path.insert(0, str(project / "benchmarks"))
    try:
        from recipe_laptop import SHORT
        from recipe_search import prepared
    finally:
        sys.path.pop(0)
    made = short_answers(Dataset.from_list(fiqa_rows), SHORT.longest)
    assert list(made) == prepared(fiqa_rows, SHORT)
    assert 0.4 < len(made) / len(fiqa_rows) < 0.7


def test_answers_on_their_topic():
    """Sentences in another order, or the rows farthest from their question, would be what is learned."""
    loan = "A mortgage is a loan for a house, and the house secures it until all of it is paid back."
    answer = f"I like my tea in the morning, with milk. {loan} It rained all day, and so we stayed."
    made = rows(
        answer, "It rained all day, and nobody knew when it would end, so we had tea and waited for it."
    )
    made = made.add_column("answer", ["", ""])
    made = made.map(lambda row: {"question": "What is a mortgage loan?"})
    (row,) = topical_answers(made, 20, 0.5, Similarity())
    assert row["ground_truths"] == [loan]
    assert set(row) == {"question", "ground_truths", "answer"}


def test_nothing_on_topic_is_said():
    """An empty training split would fail two notebooks later, in the Trainer."""
    with pytest.raises(WorkshopError, match="leaves no training row"):
        topical_answers(rows("Yes."), 20, 0.5, Similarity())


def test_training_topical_is_what_the_search_has_measured(project, fiqa_rows):
    """The setting that notebooks recommend must be the one that RECIPE.md speaks of, row for row."""
    sys.path.insert(0, str(project / "benchmarks"))
    try:
        from recipe_search import SETTINGS, prepared
    finally:
        sys.path.pop(0)
    setting = SETTINGS["topical 120 words, nearer half, all linear"]
    profile = load_profile("laptop", "{training: topical}")
    similarity, few = Similarity(), fiqa_rows[:80]
    words, share = profile.topical_words, profile.topical_share
    made = topical_answers(Dataset.from_list(few), words, share, similarity)
    assert list(made) == prepared(few, setting, similarity)
    assert 15 < len(made) < 40
    assert profile.learning_rate == setting.learning_rate
    assert (profile.epochs, profile.max_steps, profile.train_rows) == (setting.epochs, -1, -1)
    assert (profile.lora_rank, profile.lora_alpha) == (setting.rank, 4 * setting.rank)
    assert len(profile.lora_targets) == 7
    assert profile.prompt == setting.prompt
