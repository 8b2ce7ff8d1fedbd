"""Geometry: the coordinate image, whose pixels say where they come from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from dupr_cli.recipe.base import LEVEL_STRIDES, Level
from dupr_cli.recipe.pretrain import ViewsSection
from dupr_cli.views.geometry import (
    Crop,
    Grid,
    as_crop,
    overlap_fraction,
    pool_patches,
    random_crop,
    random_crop_pair,
    shared_region_boxes,
)
from dupr_cli.views.pairs import crop_and_resize
from tests.support.images import noise_image


def coordinate_view(width: int, height: int, crop: Crop, size: int) -> Tensor:
    """A view (2, S, S) of an image whose two channels are x and y of each pixel's centre."""
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    return crop_and_resize(torch.from_numpy(np.stack([x, y]).astype(np.float32)), crop, size)


@st.composite
def crop_pairs(draw: st.DrawFn) -> tuple[int, int, list[Crop]]:
    width, height = draw(st.integers(60, 401)), draw(st.integers(60, 401))
    views = ViewsSection(size=64)
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    crops = random_crop_pair(width, height, views, random)
    return width, height, [as_crop(crop) for crop in crops]


def averaging(image: Tensor, level: Level) -> Tensor:
    """A backbone that averages the pixels of each cell: centred at half strides."""
    return F.avg_pool2d(image, LEVEL_STRIDES[level])


def padded(image: Tensor, level: Level) -> Tensor:
    """A backbone of padded convolutions of stride 2, as in a ResNet: cell 0 is centred on pixel 0.

    The borders are continued in place of zeros, which would not be coordinates.
    """
    x = image
    for _ in range(LEVEL_STRIDES[level].bit_length() - 1):
        x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=2)
    return x


BACKBONES = {"averaging": averaging, "padded": padded}


def grid_of(backbone: str, level: Level) -> Grid:
    stride = LEVEL_STRIDES[level]
    return Grid(stride, stride / 2 if backbone == "averaging" else 0.5)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("level", ["res2", "res3", "res4", "res5"])
@pytest.mark.parametrize("flips", [(False, False), (True, False), (False, True), (True, True)])
@settings(max_examples=15)
@given(pair=crop_pairs(), size=st.sampled_from([96, 127, 160, 193, 224]), bins=st.integers(1, 7))
def test_both_views_patches_come_from_the_same_place(
    backbone: str,
    level: Level,
    flips: tuple[bool, bool],
    pair: tuple[int, int, list[Crop]],
    size: int,
    bins: int,
) -> None:
    width, height, crops = pair
    grid = grid_of(backbone, level)
    flip = torch.tensor([flips])
    boxes, valid = shared_region_boxes(
        torch.tensor([crops], dtype=torch.float32), flip, size, min_overlap=0.0
    )
    if not valid[0]:
        return
    places, inside = [], []
    for view in range(2):
        image = coordinate_view(width, height, crops[view], size)
        image = image.flip(2) if flips[view] else image
        features = BACKBONES[backbone](image[None], level)
        box = boxes[:, view]
        patches = pool_patches(features, box, flip[:, view], bins, grid)  # (1, bins^2, 2)
        places.append(patches[0])
        cells = clean_cells(backbone, features.shape[-1], size, grid)
        inside.append(samples_inside(box[0], bins, grid, cells, flips[view]))
    # Bins whose sampling points need cells beyond the map are clamped there: not comparable.
    both = inside[0] & inside[1]
    # In source pixels, per pixel of the coarser view: what a half-pixel shift would far exceed.
    scale = max((c[2] - c[0]) / size for c in crops) + max((c[3] - c[1]) / size for c in crops)
    difference = (places[0] - places[1]).abs().amax(1)
    # Antialiasing is cut off at the crop's border: half a pixel of the view there.
    assert (difference[both] < 0.25 * scale).all()
    expected = expected_centres(crops, bins)
    assert ((places[0] - expected).abs().amax(1)[inside[0]] < 0.25 * scale).all()


