"""The common part of backbones that other libraries build: levels by stride, the library's names.

The network of the library is a part of ours, and the state dict does not show it: the tensors have
the names that they have in the library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property
from typing import Any, cast

from torch import Tensor, nn

from dupr_cli.errors import UsageError
from dupr_cli.models.measured import measured_first_centres, unused_modules
from dupr_cli.recipe.base import LEVEL_STRIDES, LEVELS, Level

_NETWORK = "network."


class LibraryBackbone(nn.Module):
    """A network of a library; its maps of stride 4 to 32 are res2 to res5.

    Of several maps of one stride, the level is the last. Subclasses compute the maps, and may
    override `_recompute` and `own_names`.
    """

    def __init__(
        self,
        architecture: str,
        network: nn.Module,
        strides: Sequence[int],
        channels: Sequence[int],
        in_channels: int = 3,
    ) -> None:
        """strides, channels: of the maps that the network can return, in order. in_channels: of an
        image.

        Raises UsageError when none of them is a level.
        """
        super().__init__()
        self.architecture, self.in_channels = architecture, in_channels
        self.network: Any = network
        # The place of each level among the maps.
        self.places = level_places(architecture, strides)
        self.levels = tuple(self.places)
        self.channels: dict[Level, int] = {v: channels[at] for v, at in self.places.items()}
        self.strides: dict[Level, int] = {v: LEVEL_STRIDES[v] for v in self.levels}
        hooks = cast(Any, self)
        hooks.register_state_dict_post_hook(_without_prefix)
        hooks.register_load_state_dict_pre_hook(_with_prefix)

    @cached_property
    def first_centres(self) -> dict[Level, float]:
        """Measured when they are first asked for, once for each architecture in a process."""
        return _first_centres(cast(Any, type(self)), self.architecture)

    @property
    def recompute(self) -> bool:
        """Whether levels are recomputed in the backward pass; libraries do this by blocks."""
        return False

    @recompute.setter
    def recompute(self, wanted: bool) -> None:
        if wanted:
            try:
                self._recompute()
            except (AttributeError, AssertionError, NotImplementedError, ValueError) as error:
                raise UsageError(
                    f"train.activation_checkpointing: {self.architecture} lacks it"
                ) from error

    def _recompute(self) -> None:
        """Have the network recompute its blocks; any of the errors above if it cannot."""
        raise NotImplementedError

    def after(self, last: Level) -> list[nn.Module]:
        """The modules that need not be computed when `last` is the last level wanted."""
        return unused_modules(self, last)

    def own_names(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors as they are."""
        return dict(tensors)


def level_places(architecture: str, strides: Sequence[int]) -> dict[Level, int]:
    """The place of each level among maps of these strides. Raises UsageError when there is none."""
    last = {stride: place for place, stride in enumerate(strides)}
    places = {v: last[LEVEL_STRIDES[v]] for v in LEVELS if LEVEL_STRIDES[v] in last}
    if not places:
        raise UsageError(
            f"model.backbone: the maps of {architecture} have strides {list(strides)}; none of "
            f"{list(LEVEL_STRIDES.values())} is among them."
        )
    return places


def _without_prefix(
    module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Mapping[str, Any]
) -> None:
    inner = prefix + _NETWORK
    for name in [key for key in state if key.startswith(inner)]:
        state[prefix + name.removeprefix(inner)] = state.pop(name)


def _with_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    backbone = cast(LibraryBackbone, module)
    own = backbone.state_dict().keys()
    given = {k.removeprefix(prefix): k for k in state if k.startswith(prefix)}
    taken = {name: state.pop(key) for name, key in given.items()}
    for name, tensor in backbone.own_names(taken).items():
        state[prefix + (_NETWORK + name if name in own else name)] = tensor


@cache
def _first_centres(make: Callable[[str], nn.Module], architecture: str) -> dict[Level, float]:
    return measured_first_centres(lambda: make(architecture))
