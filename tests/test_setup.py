"""Setting up: dependencies that agree, a Python that is found, an environment that is never half made."""

import os
import re
import shutil
import statistics
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import yaml
from checkout import HANDED_DOWN
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PROJECT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PYPROJECT["project"]["optional-dependencies"]
POSIX_TOOLS = ("dirname", "sed", "cat", "cut", "sha256sum", "mkdir", "rm", "date", "ls", "flock", "env")


def pins() -> dict[str, list[Requirement]]:
    found: dict[str, list[Requirement]] = {}
    for line in (PROJECT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        text = line.partition("#")[0].strip()
        if text:
            requirement = Requirement(text)
            found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return found


def declared() -> list[Requirement]:
    groups = [PYPROJECT["project"]["dependencies"], *EXTRAS.values()]
    return [
        requirement
        for requirement in map(Requirement, [text for group in groups for text in group])
        if canonicalize_name(requirement.name) != PYPROJECT["project"]["name"]
    ]


def test_every_dependency_is_pinned_within_its_range():
    """Without a pin each week installs another version; with a pin outside its range nothing installs."""
    pinned = pins()
    for requirement in declared():
        versions = [next(iter(pin.specifier)).version for pin in pinned[canonicalize_name(requirement.name)]]
        assert all(requirement.specifier.contains(version) for version in versions), requirement


def test_constraints_are_plain_exact_pins():
    """An index, a path or a range in this file works on the machine that wrote it, and nowhere else."""
    for requirements in pins().values():
        for requirement in requirements:
            assert [spec.operator for spec in requirement.specifier] == ["=="], requirement
            assert requirement.url is None
            assert not requirement.extras
            assert Version(next(iter(requirement.specifier)).version).local is None
    text = (PROJECT / "constraints.txt").read_text(encoding="utf-8")
    assert not re.search(r"^\s*-|://|@ ", text, re.MULTILINE)


@pytest.mark.parametrize("python", ["3.12", "3.13"])
def test_pins_apply_once_for_each_python(python):
    """Two pins of one package that both apply make pip refuse the file."""
    for system in ("linux", "darwin"):
        environment = {"python_version": python, "python_full_version": f"{python}.1", "sys_platform": system}
        for name, requirements in pins().items():
            apply = [pin for pin in requirements if not pin.marker or pin.marker.evaluate(environment)]
            assert len(apply) <= 1, f"{name} on {system}, Python {python}"


def test_environment_file_agrees_with_pyproject():
    """conda's own grammar reads it, the project allows its Python, its pip part is the project."""
    import rattler

    content = yaml.safe_load((PROJECT / "environment.yml").read_text(encoding="utf-8"))
    assert set(content) == {"name", "channels", "dependencies"}
    assert content["channels"] == ["conda-forge", "nodefaults"]
    specs = [rattler.MatchSpec(text) for text in content["dependencies"] if isinstance(text, str)]
    assert [spec.name.normalized for spec in specs] == ["python", "pip"]
    assert str(specs[0].version).startswith("3.12")
    assert Requirement(f"python{PYPROJECT['project']['requires-python']}").specifier.contains("3.12.0")
    pip = next(part["pip"] for part in content["dependencies"] if isinstance(part, dict))
    assert pip[0] == "-c constraints.txt"
    extras = re.fullmatch(r"-e \.\[(.+)\]", pip[1])[1].split(",")
    assert set(extras) <= set(EXTRAS)
    script = (PROJECT / "scripts" / "make_env.sh").read_text(encoding="utf-8")
    assert ",".join(extras) in script, "the Makefile's environment has other extras"


@pytest.mark.slow
def test_environment_file_installs_with_pip(tmp_path):
    """pip resolves the file's pip section on this Python (conda hands it to pip just so)."""
    content = yaml.safe_load((PROJECT / "environment.yml").read_text(encoding="utf-8"))
    pip = next(part["pip"] for part in content["dependencies"] if isinstance(part, dict))
    for name in ("pyproject.toml", "constraints.txt", "README.md"):
        shutil.copy(PROJECT / name, tmp_path / name)
    shutil.copytree(PROJECT / "fiqa_helpers", tmp_path / "fiqa_helpers")
    (tmp_path / "requirements.txt").write_text("\n".join(pip) + "\n")
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "-r", "requirements.txt"]
    subprocess.run(command, cwd=tmp_path, check=True)


