"""The batches of a run: which images, in which order, cropped how.

Everything here is a pure function of (seed, epoch, sample number): the order of an epoch, the crops
and the augmentation of a sample. The number of loader workers and interruptions do not change it;
a run continues at any step by asking for that step's samples.
"""

from __future__ import annotations

import io
import signal
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dupr_cli.artifacts.shards import ShardSet
from dupr_cli.datasets.pixels import IMAGE_ERRORS, open_picture
from dupr_cli.errors import DuprError, RunError
from dupr_cli.recipe.pretrain import MethodSection, PretrainRecipe
from dupr_cli.runtime.parallel import World
from dupr_cli.views.augmentation import draw_parameters
from dupr_cli.views.geometry import Crop, random_crop_pair

# An unreadable image is replaced by the next number; so many in a row are no accident.
_MAX_REPLACEMENTS = 20
# Longer than a step and a checkpoint take; after it a worker ends by SIGALRM.
_GRACE_SECONDS = 60
# The probe's views come from an epoch that training never reaches.
_PROBE_EPOCH = 2**31

SampleRequest = tuple[int, int]  # epoch, sample number


@dataclass(frozen=True)
class ViewPairBatch:
    """Two cropped views of each image, on the CPU.

    views: (N, 2, 3, S, S) uint8. crops: (N, 2, 4) float32, x0, y0, x1, y1 in source pixels.
    parameters: (N, 2, PARAMETERS) float32, see `augmentation`. numbers: (N,) int64, of the samples
    in the shards. unreadable: images that could not be decoded and were replaced.
    """

    views: Tensor
    crops: Tensor
    parameters: Tensor
    numbers: Tensor
    unreadable: int

    def pin_memory(self) -> ViewPairBatch:
        """Called by the loader for a CUDA device."""
        return replace(self, views=self.views.pin_memory())


def crop_and_resize(image: Image.Image, crop: Crop, size: int) -> Image.Image:
    """Resize one crop to size x size, antialiased; the source's pixels stay where they are.

    crop: x0, y0, x1, y1 in pixels of the image as the file has it. The image may be decoded at a
    reduced scale; the crop is scaled with it.
    """
    return image.resize((size, size), Image.Resampling.BILINEAR, box=crop)


def decode(data: bytes) -> Image.Image:
    """Upright RGB image from the bytes of a sample. Raises one of IMAGE_ERRORS when it is none."""
    return open_picture(io.BytesIO(data)).rgb()


def epoch_order(counts: Sequence[int], seed: int, epoch: int, window: int) -> NDArray[np.int64]:
    """Sample numbers of one epoch: shards shuffled, then samples within `window` shards at a time.

    counts: samples per shard. Reads stay within a window of files, and every sample comes once.
    """
    random = np.random.default_rng([seed, epoch])
    starts = np.concatenate([[0], np.cumsum(counts)])
    shards = random.permutation(len(counts))
    parts = []
    for first in range(0, len(shards), window):
        numbers = [np.arange(starts[s], starts[s + 1]) for s in shards[first : first + window]]
        parts.append(random.permutation(np.concatenate(numbers)))
    return np.concatenate(parts)


