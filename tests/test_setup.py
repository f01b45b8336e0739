"""Setting up: dependencies that agree, a Python that is found, an environment that is never half made."""

import itertools
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest
import yaml
from checkout import PROJECT, nothing_set
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PYPROJECT["project"]["optional-dependencies"]
TOOLS = ("dirname", "sed", "cat", "cut", "sha256sum", "mkdir", "rm", "date", "ls", "flock", "env", "sh", "id")
SHIM = "echo 'pyenv: python3.12: command not found' >&2\nexit 127"
REAL = os.path.realpath(sys.executable)


def test_the_pins_hold_everywhere():
    """An index, a path or a range works on one machine only; a package without a pin is another each week."""
    lines = (PROJECT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(text) for line in lines if (text := line.partition("#")[0].strip())]
    for pin in pins:
        assert [spec.operator for spec in pin.specifier] == ["=="] and not pin.url and not pin.extras, pin
        assert Version(next(iter(pin.specifier)).version).local is None
    for python, system in itertools.product(["3.12", "3.13"], ["linux", "darwin"]):
        machine = {"python_version": python, "python_full_version": f"{python}.1", "sys_platform": system}
        apply = [pin for pin in pins if not pin.marker or pin.marker.evaluate(machine)]
        names = Counter(canonicalize_name(pin.name) for pin in apply)
        assert max(names.values()) == 1, "pip refuses two pins of one package"
    for requirement in map(
        Requirement, itertools.chain(PYPROJECT["project"]["dependencies"], *EXTRAS.values())
    ):
        found = [pin for pin in pins if canonicalize_name(pin.name) == canonicalize_name(requirement.name)]
        assert found or requirement.name == PYPROJECT["project"]["name"], requirement
        assert all(requirement.specifier.contains(next(iter(pin.specifier)).version) for pin in found)


def test_environment_file_agrees_with_pyproject():
    """conda users would get another Python, or the project without the extras of `make env`."""
    content = yaml.safe_load((PROJECT / "environment.yml").read_text(encoding="utf-8"))
    extras = re.search(r"extras=\$\{EXTRAS:-(.+)\}", (PROJECT / "scripts" / "make_env.sh").read_text())[1]
    python, *_, pip = content["dependencies"]
    assert python.startswith("python=3.12") and set(extras.split(",")) <= set(EXTRAS)
    assert pip == {"pip": ["-c constraints.txt", f"-e .[{extras}]"]}


def test_package_holds_its_data():
    """A JSON file missing from a wheel fails only on other people's machines."""
    settings = PYPROJECT["tool"]["setuptools"]
    folders = {name: PROJECT / name.replace(".", "/") for name in settings["packages"]}
    assert set(folders.values()) == {path.parent for path in PROJECT.glob("fiqa_helpers/**/__init__.py")}
    for name, folder in folders.items():
        for path in folder.glob("*.*"):
            assert path.suffix == ".py" or any(map(path.match, settings["package-data"][name])), path.name


def test_import_is_cheap():
    """Everything imports the package first, and `--help` waits ten seconds where a module brings torch."""
    heavy = {"torch", "transformers", "datasets", "peft", "pandas", "matplotlib", "nemo_automodel"}
    code = "import sys, time; a = time.perf_counter(); import fiqa_helpers; print(time.perf_counter() - a)\n"
    code += f"import fiqa_helpers.__main__; print({heavy} & set(sys.modules))"
    said = [subprocess.check_output([sys.executable, "-c", code], text=True).split() for _ in range(2)]
    assert min(float(seconds) for seconds, *_ in said) <= 0.5
    assert said[0][1:] == ["set()"]


def make(*arguments: str, cwd: Path, before: tuple = (), **environment: str) -> subprocess.CompletedProcess:
    """make as in a new shell, after the words `before`; what it and its programs said."""
    command = [*before, "make", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=nothing_set() | environment)


