"""The batches of a run: which images, in which order, with which crops.

Everything here is a pure function of (seed, epoch, sample number): the order of an epoch, the crops
and the augmentation of a sample. The number of loader workers and interruptions do not change it;
a run continues at any step by asking for that step's samples.
"""

from __future__ import annotations

import io
from collections.abc import Generator, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from dupr_cli.artifacts.pixel_formats import AnyImage, described
from dupr_cli.artifacts.shard_files import Sample
from dupr_cli.artifacts.shards import DamagedSampleError, ShardSet
from dupr_cli.datasets.channels import decode_as
from dupr_cli.datasets.pixels import IMAGE_ERRORS
from dupr_cli.datasets.tensors import decode_tensor
from dupr_cli.errors import RunError
from dupr_cli.recipe.pretrain import MethodSection, PretrainRecipe
from dupr_cli.runtime.loader import load
from dupr_cli.runtime.parallel import World
from dupr_cli.runtime.phases import phase
from dupr_cli.views.pairs import ViewPairBatch, cut_pair

# An unreadable image is replaced by the next one; this many in a row point to a real fault.
_MAX_REPLACEMENTS = 20
# The views for the retrieval check come from an epoch that training never reaches.
_PROBE_EPOCH = 2**31

SampleRequest = tuple[int, int]  # epoch, sample number


def decode(sample: Sample) -> AnyImage:
    """The upright image of a sample, in RGB or with the channels that its shards keep.

    Raises one of IMAGE_ERRORS if it does not decode.
    """
    return decode_as(io.BytesIO(sample.image), sample.pixels)


def epoch_order(counts: Sequence[int], seed: int, epoch: int, window: int) -> NDArray[np.int64]:
    """Sample numbers of one epoch: shards shuffled, then samples within `window` shards at a time.

    counts: samples per shard. Reads stay within a window of files, and every sample appears once.
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
    """Sample numbers held out of training: `wanted`, at most a tenth; the same for any seed."""
    count = min(wanted, total // 10)
    return np.sort(np.random.default_rng(0).choice(total, count, replace=False))


class BatchOrder:
    """Endless requests for training steps, from a given step on.

    Images that do not fill a batch at the end of an epoch start the next one; nothing is dropped.
    Rank `rank` of `size` takes its part of each global batch; the parts of all ranks together equal
    the batch of a single process.
    """

    def __init__(
        self,
        shards: ShardSet,
        recipe: PretrainRecipe,
        rank: int = 0,
        size: int = 1,
    ) -> None:
        """Raises RunError when the images are too few for one batch."""
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


class ViewPairs:
    """Decodes a sample and cuts its two views, both mirrored or neither if `flip_together`."""

    def __init__(
        self, shards: ShardSet, method: MethodSection, seed: int, flip_together: bool = False
    ) -> None:
        self._shards, self._method, self._seed = shards, method, seed
        self._flip_together = flip_together

    def __call__(self, request: SampleRequest) -> ViewPairBatch:
        """One image's views. Raises RunError when the shard cannot be read, or too many images in a
        row cannot be decoded."""
        epoch, number = request
        problems: list[str] = []
        for attempt in range(_MAX_REPLACEMENTS):
            try:
                with phase("read"):
                    sample = self._shards[(number + attempt) % len(self._shards)]
            except DamagedSampleError as error:
                problems.append(str(error))
                continue
            if sample.pixels != self._shards.pixels:
                raise RunError(
                    f"{self._shards.name}: sample {sample.key} is one of "
                    f"{described(sample.pixels)}, but the first are "
                    f"{described(self._shards.pixels)}. Give shards of one format."
                )
            try:
                with phase("decode"):
                    pixels = decode_tensor(sample.image, sample.pixels)
                break
            except IMAGE_ERRORS as error:
                problems.append(f"{sample.key}: {error}")
        else:
            raise RunError(
                f"{self._shards.name}: {_MAX_REPLACEMENTS} images in a row could not be used, "
                f"the first is {problems[0]}. `dupr prepare` skips such images."
            )
        random = np.random.default_rng([self._seed, epoch, number])
        place = (number + len(problems)) % len(self._shards)
        views, colours = self._method.views, self._method.augmentation
        with phase("crop"):
            return cut_pair(
                pixels, views, colours, random, place, len(problems), self._flip_together
            )


def training_batches(
    shards: ShardSet, recipe: PretrainRecipe, first_step: int, world: World
) -> tuple[Generator[ViewPairBatch, None, None], BatchOrder]:
    """This process's part of all batches from `first_step` on, and their order.

    The iterator raises RunError as `ViewPairs` does.
    """
    order = BatchOrder(shards, recipe, world.rank, world.size)
    order.first_step = first_step
    together = recipe.method.augmentation.flip_together
    read = ViewPairs(shards, recipe.method, recipe.seed, together)
    loader = load(read, ViewPairBatch.stack, order, recipe.data.workers, world.device, prefetch=4)
    return loader, order


def probe_batches(shards: ShardSet, recipe: PretrainRecipe) -> list[ViewPairBatch]:
    """Fixed view pairs of the held-out images, in batches of the training size.

    They are always mirrored independently, so that both cases can be measured.
    """
    pairs = ViewPairs(shards, recipe.method, seed=0)
    samples = [pairs((_PROBE_EPOCH, int(n))) for n in held_out(len(shards), recipe.data.holdout)]
    size = recipe.data.batch_size
    return [ViewPairBatch.stack(samples[i : i + size]) for i in range(0, len(samples), size)]
