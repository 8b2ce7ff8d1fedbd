"""Photometric augmentation: parameters drawn per sample, pixels changed per batch.

The loader's workers draw each view's parameters from the sample's own random stream; the training
device applies them to whole batches. So the result does not depend on the batch a sample is in, and
no worker touches float pixels of RGB. The operations are those of MoCo v2: colour jitter in random
order, grayscale, Gaussian blur, flip, normalise.

A GPU changes all views of a batch that share an operation at once. A CPU changes one view after the
other, in place, because a view fits into its cache and a batch does not; small views excepted.

Images that keep their own channels have no hue, saturation or grayscale, which are defined by how
people see red, green and blue. Each of their channels has its own brightness and contrast, about
the mean of that channel; blur and flip are the same for all channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
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

_ORDERS = list(permutations(range(4)))  # 24 orders of the operations
_LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601-2, as torchvision's rgb_to_grayscale
# Values of a view up to which a CPU changes all views of a batch together: then the time of a call
# matters more than the cache. At 64 pixels that takes half of the time, at 128 pixels more.
_SMALL_VIEW = 3 * 80 * 80
# Lines of a blurred image that are computed together. Each takes a share of 2 * reach + 32 lines:
# with more of them more products are zero, with fewer the matrices are too small to be fast.
_BLURRED_LINES = 32


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
    images = torch.empty_like(views, dtype=torch.float32)
    mean, std = _statistics(recipe, views.device)
    for part in _recoloured_parts(views, parameters, recipe.blur.sigma[1], images):
        part.sub_(mean).div_(std)
    return images


def normalise(images: Tensor, recipe: AugmentationSection) -> Tensor:
    """Normalise images (N, C, H, W) in [0, 1] for the network."""
    mean, std = _statistics(recipe, images.device)
    return (images - mean) / std


def _statistics(recipe: AugmentationSection, device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(values, device=device) for values in (recipe.mean, recipe.std))
    return mean[:, None, None], std[:, None, None]


def recolour(views: Tensor, parameters: Tensor, max_sigma: float) -> Tensor:
    """Apply each view's own parameters.

    views: (N, 3, H, W) uint8 in RGB, or (N, C, H, W) float32 in [0, 1] with their own channels.
    parameters: (N, P) of such views, on the CPU, so that selecting views for an operation does not
    wait for the device. max_sigma: the recipe's largest blur, pixels.
    Returns (N, C, H, W) float32 in [0, 1].
    """
    images = torch.empty_like(views, dtype=torch.float32)
    for _ in _recoloured_parts(views, parameters, max_sigma, images):
        pass
    return images


class Scratch:
    """Memory for intermediate values, which is used again.

    On a CPU, touching newly allocated memory takes longer than the arithmetic on it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._blocks: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """The float32 memory of this name, with values of an earlier use."""
        count = int(np.prod(shape))
        block = self._blocks.get(name)
        if block is None or len(block) < count:
            block = self._blocks[name] = torch.empty(count, device=self._device)
        return block[:count].view(shape)


# Changes images (N, C, H, W) in place, each by its own row of the second argument.
_Change = Callable[[Tensor, Tensor, Scratch], None]


def _recoloured_parts(
    views: Tensor, parameters: Tensor, max_sigma: float, images: Tensor
) -> Iterator[Tensor]:
    """Write the recoloured views into `images`, and yield each part of it when it is finished."""
    scratch = Scratch(views.device)
    alone = views.device.type == "cpu" and views[:1].numel() > _SMALL_VIEW
    count = 1 if alone else max(1, len(views))
    for start in range(0, len(views), count):
        part = slice(start, start + count)
        _recolour_part(views[part], parameters[part], max_sigma, images[part], scratch)
        yield images[part]


