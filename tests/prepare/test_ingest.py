"""One image in, one sample or one reason out: every kind of file that people have."""

from __future__ import annotations

import io
import json
import os
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dupr_cli import prepare
from dupr_cli.artifacts.labels import Box
from dupr_cli.artifacts.shard_files import Sample
from dupr_cli.artifacts.shards import Skipped, open_shards
from dupr_cli.prepare.ingest import Ingested, ingest
from dupr_cli.prepare.sources import Entry, RawImage
from dupr_cli.recipe import PrepareRecipe, load_recipe
from tests.support.images import encode, noise_image


def take(raw: RawImage | bytes, *overrides: str) -> Ingested | Skipped:
    image = raw if isinstance(raw, RawImage) else RawImage(raw)
    recipe = load_recipe(PrepareRecipe, None, list(overrides))
    return ingest(Entry("folder/x"), lambda _: image, recipe)


def taken(raw: RawImage | bytes, *overrides: str) -> Sample:
    found = take(raw, *overrides)
    assert isinstance(found, Ingested), found
    return found.sample


def reason(raw: RawImage | bytes, *overrides: str) -> str:
    found = take(raw, *overrides)
    assert isinstance(found, Skipped), found
    return found.reason


def rotated(image: Image.Image, orientation: int, format_: str = "PNG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image, format_, exif=exif)


def animated(format_: str) -> bytes:
    frames = [noise_image(n) for n in range(3)]
    return encode(frames[0], format_, save_all=True, append_images=frames[1:])


def with_preview() -> bytes:
    """As cameras write it: a JPEG with a second, smaller one behind it."""
    return encode(noise_image(0), "MPO", save_all=True, append_images=[noise_image(1, 24, 20)])


@pytest.mark.parametrize(
    ("mode", "format_"),
    [
        ("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG"), ("LA", "PNG"), ("RGBA", "PNG"),
        ("I;16", "PNG"), ("I;16", "TIFF"), ("1", "PNG"), ("RGB", "BMP"), ("RGB", "TIFF"),
        ("RGBA", "WEBP"), ("P", "GIF"), ("RGB", "PPM"), ("RGB", "TGA"), ("F", "TIFF"),
    ],
)  # fmt: skip
def test_every_mode_and_format_becomes_rgb(mode: str, format_: str) -> None:
    base = noise_image(0)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(base.convert("L")).astype(np.uint16) * 257)
    else:
        image = base.convert(mode)
    sample = taken(encode(image, format_))
    stored = Image.open(io.BytesIO(sample.image))
    assert stored.mode == "RGB"
    assert sample.extension in ("jpg", "png", "webp")
    gray = [np.asarray(i.convert("L"), dtype=float) for i in (base, stored)]
    limit = 128 if mode == "1" else 12  # dithering changes every pixel, but not the mean
    assert np.abs(gray[0] - gray[1]).mean() < limit
    assert abs(gray[0].mean() - gray[1].mean()) < 12


@pytest.mark.parametrize("format_", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_stays(format_: str) -> None:
    sample = taken(animated(format_))
    stored = Image.open(io.BytesIO(sample.image))
    assert (stored.mode, getattr(stored, "n_frames", 1)) == ("RGB", 1)
    first = np.asarray(noise_image(0), dtype=float)
    assert np.abs(np.asarray(stored, dtype=float) - first).mean() < 12


def test_of_thousands_of_frames_only_the_first_is_decoded() -> None:
    frames = [Image.new("L", (32, 32), number % 250) for number in range(10_000)]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=10)
    control = b"\x21\xf9"  # begins the block before each frame
    second = data.index(control, data.index(control) + 1)
    assert taken(data).width == 32
    assert taken(data[: second + 10] + bytes(len(data) - second - 10)).width == 32


