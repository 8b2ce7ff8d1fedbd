"""Shards at an address: the same samples as on the disk, whatever the server does."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest

from dupr_cli.artifacts import remote
from dupr_cli.artifacts.shards import MANIFEST, Sample, open_shards
from dupr_cli.errors import RunError, UsageError
from tests.conftest import write_shards
from tests.servers import serve


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


def test_processes_share_one_copy(shards: Path) -> None:
    program = (
        "import sys; from dupr_cli.artifacts.shards import open_shards\n"
        "opened = open_shards(sys.argv[1], 'train')\n"
        "print(sum(len(opened[n].image) for n in range(len(opened))))"
    )
    with serve(shards) as served:
        running = [
            subprocess.Popen([sys.executable, "-c", program, served.url], stdout=subprocess.PIPE)
            for _ in range(3)
        ]
        printed = {process.communicate(timeout=120)[0] for process in running}
        assert len(printed) == 1
        tars = [path for path in served.requests if path.endswith(".tar")]
        assert len(tars) == len(set(tars)) == 5


def test_a_server_that_always_fails_is_given_up_with_one_message(shards: Path) -> None:
    with serve(shards) as served:
        opened = open_shards(served.url, "train")
        served.fail_every = 1
        with pytest.raises(RunError, match=r"train-000000.*cannot be had.*\(8 attempts\)"):
            opened[0]
        assert len(served.requests) == 9


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunError, match=r"manifest.json cannot be had: .*refused"):
        open_shards("http://127.0.0.1:9/shards")


def test_what_is_not_there_is_said_at_once(shards: Path) -> None:
    with serve(shards) as served:
        with pytest.raises(UsageError, match=r"nowhere/manifest.json: 404"):
            open_shards(f"{served.url}/nowhere")
        with pytest.raises(UsageError, match=r"train-000009.tar: 404.*no such shard"):
            open_shards(f"{served.url}/train-000009.tar")
        with pytest.raises(UsageError, match="no split 'test'; it has train"):
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
        with pytest.raises(RunError, match="another sha256 than the manifest says"):
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


def test_any_address_that_fsspec_knows(shards: Path) -> None:
    memory = fsspec.filesystem("memory")
    for path in shards.iterdir():
        memory.pipe(f"/bucket/{path.name}", path.read_bytes())
    assert samples("memory://bucket") == samples(str(shards))
    with pytest.raises(UsageError, match="no-such-scheme://x"):
        open_shards("no-such-scheme://x")


def test_loader_processes_read_remote_shards(shards: Path) -> None:
    """Forked workers: connections of the parent are of no use to them."""
    from torch.utils.data import DataLoader

    with serve(shards, fail_every=7) as served:
        opened = open_shards(served.url, "train")
        assert opened[0].key == "s0000"
        loader: DataLoader[Sample] = DataLoader(opened, None, num_workers=2)  # type: ignore[arg-type]
        assert [sample.key for sample in loader] == [f"s{n:04d}" for n in range(90)]


def test_a_local_shard_that_vanishes_or_is_cut_is_named(shards: Path) -> None:
    opened = open_shards(str(shards), "train")
    assert opened[0].key == "s0000"
    (shards / "train-000001.tar").unlink()
    with pytest.raises(RunError, match=r"train-000001.tar: sample s0020 cannot be.*it goes on"):
        opened[20]
    index = json.loads((shards / "train-000002.index.json").read_text())
    with (shards / "train-000002.tar").open("r+b") as file:
        file.truncate(index["images"][10][0] + 5)
    assert opened[49].key == "s0049"
    with pytest.raises(RunError, match=r"cut off at sample s0050: 5 of \d+ bytes"):
        opened[50]
