"""Frozen evaluation: stored features are those of the backbone, and only the head is trained."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import cast

import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOS
from torchvision.models.detection.image_list import ImageList

from dupr_cli import evaluate
from dupr_cli.datasets.labelled import LabelledSet, open_labelled
from dupr_cli.errors import StoppedRunError, UsageError
from dupr_cli.evaluate.detection_data import DetectionBatch, ImageLoading, ImageRequest
from dupr_cli.evaluate.detectors import Target, build_detector
from dupr_cli.evaluate.detectors.fcos import Fcos, _NoBackbone
from dupr_cli.evaluate.detectors.norms import freeze_up_to
from dupr_cli.evaluate.features import Features, open_features
from dupr_cli.evaluate.scaling import limited
from dupr_cli.evaluate.tasks import training_batches
from dupr_cli.evaluate.training import Trial, learning_rate, make_optimizer, train_detector
from dupr_cli.models.backbone import as_backbone
from dupr_cli.models.compared import open_compared
from dupr_cli.models.frozen import normalised_batch
from dupr_cli.models.resnet import ResNetBackbone
from dupr_cli.progress import SilentReporter
from dupr_cli.recipe import EvaluateRecipe
from dupr_cli.recipe.base import Level
from dupr_cli.recipe.evaluate import DetectionTrainSection
from dupr_cli.runtime.parallel import World
from dupr_cli.runtime.stopping import Limits
from tests.support.command_line import dupr
from tests.support.labelled_scenes import make_tree
from tests.support.recipes import detection_recipe, frozen_recipe
from tests.support.reporters import Listening
from tests.support.weights import random_weights

CHANNELS: dict[Level, int] = {"res3": 128, "res4": 256, "res5": 512}
LEVELS: tuple[Level, ...] = ("res3", "res4", "res5")
CPU = torch.device("cpu")
ALONE = World(CPU)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(tmp_path_factory.mktemp("set") / "tree")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_weights(tmp_path_factory.mktemp("weights") / "backbone.safetensors")


def opened(tree: Path, split: str) -> LabelledSet:
    return open_labelled(str(tree), [split], SilentReporter())


def features_of(
    folder: Path, tree: Path, weights: str, recipe: EvaluateRecipe, images: LabelledSet
) -> Features:
    (compared,) = open_compared([weights], "resnet18")
    labelled = opened(tree, "train")
    return open_features(
        folder, compared, recipe, labelled, images, opened(tree, "val"), labelled.classes, CPU,
        SilentReporter(),
    )  # fmt: skip


def maps(seed: int) -> dict[Level, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        level: torch.randn(2, CHANNELS[level], 64 // stride, 96 // stride, generator=generator)
        for level, stride in zip(LEVELS, (8, 16, 32), strict=True)
    }


def targets() -> list[Target]:
    return [
        Target(torch.tensor([[4.0, 6, 40, 50], [50, 10, 90, 60]]), torch.tensor([0, 2])),
        Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)),
    ]


def test_losses_and_detections_are_torchvisions() -> None:
    """The oracle is torchvision's own FCOS, with its own anchors, on the same pyramid and head."""
    recipe = frozen_recipe()
    torch.manual_seed(0)
    ours = Fcos(as_backbone(ResNetBackbone("resnet18")), 3, recipe)
    with torch.no_grad():
        ours.fcos.head.classification_head.cls_logits.bias.fill_(-1.0)
    oracle = FCOS(
        _NoBackbone(32), 3,
        anchor_generator=AnchorGenerator(((8,), (16,), (32,)), ((1.0,),) * 3),
        head=ours.fcos.head, score_thresh=0.0, nms_thresh=0.5, topk_candidates=50,
    )  # fmt: skip
    given = maps(0)
    pyramid = list(ours.fpn({level: given[level] for level in LEVELS}).values())
    sizes = [(64, 96), (60, 90)]
    anchors = oracle.anchor_generator(ImageList(torch.zeros(2, 3, 64, 96), sizes), pyramid)
    counts = [f.shape[2] * f.shape[3] for f in pyramid]
    wanted = oracle.compute_loss(
        [{"boxes": t.boxes, "labels": t.labels.clone()} for t in targets()],
        oracle.head(pyramid), anchors, counts,
    )  # fmt: skip
    found = ours.losses(given, targets())
    assert sorted(map(float, found.values())) == pytest.approx(sorted(map(float, wanted.values())))

    by_level = [oracle.head([feature]) for feature in pyramid]
    expected = oracle.postprocess_detections(
        {name: [of[name] for of in by_level] for name in by_level[0]},
        [list(of.split(counts)) for of in anchors], sizes,
    )  # fmt: skip
    for one, other in zip(ours.detect(given, sizes), expected, strict=True):
        assert torch.equal(one.labels, other["labels"])
        torch.testing.assert_close(one.boxes, other["boxes"])
        torch.testing.assert_close(one.scores, other["scores"])


