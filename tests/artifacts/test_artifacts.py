"""Round trips of every artifact, and what happens to damaged ones."""

from __future__ import annotations

import json
import tarfile
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
import torchvision
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torchvision.datasets.voc import VOCDetection

from dupr_cli.artifacts import run as run_module
from dupr_cli.artifacts.files import atomic_file
from dupr_cli.artifacts.labels import Box
from dupr_cli.artifacts.results import DatasetIdentity, Results, WeightsResult
from dupr_cli.artifacts.run import Checkpoint, CheckpointState, MetricsLog, write_checkpoint
from dupr_cli.artifacts.shard_files import Sample, index_path, scan_tar, write_shard
from dupr_cli.artifacts.shards import open_shards
from dupr_cli.artifacts.weights import (
    Weights,
    read_weights,
    write_weights,
)
from dupr_cli.datasets.voc import VocTree, find_voc_trees
from dupr_cli.errors import RunError, UsageError
from dupr_cli.models.backbone import load_backbone
from dupr_cli.models.resnet import ResNetBackbone
from tests.support.images import encode, noise_image, write_shards
from tests.support.labelled_scenes import voc_year
from tests.support.weights import METADATA

names = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=12)
boxes = st.builds(
    Box,
    names,
    *[st.floats(0, 1e4, allow_nan=False)] * 4,
    difficult=st.booleans(),
    truncated=st.booleans(),
    crowd=st.booleans(),
)
samples = st.builds(
    Sample,
    key=st.from_regex(r"[a-z0-9_-]{1,120}", fullmatch=True),
    extension=st.sampled_from(["jpg", "png", "webp"]),
    image=st.binary(min_size=1, max_size=2000),
    source=names,
    width=st.integers(1, 9999),
    height=st.integers(1, 9999),
    boxes=st.none() | st.lists(boxes, max_size=4).map(tuple),
)


@settings(max_examples=40)
@given(st.lists(samples, min_size=1, max_size=8, unique_by=lambda s: s.key))
def test_shard_gives_back_what_went_in(
    tmp_path_factory: pytest.TempPathFactory, written: list[Sample]
) -> None:
    tar = tmp_path_factory.mktemp("shard") / "train-000000.tar"
    index = write_shard(tar, written)
    assert index.bytes == tar.stat().st_size
    opened = open_shards(str(tar))
    assert [opened[i] for i in range(len(opened))] == written
    # A scan of the tar finds what the index says.
    scanned = scan_tar(tar)
    assert (scanned.keys, scanned.images, scanned.boxes) == (
        index.keys,
        index.images,
        index.boxes,
    )


def test_plain_webdataset_reads_the_shards(tiny_shards: Path) -> None:
    pattern = str(tiny_shards / "train-{000000..000004}.tar")
    found = {s["__key__"]: s for s in webdataset.WebDataset(pattern, shardshuffle=False)}
    opened = open_shards(str(tiny_shards), "train")
    assert len(found) == len(opened) == 90
    for number in range(0, 90, 17):
        sample = opened[number]
        assert found[sample.key]["jpg"] == sample.image
        assert json.loads(found[sample.key]["json"])["width"] == 48


def test_shards_of_webdatasets_own_writer_open_without_index(tmp_path: Path) -> None:
    pattern = str(tmp_path / "foreign-%06d.tar")
    with webdataset.ShardWriter(pattern, maxcount=4, verbose=0) as writer:
        for number in range(10):
            writer.write({"__key__": f"a/k{number}", "jpg": encode(noise_image(number))})
    opened = open_shards(str(tmp_path / "foreign-{000000..000002}.tar"))
    assert [sample.key for sample in map(opened.__getitem__, range(10))] == [
        f"a/k{n}" for n in range(10)
    ]


