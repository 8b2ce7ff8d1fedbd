"""`dupr export --check DETECTOR`: would the weights arrive in a detector, or are they in it?

DETECTOR is a configuration of transformers or the name of a torchvision detector, which is built
and loaded; or a folder or file with a detector's own weights, whose backbone is compared with these
by value.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dupr_cli.artifacts.weights import Weights
from dupr_cli.errors import UsageError
from dupr_cli.export.arrival import Arrival, check_module, check_tensors, load_into
from dupr_cli.export.checkpoint_files import flat_tensors, read_checkpoint

_CONFIG = "config.json"


def check_in(detector: str, weights: Weights) -> Arrival:
    """Raises UsageError for a detector that cannot be opened or has no place for the weights.

    Raises RunError when it holds other weights, or computes other features with these.
    """
    path = Path(detector)
    if path.is_dir() or path.suffix == ".json":
        return _in_transformers(path, weights)
    if path.suffix in (".safetensors", ".pth", ".pt", ".bin", ".ckpt"):
        state = dict(flat_tensors(read_checkpoint(path, detector)))
        return check_tensors(state, weights, detector)
    # Here, because torchvision also loads torch's compiler, which no dry run needs.
    import torchvision

    names = torchvision.models.list_models(module=torchvision.models.detection)
    if detector in names:
        model = torchvision.models.get_model(detector, weights=None, weights_backbone=None)
        return load_into(model, weights, name=detector)
    raise UsageError(
        f"--check {detector}: neither a folder or configuration of transformers, nor a "
        f".safetensors or .pth file, nor a detector of torchvision ({', '.join(names)})."
    )


def _in_transformers(path: Path, weights: Weights) -> Arrival:
    config = path / _CONFIG if path.is_dir() else path
    if not config.is_file():
        raise UsageError(f"--check {path}: there is no {config}.")
    holds_weights = path.is_dir() and any(path.glob("*.safetensors"))
    if path.is_dir() and not holds_weights and any(path.glob("*.bin")):
        raise UsageError(
            f"--check {path}: its weights are pickled (.bin), which can run code when they are "
            f"loaded. Save them with save_pretrained, or give {config} to check the network alone."
        )
    try:
        from transformers import AutoConfig, AutoModel, AutoModelForObjectDetection
    except ImportError as error:
        raise UsageError(
            f"--check {path} needs transformers; `pip install 'dupr-cli[transformers]'`."
        ) from error
    # Building from a file of the user's, transformers raises errors of any kind.
    try:
        settings: Any = AutoConfig.from_pretrained(config, local_files_only=True)
        kind: Any = AutoModelForObjectDetection
        if type(settings) not in kind._model_mapping:
            kind = AutoModel
        if not holds_weights:
            return load_into(kind.from_config(settings), weights, name=str(path))
        model = kind.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError, ImportError, RuntimeError) as error:
        raise UsageError(f"--check {path}: transformers cannot build it: {error}") from error
    return check_module(model, weights, str(path))
