"""Checkpoints of other programs: read without running anything in them.

Pickled files are read by torch's restricted unpickler, which builds tensors, arrays and plain
values, and runs nothing.
"""

from __future__ import annotations

import argparse
import datetime
import pickle
import re
import textwrap
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from operator import itemgetter
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import cast

import numpy as np
import torch
from torch import Tensor

from dupr_cli.artifacts.weights import read_safetensors
from dupr_cli.errors import UsageError

_Builder = Callable[..., object]
# Values that training scripts save beside the weights: their options, paths, dates, figures of
# numpy's. Building one of these runs no code from the file.
_VALUES = (
    argparse.Namespace, frozenset, slice, range, datetime.datetime, datetime.date,
    datetime.timedelta, np.dtype, np.ndarray,
    *(getattr(np.dtypes, name) for name in dir(np.dtypes) if name.endswith("DType")),
)  # fmt: skip
# Where a pickle finds further types: the place depends on the versions that wrote it.
_MOVED_VALUES: tuple[tuple[_Builder, str], ...] = (
    *(
        (PureWindowsPath if "Windows" in name else PurePosixPath, f"{module}.{name}")
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
    ),
    *(
        (cast(_Builder, value.__reduce__()[0]), f"numpy.{core}.multiarray.{n}")
        for core in ("core", "_core")
        for n, value in (("scalar", np.float64(0)), ("_reconstruct", np.zeros(0)))
    ),
)


def read_checkpoint(path: Path, address: str) -> object:
    """The content of a file. Raises UsageError if it is missing, damaged, or would run code."""
    if not path.is_file():
        raise UsageError(f"{address}: this file does not exist.")
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]
    if zipfile.is_zipfile(path):
        _require_plain_zip(path, address)
    try:
        with torch.serialization.safe_globals([*_VALUES, *_MOVED_VALUES]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Arbitrary bytes, as opposed to a pickle that the restricted unpickler cannot read.
        if "Unsupported operand" in str(error) and not path.read_bytes().startswith(pickle.PROTO):
            raise UsageError(_unreadable(address, "torch.save did not write this file")) from error
        raise UsageError(
            f"{address}: refused. This pickle holds more than tensors and plain values "
            f"({_refusal(str(error))}), and reading those could run code. Nothing was run. If "
            f"you trust the file, save only its tensors, best as .safetensors."
        ) from error
    # Arbitrary bytes can be steps that the unpickler begins, and then fails at with any error.
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise UsageError(_unreadable(address, reason)) from error


def _require_plain_zip(path: Path, address: str) -> None:
    """Raises UsageError unless a ZIP is as torch.save writes it: every name once, uncompressed.

    Readers disagree on which of two equal names counts, and a few compressed bytes may fill the
    memory.
    """
    try:
        with zipfile.ZipFile(path) as opened:
            members = opened.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise UsageError(_unreadable(address, str(error))) from error
    name, times = max(
        Counter(member.filename for member in members).items(), key=itemgetter(1), default=("", 0)
    )
    if times > 1:
        raise UsageError(f"{address}: refused. The file holds {name!r} {times} times.")
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise UsageError(
            f"{address}: refused. The file is compressed, which torch.save never does. Unpack it, "
            f"or save its tensors as .safetensors."
        )


def _unreadable(address: str, reason: str) -> str:
    return (
        f"{address}: cannot be read as a checkpoint ({reason}). It may be truncated, or have "
        f"another format; download it again."
    )


def _refusal(message: str) -> str:
    """The cause from the unpickler's long message."""
    found = re.search(r"GLOBAL ([\w.]+)|WeightsUnpickler error:\s+([^\n]+)", message)
    cause = str(found[1] or found[2]) if found else "not a checkpoint"
    return textwrap.shorten(cause, 120, placeholder=" ...")


def flat_tensors(content: object, place: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors by their path of keys, without the wrappers of torch and Lightning."""
    if isinstance(content, Tensor):
        yield place, content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            bare = key in ("state_dict", "model", "model_state_dict") and not place
            inner = "" if bare and not isinstance(value, Tensor) else f"{place}.{key}".lstrip(".")
            yield from flat_tensors(value, inner)
