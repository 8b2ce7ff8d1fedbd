"""The names of a backbone's tensors in other libraries that have the same network.

Exports are written with them, and `load_into` finds a backbone within a detector by them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable

from dupr_cli.models.transformers import configuration

_BLOCK = re.compile(r"layer(\d)\.(\d+)\.(.+)")
_NORM = re.compile(r"bn(\d)\.(.+)")
_PART = re.compile(r"(conv|bn)(\d)\.(.+)")
# Children of torchvision's ResNet, by the order in which nn.Sequential numbers them.
SEQUENTIAL = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
_KINDS = {"conv": "convolution", "bn": "normalization"}


def block_count(names: Iterable[str], stage: int) -> int:
    """Residual blocks of layer1 to layer4 among the names of a ResNet's tensors."""
    return sum(
        re.fullmatch(rf"layer{stage}\.\d+\.conv1\.weight", name) is not None for name in names
    )


def detectron2_backbone_name(name: str) -> str:
    """`layer3.0.bn1.weight` to `res4.0.conv1.norm.weight`, `conv1.weight` to `stem.conv1.weight`.

    Source: detectron2, modeling/backbone/resnet.py: norms belong to their convolutions, a block's
    projection is its shortcut, and stages count from res2.
    """
    block = _BLOCK.fullmatch(name)
    if block is None:
        return "stem." + _norms_renamed(name)
    stage, number, rest = int(block[1]) + 1, block[2], block[3]
    rest = rest.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
    return f"res{stage}.{number}." + _norms_renamed(rest)


def _norms_renamed(name: str) -> str:
    return _NORM.sub(r"conv\1.norm.\2", name)


def transformers_name(name: str) -> str:
    """`layer1.0.conv2.weight` to `encoder.stages.0.layers.0.layer.1.convolution.weight`.

    Source: transformers, models/resnet/modeling_resnet.py.
    """
    block = _BLOCK.fullmatch(name)
    if block is None:
        return re.sub(_PART, lambda part: f"embedder.embedder.{_KINDS[part[1]]}.{part[3]}", name)
    stage = f"encoder.stages.{int(block[1]) - 1}.layers.{block[2]}"
    rest = block[3].replace("downsample.0.", "shortcut.convolution.")
    rest = rest.replace("downsample.1.", "shortcut.normalization.")
    return f"{stage}." + _PART.sub(
        lambda part: f"layer.{int(part[2]) - 1}.{_KINDS[part[1]]}.{part[3]}", rest
    )


def hgnet_name(name: str) -> str:
    """timm's `stages.0.blocks.0.layers.0.conv.weight` to transformers' `encoder.stages...`.

    D-FINE's own repository has timm's names.
    Source: transformers, models/hgnet_v2/modeling_hgnet_v2.py; timm, models/hgnet.py.
    """
    name = re.sub(r"^stem\.", "embedder.", re.sub(r"^stages\.", "encoder.stages.", name))
    return re.sub(r"\bbn\.", "normalization.", re.sub(r"\bconv\.", "convolution.", name))


def rt_detr_name(name: str) -> str:
    """Names of timm's bottleneck ResNet-D to those of transformers' RT-DETR ResNet.

    Source: transformers, models/rt_detr/modeling_rt_detr_resnet.py; timm, models/resnet.py.
    """
    if (stem := re.fullmatch(r"conv1\.(\d)\.(.+)", name)) is not None:
        kind = "normalization" if stem[1] in "14" else "convolution"
        return f"embedder.embedder.{int(stem[1]) // 3}.{kind}.{stem[2]}"
    if name.startswith("bn1."):
        return f"embedder.embedder.2.normalization.{name.removeprefix('bn1.')}"
    # Behind an average pooling, which the first stage has no need of.
    place = "shortcut." if name.startswith("layer1.") else "shortcut.1."
    renamed = transformers_name(
        name.replace("downsample.1.", "downsample.0.").replace("downsample.2.", "downsample.1.")
        if "downsample" in name
        else name
    )
    return renamed.replace("shortcut.", place)


