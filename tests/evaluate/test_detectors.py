"""The detectors: where their weights come from, what is shared, what is normalised how."""

from __future__ import annotations

from collections.abc import Generator
from itertools import cycle, islice
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d, box_iou

from dupr_cli.artifacts.weights import Weights, WeightsMetadata
from dupr_cli.errors import RunError, UsageError
from dupr_cli.evaluate.detection_data import DetectionBatch
from dupr_cli.evaluate.detectors import Detector, HeadOutput, Target, build_detector
from dupr_cli.evaluate.detectors.names import detectron2_names
from dupr_cli.evaluate.detectors.regions import RegionPooling
from dupr_cli.evaluate.detectors.roi_heads import select_detections
from dupr_cli.evaluate.training import (
    LossRecord,
    Trial,
    learning_rate,
    make_optimizer,
    measure_batch_norm,
    train_detector,
)
from dupr_cli.models.resnet import ResNetBackbone
from dupr_cli.progress import SilentReporter
from dupr_cli.recipe import EvaluateRecipe
from dupr_cli.runtime.parallel import World

ALONE = World(torch.device("cpu"))


def recipe(**sections: dict[str, object]) -> EvaluateRecipe:
    small: dict[str, dict[str, object]] = {
        "detector": {
            "roi_size": 4,
            "anchor_sizes": [16, 32],
            "rpn_batch_per_image": 16,
            "rpn_pre_nms": [50, 50],
            "rpn_post_nms": [20, 20],
            "rois_per_image": 8,
        },
        "train": {"iterations": 3, "milestones": [], "batch_size": 2, "warmup": 0, "log_every": 2},
        "test": {"precise_bn_batches": 2},
    }
    for name, values in sections.items():
        small[name] = {**small[name], **values}
    return EvaluateRecipe.model_validate(small)


def random_weights(seed: int = 1) -> Weights:
    torch.manual_seed(seed)
    backbone = ResNetBackbone("resnet18")
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            nn.init.uniform_(module.running_mean, -1, 1)
    metadata = WeightsMetadata("torchvision", "resnet18", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 64)
    return Weights("some.safetensors", metadata, backbone.state_dict())


def built(settings: EvaluateRecipe, weights: Weights | None = None, seed: int = 0) -> Detector:
    return build_detector(settings, "resnet18", 3, weights, seed, ALONE)[0]


def trained(
    settings: EvaluateRecipe,
    folder: Path,
    batches: list[DetectionBatch] | None = None,
    weights: Weights | None = None,
    detector: Detector | None = None,
) -> list[LossRecord]:
    """Losses of a training on the batches, over and over."""
    detector = detector or built(settings, weights)
    trial = Trial(detector, settings, 0, "some", folder, ALONE)
    given = batches or [batch()]

    def batches_from(start: int) -> Generator[DetectionBatch, None, None]:
        yield from islice(cycle(given), start, None)

    train_detector(trial, batches_from, SilentReporter())
    return trial.losses()


def batch(seed: int = 0) -> DetectionBatch:
    generator = torch.Generator().manual_seed(seed)
    images = [
        torch.randint(0, 80, size, generator=generator, dtype=torch.uint8)
        for size in ((3, 64, 80), (3, 50, 70))
    ]
    boxes = [torch.tensor([[5.0, 5, 40, 40], [45, 10, 75, 50]]), torch.tensor([[4.0, 4, 36, 36]])]
    labels = [torch.tensor([0, 2]), torch.tensor([1])]
    targets = []
    for image, b, label in zip(images, boxes, labels, strict=True):
        masks = torch.zeros(len(b), *image.shape[1:], dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(masks, b.long().tolist(), strict=True):
            mask[y0:y1, x0:x1] = True
        for channel, mask in zip(label.tolist(), masks, strict=True):
            image[channel][mask] += 170
        targets.append(Target(b, label, masks))
    return DetectionBatch(images, targets)


def test_head_sizes_follow_backbone_and_recipe() -> None:
    shapes = {
        name: tuple(parameter.shape)
        for name, parameter in built(recipe()).network.named_parameters()
    }
    assert shapes["backbone.layer4.1.conv2.weight"] == (512, 512, 3, 3)
    assert shapes["rpn.head.conv.0.0.weight"] == (256, 256, 3, 3)
    assert shapes["rpn.head.cls_logits.weight"] == (6, 256, 1, 1)  # 2 sizes x 3 ratios
    assert shapes["roi_heads.head.norm.weight"] == (512,)
    assert shapes["roi_heads.box_predictor.cls_score.weight"] == (4, 512)  # with background
    assert shapes["roi_heads.box_predictor.bbox_pred.weight"] == (12, 512)


def test_res5_of_the_backbone_is_the_box_head() -> None:
    detector = built(recipe())
    head = detector.network.get_submodule("roi_heads.head")
    assert head.res5 is detector.backbone.get_submodule("layer4")
    assert not any("head.res5" in name for name, _ in detector.named_parameters())


def test_every_backbone_tensor_comes_from_the_weights() -> None:
    weights = random_weights()
    state = built(recipe(), weights).backbone.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.tensors.items())


