"""Retrieval: the geometry by images that say where each pixel comes from, ranks by brute force."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from dupr_cli.datasets.labelled import open_labelled
from dupr_cli.probe.data import ImageSet, open_pictured
from dupr_cli.probe.objects import (
    ObjectBatch,
    ObjectImages,
    object_features,
    precision_at,
    searched_objects,
)
from dupr_cli.probe.patches import ViewPairs
from dupr_cli.progress import SilentReporter
from dupr_cli.recipe import Level
from dupr_cli.recipe.base import LEVEL_STRIDES
from dupr_cli.recipe.probe import RetrievalSection
from dupr_cli.views import retrieval
from dupr_cli.views.augmentation import FLIP, GRAYSCALE, draw_parameters, recolour
from dupr_cli.views.geometry import Grid
from dupr_cli.views.pairs import ViewPairBatch
from dupr_cli.views.retrieval import own_ranks, paired_bins, share_within
from tests.support.images import noise_image
from tests.support.labelled_scenes import add_image, add_split, annotation_xml

LEVELS: list[Level] = ["res2", "res3", "res4"]


@dataclass(frozen=True)
class Coordinates:
    """One image: red is x and green is y of each pixel's centre, in half pixels."""

    def image(self, number: int) -> Image.Image:
        del number
        x, y = np.meshgrid(np.arange(120), np.arange(100))
        return Image.fromarray(np.stack([2 * x + 1, 2 * y + 1, 0 * x], 2).astype(np.uint8))

    def size(self, number: int) -> int:
        return number


def bins_of_views(batch: ViewPairBatch, section: RetrievalSection) -> tuple[Tensor, Tensor]:
    """Bins at res2 of a network that averages the pixels of every cell, in units of 0 to 255."""

    def maps(images: Tensor) -> dict[Level, Tensor]:
        return average_maps(255 * images, ["res2"])

    bins: dict[Level, int] = {"res2": section.bins}
    grids: dict[Level, Grid] = {"res2": Grid(4, 2)}
    found = paired_bins(maps, batch, bins, grids, section.views, 1.0, torch.device("cpu"))["res2"]
    return found.first, found.second


def average_maps(images: Tensor, levels: Sequence[Level]) -> dict[Level, Tensor]:
    """A network that averages the pixels of every cell."""
    return {v: F.avg_pool2d(images.float(), LEVEL_STRIDES[v]) for v in levels}


def plain(**keys: object) -> RetrievalSection:
    """Views that are cut and flipped, their colours untouched."""
    values = {
        "views": {"size": 128, "scale": (0.3, 1.0)},
        "color_jitter": {"probability": 0.0},
        "grayscale_probability": 0.0,
        "blur": {"probability": 0.0},
        "bins": 3,
        **keys,
    }
    return RetrievalSection.model_validate(values)


def coordinate_pairs(seed: int, count: int, section: RetrievalSection) -> ViewPairBatch:
    ids = tuple(f"image{i}" for i in range(count))
    images = ImageSet("here", "all", ids, (), Coordinates(), (0,) * count)
    read = ViewPairs(images, section, seed)
    return ViewPairBatch.stack([read(position) for position in range(count)])


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32))
def test_bins_of_both_views_come_from_the_same_place(seed: int) -> None:
    section = plain()
    batch = coordinate_pairs(seed, 8, section)
    first, second = bins_of_views(batch, section)
    # Half pixels of a source that the views magnify: two are one pixel of the image, at the
    # borders, where sampling points beyond the outermost cells are clamped to them.
    difference = (first - second)[:, :2].abs()
    assert difference.max() < 4
    assert difference.mean() < 0.7


def test_views_are_flipped_and_bins_turned_back() -> None:
    section = plain()
    batch = coordinate_pairs(0, 16, section)
    assert 4 < int(batch.flips.sum()) < 28
    first, second = bins_of_views(batch, section)
    assert (first - second)[:, 0].abs().max() < 4
    mirrored = replace(batch, views=batch.views.flip(4))
    wrong, _ = bins_of_views(mirrored, section)
    assert (wrong - second)[:, 0].abs().max() > 40


def test_coordinates_find_themselves_among_all_bins_of_their_image() -> None:
    section = plain()
    first, second = bins_of_views(coordinate_pairs(3, 1, section), section)
    # Not by the cosine of (x, y, 0), which is a direction only: x and y on a circle each.
    circles = [
        torch.cat([(v[:, :2] / 90).cos(), (v[:, :2] / 90).sin()], 1) for v in (first, second)
    ]
    assert own_ranks(*circles).tolist() == [0] * 9


def photographs(folder: Path, count: int) -> ImageSet:
    folder.mkdir()
    for number in range(count):
        noise_image(number, 90, 70).save(folder / f"{number}.png")
    return open_pictured(str(folder), None, SilentReporter())


def test_views_hang_on_seed_and_image_alone(tmp_path: Path) -> None:
    images = photographs(tmp_path / "images", 4)
    section = RetrievalSection.model_validate({"views": {"size": 64}})
    read = ViewPairs(images, section, 7)
    of_some = ViewPairs(images.subset([3, 1]), section, 7)
    for one, other in ((read(3), of_some(0)), (read(1), of_some(1))):
        assert torch.equal(one.views, other.views)
        assert torch.equal(one.crops, other.crops)
    reseeded = ViewPairs(images, section, 8)(3)
    assert not torch.equal(reseeded.crops, read(3).crops)


