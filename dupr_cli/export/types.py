"""The options, the plan and the result of an export."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PushOptions:
    """The destination on the Hugging Face Hub. token_from: the token's environment variable."""

    repository: str
    private: bool = False
    revision: str | None = None
    commit_message: str | None = None
    token_from: str | None = None


@dataclass(frozen=True)
class ExportPlan:
    """What an export will do, before it does it."""

    weights: str
    architecture: str
    step: int
    formats: list[str]
    encoder: str
    dtype: str
    out: str
    push_to_hub: str | None


@dataclass(frozen=True)
class ExportedFormat:
    """files: sha256 by name. max_difference: of features from dupr's own, see `verification`.

    verified_by: the library that loaded the files. usage: pairs of a language and a block of code.
    """

    name: str
    files: dict[str, str]
    bytes: int
    max_difference: float
    verified_by: str
    features_compared: bool
    usage: list[tuple[str, str]]


@dataclass(frozen=True)
class ExportResult:
    """The written files. path: the file, or the folder of several. origin: encoder and step."""

    path: str
    weights: str
    architecture: str
    encoder: str
    step: int
    origin: str
    dtype: str
    tensors: int
    formats: list[ExportedFormat]
    hub_url: str | None = None
