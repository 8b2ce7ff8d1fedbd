"""prepare: everything good arrives once, everything bad is named, and the bytes do not vary."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dupr_cli import prepare
from dupr_cli.artifacts.shards import Box, Manifest, Sample, Skipped, open_shards
from dupr_cli.errors import RunError, UsageError
from dupr_cli.prepare.ingest import ingest
from dupr_cli.prepare.sources import RawImage, open_source
from dupr_cli.recipe import PrepareRecipe, load_recipe
from dupr_cli.recipe.prepare import ImageSection
from tests.artifacts.test_artifacts import voc_year
from tests.conftest import encode, noise_image, write_shards

SMALL = load_recipe(PrepareRecipe, None, ["shard.max_samples=5"])


def digests(folder: Path) -> dict[str, str]:
    """sha256 of everything that prepare wrote."""
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.iterdir())
        if p.is_file()
    }


def test_folder_becomes_full_shards_in_order_with_untouched_bytes(
    image_folder: Path, tmp_path: Path
) -> None:
    result = prepare.run(SMALL, image_folder, tmp_path / "out", workers=1)
    assert result.samples == {"train": 24}
    manifest = Manifest.read(tmp_path / "out")
    assert [entry.samples for entry in manifest.splits["train"]] == [5, 5, 5, 5, 4]
    shards = open_shards(str(tmp_path / "out"), "train")
    found = [shards[i] for i in range(24)]
    assert [s.source for s in found] == sorted(s.source for s in found)
    for sample in found:
        assert sample.image == (image_folder / sample.source).read_bytes()
        assert (sample.width, sample.height) == Image.open(image_folder / sample.source).size
    assert (tmp_path / "out" / "skipped.jsonl").read_text() == ""


@pytest.mark.parametrize("workers", [2, 5])
def test_output_does_not_depend_on_the_number_of_workers(
    image_folder: Path, tmp_path: Path, workers: int
) -> None:
    (image_folder / "bad.jpg").write_bytes(b"\xff\xd8 no")
    prepare.run(SMALL, image_folder, tmp_path / "one", workers=1)
    prepare.run(SMALL, image_folder, tmp_path / "many", workers=workers)
    assert digests(tmp_path / "one") == digests(tmp_path / "many")


def damaged(name: str) -> bytes:
    whole = encode(noise_image(1, 200, 150))
    return {
        "truncated.jpg": whole[: len(whole) // 2],
        "empty.jpg": b"",
        "text.jpg": b"this is a text",
        "cut.png": encode(noise_image(2), "PNG")[:-200],
    }[name]


def test_bad_files_are_listed_with_their_reasons_and_good_ones_kept(
    image_folder: Path, tmp_path: Path
) -> None:
    names = ("truncated.jpg", "empty.jpg", "text.jpg", "cut.png")
    for name in names:
        (image_folder / name).write_bytes(damaged(name))
    (image_folder / "wrong-suffix.jpg").write_bytes(encode(noise_image(3), "PNG"))
    (image_folder / "notes.txt").write_text("left alone")
    result = prepare.run(SMALL, image_folder, tmp_path / "out", workers=1)
    lines = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    reasons = {entry["path"]: entry["reason"] for entry in map(json.loads, lines)}
    assert set(reasons) == set(names)
    assert reasons["empty.jpg"] == "the file is empty"
    assert reasons["text.jpg"] == "not an image of a known format"
    assert reasons["truncated.jpg"].startswith("does not decode")
    assert reasons["cut.png"].startswith("does not decode")
    assert result.samples == {"train": 25}
    assert result.skipped == 4
    shards = open_shards(str(tmp_path / "out"))
    renamed = next(s for s in map(shards.__getitem__, range(25)) if "wrong" in s.key)
    assert renamed.extension == "png"


class Item:
    """An item of a source that holds what it is given."""

    name = "x"
    key = "x"

    def __init__(self, data: bytes, boxes: tuple[Box, ...] | None = None) -> None:
        self.raw = RawImage(data, boxes)

    def read(self) -> RawImage:
        return self.raw


def ingested(data: bytes, boxes: tuple[Box, ...] | None = None) -> Sample:
    result = ingest(Item(data, boxes), ImageSection())  # type: ignore[arg-type]
    assert isinstance(result, Sample), result
    return result


@pytest.mark.parametrize(
    ("mode", "format_"),
    [
        ("L", "JPEG"),
        ("CMYK", "JPEG"),
        ("P", "PNG"),
        ("LA", "PNG"),
        ("RGBA", "PNG"),
        ("I;16", "PNG"),
        ("1", "PNG"),
        ("RGB", "BMP"),
        ("RGB", "TIFF"),
        ("RGBA", "WEBP"),
        ("P", "GIF"),
    ],
)
def test_every_mode_and_format_becomes_rgb(mode: str, format_: str) -> None:
    base = noise_image(0)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(base.convert("L")).astype(np.uint16) * 257)
    else:
        image = base.convert(mode)
    sample = ingested(encode(image, format_))
    stored = Image.open(io.BytesIO(sample.image))
    assert stored.mode == "RGB"
    assert sample.extension in ("jpg", "png", "webp")
    gray = [np.asarray(i.convert("L"), dtype=float) for i in (base, stored)]
    limit = 128 if mode == "1" else 12  # dithering changes every pixel, but not the mean
    assert np.abs(gray[0] - gray[1]).mean() < limit
    assert abs(gray[0].mean() - gray[1].mean()) < 12


@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=40)
@given(
    orientation=st.integers(1, 8),
    width=st.integers(12, 60),
    height=st.integers(12, 60),
    data=st.data(),
)
def test_boxes_turn_with_the_image(
    orientation: int, width: int, height: int, data: st.DataObject
) -> None:
    x0 = data.draw(st.integers(0, width - 8))
    y0 = data.draw(st.integers(0, height - 8))
    x1, y1 = data.draw(st.integers(x0 + 4, width)), data.draw(st.integers(y0 + 4, height))
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[y0:y1, x0:x1] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = encode(Image.fromarray(pixels), "PNG", exif=exif)
    sample = ingested(stored, (Box("a", x0, y0, x1, y1),))
    upright = np.asarray(Image.open(io.BytesIO(sample.image)))[..., 0] > 128
    ys, xs = np.nonzero(upright)
    assert sample.boxes is not None
    expected = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
    assert sample.boxes[0].corners == expected
    assert (sample.width, sample.height) == upright.shape[::-1]


def test_decompression_bomb_is_skipped_by_its_header() -> None:
    data = encode(Image.new("1", (4000, 4000)), "PNG")
    result = ingest(Item(data), ImageSection(max_pixels=1_000_000))  # type: ignore[arg-type]
    assert isinstance(result, Skipped)
    assert "4000 x 4000 pixels, more than image.max_pixels = 1000000" in result.reason


def test_voc_tree_becomes_labelled_splits(tmp_path: Path) -> None:
    tree = voc_year(
        tmp_path / "VOCdevkit" / "VOC2012",
        "<object><name>cat</name><bndbox><xmin>3</xmin><ymin>2</ymin><xmax>10</xmax>"
        "<ymax>9</ymax></bndbox></object>",
        split="a\n",
    )
    (tree.root / "ImageSets/Main/val.txt").write_text("b\nmissing\n")
    (tree.root / "Annotations/b.xml").write_text("<annotation/>")
    for name in ("a", "b"):
        noise_image(1).save(tree.root / "JPEGImages" / f"{name}.jpg")
    result = prepare.run(SMALL, tmp_path, tmp_path / "out", workers=1)
    assert result.samples == {"train": 1, "val": 1}
    assert result.skip_reasons == {"cannot be used": 1}
    assert Manifest.read(tmp_path / "out").classes == ["cat"]
    sample = open_shards(str(tmp_path / "out"), "train")[0]
    assert (sample.key, sample.boxes) == ("a", (Box("cat", 2, 1, 10, 9),))


def test_shards_can_be_sharded_again(tmp_path: Path) -> None:
    source = write_shards(tmp_path / "source", 30)
    prepare.run(SMALL, source, tmp_path / "out", workers=1)
    before, after = (open_shards(str(p)) for p in (source, tmp_path / "out"))
    assert [before[i].image for i in range(30)] == [after[i].image for i in range(30)]
    assert len(after.shards) == 6


def test_finished_output_is_left_alone_and_another_recipe_is_refused(
    image_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    prepare.run(SMALL, image_folder, out, workers=1)
    before = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    prepare.run(SMALL, image_folder, out, workers=1)
    assert {p: p.stat().st_mtime_ns for p in out.iterdir()} == before
    other = load_recipe(PrepareRecipe, None, ["shard.max_samples=7"])
    with pytest.raises(UsageError, match="another source or recipe"):
        prepare.run(other, image_folder, out, workers=1)
    assert {p: p.stat().st_mtime_ns for p in out.iterdir()} == before
    result = prepare.run(other, image_folder, out, workers=1, overwrite=True)
    assert result.shards == 4
    assert len(list(out.glob("*.tar"))) == 4


def test_damaged_manifest_can_be_overwritten(image_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare.run(SMALL, image_folder, out, workers=1)
    before = digests(out)
    (out / "manifest.json").write_text("{")
    with pytest.raises(UsageError, match="another source or recipe"):
        prepare.run(SMALL, image_folder, out, workers=1)
    prepare.run(SMALL, image_folder, out, workers=1, overwrite=True)
    assert digests(out) == before


def test_source_without_a_usable_image_leaves_an_output_that_can_be_used(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    (source / "a.jpg").write_bytes(b"x")
    with pytest.raises(RunError, match="none of 1 images could be used"):
        prepare.run(SMALL, source, out, workers=1)
    assert list(out.iterdir()) == []
    noise_image(0).save(source / "b.jpg")
    assert prepare.run(SMALL, source, out, workers=1).samples == {"train": 1}


def test_foreign_directory_is_never_written_into(image_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="not empty and holds no shards"):
            prepare.run(SMALL, image_folder, out, workers=1, overwrite=overwrite)
    assert [p.name for p in out.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("stop_after", [0, 1, 3])
def test_interrupted_output_is_finished_with_the_same_bytes(
    image_folder: Path, tmp_path: Path, stop_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (image_folder / "a-bad.jpg").write_bytes(b"no")
    prepare.run(SMALL, image_folder, tmp_path / "whole", workers=1)
    from dupr_cli.artifacts.shards import ShardWriter

    finish, count = ShardWriter.finish, iter(range(100))

    def failing(self: ShardWriter, *arguments: object) -> object:
        if next(count) == stop_after:
            raise KeyboardInterrupt
        return finish(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(ShardWriter, "finish", failing)
    with pytest.raises(KeyboardInterrupt):
        prepare.run(SMALL, image_folder, tmp_path / "cut", workers=1)
    monkeypatch.undo()
    with pytest.raises(UsageError, match="did not finish here"):
        open_shards(str(tmp_path / "cut"), "train")
    prepare.run(SMALL, image_folder, tmp_path / "cut", workers=1)
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")


def test_wrong_sources(tmp_path: Path) -> None:
    empty, text = tmp_path / "empty", tmp_path / "text"
    empty.mkdir()
    text.mkdir()
    (text / "a.txt").write_text("x")
    out = tmp_path / "out"
    for source, message in (
        (tmp_path / "nowhere", "there is no such folder"),
        (empty, "the folder is empty"),
        (text, "no images in it, at any depth"),
    ):
        with pytest.raises(UsageError, match=message):
            open_source(source, SMALL, out)
    (text / "a.jpg").write_bytes(b"x")
    with pytest.raises(RunError, match="none of 1 images could be used"):
        prepare.run(SMALL, text, out, workers=1)
