"""Shards at an address: the same samples as on the disk, whatever the server does."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import socket
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import cast

import fsspec
import pytest

from dupr_cli.artifacts import paced_http, remote
from dupr_cli.artifacts.shard_files import Sample, index_path
from dupr_cli.artifacts.shards import MANIFEST, open_shards
from dupr_cli.errors import RunError, UsageError
from tests.support.images import write_shards
from tests.support.processes import Forked
from tests.support.servers import serve


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DUPR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "_FIRST_DELAY", 0.01)
    return tmp_path / "cache"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "shards", 90)


def samples(address: str, split: str | None = "train") -> list[object]:
    opened = open_shards(address, split)
    return [opened[number] for number in range(len(opened))]


@pytest.mark.parametrize("fail_every", [0, 10, 3])
def test_a_served_set_is_the_set_on_the_disk(shards: Path, fail_every: int) -> None:
    with serve(shards, fail_every) as served:
        assert samples(served.url) == samples(str(shards))
        assert open_shards(served.url).identity() == open_shards(str(shards)).identity()
        assert bool(served.failures) == bool(fail_every)


@pytest.mark.parametrize("fail_every", [0, 3])
def test_a_pattern_without_manifest(shards: Path, fail_every: int) -> None:
    for path in (shards / MANIFEST, *shards.glob("*.json")):
        path.unlink(missing_ok=True)
    with serve(shards, fail_every) as served:
        pattern = served.url + "/train-{000000..000004}.tar"
        assert samples(pattern) == samples(str(shards))
        before = len(served.requests)
        assert samples(pattern) == samples(str(shards))
        assert len(served.requests) == before  # all of it is in the cache


def test_shards_are_fetched_when_they_are_read_and_only_once(shards: Path) -> None:
    with serve(shards) as served:
        opened = open_shards(served.url, "train")
        assert served.requests == ["/manifest.json"]
        for number in (0, 1, 25):
            assert opened[number].key == f"s{number:04d}"
        again = open_shards(served.url, "train")
        assert again[3].key == "s0003"
        tars = [path for path in served.requests if path.endswith(".tar")]
        assert tars == ["/train-000000.tar", "/train-000001.tar"]


@pytest.mark.parametrize("place", ["", "/train-{000000..000004}.tar"])
def test_processes_share_one_copy(shards: Path, place: str) -> None:
    for index in shards.glob("*.index.json"):
        index.unlink()  # so that indexes are made, too, while the others want them
    with serve(shards) as served:

        def read_all() -> None:
            opened = open_shards(served.url + place, "train")
            print(sum(len(opened[number].image) for number in range(len(opened))))

        running = [Forked(read_all) for _ in range(3)]
        printed = {process.communicate(timeout=120)[0] for process in running}
        assert len(printed) == 1
        tars = [path for path in served.requests if path.endswith(".tar")]
        assert len(tars) == len(set(tars)) == 5
        indexes = [path for path in served.requests if path.endswith(".index.json")]
        assert len(indexes) == (0 if place else 5)


def test_a_server_that_always_fails_is_given_up_with_one_message(shards: Path) -> None:
    with serve(shards) as served:
        opened = open_shards(served.url, "train")
        served.fail_every = 1
        with pytest.raises(RunError, match=r"train-000000.*cannot be fetched.*\(8 attempts\)"):
            opened[0]
        assert len(served.requests) == 9


@contextmanager
def answering(status: int) -> Iterator[tuple[str, list[str]]]:
    """A server with one answer to everything: its address, and the requests that came."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_error(status)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/shards", requests
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("status", [429, 500, 503])
def test_answers_that_may_change_are_asked_for_again(status: int) -> None:
    with answering(status) as (address, requests):
        with pytest.raises(RunError, match=rf"cannot be fetched: {status} .*\(8 attempts\)"):
            open_shards(address)
        assert len(requests) == 8


@pytest.mark.parametrize("status", [401, 403, 404])
def test_answers_that_will_not_change_are_taken(status: int) -> None:
    with answering(status) as (address, requests):
        with pytest.raises(UsageError, match=rf"manifest.json: {status} "):
            open_shards(address)
        assert len(requests) == 1


def test_nobody_there() -> None:
    with pytest.raises(RunError, match=r"manifest.json cannot be fetched: Connection refused \(8"):
        open_shards("http://127.0.0.1:9/shards")


