"""Fetches the official archives of PASCAL VOC and COCO, checks and unpacks them.

An archive is fetched into `.NAME.part`, and an interrupted download resumes (http Range). When its
MD5 matches the publisher's, the archive is unpacked and deleted; a marker file lists the archives
that were unpacked.
Sources: the MD5 sums of VOC are those of torchvision (`torchvision.datasets.voc`), those of COCO
are as the field publishes them; addresses and sizes are the publishers'.
"""

from __future__ import annotations

import hashlib
import http.client
import shutil
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from dupr_cli.addresses import public_address, without_secrets
from dupr_cli.artifacts.files import naming, write_json
from dupr_cli.artifacts.paced_http import Redirection, request_of
from dupr_cli.errors import RunError, UsageError
from dupr_cli.parsing import read_json
from dupr_cli.progress import Reporter

_VOC = "https://thor.robots.ox.ac.uk/pascal/VOC"
_COCO = "http://images.cocodataset.org"
_CHUNK, _TIMEOUT_SECONDS = 1 << 20, 60
_ATTEMPTS, _DELAY_SECONDS = 8, 1.0


@dataclass(frozen=True)
class Archive:
    """One file of a data set. bytes: its size."""

    address: str
    md5: str
    bytes: int

    @property
    def name(self) -> str:
        return self.address.rpartition("/")[2]


SETS: dict[str, tuple[Archive, ...]] = {
    "voc2007": (
        Archive(
            f"{_VOC}/voc2007/VOCtrainval_06-Nov-2007.tar",
            "c52e279531787c972589f7e41ab4ae64",
            460_032_000,
        ),
        Archive(
            f"{_VOC}/voc2007/VOCtest_06-Nov-2007.tar",
            "b6e924de25625d8de591ea690078ad9f",
            451_020_800,
        ),
    ),
    "voc2012": (
        Archive(
            f"{_VOC}/voc2012/VOCtrainval_11-May-2012.tar",
            "6cd6e144f989b92b3379bac3b3de84fd",
            1_999_639_040,
        ),
    ),
    "coco2017": (
        Archive(
            f"{_COCO}/annotations/annotations_trainval2017.zip",
            "f4bbac642086de4f52a3fdda2de5fa2c",
            252_907_541,
        ),
        Archive(f"{_COCO}/zips/val2017.zip", "442b8da7639aecaf257c1dceb8ba8c80", 815_585_330),
        Archive(f"{_COCO}/zips/train2017.zip", "cced6f7f71b7629ddf16f17bbcfab6b2", 19_336_861_798),
    ),
}


@dataclass(frozen=True)
class DownloadPlan:
    """What remained to be fetched: addresses of archives, and the number of missing bytes."""

    sets: list[str]
    folder: str
    archives: list[str]
    bytes: int