def held_out(total: int, wanted: int) -> NDArray[np.int64]:
    """Sample numbers kept for the probe: `wanted`, at most a tenth; the same for any seed."""
    count = min(wanted, total // 10)
    return np.sort(np.random.default_rng(0).choice(total, count, replace=False))


class BatchOrder:
    """Requests of every training step, from a given step on, without end.

    Images that do not fill a batch at the end of an epoch start the next one: nothing is dropped.
    Of each global batch, rank `rank` of `size` takes its part: the parts of all ranks together are
    the batch of a single process.
    """

    def __init__(
        self,
        shards: ShardSet,
        recipe: PretrainRecipe,
        rank: int = 0,
        size: int = 1,
    ) -> None:
        """Raises RunError when there are fewer images than one batch needs."""
        part = recipe.data.batch_size // size
        self._part = slice(rank * part, (rank + 1) * part)
        self._counts, self._seed = shards.counts, recipe.seed
        self._window, self._batch = recipe.data.shuffle_shards, recipe.data.batch_size
        self._held_out = held_out(len(shards), recipe.data.holdout)
        self.images = len(shards) - len(self._held_out)
        if self.images < self._batch:
            raise RunError(
                f"{shards.name}: {self.images} images to train on ({len(self._held_out)} of "
                f"{len(shards)} are held out), fewer than data.batch_size = {self._batch}. "
                f"Use more images or a smaller batch."
            )
        self.first_step = 0

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        order = epoch_order(self._counts, self._seed, epoch, self._window)
        return order[~np.isin(order, self._held_out)]

    def __iter__(self) -> Iterator[list[SampleRequest]]:
        position = self.first_step * self._batch
        epoch = position // self.images
        order = self._epoch(epoch)
        while True:
            batch: list[SampleRequest] = []
            while len(batch) < self._batch:
                if position // self.images != epoch:
                    epoch = position // self.images
                    order = self._epoch(epoch)
                batch.append((epoch, int(order[position % self.images])))
                position += 1
            yield batch[self._part]


class ViewPairs(Dataset[ViewPairBatch | DuprError]):
    """Decodes a sample and cuts its two views.

    As a data set it returns an error instead of raising it, so that it comes out of a loader
    process in its own words and not in those of a traceback.
    """

    def __init__(self, shards: ShardSet, method: MethodSection, seed: int) -> None:
        self._shards, self._method, self._seed = shards, method, seed

    def __getitem__(self, request: SampleRequest) -> ViewPairBatch | DuprError:
        try:
            return self.load(request)
        except DuprError as error:
            return error

    def load(self, request: SampleRequest) -> ViewPairBatch:
        """One image's views. Raises RunError when the shard cannot be read, or too many images in a
        row cannot be decoded."""
        epoch, number = request
        problems: list[str] = []
        for attempt in range(_MAX_REPLACEMENTS):
            sample = self._shards[(number + attempt) % len(self._shards)]
            try:
                image = decode(sample.image)
                break
            except IMAGE_ERRORS as error:
                problems.append(f"{sample.key}: {error}")
        else:
            raise RunError(
                f"{self._shards.name}: {_MAX_REPLACEMENTS} images in a row could not be decoded, "
                f"the first is {problems[0]}. `dupr prepare` leaves such images out."
            )
        random = np.random.default_rng([self._seed, epoch, number])
        method = self._method
        crops = random_crop_pair(image.width, image.height, method.views, random)
        parameters = np.stack([draw_parameters(method.augmentation, random) for _ in range(2)])
        views = [
            np.asarray(crop_and_resize(image, tuple(crop.tolist()), method.views.size))
            for crop in crops
        ]
        return ViewPairBatch(
            torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).contiguous(),
            torch.from_numpy(crops),
            torch.from_numpy(parameters),
            torch.tensor((number + len(problems)) % len(self._shards)),
            len(problems),
        )


def collate(samples: Sequence[ViewPairBatch | DuprError]) -> ViewPairBatch | DuprError:
    """A batch of single images, or the first error among them."""
    for sample in samples:
        if isinstance(sample, DuprError):
            return sample
    return join_batches([s for s in samples if isinstance(s, ViewPairBatch)])


def join_batches(samples: Sequence[ViewPairBatch]) -> ViewPairBatch:
    return ViewPairBatch(
        torch.stack([s.views for s in samples]),
        torch.stack([s.crops for s in samples]),
        torch.stack([s.parameters for s in samples]),
        torch.stack([s.numbers for s in samples]),
        sum(s.unreadable for s in samples),
    )


def _outlive_signals(_worker: int) -> None:
    """A signal to the process group is the main process's to handle: it still needs its workers.

    SIGTERM is also how Python ends workers that are left over, so it may only be put off.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_SECONDS))


def training_batches(
    shards: ShardSet, recipe: PretrainRecipe, first_step: int, world: World
) -> tuple[Generator[ViewPairBatch, None, None], BatchOrder]:
    """This process's part of all batches from `first_step` on, and their order.

    The iterator raises RunError as `ViewPairs.load`.
    """
    order = BatchOrder(shards, recipe, world.rank, world.size)
    order.first_step = first_step
    loader: DataLoader[ViewPairBatch | DuprError] = DataLoader(
        ViewPairs(shards, recipe.method, recipe.seed),
        batch_sampler=order,
        num_workers=recipe.data.workers,
        collate_fn=collate,
        pin_memory=world.device.type == "cuda",
        worker_init_fn=_outlive_signals,
        prefetch_factor=4 if recipe.data.workers else None,
    )
    return _raising(loader), order


def _raising(loader: DataLoader[ViewPairBatch | DuprError]) -> Generator[ViewPairBatch, None, None]:
    for batch in loader:
        if not isinstance(batch, ViewPairBatch):
            raise batch
        yield batch


def probe_batches(shards: ShardSet, recipe: PretrainRecipe) -> list[ViewPairBatch]:
    """Fixed view pairs of the held-out images, in batches of the training size."""
    pairs = ViewPairs(shards, recipe.method, seed=0)
    samples = [
        pairs.load((_PROBE_EPOCH, int(n))) for n in held_out(len(shards), recipe.data.holdout)
    ]
    size = recipe.data.batch_size
    return [join_batches(samples[i : i + size]) for i in range(0, len(samples), size)]