def test_a_server_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paced_http, "WINDOW_SECONDS", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/shards"
        with pytest.raises(
            RunError, match=r"fetched: 0 bytes arrived in 0\.05 s, .*\(8 attempts\)"
        ):
            open_shards(address)


def test_no_address_at_all() -> None:
    with pytest.raises(UsageError, match=r"http://host:port/shards/manifest.json is not an addr"):
        open_shards("http://host:port/shards")


def test_what_is_not_there_is_said_at_once(shards: Path) -> None:
    with serve(shards) as served:
        with pytest.raises(UsageError, match=r"nowhere/manifest.json: 404"):
            open_shards(f"{served.url}/nowhere")
        with pytest.raises(UsageError, match=r"train-000009.tar: 404.*The shard does not exist"):
            open_shards(f"{served.url}/train-000009.tar")
        with pytest.raises(UsageError, match="no split 'test'; its splits are train"):
            open_shards(served.url, "test")
        opened = open_shards(served.url, "train")
        (shards / "train-000002.tar").unlink()
        with pytest.raises(RunError, match=r"train-000002.tar: 404.*Put it back"):
            opened[45]


def test_changed_bytes_are_not_taken(shards: Path) -> None:
    tar = shards / "train-000000.tar"
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    with serve(shards) as served:
        opened = open_shards(served.url, "train")
        with pytest.raises(RunError, match="sha256 of the received file differs from the manifest"):
            opened[0]


def test_another_set_at_the_same_address_is_another_copy(tmp_path: Path, shards: Path) -> None:
    with serve(tmp_path) as served:
        assert len(samples(f"{served.url}/shards")) == 90
        shards.rename(tmp_path / "old")
        write_shards(shards, 30)
        assert len(samples(f"{served.url}/shards")) == 30


