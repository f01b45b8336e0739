"""What the workshop runs, loads, contacts and writes down: nothing from strangers, nothing to strangers."""

import ast
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

SECRETS = {
    "HF_TOKEN": "hf_q7Zk29vWmXo4tBnLsRy8",
    "HUGGING_FACE_HUB_TOKEN": "hf_b3Jx71cUqPd6wEaTgMi5",
    "WANDB_API_KEY": "5f0e9c1d7b3a2846e0d9c8b7a6f5e4d3c2b1a098",
    "OPENAI_API_KEY": "sk-u1Fh83kVrNz5yLpQxWc0",
    "NVIDIA_API_KEY": "nvapi-m4Ds62gHtKb9jRfYvZe7",
    "AWS_SECRET_ACCESS_KEY": "o8La05nCiXs1eTuGwPq3",
}


def python_sources(project: Path) -> dict[str, str]:
    """Name -> code of every module and every code cell of the project."""
    paths = project.glob("fiqa_helpers/**/*.py")
    found = {str(path.relative_to(project)): path.read_text() for path in paths}
    for path in project.glob("notebooks/**/*.ipynb"):
        cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        for number, cell in enumerate(cells):
            found[f"{path.name}[{number}]"] = "".join(cell["source"])
    assert len(found) > 60
    return found


def calls(code: str) -> list[tuple[str, dict[str, object]]]:
    """(dotted name, keywords) of each call; a keyword that is no literal is given as its source."""
    found = []
    for node in ast.walk(ast.parse(re.sub(r"^[%!].*$", "", code, flags=re.MULTILINE))):
        if isinstance(node, ast.Call):
            keywords = {}
            for keyword in node.keywords:
                try:
                    keywords[keyword.arg] = ast.literal_eval(keyword.value)
                except ValueError:
                    keywords[keyword.arg] = ast.unparse(keyword.value)
            found.append((ast.unparse(node.func), keywords))
    return found


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


def test_no_code_from_a_model_repository(project):
    """trust_remote_code runs Python that somebody uploaded beside a model."""
    for name, code in python_sources(project).items():
        for function, keywords in calls(code):
            assert keywords.get("trust_remote_code", False) is False, f"{name}: {function}"


def test_nothing_is_unpickled(project):
    """A pickle runs what its author likes: torch.load only with weights_only, the others not at all."""
    unsafe = {"pickle.load", "pickle.loads", "joblib.load", "dill.load", "cloudpickle.load", "numpy.load"}
    for name, code in python_sources(project).items():
        for function, keywords in calls(code):
            assert function not in unsafe, f"{name}: {function}"
            assert function != "torch.load" or keywords.get("weights_only") is True, name
            if function.endswith(("np.load", "read_pickle")):
                assert keywords.get("allow_pickle", function.endswith("read_pickle")) is False, name
            assert function not in ("yaml.load", "eval", "exec", "os.system"), f"{name}: {function}"
            assert keywords.get("shell", False) is False, f"{name}: {function}"


def test_everything_that_listens_does_so_on_this_machine(project):
    """A server on 0.0.0.0 in a classroom is everybody's; a Jupyter server without a token is a shell."""
    paths = [*project.glob("fiqa_helpers/**/*.py"), *project.glob("notebooks/**/*.ipynb")]
    paths += [project / "Makefile", *project.glob("scripts/*"), *project.glob(".ci/*")]
    for path in paths:
        if path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            for wrong in ("0.0.0.0", "--ip=*", "--ip *", "token=''", 'token=""', "--allow-remote"):
                assert wrong not in text, f"{path.name}: {wrong}"


