"""The few parts of the hub's HTTP interface that loading a data set needs, on 127.0.0.1, from a folder.

The client (huggingface_hub, datasets) is the real one; only the far end stands here.
"""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def serve(folder: Path, name: str, revisions: tuple[str, ...] = ("main",)) -> ThreadingHTTPServer:
    """Serve `folder` as the data set repository `name`, known under `revisions` and its commit."""
    attributes = {"folder": folder, "name": name, "revisions": (*revisions, COMMIT)}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Repository", (_Repository,), attributes))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


class _Repository(BaseHTTPRequestHandler):
    folder: Path
    name: str
    revisions: tuple[str, ...]

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        api, files = f"/api/datasets/{self.name}/", f"/datasets/{self.name}/resolve/"
        if path.startswith(api + "revision/"):
            self._info(path.removeprefix(api + "revision/"))
        elif path.startswith(api + "tree/"):
            self._tree(path.removeprefix(api + "tree/").partition("/")[2])
        elif path.startswith(files):
            self._file(path.removeprefix(files).partition("/")[2])
        else:
            self._reply(404, code="RepoNotFound")

    do_HEAD = do_GET

    def _info(self, revision: str) -> None:
        if revision not in self.revisions:
            return self._reply(404, code="RevisionNotFound")
        siblings = [{"rfilename": entry["path"]} for entry in self._entries() if entry["type"] == "file"]
        return self._reply(200, json.dumps({"id": self.name, "sha": COMMIT, "siblings": siblings}).encode())

    def _tree(self, under: str) -> None:
        found = [e for e in self._entries() if not under or e["path"].startswith(f"{under}/")]
        self._reply(200, json.dumps(found).encode()) if found else self._reply(404, code="EntryNotFound")

    def _file(self, path: str) -> None:
        if not (self.folder / path).is_file():
            return self._reply(404, code="EntryNotFound")
        content = (self.folder / path).read_bytes()
        return self._reply(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"')

    def _entries(self) -> list[dict]:
        return [
            {
                "type": "file" if path.is_file() else "directory",
                "path": path.relative_to(self.folder).as_posix(),
                "size": path.stat().st_size,
                "oid": "0" * 40,
            }
            for path in sorted(self.folder.rglob("*"))
        ]

    def _reply(self, status: int, body: bytes = b"", code: str = "", **headers: str) -> None:
        self.send_response(status)
        known = {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, "X-Error-Code": code}
        for key, value in (known | headers).items():
            if value:
                self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments) -> None:
        """Keep the test's output free of request lines."""
