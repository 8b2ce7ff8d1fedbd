"""Weights files and weights addresses: what `export` writes and `evaluate` reads.

A weights file is a `.safetensors` of one backbone, in the names of its own library (the layout:
torchvision's without fc, or timm's without the classifier). Its header metadata gives layout,
architecture, input statistics and origin. `read_weights` takes every form of weights that the
command line accepts: such a file, local or on the Hugging Face Hub, a run directory (its newest
checkpoint), or one checkpoint. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dupr_cli import __version__
from dupr_cli.artifacts.files import sha256_file, write_bytes
from dupr_cli.artifacts.hub_weights import HUB, fetch_weights
from dupr_cli.artifacts.pixel_formats import NetworkInput, PixelFormat
from dupr_cli.artifacts.run import (
    MODEL_FILE,
    Checkpoint,
    ImageSide,
    is_checkpoint,
    newest_checkpoint,
    require_statistics,
)
from dupr_cli.artifacts.versions import check_version
from dupr_cli.errors import RunError, UsageError
from dupr_cli.parsing import ParseError, parse_json, require_distinct_keys, validated

# 2: `input_range`. Weights for RGB of 8 bits are still written as 1, which means the same.
FORMAT_VERSION = 2
_VERSION = "dupr_format_version"  # has a prefix because other libraries write headers too
IMPORTED = "imported"  # stands in place of the encoder
SUPERVISED = "supervised"  # likewise, of weights that were trained with labels
STORED = "stored"  # the order of channels in the images that weights were trained on
_REQUIRED = (
    "layout", "architecture", "input_size", "channel_order", "encoder", "step", "recipe_sha256",
    "dupr_version",
)  # fmt: skip
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Last parts of the names of what a network learns; other tensors may be indexes or counters.
_LEARNED = ("weight", "bias", "running_mean", "running_var")
_MOST_HEADER_BYTES = 100_000_000  # as in the library
TORCHVISION = "torchvision:"  # precedes the name of weights that torchvision publishes


@dataclass(frozen=True)
class WeightsMetadata:
    """The header metadata of a weights file, where every value is a string.

    input_mean, input_std: of each channel. input_range: values that become 0 and 1 in images that
    keep their channels; None for RGB of 8 bits. channel_order: RGB, or "stored" for such images.
    method: the pre-training method, by its name in the literature; empty if unknown. further: names
    of tensors in the file that are not the backbone's, which other libraries need to load it.
    """

    layout: str
    architecture: str
    input_mean: tuple[float, ...]
    input_std: tuple[float, ...]
    input_size: ImageSide
    channel_order: str = "RGB"
    encoder: str = "query"
    step: Annotated[int, Field(ge=0)] = 0
    recipe_sha256: str = ""
    method: str = ""
    input_range: tuple[float, float] | None = None
    further: tuple[str, ...] = ()
    dupr_version: str = __version__

    @property
    def imported(self) -> bool:
        """Whether `dupr import` made the file, from weights that others trained."""
        return self.encoder == IMPORTED

    @property
    def input(self) -> NetworkInput:
        """What the network takes."""
        pixels = None
        if self.input_range is not None:
            pixels = PixelFormat(len(self.input_mean), self.input_range)
        return NetworkInput(self.input_mean, self.input_std, pixels)

    @property
    def pixel_statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation for pixels from 0 to 255."""
        mean, std = (
            [round(255 * v, 3) for v in values] for values in (self.input_mean, self.input_std)
        )
        return mean, std

    @property
    def origin(self) -> str:
        """Encoder and step, or "imported"; for people."""
        return IMPORTED if self.imported else f"{self.encoder} encoder, step {self.step}"

    def to_header(self) -> dict[str, str]:
        return {
            "format": "pt",
            _VERSION: str(1 if self.input_range is None else FORMAT_VERSION),
            "layout": self.layout,
            "architecture": self.architecture,
            "input_mean": json.dumps(self.input_mean),
            "input_std": json.dumps(self.input_std),
            "input_size": str(self.input_size),
            "channel_order": self.channel_order,
            "encoder": self.encoder,
            "step": str(self.step),
            "recipe_sha256": self.recipe_sha256,
            "method": self.method,
            "dupr_version": self.dupr_version,
            **({"input_range": json.dumps(self.input_range)} if self.input_range else {}),
            **({"further": json.dumps(self.further)} if self.further else {}),
        }

    @classmethod
    def from_header(cls, header: Mapping[str, str], where: str) -> WeightsMetadata:
        """Raises ValueError, which names the key, when the header is not that of a weights file.

        Raises VersionError for a later format.
        """
        check_version(int(header.get(_VERSION, 1)), FORMAT_VERSION, where)
        for name in _REQUIRED:
            if name not in header:
                raise ParseError(f"{name} is missing")
        values: dict[str, object] = {name: header[name] for name in _REQUIRED}
        values["method"] = header.get("method", "")
        for name in ("input_mean", "input_std", "input_range", "further"):
            if name in header:
                try:
                    values[name] = parse_json(header[name])
                except ParseError as error:
                    raise ParseError(f"{name}: {error}") from None
        metadata = validated(cls, values)
        require_statistics(metadata.input_mean, metadata.input_std)
        _limits(metadata.input_range)
        return metadata


