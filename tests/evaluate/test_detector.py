"""The detector: where its weights come from, what is shared, what is normalised how."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from dupr_cli.artifacts.weights import Weights, WeightsMetadata
from dupr_cli.backbones import ResNetBackbone
from dupr_cli.errors import RunError, UsageError
from dupr_cli.evaluate.batches import Batch
from dupr_cli.evaluate.detector import Detector, RegionPooling, build_detector
from dupr_cli.evaluate.training import learning_rate, measure_batch_norm, train_detector
from dupr_cli.progress import SilentReporter
from dupr_cli.recipe import EvaluateRecipe


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
            nn.init.uniform_(module.running_mean, -1, 1)  # type: ignore[arg-type]
    metadata = WeightsMetadata("torchvision", "resnet18", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 64)
    return Weights("some.safetensors", metadata, backbone.state_dict())


def batch(seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = [
        torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
        for size in ((3, 64, 80), (3, 50, 70))
    ]
    boxes = [torch.tensor([[5.0, 5, 40, 40], [30, 10, 60, 50]]), torch.tensor([[0.0, 0, 20, 20]])]
    return Batch(images, boxes, [torch.tensor([0, 2]), torch.tensor([1])])


def test_head_sizes_follow_backbone_and_recipe() -> None:
    shapes = {
        name: tuple(parameter.shape)
        for name, parameter in build_detector(recipe(), "resnet18", 3, None).named_parameters()
    }
    assert shapes["backbone.layer4.1.conv2.weight"] == (512, 512, 3, 3)
    assert shapes["rpn.head.conv.0.0.weight"] == (256, 256, 3, 3)
    assert shapes["rpn.head.cls_logits.weight"] == (6, 256, 1, 1)  # 2 sizes x 3 ratios
    assert shapes["roi_heads.box_head.norm.weight"] == (512,)
    assert shapes["roi_heads.box_predictor.cls_score.weight"] == (4, 512)  # with background
    assert shapes["roi_heads.box_predictor.bbox_pred.weight"] == (16, 512)


def test_res5_of_the_backbone_is_the_box_head() -> None:
    detector = build_detector(recipe(), "resnet18", 3, None)
    assert detector.roi_heads.box_head.res5 is detector.backbone.stage("res5")
    assert not any("box_head.res5" in name for name, _ in detector.named_parameters())


def test_every_backbone_tensor_comes_from_the_weights() -> None:
    weights = random_weights()
    state = build_detector(recipe(), "resnet18", 3, weights).backbone.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.tensors.items())


def test_one_missing_tensor_is_refused() -> None:
    weights = random_weights()
    del weights.tensors["layer3.0.conv1.weight"]
    with pytest.raises(UsageError, match=r"layer3\.0\.conv1\.weight"):
        build_detector(recipe(), "resnet18", 3, weights)


def test_compared_weights_start_from_the_same_heads() -> None:
    one = build_detector(recipe(), "resnet18", 3, None)
    other = build_detector(recipe(), "resnet18", 3, random_weights())
    state = other.state_dict()
    for name, tensor in one.state_dict().items():
        if not name.startswith(("backbone.", "roi_heads.box_head.res5.")):
            assert torch.equal(tensor, state[name]), name


def test_images_are_normalised_by_the_weights_statistics_and_padded_with_the_mean() -> None:
    detector = build_detector(recipe(), "resnet18", 3, random_weights())
    padded = detector._normalised([torch.full((3, 20, 30), 255, dtype=torch.uint8)])
    assert padded.tensors.shape == (1, 3, 32, 32)
    expected = [(1 - 0.1) / 0.4, (1 - 0.2) / 0.5, (1 - 0.3) / 0.6]
    assert padded.tensors[0, :, 19, 29].tolist() == pytest.approx(expected)
    assert padded.tensors[0, :, 20:].abs().sum() == 0


def test_region_pooling_has_no_half_cell_shift() -> None:
    """Features that are their own x coordinate: a region's cells give the x of their centres."""
    centres = (torch.arange(20) + 0.5) * 16
    features = {"res4": centres.expand(1, 1, 20, 20)}
    pooled = RegionPooling(4)(features, [torch.tensor([[64.0, 64, 192, 192]])], [(320, 320)])
    assert pooled[0, 0, 0].tolist() == pytest.approx([80, 112, 144, 176])


