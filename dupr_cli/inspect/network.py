"""The network that a picture is about: its backbone, and the heads of its run if there are any.

A run or checkpoint gives the query encoder with its patch heads and the recipe of its views. Other
weights have no heads; then backbone features are compared, and a note says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dupr_cli.artifacts.pixel_formats import AnyImage, PixelFormat
from dupr_cli.artifacts.run import (
    CHECKPOINTS,
    MODEL_FILE,
    RECIPE_FILE,
    Checkpoint,
    is_checkpoint,
    newest_checkpoint,
)
from dupr_cli.artifacts.weights import read_safetensors
from dupr_cli.datasets.channels import decode_as
from dupr_cli.datasets.pixels import IMAGE_ERRORS
from dupr_cli.errors import UsageError
from dupr_cli.models.compared import ComparedWeights, open_compared
from dupr_cli.models.frozen import FrozenBackbone, freeze
from dupr_cli.parsing import ParseError, read_yaml
from dupr_cli.pretrain.encoders import Encoder, grid
from dupr_cli.pretrain.method import method_class
from dupr_cli.pretrain.retrieval_check import retrieval_levels
from dupr_cli.recipe import PretrainRecipe, load_recipe, recipe_keys
from dupr_cli.recipe.base import LEVEL_STRIDES, LEVELS, Level
from dupr_cli.recipe.pretrain import (
    AugmentationSection,
    MethodSection,
    PatchReidSection,
    ViewsSection,
)
from dupr_cli.runtime.devices import choose_device
from dupr_cli.views.geometry import pool_patches

_PATCH_HEADS = "query.patch_heads."
_CENTRES = "method.patch.cell_centres"
_VIEW_SIDES = (32, 1024)  # that a recipe allows


@dataclass(frozen=True)
class Network:
    """A frozen backbone with what turns its maps into patch embeddings.

    method: of the run; the defaults at their input size for other weights. levels: those that are
    compared. heads: an encoder whose patch heads are used, None to compare backbone features. note:
    what is compared, in words.
    """

    frozen: FrozenBackbone
    taken: ComparedWeights
    method: MethodSection
    levels: tuple[Level, ...]
    heads: Encoder | None
    note: str

    def bins(self, level: Level) -> int:
        """Bins along a side of the shared region; without a patch loss, the cells of a view."""
        cells = self.method.views.size // self.frozen.shape.strides[level]
        return self.method.patch.bins.get(level, max(1, cells))

    @torch.no_grad()
    def patches(
        self, images: Tensor, boxes: Tensor, flips: Tensor, bins: Mapping[Level, int]
    ) -> dict[Level, Tensor]:
        """L2-normalised patches (N, S * S, D) of each level in `bins`, which gives S.

        images: (N, C, H, W) normalised. boxes: (N, 4), of the pooled regions in pixels. flips: see
        `pool_patches`.
        """
        images = images.to(self.frozen.device)
        maps = self.frozen.maps_of_normalised(images, list(bins))
        own = self.heads.grids if self.heads else {}
        pooled = {
            level: pool_patches(
                maps[level],
                boxes.to(images.device),
                flips.to(images.device),
                side,
                own.get(level) or grid(self.frozen.network, level, "backbone"),
            )
            for level, side in bins.items()
        }
        if self.heads is not None:
            return self.heads.embed_patches(pooled)
        return {level: F.normalize(values, dim=-1) for level, values in pooled.items()}


def read_image(path: Path, pixels: PixelFormat | None) -> AnyImage:
    """An image file in the format that a network takes, None for RGB.

    Raises UsageError, naming the file, if it is no image.
    """
    try:
        return decode_as(path, pixels)
    except FileNotFoundError:
        raise UsageError(f"{path}: the image does not exist.") from None
    except IMAGE_ERRORS as error:
        raise UsageError(f"{path}: not an image that can be decoded ({error}).") from error


def parse_level(name: str | None) -> Level | None:
    """A level by its name. Raises UsageError for others."""
    if name is not None and name not in LEVELS:
        raise UsageError(f"--level {name}: there is no such level. Use one of {', '.join(LEVELS)}.")
    return name


def open_frozen(
    address: str | Path, device: str | torch.device = "auto"
) -> tuple[ComparedWeights, FrozenBackbone]:
    """Weights by their address, see `open_compared`, and their backbone. Raises UsageError."""
    (taken,) = open_compared([str(address)])
    return taken, freeze(taken, 0, choose_device(str(device)), torch.float32)


def open_network(address: str | Path, device: str | torch.device = "auto") -> Network:
    """The network of a run, a checkpoint or weights, see `open_compared`.

    device: as --device takes it. Raises UsageError when there are no such weights, or the run's
    recipe cannot be read.
    """
    device = choose_device(str(device))
    taken, frozen = open_frozen(address, device)
    folder = _run_of(Path(address))
    if folder is None:
        method, has = _default_method(taken), frozen.shape.levels
        levels = [v for v in retrieval_levels(method) if v in has] or [has[-1]]
        note = "weights without heads: backbone features are compared"
        return Network(frozen, taken, method, tuple(levels), None, note)
    recipe = _recorded_recipe(folder / RECIPE_FILE)
    encoder = _encoder(recipe, Path(address)).to(device)
    if encoder.patch_levels:
        levels, heads, note = encoder.patch_levels, encoder, "embeddings of the patch heads"
    else:
        levels, heads = retrieval_levels(recipe.method), None
        note = "the run has no patch loss: backbone features are compared"
    return Network(frozen, taken, recipe.method, tuple(levels), heads, note)


def _run_of(path: Path) -> Path | None:
    """The run whose recipe belongs to a run directory or a checkpoint in it."""
    if path.name == MODEL_FILE:
        path = path.parent
    if is_checkpoint(path):
        place = path.resolve()
        path = place.parent.parent if place.parent.name == CHECKPOINTS else place
    return path if path.is_dir() and (path / RECIPE_FILE).is_file() else None


def _recorded_recipe(file: Path) -> PretrainRecipe:
    """The recipe of a run. Raises UsageError when it cannot be read."""
    try:
        keys = recipe_keys(read_yaml(file))
    except (OSError, ParseError) as error:
        raise UsageError(f"{file}: the run's recipe cannot be read ({error}).") from error
    # A run records every key that its dupr had; before this one, bins were pooled so.
    before = [] if _CENTRES in keys else [f"{_CENTRES}=convention"]
    return load_recipe(PretrainRecipe, str(file), before)


def _default_method(taken: ComparedWeights) -> MethodSection:
    """The default method, at the input size and statistics of the weights."""
    size = taken.weights.metadata.input_size if taken.weights else ViewsSection().size
    size = min(_VIEW_SIDES[1], max(_VIEW_SIDES[0], size))
    return MethodSection(
        views=ViewsSection(size=size),
        augmentation=AugmentationSection(mean=taken.input.mean, std=taken.input.std),
        patch=PatchReidSection(bins={v: max(1, size // LEVEL_STRIDES[v]) for v in LEVELS}),
    )


def _encoder(recipe: PretrainRecipe, address: Path) -> Encoder:
    """The query encoder of a run's method, with the patch heads of its checkpoint."""
    if address.name == MODEL_FILE:
        folder = address.parent
    elif is_checkpoint(address):
        folder = Checkpoint.read(address).path
    else:
        folder = newest_checkpoint(address).path
    tensors, _ = read_safetensors(folder / MODEL_FILE)
    heads = {
        name.removeprefix(_PATCH_HEADS): tensor
        for name, tensor in tensors.items()
        if name.startswith(_PATCH_HEADS)
    }
    encoder = method_class(recipe)(recipe).query
    try:
        encoder.patch_heads.load_state_dict(heads)
    except RuntimeError as error:
        raise UsageError(
            f"{folder / MODEL_FILE}: the patch heads are not those of {recipe.model.backbone} with "
            f"this recipe. Restore the run's {RECIPE_FILE}."
        ) from error
    return encoder.eval().requires_grad_(False)
