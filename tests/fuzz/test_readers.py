"""Damaged files: whatever is in them, a reader succeeds or gives one message."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from dupr_cli.errors import DuprError
from tests.support.fuzzing import READERS, probe

# Seconds for each reader, for `make fuzz`; without it, a few examples that are always the same.
_SECONDS = float(os.environ.get("DUPR_FUZZ_SECONDS", 0))


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_ends_in_success_or_one_message(name: str) -> None:
    probe(name, examples=12, number=1)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("yolo-list", b"/"),
        (
            "scored-coco",
            b'{"images": [{"id": 1, "file_name": "a.jpg", "width": 48, "height": 40}],'
            b' "categories": [{"id": 3, "name": "cat"}], "annotations": [{"id": [], "image_id": 1,'
            b' "category_id": 3, "bbox": [1, 2, 10, 10], "area": 100, "iscrowd": 0}]}',
        ),
    ],
)
def test_what_was_found_stays_mended(name: str, data: bytes, tmp_path: Path) -> None:
    reader = READERS[name]
    for file, content in reader.files().items():
        (tmp_path / file).write_bytes(data if file == reader.damaged else content)
    with suppress(DuprError):
        reader.read(tmp_path)


@pytest.mark.skipif(not _SECONDS, reason="takes as long as DUPR_FUZZ_SECONDS says (make fuzz)")
@pytest.mark.parametrize("name", READERS)
def test_new_damage_stays_within_time_and_memory(name: str) -> None:
    command = [sys.executable, "-m", "tests.support.fuzzing", name, str(_SECONDS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-8000:]
