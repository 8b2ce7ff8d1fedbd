"""The compared weights: addresses from the command line, opened and checked.

Every command of `dupr evaluate` that takes WEIGHTS... opens them here, so that an address means the
same everywhere.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dupr_cli.artifacts.hub_weights import HUB
from dupr_cli.artifacts.pixel_formats import RGB_INPUT, NetworkInput, described
from dupr_cli.artifacts.weights import Weights, read_weights
from dupr_cli.errors import UsageError
from dupr_cli.models.backbone import require_fit
from dupr_cli.models.published import is_published, open_weights, timm_architecture
from dupr_cli.recipe.base import PERMUTED, TIMM

RANDOM_WEIGHTS = "none"


@dataclass(frozen=True)
class ComparedWeights:
    """One of the compared weights. weights: None for a random backbone. folder: its name in OUT.

    loaded: in words, how much of the backbone they provide. input: what the network takes; a random
    one takes what the others take.
    """

    address: str
    architecture: str
    weights: Weights | None
    folder: str
    loaded: str = ""
    input: NetworkInput = RGB_INPUT

    @property
    def sha256(self) -> str | None:
        return self.weights.sha256 if self.weights else None


def open_compared(addresses: Sequence[str], fixed: str = "auto") -> list[ComparedWeights]:
    """Open the compared weights and check that all their tensors fit.

    addresses: runs, checkpoints, weights files, hf://OWNER/NAME, torchvision:NAME or
    timm:NETWORK.TAG, each possibly after permuted:, or none. fixed: the required architecture, or
    `auto`: the one that the weights name (resnet50 if none does).
    Raises UsageError for weights that cannot be read or do not fit.
    """
    if not addresses:
        raise UsageError("Give at least one of: run directory, checkpoint, weights file, none.")
    sources = {address: address.removeprefix(PERMUTED) for address in addresses}
    if RANDOM_WEIGHTS in (s for a, s in sources.items() if a != s):
        raise UsageError(f"{PERMUTED}{RANDOM_WEIGHTS}: random weights have no structure to lose.")
    own = {s for s in sources.values() if s != RANDOM_WEIGHTS and not is_published(s)}
    opened = {source: read_weights(source) for source in sorted(own)}
    named = {weights.metadata.architecture for weights in opened.values()}
    if not named:
        named = {timm_architecture(s) for s in sources.values() if s.startswith(TIMM)}
    without_name = [a for a in addresses if sources[a] not in opened]
    if fixed == "auto" and without_name and len(named) > 1:
        raise UsageError(
            f"{without_name[0]}: the other weights are of {' and '.join(sorted(named))}; evaluate "
            f"them separately, each with its own {without_name[0]}."
        )
    default = fixed if fixed != "auto" else next(iter(named), "resnet50")
    for source in sources.values():
        if is_published(source):
            opened[source] = open_weights(source, default)
    found = []
    for number, address in enumerate(addresses, 1):
        weights = opened.get(sources[address])
        if weights is not None and address.startswith(PERMUTED):
            weights = permuted(weights)
        found.append(_open_one(address, weights, default, fixed, number))
    return _with_one_format(found)


def _with_one_format(compared: list[ComparedWeights]) -> list[ComparedWeights]:
    """The same; random weights take the input of the first others that keep channels.

    Raises UsageError when the weights take images of different formats.
    """
    given = [one for one in compared if one.weights is not None]
    for one in given[1:]:
        first = given[0]
        if one.input.pixels != first.input.pixels:
            raise UsageError(
                f"{one.address}: the weights take {described(one.input.pixels)}, but those of "
                f"{first.address} {described(first.input.pixels)}, so they cannot be compared on "
                f"the same images. Evaluate them separately."
            )
    if not given or given[0].input.pixels is None:
        return compared
    taken = given[0].input
    return [replace(one, input=taken) if one.weights is None else one for one in compared]


def taking(
    compared: list[ComparedWeights], input_of_data: Callable[[], NetworkInput | None]
) -> list[ComparedWeights]:
    """The same; if all are random weights, they take the input that the data asks for, if any."""
    if any(one.weights is not None for one in compared):
        return compared
    taken = input_of_data()
    return [replace(one, input=taken) for one in compared] if taken else compared


def permuted(weights: Weights) -> Weights:
    """The weights with the values of each tensor in a random order, the same in every call.

    Tensors of one value per channel, such as those of a norm, keep their values together: the
    channels of one module move alike.
    """
    tensors = {}
    for name, tensor in weights.tensors.items():
        place = name if tensor.ndim > 1 else name.rpartition(".")[0]
        seed = int.from_bytes(hashlib.sha256(place.encode()).digest()[:8], "big")
        generator = torch.Generator().manual_seed(seed % 2**63)
        order = torch.randperm(tensor.numel(), generator=generator)
        tensors[name] = tensor.flatten()[order].view(tensor.shape)
    digest = hashlib.sha256(f"{PERMUTED}{weights.sha256}".encode()).hexdigest()
    return replace(weights, tensors=tensors, sha256=digest)


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
    # Checked here, so that a tensor that does not fit is found before training starts.
    count = require_fit(weights, architecture, weights.metadata.input.channels)
    # Resolving the path gives a name even to a run given as `.`.
    source = address.removeprefix(PERMUTED)
    published = is_published(source) or source.startswith(HUB)
    name = source.removeprefix(HUB) if published else Path(source).resolve().stem
    if address != source:
        name = f"permuted-{name}"
    plain = re.sub(r"[^\w.-]+", "-", name)[:40]
    loaded = f"{count} of {count} tensors of the {architecture} loaded"
    folder = f"{number:02d}-{plain}"
    return ComparedWeights(address, architecture, weights, folder, loaded, weights.metadata.input)
