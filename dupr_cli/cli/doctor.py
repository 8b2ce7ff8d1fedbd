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

# What each extra of the package brings, and what for.
EXTRAS = {
    "timm": (("timm",), "timm's backbones, in every stage"),
    "transformers": (("transformers",), "transformers' backbones; RT-DETR and D-FINE detectors"),
    "onnx": (("onnx", "onnxscript", "onnxruntime"), "dupr export --to onnx"),
    "hf": (("datasets", "pyarrow"), "hf:// data sets; lists as Parquet"),
    "tiff": (("tifffile", "imagecodecs"), "TIFF images of many channels"),
    "probes": (("scikit-learn",), "dupr evaluate voc07-cls"),
    "trackio": (("trackio",), "dupr pretrain --track trackio"),
    "wandb": (("wandb",), "dupr pretrain --track wandb"),
    "mlflow": (("mlflow-skinny",), "dupr pretrain --track mlflow"),
    "ray": (("ray",), "--engine ray of prepare and study"),
}


@dataclass(frozen=True)
class Diagnosis:
    """versions: of dupr, Python and libraries. machine: its hardware. extras: what each enables and
    whether it is installed. advice: for using them."""

    versions: dict[str, str]
    machine: dict[str, str]
    extras: dict[str, str]
    advice: list[str]


def add_to(app: typer.Typer) -> None:
    command(app, "doctor", show)(doctor)


def doctor() -> Diagnosis:
    """Report versions and hardware of this machine, with advice. Paste it into a bug report.

    [bold]Example[/]

      dupr doctor
    """
    import torch

    from dupr_cli.runtime.machine import cores, memory_bytes

    versions = {"dupr": __version__, "python": platform.python_version()}
    installed = {name: _version(name) for name in _LIBRARIES}
    versions |= {name: version or "missing" for name, version in installed.items()}
    extras = {}
    for extra, (libraries, purpose) in EXTRAS.items():
        found = all(_version(name) is not None for name in libraries)
        state = "installed" if found else f"missing; pip install 'dupr-cli[{extra}]'"
        extras[extra] = f"{purpose}: {state}"
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
    return Diagnosis(versions, machine, extras, advice)


def _version(library: str) -> str | None:
    # Here, because it takes as long as all of dupr's own part of `dupr --help`.
    import importlib.metadata

    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def show(diagnosis: Diagnosis) -> None:
    from dupr_cli.cli.console import print_facts, print_sentences, print_table, print_text

    print_facts([*diagnosis.versions.items(), *diagnosis.machine.items()])
    print_text("")
    missing = [name for name, state in diagnosis.extras.items() if not state.endswith("installed")]
    print_table(
        ("extra", "state", "for"),
        [
            (name, "missing" if name in missing else "installed", purpose)
            for name, (_, purpose) in EXTRAS.items()
        ],
    )
    print_text("")
    if missing:
        print_sentences(f"Install an extra by its name: pip install 'dupr-cli[{missing[0]}]'.")
    for advice in diagnosis.advice:
        print_sentences(advice)