def test_colours_are_changed_as_often_as_the_recipe_says() -> None:
    rows = [draw_parameters(RetrievalSection(), np.random.default_rng(seed)) for seed in range(400)]
    assert 50 < sum(row[GRAYSCALE] for row in rows) < 110  # 80 expected, standard deviation 8
    assert 170 < sum(row[FLIP] for row in rows) < 230
    always = RetrievalSection.model_validate({"blur": {"probability": 1.0, "sigma": (8.0, 8.0)}})
    view = torch.from_numpy(np.array(noise_image(0, 32, 32))).permute(2, 0, 1)[None]
    row = torch.from_numpy(draw_parameters(always, np.random.default_rng(0)))[None]
    blurred = recolour(view, row, 8.0)
    assert blurred.shape == (1, 3, 32, 32)
    assert 0 <= float(blurred.min()) <= float(blurred.max()) <= 1


@given(seed=st.integers(0, 10**6), count=st.integers(2, 40))
def test_ranks_are_those_of_sorting(seed: int, count: int) -> None:
    random = np.random.default_rng(seed)
    queries, pool = (torch.tensor(random.normal(size=(count, 5))) for _ in range(2))
    ranks = own_ranks(queries, pool)
    similarities = F.normalize(queries, dim=1) @ F.normalize(pool, dim=1).T
    gaps = similarities.sort(dim=1).values.diff(dim=1)
    assume(bool((gaps > 1e-5).all()))  # closer ones count as equal
    order = similarities.argsort(dim=1, descending=True)
    expected = (order == torch.arange(count)[:, None]).int().argmax(1)
    assert ranks.tolist() == expected.tolist()
    nearest = similarities.argmax(dim=1) == torch.arange(count)
    assert share_within(ranks, 1) == pytest.approx(float(nearest.double().mean()))


def test_blocks_do_not_change_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    queries, pool = (torch.tensor(random.normal(size=(50, 5))) for _ in range(2))
    whole = own_ranks(queries, pool)
    monkeypatch.setattr(retrieval, "_CHUNK", 7)
    monkeypatch.setattr(retrieval, "_POOL", 11)
    assert torch.equal(own_ranks(queries, pool), whole)


def test_features_that_are_all_the_same_find_nothing() -> None:
    same = torch.ones(30, 4) + 1e-9 * torch.randn(30, 4)
    assert (own_ranks(same, same) == 29).all()


def by_hand(features: Tensor, labels: Tensor, images: Tensor, k: int) -> tuple[float, float]:
    shares, chances = [], []
    for i in range(len(features)):
        others = [j for j in range(len(features)) if images[j] != images[i]]
        near = sorted(
            others, key=lambda j: -float(F.cosine_similarity(features[i], features[j], dim=0))
        )
        shares.append(np.mean([bool(labels[j] == labels[i]) for j in near[:k]]))
        chances.append(np.mean([bool(labels[j] == labels[i]) for j in others]))
    return float(np.mean(shares)), float(np.mean(chances))


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 12))
def test_precision_is_that_of_sorting(seed: int, k: int) -> None:
    random = np.random.default_rng(seed)
    features = torch.tensor(random.normal(size=(14, 4)))
    labels = torch.tensor(random.integers(0, 3, 14))
    images = torch.tensor([0, 1, *random.integers(0, 5, 12)])
    shares, chances = precision_at(features, labels, images, [1, k])
    expected = by_hand(features, labels, images, k)
    assert float(shares[k].mean()) == pytest.approx(expected[0])
    assert float(chances.mean()) == pytest.approx(expected[1])


def test_objects_are_pooled_where_their_boxes_are(tmp_path: Path) -> None:
    """An averaging network sees of a coloured box its colour, whatever the image's shape."""
    add_image(tmp_path, "wide", [("red", 11, 11, 50, 40), ("blue", 61, 21, 90, 60)], (120, 64))
    add_image(tmp_path, "tall", [("green", 5, 41, 60, 90)], (64, 120))
    add_split(tmp_path, "val", ["wide", "tall"])
    images = open_labelled(str(tmp_path), ["val"], SilentReporter())
    wanted, names, places = searched_objects(images, 8)
    assert (names, places) == (["red", "blue", "green"], [0, 0, 1])
    batch = ObjectBatch.stack([ObjectImages(images, wanted, 240)(i) for i in wanted])
    colours = object_features(average_maps, batch, ["res2"])["res2"]
    expected = torch.tensor([[220, 40, 40], [50, 60, 220], [40, 200, 60]])
    # Cells across the box's edge let some of the grey in.
    assert (colours - expected).abs().max() < 20


def test_small_and_difficult_objects_are_not_looked_for(tmp_path: Path) -> None:
    add_image(tmp_path, "a", [("red", 1, 1, 40, 30), ("green", 50, 1, 57, 8)])
    add_image(tmp_path, "b", [("red", 1, 1, 40, 30)])
    xml = annotation_xml([("red", 1, 1, 40, 30)], difficult=True)
    (tmp_path / "Annotations" / "b.xml").write_text(xml)
    add_split(tmp_path, "val", ["a", "b"])
    images = open_labelled(str(tmp_path), ["val"], SilentReporter())
    wanted, names, places = searched_objects(images, 9)
    assert (list(wanted), names, places) == ([0], ["red"], [0])
