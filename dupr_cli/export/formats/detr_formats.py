"""d-fine and rt-detr: backbones for the repositories of those detectors, and for transformers.

A `.pth` of plain tensors has the names of the detector's own repository; config.json and
model.safetensors beside it are transformers', whose D-FINE and RT-DETR take the same backbones.
Source: D-FINE, src/nn/backbone/hgnetv2.py (DEIM and RT-DETRv4 share it); RT-DETR,
rtdetrv2_pytorch/src/nn/backbone/presnet.py; and their configurations.
"""

from __future__ import annotations

import io
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dupr_cli.artifacts.files import write_bytes
from dupr_cli.artifacts.weights import Weights
from dupr_cli.errors import RunError, UsageError
from dupr_cli.export.formats import Loaded
from dupr_cli.export.formats.safetensors_files import renamed_back
from dupr_cli.export.formats.transformers_format import (
    TransformersFormat,
    names_in,
    transformers_twin,
)
from dupr_cli.models.backbone import as_backbone, make_backbone
from dupr_cli.models.naming import names_elsewhere
from dupr_cli.recipe.base import TRANSFORMERS


class _DetrFormat(ABC):
    """transformers' files, and, if the repository has the network, a .pth in its names."""

    name: str
    top = False
    _class: str

    def write(self, weights: Weights, folder: Path, license_name: str) -> None:
        twin = transformers_twin(weights)
        if twin is None or not self._takes(twin):
            raise UsageError(
                f"--to {self.name}: {self._backbones}, but the weights are of a "
                f"{weights.metadata.architecture}."
            )
        TransformersFormat().write(weights, folder, license_name)
        if (file := self._file(weights)) is not None:
            names = names_in(self.name, weights)
            plain = {names[name]: tensor.contiguous() for name, tensor in weights.tensors.items()}
            buffer = io.BytesIO()
            torch.save(plain, buffer)
            write_bytes(folder / file, buffer.getvalue())

    def load(self, weights: Weights, folder: Path, images: Tensor) -> Loaded:
        loaded = TransformersFormat().load(weights, folder, images)
        if (file := self._file(weights)) is None:
            return loaded
        self._read(folder / file, weights)
        return Loaded(loaded.features, f"{loaded.by}, and the tensors of {file}")

    def tensors(self, weights: Weights, folder: Path) -> dict[str, Tensor]:
        if (file := self._file(weights)) is not None:
            return self._read(folder / file, weights)
        return TransformersFormat().tensors(weights, folder)

    def usage(self, weights: Weights, place: str) -> Sequence[tuple[str, str]]:
        backbone = as_backbone(make_backbone(weights.metadata.architecture))
        channels = [backbone.channels[level] for level in backbone.levels[-3:]]
        blocks = []
        if (file := self._file(weights)) is not None:
            blocks.append(("yaml", self._configuration(weights, place, file, channels)))
        (first, *_), detector = TransformersFormat().usage(weights, place), self._class
        used = first[1].partition("backbone = ")[2].partition(".from")[0]
        config = f"{detector.removesuffix('ForObjectDetection')}Config"
        blocks.append(
            (
                "python",
                f"""from transformers import {config}, {detector}, {used}

backbone = {used}.from_pretrained("{place or "."}", out_indices=[2, 3, 4])
config = {config}(
    backbone_config=backbone.config,
    encoder_in_channels={channels},
    freeze_backbone_batch_norms=False,  # by default norms keep the statistics of pre-training
)
detector = {detector}(config)  # random: a configuration holds no weights
detector.model.backbone.model.load_state_dict(backbone.state_dict())  # all of it, or an error""",
            )
        )
        return blocks

    def _read(self, file: Path, weights: Weights) -> dict[str, Tensor]:
        """Raises RunError unless the file holds exactly these tensors."""
        found = torch.load(file, map_location="cpu", weights_only=True)
        tensors = renamed_back(weights, found, names_in(self.name, weights).__getitem__)
        for name, tensor in weights.tensors.items():
            if not torch.equal(tensors[name], tensor):
                raise RunError(f"{weights.address}: {name} changed when read back from {file.name}")
        return tensors

    _backbones: str

    @abstractmethod
    def _takes(self, twin: str) -> bool: ...

    @abstractmethod
    def _file(self, weights: Weights) -> str | None: ...

    @abstractmethod
    def _configuration(
        self, weights: Weights, place: str, file: str, channels: list[int]
    ) -> str: ...


class DFineFormat(_DetrFormat):
    name = "d-fine"
    _class = "DFineForObjectDetection"
    _backbones = (
        "D-FINE has HGNetV2 as its backbone (timm:hgnetv2_b0 or transformers:hgnetv2_b0, b2, b4)"
    )

    def _takes(self, twin: str) -> bool:
        return re.fullmatch(r"hgnetv2_b[0-6]", twin.removeprefix(TRANSFORMERS)) is not None

    def _file(self, weights: Weights) -> str:
        size = weights.metadata.architecture.partition("hgnetv2_")[2][:2].upper()
        return f"PPHGNetV2_{size}_stage1.pth"

    def _configuration(self, weights: Weights, place: str, file: str, channels: list[int]) -> str:
        affine = any(".lab." in name for name in weights.tensors)
        return f"""# In the configuration of D-FINE, DEIM or RT-DETRv4
HGNetv2:
  name: '{file.split("_")[1]}'
  use_lab: {affine}
  pretrained: True
  local_model_dir: {place or "./"}
  return_idx: [1, 2, 3]
  freeze_at: -1       # by default the stem is frozen
  freeze_norm: False  # by default norms keep the statistics of pre-training
HybridEncoder:
  in_channels: {channels}"""


class RtDetrFormat(_DetrFormat):
    name = "rt-detr"
    _class = "RTDetrV2ForObjectDetection"
    _backbones = (
        "RT-DETR has ResNets and ResNet-D as backbones (resnet18 to resnet101, "
        "transformers:rt_detr_resnet18 to 101, timm:resnet50d, timm:resnet101d)"
    )

    def _takes(self, twin: str) -> bool:
        return re.fullmatch(r"(rt_detr_)?resnet\d+", twin.removeprefix(TRANSFORMERS)) is not None

    def _file(self, weights: Weights) -> str | None:
        """None for networks that `PResNet` does not build: plain ones of basic blocks."""
        if self.name not in names_elsewhere(weights.metadata.architecture, weights.tensors):
            return None
        return f"PResNet{_depth(weights)}_{_variant(weights)}.pth"

    def _configuration(self, weights: Weights, place: str, file: str, channels: list[int]) -> str:
        return f"""# In the configuration of RT-DETR (rtdetrv2_pytorch)
PResNet:
  depth: {_depth(weights)}
  variant: {_variant(weights)}
  pretrained: {place}{file}
  return_idx: [1, 2, 3]
  freeze_at: -1
  freeze_norm: False  # by default norms keep the statistics of pre-training
HybridEncoder:
  in_channels: {channels}"""


def _depth(weights: Weights) -> int:
    depth = re.search(r"resnet(\d+)", weights.metadata.architecture)
    assert depth is not None  # the architecture was looked at before
    return int(depth[1])


def _variant(weights: Weights) -> str:
    """d: a stem of three convolutions, and pooling before projections; b: as in torchvision."""
    return "b" if weights.metadata.layout == "torchvision" else "d"
