"""Training of `evaluate voc` beside torchvision's reference loop: same network, images and batch.

The reference is torchvision's recipe for detection: its dataset of VOC trees, transforms v2, its
GeneralizedRCNN of the same parts, and the loop of its references/detection (loss read and checked
at every iteration). Images are resized to one size, so that both see the same pixels' worth.

make bench prints the rates; docs/benchmarks.md says what was seen, on what.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler
from torchvision.datasets import VOCDetection, wrap_dataset_for_transforms_v2
from torchvision.models import resnet18
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign
from torchvision.transforms import v2

from dupr_cli.datasets.labelled import LabelledSet, open_labelled
from dupr_cli.evaluate.detection_data import DetectionBatch
from dupr_cli.evaluate.detectors import build_detector
from dupr_cli.evaluate.tasks import training_batches
from dupr_cli.evaluate.training import Trial, train_detector
from dupr_cli.progress import SilentReporter
from dupr_cli.recipe import EvaluateRecipe, load_recipe
from dupr_cli.runtime.parallel import World
from tests.support.images import noise_image
from tests.support.labelled_scenes import add_split, annotation_xml

BATCH, ITERATIONS, ROUNDS, WORKERS = 8, 12, 5, 1
# Iterations before the clock starts: loader processes start, caches fill.
COLD = 2
# VOCDetection's classes: torchvision numbers them itself.
CLASSES = ("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
           "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
           "train", "tvmonitor")  # fmt: skip


def photographs(devkit: Path, count: int = 64) -> Path:
    """A tree of images of 500 x 375 with three objects each."""
    tree, random = devkit / "VOC2007", np.random.default_rng(0)
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (tree / folder).mkdir(parents=True)
    names = [f"{number:06d}" for number in range(count)]
    for number, name in enumerate(names):
        noise_image(number, 500, 375).save(tree / "JPEGImages" / f"{name}.jpg", quality=90)
        objects = []
        for _ in range(3):
            x, y = int(random.integers(1, 300)), int(random.integers(1, 200))
            w, h = (int(v) for v in random.integers(40, 170, 2))
            objects.append((CLASSES[int(random.integers(20))], x, y, x + w, y + h))
        (tree / "Annotations" / f"{name}.xml").write_text(
            annotation_xml(objects).replace("<annotation>", f"<annotation><filename>{name}.jpg"
                                            "</filename>")
        )  # fmt: skip
    add_split(tree, "train", names)
    return tree


def recipe() -> EvaluateRecipe:
    return load_recipe(
        EvaluateRecipe,
        "voc-tiny",
        [
            "data.train_sizes=[160]",
            f"train.iterations={ITERATIONS}",
            f"train.batch_size={BATCH}",
            "train.milestones=[]",
            f"train.workers={WORKERS}",
            "train.checkpoint_every=1000",
            "train.log_every=1000",
        ],
    )


class Clock:
    """Passes batches on; the time from batch COLD to the last, per iteration."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self._batches, self._marks = batches, list[float]()

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            self._marks.append(time.perf_counter())
            yield batch

    @property
    def seconds(self) -> float:
        return (self._marks[-1] - self._marks[COLD]) / (len(self._marks) - 1 - COLD)


class Res5Head(nn.Module):
    def __init__(self, res5: nn.Module) -> None:
        super().__init__()
        self.res5, self.norm = res5, nn.BatchNorm2d(512)

    def forward(self, regions: Tensor) -> Tensor:
        vectors: Tensor = self.norm(self.res5(regions)).mean(dim=(2, 3))
        return vectors


