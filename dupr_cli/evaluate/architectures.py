"""Which backbones a detector can have, checked before anything is built.

Only networks of other libraries are built for it: importing torchvision, and the detectors made of
its parts, takes longer than importing torch.
"""

from __future__ import annotations

from collections.abc import Collection

from dupr_cli.errors import UsageError
from dupr_cli.evaluate.detector_data import DENSE_LEVELS, SEMANTIC_LEVELS
from dupr_cli.models.backbone import as_backbone, make_backbone, require_levels
from dupr_cli.models.dilation import dilate
from dupr_cli.models.resnet_shapes import is_torchvision
from dupr_cli.recipe.base import LEVELS
from dupr_cli.recipe.evaluate import DENSE_MODELS, QUERY_MODELS, EvaluateRecipe


def check_architecture(recipe: EvaluateRecipe, architecture: str) -> None:
    """Raises UsageError when the recipe's detector cannot have this backbone, or a package that it
    needs is missing."""
    model = recipe.detector.model
    if model in QUERY_MODELS:
        # The other detectors need no package that may be missing, and take long to import.
        from dupr_cli.evaluate.detectors.detr import library

        library(model)
    if is_torchvision(architecture):
        return  # a ResNet has all levels, and every detector can use it
    backbone = make_backbone(architecture)
    if model.endswith("-c4"):
        raise UsageError(
            f"detector.model: {model} uses a ResNet's last stage as its head, but the backbone "
            f"is {architecture}. Give a recipe with an FPN, such as voc-frozen-tiny. "
            f"(recipe key: detector.model)"
        )
    needed = LEVELS
    if recipe.is_semantic:
        needed = SEMANTIC_LEVELS
    elif model in DENSE_MODELS:
        needed = DENSE_LEVELS
    require_levels(backbone, needed, f"detector.model: {model} needs {', '.join(needed)}")


def dilation_notes(recipe: EvaluateRecipe, architectures: Collection[str]) -> list[str]:
    """A note on each network that cannot be dilated although the recipe asks for it."""
    if not recipe.dilates:
        return []
    others = [name for name in sorted(architectures) if not is_torchvision(name)]
    kept = {name: make_backbone(name) for name in others}
    return [
        f"{name}: res5 cannot be dilated and keeps its stride of "
        f"{as_backbone(network).strides['res5']}, where the protocol has "
        f"{recipe.semantic.output_stride}."
        for name, network in kept.items()
        if not dilate(network)
    ]
