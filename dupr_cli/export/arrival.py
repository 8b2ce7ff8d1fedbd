"""Weights inside the detector: put there, counted, and compared by what they compute.

`load_into` takes a live module of any library. Detectors hold a backbone under a prefix of their
own and in the names of its library, and most loaders skip in silence what they cannot match. Here
the weights arrive whole or not at all, and then the module at that place computes dupr's features
on fixed images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dupr_cli.artifacts.weights import Weights, read_weights
from dupr_cli.errors import RunError, UsageError
from dupr_cli.export.formats import Features
from dupr_cli.export.verification import TOLERANCE, features_of, fixed_images, largest_difference
from dupr_cli.models.backbone import fitted
from dupr_cli.models.naming import names_elsewhere
from dupr_cli.recipe import as_address

# Frozen batch norms do not have it, and no feature depends on it.
_COUNTER = "num_batches_tracked"
# transformers' norms of returned maps, which a detector has for the levels that it uses only.
_NORM_OF_LEVEL = "hidden_states_norms."


@dataclass(frozen=True)
class Arrival:
    """What arrived in a detector.

    place: the backbone's prefix in the detector's state dict. names: the library whose names the
    tensors have there. tensors: of them, all. left_out: those that the detector has no place for
    and no use of. levels, max_difference: the levels whose features were compared, and their
    largest difference, relative to the largest feature of a level; no levels for a bare file.
    """

    detector: str
    place: str
    names: str
    tensors: int
    left_out: list[str]
    levels: list[str]
    max_difference: float


@dataclass(frozen=True)
class Checked:
    """The result of `dupr export --check`: what arrived in each detector."""

    weights: str
    arrivals: list[Arrival]


@dataclass(frozen=True)
class _Place:
    """prefix: of the backbone in a detector. names: our names to the detector's, whole."""

    prefix: str
    library: str
    names: dict[str, str]
    left_out: list[str]


def load_into(
    model: nn.Module,
    weights: Weights | str | Path,
    place: str | None = None,
    name: str | None = None,
) -> Arrival:
    """Load a backbone into a detector, all of it or nothing, and compare what it computes there.

    model: a detector, or any module with the backbone inside: of torchvision, transformers, timm,
    detectron2, MMDetection, ultralytics, or another with the backbone's names or shapes.
    weights: a run, a checkpoint, a weights file, hf://OWNER/NAME, or `Weights` that were read.
    place: the prefix of the backbone's tensors, when the model has several that fit. name: what
    messages call the model; its class by default.
    Raises UsageError when they do not all fit, or fit in several places; then nothing has changed.
    Raises RunError when the module computes other features with them.
    """
    weights = _read(weights)
    state = model.state_dict(keep_vars=True)
    found = _only_place(weights, {k: v.shape for k, v in state.items()}, place)
    with torch.no_grad():
        for ours, theirs in found.names.items():
            state[theirs].copy_(weights.tensors[ours])
    return _compared(model, weights, found, name or type(model).__name__)


def check_module(model: nn.Module, weights: Weights, name: str) -> Arrival:
    """Whether a model holds the weights already: every tensor by value, then its features.

    Raises UsageError when it has no place for them, RunError when it holds others. Changes nothing.
    """
    state = model.state_dict()
    found = _only_place(weights, {k: v.shape for k, v in state.items()})
    _require_values(state, weights, found, name)
    return _compared(model, weights, found, name)


def check_tensors(state: Mapping[str, Tensor], weights: Weights, name: str) -> Arrival:
    """Whether the tensors of a detector's file are the weights. Raises as `check_module`."""
    found = _only_place(weights, {k: v.shape for k, v in state.items()})
    _require_values(state, weights, found, name)
    return Arrival(name, found.prefix, found.library, len(found.names), found.left_out, [], 0.0)


def _read(weights: Weights | str | Path) -> Weights:
    if not isinstance(weights, Weights):
        weights = read_weights(as_address(weights, "weights"))
    return fitted(weights)