@pytest.mark.slow
def test_the_lab_listens_on_this_machine_and_wants_its_token(project, tmp_path):
    """A real server, started as `make lab` starts it: another address or an open API is everybody's shell."""
    import psutil

    (recipe,) = re.findall(r"^lab:.*\n((?:\t.*\n)+)", (project / "Makefile").read_text(), re.MULTILINE)
    options = [word for word in recipe.split() if word.startswith("--") and "(" not in word]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--port=0", "--allow-root", *options]
    folders = {name: str(tmp_path / name) for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "HOME")}
    environment = os.environ | folders
    with subprocess.Popen(command, cwd=project, env=environment, stderr=subprocess.PIPE, text=True) as server:
        try:
            said = ""
            while not (found := re.search(r"(http://127\.0\.0\.1:(\d+))/\S*\?token=(\w{20,})", said)):
                line = server.stderr.readline()
                assert line, said
                said += line
            address, port, token = found.groups()
            patience = time.monotonic() + 60  # Jupyter prints its address before it binds the port
            while socket.socket().connect_ex(("127.0.0.1", int(port))):
                assert time.monotonic() < patience, f"nothing listens at {address}"
                time.sleep(0.1)
            with urllib.request.urlopen(f"{address}/api/contents?token={token}") as reply:
                assert reply.status == 200
            with pytest.raises(urllib.error.HTTPError, match="403"):
                urllib.request.urlopen(f"{address}/api/contents")
            own = psutil.Process(server.pid)
            processes = (own, *own.children(recursive=True))
            places = [place for process in processes for place in process.net_connections()]
            listening = {place.laddr.ip for place in places if place.status == "LISTEN"}
            assert listening and listening <= {"127.0.0.1", "::1"}
        finally:
            server.terminate()


HOOK = """
import os, sys, traceback
def hook(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        name = str(arguments[0])
        if name not in ("127.0.0.1", "localhost", "::1", "None", ""):
            file = os.open(os.environ["CONNECTIONS"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            stack = "".join(traceback.format_stack()[-25:-1])
            os.write(file, f"{os.getpid()} looks up {name}\\n{stack}\\n".encode())
            os.close(file)
sys.addaudithook(hook)
"""
LOOPBACK = """
import fcntl, os, socket, struct, sys
socket.sethostname("localhost")  # torchrun asks for this machine's own name: let /etc/hosts answer
with socket.socket() as s:  # bring up lo, the only interface here: Jupyter's kernels talk over 127.0.0.1
    fcntl.ioctl(s, 0x8914, struct.pack("16sh", b"lo", 0x1 | 0x40))
os.execvp(sys.argv[1], sys.argv[1:])
"""


def stranger(line: str) -> bool:
    """Whether a line of strace is an attempt to reach anything but a socket of this machine, DNS included."""
    if "sa_family=AF_INET" not in line:
        return False
    local = re.search(r'inet_addr\("127\.|inet_pton\(AF_INET6, "(::1|::ffff:127\.)', line)
    return not local or "htons(53)" in line


@pytest.mark.slow
@pytest.mark.notebooks
def test_whole_tutorial_contacts_nobody_and_writes_down_no_secret(project, tmp_path):
    """No component may phone home, not even where no network is there; tokens stay in the environment."""
    if not shutil.which("strace") or subprocess.run(["unshare", "--net", "--uts", "true"]).returncode:
        pytest.skip("strace or unshare --net --uts is not available here")
    work, trace, names = tmp_path / "work", tmp_path / "strace.log", tmp_path / "names.log"
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(HOOK)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_HUB")}
    environment |= SECRETS | {"PYTHONPATH": str(tmp_path / "hook"), "CONNECTIONS": str(names)}

    values = "{model: packaged, max_steps: 2, batch_size: 2, eval_rows: 2, eval_steps: 1, max_new_tokens: 8}"
    command = ["unshare", "--net", "--uts", sys.executable, "-c", LOOPBACK]
    command += ["strace", "-f", "--seccomp-bpf", "-qq", "-e", "trace=connect,sendto", "-o", str(trace)]
    command += [sys.executable, "-m", "fiqa_helpers", "run", "--profile", "tiny", "--overrides", values]
    command += ["--workdir", str(work), "--only", "00-06"]  # in 07 torchrun resolves a name once, natively
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    connections = [line for line in trace.read_text(errors="replace").splitlines() if "connect(" in line]
    assert len(connections) > 20, "strace recorded nothing: the kernels' own connections should be there"
    asked = names.read_text() if names.exists() else ""
    assert not asked, asked  # with the stack of who asked for a name
    assert [line for line in connections if stranger(line)] == []
    written = [path for path in work.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    assert len(written) > 30
    texts = {str(path): path.read_text(encoding="utf-8", errors="replace") for path in written}
    for name, text in (texts | {"stdout": done.stdout, "stderr": done.stderr}).items():
        for variable, value in SECRETS.items():
            assert value not in text, f"{variable} is in {name}"
