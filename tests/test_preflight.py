"""The night before: what preflight calls ready must be ready without a network."""

import dataclasses
import json
import os
import socket
import subprocess
import sys

import pytest

from fiqa_helpers import profiles
from fiqa_helpers.base import Workspace
from fiqa_helpers.machinery import checks
from fiqa_helpers.machinery.checks import Check


def lines(workspace, profile) -> dict[str, Check]:
    return {check.name: check for check in checks.preflight(Workspace(str(workspace)), profile)}


@pytest.fixture
def firefox(tmp_path, monkeypatch):
    """A program of that name: test machines need no browser."""
    (tmp_path / "firefox").write_text("#!/bin/sh\n")
    (tmp_path / "firefox").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


def test_a_prepared_machine_is_ready(tmp_path, smollm2, fiqa_rows, firefox):
    """With everything in the cache, every line is OK: a FAIL that means nothing is soon ignored."""
    from fiqa_helpers.machinery import assets

    assets.minilm_folder()
    found = lines(tmp_path, profiles.load_profile("laptop"))
    assert {name: check.detail for name, check in found.items() if not check.ok} == {}
    wanted = {"Python", "Packages", "Disk for runs", "Model", "Data", "MiniLM", "Ports", "Browser", "GPU"}
    assert wanted <= set(found)


def test_the_exit_code_goes_through_twenty_machines(tmp_path, monkeypatch, capsys, firefox):
    """A loop over ssh sees nothing but the exit code."""
    from fiqa_helpers.__main__ import main

    arguments = ["preflight", "--profile", "laptop", "--workdir", str(tmp_path)]
    assert main(arguments) == 0 and capsys.readouterr().out.endswith("Ready.\n")
    monkeypatch.setenv("FIQA_CACHE", str(tmp_path / "empty"))
    assert main(arguments) == 1 and "FAIL  MiniLM" in capsys.readouterr().out


def test_what_is_not_on_the_disk_fails_where_check_would_still_fetch_it(tmp_path, monkeypatch):
    """`make check` is content with an index that answers; tomorrow's room may have none."""
    monkeypatch.setenv("FIQA_CACHE", str(tmp_path / "empty"))
    monkeypatch.delenv("FIQA_WHEELS", raising=False)
    found = lines(tmp_path, profiles.load_profile("laptop"))
    for name in ("Model", "Data", "MiniLM"):
        assert not found[name].ok and "make run ONLY=00" in found[name].remedy


def test_a_damaged_asset_is_noticed(tmp_path, monkeypatch, fiqa_rows):
    """One flipped byte in the cache would be fetched again, in a room where nothing can be fetched."""
    from fiqa_helpers.machinery import assets

    name = assets.ASSETS["fiqa_test"].name_in_cache
    content = bytearray(assets.fiqa_test_file().read_bytes())
    content[1000] ^= 1
    (tmp_path / name).mkdir()
    (tmp_path / name / "test.jsonl").write_bytes(content)
    monkeypatch.setenv("FIQA_CACHE", str(tmp_path))
    assert not checks._asset("Data", "fiqa_test").ok


def test_a_hub_model_counts_only_with_all_its_files(tmp_path):
    """A download that stopped at the third of four files looks complete from outside."""
    profile = dataclasses.replace(profiles.PROFILES["gpu80"], model=str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    index = {"weight_map": {"a": shards[0], "b": shards[1]}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / shards[0]).write_bytes(b"")
    assert not checks._on_disk(dataclasses.replace(profile, data="packaged"))[0].ok
    (tmp_path / shards[1]).write_bytes(b"")
    assert checks._on_disk(dataclasses.replace(profile, data="packaged"))[0].ok


def test_own_rows_are_read(project):
    """A CSV that notebook 01 would refuse is refused the evening before."""
    good = dataclasses.replace(profiles.PROFILES["laptop"], data="docs/examples/harbour_lantern.csv")
    assert checks._rows(good).detail.endswith("40 rows")
    bad = dataclasses.replace(good, data="docs/troubleshooting.md")
    assert not checks._rows(bad).ok


def test_a_taken_port_is_named_and_the_next_one_found():
    """Yesterday's server still runs on half the laptops: no failure, but not the address on the slide."""
    with socket.socket() as server:
        try:
            server.bind(("127.0.0.1", checks.LAB_PORT))
            server.listen()
        except OSError:
            pass  # taken by another program: just as well
        check = checks._ports()
    assert check.ok and f"{checks.LAB_PORT} is taken" in check.detail


def test_a_machine_that_cannot_talk_to_itself_fails():
    """Without 127.0.0.1 a kernel starts and never answers."""
    code = "from fiqa_helpers.machinery import checks; check = checks._ports(); print(check.ok, check.detail)"
    command = ["unshare", "--net", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True)
    if "unshare" in done.stderr:
        pytest.skip("unshare --net is not available here")
    assert done.stdout.startswith("False 127.0.0.1 cannot be reached")


def test_no_browser_is_a_failure_only_where_one_is_needed(monkeypatch):
    """A server that is reached over ssh shows JupyterLab in another machine's browser."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("SSH_CONNECTION", raising=False)
    assert not checks._browser().ok and "ssh -L 8888" in checks._browser().remedy
    monkeypatch.setenv("SSH_CONNECTION", "192.0.2.1 50000 192.0.2.2 22")
    assert checks._browser().ok
