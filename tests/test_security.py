"""What the workshop runs, loads, contacts and writes down: nothing from strangers, nothing to strangers."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from fiqa_helpers.machinery.assets import ASSETS

pytestmark = pytest.mark.timeout(3000)
SECRETS = {
    "HF_TOKEN": "hf_q7Zk29vWmXo4tBnLsRy8",
    "WANDB_API_KEY": "5f0e9c1d7b3a2846e0d9c8b7a6f5e4d3c2b1a098",
    "OPENAI_API_KEY": "sk-u1Fh83kVrNz5yLpQxWc0",
    "NVIDIA_API_KEY": "nvapi-m4Ds62gHtKb9jRfYvZe7",
}


def python_sources(project: Path) -> dict[str, str]:
    """Name -> code of every module and every code cell of the project."""
    found = {
        str(path.relative_to(project)): path.read_text() for path in project.glob("fiqa_helpers/**/*.py")
    }
    for path in project.glob("notebooks/**/*.ipynb"):
        cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        found |= {f"{path.name}[{n}]": "".join(cell["source"]) for n, cell in enumerate(cells)}
    assert len(found) > 60
    return found


def calls(code: str) -> list[tuple[str, dict[str, str]]]:
    """(dotted name, source of each keyword) of each call."""
    nodes = ast.walk(ast.parse(re.sub(r"^[%!].*$", "", code, flags=re.MULTILINE)))
    return [
        (ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords})
        for node in nodes
        if isinstance(node, ast.Call)
    ]


def test_each_promise_names_tests_that_exist(project):
    """A promise whose test was renamed or dropped is only a promise."""
    page = (project / "docs" / "what_happens_when.md").read_text(encoding="utf-8")
    tests = {path.name: path.read_text(encoding="utf-8") for path in (project / "tests").rglob("*.py")}
    promises = [line for line in page.splitlines() if line.startswith("| ") and "test_" in line]
    assert len(promises) > 20
    for line in promises:
        file = None
        for named, test in re.findall(
            r"`(?:tests/browser/)?(test_\w+\.py)?(?:::(test_\w+))?`", line.rpartition(" | ")[2]
        ):
            file = named or file
            assert file in tests and f"def {test}" in tests[file], f"{file}::{test}"


def test_nothing_from_strangers_is_run(project):
    """A pickle, or Python that somebody uploaded beside a model, does what its author likes."""
    unsafe = {"pickle.load", "pickle.loads", "joblib.load", "dill.load", "cloudpickle.load", "pd.read_pickle"}
    unsafe |= {"yaml.load", "eval", "exec", "os.system"}
    for name, code in python_sources(project).items():
        for function, keywords in calls(code):
            assert function not in unsafe, f"{name}: {function}"
            assert function != "torch.load" or keywords.get("weights_only") == "True", name
            for keyword in ("trust_remote_code", "allow_pickle", "shell"):
                assert keywords.get(keyword, "False") == "False", f"{name}: {keyword}"


def test_everything_that_listens_does_so_on_this_machine(project):
    """A server on 0.0.0.0 in a classroom is everybody's; a Jupyter server without a token is a shell."""
    paths = [*project.glob("fiqa_helpers/**/*.py"), *project.glob("notebooks/**/*.ipynb")]
    for path in [*paths, project / "Makefile", *project.glob("scripts/*.*"), project / ".ci" / "run"]:
        text = path.read_text(encoding="utf-8")
        for wrong in ("0.0.0.0", "--ip=*", "--ip *", "token=''", 'token=""', "--allow-remote"):
            assert wrong not in text, f"{path.name}: {wrong}"


LOOPBACK = """
import fcntl, os, socket, struct, sys
socket.sethostname("localhost")  # torchrun asks for this machine's own name: let /etc/hosts answer
with socket.socket() as s:  # bring up lo, the only interface here: Jupyter's kernels talk over 127.0.0.1
    fcntl.ioctl(s, 0x8914, struct.pack("16sh", b"lo", 0x1 | 0x40))
os.execvp(sys.argv[1], sys.argv[1:])
"""