def _only_place(
    weights: Weights, shapes: Mapping[str, torch.Size], wanted: str | None = None
) -> _Place:
    """Where the weights fit. Raises UsageError, with the nearest fit, unless it is one place."""
    complete, best = [], (0, "", "", "")
    for library, names in names_elsewhere(weights.metadata.architecture, weights.tensors).items():
        for prefix in _prefixes(shapes, names, wanted):
            left_out, problem, matched = [], "", 0
            for ours, theirs in names.items():
                there = prefix + theirs
                if there in shapes and shapes[there] == weights.tensors[ours].shape:
                    matched += 1
                elif there not in shapes and _NORM_OF_LEVEL in ours:
                    left_out.append(ours)
                elif not problem and (there in shapes or not ours.endswith(_COUNTER)):
                    has = tuple(shapes[there]) if there in shapes else None
                    own = tuple(weights.tensors[ours].shape)
                    problem = f"{there} is {f'{has} instead of {own}' if has else 'missing'}"
            if not problem:
                held = {o: prefix + t for o, t in names.items() if prefix + t in shapes}
                complete.append(_Place(prefix, library, held, left_out))
            elif matched > best[0]:
                best = (matched, prefix, library, problem)
    # Libraries share names, such as torchvision's and timm's.
    distinct = {place.prefix: place for place in reversed(complete)}
    if len(distinct) == 1:
        return next(iter(distinct.values()))
    if distinct:
        raise UsageError(
            f"{weights.address}: the backbone fits in {len(distinct)} places of the model "
            f"({', '.join(sorted(distinct))}). Give one as place."
        )
    matched, prefix, library, problem = best
    total = len(weights.tensors)
    nearest = f"At best {matched} fit, at {prefix!r} in {library}'s names: {problem}"
    raise UsageError(
        f"{weights.address}: the model has no place for all {total} tensors of the "
        f"{weights.metadata.architecture}. "
        f"{nearest if matched else 'No tensor has a name and shape that fits'}. Nothing was "
        f"loaded. Build the detector on this network, or pre-train the detector's own as "
        f"model.backbone (`dupr plan --detector` chooses it)."
    )


def _prefixes(
    shapes: Mapping[str, torch.Size], names: Mapping[str, str], wanted: str | None
) -> list[str]:
    """All that stands before the library's names of a few of the tensors."""
    if wanted is not None:
        return [wanted]
    sought = [name for name in names.values() if _COUNTER not in name]
    found = set()
    for name in (sought[0], sought[len(sought) // 2], sought[-1]):
        found |= {
            key.removesuffix(name) for key in shapes if key == name or key.endswith("." + name)
        }
    return sorted(found)


def _require_values(
    state: Mapping[str, Tensor], weights: Weights, found: _Place, name: str
) -> None:
    other = [
        theirs
        for ours, theirs in found.names.items()
        if not ours.endswith(_COUNTER)
        and not torch.equal(
            state[theirs].cpu().to(weights.tensors[ours].dtype), weights.tensors[ours]
        )
    ]
    if other:
        total = sum(not ours.endswith(_COUNTER) for ours in found.names)
        raise RunError(
            f"{name}: {total - len(other)} of {total} tensors of the backbone at {found.prefix!r} "
            f"hold the weights of {weights.address}; {other[0]} and {len(other) - 1} more hold "
            f"others. A model that is built from a configuration holds random values until "
            f"weights are loaded (dupr_cli.export.load_into, or from_pretrained), and one that was "
            f"trained since holds its own."
        )


@torch.no_grad()
def _compared(model: nn.Module, weights: Weights, found: _Place, name: str) -> Arrival:
    """Compare the outputs of the modules at the place with dupr's features of every level."""
    inner = model.get_submodule(found.prefix.removesuffix("."))
    parameter = next(inner.parameters())
    images = fixed_images(weights.metadata.input.channels)
    expected = features_of(weights, images)
    outputs: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output: _collect(output, outputs))
        for module in inner.modules()
    ]
    modes = {module: module.training for module in inner.modules()}
    try:
        _collect(inner.eval()(images.to(parameter.device, parameter.dtype)), outputs)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    without_norm = any(_NORM_OF_LEVEL in ours for ours in found.left_out)
    nearest: dict[str, float] = {}
    for level, features in expected.items():
        alike = (output for output in outputs if output.shape == features.shape)
        found_here: list[Features] = [{level: output.float().cpu()} for output in alike]
        if found_here:
            nearest[level] = min(largest_difference(of, {level: features}) for of in found_here)
    allowed = TOLERANCE.get(parameter.dtype, 0.1)
    within = [level for level in expected if nearest.get(level, torch.inf) <= allowed]
    beyond = [level for level in expected if level not in within]
    if not within or (beyond and not without_norm):
        differences = ", ".join(
            f"{level} {nearest[level]:.1e}" if level in nearest else f"{level} is not computed"
            for level in beyond
        )
        raise RunError(
            f"{name}: all tensors of {weights.address} are at {found.prefix!r}, but the module "
            f"there computes other features than dupr ({differences}; allowed {allowed:.0e})."
        )
    return Arrival(
        detector=name,
        place=found.prefix,
        names=found.library,
        tensors=len(found.names),
        left_out=found.left_out,
        levels=[*within],
        max_difference=max(nearest[level] for level in within),
    )


def _collect(output: object, into: list[Tensor]) -> None:
    """Add all maps (N, C, H, W) of a module's output, which may be nested."""
    if isinstance(output, Tensor):
        if output.ndim == 4:
            into.append(output.detach().clone())  # the next module may work in place
    elif isinstance(output, Mapping):
        for value in output.values():
            _collect(value, into)
    elif isinstance(output, list | tuple):
        for value in output:
            _collect(value, into)
