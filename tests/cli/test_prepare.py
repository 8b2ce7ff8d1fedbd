"""dupr prepare as people run it: killed, stopped, on a full disk, in tasks, on Ray.

The bytes are always those of one quiet call.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.command_line import dupr
from tests.support.images import noise_image
from tests.support.ray_cluster import only_ray_test, small_cluster

pytestmark = pytest.mark.slow

OPTIONS = ("--set", "shard.max_samples=5", "--set", "image.max_side=110")


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "dupr_cli", "prepare", *map(str, arguments)]


def digests(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 images, some of them there twice, some damaged."""
    folder = tmp_path_factory.mktemp("source")
    for number in range(400):
        path = folder / f"{number:04d}.png"
        noise_image(number // 2 if number % 50 == 1 else number, 120, 80).save(path)
        if number % 37 == 5:
            path.write_bytes(path.read_bytes()[:-500])
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, source: Path) -> dict[str, str]:
    """What an uninterrupted call with one worker leaves."""
    out = tmp_path_factory.mktemp("whole") / "out"
    found = json.loads(dupr("prepare", source, out, *OPTIONS, "--workers", 1, "--json").stdout)
    assert found["skip_reasons"] == {"does not decode": 11, "duplicate of": 7}
    return digests(out)


@pytest.mark.parametrize("workers", [2, 5])
def test_any_number_of_workers(
    tmp_path: Path, source: Path, whole: dict[str, str], workers: int
) -> None:
    dupr("prepare", source, tmp_path / "out", *OPTIONS, "--workers", workers)
    assert digests(tmp_path / "out") == whole


def test_tasks_and_merge(tmp_path: Path, source: Path, whole: dict[str, str]) -> None:
    """Three processes at the same time, as an array job starts them."""
    out = tmp_path / "out"
    processes = [
        subprocess.Popen(
            command(source, out, *OPTIONS, "--workers", 1, "--task", f"{n}/3"),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for n in (1, 2, 3)
    ]  # fmt: skip
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert "dupr prepare merge" in errors
    assert not list(out.glob("*.tar"))
    dupr("prepare", "merge", out)
    assert digests(out) == whole


def test_on_ray(tmp_path: Path, source: Path, whole: dict[str, str]) -> None:
    with only_ray_test():
        with small_cluster():
            dupr("prepare", source, tmp_path / "out", *OPTIONS, "--engine", "ray")
            assert digests(tmp_path / "out") == whole
        done = dupr("prepare", source, tmp_path / "b", "--engine", "ray", code=2)
    assert "no running Ray cluster" in done.stderr
    assert not (tmp_path / "b" / "manifest.json").exists()


def test_killed_at_random_moments(tmp_path: Path, source: Path, whole: dict[str, str]) -> None:
    """Twenty times, workers and all, with another number of workers each time."""
    out, chance, kills = tmp_path / "out", random.Random(0), 0
    for attempt in range(60):
        process = subprocess.Popen(
            command(source, out, *OPTIONS, "--workers", 1 + attempt % 3),
            start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        before = len(list(out.glob(".prepare/blocks/*.json")))
        limit = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < limit:
            if len(list(out.glob(".prepare/blocks/*.json"))) > before or attempt % 4 == 0:
                break
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.8 if attempt % 4 == 0 else 0.02))
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        if kills == 20 or (out / "manifest.json").exists():
            break
    assert kills == 20
    errors = dupr("prepare", source, out, *OPTIONS).stderr
    assert re.search(r"\d+ of 400 images are in finished shards|already complete", errors)
    assert digests(out) == whole


def no_worker_is_left(group: int) -> None:
    deadline = time.monotonic() + 30
    with suppress(ProcessLookupError):
        while True:
            os.killpg(group, 0)
            assert time.monotonic() < deadline, "workers are left"
            time.sleep(0.1)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_stopped_by_a_signal(
    tmp_path: Path, source: Path, whole: dict[str, str], number: signal.Signals, code: int
) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        command(source, out, *OPTIONS, "--workers", 2),
        start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while len(list(out.glob(".prepare/blocks/*.json"))) < 4:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code, errors
    assert errors.count("error:") == 1
    assert "Traceback" not in errors
    no_worker_is_left(process.pid)
    dupr("prepare", source, out, *OPTIONS)
    assert digests(out) == whole