def test_one_missing_tensor_is_refused() -> None:
    weights = random_weights()
    del weights.tensors["layer3.0.conv1.weight"]
    with pytest.raises(UsageError, match=r"layer3\.0\.conv1\.weight"):
        built(recipe(), weights)


def test_compared_weights_start_from_the_same_heads() -> None:
    one = built(recipe())
    other = built(recipe(), random_weights())
    state = other.state_dict()
    for name, tensor in one.state_dict().items():
        if not name.startswith(("network.backbone.", "network.roi_heads.head.res5.")):
            assert torch.equal(tensor, state[name]), name


def test_images_are_normalised_by_the_weights_statistics_and_padded_with_the_mean() -> None:
    detector = built(recipe(), random_weights())
    padded = detector.normalised([torch.full((3, 20, 30), 255, dtype=torch.uint8)])
    assert padded.tensors.shape == (1, 3, 32, 32)
    expected = [(1 - 0.1) / 0.4, (1 - 0.2) / 0.5, (1 - 0.3) / 0.6]
    assert padded.tensors[0, :, 19, 29].tolist() == pytest.approx(expected)
    assert padded.tensors[0, :, 20:].abs().sum() == 0


def test_region_pooling_has_no_half_cell_shift() -> None:
    """Features that are their own x coordinate: a region's cells give the x of their centres."""
    centres = (torch.arange(20) + 0.5) * 16
    features = [centres.expand(1, 1, 20, 20)]
    pooled = RegionPooling(4, [16])(features, [torch.tensor([[64.0, 64, 192, 192]])])
    assert pooled[0, 0, 0].tolist() == pytest.approx([80, 112, 144, 176])


def test_frozen_norms_are_constant_and_the_extra_one_learns(tmp_path: Path) -> None:
    weights = random_weights()
    frozen = recipe(detector={"norm": "frozen"})
    detector = built(frozen, weights)
    kinds = {type(m) for m in detector.backbone.modules() if "Norm" in type(m).__name__}
    assert kinds == {FrozenBatchNorm2d}
    trained(frozen, tmp_path, detector=detector)
    state = detector.backbone.state_dict()
    name = "layer4.0.bn1.running_mean"
    assert torch.equal(state[name], weights.tensors[name])
    scale = detector.network.get_parameter("roi_heads.head.norm.weight")
    assert scale.sub(1).abs().max() > 0


def test_training_is_deterministic_on_a_cpu(tmp_path: Path) -> None:
    batches = [batch(n) for n in range(3)]
    one, other = (trained(recipe(), tmp_path / name, batches) for name in "ab")
    assert [record.total for record in one] == [record.total for record in other]


def test_losses_are_averaged_between_records(tmp_path: Path) -> None:
    records = trained(recipe(), tmp_path)
    assert [record.iteration for record in records] == [2, 3]
    assert len(records[0].losses) == 4