@dataclass(frozen=True)
class Weights:
    """Backbone weights in the names of their layout, and where they come from."""

    address: str
    metadata: WeightsMetadata
    tensors: dict[str, Tensor] = field(repr=False)
    sha256: str = ""


def write_weights(path: Path, tensors: Mapping[str, Tensor], metadata: WeightsMetadata) -> None:
    """Write a weights file, which appears at `path` only when complete."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, reproducible(save(plain, metadata=metadata.to_header())))


def reproducible(data: bytes) -> bytes:
    """A safetensors file with a sorted header, so that equal weights give equal bytes.

    The library writes metadata in the order of a hash map, which differs from run to run. Format:
    8 bytes of header length (little endian), the header as JSON, the tensors' bytes.
    """
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors start aligned
    return len(header).to_bytes(8, "little") + header + data[end:]


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header metadata of a file. Raises UsageError when it is damaged."""
    try:
        require_distinct_names(path)
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except (SafetensorError, OSError, ParseError) as error:
        raise UsageError(
            f"{path}: not a whole safetensors file ({error}). It may be cut off or have another "
            f"format; copy it or export it again."
        ) from error


def require_distinct_names(path: Path) -> None:
    """Raises ParseError when the header of a safetensors file is no JSON or names a tensor twice.

    The header's place: see `reproducible`.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > min(_MOST_HEADER_BYTES, path.stat().st_size):
            raise ParseError(f"its header would have {size} bytes")
        require_distinct_keys(file.read(size))


def require_plain_values(tensors: Mapping[str, Tensor]) -> None:
    """Raises UsageError, naming the tensor, unless a network's parameters are floats of 16 bits or
    more: others would be converted without a word to something that they do not mean."""
    for name, tensor in tensors.items():
        learned = name.rpartition(".")[2] in _LEARNED
        whole = not (tensor.is_floating_point() or tensor.is_complex() or tensor.is_quantized)
        if tensor.dtype not in _FLOATS and (learned or not whole):
            raise UsageError(
                f"{name} holds values of {str(tensor.dtype).removeprefix('torch.')}, but weights "
                f"are read as floats of 16, 32 or 64 bits. Convert it, or take the file from "
                f"before it was quantised."
            )


def is_weights_file(path: Path) -> bool:
    """Whether a file says in its header that dupr wrote it as a weights file."""
    try:
        with safe_open(path, framework="pt") as file:
            return _VERSION in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def read_weights(address: str, encoder: str = "query") -> Weights:
    """Backbone weights from a run directory, a checkpoint, a weights file, or `hf://OWNER/NAME`.

    encoder: whose backbone to take from a run or checkpoint; a weights file has only one.
    Raises UsageError when `address` holds no readable weights, RunError when the Hub refuses or
    cannot be reached.
    """
    path = fetch_weights(address) if address.startswith(HUB) else Path(address)
    if not path.exists():
        raise UsageError(
            f"{address}: the run directory, checkpoint or weights file does not exist "
            f"(the word `none` means random weights)."
        )
    if path.is_dir():
        if is_checkpoint(path):
            return _from_checkpoint(address, Checkpoint.read(path), encoder)
        return _from_checkpoint(address, newest_checkpoint(path), encoder)
    if path.name == MODEL_FILE and is_checkpoint(path.parent):
        return _from_checkpoint(address, Checkpoint.read(path.parent), encoder)
    if path.suffix != ".safetensors":
        raise UsageError(
            f"{address}: weights are read from .safetensors files only; pickled files "
            f"(.pth, .pt, .pkl) can run code when they are loaded."
        )
    tensors, header = read_safetensors(path)
    try:
        metadata = WeightsMetadata.from_header(header, address)
    except ValueError as error:
        raise UsageError(
            f"{address}: the header does not describe the weights ({error}). `dupr export` did not "
            f"write this file."
        ) from error
    if metadata.layout != layout_of(metadata.architecture):
        raise UsageError(
            f"{address}: the layout is {metadata.layout!r}, but the weights of a "
            f"{metadata.architecture} are read in the layout {layout_of(metadata.architecture)!r}."
        )
    own = {name: tensor for name, tensor in tensors.items() if name not in metadata.further}
    try:
        require_plain_values(own)
    except UsageError as error:
        raise UsageError(f"{address}: {error}") from error
    return Weights(address, metadata, own, sha256_file(path))


def _limits(values: Sequence[float] | None) -> tuple[float, float] | None:
    """Raises ParseError unless there are none, or two that can become 0 and 1."""
    if values is None:
        return None
    low, high = values
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ParseError(f"input_range is {[low, high]}, but two rising numbers are needed")
    return float(low), float(high)


def layout_of(architecture: str) -> str:
    """The library whose names the tensors of a backbone have: `timm` for timm:NAME."""
    library, separator, _ = architecture.partition(":")
    return library if separator else "torchvision"


def read_torchvision_weights(address: str, architecture: str) -> Weights:
    """Weights that torchvision publishes, without fc; fetched once into torch's cache.

    address: for example `torchvision:IMAGENET1K_V1`. Raises UsageError for a name that torchvision
    does not have for the architecture, RunError when the weights cannot be fetched.
    """
    import torchvision

    name = address.removeprefix(TORCHVISION)
    if layout_of(architecture) != "torchvision":
        raise UsageError(
            f"{address}: torchvision has no {architecture}. Compare its weights with those of "
            f"torchvision's networks only."
        )
    known = torchvision.models.get_model_weights(architecture)
    if name not in known.__members__:
        raise UsageError(
            f"{address}: torchvision has no such weights for {architecture}; it has "
            f"{', '.join(known.__members__)}."
        )
    published = known[name]
    try:
        tensors = published.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise RunError(
            f"{address}: {published.url} cannot be fetched ({error}). Fetch it by other means and "
            f"put it into {torch.hub.get_dir()}/checkpoints."
        ) from error
    backbone = {k: v for k, v in tensors.items() if not k.startswith("fc.")}
    transform = published.transforms()
    metadata = WeightsMetadata(
        layout="torchvision",
        architecture=architecture,
        input_mean=tuple(transform.mean),
        input_std=tuple(transform.std),
        input_size=int(transform.crop_size[0]),
        encoder=SUPERVISED,
    )
    digest = hashlib.sha256()
    for key in sorted(backbone):
        digest.update(key.encode() + backbone[key].numpy().tobytes())
    return Weights(address, metadata, backbone, digest.hexdigest())


def _from_checkpoint(address: str, checkpoint: Checkpoint, encoder: str) -> Weights:
    model = checkpoint.path / MODEL_FILE
    tensors, _ = read_safetensors(model)
    prefix = f"{encoder}.backbone."
    backbone = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    if not backbone:
        raise UsageError(f"{model} has no tensors named {prefix}*.")
    state = checkpoint.state
    try:
        require_plain_values(backbone)
        limits = _limits(state.input_range)
    except (ParseError, UsageError) as error:
        raise UsageError(f"{checkpoint.path}: {error}") from error
    metadata = WeightsMetadata(
        layout=layout_of(state.architecture),
        architecture=state.architecture,
        input_mean=tuple(state.input_mean),
        input_std=tuple(state.input_std),
        input_size=state.input_size,
        encoder=encoder,
        step=state.step,
        recipe_sha256=state.recipe_sha256,
        method=state.method,
        input_range=limits,
        channel_order="RGB" if state.input_range is None else STORED,
        dupr_version=state.dupr_version,
    )
    return Weights(address, metadata, backbone, sha256_file(model))
