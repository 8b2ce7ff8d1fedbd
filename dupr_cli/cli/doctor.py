"""`dupr doctor`: reports what this machine offers, and gives advice."""

from __future__ import annotations

import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

import typer

from dupr_cli import __version__
from dupr_cli.cli.command import command

_LIBRARIES = (
    "torch",
    "torchvision",
    "pydantic",
    "webdataset",
    "safetensors",
    "huggingface-hub",
    "pillow",
    "numpy",
)


@dataclass(frozen=True)
class Diagnosis:
    """versions: of dupr, Python and libraries. machine: its hardware. advice: for using both."""

    versions: dict[str, str]
    machine: dict[str, str]
    advice: list[str]


def add_to(app: typer.Typer) -> None:
    command(app, "doctor", show)(doctor)


def doctor() -> Diagnosis:
    """Report versions and hardware of this machine, with advice. Paste it into a bug report."""
    # Here, because it takes as long as all of dupr's own part of `dupr --help`.
    import importlib.metadata

    import torch

    from dupr_cli.runtime.machine import cores, memory_bytes

    versions = {"dupr": __version__, "python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            versions[library] = "missing"
    free = shutil.disk_usage(Path.cwd()).free
    machine = {
        "system": platform.platform(),
        "cpu cores": str(cores()),
        "memory": f"{memory_bytes() / 2**30:.0f} GiB",
        "free disk here": f"{free / 1e9:.0f} GB",
    }
    advice = []
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(number)
            machine[f"cuda:{number}"] = f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB"
        advice.append("Pre-training runs on cuda:0 (--device chooses another).")
        if torch.cuda.is_bf16_supported():
            advice.append("bfloat16 is supported: --set train.precision=bfloat16.")
    else:
        machine["gpu"] = "none that torch can use"
        advice.append(
            "torch finds no GPU: use the recipes for a CPU (dupr-r18-cpu-smoke, voc-tiny); "
            "ImageNet-scale recipes would take months here."
        )
    if cores() > 2:
        advice.append(f"Use up to {cores()} loader processes: --workers {cores()}.")
    shared = Path("/dev/shm")
    if shared.is_dir() and shutil.disk_usage(shared).total < 2**30:
        advice.append(
            "/dev/shm has less than 1 GiB, so loader processes may fail (bus error). In a "
            "container, enlarge it (--shm-size) or use --workers 0."
        )
    return Diagnosis(versions, machine, advice)


def show(diagnosis: Diagnosis) -> None:
    from dupr_cli.cli.console import print_facts, print_text

    print_facts([*diagnosis.versions.items(), *diagnosis.machine.items()])
    print_text("\n".join(["", *diagnosis.advice]))
