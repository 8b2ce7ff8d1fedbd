"""`dupr evaluate semantic`: scores of cells, input, and the whole command on small scenes."""

from __future__ import annotations

import json
import sys
import zipfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from torch import Tensor, nn

from dupr_cli import evaluate
from dupr_cli.artifacts.label_curves import LabelCurves
from dupr_cli.artifacts.results import Results
from dupr_cli.datasets.semantic import SemanticSet, open_semantic
from dupr_cli.errors import StoppedRunError, UsageError
from dupr_cli.evaluate.cell_scores import CellScores
from dupr_cli.evaluate.class_maps import class_map, class_map_by_windows
from dupr_cli.evaluate.detector_data import SemanticTarget
from dupr_cli.evaluate.detectors import build_detector
from dupr_cli.evaluate.detectors.fcn import Fcn
from dupr_cli.evaluate.features import open_features
from dupr_cli.evaluate.inference import find_all
from dupr_cli.evaluate.semantic_data import Cut, SemanticLoading, SemanticOrder, SemanticRequest
from dupr_cli.evaluate.tasks import Segmentation, training_batches
from dupr_cli.evaluate.tasks import test_batches as in_batches
from dupr_cli.models.backbone import as_backbone, make_backbone
from dupr_cli.models.compared import open_compared
from dupr_cli.models.dilation import dilate
from dupr_cli.models.frozen import normalised_batch
from dupr_cli.progress import SilentReporter
from dupr_cli.recipe import EvaluateRecipe, load_recipe
from dupr_cli.recipe.base import Level
from dupr_cli.recipe.load import RecipeError
from dupr_cli.runtime.parallel import World
from tests.support.command_line import dupr
from tests.support.mask_sets import COLOURS, plain_folder, save_grey, scene, scenes, voc_year
from tests.support.processes import finished, ranks
from tests.support.recipes import semantic_recipe as recipe
from tests.support.reporters import Listening

CPU = torch.device("cpu")
ALONE = World(CPU)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain_folder(tmp_path_factory.mktemp("set") / "set", scenes(train=8, val=4))


def opened(root: Path, split: str = "train") -> SemanticSet:
    return open_semantic(str(root), [split], SilentReporter())


def test_scores_at_pixels_are_those_of_align_corners_on_moco_s_crops() -> None:
    cells = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    scores = CellScores(cells, (65, 97), stride=16, first_centre=0.5)
    wanted = F.interpolate(cells[None], (65, 97), mode="bilinear", align_corners=True)[0]
    torch.testing.assert_close(scores.at_pixels(), wanted, rtol=1e-5, atol=1e-5)


def test_scores_at_pixels_are_those_of_a_plain_resize_if_cells_are_patches() -> None:
    cells = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
    scores = CellScores(cells, (64, 96), stride=16, first_centre=8.0)
    for size in ((64, 96), (50, 33), (200, 170)):
        wanted = F.interpolate(cells[None], size, mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(scores.at_pixels(size), wanted, rtol=1e-5, atol=1e-5)


def test_cells_of_a_network_are_found_where_the_image_has_them() -> None:
    """A network of pooling, whose scores are colours, gives an image back in its place."""
    gradient = torch.linspace(0, 1, 96).expand(1, 64, 96)
    pooled = F.avg_pool2d(gradient[None], 16)[0]
    scores = CellScores(pooled, (64, 96), stride=16, first_centre=8.0)
    inside = slice(8, 88)
    torch.testing.assert_close(
        scores.at_pixels()[:, :, inside], gradient[:, :, inside], rtol=1e-4, atol=1e-4
    )


def head(classes: int = 3) -> Fcn:
    torch.manual_seed(0)
    backbone = make_backbone("resnet18")
    dilate(backbone)
    return Fcn(as_backbone(backbone), classes, recipe(), ALONE)


def test_loss_is_the_mean_over_labelled_pixels_of_the_batch() -> None:
    network = head().eval()
    maps: dict[Level, Tensor] = {
        "res5": torch.randn(2, 512, 5, 7, generator=torch.Generator().manual_seed(0))
    }
    masks = torch.randint(0, 3, (2, 65, 97), dtype=torch.uint8)
    masks[0, :40] = 255
    targets = [SemanticTarget(mask) for mask in masks]
    (loss,) = network.losses(maps, targets).values()
    cells = network.classifier(network.convolutions(maps["res5"]))
    pixels = F.interpolate(cells, (65, 97), mode="bilinear", align_corners=True)
    wanted = F.cross_entropy(pixels, masks.long(), ignore_index=255)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_batch_without_a_labelled_pixel_has_no_loss() -> None:
    maps: dict[Level, Tensor] = {"res5": torch.randn(1, 512, 4, 4)}
    mask = torch.full((64, 64), 255, dtype=torch.uint8)
    (loss,) = head().losses(maps, [SemanticTarget(mask)]).values()
    assert loss.item() == 0


def test_backbone_of_the_network_is_dilated_and_crops_are_padded_to_their_side() -> None:
    settings = recipe(semantic={"crop": 81}, detector={"model": "fcn"})
    network, _ = build_detector(settings, "resnet18", 3, None, 0, ALONE)
    assert as_backbone(network.backbone).strides["res5"] == 16
    small = [torch.zeros(3, 40, 50, dtype=torch.uint8)]
    assert network.train().normalised(small).tensors.shape[2:] == (96, 96)
    assert network.eval().normalised(small).tensors.shape[2:] == (48, 64)


def colours_of(mask: np.ndarray) -> np.ndarray:
    return COLOURS[np.where(mask == 255, 0, mask)]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("left", "top"), [(0.0, 0.0), (0.5, 0.99), (0.99, 0.3)])