def without_network(folder: Path, environment: dict, *words: object) -> subprocess.CompletedProcess:
    """Run `words` in `folder` where there is no interface but the loopback one."""
    if subprocess.run(["unshare", "--net", "--uts", "true"], capture_output=True).returncode:
        pytest.skip("unshare --net --uts is not available here")
    command = ["unshare", "--net", "--uts", sys.executable, "-c", LOOPBACK, *map(str, words)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done


def stranger(line: str) -> bool:
    """Whether a line of strace is an attempt to reach anything but a socket of this machine, DNS included."""
    if "sa_family=AF_INET" not in line:
        return False
    local = re.search(r'inet_addr\("127\.|inet_pton\(AF_INET6, "(::1|::ffff:127\.)', line)
    return not local or "htons(53)" in line


@pytest.mark.slow
@pytest.mark.notebooks
@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
def test_whole_tutorial_contacts_nobody_and_writes_down_no_secret(project, tmp_path):
    """No component may phone home, not even where no network is there; tokens stay in the environment."""
    work, trace = tmp_path / "work", tmp_path / "strace.log"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_HUB")}
    values = "{model: packaged, max_steps: 2, train_rows: 3, batch_size: 4, eval_rows: 2, eval_steps: 1, "
    values += "max_new_tokens: 8}"  # fewer rows than a step takes, as of a small file of one's own
    words = ["strace", "-f", "--seccomp-bpf", "-qq", "-e", "trace=connect,sendto", "-o", trace]
    words += [sys.executable, "-m", "fiqa_helpers", "run", "--profile", "tiny", "--overrides", values]
    words += ["--workdir", work, "--only", "00-06"]  # in 07 torchrun resolves a name once, natively
    done = without_network(project, environment | SECRETS, *words)
    connections = [line for line in trace.read_text(errors="replace").splitlines() if "connect(" in line]
    assert len(connections) > 20, "strace recorded nothing: the kernels' own connections should be there"
    assert [line for line in connections if stranger(line)] == []
    written = [path for path in work.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    assert len(written) > 30
    texts = {str(path): path.read_text(encoding="utf-8", errors="replace") for path in written}
    for name, text in (texts | {"stdout": done.stdout, "stderr": done.stderr}).items():
        for variable, value in SECRETS.items():
            assert value not in text, f"{variable} is in {name}"


@pytest.mark.slow
@pytest.mark.notebooks
def test_the_stick_is_enough_without_a_network(project, tmp_path):
    """Unpacked, with an empty cache and no network at all: 00 to 02, then 05 and 06 from files."""
    command = [project / "scripts" / "bundle.sh", tmp_path / "stick.tar"]
    subprocess.run(command, env=os.environ | {"FIQA_VENV": sys.prefix}, check=True)
    with tarfile.open(tmp_path / "stick.tar") as archive:
        assert {(entry.uid, entry.uname) for entry in archive} == {(0, "root")}, "a person's name"
        names = {name.removeprefix("fiqa-workshop/") for name in archive.getnames()}
        archive.extractall(tmp_path, filter="data")
    assert {f"wheels/{asset.wheel}" for asset in ASSETS.values()} | {"constraints.txt", "Makefile"} <= names
    assert not [name for name in names if re.match(r"\.git/|data/|outputs/|checkpoints/|\.venv", name)]
    folder = tmp_path / "fiqa-workshop"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FIQA", "HF_", "PIP_"))}
    environment = kept | {"FIQA_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(folder)}
    workshop = (folder, environment, sys.executable, "-m", "fiqa_helpers")
    laptop = ("--profile", "laptop")
    assert "to be taken out of" in without_network(*workshop, "check", "--offline", *laptop).stdout
    without_network(*workshop, "run", "--only", "00-02", *laptop)
    short = ("--overrides", "{max_new_tokens: 16}", "-p", "rows=6")
    done = without_network(*workshop, "run", "--only", "05,06", *laptop, *short)
    assert re.search(r"05_generate +\d.*\n06_evaluate +\d", done.stdout)
    executed = (folder / "outputs" / "executed" / "05_generate.ipynb").read_text("utf-8")
    assert "Notebook 04 was not run in this workdir" in executed and "Precomputed run: " in executed
