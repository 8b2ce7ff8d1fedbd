"""Testing: what a trained network finds in every test image, in pixels of that image."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.nn.functional import grid_sample

from dupr_cli.datasets.labelled import Annotation, LabelledSet
from dupr_cli.evaluate.detection_data import Batch
from dupr_cli.evaluate.detector_data import HeadOutput
from dupr_cli.metrics.types import Detections, Rle
from dupr_cli.progress import Reporter
from dupr_cli.runtime.parallel import World

if TYPE_CHECKING:
    from dupr_cli.evaluate.detectors import Detector, FrozenDetector


Found = TypeVar("Found")


def positions_of(world: World, images: int) -> list[int]:
    """Test images of this process."""
    return list(range(world.rank, images, world.size))


def find_all(
    output: Callable[[Any, Batch, Annotation], Found],
    detector: Detector | FrozenDetector,
    batches: Iterable[Batch],
    images: LabelledSet,
    name: str,
    world: World,
    reporter: Reporter,
) -> list[Found]:
    """What the network finds in each image of the set, in its order, in all processes.

    output: what it finds in a batch of one image, see `Task`. batches: this process's images one by
    one, see `test_batches`. name: for progress.
    """
    detector.eval()
    positions = positions_of(world, len(images))
    found: list[Found] = []
    with torch.inference_mode(), reporter.task(f"test {name}", len(positions), "images") as task:
        for position, batch in zip(positions, batches, strict=True):
            found.append(output(detector, batch, images.annotations[position]))
            task.advance()
    return _gather_all(found, len(images), world)


def _gather_all(found: list[Found], images: int, world: World) -> list[Found]:
    if world.size == 1:
        return found
    gathered: list[list[Found]] = [[] for _ in range(world.size)]
    dist.all_gather_object(gathered, found)
    return [gathered[i % world.size][i // world.size] for i in range(images)]


def in_source_pixels(
    found: HeadOutput, annotation: Annotation, width: int, height: int
) -> Detections:
    """Undo the resize to (width, height); each side was rounded to whole pixels separately."""
    scale = np.array([annotation.width / width, annotation.height / height] * 2)
    boxes = found.boxes.float().cpu().numpy().astype(np.float64) * scale
    return Detections(
        boxes,
        found.labels.cpu().numpy(),
        found.scores.float().cpu().numpy().astype(np.float64),
        None if found.masks is None else _run_lengths(found.masks.float(), boxes, annotation),
        keypoints=None if found.keypoints is None else _keypoints(found.keypoints, scale[:2]),
    )


def _keypoints(points: Tensor, scale: NDArray[np.float64]) -> NDArray[np.float64]:
    """From pixel edges of the resized image to COCO's pixel indices in the image."""
    moved = points.float().cpu().numpy().astype(np.float64)
    moved[..., :2] = moved[..., :2] * scale - 0.5
    return moved


def _run_lengths(
    masks: torch.Tensor,
    boxes: NDArray[np.float64],
    annotation: Annotation,
) -> tuple[Rle, ...]:
    """Mask probabilities inside boxes to whole-image masks in COCO's run lengths."""
    size = annotation.height, annotation.width
    coded = []
    # Masks are encoded one by one: a hundred masks of a large image would take a gigabyte.
    for mask, box in zip(masks.cpu(), torch.from_numpy(boxes).float(), strict=True):
        whole = paste_mask(mask, box, size) >= 0.5
        run = coco_mask.encode(np.asfortranarray(whole.numpy().astype(np.uint8)))
        coded.append(Rle(size=[int(v) for v in run["size"]], counts=run["counts"].decode()))
    return tuple(coded)


def paste_mask(mask: Tensor, box: Tensor, size: tuple[int, int]) -> Tensor:
    """Probabilities (height, width) of a whole image from those (M, M) inside a box.

    box: (4,) x0, y0, x1, y1, pixels, fractions included. size: height, width.
    The mask is read bilinearly at the centre of each pixel; outside the box it is 0. torchvision
    instead resizes it to whole pixels, which moves the edges of small objects by up to a pixel.
    Source: detectron2, layers/mask_ops.py (paste_masks_in_image).
    """
    height, width = size
    x0, y0, x1, y1 = box.tolist()
    # Beyond one cell outside the box everything is 0.
    margin_x, margin_y = ((high - low) / mask.shape[0] for low, high in ((x0, x1), (y0, y1)))
    columns = slice(max(0, int(x0 - margin_x)), min(width, int(x1 + margin_x) + 1))
    rows = slice(max(0, int(y0 - margin_y)), min(height, int(y1 + margin_y) + 1))
    whole = mask.new_zeros(size)
    if columns.start >= columns.stop or rows.start >= rows.stop or x1 <= x0 or y1 <= y0:
        return whole
    x = (torch.arange(columns.start, columns.stop) + 0.5 - x0) / (x1 - x0) * 2 - 1
    y = (torch.arange(rows.start, rows.stop) + 0.5 - y0) / (y1 - y0) * 2 - 1
    places = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[None]
    whole[rows, columns] = grid_sample(mask[None, None], places, align_corners=False)[0, 0]
    return whole
