"""Shared code of the safetensors formats: write the file, and read it back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from dupr_cli.artifacts.files import write_bytes
from dupr_cli.artifacts.weights import Weights, read_safetensors, reproducible
from dupr_cli.errors import RunError

MODEL_FILE = "model.safetensors"


def write_model(
    weights: Weights, folder: Path, rename: Callable[[str], str], header: Mapping[str, str]
) -> None:
    """Write model.safetensors in another framework's names. header: added to the usual metadata."""
    plain = {rename(name): tensor.contiguous() for name, tensor in weights.tensors.items()}
    write_bytes(folder / MODEL_FILE, reproducible(save(plain, metadata={**header, "format": "pt"})))


def read_model(weights: Weights, folder: Path, rename: Callable[[str], str]) -> dict[str, Tensor]:
    """Its tensors under torchvision's names. Raises RunError when any is missing."""
    found, _ = read_safetensors(folder / MODEL_FILE)
    return renamed_back(weights, found, rename)


def renamed_back(
    weights: Weights, found: Mapping[str, Tensor], rename: Callable[[str], str]
) -> dict[str, Tensor]:
    """The inverse of a renaming. Raises RunError for missing, further or reshaped tensors."""
    names = {rename(name): name for name in weights.tensors}
    missing, further = names.keys() - found.keys(), found.keys() - names.keys()
    reshaped = [
        name
        for name in names.keys() & found.keys()
        if found[name].shape != weights.tensors[names[name]].shape
    ]
    for problem, bad in (("missing", missing), ("unknown", further), ("reshaped", reshaped)):
        if bad:
            raise RunError(f"{weights.address}: {len(bad)} tensors are {problem}: {min(bad)}, ...")
    return {name: found[theirs] for theirs, name in names.items()}


def load_strictly(model: torch.nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Raises RunError, with the reason, when the model rejects these exact tensors."""
    try:
        model.load_state_dict(dict(tensors), strict=True)
    except RuntimeError as error:
        raise RunError(f"{where} refuses the weights: {error}") from error
