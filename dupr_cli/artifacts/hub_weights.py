"""Weights on the Hugging Face Hub: `hf://OWNER/NAME`, `hf://OWNER/NAME@REVISION/FILE`.

What is fetched stays in huggingface-hub's own cache. Endpoint, token and cache are its business:
HF_ENDPOINT, HF_TOKEN, HF_HOME.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
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


class HubError(Exception):
    """What the Hub's client raised. status: of HTTP, None where the Hub was not reached."""

    def __init__(self, message: str, status: int | None) -> None:
        super().__init__(message)
        self.status = status

    @property
    def is_about_the_token(self) -> bool:
        return self.status in (401, 403)


@contextmanager
def asking_the_hub() -> Iterator[None]:
    """Raises HubError for whatever a call of huggingface_hub raises."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        yield
    except LocalEntryNotFoundError as error:  # an HTTP error by its class, but nothing answered
        raise HubError(str(error), None) from error
    except HfHubHTTPError as error:
        raise HubError(str(error), error.response.status_code) from error
    # The client raises its HTTP library's own errors, and which library that is varies by version.
    except Exception as error:
        raise HubError(str(error), None) from error


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

    try:
        if file is None:
            with asking_the_hub():
                listed = HfApi().list_repo_files(repository, revision=revision)
            file = _only_weights(listed, address)
        with asking_the_hub():
            return Path(hf_hub_download(repository, file, revision=revision))
    except HubError as error:
        if error.status == 404:
            raise UsageError(
                f"{address}: the Hub has no such repository, revision or file."
            ) from error
        if error.status is None:
            raise RunError(f"{address}: the Hub cannot be reached ({error}).") from error
        hint = " Log in with `hf auth login`, or set HF_TOKEN." if error.is_about_the_token else ""
        raise RunError(f"{address}: the Hub refused (HTTP {error.status}).{hint}") from error


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