def test_mask_goes_with_its_image(flip: bool, left: float, top: float, root: Path) -> None:
    images = opened(root)
    settings = recipe(semantic={"short_side": None, "crop": 50})
    read = SemanticLoading(images, settings, masks=True)
    batch = read(SemanticRequest(2, Cut(1.0, left, top), flip))
    (image,), (target,) = batch.images, batch.targets
    shown, mask = image.permute(1, 2, 0).numpy(), target.mask.numpy()
    assert shown.shape == (50, 50, 3)
    assert np.array_equal(shown, colours_of(mask))
    whole = images.mask(2)
    x, y = int(left * 47), int(top * 23)
    part = whole[y : y + 50, x : x + 50]
    assert np.array_equal(mask, part[:, ::-1] if flip else part)


@pytest.mark.parametrize("scale", [0.5, 0.77, 1.9])
def test_scaled_masks_are_never_mixed_and_stay_with_their_image(scale: float, root: Path) -> None:
    settings = recipe(semantic={"short_side": None, "crop": 150})
    read = SemanticLoading(opened(root), settings, masks=True)
    batch = read(SemanticRequest(0, Cut(scale, 0.0, 0.0), True))
    shown, mask = batch.images[0].permute(1, 2, 0).numpy(), batch.targets[0].mask.numpy()
    assert mask.shape == (150, 150)
    assert set(np.unique(mask)) <= {0, 1, 2, 255}
    height, width = shown.shape[:2]
    assert (height, width) == tuple(min(150, int(side * scale + 0.5)) for side in (72, 96))
    assert (mask[height:] == 255).all()
    assert (mask[:, width:] == 255).all()
    near = np.abs(shown.astype(int) - colours_of(mask[:height, :width])).max(2) < 60
    assert near.mean() > 0.93  # all but the edges of objects


def test_only_two_classes_remain_when_there_are_two(tmp_path: Path) -> None:
    mask = np.zeros((60, 60), dtype=np.uint8)
    mask[:, 25:] = 2
    images = opened(plain_folder(tmp_path, {"train": [mask]}))
    settings = recipe(semantic={"short_side": 37, "crop": 64})
    batch = SemanticLoading(images, settings, masks=True)(SemanticRequest(0))
    assert set(np.unique(batch.targets[0].mask.numpy())) == {0, 2}


def test_batches_follow_from_the_seed_and_processes_share_them(root: Path) -> None:
    images, settings = opened(root), recipe()
    first = list(islice(SemanticOrder(8, settings, 3), 6))
    assert first == list(islice(SemanticOrder(8, settings, 3), 6))
    assert first[2:] == list(islice(SemanticOrder(8, settings, 3, start=2), 4))
    assert sorted(r.position for batch in first[:2] for r in batch) == list(range(8))
    assert {r.flip for batch in first for r in batch} == {False, True}
    scales = [r.cut.scale for batch in first for r in batch if r.cut]
    assert min(scales) < 0.8
    assert max(scales) > 1.6
    (whole,) = islice(training_batches(images, settings, images.classes, 0, 1, ALONE), 1)
    parts = [
        next(training_batches(images, settings, images.classes, 0, 1, World(CPU, rank, 2)))
        for rank in range(2)
    ]
    shown = [image for part in parts for image in part.images]
    assert all(torch.equal(a, b) for a, b in zip(whole.images, shown, strict=True))


