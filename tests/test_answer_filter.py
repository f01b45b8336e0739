"""Training answers by `longest_answer`: no links, no packaging, and never an answer that is tested on."""

import sys

from datasets import Dataset

from fiqa_helpers.answer_filter import short_answers, unquoted

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
