"""The password of a proxy is for the proxy, whatever a server behind it answers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dupr_cli.artifacts.paced_http import Pace, open_http

USER = "user:pass"
SENT = "Basic dXNlcjpwYXNz"


@contextmanager
def answering(location: str | None) -> Iterator[tuple[int, list[str | None]]]:
    """A server that redirects to `location`, or sends "image"; its port, and the proxy
    credentials of each request."""
    seen = list[str | None]()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers.get("Proxy-Authorization"))
            self.send_response(302 if location else 200)
            self.send_header("Location", location or "")
            self.send_header("Content-Length", "0" if location else "5")
            self.end_headers()
            self.wfile.write(b"" if location else b"image")

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port, seen
    finally:
        server.shutdown()
        server.server_close()


def test_a_host_beside_the_proxy_is_not_sent_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        answering(None) as (port, of_host),
        answering(f"http://127.0.0.1:{port}/a.jpg") as (proxy, of_proxy),
    ):
        monkeypatch.setenv("http_proxy", f"http://{USER}@127.0.0.1:{proxy}")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        with open_http("http://photos.invalid/a.jpg", Pace(1.0)) as answer:
            assert answer.read() == b"image"
    assert (of_proxy, of_host) == ([SENT], [None])
