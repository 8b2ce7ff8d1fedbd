"""Short runs of the trainer in this process: options, plug-ins, steps that are not finite."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dupr_cli import plugins, pretrain
from dupr_cli.artifacts.run import MetricsLog
from dupr_cli.errors import RunError, UsageError
from dupr_cli.pretrain.densecl import DenseCl
from dupr_cli.pretrain.encoders import Embeddings
from dupr_cli.pretrain.method import Dupr
from dupr_cli.recipe import PretrainRecipe, load_recipe
from dupr_cli.recipe.base import Section
from tests.support.processes import forked
from tests.support.recipes import SMALL_NETWORK, TINY

pytestmark = pytest.mark.slow

Load = Callable[..., PretrainRecipe]
# Small steps: a network at its random start multiplies rounding by a hundred in each.
GENTLE = ("optimizer.lr=1e-5", "optimizer.warmup_steps=0", "train.steps=3")


@pytest.fixture
def tiny_recipe(tiny_recipe: Load) -> Load:
    """The smallest recipe with the smallest network: runs are compared, not networks."""
    return partial(tiny_recipe, SMALL_NETWORK)


def trained(recipe: PretrainRecipe, shards: Path, out: Path) -> dict[str, Tensor]:
    pretrain.run(recipe, str(shards), out)
    return load_file(out / "latest" / "model.safetensors")


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[n].double() - b[n].double()).abs().max()) for n in a if n.startswith("qu"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> dict[str, Tensor]:
    recipe = load_recipe(PretrainRecipe, "dupr-r18-cpu-smoke", [*TINY, SMALL_NETWORK, *GENTLE])
    return trained(recipe, tiny_shards, tmp_path_factory.mktemp("plain") / "run")


@pytest.mark.parametrize(
    ("option", "tolerance"),
    [
        ("train.accumulate=2", 1e-4),
        ("train.channels_last=false", 1e-4),
        ("train.precision=bfloat16", 0.05),
        ("train.precision=float16", 0.05),
        pytest.param(
            "train.compile=true",
            1e-4,
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(
                    shutil.which("g++") is None,
                    reason="torch.compile on a CPU needs a C++ compiler",
                ),
            ],
        ),
    ],
)
def test_ways_of_computing_give_the_same_run(
    tiny_recipe: Load,
    tiny_shards: Path,
    tmp_path: Path,
    plain: dict[str, Tensor],
    option: str,
    tolerance: float,
) -> None:
    found = trained(tiny_recipe(*GENTLE, option), tiny_shards, tmp_path / "run")
    moved = largest_difference(found, plain)
    assert moved <= tolerance
    start = Dupr(tiny_recipe(*GENTLE)).state_dict()
    if tolerance < 0.01:
        assert moved < 0.1 * largest_difference(start, plain)  # it has moved, and alike


def test_recomputed_stages_give_the_same_run(
    tiny_recipe: Load, tiny_shards: Path, tmp_path: Path
) -> None:
    """Of a torchvision ResNet: timm recomputes its networks in its own way."""
    gentle = (*GENTLE, "model.backbone=resnet18")
    plain = trained(tiny_recipe(*gentle), tiny_shards, tmp_path / "plain")
    recomputed = trained(
        tiny_recipe(*gentle, "train.activation_checkpointing=true"), tiny_shards, tmp_path / "run"
    )
    assert largest_difference(recomputed, plain) <= 1e-6


def test_the_loss_scaler_is_part_of_the_state(
    tiny_recipe: Load, tiny_shards: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe("train.precision=float16")
    whole = trained(recipe, tiny_shards, tmp_path / "whole")
    with pytest.raises(Exception, match="stopped by --stop-after"):
        pretrain.run(recipe, str(tiny_shards), tmp_path / "cut", stop_after=3)
    state = json.loads((tmp_path / "cut/latest/state.json").read_text())
    assert state["loss_scaler"]["scale"] > 1
    continued = trained(recipe, tiny_shards, tmp_path / "cut")
    assert all(torch.equal(values, continued[name]) for name, values in whole.items())


def test_symmetric_runs_queue_both_views(
    tiny_recipe: Load, tiny_shards: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe("method.symmetric=true", "train.steps=2")
    found = trained(recipe, tiny_shards, tmp_path / "run")
    assert found["image_queues.res5.pushed"] == 2 * 2 * 8


def test_metrics_tell_whether_it_learns(
    tiny_recipe: Load, tiny_shards: Path, tmp_path: Path
) -> None:
    trained(tiny_recipe(), tiny_shards, tmp_path / "run")
    latest = MetricsLog(tmp_path / "run").latest()
    for name in ("loss", "positive", "negative", "spread", "alignment", "uniformity", "reference"):
        for queue in ("image/res2", "image/res5", "patch/res4", "patch/res5"):
            assert f"{name}/{queue}" in latest, (name, queue)
    assert -1 <= latest["other_bins/patch/res4"] <= 1
    assert "other_bins/patch/res5" not in latest  # a single bin
    assert latest["reference/image/res5"] == pytest.approx(4.174, abs=1e-3)  # ln(1 + 64)
    assert latest["queue_fill/image/res5"] == pytest.approx(48 / 64)
    assert latest["alignment/image/res5"] == pytest.approx(2 - 2 * latest["positive/image/res5"])
    assert 0 <= latest["overlap"] <= 1
    assert latest["bad_steps"] == 0
    assert 0.1 < latest["memory/process_gib"] < 20
    assert latest["images_per_second"] > 0
    assert 0 <= latest["data_wait"] <= 1


class NotFinite(Dupr):
    """DUPR whose loss is not a number in the given calls."""

    class Options(Section):
        calls: list[int]

    options_model = Options
    called = 0

    def weighted(self, losses: dict[str, Tensor]) -> Tensor:
        total = super().weighted(losses)
        if total.requires_grad:  # the loss itself, not its sum over parts
            NotFinite.called += 1
            assert isinstance(self.options, NotFinite.Options)
            if NotFinite.called in self.options.calls:
                return total * torch.nan
        return total


@pytest.fixture
def not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    built_in = plugins._BUILT_IN[plugins.METHODS]
    monkeypatch.setitem(built_in, "not-finite", f"{__name__}:NotFinite")
    monkeypatch.setattr(NotFinite, "called", 0)


@pytest.mark.usefixtures("not_finite")
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(
    tiny_recipe: Load, tiny_shards: Path, tmp_path: Path, precision: str
) -> None:
    recipe = tiny_recipe(
        "method.name=not-finite",
        "method.options={calls: [2, 3]}",
        f"train.precision={precision}",
    )
    found = trained(recipe, tiny_shards, tmp_path / "run")
    assert all(bool(torch.isfinite(values).all()) for values in found.values())
    assert found["image_queues.res5.pushed"] == 4 * 8  # nothing of the two enters
    assert found["query.backbone.bn1.num_batches_tracked"] == 4
    assert MetricsLog(tmp_path / "run").latest()["bad_steps"] == 2


@pytest.mark.usefixtures("not_finite")
def test_many_such_steps_in_a_row_stop_the_run_with_the_samples(
    tiny_recipe: Load, tiny_shards: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(
        "method.name=not-finite", "method.options={calls: [2, 4, 5, 6]}", "train.max_bad_steps=3"
    )
    with pytest.raises(RunError, match=r"not finite in 3 steps in a row, up to step 6"):
        pretrain.run(recipe, str(tiny_shards), tmp_path / "run")
    listed = json.loads((tmp_path / "run" / "not-finite-step-00000006.json").read_text())
    assert len(listed["samples"]) == 8
    assert listed["samples"][0]["shard"].startswith("train-00000")
    assert listed["samples"][0]["key"].startswith("s0")


def test_densecl_takes_the_most_similar_cell(tiny_recipe: Load) -> None:
    model = DenseCl(
        tiny_recipe(
            "method.name=densecl",
            "method.image.weights={res5: 0.5}",
            "method.patch.weights={res5: 0.5}",
            "method.patch.bins={res5: 2}",
            "method.views.size=64",
        )
    )
    cells = torch.eye(4)[None]  # four cells with features of their own
    order = torch.tensor([2, 0, 3, 1])
    values = torch.randn(1, 4, 16)
    queries = Embeddings({}, {"res5": values}, {"res5": cells})
    keys = Embeddings({}, {"res5": values}, {"res5": cells[:, order]})
    positives = model.positive_patches("res5", queries, keys)
    assert torch.equal(positives[0], values[0, order.argsort()])


def test_densecl_queues_the_mean_of_raw_projections(tiny_recipe: Load) -> None:
    """As the official code: averaged, then normalised; long projections weigh more."""
    model = DenseCl(tiny_recipe("method.name=densecl", "method.patch.weights={res5: 0.5}",
                                "method.patch.bins={res5: 2}", "method.views.size=64"))  # fmt: skip
    model.eval()
    views, seen = torch.randn(3, 3, 64, 64), []
    head = model.key.patch_heads["res5"]
    head.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    keys = model.key(views, torch.zeros(3, 4), torch.zeros(3, dtype=torch.bool))
    chosen = model.queue_keys(keys, torch.rand(3, 4))["patch/res5"]
    mean = seen[0].mean(1)
    assert torch.allclose(chosen, mean / mean.norm(dim=1, keepdim=True), atol=1e-6)
    of_units = keys.patch["res5"].mean(1)
    assert not torch.allclose(chosen, of_units / of_units.norm(dim=1, keepdim=True), atol=1e-4)


def test_densecl_runs(tiny_recipe: Load, tiny_shards: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("method.name=densecl", "method.patch.weights={res5: 0.5}", "train.steps=2")
    found = trained(recipe, tiny_shards, tmp_path / "run")
    assert found["patch_queues.res5.pushed"] == 2 * 8  # one mean per image


def test_another_package_provides_a_method(tmp_path: Path, tiny_shards: Path) -> None:
    """A real distribution with an entry point, found and run by the command line."""
    (tmp_path / "their_package.py").write_text(
        "from dupr_cli.pretrain.method import Dupr\n"
        "from dupr_cli.recipe.base import Section\n"
        "class Options(Section):\n    factor: float = 1.0\n"
        "class Theirs(Dupr):\n"
        "    options_model = Options\n"
        "    def weighted(self, losses):\n"
        "        return self.options.factor * super().weighted(losses)\n"
    )
    facts = tmp_path / "their_package-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[dupr.methods]\ntheirs = their_package:Theirs\n")
    command = [sys.executable, "-m", "dupr_cli", "pretrain", "dupr-r18-cpu-smoke"]
    command += ["--data", str(tiny_shards), "--out", str(tmp_path / "run")]
    for override in (*TINY, SMALL_NETWORK, "method.name=theirs", "train.steps=2"):
        command += ["--set", override]
    environment = {"PYTHONPATH": str(tmp_path)}

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        return forked([*command, *options], environment=environment)

    wrong = run("--set", "method.options={factr: 2}")
    assert wrong.returncode == 2
    assert "method.options.factr" in wrong.stderr
    assert "The options of theirs are: factor." in wrong.stderr
    done = run("--set", "method.options={factor: 0}")
    assert done.returncode == 0, done.stderr
    assert MetricsLog(tmp_path / "run").latest()["loss"] == 0
    del environment["PYTHONPATH"]
    unknown = run()
    assert unknown.returncode == 2
    assert "method.name is theirs, which is not a method" in unknown.stderr


def test_options_of_a_method_without_any_are_refused(
    tiny_recipe: Load, tiny_shards: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe("method.options={alpha: 1}")
    with pytest.raises(UsageError, match=r"(?s)options.alpha.*options of dupr are: none"):
        pretrain.plan(recipe, str(tiny_shards), tmp_path / "run")
