"""The run that is kept in the repository: labelled, small, of real weights, and used only where it fits."""

import dataclasses
import json
import re
import runpy
import shutil
from pathlib import Path

import pytest

from fiqa_helpers import metrics, model, profiles
from fiqa_helpers.base import WorkshopError, Workspace
from fiqa_helpers.model import check_adapter

PROJECT = Path(__file__).resolve().parent.parent
SCRIPT = runpy.run_path(str(PROJECT / "scripts" / "make_precomputed.py"))
KEPT = model.load_kept()
EVALUATION = KEPT.folder / "kept_evaluation.json"
FILES = sorted(path for path in KEPT.folder.rglob("*") if path.is_file())


def test_it_is_small_of_real_weights_and_says_whose():
    """Random weights must never pose as learning, nor a laptop's minutes as a GPU's; a clone stays cheap."""
    assert sum(path.stat().st_size for path in FILES) <= SCRIPT["LIMIT"] == 2_600_000
    training, device = KEPT.training, KEPT.notebook("04")["device"]
    assert training["finished"] and training["profile"]["model"] != "random"
    assert training["validation_loss"]["best"] < training["validation_loss"]["before"]
    where = device["gpu"]["name"] if device["gpu"] else device["cpu"]
    for word in ("Precomputed run", "SmolLM2-135M-Instruct", "FiQA", where, training["written"][:10]):
        assert word in KEPT.label
    run = {KEPT.notebook(number)["git_revision"] for number in SCRIPT["NOTEBOOKS"]}
    assert run == {training["git_revision"]}, "the cards are of different states of the project"


def test_the_page_is_written_from_the_files():
    """A page edited by hand, or files changed without it, tell two stories."""
    text = (KEPT.folder / "README.md").read_text("utf-8")
    assert SCRIPT["page"](KEPT) == text
    assert all((KEPT.folder / target).is_file() for target in re.findall(r"\]\((plots/[^)]+)\)", text))


def test_no_data_set_in_disguise_and_no_machine(fiqa_rows):
    """A few quoted questions may be here, FiQA's answers may not, nor a path of somebody's machine."""
    text = "\n".join(path.read_text("utf-8") for path in FILES if path.suffix in (".json", ".md"))
    assert not re.search(r"/(root|home|tmp|work|Users)/", text)
    questions = [row["question"] for row in fiqa_rows if row["question"] in text]
    assert 0 < len(questions) <= 12 and "CC-BY-SA-4.0" in text
    answers = [row["ground_truths"][0][:80] for row in fiqa_rows]
    assert not [answer for answer in answers if answer in text]


def test_the_adapter_loads_and_changes_the_model(smollm2):
    """What a person without notebook 04 is given must be an adapter that does something."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    card = check_adapter(KEPT.folder / "adapter", profiles.load_profile("laptop"))
    assert card["profile"]["prompt"] == "plain"
    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(smollm2)("Question: Are bonds safe?\n\nAnswer:", return_tensors="pt")
    with torch.no_grad():
        before = base(**ids).logits
        tuned = PeftModel.from_pretrained(base, KEPT.folder / "adapter").eval()
        assert (tuned(**ids).logits - before).abs().max() > 0.1
    assert {p.dtype for n, p in tuned.named_parameters() if "lora_" in n} == {torch.float32}


def test_it_stands_in_only_where_notebook_04_was_not_run(tmp_path, capsys):
    """Somebody's own adapter must never be passed over, not even a broken one."""
    workspace, laptop = Workspace(str(tmp_path)), profiles.load_profile("laptop")
    assert model.adapter_folder(workspace, laptop) == KEPT.folder / "adapter"
    assert "Notebook 04 was not run" in (said := capsys.readouterr().out) and KEPT.label in said
    workspace.final_model.mkdir()
    assert model.adapter_folder(workspace, laptop) == workspace.final_model
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("change", [{"model": "random"}, {"data": "hub"}, {"prompt": "chat"}])
def test_it_never_stands_in_for_another_model_data_or_prompt(tmp_path, change):
    """There the next check says which notebook to run."""
    profile = dataclasses.replace(profiles.PROFILES["laptop"], **change)
    folder = model.adapter_folder(Workspace(str(tmp_path)), profile)
    with pytest.raises(WorkshopError, match="There is no adapter in .*run notebook 04_train first"):
        check_adapter(folder, profile)


