"""HTTP requests that end: a server must send at a least rate, and be done before a deadline.

The timeout of a socket only limits the wait for the next byte, so a server that sends one byte a
second holds a request for ever, in the headers as well as in the body. Here every receipt of bytes
is counted, by a layer between the socket and `http.client`.

User and password are those of the address (https://user:password@host/...) or those that ~/.netrc,
or the file that $NETRC names, has for the host. They are not sent to another host to which the
server redirects.
"""

from __future__ import annotations

import base64
import http.client
import io
import netrc
import os
import socket
import time
import urllib.request
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import unquote, urlsplit

from dupr_cli.addresses import split_user

# The rate is measured over as long as a server may stay silent.
WINDOW_SECONDS = 60.0
_AUTHORIZATION = "Authorization"


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
        Redirection(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return cast(BinaryIO, opener.open(request_of(address), timeout=pace.patience))


def request_of(address: str, headers: Mapping[str, str] | None = None) -> urllib.request.Request:
    """A request with the user and password for its host, if there are any."""
    plain, user = split_user(address)
    request = urllib.request.Request(plain, headers=dict(headers or {}))
    name, _, password = user.partition(":")
    credentials = f"{unquote(name)}:{unquote(password)}" if user else _from_netrc(plain)
    if credentials:
        encoded = base64.b64encode(credentials.encode()).decode()
        # Such a header is not copied when a redirection is followed.
        request.add_unredirected_header(_AUTHORIZATION, f"Basic {encoded}")
    return request


def _from_netrc(address: str) -> str:
    """`user:password` of a host; empty if there is no entry of its own, or no readable file."""
    path = os.environ.get("NETRC") or Path.home() / ".netrc"
    try:
        found = netrc.netrc(path).hosts.get(urlsplit(address).hostname or "")
    except (OSError, ValueError, netrc.NetrcParseError):  # as curl does
        return ""
    return f"{found[0]}:{found[2]}" if found else ""


def _origin(address: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(address)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


class Redirection(urllib.request.HTTPRedirectHandler):
    """Follows redirections without their bodies, which urllib would first read whole."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        plain, user = split_user(newurl)
        following = super().redirect_request(req, fp, code, msg, headers, plain)
        if following is not None:
            # ProxyHandler gives it to the proxy of the new address, if that has one.
            following.remove_header("Proxy-authorization")
        own = req.unredirected_hdrs.get(_AUTHORIZATION)
        if following is not None and own and not user and _origin(req.full_url) == _origin(plain):
            following.add_unredirected_header(_AUTHORIZATION, own)
        return following

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
