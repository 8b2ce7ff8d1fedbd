"""`dupr import`: ResNets that others published, as a weights file.

Whatever the framework, a checkpoint is tensors by name; what differs is how the names begin and how
the parts of a ResNet are called. The name of the first block's convolution tells both. Known are
torchvision's and timm's own names (MoCo: `module.encoder_q.`, SwAV: `module.`, DINO: `teacher.`,
DenseCL, DetCo, MMSelfSup and OpenSelfSup: `backbone.` or none), the numbers of a Sequential
(lightly), transformers' and detectron2's. Everything else in the file, heads and queues, is left
out.

Pickled files are read by torch's restricted unpickler, which builds tensors and plain containers
and runs nothing.
"""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from dupr_cli.artifacts.files import sha256_file
from dupr_cli.artifacts.hub_weights import HUB, fetch_weights
from dupr_cli.artifacts.weights import (
    IMPORTED,
    WeightsMetadata,
    read_safetensors,
    write_weights,
)
from dupr_cli.errors import UsageError
from dupr_cli.models.naming import block_count, detectron2_backbone_name, transformers_name
from dupr_cli.models.resnet import ResNetBackbone
from dupr_cli.recipe.base import IMAGENET_MEAN, IMAGENET_STD, Backbone

_COUNTER = "num_batches_tracked"
# Children of a torchvision ResNet in order, as nn.Sequential numbers them.
_CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
# Where a file holds several networks, the first that its prefix names; methods transfer these.
_PREFERRED = ("teacher", "encoder_q", "query", "online", "student", "backbone")
_AVERAGED = ("encoder_k", "key", "momentum", "target")


@dataclass(frozen=True)
class Imported:
    """prefix: what the tensors' names began with. left_out: tensors that are no backbone."""

    path: str
    source: str
    architecture: str
    prefix: str
    naming: str
    tensors: int
    left_out: int
    others: list[str]
    sha256: str


@dataclass(frozen=True)
class _Naming:
    """anchor: the name that tells the naming. translate: of torchvision's names into it."""

    name: str
    anchor: str
    translate: Callable[[str], str]


def _sequential_name(name: str) -> str:
    numbers = {child: number for number, child in _CHILDREN.items()}
    first, _, rest = name.partition(".")
    return f"{numbers[first]}.{rest}"


_ANCHOR = "layer1.0.conv1.weight"
_NAMINGS = tuple(
    _Naming(name, translate(_ANCHOR), translate)
    for name, translate in (
        ("torchvision", lambda name: name),
        ("transformers", transformers_name),
        ("detectron2", detectron2_backbone_name),
        ("sequential", _sequential_name),
    )
)


def import_weights(
    address: str,
    out: Path,
    *,
    prefix: str | None = None,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    overwrite: bool = False,
) -> Imported:
    """Write the backbone of a public checkpoint as a weights file at `out`.

    address: a file (.safetensors, or what torch.save wrote), or hf://OWNER/NAME/FILE. prefix: what
    the names of the wanted network begin with, where the file holds several. mean, std: of its
    input, RGB in 0..1; a file does not say.
    Raises UsageError for what cannot be read without running code, holds no ResNet of
    torchvision's, or lacks a tensor of it.
    """
    if out.exists() and not overwrite:
        raise UsageError(f"{out}: a file is there. Give another --out, or --overwrite.")
    path = fetch_weights(address) if address.startswith(HUB) else Path(address)
    found = dict(_flat(_read(path, address)))
    networks = _networks(found)
    if not networks:
        raise UsageError(
            f"{address}: no ResNet in it: none of its {len(found)} tensors is the first "
            f"convolution of a first block ({_ANCHOR} or its like). The first are "
            f"{', '.join(sorted(found)[:5]) or 'none'}."
        )
    chosen, naming = _choose(networks, prefix, address)
    own = {name.removeprefix(chosen): t for name, t in found.items() if name.startswith(chosen)}
    architecture = _architecture(own, naming, address)
    tensors = _translated(own, naming, architecture, address)
    metadata = WeightsMetadata(
        layout="torchvision",
        architecture=architecture,
        input_mean=mean,
        input_std=std,
        input_size=224,
        encoder=IMPORTED,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_weights(out, tensors, metadata)
    used = found.keys() & {chosen + naming.translate(name) for name in tensors}
    return Imported(
        path=str(out),
        source=address,
        architecture=architecture,
        prefix=chosen,
        naming=naming.name,
        tensors=len(tensors),
        left_out=len(found) - len(used),
        others=sorted(set(networks) - {chosen}),
        sha256=sha256_file(out),
    )


def _read(path: Path, address: str) -> object:
    """The content of a file. Raises UsageError for what is missing, damaged, or would run code."""
    if not path.is_file():
        raise UsageError(f"{address}: there is no such file.")
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]
    try:
        # Options of a command line, which many training scripts save beside the weights: no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Bytes that mean nothing, and not those of a pickle that the unpickler knows too little of.
        if "Unsupported operand" in str(error) and not path.read_bytes().startswith(pickle.PROTO):
            raise UsageError(_unreadable(address, "no file that torch.save wrote")) from error
        raise UsageError(
            f"{address}: refused. It is a pickle that holds more than tensors and plain values "
            f"({_asked_for(str(error))}), and reading that could run code. Nothing of it was run. "
            f"Save the tensors alone, best as .safetensors, where you trust the file."
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error) or type(error).__name__
        raise UsageError(_unreadable(address, reason)) from error