MODELS: dict[str, dict[str, object]] = {
    "faster-rcnn-c4": {},
    "mask-rcnn-c4": {},
    "faster-rcnn-fpn": {"anchor_sizes": [8, 16, 32, 64, 128], "pyramid_channels": 64},
    "mask-rcnn-fpn": {
        "anchor_sizes": [8, 16, 32, 64, 128],
        "mask_roi_size": 4,
        "pyramid_channels": 64,
    },
    "retinanet-fpn": {
        "anchor_sizes": [16, 32, 64, 128, 256],
        "anchor_octaves": 3,
        "pyramid_channels": 64,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_every_detector_learns_one_batch_by_heart(model: str, tmp_path: Path) -> None:
    """Boxes, classes and masks, through training, precise batch norm and testing."""
    settings = recipe(
        detector={
            "model": model,
            "pyramid_channels": 64,
            "roi_size": 4,
            "rois_per_image": 16,
            **MODELS[model],
        },
        train={"iterations": 180 if "retina" in model else 40, "lr": 0.02, "warmup": 10},
        test={"metric": "coco", "score_threshold": 0.1, "precise_bn_batches": 1},
    )
    detector, shown = built(settings), batch()
    trained(settings, tmp_path, detector=detector)
    trial = Trial(detector, settings, 0, "some", tmp_path, ALONE)
    measure_batch_norm(trial, iter([shown]), SilentReporter())
    detector.eval()
    with torch.inference_mode():
        found = cast("list[HeadOutput]", detector.detect(shown.images))
    for target, of_image in zip(shown.targets, found, strict=True):
        for number, (box, label) in enumerate(zip(target.boxes, target.labels, strict=True)):
            iou = box_iou(box[None], of_image.boxes)[0]
            right = (iou > 0.5) & (of_image.labels == label)
            assert right.any(), (number, of_image)
            if of_image.masks is not None:
                mask = of_image.masks[int((iou * right).argmax())]
                assert mask.mean() > 0.7  # the objects fill their boxes


@pytest.mark.parametrize("new_norm", ["batch", "group"])
def test_norms_have_no_weight_decay_and_everything_else_has(new_norm: str) -> None:
    settings = recipe(detector={"new_norm": new_norm}, train={"weight_decay": 0.07})
    detector = built(settings)
    decay = {
        id(parameter): group["weight_decay"]
        for group in make_optimizer(detector, settings.train).param_groups
        for parameter in group["params"]
    }
    norms = {
        f"{name}.{kind}"
        for name, module in detector.named_modules()
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm)
        for kind in ("weight", "bias")
    }
    assert "network.roi_heads.head.norm.weight" in norms
    for name, parameter in detector.named_parameters():
        assert decay.pop(id(parameter)) == (0 if name in norms else 0.07), name
    assert not decay


def test_detections_of_a_class_that_overlap_by_half_are_one() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 6], [0, 0, 10, 4.5], [40, 40, 50, 50]])
    scores = torch.tensor([[0.9, 0.0], [0.8, 0.7], [0.6, 0.0], [0.3, 0.0]])
    every = boxes[:, None].expand(-1, 2, -1)  # IoU with the first: 0.6, 0.45, 0
    found = select_detections(every, scores, (60, 60), recipe().test)
    assert found.scores.tolist() == pytest.approx([0.9, 0.7, 0.6, 0.3])
    assert found.labels.tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("norm", ["sync", "batch", "group", "none"])
def test_new_norms(norm: str, tmp_path: Path) -> None:
    settings = recipe(detector={"new_norm": norm, "model": "faster-rcnn-c4"})
    kind = type(built(settings).network.get_submodule("roi_heads.head.norm"))
    assert kind is {"group": nn.GroupNorm, "none": nn.Identity}.get(norm, nn.BatchNorm2d)


def test_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    detector = built(recipe())
    classifier = detector.network.get_parameter("roi_heads.box_predictor.cls_score.weight")
    nn.init.constant_(classifier, float("nan"))
    with pytest.raises(RunError, match=r"loss_classifier nan.* at iteration 2.*train\.lr"):
        trained(recipe(), tmp_path, detector=detector)


def test_precise_statistics_are_a_plain_mean_over_batches(tmp_path: Path) -> None:
    detector = built(recipe())
    first = detector.backbone.get_submodule("bn1")
    seen: list[torch.Tensor] = []
    detector.backbone.get_submodule("conv1").register_forward_hook(
        lambda _module, _inputs, output: seen.append(output.detach().mean(dim=(0, 2, 3)))
    )
    trial = Trial(detector, recipe(), 0, "none", tmp_path, ALONE)
    measure_batch_norm(trial, iter([batch(0), batch(1)]), SilentReporter())
    assert torch.allclose(first.get_buffer("running_mean"), torch.stack(seen).mean(0), atol=1e-5)
    assert first.momentum == 0.1


def test_learning_rate_rises_and_falls() -> None:
    train = EvaluateRecipe.model_validate(
        {"train": {"iterations": 100, "lr": 1.0, "warmup": 10, "milestones": [50, 80]}}
    ).train
    rates = [learning_rate(train, iteration) for iteration in (0, 9, 49, 50, 79, 80)]
    assert rates == pytest.approx([0.1, 1, 1, 0.1, 0.1, 0.01])


def test_detections_stay_inside_the_image() -> None:
    detector = built(recipe(test={"score_threshold": 0.0})).eval()
    with torch.inference_mode():
        image = torch.zeros(3, 50, 70, dtype=torch.uint8)
        (found,) = cast("list[HeadOutput]", detector.detect([image]))
    assert len(found.boxes)
    assert found.boxes.min() >= 0
    assert (found.boxes.amax(0) <= torch.tensor([70, 50, 70, 50])).all()
    assert set(found.labels.tolist()) <= {0, 1, 2}


