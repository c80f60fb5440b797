"""A server with those addresses of the Hugging Face hub from which huggingface_hub downloads a model."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Hub(BaseHTTPRequestHandler):
    """The folders ``models``, by OWNER/NAME, at one commit each."""

    def __init__(self, models: dict[str, Path], *arguments: Any) -> None:
        self.models = models
        super().__init__(*arguments)

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0]).strip("/").removeprefix("api/models/")
        owner, name, *rest = path.split("/")
        folder = self.models.get(f"{owner}/{name}")
        if folder is None:
            self._answer(b"{}", 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif rest[0] == "revision" and rest[1] not in ("main", COMMIT):
            self._answer(
                b"{}", 404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": f"Invalid rev id: {rest[1]}"}
            )
        elif rest[0] == "revision":
            self._answer(json.dumps({"id": f"{owner}/{name}", "sha": COMMIT, "siblings": []}).encode())
        elif rest[0] == "tree":
            files = (file for file in folder.rglob("*") if file.is_file())
            self._answer(json.dumps([self._entry(file, folder) for file in files]).encode())
        else:  # resolve/COMMIT/FILE
            file = folder.joinpath(*rest[2:])
            self._answer(file.read_bytes(), 200, {"ETag": f'"{_digest(file)}"', "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def _entry(self, file: Path, folder: Path) -> dict[str, Any]:
        path = file.relative_to(folder).as_posix()
        return {"type": "file", "path": path, "size": file.stat().st_size, "oid": _digest(file)}

    def _answer(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(content)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        """Nothing."""


def _digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@contextmanager
def running_hub(models: dict[str, Path]) -> Iterator[str]:
    """The address of a hub with these models, for HF_ENDPOINT."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Hub, models))
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
