"""One image in, one sample or one reason out.

Every image is decoded completely once, so that what is in a shard can be read. Bytes are kept where
nothing has to change; an image that is rotated by EXIF, not RGB, or of a format that shards do not
hold is written anew, and its boxes are turned with it.
"""

from __future__ import annotations

import io
import warnings

from PIL import Image, ImageOps, UnidentifiedImageError

from dupr_cli.artifacts.shards import Box, Sample, Skipped
from dupr_cli.errors import DuprError
from dupr_cli.prepare.sources import Item
from dupr_cli.recipe.prepare import ImageSection

_EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_ORIENTATION = 0x0112

# From Pillow's limit on, it would refuse by itself, with words that do not name our recipe key.
Image.MAX_IMAGE_PIXELS = None


class _UnusableImageError(Exception):
    """Why an image is left out."""


def ingest(item: Item, recipe: ImageSection) -> Sample | Skipped:
    """Read, check and, where needed, repair one image of the source."""
    try:
        raw = item.read()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow on odd metadata: the pixels are what counts
            return _to_sample(item, raw.data, raw.boxes, recipe)
    except FileNotFoundError:
        return Skipped(item.name, "the file is missing")
    except OSError as error:
        return Skipped(item.name, f"cannot be read: {error.strerror or error}")
    except DuprError as error:  # a missing or damaged annotation or shard, named in full
        return Skipped(item.name, f"cannot be used: {error}")
    except _UnusableImageError as error:
        return Skipped(item.name, str(error))


def _to_sample(
    item: Item, data: bytes, boxes: tuple[Box, ...] | None, recipe: ImageSection
) -> Sample:
    if not data:
        raise _UnusableImageError("the file is empty")
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
        raise _UnusableImageError("not an image of a known format") from None
    pixels = image.width * image.height
    if pixels > recipe.max_pixels:
        raise _UnusableImageError(
            f"{image.width} x {image.height} pixels, more than image.max_pixels = "
            f"{recipe.max_pixels}"
        )
    orientation = 1
    try:
        image.load()
        orientation = int(image.getexif().get(_ORIENTATION, 1))
    # Decoders of damaged files raise whatever their parsing ran into.
    except Exception as error:
        raise _UnusableImageError(f"does not decode: {error}") from None
    extension = _EXTENSIONS.get(image.format or "")
    stored_size = image.size
    if orientation != 1 or image.mode != "RGB" or extension is None:
        data, extension, image = _rewrite(image, recipe)
    if boxes is not None and orientation != 1:
        boxes = tuple(box.upright(orientation, *stored_size) for box in boxes)
    width, height = image.size
    return Sample(item.key, extension, data, item.name, width, height, boxes)


def _rewrite(image: Image.Image, recipe: ImageSection) -> tuple[bytes, str, Image.Image]:
    was_jpeg = image.format in ("JPEG", "MPO")
    upright = ImageOps.exif_transpose(image)
    rgb = _to_rgb(upright)
    rgb.info = {}  # no stale EXIF, no profile of another colour space
    buffer = io.BytesIO()
    if was_jpeg:
        # 4:4:4: the source's own subsampling has been applied once already.
        rgb.save(buffer, "JPEG", quality=recipe.jpeg_quality, subsampling=0)
    else:
        rgb.save(buffer, "PNG")
    return buffer.getvalue(), "jpg" if was_jpeg else "png", rgb


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB with 8 bits; transparency over white, 16-bit grey scaled to its own depth."""
    if image.mode.startswith("I"):
        return image.convert("I").point(lambda v: v * (1 / 257)).convert("L").convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
