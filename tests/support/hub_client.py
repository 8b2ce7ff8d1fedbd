"""Settings of huggingface_hub's client."""

from __future__ import annotations

import pytest
from huggingface_hub.utils import _http


def wait_briefly(patch: pytest.MonkeyPatch) -> None:
    """The client repeats what failed as often as ever, but without 23 seconds of waiting."""
    defaults = _http.http_backoff.__kwdefaults__
    assert defaults is not None
    assert defaults["base_wait_time"] == 1
    patch.setitem(defaults, "base_wait_time", 0.01)
