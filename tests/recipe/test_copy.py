"""`dupr recipe copy` and `list`: a start for one's own recipe."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.command_line import dupr


def test_a_copy_keeps_comments_and_runs_as_its_source(tmp_path: Path) -> None:
    copy = tmp_path / "mine.yaml"
    dupr("recipe", "copy", "voc-tiny", copy)
    assert copy.read_text() == dupr("recipe", "show", "voc-tiny", "--source").stdout
    assert copy.read_text().startswith("#")
    shown = [dupr("recipe", "show", name, "--json").stdout for name in (copy, "voc-tiny")]
    assert json.loads(shown[0]) == json.loads(shown[1])


def test_a_copy_replaces_nothing(tmp_path: Path) -> None:
    there = tmp_path / "mine.yaml"
    there.write_text("mine")
    done = dupr("recipe", "copy", "voc-tiny", there, code=2)
    assert "exists" in done.stderr
    assert there.read_text() == "mine"
    assert "is a directory" in dupr("recipe", "copy", "voc-tiny", tmp_path, code=2).stderr
    assert "Did you mean voc-tiny?" in dupr("recipe", "copy", "voc-tin", "x", code=2).stderr


def test_the_recipes_of_one_stage() -> None:
    every = json.loads(dupr("recipe", "list", "--json").stdout)
    some = json.loads(dupr("recipe", "list", "study", "--json").stdout)
    assert some == [recipe for recipe in every if recipe["stage"] == "study"] != []
