"""Networks that are not torchvision's, through every stage of the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from dupr_cli.artifacts.run import MODEL_FILE, OPTIMIZER_FILE, Checkpoint, write_checkpoint
from dupr_cli.artifacts.weights import read_weights
from dupr_cli.models.backbone import as_backbone, load_backbone, make_backbone
from tests.support.command_line import dupr, pretrain
from tests.support.labelled_scenes import make_tree
from tests.support.recipes import SMALL_DETECTOR

TIMM = ["timm:test_convnext", "timm:test_efficientnet"]
# A configuration file, as a user has it beside a detector.
TRANSFORMERS = {
    "model_type": "rt_detr_resnet", "depths": [1, 1, 1, 1], "hidden_sizes": [16, 16, 32, 32],
    "embedding_size": 16, "layer_type": "basic", "out_features": ["stage4"],
}  # fmt: skip


def sets(*overrides: str) -> list[str]:
    return [argument for override in overrides for argument in ("--set", override)]


Make = Callable[[str], Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Make:
    """A run of a network, of two steps, the second of which continues the first."""

    @cache
    def made(network: str) -> Path:
        out = tmp_path_factory.mktemp("any") / "run"
        options = sets(f"model.backbone={network}", "train.steps=2", "train.checkpoint_every=1")
        pretrain(tiny_shards, out, *options, "--stop-after", 1, code=75)
        pretrain(tiny_shards, out, *options)
        return out

    return made


@pytest.fixture(scope="module")
def configuration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("configuration") / "config.json"
    file.write_text(json.dumps({"model_type": "rt_detr", "backbone_config": TRANSFORMERS}))
    return file


@pytest.fixture(scope="module", params=TIMM)
def timm_run(request: pytest.FixtureRequest, make: Make) -> Path:
    return make(request.param)


@pytest.fixture(scope="module", params=[*TIMM, "transformers"])
def run(request: pytest.FixtureRequest, make: Make, configuration: Path) -> Path:
    return make(
        f"transformers:{configuration}" if request.param == "transformers" else request.param
    )


def architecture_of(run: Path) -> str:
    return read_weights(str(run)).metadata.architecture


def test_a_stopped_run_continues_exactly(run: Path, tiny_shards: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    options = sets(f"model.backbone={architecture_of(run)}", "train.steps=2")
    pretrain(tiny_shards, whole, *options, *sets("train.checkpoint_every=1"))
    place = Path("checkpoints") / "step-00000002" / "model.safetensors"
    assert (run / place).read_bytes() == (whole / place).read_bytes()


def test_timm_loads_the_export(timm_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    dupr("export", timm_run, "--out", out)  # timm's layout is that of timm's networks
    levels = timm.create_model(
        f"local-dir:{out}", pretrained=True, features_only=True, feature_cls="getter"
    ).eval()
    whole = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    weights = read_weights(str(timm_run))
    ours = make_backbone(weights.metadata.architecture).eval()
    load_backbone(ours, weights)
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        theirs = {64 // maps.shape[2]: maps for maps in levels(images)}
        for level, maps in ours(images).items():
            assert torch.equal(maps, theirs[as_backbone(ours).strides[level]])
    state = whole.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.tensors.items())
    # The file is one of dupr's too: what timm has after the last level is left aside.
    again = read_weights(str(out / "model.safetensors"))
    assert again.tensors.keys() == weights.tensors.keys()
    assert state.keys() - again.tensors.keys() == set(again.metadata.further)
    assert again.metadata.layout == "timm"


def test_timm_adapts_the_export_to_other_inputs_and_classes(timm_run: Path, tmp_path: Path) -> None:
    dupr("export", timm_run, "--to", "timm", "--out", tmp_path / "out")
    address = f"local-dir:{tmp_path / 'out'}"
    thermal = timm.create_model(address, pretrained=True, in_chans=1).eval()
    assert thermal(torch.randn(1, 1, 64, 64)).shape[0] == 1
    classifier = timm.create_model(address, pretrained=True, num_classes=5).eval()
    assert classifier(torch.randn(1, 3, 64, 64)).shape == (1, 5)


def test_a_run_with_earlier_names_continues_exactly(
    timm_run: Path, tmp_path: Path, tiny_shards: Path
) -> None:
    """Model and optimiser of a run that an earlier version began, which held `network.`."""
    files = Checkpoint.read(timm_run / "checkpoints" / "step-00000001")
    old = tmp_path / "old"
    shutil.copytree(timm_run, old, symlinks=True)
    shutil.rmtree(old / "checkpoints")
    found = [load_file(files.path / name) for name in (MODEL_FILE, OPTIMIZER_FILE)]
    model, optimizer = ({_earlier(n): t for n, t in tensors.items()} for tensors in found)
    assert model.keys().isdisjoint(n for n in found[0] if ".backbone." in n)
    write_checkpoint(old, files.state, model, optimizer, keep=1)
    options = sets(f"model.backbone={architecture_of(timm_run)}", "train.steps=2")
    pretrain(tiny_shards, old, *options, *sets("train.checkpoint_every=1"))
    for name in (MODEL_FILE, OPTIMIZER_FILE):
        place = Path("checkpoints") / "step-00000002" / name
        assert (old / place).read_bytes() == (timm_run / place).read_bytes()


def _earlier(name: str) -> str:
    """`query.backbone.stages.0.x` as `query.backbone.network.stages_0.x`."""
    before, backbone, inside = name.partition(".backbone.")
    return f"{before}.backbone.network.{inside.replace('.', '_', 1)}" if backbone else name


def test_torchvisions_weights_are_not_those_of_another_network(run: Path, tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree")
    done = dupr("evaluate", "voc", run, "torchvision:IMAGENET1K_V1", "--frozen", "--data", tree,
                "--out", tmp_path / "out", code=2)  # fmt: skip
    assert f"torchvision has no {architecture_of(run)}" in " ".join(done.stderr.split())


def test_weights_of_another_network_are_named(run: Path, tmp_path: Path, tiny_shards: Path) -> None:
    options = sets("model.backbone=resnet18", f"model.init={run}")
    done = pretrain(tiny_shards, tmp_path / "run", *options, code=2)
    message = " ".join(done.stderr.split())
    assert f"the weights of a {architecture_of(run)} do not fit a resnet18" in message


def test_other_layouts_say_what_they_hold(timm_run: Path, tmp_path: Path) -> None:
    for layout in ("torchvision", "transformers", "detectron2", "mmdetection"):
        done = dupr("export", timm_run, "--to", layout, "--out", tmp_path / layout, code=2)
        assert f"--to {layout}" in " ".join(done.stderr.split())
        assert architecture_of(timm_run) in " ".join(done.stderr.split())
        assert not (tmp_path / layout).exists()


def test_onnx_has_the_same_features(run: Path, tmp_path: Path) -> None:
    done = dupr("export", run, "--to", "onnx", "--out", tmp_path / "onnx", "--json")
    (exported,) = json.loads(done.stdout)["formats"]
    assert exported["features_compared"]
    assert exported["max_difference"] <= 1e-5


@pytest.mark.parametrize("options", [
    ("--frozen", "--recipe", "voc-frozen-tiny"),
    ("--recipe", "voc-frozen-tiny", *sets("detector.frozen=res4")),
    ("--recipe", "voc-tiny", *sets("detector.model=faster-rcnn-fpn",
                                   "detector.anchor_sizes=[8, 16, 32, 64, 128]")),
], ids=["frozen", "frozen up to res4", "pyramid"])  # fmt: skip
def test_detectors_are_trained_on_it(run: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    tree = make_tree(tmp_path / "tree")
    given = [
        "evaluate",
        "voc",
        run,
        "none",
        "--data",
        tree,
        "--seeds",
        1,
        *options,
        *sets(*SMALL_DETECTOR),
    ]
    dupr(*given, "--out", tmp_path / "whole")
    results = json.loads((tmp_path / "whole" / "results.json").read_bytes())
    assert {of["architecture"] for of in results["results"]} == {architecture_of(run)}


def test_the_c4_form_says_what_it_needs(run: Path, tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree")
    done = dupr("evaluate", "voc", run, "--recipe", "voc-tiny", "--data", tree,
                "--out", tmp_path / "out", code=2)  # fmt: skip
    assert "faster-rcnn-c4 uses a ResNet's last stage" in " ".join(done.stderr.split())


def test_probes_take_it(run: Path, tmp_path: Path, tiny_shards: Path) -> None:
    for split in ("train", "val"):
        for number in range(6):
            folder = tmp_path / "classes" / split / ("dark", "light")[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40), (40 + 150 * (number % 2),) * 3).save(
                folder / f"{number}.png"
            )
    small = sets("images.resize=32", "images.crop=32", "images.workers=0", "images.bn_images=4",
                 "knn.neighbours=[1]", "knn.shown=1")  # fmt: skip
    dupr("evaluate", "knn", run, "none", "--data", tmp_path / "classes", "--out", tmp_path / "knn",
         *small)  # fmt: skip
    results = json.loads((tmp_path / "knn" / "results.json").read_bytes())
    assert {of["architecture"] for of in results["results"]} == {architecture_of(run)}
