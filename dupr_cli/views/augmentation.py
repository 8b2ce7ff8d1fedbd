"""Photometric augmentation: parameters drawn per sample, pixels changed per batch.

The loader's workers draw each view's parameters from the sample's own random stream; the training
device applies them to whole batches. So the result does not depend on the batch a sample is in, and
no worker touches float pixels of RGB. The operations are those of MoCo v2: colour jitter in random
order, grayscale, Gaussian blur, flip, normalise.

Images that keep their own channels have no hue, saturation or grayscale, which are defined by how
people see red, green and blue. Each of their channels has its own brightness and contrast, about
the mean of that channel; blur and flip are the same for all channels.
"""

from __future__ import annotations

from itertools import permutations
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dupr_cli.recipe.pretrain import AugmentationSection, BlurSection, ColorJitterSection

# Columns of a parameter row. Rows of C own channels continue with C factors of brightness and C of
# contrast, which replace those of the first columns.
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


def draw_parameters(
    recipe: Photometric, random: np.random.Generator, channels: int | None = None
) -> NDArray[np.float32]:
    """One view's parameters (P,): P is PARAMETERS, with own channels PARAMETERS + 2 * channels.

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
    if channels is None:
        return row
    factors = [
        low + random.random(channels) * (1 + strength - low)
        for strength in (jitter.brightness, jitter.contrast)
        for low in [max(0.0, 1 - strength)]
    ]
    return np.concatenate([row, *factors]).astype(np.float32)


def uses_rgb(recipe: Photometric) -> bool:
    """Whether a recipe has changes that are defined for red, green and blue only."""
    jitter = recipe.color_jitter
    colours = jitter.probability > 0 and (jitter.saturation > 0 or jitter.hue > 0)
    return colours or recipe.grayscale_probability > 0


def augment(views: Tensor, parameters: Tensor, recipe: AugmentationSection) -> Tensor:
    """Apply each view's own parameters, and normalise.

    views, parameters: see `recolour`. Returns (N, C, H, W) float32, normalised.
    """
    return normalise(recolour(views, parameters, recipe.blur.sigma[1]), recipe)


def normalise(images: Tensor, recipe: AugmentationSection) -> Tensor:
    """Normalise images (N, C, H, W) in [0, 1] for the network."""
    mean = torch.tensor(recipe.mean, device=images.device)[:, None, None]
    std = torch.tensor(recipe.std, device=images.device)[:, None, None]
    return (images - mean) / std


def recolour(views: Tensor, parameters: Tensor, max_sigma: float) -> Tensor:
    """Apply each view's own parameters, the flip last.

    views: (N, 3, H, W) uint8 in RGB, or (N, C, H, W) float32 in [0, 1] with their own channels.
    parameters: (N, P) of such views, on the CPU, so that selecting views for an operation does not
    wait for the device. max_sigma: the recipe's largest blur, pixels.
    Returns (N, C, H, W) float32 in [0, 1].
    """
    if views.dtype == torch.uint8:
        images = _jittered(views.float() / 255, parameters)
    else:
        images = _jittered_channels(views.clone(), parameters)
    blurred = parameters[:, BLUR].nonzero().flatten()
    if len(blurred):
        sigma = parameters[blurred, BLUR].to(images.device)
        blurred = blurred.to(images.device)
        images[blurred] = gaussian_blur(images[blurred], sigma, max_sigma=max_sigma)
    flips = parameters[:, FLIP].bool().to(images.device)[:, None, None, None]
    return torch.where(flips, images.flip(3), images)


def _jittered(images: Tensor, parameters: Tensor) -> Tensor:
    """Colour jitter and grayscale of RGB images (N, 3, H, W), in place."""
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
    return images


def _jittered_channels(images: Tensor, parameters: Tensor) -> Tensor:
    """Brightness and contrast of each channel of images (N, C, H, W), in place.

    Contrast comes first in the half of the orders of RGB's jitter in which it precedes brightness.
    """
    order = parameters[:, ORDER].long()
    factors = parameters[:, PARAMETERS:].view(len(images), 2, -1, 1, 1)
    places = _ORDERS.argsort(1)  # (24, 4): position of each operation in each order
    contrast_first = places[order, CONTRAST] < places[order, BRIGHTNESS]
    for first in (True, False):
        chosen = ((order >= 0) & (contrast_first == first)).nonzero().flatten()
        if not len(chosen):
            continue
        brightness, contrast = factors[chosen].to(images.device).unbind(1)
        chosen = chosen.to(images.device)
        some = images[chosen]
        if first:
            some = _brightness(_channel_contrast(some, contrast), brightness)
        else:
            some = _channel_contrast(_brightness(some, brightness), contrast)
        images[chosen] = some
    return images


def _channel_contrast(images: Tensor, factor: Tensor) -> Tensor:
    mean = images.mean((2, 3), keepdim=True)
    return torch.lerp(mean.expand_as(images), images, factor).clamp_(0, 1)


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
