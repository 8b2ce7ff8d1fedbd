"""The detectors' losses and gradients against the reference, on a batch of two images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dupr_cli.evaluate.detectors import Target, build_detector
from dupr_cli.recipe import EvaluateRecipe
from dupr_cli.runtime.parallel import World
from tests.reference.detector_step import Objects, Reference, Settings

ALONE = World(torch.device("cpu"))
EVERYTHING = 100_000
CLASSES = 3
SIZES = {"c4": [16, 32, 48], "fpn": [8, 16, 32, 64, 128], "retinanet-fpn": [12, 24, 48, 96, 192]}


def recipe(model: str) -> EvaluateRecipe:
    return EvaluateRecipe.model_validate(
        {
            "detector": {
                "model": model,
                "norm": "frozen",
                "new_norm": "group" if "c4" in model else "none",
                "roi_size": 4,
                "mask_roi_size": 5,
                "anchor_sizes": SIZES.get(model, SIZES[model.split("-")[-1]]),
                "anchor_octaves": 3 if "retina" in model else 1,
                "pyramid_channels": 24,
                "rpn_batch_per_image": EVERYTHING,
                "rpn_pre_nms": [60, 60],
                "rpn_post_nms": [25, 25],
                "rois_per_image": EVERYTHING,
                "positive_fraction": 1.0,
            },
            "train": {"batch_size": 2},
            "test": {"metric": "coco"},
        }
    )


def scene() -> tuple[list[Tensor], list[Objects]]:
    """Two images of different sizes with objects of very different sizes and shapes."""
    generator = torch.Generator().manual_seed(4)
    sizes = ((96, 128), (80, 112))
    images = [
        torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in sizes
    ]
    boxes = [
        torch.tensor([[6.0, 10, 40, 70], [50, 20, 120, 60], [100, 70, 112, 84]]),
        torch.tensor([[20.0, 8, 90, 72]]),
    ]
    labels = [torch.tensor([0, 2, 1]), torch.tensor([1])]
    objects = []
    for of_image, label, (height, width) in zip(boxes, labels, sizes, strict=True):
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        masks = torch.stack(
            [
                (((x - (b[0] + b[2]) / 2) / (b[2] - b[0])) ** 2
                 + ((y - (b[1] + b[3]) / 2) / (b[3] - b[1])) ** 2) <= 0.25
                for b in of_image
            ]
        )  # fmt: skip
        objects.append(Objects(of_image, label, masks))
    return images, objects


@pytest.mark.parametrize(
    "model",
    ["faster-rcnn-c4", "mask-rcnn-c4", "faster-rcnn-fpn", "mask-rcnn-fpn", "retinanet-fpn"],
)
def test_losses_and_gradients_are_those_of_the_reference(model: str) -> None:
    settings = recipe(model)
    detector, _ = build_detector(settings, "resnet18", CLASSES, None, 3, ALONE)
    detector.train()
    images, objects = scene()
    if "mask" not in model:
        objects = [Objects(o.boxes, o.labels, None) for o in objects]
    with torch.no_grad():
        for name, parameter in detector.network.named_parameters():
            if any(part in name for part in ("cls_", "bbox_pred", "predictor")):
                parameter.mul_(3)  # the small start would hide what they are multiplied with
    found = detector.losses(images, [Target(o.boxes, o.labels, o.masks) for o in objects])

    d = settings.detector
    state = {
        k.removeprefix("head."): v.detach().clone()
        for k, v in detector.network.state_dict().items()
    }
    reference = Reference(
        state,
        Settings(CLASSES, d.anchor_sizes, d.roi_size, d.mask_roi_size, d.rpn_pre_nms[0],
                 d.rpn_post_nms[0]),
    )  # fmt: skip
    padded = torch.zeros(2, 3, 96, 128)
    mean, std = (torch.tensor(v)[:, None, None] for v in
                 ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))  # fmt: skip
    for place, image in zip(padded, images, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = (image / 255 - mean) / std
    shapes = [(int(image.shape[1]), int(image.shape[2])) for image in images]
    if "retina" in model:
        wanted = reference.retinanet(padded, objects)
    else:
        wanted = reference.two_stage(padded, objects, shapes, pyramid="fpn" in model)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert float(found[name]) == pytest.approx(float(value), rel=1e-4), name

    of_first = detector.network.get_parameter("backbone.conv1.weight")
    (ours,) = torch.autograd.grad(torch.stack(list(found.values())).sum(), of_first)
    (theirs,) = torch.autograd.grad(
        torch.stack(list(wanted.values())).sum(), reference.network.conv1.weight
    )
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-3