def test_package_holds_its_data(tmp_path):
    """A JSON file missing from a wheel fails only on other people's machines."""
    from setuptools.discovery import PackageFinder

    settings = PYPROJECT["tool"]["setuptools"]
    assert settings["packages"] == PackageFinder.find(PROJECT, include=["fiqa_helpers*"])
    patterns = settings["package-data"]["fiqa_helpers"]
    for path in (PROJECT / "fiqa_helpers").iterdir():
        if path.is_file() and path.suffix != ".py":
            assert any(path.match(pattern) for pattern in patterns), path.name


def test_import_is_cheap():
    """Everything imports the package first: it must not cost seconds, nor bring torch along."""
    code = "import time; a = time.perf_counter(); import fiqa_helpers; print(time.perf_counter() - a)"
    seconds = [float(subprocess.check_output([sys.executable, "-c", code], cwd=PROJECT)) for _ in range(5)]
    assert statistics.median(seconds) <= 0.5


def test_the_command_line_imports_nothing_heavy():
    """`--help` would take ten seconds if a module beside it imported torch."""
    heavy = {"torch", "transformers", "datasets", "peft", "pandas", "matplotlib", "nemo_automodel"}
    code = (
        f"import sys, fiqa_helpers.__main__, fiqa_helpers.machinery.ship; print({heavy} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=PROJECT) == "set()\n"


def make(*arguments: str, cwd: Path = PROJECT, **environment: str) -> subprocess.CompletedProcess:
    keep = {
        key: value
        for key, value in os.environ.items()
        if key not in HANDED_DOWN and not key.startswith(("MAKE", "MFLAGS", "FIQA_"))
    }
    return subprocess.run(
        ["make", *arguments], cwd=cwd, capture_output=True, text=True, env=keep | environment
    )


def test_commands_of_the_readme_exist():
    """A command in the README that make does not know is the first thing a newcomer meets."""
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    makefile = (PROJECT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    used = set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE))
    assert {"run", "test", "lab"} <= used <= targets
    first_screen = "\n".join(text.splitlines()[:45])
    assert all(f"make {target}" in first_screen for target in ("run", "test", "lab"))


@pytest.fixture
def clone(tmp_path) -> Path:
    """A copy of the files that make needs, in a folder with a space in its name."""
    folder = tmp_path / "a clone"
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "scripts", ".ci"):
        source = PROJECT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        folder.mkdir(exist_ok=True)
        copy(source, folder / name)
    return folder


def finished_environment(folder: Path) -> Path:
    """An environment that counts as finished, whose python writes its arguments to a file."""
    key = subprocess.check_output([folder / "scripts" / "make_env.sh", "--key"], text=True)
    venv = folder / ".venv"
    (venv / "bin").mkdir(parents=True)
    (venv / ".fiqa-workshop-stamp").write_text(key)
    (venv / ".fiqa-workshop-project").write_text(f"{folder.resolve()}\n")
    python = venv / "bin" / "python"
    python.write_text(
        "#!/bin/sh\n"
        '[ "$1" = -c ] && echo 3.12 && exit 0\n'
        'for argument in "$@"; do printf "%s\\n" "$argument"; done >>called\n'
    )
    python.chmod(0o755)
    return venv


@pytest.mark.parametrize(
    ("name", "value", "option"),
    [
        ("OVERRIDES", '{max_steps: 20, prompt: "plain"}', "--overrides"),
        ("OVERRIDES", "{model: '/my models/it''s $HOME `x`'}", "--overrides"),
        ("WORKDIR", "/tmp/with space/$x {y}", "--workdir"),
        ("PROFILE", "gpu80", "--profile"),
    ],
)
def test_make_passes_values_on_untouched(clone, name, value, option):
    """Braces, quotes, dollars and spaces on their way through make and the shell."""
    finished_environment(clone)
    # A dollar is make's own sign: whoever types $x in an override means those two characters.
    result = make("run", f"{name}={value}", cwd=clone)
    assert result.returncode == 0, result.stderr
    called = (clone / "called").read_text().splitlines()
    assert called[called.index(option) + 1] == value
    assert "--fresh" not in called


