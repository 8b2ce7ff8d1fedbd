"""The estimate of a run before its first step, beside the figures of torchvision."""

import json
import re
from pathlib import Path

import pytest
import torch
from torchvision.models import ResNet18_Weights, ResNet50_Weights, WeightsEnum

from dupr_cli.models.backbone import make_backbone
from dupr_cli.pretrain.estimate import (
    KNOWN,
    Estimate,
    counted,
    describe_hours,
    disk_gib,
    estimate_warnings,
    memory_gib,
    network_size,
)
from dupr_cli.pretrain.method import Dupr
from dupr_cli.recipe import PretrainRecipe, load_recipe
from tests.support.command_line import TINY_SET, dupr, pretrain
from tests.support.images import write_shards

CPU = torch.device("cpu")


def recipe(name: str = "dupr-r50-in1k-200ep", *options: str) -> PretrainRecipe:
    return load_recipe(PretrainRecipe, name, options)


@pytest.mark.parametrize(
    ("backbone", "published"),
    [
        ("resnet18", ResNet18_Weights.IMAGENET1K_V1),
        ("resnet50", ResNet50_Weights.IMAGENET1K_V1),
    ],
)
def test_operations_are_those_that_torchvision_states(
    backbone: str, published: WeightsEnum
) -> None:
    size = network_size(recipe("dupr-r50-in1k-200ep", f"model.backbone={backbone}"))
    # Theirs are multiplications with additions, in thousands of millions, classifier included.
    theirs = 2e9 * published.meta["_ops"]
    assert size.operations == pytest.approx(theirs, rel=0.005)


@pytest.mark.parametrize("backbone", sorted(KNOWN))
def test_what_is_known_is_what_would_be_counted(backbone: str) -> None:
    given = recipe("dupr-r50-in1k-200ep", f"model.backbone={backbone}")
    known, found = network_size(given), counted(given)
    assert (known.operations, known.activations) == pytest.approx(found[:2], rel=1e-3)
    parameters = known.parameters - sum(
        found[3][v] * (found[3][v] + 128) for v in ("res2", "res3", *2 * ("res4", "res5"))
    )
    assert parameters == found[2]


def test_parameters_are_those_of_the_model() -> None:
    small = recipe("dupr-r18-cpu-smoke")
    model = Dupr(small)
    real = sum(p.numel() for p in model.query.parameters())
    assert network_size(small).parameters == pytest.approx(real, rel=0.01)


def test_activations_grow_with_the_area_of_a_view() -> None:
    bins = ("method.patch.bins.res4=4", "method.patch.bins.res5=2")
    small = network_size(recipe("dupr-r50-in1k-200ep", "method.views.size=128", *bins))
    large = network_size(recipe("dupr-r50-in1k-200ep", "method.views.size=256", *bins))
    assert large.activations == pytest.approx(4 * small.activations, rel=0.05)


def test_activations_are_what_the_backward_pass_keeps() -> None:
    backbone = make_backbone("resnet18").train()
    kept: dict[int, int] = {}
    parameters = {p.data_ptr() for p in backbone.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in parameters:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    levels = ["res2", "res3", "res4", "res5"]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        maps = backbone(torch.rand(4, 3, 64, 64), levels, "res5")
    del maps
    estimated = network_size(recipe("dupr-r18-cpu-smoke")).activations
    assert estimated == pytest.approx(sum(kept.values()) / 4, rel=0.05)


def test_parts_and_checkpointing_need_less_memory_and_a_queue_needs_more() -> None:
    given = recipe()
    size = network_size(given)
    whole = memory_gib(given, size, CPU)
    assert memory_gib(recipe("dupr-r50-in1k-200ep", "train.accumulate=4"), size, CPU) < whole / 2
    checkpointed = recipe("dupr-r50-in1k-200ep", "train.activation_checkpointing=true")
    assert memory_gib(checkpointed, size, CPU) < whole / 2
    longer = recipe("dupr-r50-in1k-200ep", "method.queue_length=131072")
    more = (memory_gib(longer, size, CPU) - whole) * 2**30
    assert more == pytest.approx(6 * 65536 * 128 * 4)
    assert disk_gib(longer, size) > disk_gib(given, size)


@pytest.mark.parametrize(
    ("hours", "words"),
    [(0.001, "1 minute"), (0.5, "30 minutes"), (1.5, "90 minutes"), (5, "5 hours"), (72, "3 days"),
     (2200, "3 months"), (20_000, "2 years")],
)  # fmt: skip
def test_durations_are_said_as_people_say_them(hours: float, words: str) -> None:
    assert describe_hours(hours) == words


def test_absurd_runs_are_called_so() -> None:
    assert estimate_warnings(Estimate(50, 10, 1, 1), CPU) == []
    months, memory = estimate_warnings(Estimate(0.5, 4000, 1e6, 1), CPU)
    assert "about 5 months on this device" in months
    assert "1000000 GiB of memory" in memory


def test_the_paper_on_a_laptop_is_planned_with_its_time(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", 600)
    result = dupr("pretrain", "dupr-r50-in1k-200ep", "--data", shards, "--out", tmp_path / "run",
                  "--steps", 1_000_000, "--device", "cpu", "--dry-run")  # fmt: skip
    assert re.search(
        r"#   estimate +about .+ images/s, .+ GiB of memory, .+ of disk", result.stdout
    )
    assert "this run would take about" in result.stdout
    as_json = dupr("pretrain", "dupr-r18-cpu-smoke", *TINY_SET, "--data", shards, "--out",
                   tmp_path / "run", "--dry-run", "--json")  # fmt: skip
    assert json.loads(as_json.stdout)["plan"]["estimate"]["hours"] > 0


def test_the_log_of_a_run_starts_with_the_estimate(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", 24)
    result = pretrain(shards, tmp_path / "run", "--steps", 2)
    assert "estimate: about" in result.stderr
