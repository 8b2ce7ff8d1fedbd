"""Weights on the Hugging Face Hub: `hf://OWNER/NAME`, `hf://OWNER/NAME@REVISION/FILE`.

Fetched files stay in huggingface-hub's own cache. The library itself reads endpoint, token and
cache folder from HF_ENDPOINT, HF_TOKEN and HF_HOME.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dupr_cli.addresses import without_secrets
from dupr_cli.errors import RunError, UsageError

HUB = "hf://"
# Of an owner, a repository or a revision: it starts no path of its own, such as `..`.
HUB_NAME = r"\w[\w.-]*"
# The name that `dupr export` gives the file for dupr and torchvision, among those of other layouts.
EXPORTED = "backbone.safetensors"
_ADDRESS = re.compile(
    rf"hf://(?P<repository>{HUB_NAME}/{HUB_NAME})(@(?P<revision>{HUB_NAME}))?(/(?P<file>.+))?"
)


def repository_of(address: str) -> str | None:
    """OWNER/NAME of an hf:// address; None for any other."""
    parts = _ADDRESS.fullmatch(address)
    return parts["repository"] if parts else None


class HubError(Exception):
    """An error of the Hub's client. status: of HTTP, None if the Hub was not reached."""

    def __init__(self, message: str, status: int | None) -> None:
        super().__init__(message)
        self.status = status

    @property
    def is_about_the_token(self) -> bool:
        return self.status in (401, 403)


@contextmanager
def asking_the_hub() -> Iterator[None]:
    """Turn any error of a huggingface_hub call into a HubError."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        yield
    except LocalEntryNotFoundError as error:  # its class is an HTTP error, but no server answered
        raise HubError(without_secrets(str(error)), None) from error
    except HfHubHTTPError as error:
        raise HubError(without_secrets(str(error)), error.response.status_code) from error
    # The client raises errors of its HTTP library, which differs between its versions.
    except Exception as error:
        raise HubError(without_secrets(str(error)), None) from error


def fetch_weights(address: str) -> Path:
    """Fetch a weights file and return the path of the local copy.

    Without FILE in the address, the only .safetensors file of the repository is taken, or the only
    backbone.safetensors.

    Raises UsageError for a malformed address or missing weights, RunError when the Hub refuses or
    cannot be reached.
    """
    parts = _ADDRESS.fullmatch(address)
    if parts is None or ".." in (parts["file"] or "").split("/"):
        raise UsageError(
            f"{address}: write it as hf://OWNER/NAME or hf://OWNER/NAME@REVISION/FILE."
        )
    repository, revision, file = parts["repository"], parts["revision"], parts["file"]
    # Importing it takes half a second, and only these addresses need it.
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
                f"{address}: the repository, revision or file does not exist on the Hub."
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
        f"{address}: the repository has {', '.join(files)}; name one, such as {address}/{files[0]}."
    )
