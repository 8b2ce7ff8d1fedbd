"""RT-DETR v2 and D-FINE: transformers' own networks, on their own images, are the oracle."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from dupr_cli import evaluate
from dupr_cli.artifacts.weights import read_weights
from dupr_cli.datasets.labelled import LabelledSet, open_labelled
from dupr_cli.errors import StoppedRunError, UsageError
from dupr_cli.evaluate.architectures import check_architecture
from dupr_cli.evaluate.detection_data import DetectionBatch, ImageLoading, ImageRequest
from dupr_cli.evaluate.detectors import Detector, Target, build_detector
from dupr_cli.evaluate.detectors.detr import QueryHead
from dupr_cli.evaluate.inference import in_source_pixels
from dupr_cli.evaluate.training import Trial, make_optimizer, train_detector
from dupr_cli.metrics import Metric, score
from dupr_cli.models.backbone import as_backbone
from dupr_cli.progress import SilentReporter
from dupr_cli.recipe import EvaluateRecipe, load_recipe
from dupr_cli.recipe.base import LEVEL_STRIDES, Level
from dupr_cli.runtime.parallel import World
from tests.support.command_line import dupr
from tests.support.labelled_scenes import make_tree
from tests.support.weights import random_weights

transformers = pytest.importorskip("transformers", reason="the extra `transformers` has these")

MODELS = ["rtdetr-v2", "d-fine"]
LEVELS: tuple[Level, ...] = ("res3", "res4", "res5")
STRIDES = {level: LEVEL_STRIDES[level] for level in LEVELS}
ALONE = World(torch.device("cpu"))
SIZE = (64, 96)  # height, width
PIXELS = torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(0))
BOXES = torch.tensor([[4.0, 6, 40, 50], [50, 10, 90, 60]])
NETWORK = "timm:test_resnet"  # of 0.4 million parameters


def recipe(model: str, **sections: dict[str, object]) -> EvaluateRecipe:
    """A small network on squares of 64 pixels, for two iterations."""
    small: dict[str, dict[str, object]] = {
        "detector": {
            "model": model,
            "backbone": NETWORK,
            "query": {
                "width": 32,
                "feedforward": 32,
                "expansion": 0.5,
                "decoder_layers": 2,
                "queries": 20,
                "denoising": 8,
            },
        },
        "data": {"square": True, "train_sizes": [64], "test_size": 64},
        "train": {
            "iterations": 2,
            "batch_size": 2,
            "optimizer": "adamw",
            "lr": 0.001,
            "milestones": [],
            "warmup": 0,
            "workers": 0,
        },
        "test": {"precise_bn_batches": 2, "pictures": 0, "score_threshold": 0.0},
    }
    for name, values in sections.items():
        small[name] = {**small[name], **values}
    return EvaluateRecipe.model_validate(small)


def targets() -> list[Target]:
    return [
        Target(BOXES, torch.tensor([0, 2])),
        Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)),
    ]


class Channels(nn.Module):
    """The shape of a backbone whose maps have 8 channels."""

    channels, strides = dict.fromkeys(LEVELS, 8), STRIDES


def oracle(model: str) -> Any:
    """transformers' detector with its own backbone, as its documentation builds it."""
    shared = {
        "num_labels": 3,
        "backbone_config": transformers.RTDetrResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 8, 8, 8],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            out_features=["stage2", "stage3", "stage4"],
        ),
        "encoder_hidden_dim": 32,
        "decoder_in_channels": [32, 32, 32],
        "d_model": 32,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "hidden_expansion": 0.5,
        "decoder_layers": 2,
        "num_queries": 20,
        "num_denoising": 8,
    }
    if model == "d-fine":
        config = transformers.DFineConfig(**shared, decoder_n_points=[3, 6, 3])
        return transformers.DFineForObjectDetection(config)
    return transformers.RTDetrV2ForObjectDetection(transformers.RTDetrV2Config(**shared))


