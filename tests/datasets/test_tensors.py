"""Images decoded to tensors have the pixels, and the errors, of all other stages."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from dupr_cli.artifacts.pixel_formats import PixelFormat
from dupr_cli.datasets.channels import decode_as
from dupr_cli.datasets.pixels import IMAGE_ERRORS
from dupr_cli.datasets.tensors import decode_tensor
from tests.support.images import encode, noise_image


def turned(orientation: int) -> bytes:
    image, exif, file = noise_image(0, 61, 47), Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    image.save(file, "JPEG", exif=exif)
    return file.getvalue()


def progressive() -> bytes:
    file = io.BytesIO()
    noise_image(1, 61, 47).save(file, "JPEG", progressive=True, subsampling=2)
    return file.getvalue()


CASES = {
    "colour": encode(noise_image(0, 61, 47), "JPEG"),
    "grey": encode(noise_image(0, 61, 47).convert("L"), "JPEG"),
    "CMYK": encode(noise_image(0, 61, 47).convert("CMYK"), "JPEG"),
    "progressive": progressive(),
    "turned": turned(6),
    "not turned": turned(1),
    "PNG with transparency": encode(noise_image(0, 61, 47).convert("RGBA"), "PNG"),
}


@pytest.mark.parametrize("case", CASES)
def test_pixels_are_those_of_pillow(case: str) -> None:
    expected = np.asarray(decode_as(io.BytesIO(CASES[case]), None))
    found = decode_tensor(CASES[case], None)
    assert found.dtype == torch.uint8
    assert np.array_equal(found.permute(1, 2, 0).numpy(), expected)


def test_images_with_own_channels_are_scaled() -> None:
    found = decode_tensor(CASES["grey"], PixelFormat(1, (0, 255)))
    assert found.shape == (1, 47, 61)
    expected = decode_tensor(CASES["grey"], None)[:1] / 255
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_truncated_files_raise_what_other_stages_expect(share: float) -> None:
    data = CASES["colour"][: int(share * len(CASES["colour"]))]
    with pytest.raises(IMAGE_ERRORS):
        decode_tensor(data, None)
