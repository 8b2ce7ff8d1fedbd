"""The tensors of torchvision's ResNets by name and shape, without building the networks.

Building one needs torchvision, whose import takes longer than that of torch itself. Checks of
weights before a run, and every `--dry-run`, need only names and shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dupr_cli.recipe.base import Backbone as TorchvisionName

Shape = tuple[int, ...]


@dataclass(frozen=True)
class _Design:
    """blocks: of each stage. bottleneck: three convolutions to a block instead of two. groups,
    width: of the 3x3 convolutions, channels of each group in the first stage."""

    blocks: tuple[int, int, int, int]
    bottleneck: bool = True
    groups: int = 1
    width: int = 64


_DESIGNS: dict[TorchvisionName, _Design] = {
    "resnet18": _Design((2, 2, 2, 2), bottleneck=False),
    "resnet34": _Design((3, 4, 6, 3), bottleneck=False),
    "resnet50": _Design((3, 4, 6, 3)),
    "resnet101": _Design((3, 4, 23, 3)),
    "resnext50_32x4d": _Design((3, 4, 6, 3), groups=32, width=4),
    "wide_resnet50_2": _Design((3, 4, 6, 3), width=128),
}


def is_torchvision(architecture: str) -> bool:
    """Whether the architecture is one of torchvision's ResNets."""
    return architecture in _DESIGNS


def resnet_shapes(architecture: str, in_channels: int) -> dict[str, Shape]:
    """Names and shapes of the state dict, without fc, in torchvision's order."""
    return dict(_tensors(_DESIGNS[architecture], in_channels))  # type: ignore[index]


def stage_channels(architecture: str) -> tuple[int, int, int, int]:
    """Channels of the maps of res2 to res5."""
    first = 256 if _DESIGNS[architecture].bottleneck else 64  # type: ignore[index]
    return first, 2 * first, 4 * first, 8 * first


def _tensors(design: _Design, in_channels: int) -> Iterator[tuple[str, Shape]]:
    yield "conv1.weight", (64, in_channels, 7, 7)
    yield from _norm("bn1", 64)
    channels = 64
    for stage, blocks in enumerate(design.blocks):
        planes = 64 * 2**stage
        inner = planes * design.width // 64 * design.groups
        outer = 4 * planes if design.bottleneck else planes
        for block in range(blocks):
            at = f"layer{stage + 1}.{block}"
            kernels: tuple[Shape, ...]
            if design.bottleneck:
                kernels = (
                    (inner, channels, 1, 1),
                    (inner, inner // design.groups, 3, 3),
                    (outer, inner, 1, 1),
                )
            else:
                kernels = ((planes, channels, 3, 3), (planes, planes, 3, 3))
            for number, kernel in enumerate(kernels, 1):
                yield f"{at}.conv{number}.weight", kernel
                yield from _norm(f"{at}.bn{number}", kernel[0])
            if block == 0 and (stage > 0 or channels != outer):
                yield f"{at}.downsample.0.weight", (outer, channels, 1, 1)
                yield from _norm(f"{at}.downsample.1", outer)
            channels = outer


def _norm(name: str, channels: int) -> Iterator[tuple[str, Shape]]:
    for tensor in ("weight", "bias", "running_mean", "running_var"):
        yield f"{name}.{tensor}", (channels,)
    yield f"{name}.num_batches_tracked", ()
