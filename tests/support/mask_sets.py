"""Sets with semantic masks made on the spot: VOC, Cityscapes and plain folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Mask = NDArray[np.uint8]
Splits = Mapping[str, Sequence[Mask]]

PALETTE = [value for number in range(256) for value in (number, 255 - number, number * 7 % 256)]
COLOURS = np.array([(128, 128, 128), (220, 40, 40), (40, 200, 60), (50, 60, 220)])


def scene(seed: int, classes: int = 3, size: tuple[int, int] = (96, 72)) -> Mask:
    """Rectangles of classes on background 0, under two rows that are not labelled."""
    random = np.random.default_rng(seed)
    mask = np.zeros(size[::-1], dtype=np.uint8)
    for number in range(1, classes):
        x, y = (int(random.integers(0, side // 2)) for side in size)
        mask[y : y + size[1] // 2, x : x + size[0] // 3] = number
    mask[:2] = 255
    return mask


def scenes(**splits: int) -> dict[str, list[Mask]]:
    """Scenes of each split, all different."""
    found: dict[str, list[Mask]] = {}
    for split, count in splits.items():
        start = 100 * len(found)
        found[split] = [scene(start + number) for number in range(count)]
    return found


def drawn(mask: Mask) -> Image.Image:
    """An image in the colours of its classes; what is not labelled is background."""
    return Image.fromarray(COLOURS[np.where(mask == 255, 0, mask) % 4].astype(np.uint8))


def save_grey(mask: Mask, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(path)


def save_palette(mask: Mask, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(mask, mode="P")
    image.putpalette(PALETTE)
    image.save(path)


def plain_folder(
    root: Path,
    splits: Splits,
    names: Sequence[str] = ("background", "red", "green"),
    save: Callable[[Mask, Path], None] = save_grey,
) -> Path:
    """images/<split>/, masks/<split>/ and, with names, classes.txt."""
    for split, masks in splits.items():
        (root / "images" / split).mkdir(parents=True)
        for number, mask in enumerate(masks):
            drawn(mask).save(root / "images" / split / f"{split}{number}.png")
            save(mask, root / "masks" / split / f"{split}{number}.png")
    if names:
        (root / "classes.txt").write_text("\n".join(names) + "\n")
    return root


def voc_year(root: Path, splits: Splits, augmented: bool = False) -> Path:
    """A year of VOC with masks. augmented: the masks lie in SegmentationClassAug."""
    lists = root / "ImageSets" / "Segmentation"
    for folder in (lists, root / "JPEGImages", root / "SegmentationClass"):
        folder.mkdir(parents=True, exist_ok=True)
    folder = root / ("SegmentationClassAug" if augmented else "SegmentationClass")
    for split, masks in splits.items():
        ids = [f"2012_{split}{number}" for number in range(len(masks))]
        for image_id, mask in zip(ids, masks, strict=True):
            drawn(mask).save(root / "JPEGImages" / f"{image_id}.jpg", quality=95)
            save_palette(mask, folder / f"{image_id}.png")
        (lists / f"{split}.txt").write_text("\n".join(ids) + "\n")
    return root


def cityscapes(root: Path, splits: Splits) -> Path:
    """masks: with Cityscapes' own label ids."""
    for split, masks in splits.items():
        for number, mask in enumerate(masks):
            name = f"ulm_{number:06d}_000019"
            image = root / "leftImg8bit" / split / "ulm" / f"{name}_leftImg8bit.png"
            image.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.stack([mask * 7] * 3, axis=2)).save(image)
            save_grey(mask, root / "gtFine" / split / "ulm" / f"{name}_gtFine_labelIds.png")
    return root
