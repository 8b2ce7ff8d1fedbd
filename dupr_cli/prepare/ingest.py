"""One image in, one sample or one reason out.

Bytes are kept where nothing has to change, and decoded to see that they are whole. An image that
is rotated by EXIF, not RGB, animated, too large, or of a format that shards do not hold is written
anew, and its labels move with it.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, UnidentifiedImageError

from dupr_cli.artifacts.hashes import perceptual_hash
from dupr_cli.artifacts.labels import Box, Placement
from dupr_cli.artifacts.shard_files import Sample
from dupr_cli.artifacts.shards import Skipped
from dupr_cli.errors import DuprError
from dupr_cli.prepare.sources import Entry, RawImage
from dupr_cli.recipe import PrepareRecipe
from dupr_cli.recipe.prepare import ImageSection

_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_WANTED = {"jpeg": "jpg", "png": "png", "webp": "webp"}
_ORIENTATION = 0x0112
_RESAMPLE = {"lanczos": Image.Resampling.LANCZOS, "area": Image.Resampling.BOX}
_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SAMPLED = 20  # one of so many is decoded with verify: sampled

# From Pillow's limit on, it would refuse by itself, with words that do not name our recipe key.
Image.MAX_IMAGE_PIXELS = None


class _UnusableImageError(Exception):
    """Why an image is left out."""


@dataclass(frozen=True)
class Ingested:
    """A sample, with the sha256 and the perceptual hash of the image as the source has it."""

    sample: Sample
    sha256: bytes
    look: int = 0


def ingest(
    entry: Entry, read: Callable[[Entry], RawImage], recipe: PrepareRecipe, look: bool = False
) -> Ingested | Skipped:
    """Read, check and, where needed, change one image of a source.

    look: compute the perceptual hash.
    """
    name = readable(entry.name)
    try:
        return _ingest(entry, read(entry), recipe, look)
    except FileNotFoundError:
        return Skipped(name, "the file is missing")
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        return Skipped(name, f"cannot be read: {getattr(error, 'strerror', None) or error}")
    except DuprError as error:  # a missing or damaged annotation or shard, named in full
        return Skipped(name, f"cannot be used: {error}")
    except _UnusableImageError as error:
        return Skipped(name, str(error))


def readable(name: str) -> str:
    """A file's name as text: bytes that are not UTF-8 are written as escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


def _ingest(entry: Entry, raw: RawImage, recipe: PrepareRecipe, look: bool) -> Ingested:
    if not raw.data:
        raise _UnusableImageError("the file is empty")
    sha256 = hashlib.sha256(raw.data)
    image = _open(raw.data)
    orientation = _check(image, recipe)
    placement = _placement(image, orientation, recipe.image)
    wanted = _WANTED.get(recipe.image.format)
    extension = _EXTENSIONS.get(image.format or "")
    stays = (
        not placement.moves
        and image.mode == "RGB"
        and extension is not None
        and wanted in (None, extension)
        # The frames of an MPO, a camera's JPEG with a preview behind it, are no animation.
        and (extension == "jpg" or not getattr(image, "is_animated", False))
    )
    data = raw.data
    pixels: Image.Image | None = None
    if not stays:
        extension = wanted or ("jpg" if extension == "jpg" else "png")
        pixels = _changed(image, placement, recipe.image)
        data = _encode(pixels, extension, placement, recipe.image)
    elif recipe.image.verify == "full" or (
        recipe.image.verify == "sampled" and _is_sampled(entry.sample_key)
    ):
        _decode(image, small=True)
    sample = Sample(
        entry.sample_key,
        extension or "",
        data,
        raw.source or readable(entry.name),
        placement.new_width,
        placement.new_height,
        _move(raw, placement),
        raw.label,
        raw.info,
        raw.extras,
        sha256.hexdigest() if stays else "",
    )
    return Ingested(sample, sha256.digest(), _look(pixels, raw.data) if look else 0)


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
        raise _UnusableImageError("not an image of a known format") from None


