"""Image views for patch retrieval, see `views.retrieval`. Nothing is trained."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from dupr_cli.datasets.tensors import as_tensor
from dupr_cli.probe.data import ImageSet
from dupr_cli.recipe.probe import RetrievalSection
from dupr_cli.views.pairs import ViewPairBatch, cut_pair


@dataclass(frozen=True)
class ViewPairs:
    """Reads both views of an image, a function of the seed and the image's id: every backbone gets
    the same views."""

    images: ImageSet
    section: RetrievalSection
    seed: int

    def __call__(self, position: int) -> ViewPairBatch:
        pixels = as_tensor(self.images.image(position))
        digest = hashlib.sha256(self.images.ids[position].encode("utf-8", "surrogatepass")).digest()
        random = np.random.default_rng([self.seed, int.from_bytes(digest[:8], "big")])
        return cut_pair(pixels, self.section.views, self.section, random, position)