def test_a_full_disk_names_the_cache(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with serve(shards) as served:
        opened = open_shards(served.url, "train")
        opened.index(0)
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(RunError, match=r"No space left on device.*set DUPR_CACHE"):
            opened[0]
        assert sum(path.endswith("000000.tar") for path in served.requests) == 1


def test_a_cache_that_cannot_be_written_is_not_the_servers_fault(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DUPR_CACHE", str(shards / MANIFEST))
    with serve(shards) as served:
        for address in (served.url, served.url + "/train-000000.tar"):
            with pytest.raises(RunError, match=r"manifest.json/.*Not a directory.*set DUPR_CACHE"):
                open_shards(address)


def test_the_folder_of_a_copy_tells_no_password(cache: Path) -> None:
    folder = remote.cache_folder("sftp://somebody:secret@host/my/shards")
    assert folder.parent == cache
    assert folder.name.startswith("host-my-shards-")


@pytest.mark.parametrize("name", ["../../escaped.tar", "/escaped.tar", "a/../../escaped.tar", ""])
def test_a_manifest_cannot_write_outside_the_cache(shards: Path, cache: Path, name: str) -> None:
    manifest = json.loads((shards / MANIFEST).read_text())
    manifest["splits"]["train"][0]["file"] = name
    (shards / MANIFEST).write_text(json.dumps(manifest))
    with serve(shards) as served, pytest.raises(UsageError, match="would lie outside the folder"):
        open_shards(served.url, "train")
    assert not cache.exists()


@pytest.mark.parametrize("there", [None, b"<html>Welcome</html>", b"of another shard"])
def test_a_shard_whose_index_is_of_no_use_is_scanned(shards: Path, there: bytes | None) -> None:
    expected = samples(str(shards))
    index = index_path(shards / "train-000001.tar")
    if there is None:
        index.unlink()
    elif there == b"of another shard":
        index.write_bytes(index_path(shards / "train-000000.tar").read_bytes())
    else:
        index.write_bytes(there)
    with serve(shards) as served:
        assert samples(served.url) == expected


def test_a_manifest_that_is_none_is_named_by_its_address(shards: Path) -> None:
    for data in (b"<html>Welcome</html>", b"\xff\xfe"):
        (shards / MANIFEST).write_bytes(data)
        with serve(shards) as served, pytest.raises(UsageError) as caught:
            open_shards(served.url)
        assert str(caught.value).startswith(f"{served.url}/manifest.json is not a whole manifest")


def test_a_foreign_shard_that_was_mended_is_fetched_again(shards: Path) -> None:
    tar = shards / "train-000000.tar"
    whole = tar.read_bytes()
    with serve(shards) as served:
        address = f"{served.url}/{tar.name}"
        tar.write_bytes(whole[:5000])
        with pytest.raises(RunError, match=rf"^{address}: the shard is cut off or damaged after"):
            open_shards(address)
        tar.write_bytes(whole)
        assert samples(address) == samples(str(tar))


def test_foreign_shards_without_images_are_a_usage_error(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "texts.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
    with serve(tmp_path) as served, pytest.raises(UsageError, match="hold no images"):
        open_shards(f"{served.url}/texts.tar")


def test_a_copy_of_the_wrong_length_is_replaced_and_leftovers_go(shards: Path) -> None:
    with serve(shards) as served:
        opened = open_shards(served.url, "train")
        first = opened[0]
        copy = opened.shards[0]
        copy.write_bytes(copy.read_bytes()[:100])
        leftover = copy.with_name(f".{copy.name}.99999.tmp")
        leftover.write_bytes(b"of a process that was killed")
        assert open_shards(served.url, "train")[0] == first
        assert not leftover.exists()


def test_a_set_that_travels_to_another_process_reads_the_same(shards: Path) -> None:
    with serve(shards) as served:
        opened = open_shards(served.url, "train")
        travelled = pickle.loads(pickle.dumps(opened))
        assert travelled[42] == opened[42]
        assert travelled.identity() == opened.identity()


def test_identity_is_what_earlier_runs_recorded(shards: Path) -> None:
    tars = sorted(shards.glob("*.tar"))
    counts = [20, 20, 20, 20, 10]
    lines = [f"{tar.name} {tar.stat().st_size} {n}\n" for tar, n in zip(tars, counts, strict=True)]
    expected = hashlib.sha256("".join(lines).encode()).hexdigest()
    with serve(shards) as served:
        for address in (str(shards), served.url, served.url + "/train-{000000..000004}.tar"):
            assert open_shards(address, "train").identity() == expected


def test_errors_of_packages_behind_fsspec_are_repeated_too(shards: Path) -> None:
    class Flaky(fsspec.AbstractFileSystem):  # type: ignore[misc]
        """As botocore: its errors are not OSErrors."""

        opened, always = 0, False

        def _open(self, path: str, mode: str = "rb", **_: object) -> object:
            Flaky.opened += 1
            if Flaky.always or Flaky.opened % 2:
                raise RuntimeError("the endpoint cannot be reached")
            return (shards / path.rpartition("/")[2]).open(mode)

    fsspec.register_implementation("flaky", Flaky, clobber=True)
    assert samples("flaky://bucket") == samples(str(shards))
    Flaky.always = True
    with pytest.raises(RunError, match=r"flaky://bucket/.*cannot be reached \(8 attempts\)"):
        open_shards("flaky://bucket")


def test_any_address_that_fsspec_knows(shards: Path) -> None:
    memory = fsspec.filesystem("memory")
    for path in shards.iterdir():
        memory.pipe(f"/bucket/{path.name}", path.read_bytes())
    assert samples("memory://bucket") == samples(str(shards))
    with pytest.raises(UsageError, match="no-such-scheme://x"):
        open_shards("no-such-scheme://x")


def test_loader_processes_read_remote_shards(shards: Path) -> None:
    """Forked workers: connections of the parent are of no use to them."""
    from torch.utils.data import DataLoader, Dataset

    with serve(shards, fail_every=7) as served:
        opened = open_shards(served.url, "train")
        assert opened[0].key == "s0000"
        images = cast("Dataset[Sample]", opened)
        loader = DataLoader(images, None, num_workers=2)
        assert [sample.key for sample in loader] == [f"s{n:04d}" for n in range(90)]


def test_a_local_shard_that_vanishes_or_is_cut_is_named(shards: Path) -> None:
    opened = open_shards(str(shards), "train")
    assert opened[0].key == "s0000"
    (shards / "train-000001.tar").unlink()
    with pytest.raises(RunError, match=r"train-000001.tar: sample s0020 cannot be.*to continue"):
        opened[20]
    index = json.loads((shards / "train-000002.index.json").read_text())
    with (shards / "train-000002.tar").open("r+b") as file:
        file.truncate(index["images"][10][0] + 5)
    assert opened[49].key == "s0049"
    with pytest.raises(RunError, match=r"cut off at sample s0050: it has 5 of \d+ bytes"):
        opened[50]
