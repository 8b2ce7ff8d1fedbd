"""Pushing a weights file to the Hugging Face Hub, with a model card, in one commit."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError

from dupr_cli.artifacts.weights import Weights
from dupr_cli.errors import RunError, UsageError
from dupr_cli.progress import Reporter

_CARD = """---
{front_matter}
---

# {name}

Backbone weights of a {architecture}, pre-trained without labels by Deeply Unsupervised Patch
Re-Identification (DUPR) with dupr {dupr_version}: {encoder} encoder, step {step}.

## How to load it

```python
import torch
import torchvision
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file

path = hf_hub_download("{repository}", "{file}")
model = torchvision.models.{architecture}(weights=None)
model.fc = torch.nn.Identity()
model.load_state_dict(load_file(path), strict=True)
```

Input: {channel_order} images scaled to 0..1, mean {mean}, standard deviation {std};
pre-trained on views of {size} x {size} pixels.

## Limitations

The weights are meant to be fine-tuned, for example as the backbone of an object detector. They
carry whatever biases the unlabelled images have.

## Citation

Ding et al., "Deeply Unsupervised Patch Re-Identification for Pre-training Object Detectors", IEEE
TPAMI 46(3):1348-1361, 2024, DOI 10.1109/TPAMI.2022.3164911.
"""


def model_card(weights: Weights, repository: str, file: str) -> ModelCard:
    """The README.md that goes with the weights."""
    metadata = weights.metadata
    front_matter = ModelCardData(
        library_name="dupr",
        pipeline_tag="feature-extraction",
        tags=["dupr", "self-supervised", "object-detection", "backbone", metadata.architecture],
    )
    return ModelCard(
        _CARD.format(
            front_matter=front_matter.to_yaml(),
            name=repository.rpartition("/")[2],
            repository=repository,
            file=file,
            architecture=metadata.architecture,
            dupr_version=metadata.dupr_version,
            encoder=metadata.encoder,
            step=metadata.step,
            channel_order=metadata.channel_order,
            mean=list(metadata.input_mean),
            std=list(metadata.input_std),
            size=metadata.input_size,
        )
    )


def check_repository(repository: str) -> None:
    """Raises UsageError for what is not OWNER/NAME."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UsageError(f"--push-to-hub {repository}: write it as OWNER/NAME.")


def push(path: Path, weights: Weights, repository: str, reporter: Reporter) -> str:
    """Create the repository if need be and commit the file and its card; returns the commit's URL.

    The token is huggingface-hub's own business (HF_TOKEN or `hf auth login`).
    Raises RunError when the Hub refuses or cannot be reached; the local file stays.
    """
    api = HfApi(library_name="dupr", library_version=weights.metadata.dupr_version)
    card = model_card(weights, repository, path.name)
    try:
        api.create_repo(repository, exist_ok=True)
        commit = api.create_commit(
            repository,
            operations=[
                CommitOperationAdd(path.name, str(path)),
                CommitOperationAdd("README.md", str(card).encode()),
            ],
            commit_message=f"dupr: {weights.metadata.architecture}, step {weights.metadata.step}",
        )
    except HfHubHTTPError as error:
        status = error.response.status_code
        hint = (
            " Log in with `hf auth login`, or set HF_TOKEN to a token that may write."
            if status in (401, 403)
            else ""
        )
        raise RunError(
            f"the Hub refused the push to {repository} (HTTP {status}).{hint} "
            f"{path} is written; give the command again with --overwrite."
        ) from error
    # The client raises its HTTP library's own errors, and which library that is varies by version.
    except Exception as error:
        raise RunError(
            f"the push to {repository} failed: {error}. {path} is written; give the command again "
            f"with --overwrite."
        ) from error
    reporter.info(f"pushed to {commit.commit_url}")
    return str(commit.commit_url)
