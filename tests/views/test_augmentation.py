"""Batched augmentation against torchvision's, image by image."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dupr_cli.recipe.pretrain import AugmentationSection
from dupr_cli.views.augmentation import (
    BLUR,
    BRIGHTNESS,
    CONTRAST,
    FLIP,
    GRAYSCALE,
    HUE,
    ORDER,
    PARAMETERS,
    SATURATION,
    Scratch,
    augment,
    draw_parameters,
    gaussian_blur,
)

PLAIN = AugmentationSection(mean=(0, 0, 0), std=(1, 1, 1))


def images(count: int, side: int = 17) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


def parameters(**columns: float) -> Tensor:
    row = torch.zeros(1, PARAMETERS)
    row[:, [BRIGHTNESS, CONTRAST, SATURATION]] = 1
    row[:, ORDER] = -1
    for name, value in columns.items():
        row[:, globals()[name]] = value
    return row


@settings(max_examples=30)
@given(
    brightness=st.floats(0.6, 1.4),
    contrast=st.floats(0.6, 1.4),
    saturation=st.floats(0.6, 1.4),
    hue=st.floats(-0.5, 0.5),
)
def test_colour_jitter_equals_torchvisions(
    brightness: float, contrast: float, saturation: float, hue: float
) -> None:
    views = images(3)
    row = parameters(
        BRIGHTNESS=brightness, CONTRAST=contrast, SATURATION=saturation, HUE=hue, ORDER=0
    ).repeat(3, 1)
    expected = views.float() / 255
    expected = TF.adjust_brightness(expected, brightness)
    expected = TF.adjust_contrast(expected, contrast)
    expected = TF.adjust_saturation(expected, saturation)
    expected = TF.adjust_hue(expected, hue)
    assert torch.allclose(augment(views, row, PLAIN), expected, atol=2e-5)


def test_order_of_operations_is_followed() -> None:
    views = images(1)
    # The last of the 24 orders is hue, saturation, contrast, brightness.
    row = parameters(BRIGHTNESS=1.4, CONTRAST=0.6, SATURATION=1.4, HUE=0.1, ORDER=23)
    expected = TF.adjust_hue(views.float() / 255, 0.1)
    expected = TF.adjust_saturation(expected, 1.4)
    expected = TF.adjust_contrast(expected, 0.6)
    expected = TF.adjust_brightness(expected, 1.4)
    assert torch.allclose(augment(views, row, PLAIN), expected, atol=2e-5)


def test_grayscale_flip_and_normalisation() -> None:
    views = images(1)
    recipe = AugmentationSection()
    found = augment(views, parameters(GRAYSCALE=1, FLIP=1), recipe)
    gray = TF.rgb_to_grayscale(views.float() / 255, num_output_channels=3)
    expected = TF.normalize(TF.horizontal_flip(gray), list(recipe.mean), list(recipe.std))
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_equals_torchvisions_with_the_same_kernel(sigma: float) -> None:
    views = images(2, 21).float() / 255
    expected = TF.gaussian_blur(views, [13, 13], [sigma, sigma])
    gaussian_blur(views, torch.full((2,), sigma), 2.0, Scratch(views.device))
    assert torch.allclose(views, expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(70, 33), (40, 99), (5, 64), (224, 224)])
def test_blur_of_any_shape_equals_torchvisions(shape: tuple[int, int]) -> None:
    """Lines are blurred in bands; short ones limit the kernel."""
    views = torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    taps = 2 * min(6, shape[0] - 1) + 1
    expected = torch.stack(
        [
            TF.gaussian_blur(view, [taps, taps], [s, s])
            for view, s in zip(views, (0.4, 2.0), strict=True)
        ]
    )
    gaussian_blur(views, torch.tensor([0.4, 2.0]), 2.0, Scratch(views.device))
    assert torch.allclose(views, expected, atol=1e-6)


@pytest.mark.parametrize("side", [32, 96])
def test_all_operations_equal_torchvisions(side: int) -> None:
    """Small views are changed together, large ones one after the other."""
    views, random = images(40, side), np.random.default_rng(1)
    rows = torch.from_numpy(np.stack([draw_parameters(PLAIN, random) for _ in range(40)]))
    found = augment(views, rows, PLAIN)
    for view, row, image in zip(views, rows, found, strict=True):
        assert torch.allclose(image, by_torchvision(view, row), atol=2e-5)


def by_torchvision(view: Tensor, row: Tensor) -> Tensor:
    x = view.float() / 255
    changes = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]
    if row[ORDER] >= 0:
        for number in list(permutations(range(4)))[int(row[ORDER])]:
            x = changes[number](x, float(row[number]))
    if row[GRAYSCALE]:
        x = TF.rgb_to_grayscale(x, num_output_channels=3)
    if row[BLUR]:
        x = TF.gaussian_blur(x, [13, 13], [float(row[BLUR])] * 2)
    return TF.horizontal_flip(x) if row[FLIP] else x


@pytest.mark.parametrize("turns", [-0.5, -0.3, -0.1, 0.0, 0.2, 0.5])
def test_hue_of_greys_and_of_two_equal_channels(turns: float) -> None:
    """Every colour of four levels, so that all cases of equal and extreme channels occur."""
    levels = torch.tensor([0, 1, 128, 255], dtype=torch.uint8)
    views = torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, 8, 8)
    expected = TF.adjust_hue(views.float() / 255, turns)
    found = augment(views, parameters(HUE=turns, ORDER=0), PLAIN)
    assert torch.allclose(found, expected, atol=1e-5)


def test_each_image_gets_its_own_parameters() -> None:
    views = images(6)
    random = np.random.default_rng(3)
    rows = torch.from_numpy(np.stack([draw_parameters(PLAIN, random) for _ in range(6)]))
    together = augment(views, rows, PLAIN)
    alone = torch.cat([augment(views[i : i + 1], rows[i : i + 1], PLAIN) for i in range(6)])
    assert torch.allclose(together, alone, atol=1e-6)
    assert rows[:, BLUR].std() > 0


def test_parameters_follow_the_recipe() -> None:
    recipe = AugmentationSection()
    random = np.random.default_rng(0)
    rows = np.stack([draw_parameters(recipe, random) for _ in range(4000)])
    shares = {
        "jitter": (rows[:, ORDER] >= 0, 0.8),
        "grayscale": (rows[:, GRAYSCALE], 0.2),
        "blur": (rows[:, BLUR] > 0, 0.5),
        "flip": (rows[:, FLIP], 0.5),
    }
    for values, probability in shares.values():
        assert abs(values.mean() - probability) < 0.04  # five standard errors
    assert 0.6 <= rows[:, BRIGHTNESS].min() < 0.61
    assert 1.39 < rows[:, BRIGHTNESS].max() <= 1.4
    assert -0.1 <= rows[:, HUE].min() < -0.098
    assert set(rows[rows[:, ORDER] >= 0, ORDER]) == set(range(24))
    blurred = rows[rows[:, BLUR] > 0, BLUR]
    assert blurred.min() >= 0.1
    assert blurred.max() <= 2.0
