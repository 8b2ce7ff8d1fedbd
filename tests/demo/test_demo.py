"""The demo's directory: its own is continued or replaced, any other is left alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from dupr_cli import demo
from dupr_cli.errors import UsageError
from dupr_cli.recipe import EvaluateRecipe, PretrainRecipe, load_recipe


def test_foreign_directory_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="not empty and holds no demo"):
            demo.run(tmp_path, overwrite=overwrite)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_demo_of_another_seed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    demo._claim(tmp_path / "d", 0, overwrite=False)
    (tmp_path / "d" / "images").mkdir()
    (tmp_path / "d" / "images" / "scene-000000.jpg").touch()
    demo._claim(tmp_path / "d", 0, overwrite=False)
    with pytest.raises(UsageError, match="it holds a demo with seed 0"):
        demo._claim(tmp_path / "d", 1, overwrite=False)
    assert (tmp_path / "d" / "images").is_dir()
    (tmp_path / "d" / "notes").write_text("kept")
    (tmp_path / "d" / "run").mkdir()
    (tmp_path / "d" / "run" / "mine").write_text("kept")
    demo._claim(tmp_path / "d", 1, overwrite=True)
    assert not (tmp_path / "d" / "images").exists()
    assert (tmp_path / "d" / "notes").exists()
    assert (tmp_path / "d" / "run" / "mine").exists()


def test_description_names_the_recipes_it_will_use(tmp_path: Path) -> None:
    text = demo.describe(tmp_path)
    load_recipe(PretrainRecipe, demo.PRETRAIN_RECIPE)
    load_recipe(EvaluateRecipe, demo.EVALUATE_RECIPE)
    assert demo.PRETRAIN_RECIPE in text
    assert demo.EVALUATE_RECIPE in text