class ColourOracle(nn.Module):
    """A network that knows the colour of every class: every pixel of its input is a cell."""

    def detect(self, images: list[Tensor]) -> list[CellScores]:
        colours = torch.from_numpy(COLOURS[:3]).float()
        found = []
        for image in images:
            distance = (image.float()[None] - colours[:, :, None, None]).square().sum(1)
            found.append(CellScores(-distance, (image.shape[1], image.shape[2]), 1, 0.5))
        return found


@pytest.mark.parametrize("window", [None, 40])
def test_network_that_is_given_the_truth_scores_100(window: int | None, root: Path) -> None:
    images = opened(root, "val")
    settings = recipe(semantic={"short_side": None, "window": window})
    task = Segmentation(settings)
    batches = in_batches(images, settings, images.classes, range(4), ALONE)
    oracle: Any = ColourOracle()
    found = find_all(task.output, oracle, batches, images, "oracle", ALONE, SilentReporter())
    scores = task.scores(images, images.classes, found)
    assert scores.metrics == {"mIoU": 100, "pixAcc": 100, "mAcc": 100}


def test_predictions_have_the_size_of_the_mask_whatever_the_network_saw(root: Path) -> None:
    images = opened(root, "val")
    settings = recipe(semantic={"short_side": 288})
    task = Segmentation(settings)
    batches = in_batches(images, settings, images.classes, range(4), ALONE)
    oracle: Any = ColourOracle()
    found = find_all(task.output, oracle, batches, images, "oracle", ALONE, SilentReporter())
    assert all(of.numbers().shape == (72, 96) for of in found)
    assert task.scores(images, images.classes, found).metrics["mIoU"] > 98  # edges are blurred


def test_windows_cover_everything_once_on_average() -> None:
    image = torch.rand(3, 70, 101, generator=torch.Generator().manual_seed(0)) * 255
    detect = ColourOracle().detect
    (whole,) = detect([image])
    for side in (32, 64, 200):
        by_windows = class_map_by_windows(detect, image, side, (70, 101))
        assert by_windows == class_map(whole, (70, 101))


@pytest.fixture(scope="module")
def finished_run(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    out = tmp_path_factory.mktemp("out") / "eval"
    settings = recipe(6, trials=2)
    return out, evaluate.run(settings, ["none"], str(root), out, device="cpu")


def test_every_output_is_there(finished_run: tuple[Path, Results], root: Path) -> None:
    out, results = finished_run
    table = (out / "table.txt").read_text()
    assert "mIoU" in table
    assert "IoU of class" in table
    assert results.classes == ["background", "red", "green"]
    assert set(results.results[0].metrics) == {"mIoU", "pixAcc", "mAcc"}
    for name in ("predictions.png", "curves.png", "01-none/analysis/confusion.png"):
        assert Image.open(out / name).width > 300
    # The legend begins with the blue of the first class, as it is over grey.
    assert Image.open(out / "predictions.png").getpixel((14, 14)) == (51, 120, 158)
    images = opened(root, "val")
    total = np.zeros((3, 3), dtype=np.int64)
    with zipfile.ZipFile(out / "01-none" / "seed-0" / "predictions.zip") as archive:
        assert json.loads(archive.read("image_ids.json")) == images.ids
        for number in range(4):
            found = np.array(Image.open(archive.open(f"{number:06d}.png")))
            mask = images.mask(number)
            for cell in zip(mask[mask != 255], found[mask != 255], strict=True):
                total[cell] += 1
    analysis = json.loads((out / "01-none" / "analysis" / "analysis.json").read_text())
    assert analysis["confusion"] == total.tolist()
    share = 100 * np.trace(total) / total.sum()
    assert results.results[0].trials[0].metrics["pixAcc"] == pytest.approx(share)
    assert not list(out.rglob("*.tmp"))
    assert Results.read(out) == results


def test_finished_trials_are_reused(finished_run: tuple[Path, Results], root: Path) -> None:
    out, before = finished_run
    (out / "results.json").unlink()  # as if it had been killed before the end
    reporter = Listening()
    again = evaluate.run(recipe(6, trials=2), ["none"], str(root), out, device="cpu",
                         reporter=reporter)  # fmt: skip
    assert again == before
    assert sum("finished before" in line for line in reporter.said) == 2


def same_trials(first: Path, second: Path) -> bool:
    name = Path("01-none/seed-0/predictions.zip")
    return (first / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True])
