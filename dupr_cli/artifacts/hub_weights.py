"""Weights on the Hugging Face Hub: `hf://OWNER/NAME`, `hf://OWNER/NAME@REVISION/FILE`.

What is fetched stays in huggingface-hub's own cache. Endpoint, token and cache are its business:
HF_ENDPOINT, HF_TOKEN, HF_HOME.
"""

from __future__ import annotations

import re
from pathlib import Path

from dupr_cli.errors import RunError, UsageError

HUB = "hf://"
# As `dupr export` names the file that is for dupr and torchvision, among those of other layouts.
EXPORTED = "backbone.safetensors"
_ADDRESS = re.compile(
    r"hf://(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?(/(?P<file>.+))?"
)


def repository_of(address: str) -> str | None:
    """OWNER/NAME of an hf:// address; None for any other."""
    parts = _ADDRESS.fullmatch(address)
    return parts["repository"] if parts else None


def fetch_weights(address: str) -> Path:
    """The local copy of the weights file.

    Without FILE the only one of the repository, or the only backbone.safetensors.

    Raises UsageError for an address that is none or has no such weights, RunError when the Hub
    refuses or cannot be reached.
    """
    parts = _ADDRESS.fullmatch(address)
    if parts is None:
        raise UsageError(
            f"{address}: write it as hf://OWNER/NAME or hf://OWNER/NAME@REVISION/FILE."
        )
    repository, revision, file = parts["repository"], parts["revision"], parts["file"]
    # Half a second to import, needed for such an address only.
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        if file is None:
            file = _only_weights(HfApi().list_repo_files(repository, revision=revision), address)
        return Path(hf_hub_download(repository, file, revision=revision))
    except UsageError:
        raise
    except LocalEntryNotFoundError as error:
        raise RunError(f"{address}: the Hub cannot be reached ({error}).") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 404:
            raise UsageError(
                f"{address}: the Hub has no such repository, revision or file."
            ) from error
        hint = " Log in with `hf auth login`, or set HF_TOKEN." if status in (401, 403) else ""
        raise RunError(f"{address}: the Hub refused (HTTP {status}).{hint}") from error
    # The client raises its HTTP library's own errors, and which library that is varies by version.
    except Exception as error:
        raise RunError(f"{address}: the Hub cannot be reached ({error}).") from error


def _only_weights(listed: list[str], address: str) -> str:
    files = [name for name in listed if name.endswith(".safetensors")]
    exported = [name for name in files if name.rpartition("/")[2] == EXPORTED]
    if len(files) == 1 or len(exported) == 1:
        return (exported or files)[0]
    if not files:
        raise UsageError(f"{address}: the repository has no .safetensors file.")
    raise UsageError(
        f"{address}: the repository has {', '.join(files)}; name one, as {address}/{files[0]}."
    )
