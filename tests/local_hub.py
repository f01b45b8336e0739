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


def serve(folder: Path, name: str, revision: str) -> ThreadingHTTPServer:
    """Serve `folder` as the data set repository `name`, known by `revision` and its commit."""
    attributes = {"folder": folder, "name": name, "revisions": (revision, COMMIT)}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Repository", (_Repository,), attributes))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


class _Repository(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        api, files = f"/api/datasets/{self.name}/", f"/datasets/{self.name}/resolve/{COMMIT}/"
        if path.removeprefix(f"{api}revision/") in self.revisions:
            self._reply(200, json.dumps({"id": self.name, "sha": COMMIT}).encode())
        elif path.startswith(f"{api}tree/"):
            self._reply(200, json.dumps(self._entries()).encode())
        elif path.startswith(files) and (self.folder / path.removeprefix(files)).is_file():
            content = (self.folder / path.removeprefix(files)).read_bytes()
            self._reply(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"')
        else:
            self._reply(404, code="RevisionNotFound" if path.startswith(api) else "RepoNotFound")

    do_HEAD = do_GET

    def _entries(self) -> list[dict]:
        return [
            {
                "type": "file",
                "path": path.as_posix(),
                "size": (self.folder / path).stat().st_size,
                "oid": "0" * 40,
            }
            for path in (found.relative_to(self.folder) for found in sorted(self.folder.rglob("*.parquet")))
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