@pytest.mark.parametrize("ring", [False, True])
def test_of_many_pages_the_first_stays(ring: bool) -> None:
    pages = [Image.new("RGB", (32, 24), (number, 0, 0)) for number in range(200)]
    data = bytearray(encode(pages[0], "TIFF", save_all=True, append_images=pages[1:]))
    if ring:  # the page after the first is the first
        first = struct.unpack("<I", data[4:8])[0]
        after = first + 2 + 12 * struct.unpack("<H", data[first : first + 2])[0]
        data[after : after + 4] = struct.pack("<I", first)
    stored = Image.open(io.BytesIO(taken(bytes(data)).image))
    assert stored.convert("RGB").getpixel((5, 5)) == (0, 0, 0)


def test_names_that_windows_reserves_are_kept_apart(tmp_path: Path) -> None:
    """And no key is one of them, so that the shards can be unpacked there."""
    names = ["CON.png", "aux.png", "NUL.txt.png", "COM1.png", "a:b.png", "a?.png", "end .png"]
    for number, name in enumerate(names):
        (tmp_path / "source").mkdir(exist_ok=True)
        noise_image(number).save(tmp_path / "source" / name)
    prepare.run(load_recipe(PrepareRecipe, None), tmp_path / "source", tmp_path / "out", workers=1)
    shards = open_shards(str(tmp_path / "out"))
    assert {shards[number].source for number in range(len(shards))} == set(names)
    keys = {shards[number].key for number in range(len(shards))}
    assert all(re.fullmatch(r"[\w-]+-[0-9a-f]{10}", key) for key in keys), keys


# With 200 MiB more than the imported program holds.
WITH_LITTLE_MEMORY = """
import resource
from pathlib import Path
from dupr_cli import prepare
from dupr_cli.__main__ import main
held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + (200 << 20), held + (200 << 20)))
main()
"""


