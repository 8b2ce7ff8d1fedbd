"""The compared weights: addresses from the command line, opened and checked.

Every command of `dupr evaluate` that takes WEIGHTS... opens them here, so that an address means the
same everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dupr_cli.artifacts.hub_weights import HUB
from dupr_cli.artifacts.weights import (
    TORCHVISION,
    Weights,
    load_backbone,
    read_torchvision_weights,
    read_weights,
)
from dupr_cli.errors import UsageError
from dupr_cli.models.resnet import ResNetBackbone

RANDOM_WEIGHTS = "none"


@dataclass(frozen=True)
class ComparedWeights:
    """One of the compared weights. weights: None for a random backbone. folder: its name in OUT.

    loaded: in words, how much of the backbone they provide.
    """

    address: str
    architecture: str
    weights: Weights | None
    folder: str
    loaded: str = ""

    @property
    def sha256(self) -> str | None:
        return self.weights.sha256 if self.weights else None


def open_compared(addresses: Sequence[str], fixed: str = "auto") -> list[ComparedWeights]:
    """Open the compared weights and check that all their tensors fit.

    addresses: runs, checkpoints, weights files, hf://OWNER/NAME, torchvision:NAME, or none. fixed:
    the required architecture, or `auto`: the one that the weights name (resnet50 if none does).
    Raises UsageError for weights that cannot be read or do not fit.
    """
    if not addresses:
        raise UsageError("Give at least one of: run directory, checkpoint, weights file, none.")
    own = [a for a in addresses if a != RANDOM_WEIGHTS and not a.startswith(TORCHVISION)]
    opened = {a: read_weights(a) for a in own}
    named = {weights.metadata.architecture for weights in opened.values()}
    without_name = [a for a in addresses if a not in opened]
    if fixed == "auto" and without_name and len(named) > 1:
        raise UsageError(
            f"{without_name[0]}: the other weights are of {' and '.join(sorted(named))}; evaluate "
            f"them separately, each with its own {without_name[0]}."
        )
    default = fixed if fixed != "auto" else next(iter(named), "resnet50")
    for address in addresses:
        if address.startswith(TORCHVISION):
            opened[address] = read_torchvision_weights(address, default)
    return [
        _open_one(address, opened.get(address), default, fixed, number)
        for number, address in enumerate(addresses, 1)
    ]


def _open_one(
    address: str, weights: Weights | None, default: str, fixed: str, number: int
) -> ComparedWeights:
    if weights is None:
        return ComparedWeights(address, default, None, f"{number:02d}-{RANDOM_WEIGHTS}", "random")
    architecture = weights.metadata.architecture
    if fixed not in ("auto", architecture):
        raise UsageError(
            f"{address}: the weights are of a {architecture}, but the recipe asks for {fixed}. Set "
            f"detector.backbone to auto or {architecture}. (recipe key: detector.backbone)"
        )
    # Load it once here, so that a tensor that does not fit is found before training starts.
    backbone = ResNetBackbone(architecture)
    count, total = load_backbone(backbone, weights), len(backbone.state_dict())
    # Resolving the path gives a name even to a run given as `.`.
    published = address.startswith((TORCHVISION, HUB))
    name = address.removeprefix(HUB) if published else Path(address).resolve().stem
    plain = re.sub(r"[^\w.-]+", "-", name)[:40]
    loaded = f"{count} of {total} tensors of the {architecture} loaded"
    return ComparedWeights(address, architecture, weights, f"{number:02d}-{plain}", loaded)