def _recolour_part(
    views: Tensor, parameters: Tensor, max_sigma: float, images: Tensor, scratch: Scratch
) -> None:
    rows = parameters.tolist()
    # The flip is the last operation of the method. It comes first here, because it can change
    # places with all others and is fastest while a value has one byte.
    _copy_flipped(views, [row[FLIP] > 0 for row in rows], images)
    orders = [_ORDERS[int(row[ORDER])] if row[ORDER] >= 0 else () for row in rows]
    if views.dtype == torch.uint8:
        images.div_(255)
        _jitter(images, parameters, orders, scratch)
        chosen = [row[GRAYSCALE] > 0 for row in rows]
        _change(_grayscale, images, chosen, parameters[:, GRAYSCALE], scratch)
    else:
        _jitter_channels(images, parameters, orders, scratch)

    def blur(some: Tensor, sigma: Tensor, scratch: Scratch) -> None:
        gaussian_blur(some, sigma, max_sigma, scratch)

    chosen = [row[BLUR] > 0 for row in rows]
    _change(blur, images, chosen, parameters[:, BLUR], scratch)


def _copy_flipped(views: Tensor, flips: Sequence[bool], images: Tensor) -> None:
    """Write views into images, those of `flips` mirrored."""
    if all(flips):
        images.copy_(views.flip(3))
        return
    images.copy_(views)
    if any(flips):
        chosen = torch.tensor(flips).nonzero().flatten().to(images.device)
        images[chosen] = views[chosen].flip(3).to(images.dtype)


def _change(
    change: _Change, images: Tensor, chosen: Sequence[bool], amounts: Tensor, scratch: Scratch
) -> None:
    """Change the chosen images in place. amounts: a row for each image, on the CPU."""
    if all(chosen):
        change(images, amounts.to(images.device), scratch)
    elif any(chosen):
        rows = torch.tensor(chosen).nonzero().flatten()
        amounts = amounts[rows].to(images.device)
        rows = rows.to(images.device)
        some = images[rows]
        change(some, amounts, scratch)
        images[rows] = some


def _jitter(
    images: Tensor, parameters: Tensor, orders: Sequence[Sequence[int]], scratch: Scratch
) -> None:
    """Colour jitter of RGB images (N, 3, H, W), in place. An empty order stands for none."""
    amounts = parameters[:, :, None, None, None].unbind(1)
    for position in range(4):
        for number, change in enumerate((_brightness, _contrast, _saturation, _hue)):
            chosen = [len(order) > 0 and order[position] == number for order in orders]
            _change(change, images, chosen, amounts[number], scratch)


def _jitter_channels(
    images: Tensor, parameters: Tensor, orders: Sequence[Sequence[int]], scratch: Scratch
) -> None:
    """Brightness and contrast of each channel of images (N, C, H, W), in place.

    Contrast comes first in the half of the orders of RGB's jitter in which it precedes brightness.
    """
    factors = parameters[:, PARAMETERS:].view(len(images), 2, -1, 1, 1)
    for first, second in ((BRIGHTNESS, CONTRAST), (CONTRAST, BRIGHTNESS)):
        chosen = [len(order) > 0 and order.index(first) < order.index(second) for order in orders]
        for number in (first, second):
            change = _brightness if number == BRIGHTNESS else _channel_contrast
            _change(change, images, chosen, factors[:, number], scratch)


def _luma(images: Tensor, scratch: Scratch) -> Tensor:
    """(N, 1, H, W)."""
    count, _, height, width = images.shape
    red, green, blue = (images[:, i : i + 1] for i in range(3))
    luma = torch.mul(red, _LUMA[0], out=scratch("luma", count, 1, height, width))
    return luma.add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])


def _brightness(images: Tensor, factor: Tensor, _: Scratch) -> None:
    images.mul_(factor).clamp_(0, 1)


def _contrast(images: Tensor, factor: Tensor, _: Scratch) -> None:
    weights = torch.tensor(_LUMA, device=images.device)[:, None, None]
    mean = (images.mean((2, 3), keepdim=True) * weights).sum(1, keepdim=True)
    images.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 1)


def _channel_contrast(images: Tensor, factor: Tensor, _: Scratch) -> None:
    mean = images.mean((2, 3), keepdim=True)
    images.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 1)


def _saturation(images: Tensor, factor: Tensor, scratch: Scratch) -> None:
    grey = _luma(images, scratch).mul_(1 - factor)
    images.mul_(factor).add_(grey).clamp_(0, 1)


def _grayscale(images: Tensor, _: Tensor, scratch: Scratch) -> None:
    images.copy_(_luma(images, scratch))