def test_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    sample = Sample("k", "jpg", b"1234", "k.jpg", 2, 2, (Box("cat", 0, 0, 1, 1),))
    digests = [write_shard(tmp_path / f"{n}.tar", [sample]).sha256 for n in range(2)]
    assert digests[0] == digests[1]
    with tarfile.open(tmp_path / "0.tar") as tar:
        assert {(m.mtime, m.uid, m.uname, m.mode) for m in tar} == {(0, 0, "", 0o644)}


def test_cut_off_shard_is_named_when_it_is_opened(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "s", 30)
    tar = folder / "train-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-3000])
    with pytest.raises(UsageError, match=r"train-000001.tar is cut off.* by the manifest"):
        open_shards(str(folder), "train")


def test_cut_off_foreign_shard_names_the_last_whole_member(tmp_path: Path) -> None:
    tar = write_shards(tmp_path / "s", 5) / "train-000000.tar"
    index_path(tar).unlink()
    tar.write_bytes(tar.read_bytes()[:2600])
    with pytest.raises(RunError, match=r"train-000000.tar: the shard is cut off .* after"):
        open_shards(str(tar))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("nowhere.tar", "the shard does not exist"),
        ("part-{000000..000003}.tar", "the shard does not exist .and 3 more"),
        ("", "holds no shards"),
    ],
)
def test_missing_shards_are_a_usage_error(address: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        open_shards(str(tmp_path / address))


def test_unknown_split_lists_the_known_ones(tiny_shards: Path) -> None:
    with pytest.raises(UsageError, match="no split 'val'; its splits are train"):
        open_shards(str(tiny_shards), "val")


def test_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")

    def fail() -> None:
        with atomic_file(path) as file:
            file.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def state(step: int) -> CheckpointState:
    return CheckpointState(step, "resnet18", [0.5] * 3, [0.2] * 3, 64, "digest", {})


def checkpoint_tensors(fill: float) -> dict[str, torch.Tensor]:
    tensors = ResNetBackbone("resnet18").state_dict()
    return {f"query.backbone.{name}": tensor + fill for name, tensor in tensors.items()}


def test_checkpoint_round_trip_and_pruning(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3).T, "n": torch.tensor(3)}
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, state(step), tensors, {"m": torch.ones(2)}, keep=2)
    names = [p.name for p in run_module.list_checkpoints(tmp_path)]
    assert names == ["step-00000002", "step-00000003"]
    newest = run_module.newest_checkpoint(tmp_path)
    assert newest.state.step == 3
    assert (tmp_path / "latest").resolve() == newest.path.resolve()
    assert torch.equal(load_file(newest.path / "model.safetensors")["a"], tensors["a"])


@pytest.mark.parametrize("damage", ["truncate", "remove", "flip"])
def test_damaged_checkpoint_is_seen_and_the_one_before_is_used(tmp_path: Path, damage: str) -> None:
    for step in (1, 2):
        write_checkpoint(tmp_path, state(step), {"a": torch.ones(99)}, {}, keep=3)
    file = tmp_path / "checkpoints" / "step-00000002" / "model.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "truncate":
        file.write_bytes(data[:-4])
    elif damage == "remove":
        file.unlink()
    else:
        data[-1] ^= 1
        file.write_bytes(data)
    with pytest.raises(UsageError, match="damaged"):
        Checkpoint.read(file.parent, verify=True)
    if damage != "flip":  # only a sum over the bytes can see a flipped bit
        assert run_module.newest_checkpoint(tmp_path).state.step == 1


