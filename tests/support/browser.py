"""A real Chromium without a window, driven by WebDriver over the loopback.

WebDriver is used rather than the command line because a window cannot be narrower than about 500
pixels, and because the page has to be measured.
Source: W3C WebDriver, and Chromium's own commands (`goog/cdp/execute`).
"""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

_OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
_SECONDS = 120.0  # for a browser to start on a busy machine


@dataclass(frozen=True)
class Browser:
    """An open browser. address: of its WebDriver session."""

    address: str

    def open(self, page: Path, width: int, dark: bool) -> None:
        """Load a file in a viewport of this width, for readers who prefer dark or light."""
        scheme = "dark" if dark else "light"
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._devtools("Emulation.setEmulatedMedia", features=features)
        self._devtools(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=900, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        self._post("url", url=page.resolve().as_uri())

    def leave(self) -> None:
        """Show nothing, and forget what was logged: the first page is the browser's own."""
        self._post("url", url="about:blank")
        self.console()
        self.requests()

    def run(self, script: str) -> Any:
        """The value that a script returns."""
        return self._post("execute/sync", script=script, args=[])

    def console(self) -> list[str]:
        """What the console has shown since the last call, at any level."""
        return [entry["message"] for entry in self._post("se/log", type="browser")]

    def requests(self) -> list[str]:
        """The addresses that pages have asked for since the last call; data: is in the page."""
        found = []
        for entry in self._post("se/log", type="performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                found.append(str(message["params"]["request"]["url"]))
        return [address for address in found if not address.startswith("data:")]

    def screenshot(self, file: Path) -> None:
        """The whole page as a PNG."""
        shown = self._devtools("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shown["data"]))

    def _devtools(self, command: str, **parameters: object) -> Any:
        return self._post("goog/cdp/execute", cmd=command, params=parameters)

    def _post(self, command: str, **values: object) -> Any:
        return _ask(f"{self.address}/{command}", values)


def _ask(address: str, values: dict[str, Any], method: str = "POST") -> Any:
    data = None if method == "DELETE" else json.dumps(values).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    request.method = method
    with urllib.request.urlopen(request, timeout=_SECONDS) as reply:
        return json.load(reply)["value"]


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """A browser with a new profile in this folder; skips the test where none is installed."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("chromium and chromedriver are not installed (Debian: chromium-driver)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _wait_for(port)
        options = {"binary": browser, "args": [*_OPTIONS, f"--user-data-dir={profile}"]}
        wanted = {
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        root = f"http://127.0.0.1:{port}/session"
        session = _ask(root, {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        opened = Browser(f"{root}/{session}")
        try:
            opened.leave()
            yield opened
        finally:
            _ask(f"{root}/{session}", {}, "DELETE")
    finally:
        process.terminate()
        process.wait()


def _wait_for(port: int) -> None:
    end = time.monotonic() + _SECONDS
    while time.monotonic() < end:
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise TimeoutError("chromedriver did not start")
