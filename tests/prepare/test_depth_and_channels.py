"""Images of one or several channels and 16 bits stay as they are, from any file to the shards."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import sys
import tarfile
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from PIL import Image, ImageOps

from dupr_cli.artifacts.pixel_formats import PixelFormat
from dupr_cli.artifacts.shard_files import Sample, write_shard
from dupr_cli.artifacts.shards import Manifest, Skipped, open_shards
from dupr_cli.datasets.channels import open_channels
from dupr_cli.errors import UsageError
from dupr_cli.prepare.ingest import Ingested, ingest
from dupr_cli.prepare.sources import Entry, RawImage
from dupr_cli.recipe import PrepareRecipe, load_recipe
from tests.support.channel_images import (
    HIGH,
    KEPT,
    LOW,
    blobs,
    grey_png,
    npy,
    scaled,
    statistics,
    write_folder,
)
from tests.support.command_line import dupr
from tests.support.images import encode, noise_image


def take(data: bytes, channels: int, *overrides: str) -> Ingested | Skipped:
    keys = (f"image.channels={channels}", "image.range=[0, 65535]", *overrides)
    recipe = load_recipe(PrepareRecipe, None, list(keys))
    return ingest(Entry("folder/x"), lambda _: RawImage(data), recipe)


def taken(data: bytes, channels: int, *overrides: str) -> Sample:
    found = take(data, channels, *overrides)
    assert isinstance(found, Ingested), found
    return found.sample


def reason(data: bytes, channels: int, *overrides: str) -> str:
    found = take(data, channels, *overrides)
    assert isinstance(found, Skipped), found
    return found.reason


def decoded(sample: Sample) -> NDArray[np.generic]:
    """The values of a member by the library of its format."""
    if sample.extension == "npy":
        values: NDArray[np.generic] = np.load(io.BytesIO(sample.image), allow_pickle=False)
        return values
    return np.asarray(Image.open(io.BytesIO(sample.image)))[..., None]


@given(
    arrays.arrays(
        st.sampled_from(["u1", "<u2", ">u2"]).map(np.dtype),
        arrays.array_shapes(min_dims=3, max_dims=3, max_side=7),
    )
)
@settings(max_examples=80, deadline=None)
def test_every_value_survives(values: NDArray[np.generic]) -> None:
    """Of any depth, byte order, size and number of channels."""
    sample = taken(npy(values), values.shape[2])
    found = decoded(sample)
    assert np.array_equal(found, values)
    assert found.dtype.itemsize == values.dtype.itemsize
    assert sample.depth == 8 * values.dtype.itemsize
    assert (sample.width, sample.height) == (values.shape[1], values.shape[0])
    assert sample.extension == ("png" if values.shape[2] == 1 else "npy")


@given(arrays.arrays(np.uint16, (4, 3, 2)), st.integers(-500, 66_000), st.integers(1, 66_000))
@settings(max_examples=80, deadline=None)
def test_scaling_is_linear_and_cut_at_the_range(
    values: NDArray[np.uint16], low: int, width: int
) -> None:
    found = PixelFormat(2, (low, low + width)).scaled(values)
    assert found == pytest.approx(scaled(values, low, low + width), abs=1e-7)
    assert (found[values <= low] == 0).all()
    assert (found[values >= low + width] == 1).all()


@pytest.mark.parametrize("depth", [8, 16])
def test_large_images_are_scaled_as_small_ones(depth: int) -> None:
    """Their values are looked up in a table of all values."""
    random = np.random.default_rng(0)
    values = random.integers(0, 2**depth, (300, 300, 1)).astype(f"u{depth // 8}")
    pixels = PixelFormat(1, (3.0, 1.7 * 2 ** (depth - 1)))
    small = np.stack([pixels.scaled(row) for row in values])
    assert np.array_equal(pixels.scaled(values), small)
    assert small == pytest.approx(scaled(values, *pixels.range), abs=1e-7)


@pytest.mark.parametrize(
    ("mode", "format_", "channels", "extension"),
    [
        ("L", "PNG", 1, "png"), ("L", "JPEG", 1, "jpg"), ("L", "BMP", 1, "png"),
        ("LA", "PNG", 2, "npy"), ("RGB", "PNG", 3, "npy"), ("RGB", "JPEG", 3, "npy"),
        ("RGBA", "PNG", 4, "npy"),
    ],
)  # fmt: skip
def test_images_of_8_bits_are_kept_as_pillow_decodes_them(
    mode: str, format_: str, channels: int, extension: str
) -> None:
    data = encode(noise_image(0).convert(mode), format_)
    sample = taken(data, channels, "image.range=[0, 255]")
    wanted = np.asarray(Image.open(io.BytesIO(data))).reshape(40, 48, channels)
    assert np.array_equal(decoded(sample), wanted)
    assert (sample.extension, sample.depth) == (extension, 8)
    assert (sample.image == data) == (extension in ("jpg", "png") and format_ != "BMP")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_images_become_upright(orientation: int) -> None:
    """The oracle is Pillow's own transposition."""
    image = Image.fromarray(blobs(0, 1)[..., 0])
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(image, "PNG", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    sample = taken(data, 1)
    assert np.array_equal(decoded(sample)[..., 0], np.asarray(upright))
    assert (sample.width, sample.height) == upright.size
    assert (sample.image == data) == (orientation == 1)  # bytes that need not change stay


def test_shrinking_keeps_the_depth_and_every_channel_apart() -> None:
    values = np.empty((40, 60, 5), dtype=np.uint16)
    values[:] = [0, 1, 300, 40_000, 65_535]
    sample = taken(npy(values), 5, "image.max_side=15")
    assert decoded(sample).shape == (10, 15, 5)
    assert (decoded(sample) == [0, 1, 300, 40_000, 65_535]).all()


def png_of_bits(depth: int, kind: int, side: int = 2) -> bytes:
    """A PNG that Pillow cannot write: of this bit depth, colour type and side, with few pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        checked = name + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, depth, kind, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + bytes(12)))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")


def tiff(values: NDArray[np.generic], **options: object) -> bytes:
    tifffile = pytest.importorskip("tifffile")
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **options)
    return buffer.getvalue()


SIGNED = np.full((4, 5, 2), -3, dtype=np.int16)


@pytest.mark.parametrize(
    ("data", "channels", "because"),
    [
        (b"", 1, "the file is empty"),
        (b"no image", 1, "not an image of a known format"),
        (encode(noise_image(0)), 1, "number of channels: it has 3, image.channels is 1"),
        (grey_png(blobs(0, 1)), 5, "number of channels: it has 1, image.channels is 5"),
        (npy(blobs(0, 4)), 5, "number of channels: it has 4, image.channels is 5"),
        (npy(np.zeros((4, 5, 2), np.float32)), 2, "its values are floats of 32 bits"),
        (npy(np.full((4, 5, 2), np.nan)), 2, "its values are floats of 64 bits"),
        (npy(SIGNED), 2, "its values are signed integers of 16 bits"),
        (npy(np.zeros((4, 5, 2), np.uint32)), 2, "its values are unsigned integers of 32 bits"),
        (npy(np.zeros((4, 5, 2, 2), np.uint8)), 2, "an array of 4 axes"),
        (npy(np.array([[{}]], dtype=object)), 1, "its values are"),
        (npy(blobs(0, 2))[:-9], 2, "does not decode"),
        (grey_png(blobs(0, 1))[:200], 1, "does not decode"),
        (encode(noise_image(0).convert("P"), "PNG"), 1, "it has Pillow's mode P"),
        (encode(noise_image(0).convert("L").convert("F"), "TIFF"), 1, "Pillow's mode F"),
        (encode(noise_image(0).convert("CMYK"), "JPEG"), 4, "Pillow's mode CMYK"),
        (png_of_bits(16, 0, 100_000), 1, "too many pixels: 100000 x 100000"),
        (png_of_bits(4, 0), 1, "fewer than 8 bits"),
        (png_of_bits(16, 2), 3, "16 bits of several channels"),
        (encode(noise_image(0).convert("L"), "GIF", save_all=True,
                append_images=[noise_image(1).convert("L")]), 1, "it has 2 frames"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_is_left_out_with_its_reason(
    data: bytes, channels: int, because: str
) -> None:
    assert because in reason(data, channels)


@pytest.mark.parametrize(
    ("options", "shape", "because"),
    [
        ({"photometric": "miniswhite"}, (6, 5), "white is stored as 0"),
        ({"photometric": "minisblack", "metadata": {"axes": "ZYX"}}, (2, 6, 5), "the axes ZYX"),
        ({"photometric": "minisblack", "metadata": {"axes": "TCYX"}}, (2, 2, 6, 5), "TCYX"),
    ],
)
def test_a_tiff_that_is_no_image_of_channels_is_left_out(
    options: dict[str, object], shape: tuple[int, ...], because: str
) -> None:
    data = tiff(np.arange(np.prod(shape), dtype=np.uint16).reshape(shape), **options)
    assert because in reason(data, 2 if len(shape) > 2 else 1)


@pytest.mark.parametrize("layout", ["pixels", "planes", "pages", "compressed", "turned"])
def test_every_layout_of_a_tiff_is_read(layout: str) -> None:
    values, planes = blobs(3, 5), blobs(3, 5).transpose(2, 0, 1)
    data = {
        "pixels": lambda: tiff(values, photometric="minisblack", planarconfig="contig"),
        "planes": lambda: tiff(planes, photometric="minisblack", planarconfig="separate"),
        "pages": lambda: tiff(planes, photometric="minisblack"),
        "compressed": lambda: tiff(
            values, photometric="minisblack", planarconfig="contig", compression="zlib"
        ),
        "turned": lambda: tiff(
            values[::-1, ::-1], photometric="minisblack", planarconfig="contig",
            extratags=[(274, 3, 1, 3, False)],
        ),
    }[layout]()  # fmt: skip
    assert np.array_equal(decoded(taken(data, 5)), values)


def test_without_tifffile_the_reason_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = [Image.fromarray(np.ascontiguousarray(blobs(0, 5)[..., n])) for n in range(5)]
    data = encode(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    monkeypatch.setitem(sys.modules, "tifffile", None)
    assert "pip install 'dupr-cli[tiff]'" in reason(data, 5)


@pytest.mark.filterwarnings("ignore")  # Pillow warns about odd metadata
@given(st.data())
@settings(max_examples=200, deadline=None)
def test_damage_of_any_kind_is_a_reason_and_no_crash(data: st.DataObject) -> None:
    """Bytes changed, and the end cut off, anywhere in the file."""
    whole = data.draw(st.sampled_from(sorted(files_of_five_channels().items())))[1]
    changed = bytearray(whole)
    # Headers are short, so every second change is aimed at one.
    places = st.one_of(st.integers(0, 300), st.integers(0, len(whole) - 1))
    for place in data.draw(st.lists(places, max_size=6)):
        changed[min(place, len(whole) - 1)] = data.draw(st.integers(0, 255))
    end = data.draw(st.one_of(st.just(len(whole)), st.integers(1, len(whole))))
    found = take(bytes(changed[:end]), 5)
    assert isinstance(found, Ingested | Skipped)
    if isinstance(found, Ingested):
        assert decoded(found.sample).shape[2] == 5


@cache
def files_of_five_channels() -> dict[str, bytes]:
    values = blobs(0, 5)
    layout = {"photometric": "minisblack", "planarconfig": "contig"}
    return {
        "npy": npy(values),
        "tiff": tiff(values, **layout),
        "zlib": tiff(values, **layout, compression="zlib"),
    }


def test_values_that_all_lie_outside_the_range_are_reported() -> None:
    data = npy(blobs(0, 2) + 5000)
    assert "black and white do not fit" in reason(data, 2, "image.range=[0, 4095]")


def test_channels_need_a_range() -> None:
    done = dupr("prepare", "photos", "shards", "--set", "image.channels=5", code=2)
    assert "image.range is null" in done.stderr
    assert "[0, 4095]" in done.stderr
    done = dupr("prepare", "photos", "shards", "--set", "image.channels=grey", code=2)
    assert 'image.channels is "grey", but it should be rgb, or the number of' in done.stderr
    keys = [*KEPT[5], "--set", "image.format=jpeg"]
    assert "no value may change" in dupr("prepare", "photos", "shards", *keys, code=2).stderr


@pytest.fixture(scope="module", params=[1, 5])
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photos/ and its shards/ in one folder, whose name is the number of channels."""
    folder = tmp_path_factory.mktemp("sets") / str(request.param)
    write_folder(folder / "photos", request.param, 12)
    dupr("prepare", folder / "photos", folder / "shards", "--workers", 1, *KEPT[request.param])
    return folder


def test_manifest_and_samples_state_channels_depth_and_range(kept: Path) -> None:
    channels = int(kept.name)
    stated = {"channels": channels, "range": [float(LOW), float(HIGH)]}
    manifest = json.loads((kept / "shards" / "manifest.json").read_text())
    assert manifest["pixels"] == stated
    assert manifest["format_version"] == 2  # a reader of version 1 would scale other values
    with tarfile.open(kept / "shards" / "train-000000.tar") as tar:
        name = next(name for name in tar.getnames() if name.endswith(".json"))
        member = tar.extractfile(name)
        assert member is not None
        assert json.loads(member.read())["pixels"] == {**stated, "depth": 16}


def test_a_manifest_with_a_damaged_format_is_refused(kept: Path, tmp_path: Path) -> None:
    values = json.loads((kept / "shards" / "manifest.json").read_text())
    values["pixels"] = {"channels": "five"}
    (tmp_path / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(UsageError, match="not a whole manifest"):
        Manifest.read(tmp_path)


def test_webdataset_reads_the_same_values(kept: Path) -> None:
    channels = int(kept.name)
    tar = str(kept / "shards" / "train-000000.tar")
    found = []
    for sample in webdataset.WebDataset(tar, shardshuffle=False, empty_check=False):
        if channels == 1:
            found.append(np.asarray(Image.open(io.BytesIO(sample["png"])))[..., None])
        else:
            found.append(np.load(io.BytesIO(sample["npy"])))
    wanted = [blobs(number, channels) for number in range(12)]
    assert all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_shards_are_whole_and_damage_is_found(kept: Path, tmp_path: Path) -> None:
    assert "whole" in dupr("prepare", "verify", kept / "shards", "--workers", 1).stdout
    shards = open_shards(str(kept / "shards"))
    broken = shards[0]
    index = write_shard(
        tmp_path / "train-000000.tar",
        [Sample(broken.key, broken.extension, broken.image[:-40], "", 48, 40,
                pixels=broken.pixels, depth=16)],
    )  # fmt: skip
    assert len(index) == 1
    done = dupr("prepare", "verify", tmp_path, "--workers", 1, code=1)
    assert "does not decode" in done.stdout


def test_stats_measures_what_numpy_measures(kept: Path) -> None:
    channels = int(kept.name)
    images = [blobs(number, channels) for number in range(12)]
    mean, std = statistics(images)
    found = json.loads(dupr("prepare", "stats", kept / "shards", "--json").stdout)
    assert found["mean"] == pytest.approx(mean, abs=1e-6)
    assert found["std"] == pytest.approx(std, abs=1e-6)
    every = np.concatenate([image.reshape(-1, channels) for image in images])
    assert found["kept"]["lowest"] == every.min(0).tolist()
    assert found["kept"]["highest"] == every.max(0).tolist()
    assert found["kept"]["outside"] == pytest.approx(((every < LOW) | (every > HIGH)).mean())


def test_the_contact_sheet_says_what_it_shows(kept: Path, tmp_path: Path) -> None:
    done = dupr("prepare", "view", kept / "shards", "--out", tmp_path / "v.png")
    wanted = "the channel as grey" if kept.name == "1" else "the first three of 5 channels"
    assert wanted in done.stdout
    assert Image.open(tmp_path / "v.png").mode == "RGB"


def test_preparing_again_changes_the_range_and_no_value(kept: Path, tmp_path: Path) -> None:
    """Shards are a source too, and keep what they hold unless they are told otherwise."""
    channels = int(kept.name)
    keys = ["--set", f"image.channels={channels}", "--set", "image.range=[0, 9000]"]
    dupr("prepare", kept / "shards", tmp_path / "again", "--workers", 1, *keys)
    before, now = open_shards(str(kept / "shards")), open_shards(str(tmp_path / "again"))
    assert now.pixels == PixelFormat(channels, (0.0, 9000.0))
    assert [now[n].image for n in range(12)] == [before[n].image for n in range(12)]
    assert now.identity() != before.identity()
    done = dupr("prepare", kept / "shards", tmp_path / "rgb", "--workers", 1, code=1)
    assert "set image.channels and image.range" in done.stderr


def test_arrays_of_another_tool_become_a_set(tmp_path: Path) -> None:
    """WebDataset shards of .npy members and nothing else."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(3):
            data = npy(blobs(number, 5))
            info = tarfile.TarInfo(f"x{number}.npy")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    source = ["--set", "source.kind=shards", *KEPT[5]]
    dupr("prepare", tmp_path / "a.tar", tmp_path / "out", "--workers", 1, *source)
    shards = open_shards(str(tmp_path / "out"))
    for number in range(3):
        picture = open_channels(io.BytesIO(shards[number].image))
        assert np.array_equal(picture.values(), blobs(number, 5))


def test_a_member_of_that_suffix_is_not_lost(tmp_path: Path) -> None:
    """The image would become <key>.npy, which the sample already has."""
    recipe = load_recipe(PrepareRecipe, None, ["image.channels=3", "image.range=[0, 255]"])
    raw = RawImage(encode(noise_image(0), "PNG"), extras={"npy": b"features"})
    found = ingest(Entry("a/x"), lambda _: raw, recipe)
    assert isinstance(found, Skipped)
    assert "another member .npy" in found.reason


def test_duplicates_and_excluded_images_are_found_by_their_look(tmp_path: Path) -> None:
    photos = write_folder(tmp_path / "photos", 1, 4)
    (tmp_path / "photos" / "brighter.png").write_bytes(grey_png(photos[1] + 3))
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "t.png").write_bytes(grey_png(photos[2] + 3))
    keys = [*KEPT[1], "--set", "filter.duplicates=near", "--exclude", tmp_path / "test"]
    dupr("prepare", tmp_path / "photos", tmp_path / "out", "--workers", 1, *keys)
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").open()]
    reasons = {entry["path"]: entry["reason"].partition(":")[0] for entry in skipped}
    assert reasons == {"002.png": "excluded (looks the same)", "brighter.png": "looks like"}


def test_sets_of_rgb_are_those_of_before(tmp_path: Path) -> None:
    """The digests are those that the last version without channels gave to these files."""

    def png(rows: list[bytes]) -> bytes:
        def chunk(name: bytes, data: bytes) -> bytes:
            checked = name + data
            return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

        raw = b"".join(b"\0" + row for row in rows)
        length = struct.pack("<HH", len(raw), len(raw) ^ 0xFFFF)
        stored = b"\x78\x01\x01" + length + raw + struct.pack(">I", zlib.adler32(raw))
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 3, 8, 2, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", stored) + chunk(b"IEND", b"")

    (tmp_path / "photos").mkdir()
    for number in range(3):
        rows = [bytes(range(number + 12 * y, number + 12 * y + 12)) for y in range(3)]
        (tmp_path / "photos" / f"{number}.png").write_bytes(png(rows))
    dupr("prepare", tmp_path / "photos", tmp_path / "out", "--workers", 1)
    digests = {
        name: hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest()
        for name in ("train-000000.tar", "train-000000.index.json")
    }
    assert digests == {
        "train-000000.tar": "893bc96ce3083a519702127422743aa94661c9763f723de65d07aa8057114a8f",
        "train-000000.index.json": (
            "a1bcd747dccd3cd750f6115653b52481cc30291a2d932ebcd431342faa653a1d"
        ),
    }
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert "pixels" not in manifest
    assert manifest["format_version"] == 1
    assert Manifest.read(tmp_path / "out").pixels is None
