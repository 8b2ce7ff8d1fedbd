"""What a killed process left beside an output is removed; what belongs to others stays."""

from __future__ import annotations

import os
from pathlib import Path

from dupr_cli.artifacts.files import remove_abandoned, temporary_name
from tests.support.processes import Forked


def test_only_temporaries_of_ended_processes_of_this_machine_are_removed(tmp_path: Path) -> None:
    target = tmp_path / "backbone.safetensors"
    mine = temporary_name(target)
    ended = Forked(lambda: None)
    ended.wait()
    own, gone = f"{os.getpid():07d}.tmp", f"{ended.pid:07d}.tmp"
    left = tmp_path / mine.name.replace(own, gone)
    of_another_machine = tmp_path / mine.name.replace(own, f"9{gone}")
    for path in (mine, left, of_another_machine, tmp_path / left.name.replace("backbone", "other")):
        path.write_bytes(b"x")
    remove_abandoned(target)
    assert not left.exists()
    assert len(list(tmp_path.iterdir())) == 3