def presnet_name(name: str) -> str:
    """Names of transformers' RT-DETR ResNet to those of `PResNet` in RT-DETR's own repository.

    Source: RT-DETR, rtdetrv2_pytorch/src/nn/backbone/presnet.py.
    """
    name = re.sub(r"^embedder\.embedder\.(\d)", lambda m: f"conv1.conv1_{int(m[1]) + 1}", name)
    name = re.sub(r"^encoder\.stages\.(\d)\.layers\.", r"res_layers.\1.blocks.", name)
    name = re.sub(r"\blayer\.(\d)\.", lambda m: f"branch2{'abc'[int(m[1])]}.", name)
    name = name.replace("shortcut.1.", "short.conv.").replace("shortcut.", "short.")
    return name.replace("convolution.", "conv.").replace("normalization.", "norm.")


def plain_presnet_name(name: str) -> str:
    """Names of torchvision's bottleneck ResNet to those of `PResNet`, variant b."""
    name = transformers_name(name).replace("embedder.embedder.", "embedder.embedder.0.")
    return presnet_name(name)


def torchvision_name(name: str) -> str:
    """The inverse of `transformers_name`."""
    stage = re.sub(
        r"^encoder\.stages\.(\d)\.layers\.", lambda m: f"layer{int(m[1]) + 1}.", name
    ).replace("embedder.embedder.", "layer.0.")
    stage = stage.replace("shortcut.convolution.", "downsample.0.")
    stage = stage.replace("shortcut.normalization.", "downsample.1.")
    return re.sub(
        r"\blayer\.(\d)\.(convolution|normalization)\.",
        lambda m: f"{'conv' if m[2] == 'convolution' else 'bn'}{int(m[1]) + 1}.",
        stage,
    )


def timm_hgnet_name(name: str) -> str:
    """The inverse of `hgnet_name`."""
    name = re.sub(r"^embedder\.", "stem.", re.sub(r"^encoder\.stages\.", "stages.", name))
    return re.sub(r"\bnormalization\.", "bn.", re.sub(r"\bconvolution\.", "conv.", name))


def sequential_name(name: str) -> str:
    """Names of torchvision's ResNet in an nn.Sequential of its children, as lightly has it.

    ultralytics' `TorchVision` layer holds one, too.
    """
    first, _, rest = name.partition(".")
    return f"{SEQUENTIAL[first]}.{rest}"


def names_elsewhere(architecture: str, names: Collection[str]) -> dict[str, dict[str, str]]:
    """The names of a backbone's tensors in other libraries, by library.

    names: those of the backbone's state dict. A library appears where it has a network of the same
    tensors; each value maps our names to the library's.
    """
    family, separator, network = architecture.partition(":")
    if not separator:
        family, network = "", architecture
    found = dict(_renamings(family, network, names))
    if family == "timm":
        found["timm, list of features"] = _of_features_only
    renamed = {library: {name: of(name) for name in names} for library, of in found.items()}
    return {family or "torchvision": {name: name for name in names}, **renamed}


def _renamings(
    family: str, network: str, names: Collection[str]
) -> dict[str, Callable[[str], str]]:
    if family == "transformers":
        model_type = configuration(f"{family}:{network}")["model_type"]
        return _OF_TRANSFORMERS.get(model_type, {})
    if family == "timm":
        if network.startswith("hgnetv2_"):
            return {"transformers": hgnet_name, "d-fine": _same}
        if re.fullmatch(r"resnet(50|101)d(\..+)?", network):
            return {"transformers": rt_detr_name, "rt-detr": _presnet_of_timm}
        return {}
    if family:
        return {}
    of: dict[str, Callable[[str], str]] = {
        "timm": _same,
        "transformers": transformers_name,
        "detectron2": detectron2_backbone_name,
        "sequential": sequential_name,
    }
    # RT-DETR's basic blocks have a projection that torchvision's first stage lacks.
    bottlenecks = any(name.endswith(".conv3.weight") for name in names)
    return {**of, "rt-detr": plain_presnet_name} if bottlenecks else of


def _of_features_only(name: str) -> str:
    """`stages.0.blocks...` as `timm.create_model(..., features_only=True)` has it by default."""
    return name.replace(".", "_", 1)


def _same(name: str) -> str:
    return name


def _presnet_of_timm(name: str) -> str:
    return presnet_name(rt_detr_name(name))


_OF_TRANSFORMERS: dict[str, dict[str, Callable[[str], str]]] = {
    "resnet": {"torchvision": torchvision_name},
    "rt_detr_resnet": {"rt-detr": presnet_name},
    "hgnet_v2": {"timm": timm_hgnet_name, "d-fine": timm_hgnet_name},
}