def test_all_distances_can_be_learned_at_the_start() -> None:
    """torchvision cuts distances at zero, without a gradient; one that begins there may stay."""
    for seed in range(3):
        torch.manual_seed(seed)
        head = Fcos(as_backbone(ResNetBackbone("resnet18")), 3, frozen_recipe())
        outputs, _ = head._predict(maps(seed))
        for of_level in outputs:
            assert float(of_level["bbox_regression"].min()) > 0.5


def test_an_object_is_learned_at_its_place() -> None:
    """A head trained on one object finds it there, and its mirror image on the other side."""
    torch.manual_seed(0)
    head = Fcos(as_backbone(ResNetBackbone("resnet18")), 1, frozen_recipe())
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.003)
    box = torch.tensor([[8.0, 16, 40, 48]])
    given = {level: torch.zeros(1, CHANNELS[level], *m.shape[2:]) for level, m in maps(0).items()}
    for level, stride in zip(LEVELS, (8, 16, 32), strict=True):
        x0, y0, x1, y1 = (round(float(v) / stride) for v in box[0])
        given[level][:, ::2, y0 : y1 + 1, x0 : x1 + 1] = 1.0
    for _ in range(80):
        losses = head.losses(given, [Target(box, torch.tensor([0]))])
        optimizer.zero_grad()
        torch.autograd.backward(torch.stack(list(losses.values())).sum())
        optimizer.step()
    with torch.no_grad():
        (found,) = head.detect(given, [(64, 96)])
    assert float((found.boxes[0] - box[0]).abs().max()) < 4


def test_stored_features_are_those_of_the_backbone(tree: Path, tmp_path: Path) -> None:
    recipe, images = frozen_recipe(), opened(tree, "train")
    found = features_of(tmp_path / "f", tree, "none", recipe, images)
    read = ImageLoading(images, recipe.data, images.classes, masks=False)
    mean, std = found.backbone.mean.view(3, 1, 1), found.backbone.std.view(3, 1, 1)
    for position, flip in ((0, False), (3, True), (7, False)):
        batch = read(ImageRequest(position, 64, flip))
        pixels = normalised_batch(batch.images, mean, std, 32)
        wanted = found.backbone.maps_of_normalised(pixels, LEVELS)
        stored = found.train.maps(images.ids[position], flip)
        assert stored.size == tuple(batch.images[0].shape[1:])
        for level in LEVELS:
            torch.testing.assert_close(
                stored.maps[level].float(), wanted[level][0], rtol=2e-3, atol=2e-3
            )
    batches = found.training_batches(images, recipe, images.classes, seed=3, start=0)
    for _ in range(4):
        drawn = next(batches)
        assert all(
            float(t.boxes[:, 2].max()) <= size[1]
            for t, size in zip(cast("list[Target]", drawn.targets), drawn.sizes, strict=True)
        )


def test_features_do_not_depend_on_which_images_are_wanted(tree: Path, tmp_path: Path) -> None:
    images = opened(tree, "train")
    every = features_of(tmp_path / "a", tree, "none", frozen_recipe(), images)
    some = features_of(tmp_path / "b", tree, "none", frozen_recipe(), images.subset([5, 2]))
    for position in (2, 5):
        name = images.ids[position]
        for flip in (False, True):
            one, other = every.train.maps(name, flip), some.train.maps(name, flip)
            assert all(torch.equal(one.maps[level], other.maps[level]) for level in LEVELS)