def _hue(images: Tensor, turns: Tensor, scratch: Scratch) -> None:
    """Shift hue by `turns` of the colour circle, at most half of it; saturation and value are kept.

    In the hexcone model of HSV, each channel's position between the pixel's smallest and largest
    value is a trapezoid over the colour circle, about the channel's own hue.
    """
    count, _, height, width = images.shape
    red, green, blue = (images[:, i : i + 1] for i in range(3))
    high, low, chroma, hue = scratch("hue", 4, count, 1, height, width)
    torch.maximum(torch.maximum(red, green, out=high), blue, out=high)
    torch.minimum(torch.minimum(red, green, out=low), blue, out=low)
    torch.sub(high, low, out=chroma).clamp_(min=1e-20)  # greys get a hue, which has no effect
    # Sixths of a turn from red, in -3 to 3. Its size follows from the three sides of red's
    # trapezoid without cases; whether green or blue is larger decides on which side of red it is.
    torch.add(green, blue, out=hue).sub_(red).sub_(low).div_(chroma).add_(1)
    hue.copysign_(torch.sub(green, blue, out=low)).add_(6 * turns)
    centres = torch.tensor([0.0, 2.0, 4.0], device=images.device)[:, None, None]
    # The distance on a circle of 6 between numbers that differ by up to 9: |3 - ||a - b| - 3||.
    distance = torch.sub(hue, centres, out=scratch("distance", *images.shape))
    distance.abs_().sub_(3).abs_().sub_(3).abs_().clamp_(1, 2)
    torch.addcmul(high.add_(chroma), chroma, distance, value=-1, out=images)


def gaussian_blur(images: Tensor, sigma: Tensor, max_sigma: float, scratch: Scratch) -> None:
    """Blur each image with its own standard deviation, in place, separably, edges reflected.

    images: (N, C, H, W). sigma: (N,) pixels. The kernel reaches three of the largest allowed
    standard deviations, or as far as the image allows.
    """
    height, width = images.shape[2:]
    reach = min(max(1, int(np.ceil(3 * max_sigma))), height - 1, width - 1)
    over_rows = _blur_matrices(sigma, height, reach)
    over_columns = over_rows if width == height else _blur_matrices(sigma, width, reach)
    lines = images.flatten(1, 2)  # (N, C * H, W)
    blurred = scratch("blurred", *images.shape)
    for taken, given in _bands(width, reach):
        result = blurred.flatten(1, 2)[:, :, given]
        torch.bmm(lines[:, :, taken], over_columns[:, given, taken].mT, out=result)
    for taken, given in _bands(height, reach):
        images[:, :, given] = over_rows[:, None, given, taken] @ blurred[:, :, taken]


def _blur_matrices(sigma: Tensor, length: int, reach: int) -> Tensor:
    """(N, length, length): each blurs a line of an image, as a column, reflected at both ends."""
    places, offsets = _reflected_places(length, reach, sigma.device)
    # Not less, because numbers close to the smallest that there are take hundreds of times as long.
    kernel = torch.exp((-0.5 * (offsets / sigma[:, None]) ** 2).clamp_(min=-30))
    kernel /= kernel.sum(1, keepdim=True)
    matrices = torch.zeros(len(sigma), length, length, device=sigma.device)
    shape = (len(sigma), *places.shape)
    return matrices.scatter_add_(2, places.expand(shape), kernel[:, None].expand(shape))


@cache
def _reflected_places(length: int, reach: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The pixels of a line around each (length, taps), and how far they are from it (taps,)."""
    offsets = torch.arange(-reach, reach + 1, device=device)
    places = (torch.arange(length, device=device)[:, None] + offsets).abs()
    return (length - 1) - ((length - 1) - places).abs(), offsets


def _bands(length: int, reach: int) -> Iterator[tuple[slice, slice]]:
    """The pixels of a line, band after band: those that the band's values depend on, and itself."""
    for start in range(0, length, _BLURRED_LINES):
        end = min(length, start + _BLURRED_LINES)
        yield slice(max(0, start - reach), min(length, end + reach)), slice(start, end)