def clean_cells(backbone: str, cells: int, size: int, grid: Grid) -> tuple[int, int]:
    """First and last cell whose receptive field lies inside the view."""
    if backbone == "averaging":
        return 0, cells - 1
    reach = grid.stride - 1  # pixels to both sides of the centre
    first = -(-reach // grid.stride)
    return first, int((size - reach - grid.first - 0.5) // grid.stride)


def samples_inside(
    box: Tensor, bins: int, grid: Grid, cells: tuple[int, int], flipped: bool
) -> Tensor:
    """(bins^2,) bool: all four sampling points of the bin lie between centres of these cells."""
    low_edge, high_edge = (grid.first + cell * grid.stride for cell in cells)
    centre = []
    for low, high in ((box[0], box[2]), (box[1], box[3])):
        points = low + (high - low) * (torch.arange(2 * bins) + 0.5) / (2 * bins)
        fine = (points >= low_edge - 1e-3) & (points <= high_edge + 1e-3)
        centre.append(fine.view(bins, 2).all(1))
    columns = centre[0].flip(0) if flipped else centre[0]
    return (centre[1][:, None] & columns[None]).flatten()


def expected_centres(crops: list[Crop], bins: int) -> Tensor:
    """(bins^2, 2) centres of the shared region's bins in the source image."""
    low = [max(crops[0][i], crops[1][i]) for i in (0, 1)]
    high = [min(crops[0][i], crops[1][i]) for i in (2, 3)]
    steps = (torch.arange(bins) + 0.5) / bins
    x, y = (lo + (hi - lo) * steps for lo, hi in zip(low, high, strict=True))
    return torch.stack([x.repeat(bins), y.repeat_interleave(bins)], dim=1)


def test_a_missed_unflip_would_be_seen() -> None:
    crops: list[Crop] = [(10, 10, 110, 110), (40, 40, 140, 140)]
    boxes, _ = shared_region_boxes(
        torch.tensor([crops], dtype=torch.float32), torch.tensor([[True, False]]), 128, 0.0
    )
    image = coordinate_view(160, 160, crops[0], 128).flip(2)
    features = F.avg_pool2d(image[None], 4)
    grid = Grid(4, 2)
    right = pool_patches(features, boxes[:, 0], torch.tensor([True]), 4, grid)
    wrong = pool_patches(features, boxes[:, 0], torch.tensor([False]), 4, grid)
    expected = expected_centres(crops, 4)
    assert (right[0] - expected).abs().max() < 0.3
    assert (wrong[0] - expected).abs().max() > 10


def test_the_convention_moves_mirrored_views_of_padded_convolutions_apart() -> None:
    """The fault behind the grid: bins of opposite flips came from places stride - 1 apart."""
    crops: list[Crop] = [(0, 0, 224, 224), (0, 0, 224, 224)]
    flips = torch.tensor([[False, True]])
    boxes, _ = shared_region_boxes(torch.tensor([crops], dtype=torch.float32), flips, 224, 0.0)
    image = coordinate_view(224, 224, crops[0], 224)
    for level in ("res4", "res5"):
        stride = LEVEL_STRIDES[level]
        moved = {}
        for first in (0.5, stride / 2):
            pooled = [
                pool_patches(
                    padded((image.flip(2) if view else image)[None], level),
                    boxes[:, view], flips[:, view], 7, Grid(stride, first),
                )[0]
                for view in (0, 1)
            ]  # fmt: skip
            middle = pooled[0].view(7, 7, 2) - pooled[1].view(7, 7, 2)
            moved[first] = float(middle[3, 3, 0].abs())
        assert moved[0.5] < 0.01
        assert moved[stride / 2] == pytest.approx(stride - 1, abs=0.01)


@pytest.mark.parametrize("crop", [(0, 0, 97, 80), (13, 7, 60, 71), (30, 20, 45, 29)])
def test_views_have_the_pixels_of_a_resized_crop(crop: Crop) -> None:
    """The oracle is Pillow, as torchvision's RandomResizedCrop uses it; both round to 8 bits."""
    image = noise_image(0, 97, 80)
    found = crop_and_resize(torch.from_numpy(np.array(image)).permute(2, 0, 1), crop, 32)
    expected = image.crop(crop).resize((32, 32), Image.Resampling.BILINEAR)
    difference = found.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected)
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("crop", [(0, 0, 400, 300), (40, 30, 360, 290), (100, 80, 160, 150)])
def test_pixels_of_a_view_come_from_where_geometry_says(crop: Crop) -> None:
    """Except next to the border, where no pixels are taken from outside the crop. A filter that is
    sampled at whole pixels moves what it sees by some thousandths of a pixel."""
    x0, _, x1, _ = crop
    seen = coordinate_view(400, 300, crop, 64)[0]
    pixel = (x1 - x0) / 64
    expected = x0 + pixel * (torch.arange(64) + 0.5)
    off = ((seen - expected) / pixel).abs()  # in pixels of the view
    border = max(1, round(0.5 / pixel))
    assert off[:, border:-border].max() < 5e-3
    assert off.max() <= (0.1 if pixel >= 1 else 0.5)


def test_boxes_by_hand() -> None:
    crops = torch.tensor([[[0.0, 0, 100, 200], [50, 100, 150, 300]]])
    boxes, valid = shared_region_boxes(crops, torch.tensor([[False, True]]), 64, 0.25)
    assert valid.all()
    assert boxes[0, 0].tolist() == [32, 32, 64, 64]
    # In the second view the region is its upper left quarter; mirrored, its upper right one.
    assert boxes[0, 1].tolist() == [32, 0, 64, 32]


@pytest.mark.parametrize(
    ("shift", "is_valid"), [(75, True), (76, False), (100, False), (300, False)]
)
def test_overlap_below_the_minimum_is_invalid_and_gets_the_whole_view(
    shift: int, is_valid: bool
) -> None:
    crops = torch.tensor([[[0.0, 0, 100, 100], [shift, 0, shift + 100, 100]]])
    boxes, valid = shared_region_boxes(crops, torch.zeros(1, 2, dtype=torch.bool), 64, 0.25)
    assert bool(valid[0]) is is_valid
    if not is_valid:
        assert boxes.tolist() == [[[0, 0, 64, 64]] * 2]


@given(
    width=st.integers(1, 500),
    height=st.integers(1, 500),
    seed=st.integers(0, 2**32),
)
def test_crops_lie_inside_the_image(width: int, height: int, seed: int) -> None:
    views = ViewsSection(size=64)
    x0, y0, x1, y1 = random_crop(width, height, views, np.random.default_rng(seed))
    assert 0 <= x0 < x1 <= width
    assert 0 <= y0 < y1 <= height


def test_crop_sizes_are_distributed_as_torchvisions() -> None:
    from torchvision.transforms import RandomResizedCrop

    views = ViewsSection(size=64)
    random = np.random.default_rng(0)
    ours = np.array([random_crop(333, 250, views, random) for _ in range(4000)])
    torch.manual_seed(0)
    image = torch.zeros(3, 250, 333)
    theirs = np.array(
        [
            RandomResizedCrop.get_params(image, list(views.scale), list(views.ratio))
            for _ in range(4000)
        ]
    )  # top, left, height, width
    pairs = (
        (ours[:, 2] - ours[:, 0], theirs[:, 3]),
        (ours[:, 3] - ours[:, 1], theirs[:, 2]),
        (ours[:, 0], theirs[:, 1]),
        (ours[:, 1], theirs[:, 0]),
    )
    for mine, reference in pairs:
        deciles = [np.quantile(v, np.linspace(0.1, 0.9, 9)) for v in (mine, reference)]
        assert np.abs(deciles[0] - deciles[1]).max() < 8  # pixels; the sampling error is about 3


@given(seed=st.integers(0, 2**32))
def test_pairs_overlap_enough_unless_attempts_ran_out(seed: int) -> None:
    views = ViewsSection(size=64, min_overlap=0.25, overlap_attempts=50)
    crops = random_crop_pair(300, 200, views, np.random.default_rng(seed))
    assert overlap_fraction(as_crop(crops[0]), as_crop(crops[1])) >= 0.25