def test_features_are_computed_once(tree: Path, weights: Path, tmp_path: Path) -> None:
    images = opened(tree, "train")
    folder = tmp_path / "f"
    features_of(folder, tree, str(weights), frozen_recipe(), images)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    features_of(folder, tree, str(weights), frozen_recipe(iterations=9), images)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    features_of(folder, tree, "none", frozen_recipe(), images)
    assert len(list(folder.iterdir())) == 2 * len(before)


@pytest.mark.slow
def test_ap_is_that_of_evaluate_detections_on_the_same_detections(
    tree: Path, weights: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    found = evaluate.run(frozen_recipe(30), [str(weights), "none"], str(tree), out, device="cpu")
    for entry in found.results:
        detections = out / str(entry.extra["folder"]) / "seed-0" / "detections.json"
        scored = dupr(
            "evaluate", "detections", detections, "--data", tree, "--split", "val",
            "--metric", "voc07", "--json",
        )  # fmt: skip
        metrics = json.loads(scored.stdout)["metrics"]
        assert metrics["AP"] == pytest.approx(entry.metrics["AP"])
        assert metrics["AP50"] == pytest.approx(entry.metrics["AP50"])
    assert not list(out.glob("features/*"))  # needed only until the end


@pytest.mark.slow
def test_an_interrupted_trial_continues_exactly(tree: Path, tmp_path: Path) -> None:
    """AdamW's moments and step counts are saved too."""
    recipe = frozen_recipe(6)
    whole = evaluate.run(recipe, ["none"], str(tree), tmp_path / "a", device="cpu")
    with pytest.raises(StoppedRunError, match="iteration 4 of 6"):
        evaluate.run(recipe, ["none"], str(tree), tmp_path / "b", device="cpu", stop_after=4)
    again = evaluate.run(recipe, ["none"], str(tree), tmp_path / "b", device="cpu")
    name = Path("01-none/seed-0/detections.json")
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert again.results[0].metrics == whole.results[0].metrics


@pytest.mark.slow
def test_every_seed_draws_its_own_images_alike_for_all_weights(
    tree: Path, weights: Path, tmp_path: Path
) -> None:
    data = frozen_recipe().data.model_copy(update={"labels": 4})
    recipe = frozen_recipe().model_copy(update={"data": data, "trials": 3})
    evaluate.run(recipe, [str(weights), "none"], str(tree), tmp_path, device="cpu")
    drawn = {
        folder: [
            json.loads((tmp_path / folder / f"seed-{seed}" / "labels.json").read_text())[
                "image_ids"
            ]
            for seed in range(3)
        ]
        for folder in ("01-backbone", "02-none")
    }
    assert drawn["01-backbone"] == drawn["02-none"]
    assert len({tuple(ids) for ids in drawn["02-none"]}) > 1


@pytest.mark.slow
def test_levels_up_to_the_frozen_one_stay_as_they_were(tree: Path, tmp_path: Path) -> None:
    detector_section = detection_recipe().detector.model_copy(update={"frozen": "res3"})
    recipe = detection_recipe(3).model_copy(update={"detector": detector_section})
    detector, _ = build_detector(recipe, "resnet18", 3, None, 0, ALONE)
    freeze_up_to(detector.backbone, "res3")
    before = {k: v.clone() for k, v in detector.backbone.state_dict().items()}
    images = opened(tree, "train")
    trial = Trial(detector, recipe, 0, "t", tmp_path, ALONE)
    train_detector(
        trial,
        lambda start: training_batches(images, recipe, images.classes, 0, start, ALONE),
        SilentReporter(),
    )
    after = detector.backbone.state_dict()
    changed = {k for k, v in before.items() if not torch.equal(v, after[k])}
    assert changed
    assert all(name.startswith(("layer3.", "layer4.")) for name in changed)
    assert any("layer3.0.conv1" in name for name in changed)
    assert any("layer3.0.bn1.running_mean" in name for name in changed)


@pytest.mark.slow
def test_frozen_up_to_a_level_runs_from_the_command_line(tree: Path, tmp_path: Path) -> None:
    detector_section = detection_recipe().detector.model_copy(update={"frozen": "res4"})
    recipe = detection_recipe().model_copy(update={"detector": detector_section})
    found = evaluate.run(recipe, ["none"], str(tree), tmp_path / "out", device="cpu")
    assert EvaluateRecipe.model_validate(found.recipe).detector.frozen == "res4"


def test_factor_and_delay_of_the_backbones_rate() -> None:
    train = DetectionTrainSection(backbone_lr=0.1, lr=0.5, milestones=[], iterations=10)
    recipe = detection_recipe().model_copy(update={"train": train})
    detector, _ = build_detector(recipe, "resnet18", 3, None, 0, ALONE)
    backbone = {id(p) for p in detector.backbone.parameters()}
    for group in make_optimizer(detector, train).param_groups:
        in_backbone = {id(p) in backbone for p in group["params"]}
        assert in_backbone == {group["factor"] == 0.1}


@pytest.mark.slow
def test_the_backbone_waits_for_its_iteration(tree: Path, tmp_path: Path) -> None:
    train = detection_recipe(3).train.model_copy(update={"freeze_iterations": 2})
    recipe = detection_recipe(3).model_copy(update={"train": train})
    detector, _ = build_detector(recipe, "resnet18", 3, None, 0, ALONE)
    images = opened(tree, "train")

    def batches(start: int) -> Generator[DetectionBatch, None, None]:
        return training_batches(images, recipe, images.classes, 0, start, ALONE)

    start = {k: v.detach().clone() for k, v in detector.named_parameters()}
    trial = Trial(detector, recipe, 0, "t", tmp_path, ALONE)
    with pytest.raises(StoppedRunError):
        train_detector(trial, batches, SilentReporter(), Limits(stop_after=2))
    waited = {k for k, v in detector.named_parameters() if torch.equal(v, start[k])}
    assert {k for k in start if k.startswith("network.backbone")} <= waited
    assert len(waited) < len(start)
    train_detector(trial, batches, SilentReporter())
    now = detector.get_parameter("network.backbone.conv1.weight")
    assert not torch.equal(start["network.backbone.conv1.weight"], now)


def test_cosine_falls_to_nothing_after_the_warm_up() -> None:
    train = DetectionTrainSection(
        iterations=100, warmup=10, lr=1.0, schedule="cosine", milestones=[]
    )
    rates = [learning_rate(train, i) for i in range(100)]
    assert rates[:2] == pytest.approx([0.1, 0.2])
    assert rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.5)
    assert rates[99] < 0.001
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.slow
def test_the_rate_is_chosen_on_training_labels_alike_for_all(
    tree: Path, weights: Path, tmp_path: Path
) -> None:
    train = frozen_recipe(4).train.model_copy(update={"lr_grid": [1.0, 1e-6]})
    recipe = frozen_recipe(4).model_copy(update={"train": train})
    reporter = Listening()
    found = evaluate.run(
        recipe, [str(weights), "none"], str(tree), tmp_path, device="cpu", reporter=reporter
    )
    note = next(note for note in found.notes if note.startswith("lr was chosen"))
    assert "25% of the training labels: 01-backbone" in note
    test_ids = set(opened(tree, "val").ids)
    for folder in ("01-backbone", "02-none"):
        tried = sorted(path.name for path in (tmp_path / folder).glob("lr-*"))
        assert tried == ["lr-1-seed-0", "lr-1e-06-seed-0"]
        for name in tried:
            rows = json.loads((tmp_path / folder / name / "detections.json").read_text())
            assert not test_ids & {row["image_id"] for row in rows}
    again = evaluate.run(
        recipe, [str(weights), "none"], str(tree), tmp_path, device="cpu", reporter=reporter
    )
    assert again == found
    assert sum("lr 1e-06-seed-0: finished before" in line for line in reporter.said) == 2


