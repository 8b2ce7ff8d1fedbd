"""Views of images that keep their channels: cut as those of RGB, changed channel by channel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tf
from PIL import Image

from dupr_cli.artifacts.pixel_formats import ChannelImage
from dupr_cli.datasets.tensors import as_tensor
from dupr_cli.recipe.pretrain import AugmentationSection, ViewsSection
from dupr_cli.views.augmentation import (
    BLUR,
    BRIGHTNESS,
    CONTRAST,
    FLIP,
    ORDER,
    PARAMETERS,
    draw_parameters,
    normalise,
    recolour,
    uses_rgb,
)
from dupr_cli.views.pairs import crop_and_resize, cut_pair
from tests.support.images import noise_image

RECIPE = AugmentationSection()
CHANNELS = 5


def views(count: int = 2, size: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, CHANNELS, size, size, generator=generator)


def unchanged(count: int = 2) -> torch.Tensor:
    """Parameters that change nothing."""
    rows = torch.zeros(count, PARAMETERS + 2 * CHANNELS)
    rows[:, ORDER] = -1
    rows[:, PARAMETERS:] = 1
    return rows


def test_views_are_cut_as_those_of_rgb() -> None:
    """The same crops, and the same pixels but for the rounding to 8 bits."""
    image = noise_image(0, 96, 80)
    same = ChannelImage((np.asarray(image) / 255).astype(np.float32))
    section = ViewsSection(size=32)
    one = cut_pair(as_tensor(image), section, RECIPE, np.random.default_rng(3))
    other = cut_pair(as_tensor(same), section, RECIPE, np.random.default_rng(3))
    assert torch.equal(one.crops, other.crops)
    assert torch.equal(one.parameters[0], other.parameters[0, :PARAMETERS])
    assert other.views.dtype == torch.float32
    assert other.views.numpy() == pytest.approx(one.views.numpy() / 255, abs=1 / 255)


def test_resizing_is_antialiased_in_every_channel() -> None:
    """Single lines of every second pixel become an even grey, as Pillow's do."""
    values = np.zeros((64, 64, CHANNELS), dtype=np.float32)
    values[:, ::2] = 1
    small = crop_and_resize(as_tensor(ChannelImage(values)), (0, 0, 64, 64), 8)
    assert small[:, :, 1:-1].numpy() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("first", ["brightness", "contrast"])
def test_jitter_is_torchvisions_in_each_channel(first: str) -> None:
    """The oracle changes every channel as a grey image of its own."""
    generator = torch.Generator().manual_seed(1)
    factors = 0.6 + 0.8 * torch.rand(2, 2, CHANNELS, generator=generator)
    rows = unchanged()
    # Number 0 of the orders is brightness, contrast, ...; number 6 is contrast, brightness, ...
    rows[:, ORDER] = 0 if first == "brightness" else 6
    rows[:, PARAMETERS:] = factors.flatten(1)
    found = recolour(views(), rows, 1.0)
    changes = [tf.adjust_brightness, tf.adjust_contrast]
    order = (BRIGHTNESS, CONTRAST) if first == "brightness" else (CONTRAST, BRIGHTNESS)
    for number, image in enumerate(views()):
        for channel in range(CHANNELS):
            wanted = image[channel : channel + 1]
            for operation in order:
                wanted = changes[operation](wanted, float(factors[number, operation, channel]))
            assert found[number, channel].numpy() == pytest.approx(wanted[0].numpy(), abs=1e-5)


def test_nothing_changes_without_jitter_and_the_input_never_does() -> None:
    given = views()
    assert torch.equal(recolour(given, unchanged(), 1.0), views())
    rows = unchanged()
    rows[:, ORDER], rows[:, PARAMETERS:] = 0, 0.5
    recolour(given, rows, 1.0)
    assert torch.equal(given, views())


def test_blur_and_flip_are_the_same_for_all_channels() -> None:
    rows = unchanged()
    rows[0, BLUR], rows[1, FLIP] = 1.2, 1
    alike = views()[:, :1].expand(-1, CHANNELS, -1, -1).contiguous()
    found = recolour(alike, rows, 2.0)
    assert all(torch.equal(found[:, 0], found[:, c]) for c in range(1, CHANNELS))
    assert torch.equal(found[1], alike[1].flip(2))
    assert found[0].std() < alike[0].std()


def test_drawn_factors_are_each_channels_own_and_in_range() -> None:
    random = np.random.default_rng(0)
    rows = np.stack([draw_parameters(RECIPE, random, CHANNELS) for _ in range(200)])
    factors = rows[:, PARAMETERS:]
    assert factors.shape == (200, 2 * CHANNELS)
    assert factors.min() >= 0.6
    assert factors.max() <= 1.4
    assert np.abs(np.corrcoef(factors.T) - np.eye(2 * CHANNELS)).max() < 0.35


def test_the_first_parameters_are_those_of_rgb() -> None:
    row = draw_parameters(RECIPE, np.random.default_rng(5), CHANNELS)
    assert np.array_equal(row[:PARAMETERS], draw_parameters(RECIPE, np.random.default_rng(5)))


def test_every_channel_has_its_own_statistics() -> None:
    recipe = AugmentationSection(mean=(0.1, 0.2, 0.3, 0.4, 0.5), std=(1, 2, 3, 4, 5))
    found = normalise(views(), recipe)
    for channel in range(CHANNELS):
        wanted = (views()[:, channel] - (channel + 1) / 10) / (channel + 1)
        assert torch.allclose(found[:, channel], wanted)


def test_a_recipe_knows_whether_it_uses_colour() -> None:
    grey = {"color_jitter": {"saturation": 0, "hue": 0}, "grayscale_probability": 0}
    assert uses_rgb(RECIPE)
    assert not uses_rgb(AugmentationSection.model_validate(grey))


def test_what_people_see_is_the_first_three_channels_or_the_first_as_grey() -> None:
    values = np.stack([np.full((2, 2), share, np.float32) for share in (0.2, 0.4, 0.6, 0.8)], 2)
    pixels = [ChannelImage(values[..., :count]).shown().getpixel((0, 0)) for count in (1, 2, 3, 4)]
    assert pixels == [(51, 51, 51), (51, 51, 51), (51, 102, 153), (51, 102, 153)]
    assert isinstance(ChannelImage(values).shown(), Image.Image)
