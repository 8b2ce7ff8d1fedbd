"""The recipe of `dupr export`: which weights, in which layout."""

from __future__ import annotations

from typing import Literal

from dupr_cli.recipe.base import Section


class ExportRecipe(Section):
    """Backbone weights of a run in the layout that a framework loads."""

    stage: Literal["export"] = "export"
    description: str = ""
    """One line for `dupr recipe list`."""
    format: Literal["torchvision"] = "torchvision"
    """Layout of the file: `torchvision` is the state dict of torchvision.models.resnetXX
    without fc."""
    encoder: Literal["query", "key"] = "query"
    """Which encoder's backbone: the one trained by gradient (query, what MoCo transfers) or its
    moving average (key)."""
