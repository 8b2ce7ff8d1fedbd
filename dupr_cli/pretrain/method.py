"""The method: encoders, queues, losses, and the choice of keys for the queues.

Other methods build on `Dupr`: a plug-in of the group `dupr.methods` is a subclass that changes its
encoder, its pairs or its keys (docs/plugins.md).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from dupr_cli.errors import UsageError
from dupr_cli.plugins import METHODS, load_plugin
from dupr_cli.pretrain.encoders import Embeddings, Encoder, KeyQueues
from dupr_cli.pretrain.losses import info_nce, masked_mean
from dupr_cli.recipe.base import Level, Section
from dupr_cli.recipe.pretrain import PretrainRecipe


class Dupr(nn.Module):
    """Everything that a checkpoint must hold (both encoders and all queues), and the losses.

    Source: docs/method.md.
    """

    options_model: ClassVar[type[Section]] = Section
    """Validates `method.options` of the recipe; the plain Section has no keys."""

    def __init__(self, recipe: PretrainRecipe) -> None:
        super().__init__()
        self.recipe, self.options = recipe, _options(type(self), recipe)
        method, generator = recipe.method, torch.Generator().manual_seed(recipe.seed)
        self.query, self.key = self.make_encoder(), self.make_encoder()
        self.key.load_state_dict(self.query.state_dict())
        self.key.requires_grad_(False)
        shape = method.queue_length, method.embedding_dim
        self.image_queues = KeyQueues(self.query.image_levels, *shape, generator)
        self.patch_queues = KeyQueues(self.query.patch_levels, *shape, generator)

    def make_encoder(self) -> Encoder:
        """Backbone and heads; called for the query and for the key encoder."""
        return Encoder(self.recipe)

    def losses(
        self,
        queries: Embeddings,
        keys: Embeddings,
        valid: Tensor,
        images: float | None = None,
        valid_images: float | None = None,
    ) -> dict[str, Tensor]:
        """The image loss and the patch loss of each level, not yet weighted.

        valid: (N,) bool, images that take part in the patch loss. images, valid_images: what sums
        are divided by when these N are a part of a batch, so that the losses of its parts add up;
        by default the mean is over these N.
        Source: docs/method.md, "Losses".
        """
        losses = {}
        for level, q in queries.image.items():
            per_image = self.contrast("image", level, q, keys.image[level])
            losses[f"image/{level}"] = per_image.sum() / (images or len(q))
        for level, q in queries.patch.items():
            positives = self.positive_patches(level, queries, keys)
            per_patch = self.contrast("patch", level, q.flatten(0, 1), positives.flatten(0, 1))
            losses[f"patch/{level}"] = masked_mean(
                per_patch.view(q.shape[:2]), valid.to(q.device), valid_images
            )
        return losses

    def contrast(self, kind: str, level: Level, queries: Tensor, positives: Tensor) -> Tensor:
        """InfoNCE (M,) of queries and positives (M, D) against the level's queue."""
        method = self.recipe.method
        queues = self.image_queues if kind == "image" else self.patch_queues
        section = method.image if kind == "image" else method.patch
        dtype = getattr(torch, self.recipe.train.precision)
        return info_nce(queries, positives, queues[level].keys, section.temperature, dtype)

    def positive_patches(self, level: Level, queries: Embeddings, keys: Embeddings) -> Tensor:
        """The key (N, S * S, D) that answers each query patch: the same bin of the other view."""
        return keys.patch[level]

    def weighted(self, losses: dict[str, Tensor]) -> Tensor:
        """Sum over levels of alpha * image loss + beta * patch loss."""
        method = self.recipe.method
        weights = {f"image/{level}": alpha for level, alpha in method.image.weights.items()}
        weights |= {f"patch/{level}": beta for level, beta in method.patch.weights.items()}
        return torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()

    @torch.no_grad()
    def queue_keys(self, keys: Embeddings, scores: Tensor) -> dict[str, Tensor]:
        """The keys (M, D) that enter each queue, by kind/level: every image key, and of each image
        the patch keys with the highest scores.

        scores: (N, S * S of the largest level), random numbers.
        Source: docs/method.md, "Queues".
        """
        chosen = {f"image/{level}": values for level, values in keys.image.items()}
        for level, values in keys.patch.items():
            images, patches, _ = values.shape
            best = scores[:, :patches].topk(self.recipe.method.patch_keys_per_image, dim=1).indices
            rows = torch.arange(images, device=values.device)[:, None]
            chosen[f"patch/{level}"] = values[rows, best.to(values.device)].flatten(0, 1)
        return chosen

    def queues(self) -> dict[str, Tensor]:
        """The keys of every queue, by name."""
        return {
            f"{kind}/{level}": queues[level].keys
            for kind, queues in (("image", self.image_queues), ("patch", self.patch_queues))
            for level in queues
        }

    @torch.no_grad()
    def push(self, chosen: dict[str, Tensor]) -> None:
        """Feed the queues with the keys that `queue_keys` chose."""
        for name, values in chosen.items():
            kind, level = name.split("/")
            (self.image_queues if kind == "image" else self.patch_queues)[level].push(values)


def method_class(recipe: PretrainRecipe) -> type[Dupr]:
    """The class that method.name stands for, with its options checked.

    Raises UsageError when it cannot be loaded, does not subclass `Dupr`, or has wrong options.
    """
    name = recipe.method.name
    found = load_plugin(METHODS, name)
    if not (isinstance(found, type) and issubclass(found, Dupr)):
        raise UsageError(
            f"method.name: {name} is provided as {found!r}, which is not a subclass of "
            f"dupr_cli.pretrain.method.Dupr."
        )
    _options(found, recipe)
    return found


def _options(method: type[Dupr], recipe: PretrainRecipe) -> Section:
    try:
        return method.options_model.model_validate(recipe.method.options)
    except ValidationError as error:
        problems = [
            f"{'.'.join(('method.options', *map(str, e['loc'])))}: {e['msg']}"
            for e in error.errors()
        ]
        known = ", ".join(method.options_model.model_fields) or "none"
        raise UsageError(
            "\n".join(problems) + f"\nThe options of {recipe.method.name} are: {known}."
        ) from error