def test_interrupted_trial_continues_exactly(frozen: bool, root: Path, tmp_path: Path) -> None:
    settings = recipe(6)
    if frozen:
        detector = settings.detector.model_copy(update={"frozen": "res5"})
        settings = settings.model_copy(update={"detector": detector})
    whole = evaluate.run(settings, ["none"], str(root), tmp_path / "a", device="cpu")
    with pytest.raises(StoppedRunError, match="iteration 4 of 6"):
        evaluate.run(settings, ["none"], str(root), tmp_path / "b", device="cpu", stop_after=4)
    again = evaluate.run(settings, ["none"], str(root), tmp_path / "b", device="cpu")
    assert same_trials(tmp_path / "a", tmp_path / "b")
    assert again.results[0].metrics == whole.results[0].metrics
    assert not list((tmp_path / "b" / "features").glob("*"))


def test_stored_features_and_masks_are_mirrored_together(root: Path, tmp_path: Path) -> None:
    frozen = {"model": "fcn", "frozen": "res5", "new_norm": "batch"}
    settings, images = recipe(detector=frozen), opened(root)
    (compared,) = open_compared(["none"], "timm:test_resnet")
    features = open_features(
        tmp_path / "f", compared, settings, images, images, opened(root, "val"), images.classes,
        CPU, SilentReporter(),
    )  # fmt: skip
    read = SemanticLoading(images, settings, masks=True)
    mean, std = features.backbone.mean.view(3, 1, 1), features.backbone.std.view(3, 1, 1)
    batches = features.training_batches(images, settings, images.classes, seed=0, start=0)
    order, seen = SemanticOrder(8, settings, 0, 0, whole=True), set()
    for requests, batch in islice(zip(order, batches, strict=False), 3):
        for request, maps, target in zip(requests, batch.images, batch.targets, strict=True):
            loaded = read(request)
            assert isinstance(target, SemanticTarget)
            assert torch.equal(target.mask, loaded.targets[0].mask)
            pixels = normalised_batch(loaded.images, mean, std, 32)
            wanted = features.backbone.maps_of_normalised(pixels, ["res5"])["res5"][0]
            assert wanted.shape[1:] == (4, 6)  # dilated: 64 x 96 pixels at a stride of 16
            torch.testing.assert_close(maps.maps["res5"].float(), wanted, rtol=3e-3, atol=3e-3)
            seen.add(request.flip)
    assert seen == {False, True}


@pytest.mark.slow
def test_frozen_features_tell_colours_apart(root: Path, tmp_path: Path) -> None:
    """A random network shows colours, so that a head on it must beat the majority class."""
    done = dupr(
        "evaluate", "semantic", "none", "--data", root, "--out", tmp_path / "eval", "--frozen",
        "--iterations", 150, "--labels", "4,all", "--device", "cpu", "--workers", 0,
        "--set", "detector.backbone=timm:test_resnet", "--set", "semantic.short_side=96",
        "--set", "train.batch_size=4", "--set", "train.lr=0.01",
    )  # fmt: skip
    curves = LabelCurves.read(tmp_path / "eval")
    assert list(curves.curves) == ["mIoU", "pixAcc"]
    assert [point.labels for point in curves.curves["mIoU"]["01-none"]] == [4, 8]
    assert curves.curves["mIoU"]["01-none"][1].mean > 40  # 27 if all is background
    assert "mIoU with labels" in done.stdout
    assert "mIoU" in (tmp_path / "eval" / "labels-saved.tex").read_text()


def test_learning_rates_are_chosen_by_the_mean_iou(root: Path, tmp_path: Path) -> None:
    settings = recipe(2, train={**recipe(2).train.model_dump(), "lr_grid": [0.5, 1.0]})
    reporter = Listening()
    results = evaluate.run(
        settings, ["none"], str(root), tmp_path / "eval", device="cpu", reporter=reporter
    )
    assert any("lr 0.0" in said and "mIoU" in said for said in reporter.said)
    assert any("by mIoU on 25%" in note for note in results.notes)


