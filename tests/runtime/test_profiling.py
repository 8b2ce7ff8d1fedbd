"""--profile through the real command line: what is written, and when nothing is."""

import gzip
import json
from pathlib import Path

from tests.support.command_line import pretrain
from tests.support.images import write_shards


def test_a_trace_names_the_phases_of_a_step(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", 24)
    out = tmp_path / "run"
    result = pretrain(shards, out, "--steps", 8, "--profile")
    with gzip.open(out / "profile" / "trace.json.gz", "rt") as file:
        trace = json.load(file)
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"query forward", "key forward", "backward", "optimizer", "data wait"} <= names
    assert "query forward" in (out / "profile" / "costs.txt").read_text()
    assert str(out / "profile") in result.stderr.replace("\n", "")


def test_a_run_that_is_too_short_says_so(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", 24)
    result = pretrain(shards, tmp_path / "run", "--steps", 2, "--profile")
    assert "--profile: nothing is written" in result.stderr
    assert not (tmp_path / "run" / "profile").exists()
