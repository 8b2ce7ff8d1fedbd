"""timm's networks that can be cut into levels, as backbones."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache, cached_property
from typing import Protocol, cast

from torch import Tensor, nn

from dupr_cli.errors import UsageError
from dupr_cli.models.measured import measured_first_centres
from dupr_cli.recipe.base import LEVEL_STRIDES, LEVELS, TIMM, Level


class _FeatureInfo(Protocol):
    """timm's description of the maps of a network cut into levels."""

    def reduction(self) -> list[int]: ...

    def channels(self) -> list[int]: ...


class _Checkpointing(Protocol):
    def set_grad_checkpointing(self, enable: bool) -> None: ...


class TimmBackbone(nn.Module):
    """Any timm network with `features_only`, its maps of stride 4 to 32 as res2 to res5."""

    def __init__(self, architecture: str) -> None:
        """architecture: timm:NAME. Raises UsageError, see `make_backbone`."""
        super().__init__()
        self.architecture = architecture
        name = architecture.removeprefix(TIMM)
        try:
            import timm
        except ImportError as error:
            raise UsageError(
                f"model.backbone: {architecture} needs timm; `pip install 'dupr-cli[timm]'`."
            ) from error
        if not timm.is_model(name):
            similar = timm.list_models(f"*{name[:6]}*")[:3]
            hint = f" Similar: {', '.join(similar)}." if similar else ""
            raise UsageError(f"model.backbone: timm {timm.__version__} has no {name}.{hint}")
        try:
            network = timm.create_model(name, pretrained=False, features_only=True)
        except (RuntimeError, AttributeError, TypeError, AssertionError) as error:
            raise UsageError(
                f"model.backbone: timm cannot cut {name} into levels (features_only): {error}"
            ) from error
        info = cast(_FeatureInfo, network.feature_info)
        strides, channels = info.reduction(), info.channels()
        missing = [s for s in LEVEL_STRIDES.values() if s not in strides]
        if missing:
            raise UsageError(
                f"model.backbone: the levels of timm's {name} have strides {strides}; "
                f"{missing} are missing. Networks with strides 4, 8, 16 and 32 can be used."
            )
        self.network = network
        self._positions = {level: strides.index(LEVEL_STRIDES[level]) for level in LEVELS}
        self.channels: dict[Level, int] = {v: channels[self._positions[v]] for v in LEVELS}
        self.strides = dict(LEVEL_STRIDES)

    @cached_property
    def first_centres(self) -> dict[Level, float]:
        """Measured when they are first asked for, once for each architecture in a process."""
        return _first_centres(self.architecture)

    @property
    def recompute(self) -> bool:
        """Whether levels are recomputed in the backward pass; timm does this by blocks."""
        return False

    @recompute.setter
    def recompute(self, wanted: bool) -> None:
        if wanted:
            try:
                cast(_Checkpointing, self.network).set_grad_checkpointing(True)
            except (AttributeError, AssertionError, NotImplementedError) as error:
                raise UsageError(
                    f"train.activation_checkpointing: timm's {self.architecture} lacks it"
                ) from error

    def after(self, last: Level) -> list[nn.Module]:
        """An empty list, because timm computes every level."""
        return []

    def forward(
        self, images: Tensor, levels: Collection[Level] = LEVELS, last: Level = "res5"
    ) -> dict[Level, Tensor]:
        """As `ResNetBackbone.forward`, but every level is computed, wanted or not."""
        maps = self.network(images)
        return {level: maps[self._positions[level]] for level in LEVELS if level in levels}


@cache
def _first_centres(architecture: str) -> dict[Level, float]:
    return measured_first_centres(lambda: TimmBackbone(architecture))
