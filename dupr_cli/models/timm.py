"""timm's networks as backbones: state-dict names are timm's own, without the classifier."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any, Protocol, cast

from torch import Tensor

from dupr_cli.errors import UsageError
from dupr_cli.models.library import LibraryBackbone
from dupr_cli.recipe.base import LEVELS, TIMM, Level


class _FeatureInfo(Protocol):
    """timm's description of the maps that a network can return."""

    def reduction(self) -> list[int]: ...

    def channels(self) -> list[int]: ...


class TimmBackbone(LibraryBackbone):
    """A timm network that returns intermediate maps."""

    def __init__(self, architecture: str, in_channels: int = 3) -> None:
        """architecture: timm:NAME. Raises UsageError, see `make_backbone`."""
        getter, self.options = _feature_getter(architecture, in_channels)
        info = cast(_FeatureInfo, getter.feature_info)
        super().__init__(architecture, getter.model, info.reduction(), info.channels(), in_channels)
        # timm's own numbers of the levels' maps.
        self.out_indices = [int(getter.out_indices[place]) for place in self.places.values()]

    def _recompute(self) -> None:
        self.network.set_grad_checkpointing(True)

    def own_names(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of an earlier version of this class under the present names, which are timm's.

        Earlier names came from timm's lists of features, such as `network.stages_0.blocks...`.
        """
        earlier = {of: name for name in self.state_dict() for of in _earlier_names(name)}
        return {earlier.get(name, name): tensor for name, tensor in tensors.items()}

    def forward(
        self, images: Tensor, levels: Collection[Level] = LEVELS, last: Level = "res5"
    ) -> dict[Level, Tensor]:
        """As `ResNetBackbone.forward`."""
        wanted = [v for v in self.levels if v in levels and v <= last]
        maps = self.network.forward_intermediates(
            images,
            indices=[self.out_indices[self.levels.index(v)] for v in wanted],
            norm=False,
            stop_early=True,
            output_fmt="NCHW",
            intermediates_only=True,
        )
        return dict(zip(wanted, maps, strict=True))


def _feature_getter(architecture: str, in_channels: int) -> tuple[Any, dict[str, Any]]:
    """The network in timm's wrapper that returns maps, and the options for images of any size.

    What comes after the maps is cut off.
    """
    name = architecture.removeprefix(TIMM)
    try:
        import timm
    except ImportError as error:
        raise UsageError(
            f"model.backbone: {architecture} needs timm; `pip install 'dupr-cli[timm]'`."
        ) from error
    if not timm.is_model(name):
        similar = get_close_matches(name, timm.list_models())
        hint = f" Similar: {', '.join(similar)}." if similar else ""
        raise UsageError(f"model.backbone: timm {timm.__version__} has no {name}.{hint}")
    # A transformer takes images of any size only when it is told to.
    options: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {})
    for given in options:
        try:
            getter: Any = timm.create_model(
                name, pretrained=False, in_chans=in_channels, features_only=True,
                feature_cls="getter", **given,
            )  # fmt: skip
            return getter, given
        except TypeError as error:
            problem: Exception = error
        except (RuntimeError, AttributeError, AssertionError) as error:
            problem = error
            break
    raise UsageError(
        f"model.backbone: timm cannot return the maps of {name} (features_only): {problem}"
    ) from problem


def _earlier_names(name: str) -> list[str]:
    """`stages.0.weight` to `network.stages_0.weight` and the other forms of earlier versions."""
    return ["network." + form for form in (name, name.replace(".", "_", 1), f"model.{name}")]