def test_a_run_with_random_weights_is_not_taken_over(tmp_path):
    """The tests' own profile writes the same files; they would look like a model that learned nothing."""
    shutil.copytree(KEPT.folder / "adapter", tmp_path / "checkpoints" / "final_model")
    card = tmp_path / "checkpoints" / "final_model" / "run_card.json"
    content = json.loads(card.read_text())
    content["profile"]["model"] = "random"
    card.write_text(json.dumps(content))
    with pytest.raises(Exception, match="random weights, which learn nothing"):
        SCRIPT["take_over"](tmp_path, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_the_case_study_is_labelled_and_tells_its_story():
    """Its loss fell further than the kept run's, and its answers loop: notebook 06 says so in words."""
    case = model.case_study()
    for word in ("whole answers", f"learning rate {case.training['profile']['learning_rate']:g}", "16 rows"):
        assert word in case.label
    found, good = case.evaluation["comparisons"], KEPT.evaluation["comparisons"]
    assert found["nll"]["difference"] < good["nll"]["difference"] < 0
    assert found["stopped"]["tuned"] < 0.05 < 0.9 < good["stopped"]["tuned"]
    assert found["repeated"]["tuned"] > 0.5 > 0.05 > good["repeated"]["tuned"]


@pytest.mark.skipif(not EVALUATION.is_file(), reason="it is made on a GPU")
def test_the_kept_evaluation_shows_what_is_claimed():
    """Voice moves, also by stop words alone; each floor loses on one number; intervals are of these rows."""
    kept = json.loads(EVALUATION.read_text("utf-8"))
    means, floors = kept["means"], kept["floors"]
    tuned = means["laptop"]
    assert kept["tested"] == 100 and kept["device"]["gpu"]
    assert (
        tuned["voice"] >= 0.5 and means["untuned plain"]["voice"] <= 0.2 and floors["people"]["voice"] >= 0.78
    )
    assert abs(tuned["voice"] - tuned["voice_stop_words"]) <= 0.2
    assert tuned["stopped"] >= 0.95 and kept["against"]["laptop"]["untuned plain"]["nll"][2] < 0
    three = ("similarity", "token_f1_60", "voice")
    for name in floors.keys() - {"people"}:
        assert any(floors[name][metric] < tuned[metric] for metric in three), name
    for name in ("tfidf", "token_f1_60"):
        for rival in ("untuned plain", "untuned chat"):
            before, after = kept["rows"][rival][name], kept["rows"]["laptop"][name]
            again = metrics.compare(name, before, after)
            figures = (again.difference, again.low, again.high)
            assert kept["against"]["laptop"][rival][name] == pytest.approx(figures, abs=2e-3)


def test_pages_quote_the_three_seeds():
    """The one claim that tuning helps, copied by hand and copied wrong."""
    results = PROJECT / "benchmarks" / "results" / "laptop_seeds.json"
    seeds = json.loads(results.read_text())["seeds"].values()

    def mean(metric: str, side: str) -> float:
        return sum(seed[metric][side] for seed in seeds) / len(seeds)

    assert mean("stopped", "tuned") >= 0.95 and mean("nll", "difference") < 0
    assert mean("similarity", "difference") > -0.01
    for page in ("README.md", "benchmarks/RECIPE.md"):
        text = (PROJECT / page).read_text("utf-8")
        for metric in ("similarity", "token_f1"):
            assert f"{mean(metric, 'base'):.3f}" in text and f"{mean(metric, 'tuned'):.3f}" in text