def torchvision_model(settings: EvaluateRecipe) -> nn.Module:
    """The detector of voc-tiny in torchvision's own classes."""
    d, t = settings.detector, settings.test
    network = resnet18()
    backbone = IntermediateLayerGetter(network, {"layer3": "0"})
    anchors = AnchorGenerator((tuple(d.anchor_sizes),), (tuple(d.anchor_ratios),))
    rpn = RegionProposalNetwork(
        anchors, RPNHead(256, anchors.num_anchors_per_location()[0]), 0.7, 0.3,
        d.rpn_batch_per_image, 0.5,
        {"training": d.rpn_pre_nms[0], "testing": d.rpn_pre_nms[1]},
        {"training": d.rpn_post_nms[0], "testing": d.rpn_post_nms[1]}, 0.7,
    )  # fmt: skip
    heads = RoIHeads(
        MultiScaleRoIAlign(["0"], d.roi_size, 0), Res5Head(network.layer4),
        FastRCNNPredictor(512, len(CLASSES) + 1), 0.5, 0.5, d.rois_per_image, d.positive_fraction,
        None, t.score_threshold, t.nms_iou, t.detections_per_image,
    )  # fmt: skip
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    transform = GeneralizedRCNNTransform(160, settings.data.max_size, mean, std)
    model: nn.Module = GeneralizedRCNN(backbone, rpn, heads, transform)
    return model


def collate(samples: list[Any]) -> tuple[Any, ...]:
    return tuple(zip(*samples, strict=True))


def reference_batches(devkit: Path) -> Iterator[Any]:
    transforms = v2.Compose(
        [v2.PILToTensor(), v2.RandomHorizontalFlip(0.5), v2.ToDtype(torch.float, scale=True),
         v2.ToPureTensor()]
    )  # fmt: skip
    dataset = VOCDetection(str(devkit.parent), "2007", "train", transforms=transforms)
    wrapped = wrap_dataset_for_transforms_v2(dataset, target_keys=("boxes", "labels"))
    sampler = RandomSampler(wrapped, num_samples=BATCH * ITERATIONS)
    return iter(DataLoader(wrapped, BATCH, sampler=sampler, num_workers=WORKERS,
                           collate_fn=collate))  # fmt: skip


def reference_seconds(devkit: Path, settings: EvaluateRecipe) -> float:
    torch.manual_seed(0)
    model = torchvision_model(settings).train()
    train = settings.train
    optimizer = torch.optim.SGD(
        model.parameters(), train.lr, momentum=train.momentum, weight_decay=train.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=train.warmup)
    clock = Clock(reference_batches(devkit))
    device = torch.device("cpu")
    for images, targets in clock:
        on_device = [image.to(device) for image in images]
        moved = [{key: value.to(device) for key, value in t.items()} for t in targets]
        loss = sum(model(on_device, moved).values())
        assert isinstance(loss, Tensor)
        assert math.isfinite(loss.item())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    return clock.seconds


def our_seconds(images: LabelledSet, settings: EvaluateRecipe) -> float:
    alone, classes = World(torch.device("cpu")), list(CLASSES)
    detector, _ = build_detector(settings, "resnet18", len(classes), None, 0, alone)
    clocks: list[Clock] = []

    def batches_from(start: int) -> Generator[DetectionBatch, None, None]:
        clocks.append(Clock(training_batches(images, settings, classes, 0, start, alone)))
        yield from clocks[0]

    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(detector, settings, 0, "ours", Path(folder), alone)
        train_detector(trial, batches_from, SilentReporter())
    return clocks[0].seconds


def test_training_beside_the_reference_loop_of_torchvision() -> None:
    settings = recipe()
    with tempfile.TemporaryDirectory() as name:
        tree = photographs(Path(name) / "VOCdevkit")
        images = open_labelled(str(tree), ["train"], SilentReporter())
        ours, theirs = [], []
        for _ in range(ROUNDS):
            theirs.append(reference_seconds(tree.parent, settings))
            ours.append(our_seconds(images, settings))
    ratios = [their / our for our, their in zip(ours, theirs, strict=True)]
    print(
        f"\nevaluate voc {1 / statistics.median(ours):.2f} it/s, torchvision's loop "
        f"{1 / statistics.median(theirs):.2f} it/s; ratio {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f})"
    )
    assert all(ratio > 0 for ratio in ratios)