def test_make_keeps_its_variables_to_itself(clone):
    """`make test VENV=/kept` once handed VENV to the tests, and one built its own environment over it."""
    (finished_environment(clone) / "bin" / "python").write_text(
        '#!/bin/sh\n[ "$1" = -c ] && echo 3.12 && exit 0\nenv >>environment\n'
    )
    result = make("lint", f"VENV={clone / '.venv'}", "ARGS=-x", cwd=clone)
    assert result.returncode == 0, result.stderr
    handed_down = (clone / "environment").read_text().splitlines()
    assert not [line for line in handed_down if line.startswith(("VENV=", "ARGS="))]
    assert not [line for line in handed_down if line.startswith("MAKEFLAGS=") and "VENV" in line]


@pytest.mark.parametrize("installed", [True, False])
def test_an_extra_is_installed_when_it_is_first_needed(clone, installed):
    """`make book` would end in "No module named myst_nb", or ask the index each time; its pins must count."""
    (finished_environment(clone) / "bin" / "python").write_text(
        f'#!/bin/sh\ncase "$2" in *find_spec*) exit {int(not installed)} ;; esac\n'
        '[ "$1" = -c ] && echo 3.12 && exit 0\n'
        'echo "$@" >>called\n'
    )
    result = make("book", "WORKDIR=/a try", cwd=clone)
    assert result.returncode == 0, result.stderr
    *pip, book = (clone / "called").read_text().splitlines()
    assert book == "scripts/make_book.py /a try"
    assert [line.endswith("-c constraints.txt -e .[book]") for line in pip] == [True] * (not installed)


def tool_path(folder: Path) -> Path:
    """A PATH with the tools that the scripts call and no Python at all."""
    folder.mkdir()
    for tool in (*POSIX_TOOLS, "sh", "make", "head", "id"):
        if shutil.which(tool):
            (folder / tool).symlink_to(shutil.which(tool))
    return folder


def find_python(path: Path, home: Path, **environment: str) -> subprocess.CompletedProcess:
    home.mkdir(exist_ok=True)
    return subprocess.run(
        [PROJECT / "scripts" / "find_python.sh"],
        env={"PATH": str(path), "HOME": str(home)} | environment,
        capture_output=True,
        text=True,
    )


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


SHIM = "#!/bin/sh\necho 'pyenv: python3.12: command not found' >&2\nexit 127\n"
REAL = os.path.realpath(sys.executable)


def system_has_python() -> bool:
    """A Python in a place that is searched besides PATH and home."""
    places = ["/usr/local/bin", "/opt/homebrew/bin", "/opt/conda/bin"]
    return any(Path(place, f"python3.{minor}").exists() for place in places for minor in (12, 13))


def test_no_python_is_one_line_with_a_remedy(tmp_path):
    """No traceback of make, no "command not found": what to type instead."""
    if system_has_python():
        pytest.skip("this machine has a Python in a system folder")
    result = find_python(tool_path(tmp_path / "bin"), tmp_path / "home")
    assert result.returncode == 1
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert "uv python install 3.12" in result.stderr


def test_a_shim_that_fails_is_passed_over(tmp_path):
    """pyenv puts a python3.12 on PATH that only complains; the Python behind it is in pyenv's folder."""
    path = tool_path(tmp_path / "bin")
    for name in ("python3.12", "python3.13", "python3", "python"):
        executable(path / name, SHIM)
    if not system_has_python():
        assert find_python(path, tmp_path / "home").returncode == 1
    version = f"{sys.version_info.major}.{sys.version_info.minor}.1"
    installed = tmp_path / "home" / ".pyenv" / "versions" / version / "bin" / "python"
    executable(installed, f'#!/bin/sh\nexec "{REAL}" "$@"\n')
    result = find_python(path, tmp_path / "home")
    assert result.returncode == 0, result.stderr
    assert os.path.realpath(result.stdout.strip()) == REAL