def randomised(network: nn.Module) -> None:
    """Far from the initial values, at which every box is its anchor and all scores are alike."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.requires_grad and "sampling_offsets" not in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("model", MODELS)
def test_losses_and_detections_are_transformers(model: str) -> None:
    theirs = oracle(model)
    randomised(theirs)
    ours = QueryHead(as_backbone(Channels()), 3, recipe(model), ALONE)
    state = theirs.model.state_dict()
    ours.network.load_state_dict({k: v for k, v in state.items() if not k.startswith("backbone")})
    labels = [
        {
            "class_labels": t.labels,
            "boxes": box_convert(t.boxes, "xyxy", "cxcywh") / torch.tensor([96, 64, 96, 64]),
        }
        for t in targets()
    ]

    def maps() -> dict[Level, Tensor]:
        found = theirs.model.backbone(PIXELS, torch.ones(2, *SIZE))
        return {level: values for level, (values, _) in zip(LEVELS, found, strict=True)}

    theirs.train()
    torch.manual_seed(3)  # of the denoising queries
    wanted = theirs(PIXELS, labels=labels)
    torch.manual_seed(3)
    found = ours.train().losses(maps(), targets())
    sums: dict[str, float] = defaultdict(float)
    for name, value in wanted.loss_dict.items():
        sums[name.split("_")[1]] += float(value.detach())
    assert any("dn" in name for name in wanted.loss_dict)
    assert [float(v.detach()) for v in found.values()] == pytest.approx(list(sums.values()))
    total = torch.stack(list(found.values())).sum()
    torch.testing.assert_close(total, wanted.loss.view(()))

    torch.autograd.backward(wanted.loss)
    torch.autograd.backward(total)
    gradient = theirs.model.decoder.query_pos_head.layers[0].weight.grad
    assert gradient.abs().sum() > 0
    torch.testing.assert_close(ours.network.decoder.query_pos_head.layers[0].weight.grad, gradient)

    theirs.eval()
    with torch.no_grad():
        outputs = theirs(PIXELS)
        expected = transformers.RTDetrImageProcessor().post_process_object_detection(
            outputs, threshold=0.0, target_sizes=[SIZE, SIZE]
        )
        detected = ours.eval().detect(maps(), [SIZE, SIZE])
    for one, other in zip(detected, expected, strict=True):
        assert torch.equal(one.labels, other["labels"])
        torch.testing.assert_close(one.scores, other["scores"])
        inside = other["boxes"].clamp(min=0)
        inside = inside.minimum(torch.tensor([96, 64, 96, 64]))
        torch.testing.assert_close(one.boxes, inside)


@pytest.mark.parametrize(
    ("name", "architecture", "millions"),
    [
        ("rtdetr-r18-coco-120e", "transformers:rt_detr_resnet18", 20),
        ("rtdetr-r50-coco-72e", "transformers:rt_detr_resnet50", 42),
        ("dfine-s-coco-132e", "timm:hgnetv2_b0", 10),
    ],
)
def test_shipped_recipes_have_the_published_number_of_parameters(
    name: str, architecture: str, millions: int
) -> None:
    """Source: the tables of RT-DETRv2-S, RT-DETRv2-L and D-FINE-S in the authors' repositories."""
    detector, _ = build_detector(
        load_recipe(EvaluateRecipe, name), architecture, 80, None, 0, ALONE
    )
    assert sum(p.numel() for p in detector.parameters()) / 1e6 == pytest.approx(millions, abs=1)


class Told(nn.Module):
    """Puts the boxes and classes it was told into some of the queries."""

    def __init__(self, logits: Tensor, boxes: Tensor) -> None:
        super().__init__()
        self.logits, self.boxes = logits, boxes

    def forward(self, *_given: object, **_more: object) -> SimpleNamespace:
        return SimpleNamespace(
            intermediate_logits=self.logits[None, None],
            intermediate_reference_points=self.boxes[None, None],
        )


@pytest.mark.parametrize("metric", ["voc07", "voc10", "coco"])
@pytest.mark.parametrize(("side", "share", "wanted"), [(64, 0.0, 100), (160, 0.0, 100),
                                                       (160, 0.2, 40)])  # fmt: skip