def test_regions_take_the_level_of_their_size() -> None:
    """Maps that hold their own number: 224 pixels belong to stride 16, half of it to stride 8."""
    strides = [4, 8, 16, 32]
    maps = [torch.full((1, 1, 640 // s, 640 // s), float(s)) for s in strides]
    sides = [20.0, 111, 113, 223, 225, 447, 449, 600]
    boxes = torch.tensor([[10, 10, 10 + side, 10 + side] for side in sides])
    pooled = RegionPooling(2, strides)(maps, [boxes])
    assert pooled[:, 0, 0, 0].tolist() == [4, 4, 8, 8, 16, 16, 32, 32]


def _norm(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    parts = ("weight", "bias", "running_mean", "running_var")
    shapes: dict[str, tuple[int, ...]] = {f"{name}.norm.{part}": (channels,) for part in parts}
    return {**shapes, f"{name}.norm.num_batches_tracked": ()}


def _convolution(name: str, out: int, into: int, side: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into, side, side), **_norm(name, out)}


def detectron2_r50_c4(classes: int, masks: bool) -> dict[str, tuple[int, ...]]:
    """Tensors of detectron2's R50-C4 with batch norm and MoCo's extra norm, as facts.

    Source: detectron2 0.6, modeling/backbone/resnet.py (BasicStem, BottleneckBlock, make_stage
    with 3, 4, 6, 3 blocks), proposal_generator/rpn.py (StandardRPNHead), roi_heads/roi_heads.py
    (Res5ROIHeads), fast_rcnn.py and mask_head.py; MoCo's detection/train_net.py.
    """
    table = _convolution("backbone.stem.conv1", 64, 3, 7)
    into = 64
    for stage, blocks, width in ((2, 3, 64), (3, 4, 128), (4, 6, 256), (5, 3, 512)):
        prefix = "roi_heads" if stage == 5 else "backbone"
        for block in range(blocks):
            place = f"{prefix}.res{stage}.{block}"
            if block == 0:
                table |= _convolution(f"{place}.shortcut", 4 * width, into, 1)
            table |= _convolution(f"{place}.conv1", width, into, 1)
            table |= _convolution(f"{place}.conv2", width, width, 3)
            table |= _convolution(f"{place}.conv3", 4 * width, width, 1)
            into = 4 * width
    table |= _norm("roi_heads.res5", 2048)
    head = "proposal_generator.rpn_head"
    for name, out, side in (("conv", 1024, 3), ("objectness_logits", 15, 1),
                            ("anchor_deltas", 60, 1)):  # fmt: skip
        table |= {f"{head}.{name}.weight": (out, 1024, side, side), f"{head}.{name}.bias": (out,)}
    for name, out in (("cls_score", classes + 1), ("bbox_pred", 4 * classes)):
        place = f"roi_heads.box_predictor.{name}"
        table |= {f"{place}.weight": (out, 2048), f"{place}.bias": (out,)}
    if masks:
        place = "roi_heads.mask_head"
        table |= {f"{place}.deconv.weight": (2048, 256, 2, 2), f"{place}.deconv.bias": (256,)}
        table |= {
            f"{place}.predictor.weight": (classes, 256, 1, 1),
            f"{place}.predictor.bias": (classes,),
        }
    return table


@pytest.mark.parametrize(("model", "classes"), [("faster-rcnn-c4", 20), ("mask-rcnn-c4", 80)])
def test_r50_c4_has_the_tensors_of_detectron2s(model: str, classes: int) -> None:
    settings = EvaluateRecipe.model_validate(
        {"detector": {"model": model}, "test": {"metric": "coco"}}
    )
    detector, _ = build_detector(settings, "resnet50", classes, None, 0, ALONE)
    state = detector.state_dict()
    names = detectron2_names(detector)
    own = {theirs: tuple(state[ours].shape) for ours, theirs in names.items()}
    expected = detectron2_r50_c4(classes, "mask" in model)
    assert own == expected
    learned = sum(p.numel() for p in detector.parameters())
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert learned == sum(
        torch.Size(shape).numel()
        for name, shape in expected.items()
        if not name.endswith(statistics)
    )


def test_all_tensors_of_the_weights_arrive_and_are_counted() -> None:
    _, loaded = build_detector(recipe(), "resnet18", 3, random_weights(), 0, ALONE)
    assert loaded == len(ResNetBackbone("resnet18").state_dict()) == 120
