"""The tutorial's notebook runs from top to bottom, and what it promises is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

NOTEBOOK = Path(__file__).parents[1] / "docs" / "tutorial.ipynb"
CELLS: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text())["cells"]


def test_the_notebook_stores_no_outputs() -> None:
    code = [cell for cell in CELLS if cell["cell_type"] == "code"]
    assert len(code) > 10
    for cell in code:
        assert cell["outputs"] == []
        assert cell["execution_count"] is None


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    # As in a kernel, the cells share one process and its names. They use no magics.
    for number, cell in enumerate(CELLS):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    work = tmp_path / "dupr-tutorial"
    assert {path.name for path in tmp_path.iterdir()} == {"dupr-tutorial"}
    assert names["prepared"].samples == {"train": 400}
    assert names["trained"].steps == 30
    for picture in ("sheet", "views", "curves", "matches", "features"):
        assert min(Image.open(work / f"{picture}.png").size) > 300
    assert len(names["careless"].unexpected_keys) == len(names["weights"])
    assert names["arrival"].place == "backbone.body."
    assert names["arrival"].max_difference < 1e-5
    assert [len(each.trials) for each in names["results"].results] == [2, 2]
    assert (work / "report.html").stat().st_size == names["page"].bytes