def test_frozen_norms_are_constant_and_the_extra_one_learns() -> None:
    weights = random_weights()
    frozen = recipe(detector={"norm": "frozen"})
    detector = build_detector(frozen, "resnet18", 3, weights)
    kinds = {type(m) for m in detector.backbone.modules() if "Norm" in type(m).__name__}
    assert kinds == {FrozenBatchNorm2d}
    train_detector(detector, [batch()] * 3, frozen, "frozen", SilentReporter())
    state = detector.backbone.state_dict()
    name = "layer4.0.bn1.running_mean"
    assert torch.equal(state[name], weights.tensors[name])
    assert detector.roi_heads.box_head.norm.weight.sub(1).abs().max() > 0


def test_training_is_deterministic_on_a_cpu() -> None:
    def losses() -> list[float]:
        detector = build_detector(recipe(), "resnet18", 3, None)
        records = train_detector(
            detector, [batch(n) for n in range(3)], recipe(), "none", SilentReporter()
        )
        return [record.total for record in records]

    assert losses() == losses()


def test_losses_are_averaged_between_records() -> None:
    detector = build_detector(recipe(), "resnet18", 3, None)
    records = train_detector(detector, [batch()] * 3, recipe(), "none", SilentReporter())
    assert [record.iteration for record in records] == [2, 3]
    assert len(records[0].losses) == 4


def test_detector_overfits_one_batch() -> None:
    settings = recipe(train={"iterations": 25, "lr": 0.02, "log_every": 5})
    detector = build_detector(settings, "resnet18", 3, None)
    records = train_detector(detector, [batch()] * 25, settings, "none", SilentReporter())
    assert records[-1].total < 0.6 * records[0].total


def test_loss_that_is_not_finite_stops_the_run() -> None:
    detector = build_detector(recipe(), "resnet18", 3, None)
    nn.init.constant_(detector.roi_heads.box_predictor.cls_score.weight, float("nan"))
    with pytest.raises(RunError, match=r"loss_classifier nan at iteration 1.*train\.lr"):
        train_detector(detector, [batch()], recipe(), "none", SilentReporter())


def test_precise_statistics_are_a_plain_mean_over_batches() -> None:
    detector = build_detector(recipe(), "resnet18", 3, None)
    first = detector.backbone.bn1
    seen: list[torch.Tensor] = []
    detector.backbone.conv1.register_forward_hook(
        lambda _module, _inputs, output: seen.append(output.detach().mean(dim=(0, 2, 3)))
    )
    measure_batch_norm(detector, [batch(0), batch(1)], recipe(), "none", SilentReporter())
    assert torch.allclose(first.running_mean, torch.stack(seen).mean(0), atol=1e-5)  # type: ignore[arg-type]
    assert first.momentum == 0.1


def test_learning_rate_rises_and_falls() -> None:
    train = EvaluateRecipe.model_validate(
        {"train": {"iterations": 100, "lr": 1.0, "warmup": 10, "milestones": [50, 80]}}
    ).train
    rates = [learning_rate(train, iteration) for iteration in (0, 9, 49, 50, 79, 80)]
    assert rates == pytest.approx([0.1, 1, 1, 0.1, 0.1, 0.01])


def test_detections_stay_inside_the_image() -> None:
    detector: Detector = build_detector(
        recipe(test={"score_threshold": 0.0}), "resnet18", 3, None
    ).eval()
    with torch.inference_mode():
        (found,) = detector.detect([torch.zeros(3, 50, 70, dtype=torch.uint8)])
    assert len(found["boxes"])
    assert found["boxes"].min() >= 0
    assert (found["boxes"].amax(0) <= torch.tensor([70, 50, 70, 50])).all()
    assert set(found["labels"].tolist()) <= {0, 1, 2}
