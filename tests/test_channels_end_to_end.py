"""Images of 16 bits with one and with five channels, from files to a frozen evaluation.

Values are checked at each stage against the definition: (v - low) / (high - low), cut to 0..1,
minus the mean, divided by the standard deviation.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from dupr_cli.artifacts.shards import open_shards
from dupr_cli.artifacts.weights import read_weights
from dupr_cli.datasets.labelled import open_labelled
from dupr_cli.evaluate.detection_data import ImageLoading, ImageRequest
from dupr_cli.evaluate.features import open_features
from dupr_cli.models.compared import open_compared
from dupr_cli.pretrain.data import decode
from dupr_cli.progress import SilentReporter
from dupr_cli.views.augmentation import normalise
from tests.support.channel_images import (
    HIGH,
    KEPT,
    LOW,
    Values,
    blobs,
    scaled,
    statistics,
    write_coco,
    write_folder,
    write_image,
)
from tests.support.command_line import dupr, pretrain
from tests.support.recipes import frozen_recipe
from tests.support.reporters import Listening

IMAGES = 24
SMALL = [
    argument
    for key in (
        "detector.pyramid_channels=32", "detector.head_convolutions=1",
        "detector.anchor_sizes=[8, 16, 32]", "train.iterations=2", "train.batch_size=2",
        "train.workers=0", "train.warmup=0", "data.train_sizes=[72]", "data.test_size=72",
        "data.max_size=96", "test.precise_bn_batches=2", "test.pictures=1",
        "data.train_splits=[train]", "data.test_splits=[val]",
    )
    for argument in ("--set", key)
]  # fmt: skip


@dataclass(frozen=True)
class Run:
    """shards: of `images`. out: of a run of 3 steps that was stopped after the first."""

    channels: int
    images: list[Values]
    shards: Path
    statistics: list[str]
    out: Path


@pytest.fixture(scope="module", params=[1, 5])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    channels, folder = request.param, tmp_path_factory.mktemp("channels")
    images = write_folder(folder / "photos", channels, IMAGES)
    dupr("prepare", folder / "photos", folder / "shards", "--workers", 1, *KEPT[channels])
    measured = json.loads(dupr("prepare", "stats", folder / "shards", "--json").stdout)
    keys = [
        argument
        for name in ("mean", "std")
        for argument in ("--set", f"method.augmentation.{name}={measured[name]}")
    ]
    three = ["--set", "train.steps=3", *keys]
    pretrain(folder / "shards", folder / "run", *three, "--stop-after", 1, code=75)
    pretrain(folder / "shards", folder / "run", *three)
    return Run(channels, images, folder / "shards", keys, folder / "run")


def normalised(values: Values, run: Run) -> NDArray[np.float64]:
    """(C, H, W) by the definition."""
    mean, std = (np.array(of_all) for of_all in statistics(run.images))
    found: NDArray[np.float64] = ((scaled(values) - mean) / std).transpose(2, 0, 1)
    return found


def test_decoded_and_normalised_values_follow_the_definition(run: Run) -> None:
    shards = open_shards(str(run.shards))
    metadata = read_weights(str(run.out)).metadata
    for number in (0, IMAGES - 1):
        image = np.asarray(decode(shards[number]))
        assert image == pytest.approx(scaled(run.images[number]), abs=1e-7)
        mean, std = (
            torch.tensor(v)[:, None, None] for v in (metadata.input_mean, metadata.input_std)
        )
        found = (torch.from_numpy(image).permute(2, 0, 1) - mean) / std
        assert found.numpy() == pytest.approx(normalised(run.images[number], run), abs=1e-4)


def test_training_normalises_by_the_recipe(run: Run) -> None:
    from dupr_cli.recipe import PretrainRecipe, load_recipe

    recipe = load_recipe(PretrainRecipe, str(run.out / "recipe.yaml"))
    image = np.asarray(decode(open_shards(str(run.shards))[3]))
    found = normalise(torch.from_numpy(image).permute(2, 0, 1)[None], recipe.method.augmentation)
    assert found[0].numpy() == pytest.approx(normalised(run.images[3], run), abs=1e-4)


def test_a_continued_run_is_the_uninterrupted_one(run: Run, tmp_path: Path) -> None:
    done = pretrain(run.shards, tmp_path / "run", "--set", "train.steps=3", *run.statistics)
    assert "have no saturation, hue or grayscale" in done.stderr
    one, other = (
        load_file(folder / "latest" / "model.safetensors") for folder in (run.out, tmp_path / "run")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    stem = one["query.backbone.conv1.0.weight"]
    assert stem.shape[1] == run.channels


def test_a_checkpoint_states_what_its_network_takes(run: Run) -> None:
    metadata = read_weights(str(run.out)).metadata
    mean, std = statistics(run.images)
    assert metadata.input_mean == pytest.approx(mean, abs=1e-6)
    assert metadata.input_std == pytest.approx(std, abs=1e-6)
    assert metadata.input_range == (LOW, HIGH)
    assert metadata.channel_order == "stored"
    state = json.loads((run.out / "latest" / "state.json").read_text())
    assert state["format_version"] == 2  # a reader of version 1 would not scale images


def test_exports_load_in_their_libraries_with_their_channels(run: Run, tmp_path: Path) -> None:
    import timm

    out = tmp_path / "exported"
    done = dupr("export", run.out, "--to", "timm", "--out", out, "--json")
    (exported,) = json.loads(done.stdout)["formats"]
    assert exported["features_compared"]
    assert exported["max_difference"] < 1e-5
    model: Any = timm.create_model(f"local-dir:{out}", pretrained=True, features_only=True)
    weights = read_weights(str(out / "model.safetensors"))
    assert weights.metadata.input == read_weights(str(run.out)).metadata.input
    stem = next(tensor for name, tensor in model.state_dict().items() if name.startswith("conv1"))
    assert torch.equal(stem, weights.tensors["conv1.0.weight"])
    config = json.loads((out / "config.json").read_text())
    assert config["pretrained_cfg"]["input_size"][0] == run.channels
    assert config["pretrained_cfg"]["mean"] == pytest.approx(statistics(run.images)[0], abs=1e-6)


def test_formats_of_rgb_refuse(run: Run, tmp_path: Path) -> None:
    done = dupr("export", run.out, "--to", "detectron2", "--out", tmp_path / "e", code=2)
    assert f"values from {LOW} to {HIGH}" in done.stderr
    assert not (tmp_path / "e").exists()


def test_the_model_card_states_channels_and_scaling(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "card"
    dupr("export", run.out, "--to", "timm", "--out", out, "--push-to-hub", "someone/x",
         "--local-only")  # fmt: skip
    card = (out / "README.md").read_text()
    assert f"{run.channels} channel" in card
    assert f"(v - {LOW}) / {HIGH - LOW}" in card


def test_detectors_get_the_values_of_the_definition(run: Run, tmp_path: Path) -> None:
    """From image files, through the loader and the normalisation, to the stored features."""
    written = write_coco(tmp_path / "coco", run.channels, {"train": 4, "val": 2})
    recipe = frozen_recipe(data={"train_sizes": [72], "test_size": 72, "max_size": 96})
    (compared,) = open_compared([str(run.out)])
    pixels = compared.input.pixels
    train, test = (
        open_labelled(str(tmp_path / "coco"), [split], SilentReporter(), pixels=pixels)
        for split in ("train", "val")
    )
    (loaded,) = ImageLoading(test, recipe.data, test.classes, False)(ImageRequest(1, 72)).images
    assert loaded.permute(1, 2, 0).numpy() == pytest.approx(scaled(written["val"][1]), abs=1e-7)

    features = open_features(
        tmp_path / "f", compared, recipe, train, train, test, train.classes, torch.device("cpu"),
        SilentReporter(),
    )  # fmt: skip
    padded = torch.zeros(1, run.channels, 96, 96)
    padded[0, :, :72] = torch.from_numpy(normalised(written["val"][1], run)).float()
    with torch.no_grad():
        wanted: dict[Any, Tensor] = features.backbone.network(padded)
    found = features.test.maps(test.ids[1]).maps
    for level, values in found.items():
        assert values.float().numpy() == pytest.approx(wanted[level][0].numpy(), rel=5e-3, abs=5e-3)


def test_a_frozen_evaluation_compares_with_random_weights(run: Run, tmp_path: Path) -> None:
    write_coco(tmp_path / "coco", run.channels, {"train": 4, "val": 2})
    dupr("evaluate", "coco", run.out, "none", "--data", tmp_path / "coco", "--frozen", "--out",
         tmp_path / "eval", *SMALL)  # fmt: skip
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert [len(entry["metrics"]) > 3 for entry in results["results"]] == [True, True]
    assert (tmp_path / "eval" / "detections.png").is_file()


@pytest.mark.slow
def test_random_weights_alone_take_the_channels_of_shards(run: Run, tmp_path: Path) -> None:
    write_coco(tmp_path / "coco", run.channels, {"train": 4, "val": 2})
    dupr("prepare", tmp_path / "coco", tmp_path / "set", "--workers", 1, *KEPT[run.channels])
    dupr("evaluate", "coco", "none", "--data", tmp_path / "set", "--frozen", "--out",
         tmp_path / "eval", "--set", "detector.backbone=timm:test_resnet", *SMALL)  # fmt: skip
    claim = json.loads((tmp_path / "eval" / "evaluation.json").read_text())
    assert f"{run.channels} channel" in claim["fingerprint"]["pixels"]


def test_shards_in_another_range_are_read_in_that_of_the_weights(run: Run, tmp_path: Path) -> None:
    write_coco(tmp_path / "coco", run.channels, {"train": 2})
    keys = [f"image.channels={run.channels}", "image.range=[0, 65535]"]
    sets = [argument for key in keys for argument in ("--set", key)]
    dupr("prepare", tmp_path / "coco", tmp_path / "set", "--workers", 1, *sets)
    pixels = read_weights(str(run.out)).metadata.input.pixels
    reporter = Listening()
    shards = open_labelled(str(tmp_path / "set"), ["train"], reporter, pixels=pixels)
    tree = open_labelled(str(tmp_path / "coco"), ["train"], SilentReporter(), pixels=pixels)
    assert np.array_equal(np.asarray(shards.image(0)), np.asarray(tree.image(0)))
    assert any("scaled as the weights take them" in text for text in reporter.warnings)


def test_views_can_be_looked_at(run: Run, tmp_path: Path) -> None:
    dupr("inspect", "views", run.out / "recipe.yaml", "--data", run.shards, "--out",
         tmp_path / "v.png", "--count", 2)  # fmt: skip
    assert (tmp_path / "v.png").is_file()


@pytest.mark.slow
def test_patches_and_objects_are_found_again(run: Run, tmp_path: Path) -> None:
    """On labelled shards, so that whole images and their objects are read."""
    write_coco(tmp_path / "coco", run.channels, {"val": 4})
    dupr("prepare", tmp_path / "coco", tmp_path / "set", "--workers", 1, *KEPT[run.channels])
    dupr("evaluate", "patch-retrieval", run.out, "none", "--data", tmp_path / "set", "--out",
         tmp_path / "p", "--set", "images.workers=0", "--set", "retrieval.object_side=96", "--set",
         "data.min_object=8")  # fmt: skip
    results = json.loads((tmp_path / "p" / "results.json").read_text())
    assert all("res5/object_p1" in entry["metrics"] for entry in results["results"])


@pytest.mark.slow
@pytest.mark.parametrize("probe", ["knn", "linear", "linear --recipe linear-in1k-moco"])
def test_probes_classify_such_images(run: Run, tmp_path: Path, probe: str) -> None:
    """Dark and bright images, which even random features tell apart."""
    for split, count in (("train", 8), ("val", 4)):
        for name, brightness in (("dark", 200), ("bright", 2000)):
            (tmp_path / "classes" / split / name).mkdir(parents=True)
            for number in range(count):
                values = blobs(number, run.channels) // 8 + np.uint16(brightness)
                write_image(tmp_path / "classes" / split / name / f"{number}", values)
    command, *recipe = probe.split()
    short = ["--set", "sgd.epochs=1", "--set", "sgd.milestones=[]"] if recipe else []
    dupr("evaluate", command, run.out, "none", "--data", tmp_path / "classes", "--out",
         tmp_path / "p", "--set", "images.workers=0", "--set", "images.resize=40", "--set",
         "images.crop=32", *recipe, *short)  # fmt: skip
    results = json.loads((tmp_path / "p" / "results.json").read_text())
    figures = [entry["metrics"] for entry in results["results"]]
    assert len(figures) == 2
    if probe == "linear":
        assert all(of_weights["res5/top1"] == 100 for of_weights in figures)


@pytest.mark.slow
def test_test_images_in_the_shards_are_found(run: Run, tmp_path: Path) -> None:
    """A copy of a test image that is a little brighter, by its look."""
    written = write_coco(tmp_path / "coco", run.channels, {"train": 2, "val": 2})
    (tmp_path / "seen").mkdir()
    write_image(tmp_path / "seen" / "copy", written["val"][0] + np.uint16(3))
    write_image(tmp_path / "seen" / "other", blobs(50, run.channels))
    dupr("prepare", tmp_path / "seen", tmp_path / "pre", "--workers", 1, *KEPT[run.channels])
    dupr("evaluate", "coco", run.out, "--data", tmp_path / "coco", "--frozen", "--out",
         tmp_path / "eval", "--leaks", tmp_path / "pre", *SMALL)  # fmt: skip
    (leaks,) = json.loads((tmp_path / "eval" / "results.json").read_text())["leaks"]
    assert [Path(leak["test_image"]).stem for leak in leaks["found"]] == ["1"]


def test_other_numbers_of_channels_are_refused(run: Run, tmp_path: Path) -> None:
    """Before anything is written, with the numbers and the way out."""
    wrong = "method.augmentation.{}=[0.5, 0.5]"
    sets = ["--set", wrong.format("mean"), "--set", wrong.format("std")]
    done = pretrain(run.shards, tmp_path / "run", *sets, code=2)
    assert "have 2 values" in done.stderr
    assert "dupr prepare stats" in done.stderr
    done = pretrain(run.shards, tmp_path / "run", "--set", f"model.init={run.out}", code=2)
    assert "model.init" in done.stderr
    assert not (tmp_path / "run").exists()