def _check(image: Image.Image, recipe: PrepareRecipe) -> int:
    """The EXIF orientation of an image that may be decoded and passes the filters."""
    width, height = image.size
    if width * height > recipe.image.max_pixels:
        raise _UnusableImageError(
            f"too many pixels: {width} x {height}, more than image.max_pixels = "
            f"{recipe.image.max_pixels}"
        )
    if min(width, height) < recipe.filter.min_side:
        raise _UnusableImageError(
            f"too small: {width} x {height}, filter.min_side is {recipe.filter.min_side}"
        )
    aspect = max(width, height) / min(width, height)
    if recipe.filter.max_aspect is not None and aspect > recipe.filter.max_aspect:
        raise _UnusableImageError(
            f"too long: {width} x {height}, filter.max_aspect is {recipe.filter.max_aspect:g}"
        )
    try:
        orientation = int(image.getexif().get(_ORIENTATION, 1))
    # Parsers of damaged metadata raise whatever they ran into.
    except Exception as error:
        raise _UnusableImageError(f"does not decode: {error}") from None
    return orientation if 1 <= orientation <= 8 else 1


def _placement(image: Image.Image, orientation: int, recipe: ImageSection) -> Placement:
    width, height = image.size
    if orientation >= 5:
        width, height = height, width
    scale = 1.0
    if recipe.max_side is not None:
        scale = min(1.0, recipe.max_side / max(width, height))
    elif recipe.min_side is not None:
        scale = min(1.0, recipe.min_side / min(width, height))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return Placement(orientation, *image.size, *size)


def _is_sampled(key: str) -> bool:
    return hashlib.sha256(key.encode()).digest()[0] % _SAMPLED == 0


def _decode(image: Image.Image, small: bool = False) -> None:
    """Decode all of it. small: a JPEG at an eighth, which reads every byte at half the cost."""
    try:
        if small:
            image.draft("RGB", (image.width // 8, image.height // 8))
        image.load()
    # Decoders of damaged files raise whatever their parsing ran into.
    except Exception as error:
        raise _UnusableImageError(f"does not decode: {error}") from None


def _look(image: Image.Image | None, data: bytes) -> int:
    if image is None:
        image = _open(data)
        image.draft("L", (128, 128))
        _decode(image)
    return perceptual_hash(image)


def _changed(image: Image.Image, placement: Placement, recipe: ImageSection) -> Image.Image:
    """The image as a shard holds it: RGB, shrunk, upright."""
    size = (placement.new_width, placement.new_height)
    if placement.orientation >= 5:
        size = size[::-1]
    box = None
    if size != image.size:
        # libjpeg shrinks by a power of two while it decodes; twice the size is left to the filter.
        drafted = image.draft("RGB", (2 * size[0], 2 * size[1]))
        box = drafted[1] if drafted else None
    _decode(image)
    rgb = to_rgb(image)
    if size != rgb.size or box is not None:
        rgb = rgb.resize(size, _RESAMPLE[recipe.resample], box)
    if placement.orientation != 1:
        rgb = rgb.transpose(_TURN[placement.orientation])
    rgb.info = {}  # no stale EXIF, no profile of another colour space
    return rgb


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB with 8 bits; transparency over white, 16-bit grey scaled to its own depth."""
    if image.mode.startswith("I"):
        grey = np.asarray(image.convert("I"))
        return Image.fromarray((grey / 257).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        return image.convert("L").convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _encode(
    image: Image.Image, extension: str, placement: Placement, recipe: ImageSection
) -> bytes:
    buffer = io.BytesIO()
    if extension == "jpg":
        # 4:4:4 where no pixel is thrown away: the source's subsampling was applied once already.
        subsampling = 2 if placement.scale[0] < 1 else 0
        image.save(buffer, "JPEG", quality=recipe.quality, subsampling=subsampling)
    elif extension == "webp":
        image.save(buffer, "WEBP", quality=recipe.quality)
    else:
        image.save(buffer, "PNG")
    return buffer.getvalue()


def _move(raw: RawImage, placement: Placement) -> tuple[Box, ...] | None:
    """The labels in the pixels of the image in the shard."""
    if raw.boxes is None:
        return None
    stored, upright = (placement.width, placement.height), placement.upright_size
    # Labels that were drawn on the upright image say so, or give its size.
    turned = raw.upright or (raw.size == upright and raw.size != stored)
    way = replace(placement, orientation=1, width=upright[0], height=upright[1])
    if not turned:
        way = placement
    if raw.unit:
        # Shares of the sides: from an image of one pixel.
        way = replace(way, width=1, height=1)
    return tuple(way.box(box) for box in raw.boxes)