def test_metrics_rewind_drops_later_and_broken_lines(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    for step in (1, 2, 3):
        log.append({"step": step, "loss": 0.5})
    with log.path.open("a") as file:
        file.write('{"step": 4, "lo')
    log.rewind(2)
    assert [line["step"] for line in log.read()] == [1, 2]


def test_weights_file_round_trip(tmp_path: Path) -> None:
    tensors = ResNetBackbone("resnet18").state_dict()
    write_weights(tmp_path / "w.safetensors", tensors, METADATA)
    read = read_weights(str(tmp_path / "w.safetensors"))
    assert read.metadata == METADATA
    assert read.tensors.keys() == tensors.keys()
    assert all(torch.equal(read.tensors[n], tensors[n]) for n in tensors)
    target = torchvision.models.resnet18()
    target.fc = torch.nn.Identity()
    target.load_state_dict(read.tensors, strict=True)


def test_run_checkpoint_and_weights_file_give_the_same_weights(tmp_path: Path) -> None:
    tensors = checkpoint_tensors(1)
    path = write_checkpoint(tmp_path / "run", state(7), tensors, {}, keep=1)
    for address in (tmp_path / "run", path, path / "model.safetensors", tmp_path / "run/latest"):
        read = read_weights(str(address))
        assert read.metadata.step == 7
        assert torch.equal(read.tensors["conv1.weight"], tensors["query.backbone.conv1.weight"])


def test_weights_missing_a_tensor_are_refused_whole() -> None:
    tensors = ResNetBackbone("resnet18").state_dict()
    del tensors["layer4.1.bn2.weight"]
    target = ResNetBackbone("resnet18")
    before = target.state_dict()["conv1.weight"].clone()
    with pytest.raises(UsageError, match=r"119 of 120 tensors match, 1 missing \(layer4"):
        load_backbone(target, Weights("w", METADATA, tensors))
    assert torch.equal(target.state_dict()["conv1.weight"], before)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.safetensors", b"\x10\x00\x00\x00\x00\x00\x00\x00{", "not a whole safetensors file"),
        ("old.pth", b"\x80\x02", "weights are read from .safetensors files only"),
    ],
)
def test_unreadable_weights(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_weights(str(tmp_path / name))


def test_safetensors_without_our_header_is_refused(tmp_path: Path) -> None:
    save_file({"conv1.weight": torch.zeros(2)}, tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match="does not describe the weights"):
        read_weights(str(tmp_path / "w.safetensors"))


def test_results_round_trip(tmp_path: Path) -> None:
    identity = DatasetIdentity("voc", "val", 3, 5, "abc")
    entry = WeightsResult("none", None, "resnet18", {"AP": 1.5}, {"cat": {"AP": 1.5}})
    results = Results(
        "voc", "VOC07", identity, identity, ["cat"], [entry], {"seed": 0}, "d", [0], "0.1"
    )
    results.write(tmp_path)
    assert Results.read(tmp_path) == results
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(UsageError, match="not a results file"):
        Results.read(tmp_path)


def test_voc_tree_counts_pixels_from_one_inclusive(tmp_path: Path) -> None:
    tree = voc_year(
        tmp_path / "VOC2007",
        "<object><name>cat</name><difficult>1</difficult><bndbox><xmin>1</xmin><ymin>2</ymin>"
        "<xmax>10</xmax><ymax>2</ymax></bndbox><part><name>head</name><bndbox><xmin>1</xmin>"
        "<ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part></object>",
    )
    assert tree.boxes("a") == [Box("cat", 0, 1, 10, 2, difficult=True)]
    assert tree.splits == ["train"]
    assert tree.image_ids("train") == ["a", "b"]
    assert find_voc_trees(tmp_path) == find_voc_trees(tmp_path / "VOC2007") == [tree]
    with pytest.raises(RunError, match=r"b.xml: the annotation is missing"):
        tree.boxes("b")


def test_torchvision_reads_the_same_boxes(shared_data: Path) -> None:
    devkit = shared_data / "voc_animals_160px"
    tree = VocTree(devkit / "VOC2012")
    for image_id in tree.image_ids("val")[:50]:
        parsed = VOCDetection.parse_voc_xml(
            ET.parse(tree.root / "Annotations" / f"{image_id}.xml").getroot()
        )
        expected = [
            (o["name"], *(float(o["bndbox"][k]) for k in ("xmin", "ymin", "xmax", "ymax")))
            for o in parsed["annotation"]["object"]
        ]
        found = [(b.name, b.x_min + 1, b.y_min + 1, b.x_max, b.y_max) for b in tree.boxes(image_id)]
        assert found == expected