def test_workers_end_when_only_the_main_process_is_killed(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        command(source, out, *OPTIONS, "--workers", 2),
        start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not list(out.glob(".prepare/blocks/*.json")):
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    no_worker_is_left(process.pid)


def workers_of(process: int) -> list[int]:
    """Worker processes of a command: the children of the server from which they fork."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [
        int(worker)
        for child in children
        for worker in Path(f"/proc/{child}/task/{child}/children").read_text().split()
    ]


def test_idle_workers_that_are_killed_do_not_hold_up_the_others(tmp_path: Path) -> None:
    """The fault behind this: an idle worker holds the lock of the queue, and the last one waited
    for it and ignored every request to end."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for number in range(15):
        side = 40 if number < 10 else 1600
        noise_image(number, side, side).save(source / f"{number:02d}.png")
    process = subprocess.Popen(
        command(source, out, "--set", "shard.max_samples=5", "--workers", 3),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        while len(list(out.glob(".prepare/blocks/*.json"))) < 2:
            assert process.poll() is None
            time.sleep(0.005)
        time.sleep(0.1)
        workers = workers_of(process.pid)
        assert len(workers) == 3, "the large block was finished too soon"
        idle = [w for w in workers if Path(f"/proc/{w}/stat").read_text().split(")")[1][1] == "S"]
        for worker in idle:
            os.kill(worker, signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 1, errors
        assert "a worker process was killed" in errors
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_a_worker_that_is_killed_is_one_message(
    tmp_path: Path, source: Path, whole: dict[str, str]
) -> None:
    """As the kernel does when memory runs out."""
    out = tmp_path / "out"
    process = subprocess.Popen(
        command(source, out, *OPTIONS, "--workers", 2),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not list(out.glob(".prepare/blocks/*.json")):
        assert process.poll() is None
        time.sleep(0.005)
    os.kill(workers_of(process.pid)[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    assert errors.count("error:") == 1
    assert "a worker process was killed" in errors
    assert "Traceback" not in errors
    dupr("prepare", source, out, *OPTIONS)
    assert digests(out) == whole


def test_a_full_disk_keeps_what_is_finished(
    tmp_path: Path, source: Path, whole: dict[str, str]
) -> None:
    """A file system of two megabytes, then a larger one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        done = dupr("prepare", source, disk / "out", *OPTIONS, "--workers", 2, code=1)
        assert re.search(
            r"error: .*disk/out.*No space left on device. Free some space", done.stderr
        )
        assert not list(disk.rglob("*.tmp"))
        finished = len(list(disk.glob("out/.prepare/blocks/*.json")))
        assert finished > 0
        subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
        errors = dupr("prepare", source, disk / "out", *OPTIONS).stderr
        assert "images are in finished shards" in errors
        assert digests(disk / "out") == whole
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_wrong_options_are_named(tmp_path: Path, source: Path) -> None:
    for arguments, message in (
        (("--task", "4/3"), "--task 4/3: give I/N"),
        (("--task", "three"), "--task three: give I/N"),
        (("--engine", "spark"), "use processes or ray"),
        (("--set", "source.kind=folders"), "should be one of auto, archive"),
        (("--set", "image.max_side=9", "--set", "image.min_side=9"), "only one of them"),
        (("--download", "voc2009"), "Did you mean voc20"),
    ):
        done = dupr("prepare", source, tmp_path / "out", *arguments, code=2)
        assert message in done.stderr, done.stderr
        assert not (tmp_path / "out").exists()
    # A folder that is called like a subcommand.
    assert "does not exist" in dupr("prepare", "./verify", tmp_path / "out", code=2).stderr
