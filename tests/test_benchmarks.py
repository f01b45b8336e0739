"""The benchmark's figures: what the README says is what the result files hold."""

import bench
import contenders
import pytest
import report

from fiqa_helpers.machinery import machine
from fiqa_helpers.profiles import PROFILES


def test_pages_hold_what_was_measured():
    """A table edited by hand, or results without a new table: a figure nobody measured."""
    lines, page = report.pages()
    assert f"{report.BEGIN}\n{lines}\n{report.END}" in report.README.read_text(encoding="utf-8")
    assert page == report.PAGE.read_text(encoding="utf-8")


def test_every_contender_has_a_source_and_a_result_or_is_named_as_missing(project):
    """A peer left out because its result did not please, or run with settings of our own choice."""
    assert {run["name"] for run in report.read("gpu")["runs"]} == set(contenders.CONTENDERS)
    for name, contender in contenders.CONTENDERS.items():
        assert callable(getattr(contenders, contender["run"]))
        first = contender["source"].split(" ")[0].strip(",")
        assert first.startswith("https://") or (project / first).is_file(), name
    assert all(run["source"].startswith("https://") for run in report.read("unsloth")["runs"])


def test_memory_ledger_within_a_tenth_of_what_was_measured():
    """The ledger is a promise about a card that most readers do not have."""
    for run in report.read("gpu")["runs"][:2]:
        predicted = machine.predict_memory(PROFILES[run["name"]], machine.nemotron_config())
        assert predicted["total"] == pytest.approx(run["peak_reserved_with_evaluation_gib"], rel=0.1)


def test_a_contender_that_fails_is_a_result(monkeypatch):
    """Eight minutes of a rented card, and the ninth contender's error would lose the eight before it."""
    monkeypatch.setattr(bench.sys, "executable", "false")
    assert bench.run("gpu80", 5, 60) == {"name": "gpu80", "error": "it said nothing"}