def with_little_memory(*words: object) -> subprocess.CompletedProcess[str]:
    """A fresh process: one forked from the tests would inherit memory that they have freed."""
    command = [sys.executable, "-c", WITH_LITTLE_MEMORY, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_an_image_for_which_memory_is_lacking_is_not_called_damaged(tmp_path: Path) -> None:
    """With more memory, the same command takes it."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    noise_image(1).save(source / "a.png")
    (source / "b.png").write_bytes(black_png(13_000))  # 645 MiB when decoded
    done = with_little_memory("prepare", source, out, "--workers", "1")
    assert done.returncode == 1, done.stderr
    assert "error: b.png: memory ran out while the image was read. Use fewer" in done.stderr
    assert "Traceback" not in done.stderr
    assert prepare.run("default", source, out, workers=1).samples == {"train": 2}
    shown = with_little_memory("prepare", "view", out, "--out", tmp_path / "view.png")
    assert shown.returncode == 1, shown.stderr
    assert "error: out of memory" in shown.stderr
    assert not (tmp_path / "view.png").exists()


def test_neither_is_one_of_several_channels(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for name, side in (("a", 64), ("b", 8000)):
        tifffile.imwrite(
            source / f"{name}.tif", np.zeros((side, side, 5), np.uint8), photometric="minisblack",
            planarconfig="contig", compression="zlib", compressionargs={"level": 1},
        )  # fmt: skip
    keys = ("--set", "image.channels=5", "--set", "image.range=[0, 255]")
    done = with_little_memory("prepare", source, out, "--workers", "1", *keys)
    assert done.returncode == 1, done.stderr
    assert "error: b.tif: memory ran out while the image was read. Use fewer" in done.stderr


def test_a_cameras_jpeg_with_a_preview_keeps_its_bytes() -> None:
    data = with_preview()
    assert Image.open(io.BytesIO(data)).format == "MPO"
    sample = taken(data)
    assert (sample.image, sample.extension) == (data, "jpg")


rectangles = st.tuples(
    st.integers(40, 90), st.integers(40, 90), st.floats(0, 0.5), st.floats(0, 0.5),
    st.floats(0.3, 0.5), st.floats(0.3, 0.5),
)  # fmt: skip


@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=60)
@given(
    rectangle=rectangles,
    orientation=st.integers(1, 8),
    resize=st.sampled_from(["", "image.max_side=35", "image.min_side=24", "image.max_side=500"]),
    resample=st.sampled_from(["lanczos", "area"]),
    format_=st.sampled_from(["PNG", "JPEG"]),
    frame=st.sampled_from(["stored", "upright", "unit"]),
)
def test_boxes_stay_on_their_object(
    rectangle: tuple[int, int, float, float, float, float],
    orientation: int,
    resize: str,
    resample: str,
    format_: str,
    frame: str,
) -> None:
    """A white rectangle is found, to half a pixel, where its box went."""
    width, height = rectangle[:2]
    x0, y0 = int(rectangle[2] * width), int(rectangle[3] * height)
    x1, y1 = x0 + int(rectangle[4] * width), y0 + int(rectangle[5] * height)
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[y0:y1, x0:x1] = 255
    stored = Image.fromarray(pixels)
    # What Pillow sees upright, an oracle for both the picture and its labels.
    with Image.open(io.BytesIO(rotated(stored, orientation))) as opened:
        from PIL import ImageOps

        upright = np.asarray(ImageOps.exif_transpose(opened))[..., 0] > 128
    ys, xs = np.nonzero(upright)
    corners = (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)
    side = (upright.shape[1], upright.shape[0])
    data = rotated(stored, orientation, format_)
    details = {"segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]]}
    if frame == "stored":
        raw = RawImage(data, (Box("a", x0, y0, x1, y1, details=details),))
    elif frame == "upright":
        raw = RawImage(data, (Box("a", *corners),), upright=True)
    else:
        shares = (c / side[i % 2] for i, c in enumerate(corners))
        raw = RawImage(data, (Box("a", *shares),), upright=True, unit=True)
    overrides = [f"image.resample={resample}", *([resize] if resize else [])]
    sample = taken(raw, *overrides)
    assert sample.boxes is not None
    box = sample.boxes[0]
    scale = (sample.width / side[0], sample.height / side[1])
    assert box.corners == pytest.approx([c * scale[i % 2] for i, c in enumerate(corners)])
    if frame == "stored":
        flat = box.details["segmentation"][0]
        assert (min(flat[::2]), max(flat[::2])) == pytest.approx((box.x_min, box.x_max))
        assert (min(flat[1::2]), max(flat[1::2])) == pytest.approx((box.y_min, box.y_max))
    # The edges in the picture: where the white begins, by its share of the middle row and column.
    found = np.asarray(Image.open(io.BytesIO(sample.image)).convert("L"), dtype=float) / 255
    middle_y = int((box.y_min + box.y_max) / 2)
    middle_x = int((box.x_min + box.x_max) / 2)
    row, column = found[middle_y].clip(0, 1), found[:, middle_x].clip(0, 1)
    assert row.sum() == pytest.approx(box.x_max - box.x_min, abs=1)
    assert column.sum() == pytest.approx(box.y_max - box.y_min, abs=1)
    centre_x = (row * (np.arange(len(row)) + 0.5)).sum() / row.sum()
    centre_y = (column * (np.arange(len(column)) + 0.5)).sum() / column.sum()
    assert centre_x == pytest.approx((box.x_min + box.x_max) / 2, abs=0.5)
    assert centre_y == pytest.approx((box.y_min + box.y_max) / 2, abs=0.5)


def test_labels_drawn_on_the_upright_image_are_known_by_its_size() -> None:
    data = rotated(noise_image(0, 48, 40), 6)
    box = Box("a", 1, 2, 3, 4)
    upright = taken(RawImage(data, (box,), size=(40, 48)))
    assert upright.boxes == (box,)
    stored = taken(RawImage(data, (box,), size=(48, 40)))
    assert stored.boxes is not None
    assert stored.boxes[0].corners == (36, 1, 38, 3)


def test_resizing_never_enlarges_and_keeps_bytes_that_fit() -> None:
    data = encode(noise_image(0, 100, 60))
    assert taken(data, "image.max_side=100").image == data
    assert taken(data, "image.min_side=60").image == data
    sample = taken(data, "image.max_side=50")
    assert (sample.width, sample.height) == (50, 30)
    sample = taken(data, "image.min_side=30")
    assert (sample.width, sample.height) == (50, 30)
    assert Image.open(io.BytesIO(sample.image)).size == (50, 30)


@pytest.mark.parametrize(("name", "format_"), [("jpeg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")])
def test_a_format_is_kept_or_made(name: str, format_: str) -> None:
    for source in ("JPEG", "PNG", "WEBP", "BMP"):
        data = encode(noise_image(0), source)
        sample = taken(data, f"image.format={name}")
        assert Image.open(io.BytesIO(sample.image)).format == format_
        assert (sample.image == data) == (source == format_)


def test_filters_say_what_was_too_much() -> None:
    data = encode(noise_image(0, 90, 20))
    assert "too small: 90 x 20" in reason(data, "filter.min_side=21")
    assert "too long: 90 x 20" in reason(data, "filter.max_aspect=4")
    assert taken(data, "filter.min_side=20", "filter.max_aspect=4.5").image == data
    bomb = encode(Image.new("1", (4000, 4000)), "PNG")
    message = "4000 x 4000, more than image.max_pixels = 1000000"
    assert message in reason(bomb, "image.max_pixels=1000000")


def test_how_much_is_decoded_is_the_recipes() -> None:
    whole = encode(noise_image(1, 200, 150), quality=95)
    cut = whole[: len(whole) // 2]
    assert "does not decode" in reason(cut)
    assert taken(cut, "image.verify=header").image == cut
    sampled = load_recipe(PrepareRecipe, None, ["image.verify=sampled"])
    found = [ingest(Entry(f"{n}.jpg"), lambda _: RawImage(cut), sampled) for n in range(400)]
    assert 5 <= sum(isinstance(result, Skipped) for result in found) <= 45


def png(side: int, compressed: bytes) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", compressed) + chunk(b"IEND", b"")


def png_bomb() -> bytes:
    """A header that promises 100,000 x 100,000 pixels."""
    return png(100_000, zlib.compress(b"0" * 1000))


def black_png(side: int) -> bytes:
    """Made row by row: memory that the test has freed would be there for what it forks."""
    rows = zlib.compressobj(1)
    parts = [rows.compress(bytes(1 + 3 * side)) for _ in range(side)]
    return png(side, b"".join([*parts, rows.flush()]))


GOOD: dict[str, Callable[[int], tuple[str, bytes]]] = {
    "jpeg": lambda n: (".jpg", encode(noise_image(n))),
    "png": lambda n: (".PNG", encode(noise_image(n), "PNG")),
    "webp": lambda n: (".webp", encode(noise_image(n), "WEBP")),
    "jpeg called png": lambda n: (".png", encode(noise_image(n))),
}
CHANGED: dict[str, Callable[[int], tuple[str, bytes]]] = {
    "cmyk": lambda n: (".jpg", encode(noise_image(n).convert("CMYK"))),
    "grey": lambda n: (".jpeg", encode(noise_image(n).convert("L"))),
    "rotated": lambda n: (".jpg", rotated(noise_image(n), 2 + n % 7, "JPEG")),
    "palette with alpha": lambda n: (
        ".png", encode(noise_image(n).quantize(32), "PNG", transparency=3)
    ),
    "16 bit": lambda n: (
        ".png", encode(Image.fromarray(np.full((20, 30), 257 * (100 + n % 100), np.uint16)), "PNG")
    ),
    "animated": lambda n: (
        ".gif", encode(noise_image(n), "GIF", save_all=True, append_images=[noise_image(n + 1)])
    ),
    "bmp": lambda n: (".bmp", encode(noise_image(n), "BMP")),
}  # fmt: skip
BAD: dict[str, tuple[str, Callable[[int], tuple[str, bytes]]]] = {
    "empty": ("the file is empty", lambda _: (".jpg", b"")),
    "text": ("not an image of a known format", lambda n: (".jpg", b"text %d" % n)),
    "cut jpeg": ("does not decode", lambda n: (".jpg", encode(noise_image(n, 200, 150))[:1500])),
    "cut png": ("does not decode", lambda n: (".png", encode(noise_image(n), "PNG")[:-300])),
    "cut webp": ("", lambda n: (".webp", encode(noise_image(n), "WEBP")[:60])),
    "bomb": ("too many pixels", lambda _: (".png", png_bomb())),
    "html": ("not an image of a known format", lambda n: (".jpg", b"<html>%d</html>" % n)),
}
ODD_NAMES = ("", " with space", "ünïcödé", "[a]{b}", "a.b.c", "-x", "'q'", "日本")


@settings(suppress_health_check=list(HealthCheck), max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([*GOOD, *CHANGED, *BAD]), st.sampled_from(ODD_NAMES),
            st.sampled_from(["", "a", "a/b", "ü"]),
        ),
        min_size=1, max_size=14,
    ),
    st.integers(1, 6),
)  # fmt: skip
def test_of_a_hostile_tree_everything_arrives_once_or_is_named(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[tuple[str, str, str]], block: int
) -> None:
    root = tmp_path_factory.mktemp("hostile")
    source = root / "source"
    files: dict[str, tuple[str, bytes]] = {}
    for number, (kind, odd, folder) in enumerate(kinds):
        make = GOOD.get(kind) or CHANGED.get(kind) or BAD[kind][1]
        suffix, data = make(number)
        path = source / folder / f"{number}{odd}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        files[path.relative_to(source).as_posix()] = (kind, data)
    # One good image for sure, with a name that is not UTF-8, and a file that is none of ours.
    data = encode(noise_image(999))
    (source / os.fsdecode(b"caf\xe9.jpg")).write_bytes(data)
    files["caf\\udce9.jpg"] = ("jpeg", data)
    (source / "notes.md").write_text("left alone")
    # Files of the same bytes stay: that they are left out is tested elsewhere.
    recipe = load_recipe(
        PrepareRecipe, None, [f"shard.max_samples={block}", "filter.duplicates=keep"]
    )
    prepare.run(recipe, source, root / "out", workers=1)
    shards = open_shards(str(root / "out"))
    samples = {shards[i].source: shards[i] for i in range(len(shards))}
    assert len(samples) == len(shards) == len(set(shards.keys()))
    lines = (root / "out" / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    skipped = {entry["path"]: entry["reason"] for entry in map(json.loads, lines)}
    assert len(skipped) == len(lines)
    assert {name for name, (kind, _) in files.items() if kind in BAD} == set(skipped)
    assert {name for name, (kind, _) in files.items() if kind not in BAD} == set(samples)
    for name, (kind, data) in files.items():
        if kind in BAD:
            assert skipped[name].startswith(BAD[kind][0]), (name, kind, skipped[name])
        elif kind in GOOD:
            assert samples[name].image == data
        else:
            stored = Image.open(io.BytesIO(samples[name].image))
            stored.load()
            assert (stored.mode, stored.size) == (
                "RGB", (samples[name].width, samples[name].height),
            )  # fmt: skip


def test_a_file_that_nobody_can_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    noise_image(1).save(tmp_path / "source" / "1.png")
    (tmp_path / "source" / "0.png").symlink_to("0.png")
    recipe = load_recipe(PrepareRecipe, None)
    assert prepare.run(recipe, tmp_path / "source", tmp_path / "out").samples == {"train": 1}
    assert "Too many levels of symbolic links" in (tmp_path / "out/skipped.jsonl").read_text()


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    (tmp_path / "source").mkdir()
    for number in range(2):
        noise_image(number).save(tmp_path / "source" / f"{number}.png")
    (tmp_path / "source" / "0.png").chmod(0)
    recipe = load_recipe(PrepareRecipe, None)
    assert prepare.run(recipe, tmp_path / "source", tmp_path / "out").samples == {"train": 1}
    assert "cannot be read: Permission denied" in (tmp_path / "out/skipped.jsonl").read_text()
