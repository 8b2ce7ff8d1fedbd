"""What a weights file holds, and how it differs from another: layout, metadata, tensors, norms."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from dupr_cli.artifacts.checkpoint_inspection import compare_values
from dupr_cli.artifacts.files import sha256_file
from dupr_cli.artifacts.hub_weights import HUB
from dupr_cli.artifacts.run import is_checkpoint
from dupr_cli.artifacts.weights import is_weights_file, read_safetensors, read_weights

EQUAL, CHANGED, SHAPE, MISSING, EXTRA = "equal", "changed", "other shape", "missing", "extra"


@dataclass(frozen=True)
class TensorFacts:
    """One tensor. norm: L2, None if a value is not finite. kind: type of its values."""

    name: str
    shape: list[int]
    kind: str
    values: int
    norm: float | None


@dataclass(frozen=True)
class LayerDifference:
    """One tensor name of either file.

    state: equal bit for bit, changed, other shape, missing from the other file, or extra there.
    distance: L2 norm of the difference over the norm in the first file; None if there is none, or
    it is not finite. largest: absolute difference of two values.
    """

    name: str
    state: str
    distance: float | None = None
    largest: float | None = None


@dataclass(frozen=True)
class Comparison:
    """The first file against the second. counts: of the tensors, by state. distance: relative L2 of
    all changed and equal tensors of floats together."""

    address: str
    counts: dict[str, int]
    distance: float | None
    layers: list[LayerDifference]


@dataclass(frozen=True)
class WeightsReport:
    """layout: as the file says, or "unknown". metadata: of the header. parameters: values of all
    tensors of floats."""

    address: str
    layout: str
    sha256: str
    metadata: dict[str, object]
    parameters: int
    tensors: list[TensorFacts]
    against: Comparison | None


def inspect_weights(address: str, against: str | None = None) -> WeightsReport:
    """Read weights, and compare them with others.

    address, against: a run, a checkpoint, a weights file, hf://OWNER/NAME, or any .safetensors.
    Raises UsageError when there are no such weights.
    """
    tensors, metadata, digest = _read(address)
    compared = None
    if against is not None:
        others, _, _ = _read(against)
        compared = _compare(tensors, others, against)
    return WeightsReport(
        address=address,
        layout=str(metadata.get("layout", "unknown")),
        sha256=digest,
        metadata=metadata,
        parameters=sum(t.numel() for t in tensors.values() if t.is_floating_point()),
        tensors=[_facts(name, tensor) for name, tensor in tensors.items()],
        against=compared,
    )


def _read(address: str) -> tuple[dict[str, Tensor], dict[str, object], str]:
    """Tensors, metadata and sha256. Files that dupr did not write are read as they are."""
    path = Path(address)
    foreign = path.suffix == ".safetensors" and path.is_file() and not address.startswith(HUB)
    if foreign and not is_weights_file(path) and not is_checkpoint(path.parent):
        tensors, header = read_safetensors(path)
        return tensors, dict(header), sha256_file(path)
    weights = read_weights(address)
    return weights.tensors, asdict(weights.metadata), weights.sha256


def _facts(name: str, tensor: Tensor) -> TensorFacts:
    norm = _norm(tensor)
    return TensorFacts(
        name=name,
        shape=list(tensor.shape),
        kind=str(tensor.dtype).removeprefix("torch."),
        values=tensor.numel(),
        norm=norm if math.isfinite(norm) else None,
    )


def _norm(tensor: Tensor) -> float:
    return float(tensor.double().square().sum().sqrt())


def _compare(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], address: str) -> Comparison:
    layers = []
    apart, whole = 0.0, 0.0
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        if name not in theirs:
            layers.append(LayerDifference(name, MISSING))
        elif name not in ours:
            layers.append(LayerDifference(name, EXTRA))
        elif ours[name].shape != theirs[name].shape:
            layers.append(LayerDifference(name, SHAPE))
        else:
            a, b = ours[name], theirs[name]
            if a.dtype == b.dtype and compare_values(a, b)[0] == 0:
                layers.append(LayerDifference(name, EQUAL, 0.0, 0.0))
            else:
                layers.append(_changed(name, a, b))
            if a.is_floating_point():
                apart += _norm(a.double() - b.double()) ** 2
                whole += _norm(a) ** 2
    distance = math.sqrt(apart / whole) if whole and math.isfinite(apart / whole) else None
    counts = dict(Counter(layer.state for layer in layers))
    return Comparison(address, counts, distance, layers)


def _changed(name: str, a: Tensor, b: Tensor) -> LayerDifference:
    apart = a.double() - b.double()
    size = _norm(a)
    distance = _norm(apart) / size if size else math.inf
    largest = float(apart.abs().max()) if apart.numel() else 0.0
    return LayerDifference(
        name,
        CHANGED,
        distance if math.isfinite(distance) else None,
        largest if math.isfinite(largest) else None,
    )
