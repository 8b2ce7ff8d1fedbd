"""Turns one image of a source into one sample, or into the reason why it is left out.

The bytes of an image that need not change are kept, and decoded to check that they are whole. An
image that is rotated by EXIF, not RGB, animated, too large, or of a format that shards do not hold
is re-encoded, and its labels are adjusted to it. With a number of `image.channels`, values are kept
instead: one channel as a grey image, several as a NumPy array.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from dupr_cli.addresses import public_address, without_secrets
from dupr_cli.artifacts.hashes import perceptual_hash
from dupr_cli.artifacts.pixel_formats import PixelFormat, resized
from dupr_cli.artifacts.reading import UnfitImageError, require_size
from dupr_cli.artifacts.shard_files import MASK, Sample
from dupr_cli.artifacts.shards import Skipped
from dupr_cli.datasets.channels import ChannelError, ChannelPicture, open_channels
from dupr_cli.datasets.copies import ImageHashes, hash_image
from dupr_cli.datasets.pixels import IMAGE_ERRORS, Picture, UnknownRangeError, open_picture
from dupr_cli.datasets.placement import Placed, Size, placed, placed_mask
from dupr_cli.errors import DuprError, RunError, StoppedRunError
from dupr_cli.prepare.exclusion import ExcludedImages
from dupr_cli.prepare.sources import Entry, RawImage
from dupr_cli.recipe import PrepareRecipe
from dupr_cli.recipe.prepare import ImageSection

_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
# Formats whose bytes may stay when values are kept: the first two for one channel, the third for
# several.
_KEPT = {"PNG": "png", "JPEG": "jpg", "NPY": "npy"}
_WANTED = {"jpeg": "jpg", "png": "png", "webp": "webp"}
_RESAMPLE = {"lanczos": Image.Resampling.LANCZOS, "area": Image.Resampling.BOX}
_SAMPLED = 20  # verify: sampled decodes one image in this many

T = TypeVar("T")

# Above its own limit Pillow would refuse with a message that does not name our recipe key.
Image.MAX_IMAGE_PIXELS = None


class _UnusableImageError(Exception):
    """Why an image is left out."""


@dataclass(frozen=True)
class Ingested:
    """A sample, with the sha256 and the perceptual hash of the image in the source.

    notes: remarks on its labels, see `Placed`.
    """

    sample: Sample
    sha256: bytes
    look: int = 0
    notes: tuple[str, ...] = ()


def ingest(
    entry: Entry,
    read: Callable[[Entry], RawImage],
    recipe: PrepareRecipe,
    look: bool = False,
    excluded: ExcludedImages | None = None,
) -> Ingested | Skipped:
    """Read, check and, if needed, change one image of a source.

    look: compute the perceptual hash. excluded: leave out copies of these images.
    """
    name = public_address(readable(entry.name))
    try:
        pixels = pixel_format(recipe.image)
        raw = read(entry)
        if pixels is None:
            found = _ingest(entry, raw, recipe, look)
        else:
            found = _ingest_channels(entry, raw, recipe, pixels, look)
        if excluded is not None:
            _require_other_image(found, excluded, pixels)
        return found
    except StoppedRunError:
        raise
    except MemoryError:
        # With more memory the image may be a good one, so it is not left out.
        raise RunError(
            f"{name}: memory ran out while the image was read. Use fewer --workers, or skip images "
            f"of its size with image.max_pixels, then give the same command again to continue."
        ) from None
    except (OSError, ValueError, DuprError) as error:
        return Skipped(name, why_unreadable(error))
    except _UnusableImageError as error:
        return Skipped(name, str(error))


def pixel_format(recipe: ImageSection) -> PixelFormat | None:
    """The format of the images in the shards, None for RGB of 8 bits."""
    if recipe.channels == "rgb" or recipe.range is None:
        return None
    return PixelFormat(recipe.channels, recipe.range)


def why_unreadable(error: OSError | ValueError | DuprError) -> str:
    """Why an image is left out that raised this while its source read it."""
    if isinstance(error, FileNotFoundError):
        return "the file is missing"
    if isinstance(error, UnfitImageError):
        return str(error)
    if isinstance(error, DuprError):  # a missing or damaged annotation or shard, named in full
        return without_secrets(f"cannot be used: {error}")
    # A ValueError means a name that no file can have.
    return without_secrets(f"cannot be read: {getattr(error, 'strerror', None) or error}")


def readable(name: str) -> str:
    """A file's name as text, with bytes that are not UTF-8 written as escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


