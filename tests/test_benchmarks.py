"""The benchmark's figures: what the README says is what the result files hold."""

import json
import subprocess
import sys
from pathlib import Path

import contenders
import pytest
import report

from fiqa_helpers.machinery import machine
from fiqa_helpers.profiles import PROFILES

PROJECT = Path(__file__).resolve().parent.parent


def test_pages_hold_what_was_measured():
    """A table edited by hand, or results without a new table: a figure nobody measured."""
    lines, page = report.pages()
    assert f"{report.BEGIN}\n{lines}\n{report.END}" in report.README.read_text(encoding="utf-8")
    assert page == report.PAGE.read_text(encoding="utf-8")


def test_every_contender_has_a_source_and_a_result_or_is_named_as_missing():
    """A peer left out because its result did not please, or run with settings of our own choice."""
    assert {run["name"] for run in report.read("gpu")["runs"]} == set(contenders.CONTENDERS)
    for name, contender in contenders.CONTENDERS.items():
        assert callable(getattr(contenders, contender["run"]))
        first = contender["source"].split(" ")[0].strip(",")
        assert first.startswith("https://") or (PROJECT / first).is_file(), name


def test_rows_have_the_measured_lengths():
    """Rows of other lengths measure another data set."""
    rows = contenders.rows()
    lengths = json.loads((PROJECT / "benchmarks" / "fiqa_lengths.json").read_text())
    assert len(rows) == 648
    assert sorted(map(len, rows["input_ids"])) == sorted(prompt + answer for prompt, answer in lengths)
    trained = sum(label != -100 for labels in rows["labels"] for label in labels)
    assert trained == sum(answer for _, answer in lengths)


def test_memory_ledger_within_a_tenth_of_what_was_measured():
    """The ledger is a promise about a card that most readers do not have."""
    for run in report.read("gpu")["runs"][:2]:
        predicted = machine.predict_memory(PROFILES[run["name"]], machine.nemotron_config())
        assert predicted["total"] == pytest.approx(run["peak_reserved_with_evaluation_gib"], rel=0.1)


@pytest.mark.parametrize("script", ["bench.py", "recipe_bench.py", "laptop.py"])
def test_scripts_explain_themselves(script):
    """--help is the manual, and must not need a GPU."""
    command = [sys.executable, PROJECT / "benchmarks" / script, "--help"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT)
    assert result.returncode == 0 and "usage:" in result.stdout
