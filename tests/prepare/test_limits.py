"""Images that never end, that never arrive, or that are not files: each is left out, and named."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import repeat
from pathlib import Path

import pytest

from dupr_cli.artifacts import paced_http
from dupr_cli.artifacts.remote import fetch_bytes
from dupr_cli.artifacts.shards import open_shards
from dupr_cli.errors import RunError
from tests.support.images import encode, noise_image

FEW_SECONDS = 60  # a command that waits for a file or a server would never end


def prepare(source: Path, out: Path, *options: str) -> str:
    """Run the command to its end in one process; what it wrote on standard error."""
    done = started(source, out, "--workers", "1", *options)
    assert done.returncode == 0, done.stderr
    return done.stderr


def started(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dupr_cli", "prepare", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=FEW_SECONDS)


def reasons(out: Path) -> dict[str, str]:
    lines = (out / "skipped.jsonl").read_text().splitlines()
    return {entry["path"]: entry["reason"] for entry in map(json.loads, lines)}


# --- Files that are not regular ---------------------------------------------------------------


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def unix_socket(path: Path) -> None:
    above = Path.cwd()
    os.chdir(path.parent)  # the address of a socket has at most 108 characters
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(above)


def folder(tmp_path: Path) -> tuple[Path, Path]:
    """A source with one good image, and the place of another image."""
    (tmp_path / "source").mkdir(parents=True)
    noise_image(1).save(tmp_path / "source/good.jpg")
    return tmp_path / "source", tmp_path / "source/odd.jpg"


def classes(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "source/train/cat").mkdir(parents=True)
    noise_image(1).save(tmp_path / "source/train/cat/good.jpg")
    return tmp_path / "source", tmp_path / "source/train/cat/odd.jpg"


def listed(tmp_path: Path) -> tuple[Path, Path]:
    source, odd = folder(tmp_path)
    (source / "list.txt").write_text(f"good.jpg\nodd.jpg\nfile://{odd}\n")
    return source / "list.txt", odd


def voc(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("JPEGImages", "Annotations"):
        (tmp_path / "source" / name).mkdir(parents=True)
    for name in ("good", "odd"):
        (tmp_path / f"source/Annotations/{name}.xml").write_text("<annotation/>")
    noise_image(1).save(tmp_path / "source/JPEGImages/good.jpg")
    return tmp_path / "source", tmp_path / "source/JPEGImages/odd.jpg"


def coco(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "source/annotations").mkdir(parents=True)
    (tmp_path / "source/images").mkdir()
    images = [{"id": n, "file_name": f"{name}.jpg"} for n, name in enumerate(["good", "odd"])]
    values = {"images": images, "annotations": [], "categories": []}
    (tmp_path / "source/annotations/instances_train.json").write_text(json.dumps(values))
    noise_image(1).save(tmp_path / "source/images/good.jpg")
    return tmp_path / "source", tmp_path / "source/images/odd.jpg"


def yolo(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("images", "labels"):
        (tmp_path / "source" / name).mkdir(parents=True)
    (tmp_path / "source/data.yaml").write_text("names: [cat]\ntrain: images\n")
    (tmp_path / "source/labels/good.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    noise_image(1).save(tmp_path / "source/images/good.jpg")
    return tmp_path / "source", tmp_path / "source/images/odd.jpg"


@pytest.mark.parametrize("layout", [folder, classes, listed, voc, coco, yolo])
@pytest.mark.parametrize(
    ("make", "kind"), [(pipe, "a named pipe"), (unix_socket, "a socket"), (device, "a device")]
)
def test_what_is_not_a_file_is_skipped_in_every_layout(
    tmp_path: Path,
    layout: Callable[[Path], tuple[Path, Path]],
    make: Callable[[Path], None],
    kind: str,
) -> None:
    source, odd = layout(tmp_path)
    make(odd)
    prepare(source, tmp_path / "out")
    found = reasons(tmp_path / "out")
    assert found
    assert set(found.values()) == {f"not a regular file: {kind}"}


def test_a_link_to_a_file_is_an_image(tmp_path: Path) -> None:
    source, odd = folder(tmp_path)
    (tmp_path / "elsewhere").write_bytes(encode(noise_image(2)))
    odd.symlink_to(tmp_path / "elsewhere")
    prepare(source, tmp_path / "out")
    assert reasons(tmp_path / "out") == {}


@pytest.mark.parametrize("name", ["x.json", "x.xml", "good.xml", "x.yaml", "good.txt"])
def test_a_pipe_that_is_named_like_a_label_file_is_not_opened(tmp_path: Path, name: str) -> None:
    source, _ = folder(tmp_path)
    os.mkfifo(source / name)
    prepare(source, tmp_path / "out")
    assert reasons(tmp_path / "out") == {}


@pytest.mark.parametrize(
    ("source", "message"),
    [("x.txt", "neither a file nor a folder"), ("x.tar", "neither a file"), (".", "no shards")],
)
def test_a_pipe_is_no_source(tmp_path: Path, source: str, message: str) -> None:
    for name in ("x.txt", "x.tar"):
        os.mkfifo(tmp_path / name)
    done = started(tmp_path / source, tmp_path / "out")
    assert done.returncode == 2
    assert message in done.stderr


def test_an_annotation_that_is_a_pipe_loses_its_image_only(tmp_path: Path) -> None:
    source, odd = voc(tmp_path)
    shutil.copy(source / "JPEGImages/good.jpg", odd)
    (source / "ImageSets/Main").mkdir(parents=True)
    (source / "ImageSets/Main/train.txt").write_text("good\nodd\n")
    (source / "Annotations/odd.xml").unlink()
    os.mkfifo(source / "Annotations/odd.xml")
    prepare(source, tmp_path / "out")
    (reason,) = reasons(tmp_path / "out").values()
    assert "odd.xml: the annotation is not a regular file: a named pipe" in reason


# --- Images of too many bytes -----------------------------------------------------------------

HEAD = b"HTTP/1.0 200 OK\r\n"
LIMIT = ("--set", "source.max_bytes=100_000")
HUGE = 1 << 40  # bytes; more than any memory, so that reading it would fail


@contextmanager
def serve_parts(head: bytes, parts: Callable[[], Iterator[bytes]]) -> Iterator[str]:
    """A server whose every answer is `head` and then `parts`; its address."""

    class Handler(BaseHTTPRequestHandler):
        def handle(self) -> None:
            self.rfile.readline()
            try:
                self.wfile.write(head)
                for part in parts():
                    self.wfile.write(part)
            except OSError:
                pass  # the client has had enough

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.socket.close()


def sparse(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


def test_a_file_of_too_many_bytes_is_not_read(tmp_path: Path) -> None:
    source, odd = folder(tmp_path)
    sparse(odd, HUGE)
    prepare(source, tmp_path / "out", *LIMIT)
    wanted = f"too many bytes: {HUGE}, more than source.max_bytes = 100000"
    assert reasons(tmp_path / "out") == {"odd.jpg": wanted}


@pytest.mark.parametrize("suffix", ["tar", "zip"])
def test_a_member_of_too_many_bytes_is_not_read(tmp_path: Path, suffix: str) -> None:
    source, odd = folder(tmp_path)
    odd.write_bytes(bytes(200_000))
    packed = tmp_path / f"a.{suffix}"
    if suffix == "tar":
        with tarfile.open(packed, "w") as tar:
            for path in (source / "good.jpg", odd):
                tar.add(path, path.name)
    else:
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as opened:
            for path in (source / "good.jpg", odd):
                opened.write(path, path.name)
    prepare(packed, tmp_path / "out", *LIMIT)
    wanted = "too many bytes: 200000, more than source.max_bytes = 100000"
    assert reasons(tmp_path / "out") == {f"a.{suffix}/odd.jpg": wanted}


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_member_that_holds_more_than_it_says_is_not_unpacked(tmp_path: Path, method: int) -> None:
    archive = tmp_path / "photos.zip"
    with zipfile.ZipFile(archive, "w", method) as opened:
        opened.writestr("a.jpg", encode(noise_image(0)))
        with opened.open("b.jpg", "w") as member:
            for _ in range(300):
                member.write(bytes(1 << 20))
    data = bytearray(archive.read_bytes())
    entry = data.rindex(b"PK\x01\x02")  # of b.jpg; its unpacked size is at 24
    data[entry + 24 : entry + 28] = (1000).to_bytes(4, "little")
    archive.write_bytes(data)
    command = [
        sys.executable, "-m", "dupr_cli", "prepare", str(archive), str(tmp_path / "out"),
        "--workers", "1", "--set", "source.max_bytes=1000000",
    ]  # fmt: skip
    peak = "import resource as r, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
    peak += "print(r.getrusage(r.RUSAGE_CHILDREN).ru_maxrss // 1024)"
    done = subprocess.run(
        [sys.executable, "-c", peak, *command], capture_output=True, text=True, timeout=FEW_SECONDS
    )
    assert done.returncode == 0, done.stderr
    assert list(reasons(tmp_path / "out")) == ["photos.zip/b.jpg"]
    assert int(done.stdout.split()[-1]) < 250


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_member_loses_its_image_only(tmp_path: Path, method: int) -> None:
    archive = tmp_path / "photos.zip"
    with zipfile.ZipFile(archive, "w", method) as opened:
        for name in "abc":
            opened.writestr(f"{name}.jpg", encode(noise_image(ord(name))))
    data = bytearray(archive.read_bytes())
    middle = data.index(b"b.jpg") + 60
    data[middle : middle + 40] = bytes(byte ^ 0xFF for byte in data[middle : middle + 40])
    archive.write_bytes(data)
    prepare(archive, tmp_path / "out")
    assert list(reasons(tmp_path / "out")) == ["photos.zip/b.jpg"]
    assert len(open_shards(str(tmp_path / "out"))) == 2


@pytest.mark.parametrize("large", ["b.jpg", "b.bin"])
def test_a_sample_of_too_many_bytes_is_not_read(tmp_path: Path, large: str) -> None:
    image = encode(noise_image(1))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in {"a.jpg": image, "b.jpg": image, large: bytes(200_000)}.items():
            (tmp_path / name).write_bytes(data)
            tar.add(tmp_path / name, name)
    prepare(tmp_path / "a.tar", tmp_path / "out", "--set", "source.kind=shards", *LIMIT)
    size = 200_000 if large == "b.jpg" else 200_000 + len(image)
    wanted = f"too many bytes: {size}, more than source.max_bytes = 100000"
    assert reasons(tmp_path / "out") == {"a.tar/b": wanted}


@pytest.mark.parametrize(
    ("head", "found"),
    [
        (HEAD + b"\r\n", "too many bytes: more than"),
        (HEAD + f"Content-Length: {HUGE}\r\n\r\n".encode(), f"too many bytes: {HUGE}"),
    ],
    ids=["endless", "announced"],
)
def test_a_body_of_too_many_bytes_is_cut_off(tmp_path: Path, head: bytes, found: str) -> None:
    source, _ = folder(tmp_path)
    with serve_parts(head, lambda: repeat(bytes(1 << 16))) as url:
        (source / "list.txt").write_text(f"good.jpg\n{url}/odd.jpg\n")
        prepare(source / "list.txt", tmp_path / "out", *LIMIT)
    (reason,) = reasons(tmp_path / "out").values()
    assert reason.startswith(found)
    assert reason.endswith("more than source.max_bytes = 100000")


def test_the_body_of_a_redirection_is_not_read(tmp_path: Path) -> None:
    source, _ = folder(tmp_path)
    head = HEAD.replace(b"200 OK", b"302 Found") + b"Location: /other.jpg\r\n\r\n"
    with serve_parts(head, lambda: repeat(bytes(1 << 16))) as url:
        (source / "list.txt").write_text(f"good.jpg\n{url}/odd.jpg\n")
        prepare(source / "list.txt", tmp_path / "out", *LIMIT)
    (reason,) = reasons(tmp_path / "out").values()
    assert "infinite loop" in reason


def test_the_limit_holds_for_excluded_images(tmp_path: Path) -> None:
    source, _ = folder(tmp_path)
    excluded, odd = folder(tmp_path / "excluded")
    sparse(odd, HUGE)
    noise_image(2).save(excluded / "good.jpg")
    said = prepare(source, tmp_path / "out", *LIMIT, "--exclude", str(excluded))
    assert "too many bytes" in said


# --- Servers that take their time ---------------------------------------------------------------

DEADLINE = ("--set", "source.max_seconds=2")


def drip() -> Iterator[bytes]:
    """One byte ten times a second; to `http.client` it is a line of a header, or a body."""
    while True:
        yield b"x"
        time.sleep(0.1)


def silence() -> Iterator[bytes]:
    while True:
        time.sleep(0.1)
        yield b""


SLOW = [(b"", drip), (HEAD + b"X: ", drip), (HEAD + b"\r\n", drip), (b"", silence)]
SLOW_NAMES = ["status", "header", "body", "nothing"]


@pytest.mark.parametrize(("head", "parts"), SLOW, ids=SLOW_NAMES)
def test_an_image_has_a_deadline(
    tmp_path: Path, head: bytes, parts: Callable[[], Iterator[bytes]]
) -> None:
    source, _ = folder(tmp_path)
    with serve_parts(head, parts) as url:
        (source / "list.txt").write_text(f"good.jpg\n{url}/odd.jpg\n")
        prepare(source / "list.txt", tmp_path / "out", *DEADLINE)
    (reason,) = reasons(tmp_path / "out").values()
    assert "/odd.jpg cannot be fetched within 2 s" in reason


@pytest.mark.parametrize(("head", "parts"), SLOW[:3], ids=SLOW_NAMES[:3])
def test_a_server_has_a_least_rate(
    head: bytes, parts: Callable[[], Iterator[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paced_http, "WINDOW_SECONDS", 0.5)
    with (
        serve_parts(head, parts) as url,
        pytest.raises(RunError, match=r"bytes arrived in 0\.5 s, fewer than 1000 per second"),
    ):
        fetch_bytes(f"{url}/odd.jpg", attempts=2)


def test_a_slow_server_that_keeps_the_rate_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paced_http, "WINDOW_SECONDS", 0.3)

    def parts() -> Iterator[bytes]:
        for _ in range(10):
            yield bytes(200)
            time.sleep(0.1)

    with serve_parts(HEAD + b"\r\n", parts) as url:
        assert fetch_bytes(f"{url}/slow.jpg", attempts=1) == bytes(2000)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("threads", ["one thread", "several threads"])
def test_a_stop_does_not_wait_for_a_server_and_the_command_continues(
    tmp_path: Path, workers: int, threads: str, number: signal.Signals
) -> None:
    source, _ = folder(tmp_path)
    picture, hangs = encode(noise_image(2)), [True]

    requested = threading.Event()

    def parts() -> Iterator[bytes]:
        requested.set()
        yield from drip() if hangs[0] else [picture]

    with serve_parts(HEAD + b"\r\n", parts) as url:
        # Images are fetched by several threads if the first one has an address.
        names = [f"{url}/odd.jpg", "good.jpg"]
        names = names if threads == "several threads" else names[::-1]
        (source / "list.txt").write_text("\n".join(names))
        command = [sys.executable, "-m", "dupr_cli", "prepare", str(source / "list.txt")]
        command += [str(tmp_path / "out"), "--workers", str(workers)]
        command += ["--set", "shard.max_samples=1"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        requested.wait(FEW_SECONDS)
        time.sleep(0.5)
        process.send_signal(number)
        began = time.monotonic()
        _, said = process.communicate(timeout=FEW_SECONDS)
        assert time.monotonic() - began < 10
        assert process.returncode == (130 if number == signal.SIGINT else 75), said
        assert f"stopped by {number.name}. Finished shards are kept" in said
        hangs[0] = False
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=FEW_SECONDS)
        assert done.returncode == 0, done.stderr
    shards = open_shards(str(tmp_path / "out"))
    assert {shards[0].image, shards[1].image} == {picture, (source / "good.jpg").read_bytes()}
