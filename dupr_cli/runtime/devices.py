"""Chooses the device on which a stage computes."""

from __future__ import annotations

import torch

from dupr_cli.errors import UsageError


def choose_device(name: str) -> torch.device:
    """The device for --device; auto takes a GPU if torch can use one.

    Raises UsageError for a name that torch does not know or a device that does not exist.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name}: use auto, cpu, cuda or cuda:N.") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: use auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices that "
            f"torch can use; see `dupr doctor`."
        )
    return device