@pytest.mark.slow
def test_the_time_limit_is_that_of_all_trials_together(tree: Path, tmp_path: Path) -> None:
    recipe = frozen_recipe().model_copy(update={"trials": 3})
    with pytest.raises(StoppedRunError, match="iteration 1 of 2"):
        evaluate.run(recipe, ["none"], str(tree), tmp_path, device="cpu", max_hours=1e-9)
    # The last iteration finishes the first trial; the second may not begin.
    with pytest.raises(StoppedRunError, match="before seed-1 are kept"):
        evaluate.run(recipe, ["none"], str(tree), tmp_path, device="cpu", max_hours=1e-9)
    found = evaluate.run(recipe, ["none"], str(tree), tmp_path, device="cpu")
    assert len(found.results[0].trials) == 3


def test_limit_keeps_the_features_few(tree: Path) -> None:
    short, _ = limited(frozen_recipe(9), 3)
    assert short.data.labels == 6


@pytest.mark.slow
def test_validation_leaves_the_test_split_alone(tree: Path, tmp_path: Path) -> None:
    data = frozen_recipe().data.model_copy(update={"validation": 0.25, "test_splits": ["nowhere"]})
    recipe = frozen_recipe().model_copy(update={"data": data})
    found = evaluate.run(recipe, ["none"], str(tree), tmp_path, device="cpu")
    assert (found.train.images, found.test.images) == (6, 2)
    assert any("not to report" in note for note in found.notes)
    rows = json.loads((tmp_path / "01-none" / "seed-0" / "detections.json").read_text())
    assert {row["image_id"] for row in rows} <= set(opened(tree, "train").ids)


