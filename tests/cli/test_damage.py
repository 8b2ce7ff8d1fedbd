"""Runs on data that is damaged, few, gone or far away: a good end, or one clear message."""

from __future__ import annotations

import io
import re
import sys
import tarfile
import time
from pathlib import Path

import pytest

from dupr_cli.artifacts import remote
from dupr_cli.artifacts.run import MetricsLog
from dupr_cli.artifacts.shard_files import Sample, write_shard
from tests.support import command_line
from tests.support.images import encode, noise_image, write_shards
from tests.support.processes import Forked
from tests.support.recipes import SMALL_NETWORK
from tests.support.servers import serve


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUPR_CACHE", str(tmp_path / "cache"))


def pretrain(data: object, out: Path, *options: object, code: int = 0) -> str:
    """What a run says on standard error."""
    return command_line.pretrain(data, out, "--set", "data.workers=3", *options, code=code).stderr


@pytest.mark.slow
def test_five_percent_damaged_samples(tmp_path: Path) -> None:
    good = [encode(noise_image(number)) for number in range(100)]
    damaged = [data[:150] if number % 20 == 7 else data for number, data in enumerate(good)]
    samples = [Sample(f"k{n:03d}", "jpg", data) for n, data in enumerate(damaged)]
    write_shard(tmp_path / "s.tar", samples)
    out = tmp_path / "run"
    # 90 images are an epoch: 24 steps of 8 pass all of them twice.
    errors = pretrain(tmp_path / "s.tar", out, "--steps", 24)
    assert errors.count("cannot be decoded are replaced") == 1
    assert 5 <= MetricsLog(out).latest()["unreadable"] <= 20


@pytest.mark.parametrize("per_shard", [60, 30])
def test_one_shard_and_fewer_shards_than_workers(tmp_path: Path, per_shard: int) -> None:
    shards = write_shards(tmp_path / "shards", 60, per_shard)
    assert len(list(shards.glob("*.tar"))) == 60 // per_shard
    pretrain(shards, tmp_path / "run")
    assert MetricsLog(tmp_path / "run").latest()["step"] == 6


def test_a_hostile_tar(tmp_path: Path) -> None:
    """Names that lead outside, links and devices, an image twice, and one of 1.2 gigapixels."""
    bomb = bytearray(encode(noise_image(0), "PNG"))
    bomb[16:24] = (40_000).to_bytes(4, "big") + (30_000).to_bytes(4, "big")
    images = {f"k{number}.jpg": encode(noise_image(number)) for number in range(40)}
    images |= {"../../evil.jpg": images["k1.jpg"], "/abs/evil.jpg": images["k2.jpg"]}
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in [*images.items(), ("k1.jpg", b"again"), ("bomb.png", bytes(bomb))]:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for number, kind in enumerate(kinds):
            member = tarfile.TarInfo(f"special{number}.jpg")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    before = {path.name for path in tmp_path.iterdir()}
    errors = pretrain(tmp_path / "a.tar", tmp_path / "run", "--steps", 10)
    assert errors.count("cannot be decoded are replaced") <= 1
    assert MetricsLog(tmp_path / "run").latest()["step"] == 10
    assert {path.name for path in tmp_path.iterdir()} - before <= {"run", "cache"}


def test_so_few_images_that_one_is_held_out(tmp_path: Path) -> None:
    """Its deepest map is a single cell, of which batch norm has no variance."""
    pretrain(write_shards(tmp_path / "shards", 12), tmp_path / "run")
    assert MetricsLog(tmp_path / "run").latest()["step"] == 6


@pytest.mark.slow
def test_a_shard_that_vanishes_and_comes_back(tmp_path: Path) -> None:
    shards, out = write_shards(tmp_path / "shards", 300, 10), tmp_path / "run"
    # One of the 30 shards at a time: most are still unread when the first checkpoint is there.
    options = ["--steps", "30", "--set", "data.shuffle_shards=1", "--set", "data.workers=1"]
    options += ["--set", "train.probe_every=1000"]
    command = [sys.executable, "-m", "dupr_cli", "pretrain", "dupr-r18-cpu-smoke"]
    command += ["--data", str(shards), "--out", str(out), *command_line.TINY_SET]
    process = Forked([*command, "--set", SMALL_NETWORK, *options])
    while not list(out.glob("checkpoints/step-*")):
        assert process.poll() is None
        time.sleep(0.02)
    tars = list(shards.glob("*.tar"))
    for tar in tars:
        tar.rename(tar.with_suffix(".away"))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors
    assert "Traceback" not in errors
    assert errors.count("error:") == 1
    assert re.search(r"train-0000\d\d.tar: sample s0\d+ cannot be read: No such file", errors)
    for tar in tars:
        tar.with_suffix(".away").rename(tar)
    pretrain(shards, out, *options)
    assert MetricsLog(out).latest()["step"] == 30


@pytest.mark.slow
def test_over_http_with_every_tenth_request_failing(tmp_path: Path, tiny_shards: Path) -> None:
    from safetensors.torch import load_file

    with serve(tiny_shards, fail_every=10) as served:
        # Requests of other tests' sizes do not fail: make sure that some of these do.
        served.requests.extend(["warm-up"] * 7)
        pretrain(served.url, tmp_path / "far")
        assert served.failures
    pretrain(tiny_shards, tmp_path / "near")
    far, near = (
        load_file(tmp_path / name / "latest" / "model.safetensors") for name in ("far", "near")
    )
    assert all((far[name] == near[name]).all() for name in near)


def test_over_http_with_a_server_that_goes_away(
    tmp_path: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_FIRST_DELAY", 0.01)  # seconds, not a minute
    with serve(tiny_shards) as served:
        address = served.url
    errors = pretrain(address, tmp_path / "run", code=1)
    assert f"error: {address}/manifest.json cannot be fetched" in errors
    assert not (tmp_path / "run").exists()