@pytest.mark.parametrize("name", ["python", "python3", f"python3.{sys.version_info.minor}"])
def test_every_usual_name_is_found(tmp_path, name):
    """Conda calls it python, Debian python3, pyenv and deadsnakes python3.12."""
    path = tool_path(tmp_path / "bin")
    executable(path / name, f'#!/bin/sh\nexec "{REAL}" "$@"\n')
    result = find_python(path, tmp_path / "home")
    assert os.path.realpath(result.stdout.strip()) == REAL


def test_a_working_python_behind_a_failing_one(tmp_path):
    """The first hit on PATH is broken, the second of the same name is good."""
    path = tool_path(tmp_path / "bin")
    executable(path / "python3", SHIM)
    executable(tmp_path / "second" / "python3", f'#!/bin/sh\nexec "{REAL}" "$@"\n')
    result = find_python(f"{path}:{tmp_path / 'second'}", tmp_path / "home")
    assert os.path.realpath(result.stdout.strip()) == REAL


def test_another_version_is_not_taken(tmp_path):
    """A Python that calls itself 3.11, or lacks ensurepip, cannot make the environment."""
    path = tool_path(tmp_path / "bin")
    for name, change in (
        ("python3.12", "import sys; sys.version_info = (3, 11, 9)"),
        ("python3", "import sys; sys.modules['ensurepip'] = None"),
    ):
        code = f"{change}; script = sys.argv[1]; sys.argv = sys.argv[1:]; exec(script)"
        executable(path / name, f'#!/bin/sh\nexec "{REAL}" -c "{code}" "$3" "$4"\n')
    if system_has_python():
        pytest.skip("this machine has a Python in a system folder")
    assert find_python(path, tmp_path / "home").returncode == 1


