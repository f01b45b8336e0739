"""Training answers by `topical_words`: what is left of them."""

import pytest
from datasets import Dataset

from fiqa_helpers.base import WorkshopError
from fiqa_helpers.data import topical_answers, unquoted
from fiqa_helpers.metrics import Similarity

TEXT = "Pay off the debt that costs most. " * 4  # 28 words


@pytest.fixture(scope="module")
def similarity():
    return Similarity()


def rows(*answers):
    return Dataset.from_list([{"question": f"q{i}", "ground_truths": [a]} for i, a in enumerate(answers)])


def test_quotes_of_the_csv_go_and_others_stay():
    """Half a pair of quotes is worse than both: only a text that begins and ends in one is unpacked."""
    assert unquoted('"Buy ""low""."') == 'Buy "low".'
    assert unquoted('He said "sell" twice.') == 'He said "sell" twice.'
    assert unquoted('"') == '"'


def test_rows_that_are_left(similarity):
    """A filter the wrong way round would train on the links and throw the answers away."""
    made = topical_answers(
        rows("Yes.", f"See https://x.y {TEXT}", TEXT, f'"{TEXT}"', TEXT * 9), 200, similarity
    )
    assert made["question"] == ["q2", "q3", "q4"]
    assert [row["ground_truths"] for row in made][:2] == [[TEXT.strip()], [TEXT.strip()]]
    assert len(made[2]["ground_truths"][0].split()) <= 200
    with pytest.raises(WorkshopError, match="leaves no training row"):
        topical_answers(rows("Yes."), 20, similarity)


def test_answers_on_their_topic(similarity):
    """Sentences in another order, or those farthest from the question, would be what is learned."""
    loan = "A mortgage is a loan for a house, and the house secures it until all of it is paid back."
    answer = f"I like my tea in the morning, with milk. {loan} It rained all day, and so we stayed."
    made = rows(answer).add_column("answer", [""])
    made = made.map(lambda row: {"question": "What is a mortgage loan?"})
    (row,) = topical_answers(made, 20, similarity)
    assert row["ground_truths"] == [loan]
    assert set(row) == {"question", "ground_truths", "answer"}
    (row,) = topical_answers(made, 30, similarity)  # room for a second sentence, in the order of the answer
    assert row["ground_truths"][0] in (
        f"I like my tea in the morning, with milk. {loan}",
        f"{loan} It rained all day, and so we stayed.",
    )
