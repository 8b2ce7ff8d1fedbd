"""Finds duplicate images across a whole set, by their bytes or by how they look.

Every written sample leaves one `RECORD` of 32 bytes. Records are compared in passes that hold about
`_AT_ONCE` of them in memory. Of several equal images, the first in the order of the source is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dupr_cli.artifacts.hashes import count_bits

Array = NDArray[Any]

# key: hash of the sample's key. low, high: parts of the sha256 of the source's bytes. look:
# perceptual hash.
RECORD = np.dtype([("key", "<u8"), ("low", "<u8"), ("high", "<u8"), ("look", "<u8")])
_AT_ONCE = 16_000_000

# Yields the records of one block after another, each with the position of its first record.
Records = Callable[[], Iterator[tuple[int, Array]]]


def equal_rows(records: Records, total: int, names: tuple[str, ...]) -> Array:
    """(n, 2) int64: position of each record whose `names` equal those of an earlier one, and
    position of the first such record; sorted by the former."""
    passes = -(-total // _AT_ONCE) or 1
    found = []
    for number in range(passes):
        positions, values = _collect(records, names, passes, number)
        order = np.lexsort([positions, *(values[name] for name in reversed(names))])
        positions, values = positions[order], values[order]
        new = np.ones(len(values), dtype=bool)
        new[1:] = values[1:] != values[:-1]
        first = positions[np.maximum.accumulate(np.where(new, np.arange(len(new)), 0))]
        found.append(np.stack([positions[~new], first[~new]], 1))
    rows = np.concatenate(found)
    return rows[np.argsort(rows[:, 0], kind="stable")]


def _collect(
    records: Records, names: tuple[str, ...], passes: int, number: int
) -> tuple[Array, Array]:
    """Positions and columns of the records of one pass, which covers a share of the hash values."""
    positions, values = [np.empty(0, np.int64)], [np.empty(0, RECORD)[list(names)]]
    for start, block in records():
        chosen = np.flatnonzero(block[names[0]] % passes == number)
        positions.append(chosen + start)
        values.append(block[list(names)][chosen])
    return np.concatenate(positions), np.concatenate(values)


def similar_rows(records: Records, dropped: Array, distance: int) -> Array:
    """(n, 2) int64 as in `equal_rows`: records whose `look` differs in at most `distance` bits from
    that of an earlier record that is kept. dropped: positions that are already left out.

    Two hashes that differ in d bits agree in at least one of d + 1 parts, so only hashes that share
    a part are compared. Holds all hashes in memory (16 bytes for each image).
    """
    positions, values = _collect(records, ("look",), 1, 0)
    looks = values["look"].astype(np.uint64)
    stays = ~np.isin(positions, dropped)
    positions, looks = positions[stays], looks[stays]
    # Merge equal hashes first: they may be many, and one of them stands for all.
    unique, first, inverse = np.unique(looks, return_index=True, return_inverse=True)
    pairs = _close_pairs(unique, distance)
    later = np.maximum(first[pairs[:, 0]], first[pairs[:, 1]])
    earlier = np.minimum(first[pairs[:, 0]], first[pairs[:, 1]])
    stands_for: dict[int, int] = {}
    for row in np.lexsort([earlier, later]):
        new, old = int(later[row]), int(earlier[row])
        if new not in stands_for and old not in stands_for:
            stands_for[new] = old
    found = []
    for index, look in enumerate(inverse):
        head = int(first[look])
        target = stands_for.get(head, head)
        if target != index:
            found.append((positions[index], positions[target]))
    return np.array(found, dtype=np.int64).reshape(-1, 2)


def _close_pairs(looks: Array, distance: int) -> Array:
    """(n, 2) indexes of hashes that differ in at most `distance` bits."""
    edges = np.linspace(0, 64, distance + 2).astype(int)
    found = [np.empty((0, 2), np.int64)]
    for low, high in pairwise(edges):
        part = (looks >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(part, kind="stable")
        part = part[order]
        step = 1
        while step < len(part) and (same := np.flatnonzero(part[step:] == part[:-step])).size:
            one, other = order[same], order[same + step]
            near = count_bits(looks[one] ^ looks[other]) <= distance
            found.append(np.stack([one[near], other[near]], 1))
            step += 1
    return np.unique(np.concatenate(found), axis=0)