def test_frozen_evaluation_is_refused_in_several_processes(tree: Path, tmp_path: Path) -> None:
    done = dupr("evaluate", "voc", "none", "--frozen", "--data", tree, "--out", tmp_path / "out",
                "--nproc", 2, "--dry-run", code=2)  # fmt: skip
    assert "runs in one process" in done.stderr


def test_permuted_weights_keep_their_values_and_lose_their_order(weights: Path) -> None:
    plain, shuffled = open_compared([str(weights), f"permuted:{weights}"])
    (again,) = open_compared([f"permuted:{weights}"])
    assert shuffled.folder == "02-permuted-backbone"
    assert plain.weights is not None
    assert shuffled.weights is not None
    assert again.weights is not None
    assert shuffled.sha256 not in (plain.sha256, None)
    for name, values in plain.weights.tensors.items():
        other = shuffled.weights.tensors[name]
        assert torch.equal(values.flatten().sort().values, other.flatten().sort().values)
        assert torch.equal(other, again.weights.tensors[name])
    conv = "layer2.0.conv1.weight"
    assert not torch.equal(plain.weights.tensors[conv], shuffled.weights.tensors[conv])


def test_none_cannot_be_permuted() -> None:
    with pytest.raises(UsageError, match="no structure"):
        open_compared(["permuted:none"])


def test_wrong_uses_say_what_to_do(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    common = ("--data", tree, "--out", out)
    done = dupr("evaluate", "voc", "none", "--frozen", "-r", "voc-tiny", *common, code=2)
    assert "detector.frozen = res5" in done.stderr
    done = dupr("evaluate", "voc", "none", "--baseline", "none", *common, code=2)
    assert "--labels 50,100,all" in done.stderr
    done = dupr(
        "evaluate", "voc", "none", "--frozen", *common, "--set", "data.train_sizes=[64, 96]", code=2
    )
    assert "at one size" in done.stderr
    done = dupr(
        "evaluate",
        "voc",
        "none",
        "-r",
        "voc-tiny",
        *common,
        "--set",
        "detector.frozen=res5",
        code=2,
    )
    assert "fcos-fpn" in done.stderr
    measured = ("--set", "test.precise_bn_batches=0")
    done = dupr("evaluate", "voc", "none", "--frozen", *common, *measured, code=2)
    assert "give at least 1" in done.stderr
    done = dupr("evaluate", "cityscapes", "none", "--frozen", *common, code=2)
    assert "evaluate coco --frozen" in done.stderr
    assert not out.exists()


def test_the_shipped_recipe_is_frozen(tree: Path, tmp_path: Path) -> None:
    done = dupr("evaluate", "voc", "none", "--frozen", "--data", tree, "--out", tmp_path / "out",
                "--set", "detector.backbone=resnet18", "--dry-run", "--json")  # fmt: skip
    planned = json.loads(done.stdout)
    assert planned["recipe"]["detector"]["frozen"] == "res5"
    assert planned["plan"]["protocol"] == "voc-frozen-tiny"
    assert not (tmp_path / "out").exists()
