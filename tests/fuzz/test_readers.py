"""Damaged files: whatever is in them, a reader succeeds or gives one message."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.fuzzing import READERS, probe

# Seconds for each reader, for `make fuzz`; without it, a few examples that are always the same.
_SECONDS = float(os.environ.get("DUPR_FUZZ_SECONDS", 0))


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_ends_in_success_or_one_message(name: str) -> None:
    probe(name, examples=12, number=1)


@pytest.mark.skipif(not _SECONDS, reason="takes as long as DUPR_FUZZ_SECONDS says (make fuzz)")
@pytest.mark.parametrize("name", READERS)
def test_new_damage_stays_within_time_and_memory(name: str) -> None:
    command = [sys.executable, "-m", "tests.support.fuzzing", name, str(_SECONDS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-8000:]
