"""Checks of the machine: what `make check` and, the night before, `make preflight` call ready is ready."""

import json
import os
from dataclasses import replace

import pytest

from fiqa_helpers.__main__ import main
from fiqa_helpers.base import Workspace
from fiqa_helpers.machinery import assets, checks
from fiqa_helpers.profiles import PROFILES

LAPTOP = PROFILES["laptop"]


def test_the_exit_code_goes_through_twenty_machines(tmp_path, monkeypatch, capsys, smollm2, fiqa_rows):
    """A loop over ssh sees nothing but the exit code; with everything in the cache every line is OK."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assets.minilm_folder()
    arguments = ["check", "--offline", "--profile", "laptop", "--workdir", str(tmp_path)]
    with pytest.raises(SystemExit, match="0"):
        main(arguments)
    assert capsys.readouterr().out.endswith("Ready.\n")
    damaged = tmp_path / "cache" / assets.ASSETS["fiqa_test"].name_in_cache / "test.jsonl"
    damaged.parent.mkdir(parents=True)  # one byte too many: no network would replace it
    damaged.write_bytes(assets.fiqa_test_file().read_bytes() + b" ")
    monkeypatch.setenv("FIQA_CACHE", str(tmp_path / "cache"))
    with pytest.raises(SystemExit, match="1"):
        main(arguments)
    said = capsys.readouterr().out
    assert "3 of 10 requirements are not met." in said
    assert said.count("make run ONLY=00") == 3, "Model, Data and MiniLM, each with its remedy"


def test_a_hub_model_counts_only_with_all_its_files(tmp_path):
    """A download that stopped at the third of four files looks complete from outside."""
    profile = replace(PROFILES["gpu80"], model=str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    index = {"weight_map": {"a": shards[0], "b": shards[1]}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / shards[0]).touch()
    assert not checks._model(profile, True)[0]
    (tmp_path / shards[1]).touch()
    assert checks._model(profile, True)[0]
    assert not checks._model(replace(profile, model="nobody/nothing"), True)[0]


def test_own_rows_are_read(project, tmp_path):
    """A CSV that notebook 01 would refuse is refused the evening before; it may lie in the workspace."""
    rows = (project / "docs" / "examples" / "harbour_lantern.csv").read_text("utf-8")
    (tmp_path / "rows.csv").write_text(rows, "utf-8")
    (tmp_path / "wrong.csv").write_text(rows.replace("question", "title"), "utf-8")
    good, wrong = (
        checks._data(replace(LAPTOP, data=f"{name}.csv"), Workspace(str(tmp_path)), True)
        for name in ("rows", "wrong")
    )
    assert good[0] and "32 train, 4 validation, 4 test rows" in good[1] and not wrong[0]


def test_a_wrong_package_version_is_named(tmp_path, monkeypatch):
    """A library upgraded by hand explains most strange results. pip finds this one before the real one."""
    folder = tmp_path / "fiqa_workshop-9.9.dist-info"
    folder.mkdir()
    text = "Metadata-Version: 2.1\nName: fiqa-workshop\nVersion: 9.9\nRequires-Dist: peft<0.1\n"
    (folder / "METADATA").write_text(text)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    fits, found = checks._packages()
    assert not fits and "peft<0.1, but you have peft" in found


def test_what_a_profile_lacks_is_named_with_its_remedy(tmp_path, monkeypatch):
    """`profile gpu80 needs more` alone helps nobody. A folder that is made later is checked on its disk."""
    monkeypatch.setattr(checks.machine, "gpu", lambda: None)
    profile = replace(PROFILES["gpu80"], model=str(tmp_path), data=str(tmp_path))
    monkeypatch.setitem(checks.NEEDS, "gpu80", (20, 10**9))
    results = checks.checks(Workspace(str(tmp_path / "a" / "b")), profile, offline=True)
    failed = {check.name: check.remedy for check in results if not check.ok}
    assert failed.keys() >= {"GPU", "Model", "Data", "Disk for models"} and "Disk for runs" not in failed
    assert all(failed.values()) and "FAIL  GPU" in checks.report(results)
