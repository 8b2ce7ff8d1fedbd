"""The compared weights: addresses given on the command line, opened and checked.

Every command of `dupr evaluate` that takes WEIGHTS... opens them here, so that an address means the
same everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dupr_cli.artifacts.weights import Weights, load_backbone, read_weights
from dupr_cli.backbones import ResNetBackbone
from dupr_cli.errors import UsageError

RANDOM_WEIGHTS = "none"


@dataclass(frozen=True)
class Candidate:
    """One of the compared weights. weights: None for a random backbone. folder: its name in OUT."""

    address: str
    architecture: str
    weights: Weights | None
    folder: str

    @property
    def sha256(self) -> str | None:
        return self.weights.sha256 if self.weights else None


def open_candidates(addresses: Sequence[str], fixed: str = "auto") -> list[Candidate]:
    """Open the compared weights and check that every tensor of theirs fits.

    fixed: the architecture asked for, or `auto`: the one that the weights name.
    Raises UsageError for weights that cannot be read or do not fit.
    """
    if not addresses:
        raise UsageError("Give at least one of: run directory, checkpoint, weights file, none.")
    opened = {a: read_weights(a) for a in addresses if a != RANDOM_WEIGHTS}
    named = {weights.metadata.architecture for weights in opened.values()}
    for address, weights in opened.items():
        if fixed not in ("auto", weights.metadata.architecture):
            raise UsageError(
                f"{address}: the weights are of a {weights.metadata.architecture}, but the recipe "
                f"asks for {fixed}. Set detector.backbone to auto or "
                f"{weights.metadata.architecture}. (recipe key: detector.backbone)"
            )
        # Loaded once here, so that a tensor that does not fit is found before anything is trained.
        load_backbone(ResNetBackbone(weights.metadata.architecture), weights)
    if fixed == "auto" and RANDOM_WEIGHTS in addresses and len(named) > 1:
        raise UsageError(
            f"{RANDOM_WEIGHTS}: the other weights are of {' and '.join(sorted(named))}; evaluate "
            f"them apart, each with its own {RANDOM_WEIGHTS}."
        )
    random = fixed if fixed != "auto" else next(iter(named), "resnet50")
    candidates = []
    for number, address in enumerate(addresses, 1):
        weights_or_none = opened.get(address)
        architecture = weights_or_none.metadata.architecture if weights_or_none else random
        name = re.sub(r"[^\w.-]+", "_", Path(address).resolve().stem)[:40]
        if address == RANDOM_WEIGHTS:
            name = RANDOM_WEIGHTS
        candidates.append(Candidate(address, architecture, weights_or_none, f"{number:02d}-{name}"))
    return candidates