def test_network_that_keeps_its_stride_is_named(root: Path, tmp_path: Path) -> None:
    settings = recipe(1, detector={"model": "fcn", "backbone": "timm:convnext_atto"})
    plan = evaluate.plan(settings, ["none"], str(root), tmp_path / "eval", device="cpu")
    assert "timm:convnext_atto: res5 cannot be dilated and keeps its stride of 32, where the " \
        "protocol has 16." in plan.notes  # fmt: skip


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(root: Path, tmp_path: Path) -> None:
    """Up to the order of sums: their losses are means over the pixels of both."""
    settings = recipe(2).model_dump(mode="json")
    settings["detector"]["new_norm"] = "sync"
    settings["train"]["log_every"] = 1
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(settings))
    words = [
        sys.executable, "-m", "dupr_cli", "evaluate", "semantic", "none", "-r", file, "--data",
        root, "--device", "cpu", "--out",
    ]  # fmt: skip
    dupr(*words[3:], tmp_path / "one")
    said = finished(ranks([str(word) for word in [*words, tmp_path / "two"]], 2))
    assert "Traceback" not in said
    losses = [
        [row["loss/segmentation"] for row in map(json.loads, file.read_text().splitlines())]
        for name in ("one", "two")
        for file in [tmp_path / name / "01-none" / "seed-0" / "metrics.jsonl"]
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_voc_runs_from_the_command_line(tmp_path: Path) -> None:
    tree = voc_year(tmp_path / "VOC2012", scenes(train=4, val=2))
    small = ("detector.backbone=timm:test_resnet", "semantic.short_side=64", "semantic.crop=64",
             "train.batch_size=2", "train.workers=0", "test.precise_bn_batches=1")  # fmt: skip
    done = dupr(
        "evaluate", "semantic", "none", "--data", tree, "--out", tmp_path / "eval", "--iterations",
        2, "--device", "cpu", *(word for key in small for word in ("--set", key)),
    )  # fmt: skip
    assert "aeroplane" in done.stdout
    results = Results.read(tmp_path / "eval")
    assert len(results.classes) == 21
    # Classes that are nowhere are not in the mean.
    assert set(results.results[0].per_class) <= {"background", "aeroplane", "bicycle"} | {
        name for name, of in results.results[0].per_class.items() if of == {"IoU": 0.0}
    }


def test_single_class_is_refused_with_its_cause(tmp_path: Path) -> None:
    mask = np.where(scene(0) == 0, 0, 255).astype(np.uint8)
    tree = plain_folder(tmp_path / "set", {"train": [mask], "val": [mask]}, names=())
    with pytest.raises(UsageError, match=r"a single class, class 0.*give a foreground the number"):
        evaluate.plan(recipe(), ["none"], str(tree), tmp_path / "eval", device="cpu")


def test_class_that_only_the_test_split_shows_is_reported(tmp_path: Path) -> None:
    made = {"train": [scene(1, classes=2)], "val": [scene(2, classes=3)]}
    tree = plain_folder(tmp_path / "set", made, save=save_grey)
    reporter = Listening()
    evaluate.plan(recipe(), ["none"], str(tree), tmp_path / "eval", device="cpu", reporter=reporter)
    assert any("green: these classes are in the split val only" in said for said in reporter.said)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"protocol": "voc"}, "protocol is voc, but the model is fcn; give semantic"),
        ({"test": {"metric": "voc07"}}, "test.metric is voc07, but the model is fcn; give miou"),
        ({"data": {"test_size": 64}}, "data.test_size is 64, which has no meaning for fcn"),
        ({"semantic": {"scale": [2, 1]}}, "it must be .smallest, largest., above 0"),
        ({"detector": {"model": "faster-rcnn-c4"}}, "semantic is set, but faster-rcnn-c4 finds"),
    ],
)
def test_keys_that_do_not_fit_are_refused(
    keys: dict[str, object], expected: str, tmp_path: Path
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        yaml.safe_dump({"stage": "evaluate", **recipe().model_dump(mode="json"), **keys})
    )

    with pytest.raises(RecipeError, match=expected):
        load_recipe(EvaluateRecipe, str(file))