def _ingest(entry: Entry, raw: RawImage, recipe: PrepareRecipe, look: bool) -> Ingested:
    _require_data(raw, recipe)
    if raw.pixels is not None:
        raise _UnusableImageError(
            f"other shards keep it with {raw.pixels}; set image.channels and image.range to keep it"
        )
    sha256 = hashlib.sha256(raw.data)
    picture = _open(raw.data)
    _check(picture.image.size, recipe)
    orientation = _decoded(lambda: picture.orientation)
    size = _new_size(picture.upright, recipe.image)
    found = _labels(raw, picture, size)
    wanted = _WANTED.get(recipe.image.format)
    extension = _EXTENSIONS.get(picture.image.format or "")
    stays = (
        orientation == 1
        and size == picture.upright
        and picture.image.mode == "RGB"
        and not picture.is_wide
        and extension is not None
        and wanted in (None, extension)
        # An MPO is a camera's JPEG followed by a preview; its frames are not an animation.
        and (extension == "jpg" or not getattr(picture.image, "is_animated", False))
    )
    data = raw.data
    pixels: Image.Image | None = None
    if not stays:
        extension = wanted or ("jpg" if extension == "jpg" else "png")
        resample, limits = _RESAMPLE[recipe.image.resample], recipe.image.range
        pixels = _decoded(lambda: picture.rgb(size, resample, limits))
        data = _encode(pixels, extension, size != picture.upright, recipe.image)
    elif recipe.image.verify == "full" or (
        recipe.image.verify == "sampled" and _is_sampled(entry.sample_key)
    ):
        _decode(picture.image, small=True)
    sample = Sample(
        entry.sample_key,
        extension or "",
        data,
        public_address(raw.source or readable(entry.name)),
        *size,
        found.boxes if found else None,
        raw.label,
        raw.info,
        _extras(raw, picture.stored, orientation, size),
        sha256.hexdigest() if stays else "",
    )
    perceptual = _perceptual_hash(pixels, raw.data) if look else 0
    return Ingested(sample, sha256.digest(), perceptual, found.notes if found else raw.remarks)


def _extras(raw: RawImage, stored: Size, orientation: int, size: Size) -> Mapping[str, bytes]:
    """The further members of the sample, with the mask turned and scaled like the image.

    Raises RunError when the mask belongs to an image of another size.
    """
    if raw.mask is None:
        return raw.extras
    buffer = io.BytesIO()
    Image.fromarray(placed_mask(raw.mask, stored, orientation, size)).save(buffer, "PNG")
    return {**raw.extras, MASK: buffer.getvalue()}


def _require_data(raw: RawImage, recipe: PrepareRecipe) -> None:
    if not raw.data:
        raise _UnusableImageError("the file is empty")
    require_size(len(raw.data), recipe.source.max_bytes)  # of the sources of other packages


def _ingest_channels(
    entry: Entry, raw: RawImage, recipe: PrepareRecipe, pixels: PixelFormat, look: bool
) -> Ingested:
    """Like `_ingest`, for an image that keeps its channels and values."""
    _require_data(raw, recipe)
    picture = _open_channels(raw.data)
    _check(picture.stored, recipe)
    if picture.channels != pixels.channels:
        raise _UnusableImageError(
            f"number of channels: it has {picture.channels}, image.channels is {pixels.channels}"
        )
    orientation = _decoded(lambda: picture.orientation)
    size = _new_size(picture.upright, recipe.image)
    found = None
    if raw.labels is not None:
        found = placed(raw.labels, picture.stored, orientation, size)
    scaled = _decoded(lambda: picture.image(pixels))  # decodes all, and checks the range
    kept = _KEPT.get(picture.format)
    stays = (
        orientation == 1
        and size == picture.upright
        and kept is not None
        and (kept == "npy") == (pixels.channels > 1)
    )
    extension, data = kept or "", raw.data
    if not stays:
        values = picture.values()
        if size != picture.upright:
            values = _shrunk(values, size, _RESAMPLE[recipe.image.resample])
        extension, data = _encode_channels(values)
    if extension in raw.extras:
        raise _UnusableImageError(
            f"its sample has another member .{extension}, which is the image's suffix in the shards"
        )
    sha256 = hashlib.sha256(raw.data)
    sample = Sample(
        entry.sample_key,
        extension,
        data,
        public_address(raw.source or readable(entry.name)),
        *size,
        found.boxes if found else None,
        raw.label,
        raw.info,
        _extras(raw, picture.stored, orientation, size),
        sha256.hexdigest() if stays else "",
        pixels,
        picture.depth,
    )
    perceptual = perceptual_hash(scaled.shown()) if look else 0
    return Ingested(sample, sha256.digest(), perceptual, found.notes if found else raw.remarks)


