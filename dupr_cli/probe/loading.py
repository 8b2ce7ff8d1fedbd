"""Images on their way to the backbone: read, cut to a square and batched by worker processes.

What a worker reads hangs on the request alone, so batches are the same for any number of workers.
An image that cannot be read comes back as a value: an exception raised in a worker would reach the
user with the worker's traceback in its message.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dupr_cli.errors import RunError
from dupr_cli.probe.data import ImageSet
from dupr_cli.views.geometry import Crop

Request = TypeVar("Request")
Item = TypeVar("Item")
Batch = TypeVar("Batch")


@dataclass(frozen=True)
class _Unreadable:
    message: str


class _Reading(Dataset[Item | _Unreadable], Generic[Request, Item]):
    def __init__(self, read: Callable[[Request], Item]) -> None:
        self._read = read

    def __getitem__(self, request: Request) -> Item | _Unreadable:
        try:
            return self._read(request)
        except RunError as error:
            return _Unreadable(str(error))


@dataclass(frozen=True)
class _Collating(Generic[Item, Batch]):
    collate: Callable[[list[Item]], Batch]

    def __call__(self, items: list[Item | _Unreadable]) -> Batch | _Unreadable:
        read: list[Item] = []
        for item in items:
            if isinstance(item, _Unreadable):
                return item
            read.append(item)
        return self.collate(read)


def _ignore_interrupt(_worker: int) -> None:
    # Control-C reaches the whole process group, and is the main process's to handle.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def load(
    read: Callable[[Request], Item],
    collate: Callable[[list[Item]], Batch],
    requests: Sequence[Sequence[Request]],
    workers: int,
    device: torch.device,
) -> Iterator[Batch]:
    """Batches, one for each of `requests`, in order. Raises RunError for an unreadable image."""
    loader: DataLoader[Any] = DataLoader(
        _Reading(read),
        batch_sampler=[list(batch) for batch in requests],
        num_workers=min(workers, len(requests)),
        collate_fn=_Collating(collate),
        pin_memory=device.type == "cuda",
        worker_init_fn=_ignore_interrupt,
    )
    for batch in loader:
        if isinstance(batch, _Unreadable):
            raise RunError(batch.message)
        yield batch


def in_batches(count: int, size: int) -> list[list[int]]:
    """0 to count - 1, `size` at a time."""
    return [list(range(first, min(count, first + size))) for first in range(0, count, size)]


def pixels(image: Image.Image) -> Tensor:
    """(3, H, W) uint8."""
    # A copy: torch does not take the read-only memory of Pillow.
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def centre_crop(image: Image.Image, resize: int, crop: int) -> Image.Image:
    """The middle crop x crop of the image, resized so that its short side is `resize`.

    Source: the usual test crop of ImageNet, as torchvision's Resize and CenterCrop make it.
    """
    short = min(image.size)
    width, height = (max(resize, int(resize * side / short)) for side in image.size)
    left, top = round((width - crop) / 2), round((height - crop) / 2)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + crop, top + crop))


def cut_view(image: Image.Image, crop: Crop, size: int, flip: bool) -> Image.Image:
    """One crop resized to size x size, antialiased, and then mirrored left to right if asked for.

    crop: x0, y0, x1, y1 in pixels of the image.
    """
    view = image.resize((size, size), Image.Resampling.BILINEAR, box=crop)
    return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else view


@dataclass(frozen=True)
class CentreCrops:
    """Reads the test crop of an image of the set, (3, crop, crop) uint8."""

    images: ImageSet
    resize: int
    crop: int

    def __call__(self, position: int) -> Tensor:
        return pixels(centre_crop(self.images.image(position), self.resize, self.crop))