def executable(path: Path, lines: str) -> Path:
    """A shell script at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def clone(tmp_path) -> Path:
    """A copy of the files that make needs, in a folder with a space in its name."""
    folder = tmp_path / "a clone"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(PROJECT / name, folder)
    shutil.copytree(PROJECT / "scripts", folder / "scripts")
    return folder


def finished_environment(folder: Path, python: str) -> Path:
    """An environment that counts as finished; its python does what `python` says, but for its version."""
    venv = folder / ".venv"
    executable(venv / "bin" / "python", f'[ "$#$1" = 2-c ] && echo 3.12 && exit 0\n{python}')
    key = subprocess.check_output([folder / "scripts" / "make_env.sh", "--key"], text=True)
    (venv / ".fiqa-workshop-stamp").write_text(key)
    (venv / ".fiqa-workshop-project").write_text(f"{folder.resolve()}\n")
    return venv


def test_make_passes_values_on_untouched_and_keeps_them_to_itself(clone):
    """Braces, quotes and spaces. `make test VENV=/kept` had a test build its environment over /kept."""
    finished_environment(clone, 'env >environment; printf "%s\\n" "$@" >called')
    values = {"overrides": "{model: '/my models/it''s $HOME `x`'}", "workdir": "/tmp/with space/$x {y}"}
    words = [f"{name.upper()}={value}" for name, value in values.items()]
    result = make("run", f"VENV={clone / '.venv'}", "FRESH=1", *words, cwd=clone)
    assert result.returncode == 0, result.stderr
    called = (clone / "called").read_text().splitlines()
    assert {name: called[called.index(f"--{name}") + 1] for name in values} == values
    assert called[-1] == "on_existing=fresh"
    handed_down = (clone / "environment").read_text()
    assert not re.search(r"^(VENV|WORKDIR)=|^MAKEFLAGS=.*VENV", handed_down, re.MULTILINE)


@pytest.fixture
def tools(tmp_path) -> Path:
    """A PATH with the tools that the scripts call and no Python at all."""
    (tmp_path / "bin").mkdir()
    for tool in filter(shutil.which, TOOLS):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    return tmp_path / "bin"


def find_python(path: object, **environment: str) -> subprocess.CompletedProcess:
    """scripts/find_python.sh with this PATH and an empty home, unless it is given."""
    environment = {"PATH": str(path), "HOME": "/nonexistent"} | environment
    command = [PROJECT / "scripts" / "find_python.sh"]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def system_has_python() -> bool:
    """A Python in a place that is searched besides PATH and home."""
    places = ["/usr/local/bin", "/opt/homebrew/bin", "/opt/conda/bin"]
    return any(Path(place, f"python3.{minor}").exists() for place in places for minor in (12, 13))


@pytest.mark.skipif(system_has_python(), reason="this machine has a Python in a system folder")
def test_no_fitting_python_is_one_line_with_a_remedy(tools):
    """No "command not found"; and one that calls itself 3.11, or lacks ensurepip, makes no environment."""
    changes = {"python3.12": "sys.version_info = (3, 11, 9)", "python3": "sys.modules['ensurepip'] = None"}
    for name, change in changes.items():
        code = f"import sys; {change}; script = sys.argv[1]; sys.argv = sys.argv[1:]; exec(script)"
        executable(tools / name, f'exec "{REAL}" -c "{code}" "$3" "$4"')
    result = find_python(tools)
    assert result.returncode == 1 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1 and "uv python install 3.12" in result.stderr


def test_what_fails_is_passed_over(tools, tmp_path):
    """pyenv's python3.12 on PATH may only complain: a Python may lie behind it, or in pyenv's folder."""
    minor = f"python3.{sys.version_info.minor}"
    for name in ("python", "python3", minor):  # as conda, Debian and pyenv call it
        executable(tmp_path / "broken" / name, SHIM)
        good = executable(tools / name, f'exec "{REAL}" "$@"')
        result = find_python(f"{tmp_path / 'broken'}:{tools}")
        assert os.path.realpath(result.stdout.strip()) == REAL, result.stderr
        good.unlink()
    executable(tmp_path / ".pyenv" / "versions" / f"{minor[6:]}.1" / "bin" / "python", f'exec "{REAL}" "$@"')
    result = find_python(f"{tmp_path / 'broken'}:{tools}", HOME=str(tmp_path))
    assert os.path.realpath(result.stdout.strip()) == REAL, result.stderr


def test_virtual_environment_leads_to_its_base(tools, tmp_path):
    """With an old .venv active, python is the one inside it: building from that would delete it midway."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "v")], check=True)
    result = find_python(f"{tmp_path / 'v' / 'bin'}:{tools}")
    assert result.returncode == 0 and not result.stdout.startswith(str(tmp_path)), result.stderr


