"""Checks of the machine: what `make check` and, the night before, `make preflight` call ready is ready."""

import dataclasses
import json
import os

import pytest

from fiqa_helpers import profiles
from fiqa_helpers.__main__ import main
from fiqa_helpers.base import Workspace
from fiqa_helpers.machinery import assets, checks


def test_the_exit_code_goes_through_twenty_machines(tmp_path, monkeypatch, capsys, smollm2, fiqa_rows):
    """A loop over ssh sees nothing but the exit code; with everything in the cache every line is OK."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assets.minilm_folder()
    arguments = ["check", "--offline", "--profile", "laptop", "--workdir", str(tmp_path)]
    with pytest.raises(SystemExit, match="0"):
        main(arguments)
    assert capsys.readouterr().out.endswith("Ready.\n")
    monkeypatch.setenv("FIQA_CACHE", str(tmp_path / "empty"))
    with pytest.raises(SystemExit, match="1"):
        main(arguments)
    said = capsys.readouterr().out
    assert "3 of 10 requirements are not met." in said
    assert said.count("make run ONLY=00") == 3, "Model, Data and MiniLM, each with its remedy"


def test_a_damaged_asset_is_noticed(tmp_path, monkeypatch, fiqa_rows):
    """One flipped byte in the cache would be fetched again, in a room where nothing can be fetched."""
    name = assets.ASSETS["fiqa_test"].name_in_cache
    content = bytearray(assets.fiqa_test_file().read_bytes())
    content[1000] ^= 1
    (tmp_path / name).mkdir()
    (tmp_path / name / "test.jsonl").write_bytes(content)
    monkeypatch.setenv("FIQA_CACHE", str(tmp_path))
    assert not checks._data(profiles.load_profile("laptop"), True).ok


def test_a_hub_model_counts_only_with_all_its_files(tmp_path):
    """A download that stopped at the third of four files looks complete from outside."""
    profile = changed("gpu80", model=str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    index = {"weight_map": {"a": shards[0], "b": shards[1]}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / shards[0]).write_bytes(b"")
    assert not checks._model(profile, True).ok
    (tmp_path / shards[1]).write_bytes(b"")
    assert checks._model(profile, True).ok
    assert not checks._model(changed("gpu80", model="nobody/nothing"), True).ok


def changed(name: str, **values: object) -> profiles.Profile:
    """A profile with other values, unchecked."""
    profile = profiles.PROFILES[name]
    if dataclasses.is_dataclass(profile):
        return dataclasses.replace(profile, **values)
    return profile.model_copy(update=values)


def test_own_rows_are_read(project, monkeypatch):
    """A CSV that notebook 01 would refuse is refused the evening before."""
    monkeypatch.chdir(project)
    good = checks._data(changed("laptop", data="docs/examples/harbour_lantern.csv"), True)
    assert good.ok and good.detail.endswith("40 rows")
    assert not checks._data(changed("laptop", data="docs/troubleshooting.md"), True).ok


def test_a_wrong_package_version_is_named(tmp_path, monkeypatch):
    """A library upgraded by hand explains most strange results. pip finds this one before the real one."""
    folder = tmp_path / "fiqa_workshop-9.9.dist-info"
    folder.mkdir()
    text = "Metadata-Version: 2.1\nName: fiqa-workshop\nVersion: 9.9\nRequires-Dist: peft<0.1\n"
    (folder / "METADATA").write_text(text)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    check = checks._packages()
    assert not check.ok and "peft<0.1, but you have peft" in check.detail


def test_a_profile_out_of_reach_fails_with_remedies(tmp_path, monkeypatch):
    """Each FAIL names what to do; `profile gpu80 needs more` alone helps nobody."""
    monkeypatch.setattr(checks.machine, "gpu", lambda: None)
    profile = changed("gpu80", model=str(tmp_path), data=str(tmp_path))
    results = checks.checks(Workspace(str(tmp_path)), profile, offline=True)
    assert {check.name for check in results if not check.ok} >= {"GPU", "Model", "Data"}
    assert all(check.remedy for check in results if not check.ok)
    assert "FAIL  GPU" in checks.report(results)


def test_folder_that_does_not_exist_yet_is_checked_on_its_disk(tmp_path):
    """workdir and cache are made later; their disk is known now."""
    assert checks._disk("Disk", tmp_path / "a" / "b", 0, "").ok
    full = checks._disk("Disk", tmp_path, 10**9, "use another")
    assert not full.ok and "use another" in full.remedy
