"""Which backbones a detector can have, checked before anything is built.

Only networks of other libraries are built for it: importing torchvision, and the detectors made of
its parts, takes longer than importing torch.
"""

from __future__ import annotations

from dupr_cli.errors import UsageError
from dupr_cli.evaluate.detector_data import DENSE_LEVELS
from dupr_cli.models.backbone import make_backbone, require_levels
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
    needed = DENSE_LEVELS if model in DENSE_MODELS else LEVELS
    require_levels(backbone, needed, f"detector.model: {model} needs {', '.join(needed)}")