def download_sets(
    names: Sequence[str], folder: Path, mirror: str | None, dry_run: bool, reporter: Reporter
) -> DownloadPlan:
    """Fetch and unpack the sets that are not in `folder` yet.

    mirror: address of a folder that holds the archives under their names. dry_run: only report the
    cost. Raises UsageError for an unknown set or a full disk, RunError when an archive cannot be
    fetched.
    """
    for name in names:
        if name not in SETS:
            near = get_close_matches(name, SETS, 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise UsageError(f"--download {name}: unknown set; known: {', '.join(SETS)}.{hint}")
    missing = [a for name in names for a in SETS[name] if a.name not in _done(folder)]
    if not missing:
        reporter.info(f"{folder}: {', '.join(names)} is already complete")
    rest = {archive: archive.bytes - _fetched(folder, archive) for archive in missing}
    addresses = [f"{mirror.rstrip('/')}/{a.name}" if mirror else a.address for a in missing]
    plan = DownloadPlan(list(names), str(folder), addresses, sum(rest.values()))
    if missing:
        _report_cost(names, missing, rest, folder, reporter)
    if dry_run or not missing:
        return plan
    folder.mkdir(parents=True, exist_ok=True)
    for archive, address in zip(missing, addresses, strict=True):
        part = _part(folder, archive)
        with reporter.task(f"download {archive.name}", archive.bytes, "bytes", 0) as progress:
            progress.advance(_fetched(folder, archive))
            with naming(part):
                _fetch(address, part, archive, progress.advance)
        _check(part, archive, address)
        reporter.info(f"unpacking {archive.name}")
        with naming(folder / archive.name):
            _unpack(part, archive, folder)
        write_json(folder / _MARKER, sorted({*_done(folder), archive.name}))
        part.unlink()
    return plan


_MARKER = ".dupr-downloads.json"


def _done(folder: Path) -> list[str]:
    """Names of the archives that were unpacked into `folder`."""
    try:
        return [str(name) for name in read_json(folder / _MARKER)]
    except (OSError, ValueError, TypeError):
        return []


def _part(folder: Path, archive: Archive) -> Path:
    return folder / f".{archive.name}.part"


def _fetched(folder: Path, archive: Archive) -> int:
    part = _part(folder, archive)
    return part.stat().st_size if part.is_file() else 0


def _report_cost(
    names: Sequence[str],
    missing: Sequence[Archive],
    rest: dict[Archive, int],
    folder: Path,
    reporter: Reporter,
) -> None:
    # Images hardly compress: unpacked files take about as much space as their archive. While an
    # archive is unpacked, both exist.
    needed = sum(a.bytes for a in missing) + max(a.bytes for a in missing)
    needed -= sum(a.bytes - rest[a] for a in missing)
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    reporter.info(
        f"{', '.join(names)}: {len(missing)} archives, {sum(rest.values()):,} bytes to fetch, "
        f"about {needed / 1e9:.1f} GB of disk in {folder} ({free / 1e9:.1f} GB are free)"
    )
    if needed > free:
        raise UsageError(
            f"{folder}: {needed / 1e9:.1f} GB are needed but {free / 1e9:.1f} GB are free. Give a "
            f"SOURCE on another disk."
        )


def _fetch(address: str, part: Path, archive: Archive, advance: Callable[[int], None]) -> None:
    """Download into `part` until it is complete. Raises RunError."""
    failures, public = 0, public_address(address)
    opener = urllib.request.build_opener(Redirection())
    while True:
        have = part.stat().st_size if part.exists() else 0
        if have >= archive.bytes:
            return
        request = request_of(address, {"Range": f"bytes={have}-"})
        try:
            with opener.open(request, timeout=_TIMEOUT_SECONDS) as answer:
                if answer.status != 206 and have:  # the server cannot resume
                    advance(-have)
                    part.unlink()
                with part.open("ab") as file:
                    while data := answer.read(_CHUNK):
                        file.write(data)
                        advance(len(data))
                        failures = 0
            reason = f"the answer ended after {part.stat().st_size} of {archive.bytes} bytes"
        except urllib.error.HTTPError as error:
            answer = f"{error.code} {http.client.responses.get(error.code, '')}".strip()
            if error.code in (401, 403, 404, 410):
                raise RunError(
                    f"{public} cannot be fetched: {answer}. Give another "
                    f"address for the archives with --mirror URL."
                ) from error
            reason = answer
        except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
            reason = str(error) or type(error).__name__
        except urllib.error.URLError as error:
            reason = str(error.reason)
        if part.exists() and part.stat().st_size >= archive.bytes:
            return
        failures += 1
        if failures >= _ATTEMPTS:
            raise RunError(
                f"{public} cannot be fetched: {without_secrets(reason)}, {failures} times. "
                f"Give the same command again later; it continues after {_size(part):,} bytes."
            )
        time.sleep(_DELAY_SECONDS * 2 ** (failures - 1))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _check(part: Path, archive: Archive, address: str) -> None:
    with part.open("rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found != archive.md5:
        part.unlink()
        raise RunError(
            f"{public_address(address)}: its MD5 is {found}, the publisher's is {archive.md5}. The "
            f"file was deleted; give the same command again, or another --mirror."
        )


def _unpack(part: Path, archive: Archive, folder: Path) -> None:
    try:
        if archive.name.endswith(".zip"):
            with zipfile.ZipFile(part) as opened:
                opened.extractall(folder)
        else:
            with tarfile.open(part) as tar:
                tar.extractall(folder, filter="data")
    except (tarfile.TarError, zipfile.BadZipFile) as error:
        raise RunError(f"{archive.name} cannot be unpacked: {error}.") from error