def _open_channels(data: bytes) -> ChannelPicture:
    try:
        return open_channels(io.BytesIO(data))
    except ChannelError as error:
        raise _UnusableImageError(f"its values cannot be kept: {error}") from None
    except UnidentifiedImageError:
        raise _UnusableImageError("not an image of a known format") from None
    except IMAGE_ERRORS as error:
        raise _UnusableImageError(f"does not decode: {error}") from None


def _shrunk(
    values: NDArray[np.uint8 | np.uint16], size: Size, resample: Image.Resampling
) -> NDArray[np.uint8 | np.uint16]:
    limit = np.iinfo(values.dtype).max
    shrunk = (resized(values, size, resample) + 0.5).clip(0, limit)
    return shrunk.astype(values.dtype)


def _encode_channels(values: NDArray[np.uint8 | np.uint16]) -> tuple[str, bytes]:
    """Extension and bytes of (H, W, C) values; the same values give the same bytes."""
    buffer = io.BytesIO()
    if values.shape[2] == 1:
        Image.fromarray(np.ascontiguousarray(values[..., 0])).save(buffer, "PNG")
        return "png", buffer.getvalue()
    little = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    np.lib.format.write_array(buffer, little, version=(1, 0), allow_pickle=False)
    return "npy", buffer.getvalue()


def _require_other_image(
    found: Ingested, excluded: ExcludedImages, pixels: PixelFormat | None
) -> None:
    """Raises _UnusableImageError for a copy of an excluded image.

    The bytes are those of the source, but the look is that of the image in the shard, because
    `dupr evaluate --leaks` will look there.
    """
    look = _decoded(lambda: hash_image(found.sample.image, pixels)).perceptual
    reason = excluded.reason_for(ImageHashes(found.sha256, look))
    if reason is not None:
        raise _UnusableImageError(reason)


def _open(data: bytes) -> Picture:
    try:
        return open_picture(io.BytesIO(data))
    except IMAGE_ERRORS:
        raise _UnusableImageError("not an image of a known format") from None


def _check(size: Size, recipe: PrepareRecipe) -> None:
    """Raises _UnusableImageError for an image that is too large to decode or fails the filters."""
    width, height = size
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


def _new_size(upright: Size, recipe: ImageSection) -> Size:
    width, height = upright
    scale = 1.0
    if recipe.max_side is not None:
        scale = min(1.0, recipe.max_side / max(width, height))
    elif recipe.min_side is not None:
        scale = min(1.0, recipe.min_side / min(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def _labels(raw: RawImage, picture: Picture, size: Size) -> Placed | None:
    """The labels in pixels of the image in the shard, or None if the source has no labels."""
    if raw.labels is None:
        return None
    return placed(raw.labels, picture.stored, picture.orientation, size)


def _is_sampled(key: str) -> bool:
    return hashlib.sha256(key.encode()).digest()[0] % _SAMPLED == 0


def _decoded(step: Callable[[], T]) -> T:
    """The result of a step of decoding. Raises _UnusableImageError when it fails."""
    try:
        return step()
    except (StoppedRunError, MemoryError):
        raise
    except UnknownRangeError as error:
        raise _UnusableImageError(str(error)) from None
    # On damaged files, decoders raise exceptions of any kind.
    except Exception as error:
        raise _UnusableImageError(f"does not decode: {error}") from None


def _decode(image: Image.Image, small: bool = False) -> None:
    """Decode the whole image. small: at 1/8 size if a JPEG, which reads every byte at half the
    cost."""
    if small:
        image.draft("RGB", (image.width // 8, image.height // 8))
    _decoded(image.load)


def _perceptual_hash(image: Image.Image | None, data: bytes) -> int:
    if image is None:
        image = Image.open(io.BytesIO(data))
        image.draft("L", (128, 128))
        _decode(image)
    return perceptual_hash(image)


def _encode(image: Image.Image, extension: str, shrunk: bool, recipe: ImageSection) -> bytes:
    buffer = io.BytesIO()
    if extension == "jpg":
        # 4:4:4 unless the image was shrunk: the source's chroma was already subsampled once.
        subsampling = 2 if shrunk else 0
        image.save(buffer, "JPEG", quality=recipe.quality, subsampling=subsampling)
    elif extension == "webp":
        image.save(buffer, "WEBP", quality=recipe.quality)
    else:
        image.save(buffer, "PNG")
    return buffer.getvalue()