def _unreadable(address: str, reason: str) -> str:
    return (
        f"{address}: cannot be read as a checkpoint ({reason}). It may be cut off, or of another "
        f"format; download it again."
    )


def _asked_for(message: str) -> str:
    """What the unpickler stopped at, of its long message."""
    found = re.search(r"GLOBAL ([\w.]+)|WeightsUnpickler error:\s+([^\n]{1,120})", message)
    return str(found[1] or found[2]) if found else "not a checkpoint"


def _flat(content: object, place: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors by their path of keys. What torch and Lightning wrap them in is no part of it."""
    if isinstance(content, Tensor):
        yield place, content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            bare = key in ("state_dict", "model", "model_state_dict") and not place
            inner = "" if bare and not isinstance(value, Tensor) else f"{place}.{key}".lstrip(".")
            yield from _flat(value, inner)


def _networks(found: Mapping[str, Tensor]) -> dict[str, _Naming]:
    """Prefixes under which a ResNet begins, each with its naming."""
    networks: dict[str, _Naming] = {}
    for naming in _NAMINGS:
        for name in found:
            prefix = name.removesuffix(naming.anchor)
            whole = prefix != name and (not prefix or prefix.endswith("."))
            if whole and not any(prefix.startswith(known) for known in networks if known):
                networks.setdefault(prefix, naming)
    return networks


def _choose(
    networks: Mapping[str, _Naming], prefix: str | None, address: str
) -> tuple[str, _Naming]:
    if prefix is not None:
        if prefix not in networks:
            raise UsageError(
                f"{address}: there is no ResNet under {prefix!r}; there are "
                f"{', '.join(map(repr, networks))}."
            )
        return prefix, networks[prefix]

    def rank(candidate: str) -> tuple[bool, int]:
        parts = candidate.split(".")
        named = (n for n, word in enumerate(_PREFERRED) if any(word in part for part in parts))
        averaged = any(word in part for part in parts for word in _AVERAGED)
        return averaged, next(named, len(_PREFERRED))

    first = min(networks, key=rank)
    return first, networks[first]


def _architecture(own: Mapping[str, Tensor], naming: _Naming, address: str) -> str:
    """The ResNet whose tensors are all there in their shapes."""
    candidates = []
    for architecture in get_args(Backbone):
        with torch.device("meta"):
            shapes = {n: t.shape for n, t in ResNetBackbone(architecture).state_dict().items()}
        wrong = [
            name
            for name, shape in shapes.items()
            if not name.endswith(_COUNTER)
            and (naming.translate(name) not in own or own[naming.translate(name)].shape != shape)
        ]
        further = {f"layer{n}.{block_count(shapes, n)}.conv1.weight" for n in range(1, 5)}
        deeper = any(naming.translate(name) in own for name in further)
        if not wrong and not deeper:
            return str(architecture)
        candidates.append((len(wrong) + 1000 * deeper, architecture, wrong[:1]))
    _, nearest, first = min(candidates)
    missing = naming.translate(first[0]) if first else "the end of a deeper network"
    raise UsageError(
        f"{address}: not a whole ResNet of torchvision's; the nearest is {nearest}, for which "
        f"{missing} is missing or of another shape."
    )


def _translated(
    own: Mapping[str, Tensor], naming: _Naming, architecture: str, address: str
) -> dict[str, Tensor]:
    """Under torchvision's names; counters of batches, which not all frameworks have, as 0."""
    with torch.device("meta"):
        names = list(ResNetBackbone(architecture).state_dict())
    tensors = {}
    for name in names:
        theirs = naming.translate(name)
        if theirs in own:
            tensor = own[theirs]
            tensors[name] = tensor.float() if tensor.is_floating_point() else tensor
        else:
            tensors[name] = torch.zeros((), dtype=torch.long)
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise UsageError(f"{address}: {broken[0]} holds values that are not finite.")
    return tensors
