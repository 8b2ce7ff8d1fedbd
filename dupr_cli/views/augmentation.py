"""Photometric augmentation: parameters drawn per sample, pixels changed per batch.

The loader's workers draw each view's parameters from the sample's own random stream; the training
device applies them to whole batches. So the result does not depend on the batch a sample is in, and
no worker touches float pixels. The operations are those of MoCo v2: colour jitter in random order,
grayscale, Gaussian blur, flip, normalise.
"""

from __future__ import annotations

from itertools import permutations
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dupr_cli.recipe.pretrain import AugmentationSection, BlurSection, ColorJitterSection

# Columns of a parameter row.
BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER, GRAYSCALE, BLUR, FLIP = range(8)
PARAMETERS = 8

_ORDERS = torch.tensor(list(permutations(range(4))))  # (24, 4): orders of the operations
_LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601-2, as torchvision's rgb_to_grayscale


class Photometric(Protocol):
    """The recipe sections that control the changes to a view after it is cut."""

    @property
    def color_jitter(self) -> ColorJitterSection: ...

    @property
    def grayscale_probability(self) -> float: ...

    @property
    def blur(self) -> BlurSection: ...

    @property
    def flip_probability(self) -> float: ...


def draw_parameters(recipe: Photometric, random: np.random.Generator) -> NDArray[np.float32]:
    """One view's parameters (PARAMETERS,).

    Factors of brightness, contrast and saturation; hue shift in turns; number of the order in which
    the four are applied, -1 for no jitter; grayscale and flip as 0 or 1; blur's standard deviation
    in pixels, 0 for none.
    """
    jitter, row = recipe.color_jitter, np.zeros(PARAMETERS, dtype=np.float32)
    # Every number is drawn, used or not, so each parameter has one position in the stream.
    uniform = random.random(10)
    for column, strength in (
        (BRIGHTNESS, jitter.brightness),
        (CONTRAST, jitter.contrast),
        (SATURATION, jitter.saturation),
    ):
        low = max(0.0, 1 - strength)
        row[column] = low + uniform[column] * (1 + strength - low)
    row[HUE] = (2 * uniform[HUE] - 1) * jitter.hue
    row[ORDER] = int(uniform[ORDER] * len(_ORDERS)) if uniform[5] < jitter.probability else -1
    row[GRAYSCALE] = uniform[6] < recipe.grayscale_probability
    if uniform[7] < recipe.blur.probability:
        low, high = recipe.blur.sigma
        row[BLUR] = low + uniform[8] * (high - low)
    row[FLIP] = uniform[9] < recipe.flip_probability
    return row


def augment(views: Tensor, parameters: Tensor, recipe: AugmentationSection) -> Tensor:
    """Apply each view's own parameters, and normalise.

    views, parameters: see `recolour`. Returns (N, 3, H, W) float32, normalised.
    """
    return normalise(recolour(views, parameters, recipe.blur.sigma[1]), recipe)


def normalise(images: Tensor, recipe: AugmentationSection) -> Tensor:
    """Normalise images (N, 3, H, W) in [0, 1] for the network."""
    mean = torch.tensor(recipe.mean, device=images.device)[:, None, None]
    std = torch.tensor(recipe.std, device=images.device)[:, None, None]
    return (images - mean) / std


def recolour(views: Tensor, parameters: Tensor, max_sigma: float) -> Tensor:
    """Apply each view's own parameters, the flip last.

    views: (N, 3, H, W) uint8. parameters: (N, PARAMETERS) on the CPU, so that selecting views for
    an operation does not wait for the device. max_sigma: the recipe's largest blur, pixels.
    Returns (N, 3, H, W) float32 in [0, 1].
    """
    images = views.float() / 255
    order = parameters[:, ORDER].long()
    for position in range(4):
        operation_of = torch.where(order >= 0, _ORDERS[order, position], -1)
        for number, operation in enumerate((_brightness, _contrast, _saturation, _hue)):
            chosen = (operation_of == number).nonzero().flatten()
            if len(chosen):
                amount = parameters[chosen, number].to(images.device)[:, None, None, None]
                chosen = chosen.to(images.device)
                images[chosen] = operation(images[chosen], amount)
    chosen = parameters[:, GRAYSCALE].nonzero().flatten().to(images.device)
    if len(chosen):
        images[chosen] = _luma(images[chosen]).expand(-1, 3, -1, -1)
    blurred = parameters[:, BLUR].nonzero().flatten()
    if len(blurred):
        sigma = parameters[blurred, BLUR].to(images.device)
        blurred = blurred.to(images.device)
        images[blurred] = gaussian_blur(images[blurred], sigma, max_sigma=max_sigma)
    flips = parameters[:, FLIP].bool().to(images.device)[:, None, None, None]
    return torch.where(flips, images.flip(3), images)


def _luma(images: Tensor) -> Tensor:
    weights = torch.tensor(_LUMA, device=images.device)[:, None, None]
    return (images * weights).sum(1, keepdim=True)


def _brightness(images: Tensor, factor: Tensor) -> Tensor:
    return (images * factor).clamp_(0, 1)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    mean = _luma(images).mean((1, 2, 3), keepdim=True)
    return torch.lerp(mean.expand_as(images), images, factor).clamp_(0, 1)


def _saturation(images: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(_luma(images).expand_as(images), images, factor).clamp_(0, 1)


def _hue(images: Tensor, turns: Tensor) -> Tensor:
    """Shift hue by `turns` of the colour circle, saturation and value kept.

    The way back to RGB is direct: each channel's position between the pixel's smallest and largest
    value is a trapezoid over the colour circle (the hexcone model of HSV).
    """
    high, which = images.max(1, keepdim=True)
    low = images.amin(1, keepdim=True)
    chroma = high - low
    red, green, blue = images.unbind(1)
    safe = torch.where(chroma > 0, chroma, 1.0).squeeze(1)
    sector = torch.stack(
        [(green - blue) / safe, 2 + (blue - red) / safe, 4 + (red - green) / safe], dim=1
    )
    hue = sector.gather(1, which) + 6 * turns  # (N, 1, H, W), in sixths of a turn
    offsets = torch.tensor([5.0, 3.0, 1.0], device=images.device)[:, None, None]
    k = (hue + offsets).remainder(6)
    return high - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def gaussian_blur(images: Tensor, sigma: Tensor, max_sigma: float) -> Tensor:
    """Blur each image with its own standard deviation, separably, edges reflected.

    images: (N, C, H, W). sigma: (N,) pixels. The kernel reaches three of the largest allowed
    standard deviations, or as far as the image allows.
    """
    radius = min(max(1, int(np.ceil(3 * max_sigma))), *(side - 1 for side in images.shape[2:]))
    taps = torch.arange(-radius, radius + 1, device=images.device)
    kernel = torch.exp(-0.5 * (taps / sigma[:, None]) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)  # (N, taps)
    padded = torch.nn.functional.pad(images, [radius] * 4, mode="reflect")
    for axis in (2, 3):
        length = images.shape[axis]
        total = torch.zeros_like(padded.narrow(axis, 0, length))
        for tap in range(2 * radius + 1):
            weight = kernel[:, tap, None, None, None]
            total.addcmul_(padded.narrow(axis, tap, length), weight)
        padded = total
    return padded
