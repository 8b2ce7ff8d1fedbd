"""Statistics of shards, as numbers and as a picture: sizes, aspects, colours, classes, boxes."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dupr_cli.artifacts.files import atomic_file
from dupr_cli.artifacts.pixel_formats import PixelFormat
from dupr_cli.artifacts.shards import open_shards
from dupr_cli.datasets.channels import ChannelPicture, open_as
from dupr_cli.datasets.pixel_statistics import LEAST_STD, PixelSums
from dupr_cli.datasets.pixels import Picture
from dupr_cli.errors import UsageError
from dupr_cli.outside_text import plot_label
from dupr_cli.progress import Reporter

_COLOURS_OF = 1000  # number of images whose pixels are averaged, spread over the set
_SMALL, _LARGE = 32**2, 96**2  # pixels; source: COCO's small, medium and large objects


@dataclass(frozen=True)
class Histogram:
    """counts[i]: values from edges[i] to below edges[i + 1]; the last includes its upper edge."""

    edges: list[float]
    counts: list[int]


@dataclass(frozen=True)
class KeptValues:
    """The values that shards keep, over the pixels of some images, before they are scaled.

    pixels: channels and range of the set. lowest, highest: of each channel. outside: share of all
    values that are outside the range. recipe: lines for the recipe of `dupr pretrain`.
    """

    pixels: PixelFormat
    lowest: list[int]
    highest: list[int]
    outside: float
    recipe: list[str]


@dataclass(frozen=True)
class Stats:
    """widths, heights: quantiles 0, 0.25, 0.5, 0.75, 1, in pixels. aspect: width / height.

    mean, std: of the channels R, G, B in 0..1, over the pixels of some images. objects: number of
    labelled boxes by class. object_sizes: how many are small, medium and large by COCO's areas.
    kept: of images that keep their channels, None for RGB; mean and std are then of those channels.
    """

    shards: int
    images: int
    bytes: int
    unreadable: int
    widths: list[float]
    heights: list[float]
    side: Histogram
    aspect: Histogram
    mean: list[float]
    std: list[float]
    labelled_images: int
    objects: dict[str, int]
    object_sizes: dict[str, int]
    object_side: Histogram
    labels: dict[str, int]
    kept: KeptValues | None = None


def measure(address: str | Path, split: str | None, reporter: Reporter) -> Stats:
    """Read every sample once. Raises UsageError when `address` holds no shards."""
    shards = open_shards(str(address), split)
    shards.cached_indexes = 8
    every = max(1, len(shards) // _COLOURS_OF)
    sizes: list[tuple[int, int]] = []
    sides: list[float] = []
    classes: Counter[str] = Counter()
    areas: Counter[str] = Counter()
    labels: Counter[str] = Counter()
    labelled, unreadable, size = 0, 0, 0
    sums = PixelSums(3 if shards.pixels is None else shards.pixels.channels)
    values = None if shards.pixels is None else _Values(shards.pixels)
    with reporter.task("measure", len(shards), "images") as progress:
        for number in range(len(shards)):
            sample = shards[number]
            size += len(sample.image)
            try:
                picture = open_as(io.BytesIO(sample.image), shards.pixels)
                sizes.append(picture.upright)
                if number % every == 0:
                    _add(picture, sums, values)
            except MemoryError:
                raise
            # On damaged files, decoders raise exceptions of any kind.
            except Exception:
                unreadable += 1
            if sample.label is not None:
                labels[sample.label] += 1
            labelled += sample.boxes is not None
            for box in sample.boxes or ():
                area = max(0.0, box.x_max - box.x_min) * max(0.0, box.y_max - box.y_min)
                classes[box.name] += 1
                areas["small" if area < _SMALL else "medium" if area < _LARGE else "large"] += 1
                sides.append(area**0.5)
            progress.advance(1)
    if not sizes:
        raise UsageError(f"{address}: none of {len(shards)} images can be read.")
    both = np.array(sizes, dtype=np.float64)
    mean, std = sums.mean_and_std()
    return Stats(
        shards=len(shards.shards),
        images=len(shards),
        bytes=size,
        unreadable=unreadable,
        widths=np.quantile(both[:, 0], [0, 0.25, 0.5, 0.75, 1]).tolist(),
        heights=np.quantile(both[:, 1], [0, 0.25, 0.5, 0.75, 1]).tolist(),
        side=_histogram(np.sqrt(both.prod(1))),
        aspect=_histogram(both[:, 0] / both[:, 1]),
        mean=mean,
        std=std,
        labelled_images=labelled,
        objects=dict(classes.most_common()),
        object_sizes={name: areas[name] for name in ("small", "medium", "large")},
        object_side=_histogram(np.array(sides)),
        labels=dict(labels.most_common()),
        kept=values.kept(mean, std) if values is not None else None,
    )


def _add(picture: Picture | ChannelPicture, sums: PixelSums, values: _Values | None) -> None:
    """Decode an image and add its pixels."""
    if isinstance(picture, Picture):
        sums.add(np.asarray(picture.rgb()) / 255)
    elif values is not None:
        kept = picture.values()
        sums.add(values.pixels.scaled(kept))
        values.add(kept)


class _Values:
    """The extremes of values that shards keep, and how many are outside their range."""

    def __init__(self, pixels: PixelFormat) -> None:
        self.pixels, self._outside, self._count = pixels, 0, 0
        self._lowest = np.full(pixels.channels, np.iinfo(np.int64).max)
        self._highest = np.zeros(pixels.channels, dtype=np.int64)

    def add(self, values: NDArray[np.integer]) -> None:
        """values: (H, W, C) of one image."""
        low, high = self.pixels.range
        self._lowest = np.minimum(self._lowest, values.min((0, 1)))
        self._highest = np.maximum(self._highest, values.max((0, 1)))
        self._outside += int(np.count_nonzero((values < low) | (values > high)))
        self._count += values.size

    def kept(self, mean: list[float], std: list[float]) -> KeptValues:
        keys = {"mean": mean, "std": [max(value, LEAST_STD) for value in std]}
        lines = [
            f"    {key}: [{', '.join(f'{v:.4g}' for v in values)}]" for key, values in keys.items()
        ]
        return KeptValues(
            self.pixels,
            self._lowest.tolist(),
            self._highest.tolist(),
            self._outside / self._count,
            ["method:", "  augmentation:", *lines],
        )


def _histogram(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> Histogram:
    """Bins of equal ratio, since sizes and aspects vary by orders of magnitude."""
    positive = values[values > 0]
    if not len(positive):
        return Histogram([], [])
    low, high = float(positive.min()), float(positive.max())
    bins = 1 if low == high else 24
    edges = np.geomspace(low, high if high > low else low * 1.01, bins + 1)
    edges[0], edges[-1] = low, max(high, edges[-1])
    counts, _ = np.histogram(positive, edges)
    return Histogram(edges.tolist(), counts.tolist())


def as_facts(stats: Stats) -> list[tuple[str, str]]:
    """Names and values for a table of two columns."""

    def spread(values: Sequence[float]) -> str:
        low, quarter, middle, three, high = (round(value) for value in values)
        return f"{middle} (half from {quarter} to {three}, all from {low} to {high})"

    facts = [
        ("images", f"{stats.images} in {_shards(stats.shards)}, {stats.bytes / 1e6:.1f} MB"),
        ("widths", spread(stats.widths)),
        ("heights", spread(stats.heights)),
        ("mean", ", ".join(f"{value:.3f}" for value in stats.mean)),
        ("std", ", ".join(f"{value:.3f}" for value in stats.std)),
    ]
    if stats.kept is not None:
        limits = zip(stats.kept.lowest, stats.kept.highest, strict=True)
        facts += [
            ("kept", f"{stats.kept.pixels}"),
            ("values", ", ".join(f"{low} to {high}" for low, high in limits)),
            ("outside", f"{100 * stats.kept.outside:.2g}% of the values are outside the range"),
        ]
    if stats.unreadable:
        facts.append(("unreadable", f"{stats.unreadable} images"))
    if stats.labels:
        facts.append(("classes of images", _most_common(stats.labels)))
    if stats.labelled_images:
        total = sum(stats.objects.values())
        sizes = ", ".join(f"{count} {name}" for name, count in stats.object_sizes.items())
        facts.append(("objects", f"{total} in {stats.labelled_images} labelled images: {sizes}"))
        facts.append(("classes", _most_common(stats.objects)))
    return facts


def _most_common(counts: dict[str, int], most: int = 20) -> str:
    shown = [f"{name} {count}" for name, count in list(counts.items())[:most]]
    return ", ".join(shown) + (f" and {len(counts) - most} more" if len(counts) > most else "")


_WIDE = 5  # a histogram over more than this factor gets few numbers at its axis


def _shards(number: int) -> str:
    return "1 shard" if number == 1 else f"{number} shards"


def draw_stats(stats: Stats, path: Path) -> None:
    """Write the histograms as a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    labelled = bool(stats.objects)
    figure = Figure(figsize=(11, 7 if labelled else 3.6), layout="constrained")
    axes = figure.subplots(2 if labelled else 1, 2, squeeze=False)
    panels = [
        (axes[0, 0], stats.side, "side of an image, square root of its area (pixels)"),
        (axes[0, 1], stats.aspect, "width / height"),
    ]
    if labelled:
        panels.append((axes[1, 0], stats.object_side, "side of an object (pixels)"))
        names = list(stats.objects)[:20][::-1]
        counts = [stats.objects[name] for name in names]
        axes[1, 1].barh([*map(plot_label, names)], counts, color="#1f77b4")
        axes[1, 1].set_xlabel("objects")
    for axis, histogram, title in panels:
        if histogram.counts:
            axis.stairs(histogram.counts, histogram.edges, fill=True, color="#1f77b4")
        axis.set_xscale("log")
        for ticks in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
            ticks(ScalarFormatter())
        # The numbers from 5 to 10 of every decade would be written over one another.
        if histogram.counts and histogram.edges[-1] > _WIDE * histogram.edges[0]:
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_minor_formatter(NullFormatter())
        axis.tick_params(axis="x", which="both", length=3.5, pad=3.5)  # on one line
        axis.set_xlabel(title)
        axis.set_ylabel("images" if axis in axes[0] else "objects")
    figure.suptitle(f"{stats.images} images in {_shards(stats.shards)}")
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=100)
