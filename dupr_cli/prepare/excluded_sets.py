"""Lists and hashes the sets of `exclude`, such as the test set of a later evaluation.

Each set is recognised, listed and read as a source of images is. Its labels do not matter.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory

from dupr_cli.addresses import public_address
from dupr_cli.artifacts.pixel_formats import PixelFormat
from dupr_cli.datasets.copies import ImageHashes, hash_image
from dupr_cli.errors import DuprError, StoppedRunError, UsageError
from dupr_cli.prepare.blocks import in_order
from dupr_cli.prepare.engines import REMOTE_THREADS
from dupr_cli.prepare.exclusion import ExcludedImages
from dupr_cli.prepare.ingest import pixel_format, readable, why_unreadable
from dupr_cli.prepare.sources import Entry, ImageSource, make_source, nothing_found, recognise
from dupr_cli.progress import Reporter
from dupr_cli.recipe import PrepareRecipe
from dupr_cli.recipe.prepare import SourceSection
from dupr_cli.runtime.stopping import raise_if_stopped

# Keys of the recipe's section `source` that hold for the excluded sets too.
_LIMITS = ("max_bytes", "max_seconds", "min_rate")
_WITHOUT_SPLITS = ("folder", "list", "archive")

Sets = Mapping[str, Sequence[str]]  # address and splits; no splits means all


class ExcludedSets:
    """The sets to exclude: listed when this is created, hashed when the hashes are needed.

    recipe: names the sets. workers: threads that read and decode, 0 for one per core. counts:
    number of images by address.
    Raises UsageError when a set does not exist or lists no images.
    """

    def __init__(self, recipe: PrepareRecipe, workers: int, reporter: Reporter) -> None:
        self.sets, self._recipe, self._reporter = recipe.exclude, recipe, reporter
        self._threads = workers or os.cpu_count() or 1
        self.counts = dict.fromkeys(map(public_address, self.sets), 0)
        with _opened(recipe) as sources:
            for address, source in sources.items():
                self.counts[public_address(address)] = _count(address, self.sets[address], source)

    @property
    def digest(self) -> str:
        """Identity of the excluded images; empty if there are no sets."""
        return self.images.digest if self.sets else ""

    @cached_property
    def images(self) -> ExcludedImages:
        """Reads and hashes the images. Warns of those that cannot be used."""
        names, hashes = list[str](), list[ImageHashes]()
        with (
            _opened(self._recipe) as sources,
            warnings.catch_warnings(action="ignore"),  # Pillow warns about odd metadata
            self._reporter.task("hash excluded", sum(self.counts.values()), "images") as progress,
        ):
            for address, source in sources.items():
                problems, public = list[str](), public_address(address)
                entries = list(source.entries())
                threads = REMOTE_THREADS if source.remote else self._threads
                found = in_order(
                    partial(_hash, source, pixel_format(self._recipe.image)), entries, threads
                )
                for entry, (image, problem) in zip(entries, found, strict=True):
                    raise_if_stopped()
                    progress.advance()
                    if problem:
                        problems.append(f"{_shown(entry)}: {problem}")
                    if image is not None:
                        names.append(f"{_shown(entry)} of {public}")
                        hashes.append(image)
                if len(problems) == len(entries):
                    raise UsageError(
                        f"exclude: {public}: none of its {len(entries)} images can be used. The "
                        f"first is {problems[0]}."
                    )
                if problems:
                    self._reporter.warning(
                        f"exclude: {len(problems)} of the {len(entries)} images of {public} "
                        f"cannot be used, so copies of them may stay in the shards; the first is "
                        f"{problems[0]}"
                    )
        return ExcludedImages(names, hashes)


def describe_sets(sets: Sets) -> str:
    """`data/VOC2012 (val), photos`."""
    public = [(public_address(address), splits) for address, splits in sets.items()]
    named = [f"{a} ({', '.join(splits)})" if splits else a for a, splits in public]
    return ", ".join(named) or "nothing"


def _shown(entry: Entry) -> str:
    return public_address(readable(entry.name))


@contextmanager
def _opened(recipe: PrepareRecipe) -> Iterator[dict[str, ImageSource]]:
    # A compressed archive is unpacked while it is read; a dry run must not do that in OUT.
    with TemporaryDirectory(prefix="dupr-") as folder:
        yield {
            address: _source(address, splits, recipe, Path(folder, str(number)))
            for number, (address, splits) in enumerate(recipe.exclude.items())
        }


def _source(address: str, splits: Sequence[str], recipe: PrepareRecipe, out: Path) -> ImageSource:
    try:
        kind = recognise(address, advice="")
    except UsageError as error:
        raise UsageError(f"exclude: {error}") from error
    if splits and kind in _WITHOUT_SPLITS:
        raise UsageError(
            f"exclude: {public_address(address)} has no splits, but {', '.join(splits)} is asked "
            f"for. Give the folder or list of the images to exclude, without splits."
        )
    if kind == "classes" and not splits:
        kind = "folder"  # images outside the class folders count as well
    limits = {key: getattr(recipe.source, key) for key in _LIMITS}
    options = SourceSection(kind=kind, splits=list(splits) or None, **limits)
    return make_source(kind, address, options, out)


def _count(address: str, splits: Sequence[str], source: ImageSource) -> int:
    try:
        counts = Counter(entry.split for entry in source.entries())
    except UsageError as error:
        raise UsageError(f"exclude: {error}") from error
    if not counts and splits:
        named = ", ".join(splits)
        raise UsageError(f"exclude: {public_address(address)} has no images in the splits {named}.")
    if not counts:
        raise UsageError(f"exclude: {nothing_found(address)}")
    return counts.total()


def _hash(
    source: ImageSource, pixels: PixelFormat | None, entry: Entry
) -> tuple[ImageHashes | None, str]:
    """The hashes of an image if it can be read, and what is wrong with it, if anything."""
    try:
        data = source.read(entry).data
    except StoppedRunError:
        raise
    except (OSError, ValueError, DuprError) as error:
        return None, why_unreadable(error)
    image = hash_image(data, pixels)
    return image, "" if image.perceptual is not None else "does not decode"