def test_objects_as_output_score_what_their_boxes_are_worth(
    tmp_path: Path, side: int, share: float, wanted: float, metric: Metric
) -> None:
    """Images of 96 x 72 as squares. A box moved by a fifth of its width has an IoU of 2/3."""
    images = opened(make_tree(tmp_path / "tree", val=8), "val")
    settings = recipe(MODELS[0], data={"test_size": side})
    head = QueryHead(as_backbone(Channels()), len(images.classes), settings, ALONE)
    read = ImageLoading(images, settings.data, images.classes, masks=False)
    found = []
    for position in range(len(images)):
        (target,) = read(ImageRequest(position, side)).targets
        boxes = torch.rand(20, 4, generator=torch.Generator().manual_seed(position))
        logits = torch.full((20, len(images.classes)), -20.0)
        places = [3, 17][: len(target.labels)]
        widths = target.boxes[:, 2] - target.boxes[:, 0]
        moved = target.boxes + share * widths[:, None] * torch.tensor([1.0, 0, 1, 0])
        boxes[places] = box_convert(moved, "xyxy", "cxcywh") / side
        logits[places, target.labels] = 20.0
        head.network = Told(logits, boxes)
        maps = {level: torch.zeros(1, 8, side // 8, side // 8) for level in LEVELS}
        (detected,) = head.detect(maps, [(side, side)])
        found.append(in_source_pixels(detected, images.annotations[position], side, side))
    truths = [images.truth(i, images.classes) for i in range(len(images))]
    assert score(metric, truths, found, images.classes).metrics["AP"] == pytest.approx(wanted)


def opened(tree: Path, split: str) -> LabelledSet:
    return open_labelled(str(tree), [split], SilentReporter())


def built(settings: EvaluateRecipe, architecture: str = NETWORK) -> Detector:
    return build_detector(settings, architecture, 3, None, 0, ALONE)[0]


@pytest.mark.parametrize("model", MODELS)
def test_a_batch_without_objects_has_the_same_losses_and_gradients(model: str) -> None:
    """Processes average their gradients, so all need the same ones, whatever their images hold."""
    detector = built(recipe(model)).train()
    images = [torch.zeros(3, 64, 64, dtype=torch.uint8)] * 2
    found: list[tuple[set[str], set[str]]] = []
    for given in (targets(), targets()[1:] * 2):
        losses = detector.losses(images, given)
        assert all(bool(value.isfinite()) for value in losses.values())
        detector.zero_grad(set_to_none=True)
        torch.autograd.backward(torch.stack(list(losses.values())).sum())
        named = detector.named_parameters()
        found.append((set(losses), {name for name, p in named if p.grad is not None}))
    assert found[0] == found[1]


@pytest.mark.parametrize("model", MODELS)
def test_losses_are_divided_by_the_mean_number_of_boxes_of_all_processes(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two boxes here and six in another process: a mean of four, twice as many as here."""
    head = QueryHead(as_backbone(Channels()), 3, recipe(model), ALONE).train()
    maps = {level: torch.randn(2, 8, 64 // s, 64 // s) for level, s in STRIDES.items()}
    found = []
    for world in (ALONE, SimpleNamespace(size=2, sum=lambda boxes: boxes + 6)):
        monkeypatch.setattr(head, "_world", world)
        torch.manual_seed(0)
        found.append({name: float(v.detach()) for name, v in head.losses(maps, targets()).items()})
    alone, of_two = found
    distillation = alone.pop("loss_distillation", None)
    assert of_two.pop("loss_distillation", None) == distillation
    assert of_two == pytest.approx({name: value / 2 for name, value in alone.items()})


def test_the_head_computes_in_float32() -> None:
    head = QueryHead(as_backbone(Channels()), 3, recipe(MODELS[0]), ALONE).eval()
    randomised(head)
    maps = {
        level: torch.randn(1, 8, side, side) for level, side in zip(LEVELS, (8, 4, 2), strict=True)
    }
    with torch.no_grad():
        (plain,) = head.detect(maps, [(64, 64)])
        with torch.autocast("cpu", torch.bfloat16):
            (mixed,) = head.detect(maps, [(64, 64)])
    assert torch.equal(plain.boxes, mixed.boxes)


def test_compared_weights_start_from_the_same_heads(tmp_path: Path) -> None:
    settings = recipe(MODELS[1])
    weights = read_weights(str(random_weights(tmp_path / "w.safetensors")))
    one = built(settings, "resnet18").network.get_submodule("head").state_dict()
    other = build_detector(settings, "resnet18", 3, weights, 0, ALONE)[0]
    heads = other.network.get_submodule("head").state_dict()
    assert all(torch.equal(one[name], tensor) for name, tensor in heads.items())


def test_weight_decay_leaves_the_norms_of_attention_alone() -> None:
    detector = built(recipe(MODELS[0], train={"weight_decay": 0.07}))
    decay = {
        id(parameter): group["weight_decay"]
        for group in make_optimizer(detector, recipe(MODELS[0]).train).param_groups
        for parameter in group["params"]
    }
    layer = detector.network.get_submodule("head.network.decoder.layers.0")
    assert decay[id(layer.get_parameter("final_layer_norm.weight"))] == 0
    assert decay[id(layer.get_parameter("self_attn.q_proj.weight"))] > 0


def test_the_norm_of_the_gradient_is_limited(tmp_path: Path) -> None:
    """One step of plain gradient descent with a rate of 1 moves everything by the limit."""
    plain = {"optimizer": "sgd", "momentum": 0.0, "lr": 1.0, "weight_decay": 0.0}
    settings = recipe(MODELS[0], train={**plain, "iterations": 1, "gradient_clip": 0.01})
    detector = built(settings)
    before = {name: p.detach().clone() for name, p in detector.named_parameters()}
    batch = DetectionBatch([torch.zeros(3, 64, 64, dtype=torch.uint8)] * 2, targets())

    def batches(_start: int) -> Generator[DetectionBatch, None, None]:
        yield batch

    trial = Trial(detector, settings, 0, "some", tmp_path, ALONE)
    train_detector(trial, batches, SilentReporter())
    moved = [p.detach() - before[name] for name, p in detector.named_parameters()]
    distance = torch.cat([m.flatten() for m in moved]).norm()
    assert float(distance) == pytest.approx(0.01, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_an_interrupted_trial_continues_exactly(model: str, tmp_path: Path) -> None:
    """The noise of the denoising queries follows from the iteration; a test in between, from whose
    shapes transformers keeps tables, changes nothing."""
    tree = make_tree(tmp_path / "tree")
    settings = recipe(model, train={"iterations": 6, "gradient_clip": 0.1}, test={"every": 2})
    whole = evaluate.run(settings, ["none"], str(tree), tmp_path / "a", device="cpu")
    with pytest.raises(StoppedRunError, match="iteration 3 of 6"):
        evaluate.run(settings, ["none"], str(tree), tmp_path / "b", device="cpu", stop_after=3)
    again = evaluate.run(settings, ["none"], str(tree), tmp_path / "b", device="cpu")
    name = Path("01-none/seed-0/detections.json")
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert again.results[0].metrics == whole.results[0].metrics


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_frozen_features_train_the_same_head(model: str, tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree")
    settings = recipe(model, detector={"frozen": "res5"}, train={"iterations": 4})
    whole = evaluate.run(settings, ["none"], str(tree), tmp_path / "a", device="cpu")
    with pytest.raises(StoppedRunError):
        evaluate.run(settings, ["none"], str(tree), tmp_path / "b", device="cpu", stop_after=2)
    again = evaluate.run(settings, ["none"], str(tree), tmp_path / "b", device="cpu")
    assert again.results[0].metrics == whole.results[0].metrics


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rtdetr-r18-tiny", "dfine-tiny"])
def test_shipped_recipes_run(name: str, tmp_path: Path) -> None:
    tree, out = make_tree(tmp_path / "tree"), tmp_path / "out"
    keys = (
        f"detector.backbone={NETWORK}", "data.train_sizes=[64]", "data.test_size=64",
        "train.iterations=2", "train.warmup=0", "train.workers=0", "train.batch_size=2",
        "test.precise_bn_batches=1", "test.pictures=0",
    )  # fmt: skip
    options = [part for key in keys for part in ("--set", key)]
    dupr("evaluate", "voc", "none", "-r", name, "--data", tree, "--out", out, *options)
    assert (out / "results.json").is_file()


def one_object_each(seed: int) -> tuple[dict[Level, Tensor], list[Target]]:
    """Maps of 8 images of 64 x 64 pixels, whose cells are 1 inside one object: the first channels
    for one class, the last for another."""
    generator = torch.Generator().manual_seed(seed)
    corners = 8 * torch.randint(0, 4, (8, 2), generator=generator)
    boxes = torch.cat([corners, corners + 8 * torch.randint(2, 5, (8, 2), generator=generator)], 1)
    labels = torch.randint(0, 2, (8,), generator=generator)
    finest = torch.zeros(8, 8, 8, 8)
    for image, label, (x0, y0, x1, y1) in zip(finest, labels, (boxes // 8).tolist(), strict=True):
        image[4 * label : 4 * label + 4, y0:y1, x0:x1] = 1.0
    maps = {
        level: nn.functional.avg_pool2d(finest, stride // 8) for level, stride in STRIDES.items()
    }
    targets = [Target(b[None].float(), v[None]) for b, v in zip(boxes, labels, strict=True)]
    return maps, targets


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_training_on_objects_lowers_the_loss_on_others(model: str) -> None:
    torch.manual_seed(0)
    head = QueryHead(as_backbone(Channels()), 2, recipe(model), ALONE).train()
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.002)
    totals = []
    for iteration in range(25):
        torch.manual_seed(iteration)
        total = torch.stack(list(head.losses(*one_object_each(iteration)).values())).sum()
        totals.append(float(total.detach()))
        optimizer.zero_grad()
        torch.autograd.backward(total)
        nn.utils.clip_grad_norm_(head.parameters(), 0.1)
        optimizer.step()
    assert sum(totals[-5:]) < 0.8 * sum(totals[:5])


@pytest.mark.parametrize("model", MODELS)
def test_heads_start_at_the_anchors_with_improbable_classes(model: str) -> None:
    """transformers alone would start the batch norms of RT-DETR v2 at scales around 0."""
    head = QueryHead(as_backbone(Channels()), 3, recipe(model), ALONE).eval()
    norms = [m for m in head.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(bool((norm.weight == 1).all()) for norm in norms)
    maps = {level: torch.randn(1, 8, 64 // s, 64 // s) for level, s in STRIDES.items()}
    with torch.no_grad():
        (found,) = head.detect(maps, [(64, 64)])
    centres = (found.boxes[:, :2] + found.boxes[:, 2:]) / 2
    sides = found.boxes[:, 2:] - found.boxes[:, :2]
    # Anchors are 0.05, 0.1 and 0.2 of the image at strides of 8, 16 and 32.
    assert {round(float(side), 2) for side in sides.flatten()} <= {3.2, 6.4, 12.8}
    torch.testing.assert_close(centres, 4 * (centres / 4).round())
    assert 0.001 < float(found.scores.mean()) < 0.1


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"square": False}}, "squares"),
        ({"data": {"train_sizes": [72], "max_size": 96}}, "multiples of the stride"),
        ({"detector": {"query": {"queries": 300}}}, "84 cells"),
        ({"detector": {"new_norm": "group"}}, "sync or batch"),
        ({"detector": {"query": {"queries": 20, "depth": 0.5}}}, "d-fine"),
        ({"detector": {"model": "fcos-fpn", "pyramid_channels": 32}}, "has no queries"),
    ],
)
def test_what_does_not_fit_is_refused(sections: dict[str, dict[str, object]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe("rtdetr-v2", **sections)


def test_without_transformers_the_message_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match=r"pip install 'dupr-cli\[transformers\]'"):
        check_architecture(recipe("d-fine"), "resnet18")
