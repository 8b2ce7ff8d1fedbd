"""Pushing an exported folder to the Hugging Face Hub, in one commit."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi

from dupr_cli.addresses import public_address
from dupr_cli.artifacts.hub_weights import HubError, asking_the_hub
from dupr_cli.artifacts.weights import Weights
from dupr_cli.errors import RunError, UsageError
from dupr_cli.export.types import PushOptions
from dupr_cli.progress import Reporter


def check_options(options: PushOptions) -> None:
    """Raises UsageError for a name that is not OWNER/NAME, or a missing token variable."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", options.repository):
        raise UsageError(f"--push-to-hub {options.repository}: write it as OWNER/NAME.")
    if options.token_from and not os.environ.get(options.token_from):
        raise UsageError(
            f"--token-from-env {options.token_from}: this environment variable is not set."
        )


def push_files(
    folder: Path,
    files: Collection[str],
    weights: Weights,
    options: PushOptions,
    reporter: Reporter,
) -> str:
    """Create the repository if needed and commit files of the folder; returns the commit's URL.

    All files are in one commit, so that the repository is consistent at every moment; repeating
    the push changes nothing. The token comes from an environment variable, or huggingface-hub
    finds it (HF_TOKEN, `hf auth login`).
    Raises RunError when the Hub refuses or cannot be reached; the local files stay.
    """
    metadata = weights.metadata
    token = os.environ[options.token_from] if options.token_from else None
    api = HfApi(library_name="dupr", library_version=metadata.dupr_version, token=token)
    repository = options.repository
    again = f"{folder} is written; repeat the command with --overwrite."
    operations = [CommitOperationAdd(name, str(folder / name)) for name in sorted(files)]
    message = options.commit_message or f"dupr: {metadata.architecture}, {metadata.origin}"
    try:
        with asking_the_hub():
            api.create_repo(repository, private=options.private or None, exist_ok=True)
            if options.revision:
                api.create_branch(repository, branch=options.revision, exist_ok=True)
            commit = api.create_commit(
                repository, operations=operations, commit_message=message, revision=options.revision
            )
    except HubError as error:
        if error.status is None:
            raise RunError(f"the push to {repository} failed: {error}. {again}") from error
        hint = (
            " Log in with `hf auth login`, or set HF_TOKEN to a token with write access."
            if error.is_about_the_token
            else ""
        )
        raise RunError(
            f"the Hub refused the push to {repository} (HTTP {error.status}).{hint} {again}"
        ) from error
    url = public_address(str(commit.commit_url))
    reporter.info(f"pushed to {url}")
    return url
