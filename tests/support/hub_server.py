"""A local server with the endpoints of the Hub from which its client fetches files."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def handler(
    files: dict[str, bytes], refuse: int | None, repository: str
) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        # Without keep-alive: a closed server must not go on answering.
        protocol_version = "HTTP/1.0"

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, with_body: bool) -> None:
            body, headers, status = self._found()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def _found(self) -> tuple[bytes, dict[str, str], int]:
            if refuse:
                return b"{}", {}, refuse
            if self.path.startswith(f"/api/models/{repository}/tree/"):
                tree = [
                    {"type": "file", "path": name, "size": len(data), "oid": COMMIT}
                    for name, data in files.items()
                ]
                return json.dumps(tree).encode(), {"Content-Type": "application/json"}, 200
            name = self.path.rpartition("/")[2]
            if self.path.startswith(f"/{repository}/resolve/") and name in files:
                digest = hashlib.sha256(files[name]).hexdigest()
                return files[name], {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT}, 200
            missing = "EntryNotFound" if self.path.startswith(f"/{repository}/") else "RepoNotFound"
            return b"{}", {"X-Error-Code": missing}, 404

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


@contextmanager
def hub(
    files: dict[str, bytes],
    folder: Path,
    patch: pytest.MonkeyPatch,
    refuse: int | None = None,
    repository: str = "me/model",
) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(files, refuse, repository))
    url = f"http://127.0.0.1:{server.server_port}"
    patch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    patch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder / "cache"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