def test_virtual_environment_leads_to_its_base(tmp_path):
    """With an old .venv active, python is the one inside it: building from that would delete it midway."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "v")], check=True)
    path = tool_path(tmp_path / "bin")
    result = find_python(f"{tmp_path / 'v' / 'bin'}:{path}", tmp_path / "home")
    assert result.returncode == 0, result.stderr
    assert not result.stdout.startswith(str(tmp_path))


def test_an_asked_for_python_that_fails_is_named(tmp_path):
    """PYTHON=/somewhere is a wish: falling back to another would be silent."""
    wish = executable(tmp_path / "python", SHIM)
    result = find_python(tool_path(tmp_path / "bin"), tmp_path / "home", PYTHON=str(wish))
    assert result.returncode == 1
    assert f"PYTHON={wish} is not a working Python" in result.stderr


def test_a_finished_environment_is_left_alone(clone):
    """`make run` twice must not install twice."""
    venv = finished_environment(clone)
    before = {path: path.stat().st_mtime_ns for path in venv.rglob("*")}
    started = time.monotonic()
    assert make("env", cwd=clone).returncode == 0
    assert time.monotonic() - started < 5
    assert {path: path.stat().st_mtime_ns for path in venv.rglob("*")} == before


def fake_base(folder: Path) -> str:
    """A base Python that makes environments in which every pip call fails, like a lost network."""
    return str(
        executable(
            folder / "python",
            "#!/bin/sh\n"
            'if [ "$1 $2" = "-m venv" ]; then\n'
            '  mkdir -p "$3/bin"; touch "$3/pyvenv.cfg"\n'
            '  printf \'#!/bin/sh\\n[ "$1" = -c ] && exit 0\\necho lost >&2\\nexit 1\\n\' >"$3/bin/python"\n'
            '  chmod +x "$3/bin/python"; exit 0\n'
            "fi\n"
            f'if [ "$1" = -I ]; then "{REAL}" "$@" >/dev/null && echo "$0"; exit; fi\n'
            f'exec "{REAL}" "$@"\n',
        )
    )


def test_a_half_made_environment_is_never_used(clone, tmp_path):
    """The network went away during pip: the next make has to start over, not run with half the packages."""
    base = fake_base(tmp_path / "base")
    for attempt in range(2):
        result = make("run", cwd=clone, PYTHON=base)
        assert result.returncode != 0
        assert "is unfinished" in result.stderr
        assert not (clone / ".venv" / ".fiqa-workshop-stamp").exists()
        assert (f"Making {clone / '.venv'} again" in result.stderr) is (attempt == 1)


def test_changed_dependencies_rebuild(clone, tmp_path):
    """A pin that changed while the environment stayed: results of a version that nobody named."""
    venv = finished_environment(clone)
    (venv / ".fiqa-workshop").touch()
    with (clone / "constraints.txt").open("a") as file:
        file.write("unheard-of==1.0\n")
    result = make("env", cwd=clone, PYTHON=fake_base(tmp_path / "base"))
    assert f"Making {venv} again" in result.stderr


def test_settings_of_tools_do_not_rebuild(clone):
    """A changed lint rule must not cost seven gigabytes and five minutes."""
    finished_environment(clone)
    with (clone / "pyproject.toml").open("a") as file:
        file.write('\n[tool.other]\nx = "y"\n')
    assert make("env", cwd=clone).returncode == 0


def test_folders_of_others_are_not_deleted(clone, tmp_path):
    """VENV=~/Documents: refuse, touch nothing."""
    folder = clone / "documents"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years")
    result = make("env", "VENV=documents", cwd=clone, PYTHON=fake_base(tmp_path / "base"))
    assert result.returncode != 0
    assert "is not a virtual environment" in result.stderr
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


def test_environment_of_someone_else_is_completed_in_place(clone, tmp_path):
    """Whoever made .venv by hand keeps it, also when the installation fails."""
    venv = clone / ".venv"
    venv.mkdir()
    executable(venv / "bin" / "python", '#!/bin/sh\n[ "$1" = -c ] && exit 0\necho lost >&2\nexit 1\n')
    (venv / "pyvenv.cfg").touch()
    (venv / "mine").touch()
    result = make("env", cwd=clone)
    assert "is unfinished" in result.stderr
    assert (venv / "mine").exists()


def run_ci(clone: Path, tmp_path: Path) -> tuple[str, list[str]]:
    """`.ci/run` with make and apt-get recorded instead of run: (what it said, the calls)."""
    calls = tmp_path / "calls"
    calls.unlink(missing_ok=True)
    record = f'#!/bin/sh\necho "${{0##*/}} $*" >>"{calls}"\n'
    executable(tmp_path / "tools" / "apt-get", record)
    executable(tmp_path / "tools" / "make", record + '[ "$1" = test ] || mkdir -p "${2#VENV=}"\n')
    environment = os.environ | {
        "PATH": f"{tmp_path / 'tools'}:{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PYTHON": REAL,
    }
    result = subprocess.run([clone / ".ci" / "run"], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout, calls.read_text().splitlines()


def test_ci_keeps_the_environment_outside_the_checkout(clone, tmp_path):
    """The same folder for the same dependencies, another for others, a broken one thrown away."""
    _, calls = run_ci(clone, tmp_path)
    env, test = [call for call in calls if call.startswith("make")]
    venv = Path(env.removeprefix("make env VENV="))
    assert test == f"make test VENV={venv}"
    assert venv.parent == tmp_path / "cache" / "fiqa-workshop" / "venvs"

    executable(venv / "bin" / "python", "#!/bin/sh\nexit 0\n")
    (venv / "kept").touch()
    said, again = run_ci(clone, tmp_path)
    assert again == calls
    assert (venv / "kept").exists()

    executable(venv / "bin" / "python", "#!/bin/sh\necho No module named torch >&2\nexit 1\n")
    said, _ = run_ci(clone, tmp_path)
    assert "does not work: building it again" in said
    assert not (venv / "kept").exists()

    with (clone / "constraints.txt").open("a") as file:
        file.write("unheard-of==1.0\n")
    assert run_ci(clone, tmp_path)[1] != calls


def test_readme_states_the_laptop_run_as_it_is():
    """A profile that changes leaves its old figures in the README."""
    from fiqa_helpers.profiles import PROFILES

    laptop = PROFILES["laptop"]
    stated = f"{laptop.max_steps} steps of {laptop.batch_size} rows, trained on the sentences of each answer"
    assert stated in (PROJECT / "README.md").read_text(encoding="utf-8")
