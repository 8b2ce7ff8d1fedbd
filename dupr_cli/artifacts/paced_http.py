"""HTTP requests that end: a server must send at a least rate, and be done before a deadline.

The timeout of a socket only limits the wait for the next byte, so a server that sends one byte a
second holds a request for ever, in the headers as well as in the body. Here every receipt of bytes
is counted, by a layer between the socket and `http.client`.
"""

from __future__ import annotations

import http.client
import io
import socket
import time
import urllib.request
from functools import partial
from typing import Any, BinaryIO, cast

# The rate is measured over as long as a server may stay silent.
WINDOW_SECONDS = 60.0


class TooSlowError(Exception):
    """A server sent too little, or too late."""


class Pace:
    """How fast a file arrives. min_rate: bytes per second. max_seconds: for all of its attempts."""

    def __init__(self, min_rate: float, max_seconds: float = float("inf")) -> None:
        self.min_rate, self.max_seconds = min_rate, max_seconds
        self._ends = time.monotonic() + max_seconds
        self.begin_attempt()

    def begin_attempt(self) -> None:
        self._since, self._arrived = time.monotonic(), 0

    @property
    def is_over(self) -> bool:
        """Whether the file has taken longer than it may; then no other attempt is worthwhile."""
        return time.monotonic() >= self._ends

    @property
    def patience(self) -> float:
        """Seconds to wait for the next bytes, not beyond the deadline; never 0."""
        return min(WINDOW_SECONDS, max(0.01, self._ends - time.monotonic()))

    def count(self, arrived: int) -> None:
        """Note that so many bytes arrived. Raises TooSlowError."""
        self._arrived += arrived
        if self.is_over:
            raise TooSlowError(f"it did not arrive within {self.max_seconds:g} s")
        if time.monotonic() - self._since < WINDOW_SECONDS:
            return
        if self._arrived < self.min_rate * WINDOW_SECONDS:
            raise TooSlowError(
                f"{self._arrived} bytes arrived in {WINDOW_SECONDS:g} s, fewer than "
                f"{self.min_rate:g} per second"
            )
        self.begin_attempt()


def open_http(address: str, pace: Pace) -> BinaryIO:
    """The answer to a request, like that of `urllib.request.urlopen`.

    Opening and reading it raise TooSlowError when the server does not keep pace.
    """
    # urllib's own openers would also follow a redirection to ftp, which has no pace.
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        _PacedHttp(pace),
        _PacedHttps(pace),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        _Redirection(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return cast(BinaryIO, opener.open(address, timeout=pace.patience))


class _Redirection(urllib.request.HTTPRedirectHandler):
    """Follows redirections without their bodies, which urllib would first read whole."""

    def http_error_302(self, req: Any, fp: Any, code: int, msg: str, headers: Any) -> Any:
        fp.close()
        return super().http_error_302(req, cast(Any, io.BytesIO()), code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


class _PacedHttp(urllib.request.HTTPHandler):
    def __init__(self, pace: Pace) -> None:
        super().__init__()
        self._connect = partial(_connection, http.client.HTTPConnection, pace)

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(cast(Any, self._connect), request)


class _PacedHttps(urllib.request.HTTPSHandler):
    def __init__(self, pace: Pace) -> None:
        super().__init__()
        self._connect = partial(_connection, http.client.HTTPSConnection, pace)

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(cast(Any, self._connect), request)


def _connection(
    kind: type[http.client.HTTPConnection], pace: Pace, host: str, **options: Any
) -> http.client.HTTPConnection:
    connection = kind(host, **options)
    connection.response_class = cast(Any, partial(_PacedResponse, pace))
    return connection


class _PacedResponse(http.client.HTTPResponse):
    def __init__(self, pace: Pace, sock: socket.socket, *arguments: Any, **options: Any) -> None:
        super().__init__(sock, *arguments, **options)
        received = self.fp.detach()
        self.fp = io.BufferedReader(_PacedSocket(received, sock, pace))


class _PacedSocket(io.RawIOBase):
    """What a socket receives. received: the same as a stream, which keeps the socket open."""

    def __init__(self, received: io.RawIOBase, sock: socket.socket, pace: Pace) -> None:
        self._received, self._socket, self._pace = received, sock, pace

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._socket.settimeout(self._pace.patience)
        try:
            size = self._received.readinto(buffer)
        except TimeoutError:
            self._pace.count(0)
            raise
        self._pace.count(size or 0)
        return size

    def close(self) -> None:
        self._received.close()
        super().close()
