"""Weights by address, wherever they are: dupr's own, and those that torchvision and timm publish.

`model.init` of a pre-training and the weights that `dupr evaluate` compares mean the same here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dupr_cli.artifacts.files import sha256_file
from dupr_cli.artifacts.hub_weights import HUB, fetch_weights
from dupr_cli.artifacts.weights import (
    SUPERVISED,
    TORCHVISION,
    Weights,
    WeightsMetadata,
    layout_of,
    read_safetensors,
    read_torchvision_weights,
    read_weights,
)
from dupr_cli.errors import UsageError
from dupr_cli.models.backbone import make_backbone
from dupr_cli.recipe.base import TIMM

_FILE = "model.safetensors"


def is_published(address: str) -> bool:
    """Whether a library publishes the weights, and they fit its network of that name only."""
    return address.startswith((TORCHVISION, TIMM))


def open_weights(address: str, architecture: str) -> Weights:
    """The weights at an address, see `read_weights`, torchvision:NAME or timm:NETWORK.TAG.

    architecture: the network that published weights are for; it does not matter for others.
    Raises UsageError when there are no such weights, RunError when they cannot be fetched.
    """
    if address.startswith(TORCHVISION):
        return read_torchvision_weights(address, architecture)
    if address.startswith(TIMM):
        return _read_timm_weights(address, architecture)
    return read_weights(address)


def timm_architecture(address: str) -> str:
    """timm:NETWORK of timm:NETWORK.TAG."""
    return address.partition(".")[0]


def _read_timm_weights(address: str, architecture: str) -> Weights:
    """Weights that timm publishes, without its classifier; fetched once into the Hub's cache.

    For torchvision's ResNet of the same name, whose tensors have the same names, they are its.
    """
    own = timm_architecture(address)
    if own == TIMM + architecture:
        own = architecture
    backbone = make_backbone(own)
    import timm

    known = [TIMM + name for name in timm.list_pretrained(f"{own.rpartition(':')[2]}.*")]
    # Without a tag, timm's choice depends on its version.
    if address not in known:
        raise UsageError(
            f"{address}: timm publishes no such weights of this network; it has "
            f"{', '.join(known) or 'none'}."
        )
    facts: Any = timm.get_pretrained_cfg(address.removeprefix(TIMM), allow_unregistered=False)
    if not facts.hf_hub_id:
        raise UsageError(f"{address}: timm has these weights, but not on the Hub.")
    path = fetch_weights(f"{HUB}{facts.hf_hub_id}/{facts.hf_hub_filename or _FILE}")
    tensors, _ = read_safetensors(path)
    metadata = WeightsMetadata(
        layout=layout_of(own),
        architecture=own,
        input_mean=tuple(facts.mean),
        input_std=tuple(facts.std),
        input_size=int(facts.input_size[-1]),
        encoder=SUPERVISED,
    )
    wanted = backbone.state_dict()
    kept = {name: tensor for name, tensor in tensors.items() if name in wanted}
    return Weights(address, metadata, kept, sha256_file(Path(path)))
