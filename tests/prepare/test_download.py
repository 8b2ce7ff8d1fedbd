"""Official archives from a real server: resumed, checked, unpacked, and prepared."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest

from dupr_cli.artifacts.shards import open_shards
from dupr_cli.errors import RunError, UsageError
from dupr_cli.prepare import download
from dupr_cli.prepare.download import SETS, Archive, download_sets
from dupr_cli.progress import SilentReporter
from tests.support.command_line import dupr
from tests.support.images import encode, noise_image
from tests.support.servers import serve

ANNOTATION = (
    "<annotation><size><width>48</width><height>40</height></size><object><name>cat</name>"
    "<bndbox><xmin>3</xmin><ymin>2</ymin><xmax>10</xmax><ymax>9</ymax></bndbox></object>"
    "</annotation>"
)


def voc_tar(ids: list[str], split: str) -> bytes:
    """As VOC packs a year."""
    buffer = io.BytesIO()
    root = "VOCdevkit/VOC2007"
    files = {f"{root}/ImageSets/Main/{split}.txt": "\n".join(ids).encode()}
    for number, name in enumerate(ids):
        files[f"{root}/JPEGImages/{name}.jpg"] = encode(noise_image(number))
        files[f"{root}/Annotations/{name}.xml"] = ANNOTATION.encode()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small archives under the names of the real ones, with their own MD5."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    contents = {
        "VOCtrainval_06-Nov-2007.tar": voc_tar(["000001", "000002"], "trainval"),
        "VOCtest_06-Nov-2007.tar": voc_tar(["000003"], "test"),
    }
    archives = []
    for archive in SETS["voc2007"]:
        data = contents[archive.name]
        (folder / archive.name).write_bytes(data)
        md5 = hashlib.md5(data).hexdigest()
        archives.append(Archive(archive.address, md5, len(data)))
    monkeypatch.setitem(SETS, "voc2007", tuple(archives))
    monkeypatch.setattr(download, "_DELAY_SECONDS", 0.01)
    monkeypatch.setattr(download, "_CHUNK", 4096)
    return folder


def fetch(folder: Path, address: str, dry_run: bool = False) -> None:
    download_sets(["voc2007"], folder, address, dry_run, SilentReporter())


def test_the_archives_are_the_publishers() -> None:
    assert all(len(archive.md5) == 32 for archives in SETS.values() for archive in archives)
    names = [archive.name for archive in SETS["coco2017"]]
    assert names == ["annotations_trainval2017.zip", "val2017.zip", "train2017.zip"]


def test_a_set_is_fetched_unpacked_and_prepared_by_one_command(
    mirror: Path, tmp_path: Path
) -> None:
    source, out = tmp_path / "voc", tmp_path / "shards"
    with serve(mirror) as served:
        arguments = ("prepare", source, out, "--download", "voc2007", "--mirror", served.url)
        told = dupr(*arguments, "--dry-run")
        assert "2 archives, " in told.stderr
        assert "bytes to fetch" in told.stderr
        assert not source.exists()
        assert not served.requests
        done = json.loads(dupr(*arguments, "--json").stdout)
        assert done["samples"] == {"trainval": 2, "test": 1}
        before = len(served.requests)
        dupr(*arguments)  # everything is there
        assert len(served.requests) == before
    boxes = open_shards(str(out), "test")[0].boxes
    assert boxes is not None
    assert boxes[0].corners == (2, 1, 10, 9)
    assert [p.name for p in source.iterdir() if p.name.endswith(".part")] == []


@pytest.mark.parametrize("fail_every", [2, 3])
def test_what_was_fetched_is_not_asked_for_again(
    mirror: Path, tmp_path: Path, fail_every: int
) -> None:
    folder = tmp_path / "voc"
    folder.mkdir()
    whole = (mirror / "VOCtest_06-Nov-2007.tar").read_bytes()
    # Half of the second archive is there from an interrupted call.
    (folder / ".VOCtest_06-Nov-2007.tar.part").write_bytes(whole[:7000])
    sent: list[int] = []
    with serve(mirror, fail_every=fail_every) as served:
        served.on_send = sent.append
        fetch(folder, served.url)
    assert (folder / "VOCdevkit/VOC2007/JPEGImages/000003.jpg").exists()
    # The first archive, and then the second half of the other.
    assert sent == [(mirror / "VOCtrainval_06-Nov-2007.tar").stat().st_size, len(whole) - 7000]


def test_a_wrong_file_is_not_unpacked(mirror: Path, tmp_path: Path) -> None:
    tar = mirror / "VOCtest_06-Nov-2007.tar"
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(data)
    with serve(mirror) as served:
        with pytest.raises(RunError, match=r"VOCtest.*its MD5 is .* the publisher's is"):
            fetch(tmp_path / "voc", served.url)
        assert not (tmp_path / "voc/VOCdevkit/VOC2007/JPEGImages/000003.jpg").exists()
        assert not list((tmp_path / "voc").glob(".VOCtest*"))
        # The first archive is not fetched again.
        data[700] ^= 1
        tar.write_bytes(data)
        served.requests.clear()
        fetch(tmp_path / "voc", served.url)
        assert served.requests == ["/VOCtest_06-Nov-2007.tar"]


def test_what_cannot_be_had_is_one_message(mirror: Path, tmp_path: Path) -> None:
    (mirror / "VOCtest_06-Nov-2007.tar").unlink()
    with serve(mirror) as served, pytest.raises(RunError, match=r"404.*--mirror"):
        fetch(tmp_path / "voc", served.url)
    with pytest.raises(RunError, match=r"cannot be fetched: .* it continues after 0 bytes"):
        fetch(tmp_path / "other", served.url)
    with pytest.raises(UsageError, match=r"known: voc2007, .* Did you mean voc2012"):
        download_sets(["voc212"], tmp_path, None, False, SilentReporter())


def test_a_full_disk_is_said_before_it_starts(
    mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    huge = Archive("http://x/huge.zip", "0" * 32, 10**18)
    monkeypatch.setitem(SETS, "voc2007", (huge,))
    with pytest.raises(UsageError, match=r"GB are needed but .* are free"):
        fetch(tmp_path / "voc", "http://x")
    assert not (tmp_path / "voc").exists()


def test_zip_archives_are_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m").mkdir()
    with zipfile.ZipFile(tmp_path / "m" / "val2017.zip", "w") as opened:
        opened.writestr("val2017/a.jpg", encode(noise_image(0)))
    data = (tmp_path / "m" / "val2017.zip").read_bytes()
    archive = Archive("http://x/val2017.zip", hashlib.md5(data).hexdigest(), len(data))
    monkeypatch.setitem(SETS, "coco2017", (archive,))
    with serve(tmp_path / "m") as served:
        download_sets(["coco2017"], tmp_path / "coco", served.url, False, SilentReporter())
    assert (tmp_path / "coco/val2017/a.jpg").read_bytes() == encode(noise_image(0))
