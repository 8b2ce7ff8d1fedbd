"""What a run says about itself while it trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dupr_cli.pretrain.monitor import Monitor
from dupr_cli.pretrain.trackers import Trackers
from dupr_cli.recipe import PretrainRecipe
from dupr_cli.runtime.parallel import World
from tests.support.reporters import Listening

Load = Callable[..., PretrainRecipe]
NONE = Trackers((), Path(), {}, Listening())


def shares(same: float, opposite: float) -> dict[str, float]:
    """Retrieval at both levels; half of the pairs are of each case."""
    found: dict[str, float] = {}
    for level in ("res4", "res5"):
        found |= {
            f"retrieval/{level}": (same + opposite) / 2,
            f"retrieval_same_flip/{level}": same,
            f"retrieval_opposite_flip/{level}": opposite,
            f"retrieval_pool/{level}": 1024.0,
        }
    return found


@pytest.mark.parametrize(
    ("steps", "step", "last", "words"),
    [
        (2000, 600, (0.05, 0.02), "no better than the untrained"),
        (2000, 600, (0.30, 0.02), "a part of patch retrieval is no better"),
        (2000, 600, (0.30, 0.10), ""),
        (2000, 200, (0.05, 0.02), ""),  # too early to say
        (60, 60, (0.015, 0.005), "fallen below the untrained network's: res4 1.0% (untrained 3.5%"),
        (60, 60, (0.06, 0.03), ""),
        (60, 30, (0.015, 0.005), ""),  # the run has not ended
    ],
)
def test_advice_looks_at_each_case_of_flips(
    tiny_recipe: Load, tmp_path: Path, steps: int, step: int, last: tuple[float, float], words: str
) -> None:
    reporter, world = Listening(), World(torch.device("cpu"))
    recipe = tiny_recipe(f"train.steps={steps}")
    with Monitor(tmp_path, recipe, 1000, steps, 0, world, reporter, NONE) as monitor:
        monitor.probe(0, shares(0.05, 0.02))
        monitor.probe(step, shares(*last))
    warnings = [said for said in reporter.said if "untrained" in said]
    assert len(warnings) == bool(words), reporter.said
    assert all(words in said for said in warnings)
    assert any("res4 3.5% (same flip 5.0%, opposite flip 2.0%)" in said for said in reporter.said)


def test_status_begins_with_the_last_retrieval_also_after_a_continuation(
    tiny_recipe: Load, tmp_path: Path
) -> None:
    world = World(torch.device("cpu"))
    with Monitor(tmp_path, tiny_recipe(), 1000, 10, 0, world, Listening(), NONE) as monitor:
        monitor.probe(0, shares(0.05, 0.02))
        monitor.probe(5, shares(0.40, 0.30))
    with Monitor(tmp_path, tiny_recipe(), 1000, 10, 5, world, Listening(), NONE) as monitor:
        assert monitor.status == "retrieval res4 35% res5 35%"
