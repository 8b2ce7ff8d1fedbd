"""A real http server over a folder, with faults that can be switched on."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass
class Served:
    """What a server is told to do, and what it saw.

    fail_every: of every so many requests one fails, in turn by 503, by a dropped connection, and by
    half a body. 0: none. on_send: gets the number of bytes of each answer to a Range.
    """

    url: str = ""
    fail_every: int = 0
    requests: list[str] = field(default_factory=list)
    failures: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    delay: float = 0.0  # seconds before each tar
    on_send: Callable[[int], None] = lambda _: None


class _Handler(SimpleHTTPRequestHandler):
    def __init__(self, served: Served, *arguments: Any, directory: str) -> None:
        self.served = served
        super().__init__(*arguments, directory=directory)

    def do_GET(self) -> None:
        served = self.served
        if self.path.endswith(".tar"):
            time.sleep(served.delay)
        with served.lock:
            served.requests.append(self.path)
            fails = served.fail_every and len(served.requests) % served.fail_every == 0
            served.failures += bool(fails)
            kind = served.failures % 3
        if not fails and "Range" in self.headers:
            self._send_rest()
        elif not fails:
            super().do_GET()
        elif kind == 0:
            self.send_error(503)
        elif kind == 1:
            self.connection.close()
        else:
            data = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])

    def _send_rest(self) -> None:
        """Answer `Range: bytes=N-`, which the standard handler does not know."""
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.served.on_send(len(data) - start)
        self.wfile.write(data[start:])

    def log_message(self, *_: object) -> None:
        pass


@dataclass
class Guarded:
    """A server that wants secrets, and what it was sent: (path, Authorization) of each request.

    BASE/basic/FILE wants the user and password, BASE/signed/FILE?signature. BASE/same/FILE
    redirects to BASE/basic/FILE, BASE/away/FILE to FILE of another server, at `away`.
    BASE/refused/FILE redirects to a file of this machine, BASE/failing/FILE answers 500.
    """

    port: int
    requests: list[tuple[str, str | None]]
    away: list[tuple[str, str | None]]

    def url(self, path: str, user: str = "") -> str:
        return f"http://{user and user + '@'}127.0.0.1:{self.port}/{path}"


@contextmanager
def guard(folder: Path, user: str, signature: str) -> Iterator[Guarded]:
    """Serve a folder behind `user` (user:password) or a query, on this machine."""
    expected = "Basic " + base64.b64encode(user.encode()).decode()

    def handler(
        seen: list[tuple[str, str | None]], away: str | None
    ) -> type[SimpleHTTPRequestHandler]:
        class Handler(SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                given = self.headers.get("Authorization")
                seen.append((self.path, given))
                _, _, rest = self.path.partition("/")
                way, _, name = rest.partition("/")
                if away is None:
                    self.send_file(rest)
                elif way == "basic" and given != expected:
                    self.send_error(401)
                elif way == "signed" and not self.path.endswith(f"?{signature}"):
                    self.send_error(403, f"Bad signature for {self.path}")
                elif way in ("basic", "signed"):
                    self.send_file(name.partition("?")[0])
                elif way == "failing":
                    self.send_error(500, f"No luck with http://{user}@{self.path}")
                else:
                    targets = {"same": f"/basic/{name}", "away": f"{away}/{name}"}
                    self.send_response(302)
                    self.send_header("Location", targets.get(way, f"file:///{name}?{signature}"))
                    self.end_headers()

            def send_file(self, name: str) -> None:
                if not (folder / name).is_file():
                    self.send_error(404)
                    return
                data = (folder / name).read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        return Handler

    guarded = Guarded(0, [], [])
    other = ThreadingHTTPServer(("127.0.0.1", 0), handler(guarded.away, None))
    base = f"http://127.0.0.1:{other.server_port}"
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(guarded.requests, base))
    guarded.port = server.server_port
    for each in (server, other):
        threading.Thread(target=each.serve_forever, daemon=True).start()
    try:
        yield guarded
    finally:
        for each in (server, other):
            each.shutdown()
            each.server_close()


@contextmanager
def serve(folder: Path, fail_every: int = 0, delay: float = 0.0) -> Iterator[Served]:
    """Serve a folder at `url` on this machine."""
    served = Served(fail_every=fail_every, delay=delay)
    handler = partial(_Handler, served, directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    served.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
