"""The four probes from end to end, as people run them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from dupr_cli import probe as probes
from dupr_cli.artifacts.results import Results
from dupr_cli.artifacts.weights import WeightsMetadata, write_weights
from dupr_cli.errors import UsageError
from dupr_cli.models.compared import open_compared
from dupr_cli.models.resnet import ResNetBackbone
from dupr_cli.probe.data import open_classified
from dupr_cli.probe.features import extract, freeze_backbone, measure_random
from dupr_cli.progress import SilentReporter, Task
from dupr_cli.recipe import recipe_yaml
from tests.support.class_images import HUES, class_folders, class_shards, probe_recipe
from tests.support.command_line import dupr
from tests.support.images import write_shards
from tests.support.labelled_scenes import COLOURS, make_tree
from tests.support.reporters import Listening


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_folders(tmp_path_factory.mktemp("folders") / "tree")


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(tmp_path_factory.mktemp("voc") / "tree", train=18, val=12)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "backbone.safetensors"
    metadata = WeightsMetadata("torchvision", "resnet18", (0.5,) * 3, (0.25,) * 3, 64)
    write_weights(path, ResNetBackbone("resnet18").state_dict(), metadata)
    return path


def recipe_file(folder: Path, protocol: str, **sections: object) -> Path:
    path = folder / f"{protocol}.yaml"
    path.write_text(recipe_yaml(probe_recipe(protocol, **sections)))
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "protocol"),
    [
        ("knn", "knn"),
        ("linear", "linear"),
        ("linear", "linear-fast"),
        ("voc07-cls", "voc07-cls"),
        ("patch-retrieval", "patch-retrieval"),
    ],
)
def test_every_probe_says_the_same_twice(
    command: str, protocol: str, folders: Path, voc: Path, weights: Path, tmp_path: Path
) -> None:
    recipe = recipe_file(tmp_path, protocol, levels=["res3", "res5"])
    data = folders if command in ("knn", "linear") else voc
    options = ["--data", data, "--recipe", recipe, "--device", "cpu", "--test-split", "val"]
    if command == "voc07-cls":
        options += ["--train-split", "train"]
    entries = []
    for out in (tmp_path / "one", tmp_path / "two"):
        # Workers must not matter either.
        workers = ["--workers", 2 * (out.name == "two")]
        shown = dupr("evaluate", command, weights, "none", *options, "--out", out, *workers).stdout
        assert max(len(line) for line in shown.splitlines()) <= 80
        assert (out / "table.txt").read_text() == shown
        assert (
            "02-none: none (resnet18); batch-norm statistics measured on these images"
            in " ".join(shown.split())
        )
        results = Results.read(out)
        assert (results.protocol, results.test.split) == (protocol, "val")
        entries.append([(e.metrics, e.per_class, e.extra) for e in results.results])
    assert entries[0] == entries[1]
    (metrics, _, extra), (of_none, _, _) = entries[0]
    assert set(metrics) == set(of_none)
    assert {key.partition("/")[0] for key in metrics} == {"res3", "res5"}
    assert all(0 <= value <= 100 for value in metrics.values())
    columns = extra["columns"]
    assert isinstance(columns, list)
    assert {f"res5/{column}" for column in columns} <= set(metrics)


@pytest.mark.parametrize("protocol", ["knn", "linear-fast"])
def test_colours_are_told_apart_and_shuffled_labels_are_not(
    protocol: str, folders: Path, tmp_path: Path
) -> None:
    recipe = probe_recipe(protocol)
    right = probes.run(recipe, ["none"], str(folders), tmp_path / "a", device="cpu")
    accuracy = right.results[0].metrics["res3/top1"]
    assert accuracy > 75  # chance is 33
    shuffled = tmp_path / "shuffled"
    shutil.copytree(folders, shuffled)
    # Every colour gets every label equally often; at random, few colours might fit by chance.
    files = [sorted((shuffled / "train" / name).iterdir()) for name in HUES]
    for row in zip(*files, strict=True):
        contents = [file.read_bytes() for file in row]
        turn = int(row[0].stem) % len(row)
        for file, content in zip(row, contents[turn:] + contents[:turn], strict=True):
            file.write_bytes(content)
    wrong = probes.run(recipe, ["none"], str(shuffled), tmp_path / "b", device="cpu")
    # 18 test images at a chance of 1/3: a standard deviation of 11 points.
    assert wrong.results[0].metrics["res3/top1"] < 62


def test_objects_and_patches_are_found_above_chance(voc: Path, tmp_path: Path) -> None:
    recipe = probe_recipe("patch-retrieval")
    results = probes.run(recipe, ["none"], str(voc), tmp_path / "out", device="cpu")
    (entry,) = results.results
    chance = entry.extra["chance"]
    assert isinstance(chance, dict)
    assert entry.metrics["res3/object_p1"] > chance["object_p1"] + 20
    assert entry.metrics["res3/patch_top1"] > 2 * chance["patch_top1"]
    assert chance["patch_top5"] == pytest.approx(5 * chance["patch_top1"])
    assert set(entry.per_class) == set(COLOURS)


def test_classes_are_found_in_images_by_svms(voc: Path, tmp_path: Path) -> None:
    recipe = probe_recipe("voc07-cls")
    results = probes.run(recipe, ["none"], str(voc), tmp_path / "out", device="cpu")
    (entry,) = results.results
    chance = entry.extra["chance"]
    assert isinstance(chance, dict)
    assert entry.metrics["res3/mAP"] > chance["mAP"] + 20
    mean = np.mean([values["res3/AP"] for values in entry.per_class.values()])
    assert entry.metrics["res3/mAP"] == pytest.approx(mean)


def test_finished_weights_are_not_measured_again(
    folders: Path, weights: Path, tmp_path: Path
) -> None:
    recipe, out = probe_recipe("knn"), tmp_path / "out"
    probes.run(recipe, [str(weights)], str(folders), out, device="cpu")
    reporter = Listening()
    both = probes.run(
        recipe, [str(weights), "none"], str(folders), out, device="cpu", reporter=reporter
    )
    assert [e.weights for e in both.results] == [str(weights), "none"]
    assert sum("finished before" in line for line in reporter.said) == 1
    assert [line for line in reporter.said if line.startswith("features")] == [
        "features 02-none train",
        "features 02-none test",
    ]


class Interrupting(Listening):
    """Control-C while the second of the weights is measured."""

    @contextmanager
    def task(self, description: str, total: int, unit: str, done: int = 0) -> Iterator[Task]:
        if "02-" in description:
            raise KeyboardInterrupt
        with super().task(description, total, unit, done) as task:
            yield task


def test_interruption_keeps_what_is_finished(folders: Path, weights: Path, tmp_path: Path) -> None:
    recipe, out, both = probe_recipe("knn"), tmp_path / "out", [str(weights), "none"]
    with pytest.raises(KeyboardInterrupt):
        probes.run(recipe, both, str(folders), out, device="cpu", reporter=Interrupting())
    assert not (out / "results.json").exists()
    reporter = Listening()
    continued = probes.run(recipe, both, str(folders), out, device="cpu", reporter=reporter)
    assert any("finished before" in line for line in reporter.said)
    quiet = probes.run(recipe, both, str(folders), tmp_path / "quiet", device="cpu")
    assert [e.metrics for e in continued.results] == [e.metrics for e in quiet.results]


def test_only_random_weights_get_their_batch_norm_measured(folders: Path, weights: Path) -> None:
    recipe = probe_recipe("knn")
    images = open_classified(str(folders), "train", 8, SilentReporter())
    for candidate in open_compared([str(weights), "none"]):
        frozen = freeze_backbone(candidate, recipe, torch.device("cpu"))
        assert not frozen.network.training
        reporter = Listening()
        before = frozen.network.state_dict()["layer4.0.bn1.running_mean"].clone()
        measure_random(frozen, candidate, images, recipe, reporter)
        after = frozen.network.state_dict()["layer4.0.bn1.running_mean"]
        random = candidate.weights is None
        assert torch.equal(before, after) is not random
        assert any("batch-norm statistics are measured" in s for s in reporter.said) is random
        assert not frozen.network.training
        if random:
            pooled = extract(frozen, images, recipe, "x", SilentReporter())["res3"]
            assert 0.05 < float(pooled.mean()) < 5


def test_input_statistics_are_those_of_the_weights(weights: Path) -> None:
    (candidate,) = open_compared([str(weights)])
    frozen = freeze_backbone(candidate, probe_recipe("knn"), torch.device("cpu"))
    assert frozen.mean.flatten().tolist() == [0.5] * 3
    assert frozen.std.flatten().tolist() == [0.25] * 3


@pytest.fixture(scope="module")
def finished(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    probes.run(probe_recipe("knn"), ["none"], str(folders), out, device="cpu")
    return out


def test_another_recipe_or_set_is_refused(
    finished: Path, folders: Path, voc: Path, tmp_path: Path
) -> None:
    recipe = recipe_file(tmp_path, "knn")
    same = ["evaluate", "knn", "none", "--recipe", recipe, "--out", finished, "--device", "cpu"]
    dupr(*same, "--data", folders, "--workers", 1)  # changes nothing that is measured
    other = dupr(*same, "--data", folders, "--set", "knn.temperature=0.1", code=2).stderr
    assert "knn.temperature: 0.07 there, 0.1 now" in other
    assert "test images" in dupr(*same, "--data", voc, code=2).stderr


def test_overwrite_replaces_a_probe_and_nothing_else(folders: Path, tmp_path: Path) -> None:
    out, recipe = tmp_path / "out", recipe_file(tmp_path, "knn")
    options = ["--data", folders, "--recipe", recipe, "--out", out, "--device", "cpu"]
    dupr("evaluate", "knn", "none", *options)
    (out / "notes.txt").write_text("mine")
    shown = dupr("evaluate", "knn", "none", *options, "--limit", 20, "--overwrite", "--json")
    values = json.loads(shown.stdout)
    assert (values["train"]["images"], values["test"]["images"]) == (20, 18)
    assert (out / "notes.txt").read_text() == "mine"
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "notes.txt").write_text("mine")
    options[options.index(out)] = tmp_path / "else"
    assert "holds no probe" in dupr("evaluate", "knn", "none", *options, code=2).stderr


def test_other_weights_in_the_same_place_are_refused(
    finished: Path, folders: Path, weights: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    result = out / "01-none" / "result.json"
    values = json.loads(result.read_text())
    values["fingerprint"]["weights"] = "others"
    result.write_text(json.dumps(values))
    recipe = recipe_file(tmp_path, "knn")
    options = ["--data", folders, "--recipe", recipe, "--out", out, "--device", "cpu"]
    assert "belongs to other weights" in dupr("evaluate", "knn", "none", *options, code=2).stderr
    result.write_text(result.read_text()[:50])
    assert "is damaged" in dupr("evaluate", "knn", "none", *options, code=2).stderr


def test_dry_run_states_the_plan_and_writes_nothing(
    voc: Path, weights: Path, tmp_path: Path
) -> None:
    shown = dupr(
        "evaluate", "linear", weights, "none", "--data", voc, "--out", tmp_path / "out",
        "--dry-run", "--set", "data.min_object=8",
    ).stdout  # fmt: skip
    assert "linear-fast, not MoCo's protocol" in shown
    assert "#   train_images   27" in shown  # objects of 18 images
    assert list(tmp_path.iterdir()) == []


def test_recipe_of_another_protocol_is_refused(folders: Path, tmp_path: Path) -> None:
    options = ["--data", folders, "--out", tmp_path / "out"]
    wrong = dupr("evaluate", "knn", "none", "-r", "linear-fast", *options, code=2).stderr
    assert "the protocol is linear-fast, but this command runs knn" in wrong
    wrong = dupr("evaluate", "knn", "none", "-r", "voc-tiny", *options, code=2).stderr
    assert "voc-tiny is a recipe for dupr evaluate" in wrong


def test_unreadable_image_is_named_without_a_workers_traceback(tmp_path: Path) -> None:
    tree = class_folders(tmp_path / "tree", 3, 2)
    (tree / "val" / "plum" / "01.png").write_bytes(b"nothing")
    recipe = recipe_file(tmp_path, "knn")
    options = ["--data", tree, "--recipe", recipe, "--out", tmp_path / "out", "--workers", 1]
    wrong = dupr("evaluate", "knn", "none", *options, "--device", "cpu", code=1).stderr
    assert "plum/01.png: the image cannot be decoded" in wrong


def test_architecture_of_the_recipe_must_be_that_of_the_weights(
    folders: Path, weights: Path, tmp_path: Path
) -> None:
    options = ["--data", folders, "--out", tmp_path / "out", "--set", "backbone=resnet50"]
    wrong = dupr("evaluate", "knn", weights, *options, code=2).stderr
    assert "of a resnet18, but the recipe asks for resnet50" in wrong


def test_missing_scikit_learn_is_said_with_what_to_install(
    voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    options = ["--data", voc, "--out", tmp_path / "out", "--train-split", "train"]
    wrong = dupr("evaluate", "voc07-cls", "none", *options, "--test-split", "val", code=2).stderr
    assert "pip install 'dupr-cli[probes]'" in wrong


def test_classes_that_cannot_be_learnt_or_measured_are_said(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", train=12, val=8)
    for place in (tree / "Annotations").glob("*.xml"):
        number = int(place.stem[3:])
        # Green is in training only, violet in testing only.
        wanted = "green" if number < 12 else "violet"
        place.write_text(place.read_text().replace("green", wanted))
    reporter = Listening()
    recipe, out = probe_recipe("voc07-cls"), tmp_path / "out"
    results = probes.run(recipe, ["none"], str(tree), out, device="cpu", reporter=reporter)
    assert set(results.results[0].per_class) == {"red", "blue", "violet"}
    assert results.results[0].per_class["violet"]["res3/AP"] == 0
    assert any("green: no test image" in line for line in reporter.said)
    assert any("violet: too few training images" in line for line in reporter.said)


def test_unlabelled_shards_are_searched_for_patches_only(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "plain", 20)
    recipe = probe_recipe("patch-retrieval")
    results = probes.run(
        recipe, ["none"], str(shards), tmp_path / "out", test_split=None, device="cpu"
    )
    assert set(results.results[0].metrics) == {
        f"res3/{case}_top{places}"
        for case in ("patch", "same_flip", "opposite_flip")
        for places in (1, 5)
    }
    assert "object_p" not in (tmp_path / "out" / "table.txt").read_text().partition("weights")[2]


def test_retrieval_of_an_older_dupr_is_not_mixed_with_ours(tmp_path: Path) -> None:
    """It read bins where RoIAlign expects the cells, not where they are."""
    shards = write_shards(tmp_path / "plain", 20)
    recipe, out = probe_recipe("patch-retrieval"), tmp_path / "out"
    probes.run(recipe, ["none"], str(shards), out, test_split=None, device="cpu")
    claim = json.loads((out / "probe.json").read_text())
    del claim["fingerprint"]["cells of a level"]
    (out / "probe.json").write_text(json.dumps(claim))
    with pytest.raises(UsageError, match=r"cells of a level: at \(i \+ 1/2\) strides there"):
        probes.run(recipe, ["none"], str(shards), out, test_split=None, device="cpu")


def test_shards_and_folders_measure_the_same(folders: Path, tmp_path: Path) -> None:
    shards = class_shards(tmp_path / "shards")
    one, other = (
        probes.run(probe_recipe("knn"), ["none"], str(data), tmp_path / out, device="cpu")
        for data, out in ((folders, "one"), (shards, "other"))
    )
    assert one.results[0].metrics == other.results[0].metrics


def test_one_tree_is_divided_by_the_given_share(folders: Path, tmp_path: Path) -> None:
    results = probes.run(
        probe_recipe("knn", data={"test_fraction": 0.3}),
        ["none"],
        str(folders / "train"),
        tmp_path / "out",
        device="cpu",
    )
    assert results.train.images + results.test.images == 36
    assert results.test.split == "30% of all"


@pytest.mark.slow
def test_optional_packages_are_imported_where_they_are_needed() -> None:
    check = (
        "import sys, dupr_cli.cli.app; "
        "assert not {'torch', 'numpy'} & set(sys.modules); "
        "import dupr_cli.probe, dupr_cli.export, dupr_cli.pretrain, dupr_cli.evaluate; "
        "sys.exit(any(m in sys.modules for m in ('sklearn', 'timm', 'transformers', 'onnx')))"
    )
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


@pytest.mark.slow
def test_real_photographs_without_weights(shared_data: Path, tmp_path: Path) -> None:
    """A random network's features are better than a guess, and are no good."""
    recipe = probe_recipe(
        "linear-fast", levels=["res3"], images={"resize": 64, "crop": 64, "workers": 0},
        data={"limit": 250, "min_object": 24}, logistic={},
    )  # fmt: skip
    data = str(shared_data / "voc_animals_160px")
    (entry,) = probes.run(recipe, ["none"], data, tmp_path / "out", device="cpu").results
    assert 18 < entry.metrics["res3/balanced"] < 60
