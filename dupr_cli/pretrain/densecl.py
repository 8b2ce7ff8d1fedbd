"""Dense contrast in the manner of DenseCL: cells of whole views, matched by feature similarity.

This baseline shows what geometry gains: instead of using the shared region's bins, each cell of
the whole query view takes as its positive the cell of the key view whose backbone feature is most
similar, and a dense queue holds one embedding of each image, the mean of its cells' projections.
Source: Wang et al., CVPR 2021 (arXiv 2011.09157), section 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dupr_cli.pretrain.encoders import Embeddings, Encoder
from dupr_cli.pretrain.method import Dupr
from dupr_cli.recipe.base import Level


class WholeViewEncoder(Encoder):
    """Patches are the S x S cells of the whole view; boxes and flips are ignored."""

    def forward(self, views: Tensor, boxes: Tensor, flips: Tensor) -> Embeddings:
        features = self.features(views)
        pooled = {
            v: F.adaptive_avg_pool2d(features[v].float(), self.bins[v]).flatten(2).transpose(1, 2)
            for v in self.patch_levels
        }
        projected = {v: self.patch_heads[v](x).float() for v, x in pooled.items()}
        return Embeddings(
            self.embed_images(features),
            {v: F.normalize(x, dim=-1) for v, x in projected.items()},
            {v: F.normalize(x.detach(), dim=-1) for v, x in pooled.items()},
            # Averaged before they are normalised, as in the official code.
            {v: F.normalize(x.mean(1), dim=-1) for v, x in projected.items()},
        )


class DenseCl(Dupr):
    """DenseCL's positives and dense queue in place of DUPR's. It has no options of its own."""

    def make_encoder(self) -> Encoder:
        return WholeViewEncoder(self.recipe)

    def losses(
        self,
        queries: Embeddings,
        keys: Embeddings,
        valid: Tensor,
        images: float | None = None,
        valid_images: float | None = None,
    ) -> dict[str, Tensor]:
        """As in Dupr; every image takes part, because the views need not overlap to look alike."""
        return super().losses(queries, keys, torch.ones_like(valid), images, images)

    def positive_patches(self, level: Level, queries: Embeddings, keys: Embeddings) -> Tensor:
        """The key embedding of the cell whose backbone feature is most similar (equation 2)."""
        similarity = queries.features[level] @ keys.features[level].transpose(1, 2)
        nearest = similarity.argmax(2)  # (N, S * S)
        values = keys.patch[level]
        return values.gather(1, nearest[..., None].expand(-1, -1, values.shape[2]))

    @torch.no_grad()
    def queue_keys(self, keys: Embeddings, scores: Tensor) -> dict[str, Tensor]:
        """Every image key, and the summary of each image's cells."""
        chosen = {f"image/{level}": values for level, values in keys.image.items()}
        return chosen | {f"patch/{level}": values for level, values in keys.summaries.items()}