def test_an_asked_for_python_that_fails_is_named(tools, tmp_path):
    """PYTHON=/somewhere is a wish: falling back to another would be silent."""
    wish = executable(tmp_path / "python", SHIM)
    result = find_python(tools, PYTHON=str(wish))
    assert result.returncode == 1 and f"PYTHON={wish} is not a working Python" in result.stderr


def test_a_second_user_takes_an_environment_that_is_whole(clone):
    """Who may read it, not write, met "Permission denied" on a lock, or on a link to another checkout."""
    venv = finished_environment(clone, "exit 1")
    (venv / ".fiqa-workshop-project").write_text("/of/the/first user\n")
    weak = () if os.getuid() else ("setpriv", "--bounding-set=-all")  # root may write everywhere
    for folder in (clone, venv):
        folder.chmod(0o555)
    if weak and subprocess.run([*weak, "mkdir", clone / "x"], capture_output=True).returncode != 1:
        pytest.skip("setpriv is not available here")
    result = make("env", cwd=clone, before=weak)
    assert result.returncode == 0 and "linked to /of/the/first user" in result.stderr, result.stderr
    (clone / "constraints.txt").write_text("unheard-of==1.0\n")
    result = make("env", cwd=clone, before=weak)
    assert "not yours to write" in result.stderr and "denied" not in result.stderr, result.stderr
    for folder in (clone, venv):
        folder.chmod(0o755)


OFFLINE = "[ $1 = -c ] && exit 0\necho lost >&2\nexit 1"  # a python in which every call of pip fails


@pytest.fixture
def base(tmp_path) -> str:
    """A base Python that makes environments in which every pip call fails, like a lost network."""
    offline = executable(tmp_path / "offline", OFFLINE)
    makes = 'if [ "$1 $2" = "-m venv" ]; then\n  mkdir -p "$3/bin"; touch "$3/pyvenv.cfg"\n'
    makes += f'  cp "{offline}" "$3/bin/python"; exit 0\nfi\n'
    asked = f'if [ "$1" = -I ]; then "{REAL}" "$@" >/dev/null && echo "$0"; exit; fi\n'
    return str(executable(tmp_path / "base" / "python", f'{makes}{asked}exec "{REAL}" "$@"'))


def test_a_half_made_or_outdated_environment_is_never_used(clone, base):
    """The network went away during pip, or a pin changed: results of packages that nobody named."""
    venv = clone / ".venv"
    for again in (False, True):
        result = make("run", cwd=clone, PYTHON=base)
        assert result.returncode != 0 and "is unfinished" in result.stderr
        assert not (venv / ".fiqa-workshop-stamp").exists()
        assert (f"Making {venv} again" in result.stderr) is again
    finished_environment(clone, "exit 1")
    (clone / "pyproject.toml").open("a").write('\n[tool.other]\nx = "y"\n')  # a lint rule costs no 7 GB
    assert make("env", cwd=clone, PYTHON=base).returncode == 0
    (clone / "constraints.txt").write_text("unheard-of==1.0\n")
    assert f"Making {venv} again" in make("env", cwd=clone, PYTHON=base).stderr


def test_what_others_made_is_not_deleted(clone, base):
    """VENV=~/Documents is refused; whoever made .venv by hand keeps it, also when the installation fails."""
    thesis = clone / "documents" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.touch()
    result = make("env", "VENV=documents", cwd=clone, PYTHON=base)
    assert result.returncode != 0 and "is not a virtual environment" in result.stderr
    assert list(thesis.parent.iterdir()) == [thesis]
    venv = executable(clone / ".venv" / "bin" / "python", OFFLINE).parent.parent
    for name in ("pyvenv.cfg", "mine"):
        (venv / name).touch()
    assert "is unfinished" in make("env", cwd=clone).stderr
    assert (venv / "mine").exists()
