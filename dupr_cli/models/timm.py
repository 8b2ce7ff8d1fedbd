"""timm's networks as backbones: state-dict names are timm's own, without the classifier."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from functools import cache, cached_property
from typing import Any, Protocol, cast

from torch import Tensor, nn

from dupr_cli.errors import UsageError
from dupr_cli.models.measured import measured_first_centres, unused_modules
from dupr_cli.recipe.base import LEVEL_STRIDES, LEVELS, TIMM, Level

_NETWORK = "network."


class _FeatureInfo(Protocol):
    """timm's description of the maps that a network can return."""

    def reduction(self) -> list[int]: ...

    def channels(self) -> list[int]: ...


class TimmBackbone(nn.Module):
    """A timm network that returns intermediate maps; its maps of stride 4 to 32 are res2 to res5.

    Of several maps of one stride, the level is the last.
    """

    def __init__(self, architecture: str) -> None:
        """architecture: timm:NAME. Raises UsageError, see `make_backbone`."""
        super().__init__()
        self.architecture = architecture
        getter, self.options = _feature_getter(architecture)
        info = cast(_FeatureInfo, getter.feature_info)
        strides, channels = info.reduction(), info.channels()
        last = {stride: place for place, stride in enumerate(strides)}
        self.levels = tuple(v for v in LEVELS if LEVEL_STRIDES[v] in last)
        if not self.levels:
            raise UsageError(
                f"model.backbone: the maps of {architecture} have strides {strides}; none of "
                f"{list(LEVEL_STRIDES.values())} is among them."
            )
        self.network: Any = getter.model
        places = {v: last[LEVEL_STRIDES[v]] for v in self.levels}
        # timm's own numbers of the levels' maps.
        self.out_indices = [int(getter.out_indices[place]) for place in places.values()]
        self.channels: dict[Level, int] = {v: channels[place] for v, place in places.items()}
        self.strides: dict[Level, int] = {v: LEVEL_STRIDES[v] for v in self.levels}
        hooks = cast(Any, self)
        hooks.register_state_dict_post_hook(_without_prefix)
        hooks.register_load_state_dict_pre_hook(_with_prefix)

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
                self.network.set_grad_checkpointing(True)
            except (AttributeError, AssertionError, NotImplementedError) as error:
                raise UsageError(
                    f"train.activation_checkpointing: timm's {self.architecture} lacks it"
                ) from error

    def after(self, last: Level) -> list[nn.Module]:
        """The modules that need not be computed when `last` is the last level wanted."""
        return unused_modules(self, last)

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


def _feature_getter(architecture: str) -> tuple[Any, dict[str, Any]]:
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
                name, pretrained=False, features_only=True, feature_cls="getter", **given
            )
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
    return [_NETWORK + form for form in (name, name.replace(".", "_", 1), f"model.{name}")]


def _without_prefix(
    module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Mapping[str, Any]
) -> None:
    inner = prefix + _NETWORK
    for name in [key for key in state if key.startswith(inner)]:
        state[prefix + name.removeprefix(inner)] = state.pop(name)


def _with_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    backbone = cast(TimmBackbone, module)
    own = backbone.state_dict().keys()
    given = {k.removeprefix(prefix): k for k in state if k.startswith(prefix)}
    taken = {name: state.pop(key) for name, key in given.items()}
    for name, tensor in backbone.own_names(taken).items():
        state[prefix + (_NETWORK + name if name in own else name)] = tensor


@cache
def _first_centres(architecture: str) -> dict[Level, float]:
    return measured_first_centres(lambda: TimmBackbone(architecture))
