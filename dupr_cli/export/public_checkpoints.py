"""`dupr import`: convert ResNets that others published into a weights file.

In every framework, a checkpoint is tensors by name; the prefix of the names and the names of a
ResNet's parts differ. The name of the first block's convolution identifies both. Supported are
torchvision's and timm's own names (MoCo: `module.encoder_q.`, SwAV: `module.`, DINO: `teacher.`,
DenseCL, DetCo, MMSelfSup and OpenSelfSup: `backbone.` or none), the numbers of a Sequential
(lightly), transformers' and detectron2's. Everything else in the file, such as heads and queues, is
left out.

A tensor under the names of the stem and the stages that a plain ResNet lacks belongs to another
network (attention, other norms, further layers) and is refused: without it the features would be
silently wrong. A few networks have exactly the tensors of a plain ResNet but compute something
else; they are recognised only by their names.
"""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from dupr_cli.artifacts.files import remove_abandoned, sha256_file
from dupr_cli.artifacts.hub_weights import HUB, fetch_weights
from dupr_cli.artifacts.weights import (
    IMPORTED,
    WeightsMetadata,
    require_plain_values,
    write_weights,
)
from dupr_cli.errors import UsageError
from dupr_cli.export.checkpoint_files import flat_tensors, read_checkpoint
from dupr_cli.export.record import require_replaceable
from dupr_cli.models.naming import (
    block_count,
    detectron2_backbone_name,
    sequential_name,
    transformers_name,
)
from dupr_cli.models.resnet_shapes import Shape, resnet_shapes
from dupr_cli.parsing import read_json
from dupr_cli.recipe.base import IMAGENET_MEAN, IMAGENET_STD, Backbone
from dupr_cli.runtime.stopping import stoppable

_COUNTER = "num_batches_tracked"
# If a file holds several networks, the first match wins; methods transfer these networks.
_PREFERRED = ("teacher", "encoder_q", "query", "online", "student", "backbone")
_AVERAGED = ("encoder_k", "key", "momentum", "target")
# Other names of the stem and the stages that a plain ResNet lacks: a second convolution of the
# stem, a learned pooling, a fifth stage. `[23]` are those of a Sequential.
_STEM_OR_STAGE = re.compile(r"(layer|conv|bn|act)\d+|stem|maxpool|relu|[23]")
# timm's anti-aliased ResNets, whose blurring has no tensors.
_SAME_TENSORS = re.compile(r"\w*resnet(aa|blur)\d+\w*", re.IGNORECASE)
_SHOWN = 3
_ELSEWHERE = (
    "dupr imports plain ResNets only; `dupr pretrain` trains any network that timm can cut into "
    "levels (model.backbone: timm:NAME)."
)
_DETECTRON2_INPUT = (
    "detectron2 gives its networks pixels of 0 to 255, in BGR order unless INPUT.FORMAT says RGB. "
    "dupr gives RGB, which --input-mean and --input-std (of pixels of 0 to 1) do not change.",
    "Models of MSRA and Caffe2 (R-50.pkl, X-101-32x8d.pkl and models trained from them) have the "
    "stride in the 1x1 convolution. dupr has it in the 3x3 one, so the features differ.",
)


@dataclass(frozen=True)
class Imported:
    """prefix: the removed prefix of the tensors' names. left_out: tensors outside the backbone.

    notes: facts that the file does not state but a user needs.
    """

    path: str
    source: str
    architecture: str
    prefix: str
    naming: str
    tensors: int
    left_out: int
    others: list[str]
    notes: list[str]
    sha256: str


@dataclass(frozen=True)
class _Naming:
    """anchor: the name that identifies the naming. translate: from torchvision's names to it."""

    name: str
    anchor: str
    translate: Callable[[str], str]


_ANCHOR = "layer1.0.conv1.weight"
_NAMINGS = tuple(
    _Naming(name, translate(_ANCHOR), translate)
    for name, translate in (
        ("torchvision", lambda name: name),
        ("transformers", transformers_name),
        ("detectron2", detectron2_backbone_name),
        ("sequential", sequential_name),
    )
)


@stoppable("Nothing was written.")
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

    address: a file (.safetensors, or a file of torch.save), or hf://OWNER/NAME/FILE. prefix: of the
    names of the wanted network, if the file holds several. mean, std: of its input, RGB in 0..1; a
    file does not state them.
    Raises UsageError for a file that cannot be read without running code, holds no torchvision
    ResNet, lacks one of its tensors, or holds a network with more parts than a plain ResNet.
    """
    require_replaceable(out, [out], overwrite)
    path = fetch_weights(address) if address.startswith(HUB) else Path(address)
    content = read_checkpoint(path, address)
    _refuse_same_tensors(content, path, address)
    found = dict(flat_tensors(content))
    networks = _networks(found)
    if not networks:
        raise UsageError(
            f"{address}: the file holds no ResNet: none of its {len(found)} tensors is the first "
            f"convolution of a first block ({_ANCHOR} or similar). The first are "
            f"{', '.join(sorted(found)[:5]) or 'none'}."
        )
    chosen, naming = _choose(networks, prefix, address)
    own = {name.removeprefix(chosen): t for name, t in found.items() if name.startswith(chosen)}
    architecture = _architecture(own, naming, address)
    _refuse_further(own, naming, architecture, address)
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
    remove_abandoned(out)
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
        notes=list(_DETECTRON2_INPUT) if naming.name == "detectron2" else [],
        sha256=sha256_file(out),
    )


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
                f"{address}: no ResNet has the prefix {prefix!r}; the prefixes are "
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
    """The ResNet whose tensors are all present with their shapes."""
    candidates = []
    for architecture in get_args(Backbone):
        shapes = _shapes(architecture)
        wrong = [
            f"{theirs} is missing"
            if theirs not in own
            else f"{theirs} is {_sides(own[theirs].shape)} instead of {_sides(shape)}"
            for theirs, shape in ((naming.translate(n), shape) for n, shape in shapes.items())
            if not theirs.endswith(_COUNTER) and (theirs not in own or own[theirs].shape != shape)
        ]
        wrong += [
            f"{theirs} belongs to an extra block"
            for n in range(1, 5)
            if (theirs := naming.translate(f"layer{n}.{block_count(shapes, n)}.conv1.weight"))
            in own
        ]
        if not wrong:
            return str(architecture)
        candidates.append((len(wrong), architecture, wrong))
    _, nearest, wrong = min(candidates)
    further = _further(own, naming, nearest)
    raise UsageError(
        f"{address}: this is not a torchvision ResNet. The nearest is {nearest}, but "
        f"{_some(wrong, '; ')}."
        + (f" A {nearest} also lacks {_some(further)}." if further else "")
        + f" {_ELSEWHERE}"
    )


@cache
def _shapes(architecture: str) -> dict[str, Shape]:
    return resnet_shapes(architecture, in_channels=3)


def _sides(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "a single number"


def _some(names: Sequence[str], separator: str = ", ") -> str:
    rest = len(names) - _SHOWN
    return separator.join(names[:_SHOWN]) + (f"{separator}and {rest} more" if rest > 0 else "")


def _further(own: Mapping[str, Tensor], naming: _Naming, architecture: str) -> list[str]:
    """Tensors of the stem and the stages that the architecture does not have."""
    known = {naming.translate(name) for name in _shapes(architecture)}
    roots = {name.partition(".")[0] for name in known}
    return [
        name
        for name in own
        if name not in known
        and ((root := name.partition(".")[0]) in roots or _STEM_OR_STAGE.fullmatch(root))
    ]


def _refuse_further(
    own: Mapping[str, Tensor], naming: _Naming, architecture: str, address: str
) -> None:
    further = _further(own, naming, architecture)
    if further:
        raise UsageError(
            f"{address}: this is not a plain {architecture}. It has all its tensors, and "
            f"{len(further)} more: {_some(further)}. Without these the features "
            f"would be wrong. {_ELSEWHERE}"
        )


def _refuse_same_tensors(content: object, path: Path, address: str) -> None:
    """Refuse networks that differ from a plain ResNet in what they compute, not in their tensors.

    The address, timm's config.json beside a file, or values that a script saved may name one.
    """
    for place, name in ((address, address), *_named_architectures(content, path)):
        variant = _SAME_TENSORS.search(name)
        if variant:
            raise UsageError(
                f"{address}: this is not a plain ResNet, by its name in {place}: {variant[0]} "
                f"blurs before it subsamples, so a plain ResNet with its tensors computes other "
                f"features. "
                f"{_ELSEWHERE} Move the file if that name is wrong."
            )


def _named_architectures(content: object, path: Path) -> Iterator[tuple[str, str]]:
    config = path.with_name("config.json")
    if config.is_file():
        with contextlib.suppress(ValueError):  # then it belongs to another program
            beside = read_json(config)
            if isinstance(beside, dict):
                yield config.name, str(beside.get("architecture"))
    if isinstance(content, Mapping):
        options = content.get("args")
        saved = vars(options) if isinstance(options, argparse.Namespace) else options
        for where in (content, saved if isinstance(saved, Mapping) else {}):
            for key in ("arch", "model"):
                if isinstance(where.get(key), str):
                    yield f"its {key}", where[key]


def _translated(
    own: Mapping[str, Tensor], naming: _Naming, architecture: str, address: str
) -> dict[str, Tensor]:
    """The tensors under torchvision's names; batch counters, if a framework lacks them, are 0."""
    tensors = {}
    for name in _shapes(architecture):
        theirs = naming.translate(name)
        if theirs in own:
            tensor = own[theirs]
            try:
                require_plain_values({theirs: tensor})
            except UsageError as error:
                raise UsageError(f"{address}: {error}") from error
            tensors[name] = tensor.float() if tensor.is_floating_point() else tensor
        else:
            tensors[name] = torch.zeros((), dtype=torch.long)
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise UsageError(f"{address}: {broken[0]} holds values that are not finite.")
    return tensors
