"""Every source against a reader that no one here wrote, where there is one."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from torchvision.datasets import CocoDetection, VOCDetection

from dupr_cli import prepare
from dupr_cli.artifacts.labels import Box
from dupr_cli.artifacts.shard_files import Sample
from dupr_cli.artifacts.shards import Manifest, open_shards
from dupr_cli.datasets.placement import Placement, decode_mask, encode_mask
from dupr_cli.datasets.voc import VocTree
from dupr_cli.errors import UsageError
from dupr_cli.recipe import PrepareRecipe, load_recipe
from tests.support import command_line
from tests.support.images import encode, noise_image, write_shards
from tests.support.servers import serve


def prepared(
    source: object, out: Path, *overrides: str, workers: int = 1
) -> dict[str, list[Sample]]:
    """Samples by split, after `dupr prepare`."""
    recipe = load_recipe(PrepareRecipe, None, list(overrides))
    prepare.run(recipe, str(source), out, workers=workers)
    found = {}
    for split in Manifest.read(out).splits:
        shards = open_shards(str(out), split)
        found[split] = [shards.whole(i) for i in range(len(shards))]
    return found


# --- VOC -------------------------------------------------------------------------------------


def voc_objects(annotation: dict[str, Any]) -> list[tuple[object, ...]]:
    """Of torchvision's VOCDetection: class, inclusive corners from 1, flags."""
    return [
        (
            o["name"], *(float(o["bndbox"][k]) for k in ("xmin", "ymin", "xmax", "ymax")),
            o.get("difficult", "0") == "1", o.get("truncated", "0") == "1",
        )
        for o in annotation["annotation"].get("object", [])
    ]  # fmt: skip


def test_voc_07_and_12_as_torchvision_reads_them(shared_data: Path, tmp_path: Path) -> None:
    """Two years joined: 07+12 trainval, and the test split of one year."""
    devkit = tmp_path / "VOCdevkit"
    for year, place in (("VOC2007", "voc_raccoon"), ("VOC2012", "voc_animals_160px/VOC2012")):
        shutil.copytree(shared_data / place, devkit / year)
        tree = VocTree(devkit / year)
        split = "train" if "train" in tree.splits else tree.splits[0]
        ids = tree.image_ids(split)[:120]
        main = devkit / year / "ImageSets" / "Main"
        shutil.rmtree(main)
        main.mkdir()
        for name, chosen in (("train", ids[:60]), ("val", ids[60:100]), ("test", ids[100:])):
            (main / f"{name}.txt").write_text("\n".join(chosen) + "\n")
        (main / "trainval.txt").write_text("\n".join(ids[:100]) + "\n")
    found = prepared(devkit, tmp_path / "out", "source.splits=[trainval, 2007/test]")
    assert {split: len(samples) for split, samples in found.items()} == {
        "trainval": 200, "test": 20,
    }  # fmt: skip
    for split, years in (("trainval", ("2007", "2012")), ("test", ("2007",))):
        expected: dict[tuple[str, str], tuple[bytes, list[tuple[object, ...]]]] = {}
        for year in years:
            reader = VOCDetection(str(tmp_path), year, split)
            for path, (_, annotation) in zip(reader.images, reader, strict=True):
                key = (f"VOC{year}", Path(path).stem)
                expected[key] = (Path(path).read_bytes(), voc_objects(annotation))
        for sample in found[split]:
            year, image_id = sample.source.split("/")
            data, objects = expected.pop((year, image_id))
            assert sample.image == data
            assert sample.boxes is not None
            assert objects == [
                (b.name, b.x_min + 1, b.y_min + 1, b.x_max, b.y_max, b.difficult, b.truncated)
                for b in sample.boxes
            ]
        assert not expected


def test_a_split_that_voc_does_not_have_is_named(shared_data: Path, tmp_path: Path) -> None:
    tree = shared_data / "voc_animals_160px"
    with pytest.raises(UsageError, match=r"no split '2007/train'; ImageSets/Main of VOC2012 has"):
        prepared(tree, tmp_path / "out", "source.splits=[2007/train]")


# --- COCO ------------------------------------------------------------------------------------


@pytest.fixture
def coco_tree(shared_data: Path, tmp_path: Path) -> Path:
    """COCO's own annotations of 100 images of val2014, with pictures of those sizes."""
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    (root / "val2014").mkdir()
    there = shared_data / "metric_cases/coco_val2014_100/instances_val2014_100.json"
    content = json.loads(there.read_text())
    for number, image in enumerate(content["images"]):
        size = (image["width"], image["height"])
        noise_image(number, *size).save(root / "val2014" / image["file_name"])
    people = [a for a in content["annotations"] if a["category_id"] == 1]
    file = root / "annotations" / "instances_val2014.json"
    file.write_text(json.dumps(content))
    # Keypoints lie in a file of their own, under the same ids.
    keypoints = [
        {"id": a["id"], "keypoints": [10, 20, 2, 0, 0, 0], "num_keypoints": 1} for a in people[:5]
    ]
    (root / "annotations" / "person_keypoints_val2014.json").write_text(
        json.dumps({"images": [], "annotations": keypoints})
    )
    return root


def test_coco_as_pycocotools_and_torchvision_read_it(coco_tree: Path, tmp_path: Path) -> None:
    found = prepared(coco_tree, tmp_path / "out")
    assert list(found) == ["val"]
    file = str(coco_tree / "annotations" / "instances_val2014.json")
    coco = COCO(file)
    reader = CocoDetection(str(coco_tree / "val2014"), file)
    samples = {sample.info["id"]: sample for sample in found["val"]}
    assert sorted(samples) == reader.ids
    crowds = keypoints = 0
    for number, image_id in enumerate(reader.ids):
        picture, targets = reader[number]
        sample = samples[image_id]
        assert sample.boxes is not None
        assert (np.asarray(Image.open(io.BytesIO(sample.image))) == np.asarray(picture)).all()
        assert len(sample.boxes) == len(targets)
        for box, target in zip(sample.boxes, targets, strict=True):
            x, y, width, height = target["bbox"]
            assert box.corners == pytest.approx((x, y, x + width, y + height), abs=1e-6)
            assert box.name == coco.cats[target["category_id"]]["name"]
            assert box.crowd == bool(target["iscrowd"])
            assert box.details["segmentation"] == target["segmentation"]
            assert box.details["area"] == target["area"]
            crowds += box.crowd
            keypoints += "keypoints" in box.details
    assert crowds
    assert keypoints == 5


@pytest.mark.slow
def test_masks_and_polygons_shrink_with_their_image(coco_tree: Path, tmp_path: Path) -> None:
    found = prepared(coco_tree, tmp_path / "out", "image.max_side=200")
    by_id = COCO(str(coco_tree / "annotations" / "instances_val2014.json"))
    overlaps = []
    for sample in found["val"]:
        assert sample.boxes is not None
        assert max(sample.width, sample.height) == 200
        for box in sample.boxes:
            large = Image.fromarray(by_id.annToMask(by_id.anns[box.details["id"]]) * 255)
            expected = np.asarray(large.resize((sample.width, sample.height))) > 127
            shrunk = box.details["segmentation"]
            rle = coco_mask.frPyObjects(shrunk, sample.height, sample.width)
            if not isinstance(shrunk, dict):
                rle = coco_mask.merge(rle)
            mask = coco_mask.decode(rle) > 0
            if expected.sum() >= 200:
                overlaps.append((mask & expected).sum() / (mask | expected).sum())
    assert len(overlaps) > 50
    assert np.median(overlaps) > 0.95
    assert min(overlaps) > 0.7


bitmaps = st.integers(1, 9).flatmap(
    lambda height: st.integers(1, 9).flatmap(
        lambda width: st.lists(st.booleans(), min_size=height * width, max_size=height * width).map(
            lambda bits: np.array(bits).reshape(height, width)
        )
    )
)


@given(bitmaps)
def test_masks_are_coded_as_pycocotools_codes_them(pixels: np.ndarray[Any, Any]) -> None:
    theirs = coco_mask.encode(np.asfortranarray(pixels.astype(np.uint8)))
    assert (decode_mask(theirs) == pixels).all()  # the text form
    ours = encode_mask(pixels)
    assert (decode_mask(ours) == pixels).all()
    back = coco_mask.decode(coco_mask.frPyObjects(ours, *pixels.shape))
    assert (back == pixels).all()


@given(bitmaps, st.integers(1, 8))
def test_masks_turn_as_pillow_turns_pictures(pixels: np.ndarray[Any, Any], way: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = way
    data = encode(Image.fromarray(pixels.astype(np.uint8) * 255), "PNG", exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))) > 127
    placement = Placement.upright(way, pixels.shape[1], pixels.shape[0])
    assert (decode_mask(placement.mask(encode_mask(pixels))) == upright).all()


@settings(max_examples=50)
@given(st.integers(1, 8), st.integers(0, 11), st.integers(0, 8))
def test_keypoints_name_pixels(way: int, x: int, y: int) -> None:
    """The pixel that a keypoint names is the same pixel afterwards."""
    from PIL import ImageOps

    pixels = np.zeros((9, 12), np.uint8)
    pixels[y, x] = 255
    exif = Image.Exif()
    exif[0x0112] = way
    data = encode(Image.fromarray(pixels), "PNG", exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    box = Box("a", 0, 0, 1, 1, details={"keypoints": [x, y, 2, 0, 0, 0]})
    moved = Placement.upright(way, 12, 9).box(box).details["keypoints"]
    rows, columns = np.nonzero(upright)
    assert moved[:3] == [columns[0], rows[0], 2]
    assert moved[3:] == [0, 0, 0]  # not there: it has no place to go


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "is an object with images"),
        ("{", "cannot be read as JSON"),
        ('{"images": [{"id": 1}]}', "none of 1 images can be used.*an id and a file_name"),
        ('{"images": [{"id": 1, "file_name": "gone.jpg"}]}', "is not in .*source.images=FOLDER"),
    ],
)
def test_wrong_coco_files_are_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "some.json").write_text(content)
    with pytest.raises(UsageError, match=message):
        prepared(tmp_path / "some.json", tmp_path / "out")


# --- YOLO ------------------------------------------------------------------------------------


@pytest.fixture
def yolo_tree(shared_data: Path, tmp_path: Path) -> Path:
    """The raccoons as YOLO has them."""
    root = tmp_path / "yolo"
    tree = VocTree(shared_data / "voc_raccoon")
    ids = tree.image_ids(tree.splits[0])[:30]
    for number, image_id in enumerate(ids):
        split = "train" if number < 20 else "val"
        path = tree.image_path(image_id)
        width, height = Image.open(path).size
        lines = [
            f"1 {(b.x_min + b.x_max) / 2 / width:.6f} {(b.y_min + b.y_max) / 2 / height:.6f} "
            f"{(b.x_max - b.x_min) / width:.6f} {(b.y_max - b.y_min) / height:.6f}"
            for b in tree.boxes(image_id)
        ]
        for part in ("images", "labels"):
            (root / part / split).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, root / "images" / split / path.name)
        if number != 3:  # an image without labels: background
            (root / "labels" / split / f"{path.stem}.txt").write_text("\n".join(lines))
    data = {"path": "/somewhere/else", "train": "images/train", "val": "images/val",
            "names": {0: "cat", 1: "raccoon"}}  # fmt: skip
    (root / "data.yaml").write_text(yaml.safe_dump(data))
    return root


def test_yolo_labels_are_the_boxes_they_were_made_of(
    yolo_tree: Path, shared_data: Path, tmp_path: Path
) -> None:
    tree = VocTree(shared_data / "voc_raccoon")
    for number, source in enumerate((yolo_tree, yolo_tree / "data.yaml")):
        found = prepared(source, tmp_path / f"out{number}")
        assert {split: len(samples) for split, samples in found.items()} == {
            "train": 20, "val": 10,
        }  # fmt: skip
        without = 0
        for sample in (*found["train"], *found["val"]):
            assert sample.boxes is not None
            image_id = Path(sample.source).stem
            assert sample.image == tree.image_path(image_id).read_bytes()
            expected = tree.boxes(image_id)
            without += not sample.boxes
            for box, known in zip(sample.boxes, expected, strict=False):
                assert box.name == "raccoon"
                # Six digits of the longest side.
                assert box.corners == pytest.approx(known.corners, abs=2e-6 * 4000)
        assert without == 1


def test_yolo_polygons_and_wrong_lines(tmp_path: Path) -> None:
    for part in ("images", "labels"):
        (tmp_path / "y" / part).mkdir(parents=True)
    for name in "abc":
        noise_image(ord(name), 40, 20).save(tmp_path / "y/images" / f"{name}.png")
    (tmp_path / "y/classes.txt").write_text("cat\ndog\n")
    (tmp_path / "y/labels/a.txt").write_text("1 0.25 0.5 0.75 0.5 0.5 1.0\n")
    (tmp_path / "y/labels/b.txt").write_text("0 0.5 0.5 0.1 0.1\n7 0.5 0.5 0.1 0.1\n")
    (tmp_path / "y/labels/c.txt").write_text("0 0.5 half 0.1 0.1\n")
    found = prepared(tmp_path / "y", tmp_path / "out")
    polygon, one, none = found["train"]
    assert polygon.boxes is not None
    assert polygon.boxes[0].name == "dog"
    assert polygon.boxes[0].corners == (10, 10, 30, 20)
    assert polygon.boxes[0].details["segmentation"] == [[10, 10, 30, 10, 20, 20]]
    assert [len(sample.boxes or ()) for sample in (one, none)] == [1, 0]
    notes = (tmp_path / "out/notes.jsonl").read_text().splitlines()
    assert len(notes) == 2
    assert "label left out: " in notes[0]
    assert "b.txt, line 2: class 7 has no name" in notes[0]
    assert "c.txt, line 1: not a label of YOLO" in notes[1]


# --- folders, archives, shards, lists --------------------------------------------------------


def test_class_folders_become_labels_and_splits(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("val", 2)):
        for name in ("n01440764", "n01443537"):
            folder = tmp_path / "imagenet" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                noise_image(len(list(tmp_path.rglob("*.JPEG")))).save(
                    folder / f"{split}{name}_{number}.JPEG", "JPEG"
                )
    found = prepared(tmp_path / "imagenet", tmp_path / "out")
    assert {split: len(samples) for split, samples in found.items()} == {"train": 6, "val": 4}
    assert all(s.label == s.source.split("/")[1] for samples in found.values() for s in samples)
    plain = prepared(tmp_path / "imagenet/train", tmp_path / "plain", "source.kind=classes")
    assert {s.label for s in plain["train"]} == {"n01440764", "n01443537"}
    again = prepared(tmp_path / "out", tmp_path / "again")
    assert [s.label for s in again["train"]] == [s.label for s in found["train"]]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip"])
def test_archives_give_what_their_files_are(
    image_folder: Path, tmp_path: Path, suffix: str
) -> None:
    archive = tmp_path / "some" / f"images{suffix}"
    archive.parent.mkdir()
    files = sorted(p for p in image_folder.rglob("*") if p.is_file())
    if suffix == ".zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as opened:
            for path in files:
                opened.write(path, path.relative_to(image_folder))
            opened.writestr("notes.txt", "left alone")
    else:
        plain = io.BytesIO()
        with tarfile.open(fileobj=plain, mode="w") as tar:
            tar.add(image_folder, "top")
        pack: dict[str, Any] = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
        kind = {"tgz": "gz"}.get(suffix.rpartition(".")[2], suffix.rpartition(".")[2])
        archive.write_bytes(pack.get(kind, bytes)(plain.getvalue()))
    for number, source in enumerate((archive, archive.parent)):
        out = tmp_path / f"out{number}"
        (samples,) = prepared(source, out, "shard.max_samples=5", workers=2).values()
        assert sorted(s.image for s in samples) == sorted(p.read_bytes() for p in files)
        assert all(s.source.startswith(archive.name) for s in samples)
        assert not (out / ".prepare").exists()


def test_a_damaged_archive_is_named(image_folder: Path, tmp_path: Path) -> None:
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        for path in image_folder.glob("*.jpg"):
            opened.write(path, path.name)
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match=r"a.zip: the archive is cut off or damaged"):
        prepared(archive, tmp_path / "out")
    # Damage inside one member costs that one.
    inside = (image_folder / "image01.jpg").read_bytes()[-120:-60]
    archive.write_bytes(whole.replace(inside, b"x" * 60))
    found = prepared(archive, tmp_path / "out")
    assert len(found["train"]) == 11
    assert "the zip archive cannot be read" in (tmp_path / "out/skipped.jsonl").read_text()


def test_shards_of_webdatasets_writer_keep_all_their_members(tmp_path: Path) -> None:
    (tmp_path / "wds").mkdir()
    with webdataset.ShardWriter(str(tmp_path / "wds/a-%06d.tar"), maxcount=3, verbose=0) as sink:
        for number in range(7):
            sink.write(
                {"__key__": f"k{number}", "jpg": encode(noise_image(number)), "cls": number,
                 "json": {"caption": f"c{number}", "license": 3}, "txt": "a text"}
            )  # fmt: skip
    for number, source in enumerate(("wds", "wds/a-{000000..000002}.tar")):
        found = prepared(tmp_path / source, tmp_path / f"out{number}", "image.max_side=20")
        (samples,) = found.values()
        assert [s.key for s in samples] == [f"k{number}" for number in range(7)]
        assert all(s.info == {"caption": f"c{s.key[1]}", "license": 3} for s in samples)
        assert all(s.extras["txt"] == b"a text" for s in samples)
        assert [int(s.extras["cls"]) for s in samples] == list(range(7))
        assert {(s.width, s.height) for s in samples} == {(20, 17)}
        # And webdataset reads ours as it reads its own.
        ours = webdataset.WebDataset(
            str(tmp_path / f"out{number}" / "train-000000.tar"), shardshuffle=False
        ).decode("pil")
        read = list(ours)
        assert [s["__key__"] for s in read] == [f"k{number}" for number in range(7)]
        assert [s["cls"] for s in read] == list(range(7))
        assert read[0]["jpg"].size == (20, 17)


def write_img2dataset(folder: Path, shards: int, per_shard: int) -> None:
    """Tars of jpg, json and txt under numbers, Parquet and statistics beside them."""
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(per_shard):
                key = f"{shard:05d}{number:04d}"
                info = {"url": f"http://x/{key}.jpg", "key": key, "status": "success",
                        "width": 48, "height": 40, "sha256": "of the original"}  # fmt: skip
                for suffix, data in (
                    ("jpg", encode(noise_image(per_shard * shard + number))),
                    ("json", json.dumps(info).encode()), ("txt", b"a caption"),
                ):  # fmt: skip
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        (folder / f"{shard:05d}_stats.json").write_text("{}")
        (folder / f"{shard:05d}.parquet").write_bytes(b"PAR1")


def test_the_layout_of_img2dataset_goes_in(tmp_path: Path) -> None:
    folder = tmp_path / "laion"
    folder.mkdir()
    write_img2dataset(folder, 2, 4)
    assert len(open_shards(str(folder))) == 8  # as pretrain opens it
    found = prepared(folder, tmp_path / "out")
    assert [s.key for s in found["train"]] == [
        f"{i:05d}{j:04d}" for i in range(2) for j in range(4)
    ]
    assert all(s.info["url"].endswith(f"{s.key}.jpg") for s in found["train"])
    assert all(s.extras == {"txt": b"a caption"} for s in found["train"])


@pytest.mark.slow
def test_labels_and_splits_of_our_own_shards_survive(shared_data: Path, tmp_path: Path) -> None:
    first = prepared(shared_data / "voc_animals_160px", tmp_path / "a", "shard.max_samples=400")
    second = prepared(tmp_path / "a", tmp_path / "b", "shard.max_samples=100")
    for split, samples in first.items():
        assert [(s.key, s.image, s.boxes, s.source) for s in samples] == [
            (s.key, s.image, s.boxes, s.source) for s in second[split]
        ]


@pytest.mark.parametrize("kind", ["txt", "csv", "tsv", "parquet"])
def test_lists_of_paths_and_addresses(image_folder: Path, tmp_path: Path, kind: str) -> None:
    files = sorted(p for p in image_folder.rglob("*") if p.is_file())
    with serve(image_folder) as served:
        names = [str(p) for p in files[:8]]
        names += [str(p.relative_to(tmp_path)) for p in files[8:16]]
        names += [f"{served.url}/{p.relative_to(image_folder).as_posix()}" for p in files[16:]]
        names += [f"{served.url}/gone.jpg", "not-here.jpg"]
        write_list(tmp_path / f"list.{kind}", names)
        (samples,) = prepared(tmp_path / f"list.{kind}", tmp_path / "out").values()
    assert [s.source for s in samples] == names[:-2]
    assert [s.image for s in samples] == [p.read_bytes() for p in files]
    lines = (tmp_path / "out/skipped.jsonl").read_text().splitlines()
    reasons = {entry["path"]: entry["reason"] for entry in map(json.loads, lines)}
    assert reasons["not-here.jpg"] == "the file is missing"
    assert "404" in reasons[f"{served.url}/gone.jpg"]


def write_list(path: Path, names: Sequence[str]) -> None:
    if path.suffix == ".txt":
        path.write_text("\n".join(names) + "\n\n")
    elif path.suffix == ".parquet":
        import pyarrow as arrow
        from pyarrow import parquet

        parquet.write_table(arrow.table({"id": range(len(names)), "url": names}), path)
    else:
        with path.open("w", newline="") as file:
            rows = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            rows.writerow(["id", "path"])
            rows.writerows(enumerate(names))


def test_a_list_without_a_known_column_is_named(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("id,picture\n1,a.jpg\n")
    with pytest.raises(UsageError, match=r"no column path, .*; its columns are id, picture"):
        prepared(tmp_path / "l.csv", tmp_path / "out")
    noise_image(0).save(tmp_path / "a.jpg")
    assert prepared(tmp_path / "l.csv", tmp_path / "out", "source.column=picture")


def test_a_list_that_lies_far_away_is_no_source(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"list.txt: the kind of source is not recognised"):
        prepared("http://localhost/list.txt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_path_that_is_listed_twice_goes_in_once(tmp_path: Path) -> None:
    noise_image(0).save(tmp_path / "a.png")
    noise_image(1).save(tmp_path / "b.png")
    (tmp_path / "l.txt").write_text("a.png\nb.png\na.png\n")
    for number, block in enumerate((10, 1)):
        found = prepared(
            tmp_path / "l.txt", tmp_path / f"o{number}", "filter.duplicates=keep",
            f"shard.max_samples={block}",
        )  # fmt: skip
        assert [s.source for s in found["train"]] == ["a.png", "b.png"]
        assert "listed twice" in (tmp_path / f"o{number}/skipped.jsonl").read_text()


@pytest.mark.slow
def test_data_sets_of_hugging_face(image_folder: Path, tmp_path: Path) -> None:
    import datasets

    files = sorted(p for p in image_folder.rglob("*") if p.is_file())
    for split, part in (("train", files[:20]), ("test", files[20:])):
        table = datasets.Dataset.from_dict(
            {"image": [str(p) for p in part], "n": list(range(len(part)))},
            features=datasets.Features({"image": datasets.Image(), "n": datasets.Value("int64")}),
        )
        (tmp_path / "hub").mkdir(exist_ok=True)
        table.to_parquet(str(tmp_path / "hub" / f"{split}-00000.parquet"))
    found = prepared(f"hf://{tmp_path / 'hub'}", tmp_path / "out", "shard.max_samples=7", workers=2)
    assert [s.image for s in found["train"]] == [p.read_bytes() for p in files[:20]]
    assert [s.image for s in found["test"]] == [p.read_bytes() for p in files[20:]]
    with pytest.raises(UsageError, match=r"no split val; its splits are"):
        prepared(f"hf://{tmp_path / 'hub'}", tmp_path / "o2", "source.splits=[val]")


@pytest.mark.parametrize("name", ["..", "../photos", "photos/../..", "a/b/c"])
def test_what_is_no_name_on_the_hub_is_not_looked_for_on_the_disk(
    name: str, tmp_path: Path
) -> None:
    """The library would read a folder of that name."""
    with pytest.raises(UsageError, match=r"write it as hf://OWNER/NAME.*hf:///FOLDER"):
        prepared(f"hf://{name}", tmp_path / "out")


def test_shards_over_http_are_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUPR_CACHE", str(tmp_path / "cache"))
    near = write_shards(tmp_path / "near", 30)
    with serve(near) as served:
        (far,) = prepared(served.url, tmp_path / "out").values()
    assert len(far) == 30


def test_another_package_provides_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "drone_source"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "from dupr_cli.prepare.sources import Entry, RawImage\n"
        "class Drone:\n"
        "    labelled = remote = False\n"
        "    def __init__(self, address, options, out):\n"
        "        self.address = address\n"
        "    def entries(self):\n"
        "        yield Entry('flight-1', 'a.png')\n"
        "    def read(self, entry):\n"
        "        with open(f'{self.address}/{entry.place}', 'rb') as file:\n"
        "            return RawImage(file.read())\n"
    )
    info = tmp_path / "site" / "drone_source-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: drone-source\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[dupr.sources]\ndrone = drone_source:Drone\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    (tmp_path / "images").mkdir()
    noise_image(0).save(tmp_path / "images" / "a.png")
    found = prepared(tmp_path / "images", tmp_path / "out", "source.kind=drone")
    assert [s.source for s in found["train"]] == ["flight-1"]
    assert "drone_source" in sys.modules
    with pytest.raises(UsageError, match=r"source.kind.*should be one of auto, archive"):
        prepared(tmp_path / "images", tmp_path / "o2", "source.kind=drones")


# --- and out again ---------------------------------------------------------------------------


def test_plain_webdataset_code_reads_our_shards(image_folder: Path, tmp_path: Path) -> None:
    """From a path, a brace pattern and a server, without dupr."""
    if shutil.which("curl") is None:
        pytest.skip("webdataset reads http through curl, which is not installed")
    (expected,) = prepared(image_folder, tmp_path / "out", "shard.max_samples=10").values()
    pattern = "train-{000000..000002}.tar"
    with serve(tmp_path / "out") as served:
        for address, count in (
            (str(tmp_path / "out" / "train-000000.tar"), 10),
            (str(tmp_path / "out" / pattern), 24),
            (f"{served.url}/{pattern}", 24),
        ):
            # As webdataset's documentation opens a set.
            dataset = (
                webdataset.WebDataset(address, shardshuffle=False)
                .decode("pil")
                .to_tuple("__key__", "jpg", "json")
            )
            read = list(dataset)
            assert len(read) == count
            for (key, image, info), sample in zip(read, expected, strict=False):
                assert key == sample.key
                assert info["source"] == sample.source
                assert image.size == (info["width"], info["height"])


@pytest.mark.parametrize("layout", ["webdataset", "img2dataset"])
def test_pretrain_takes_shards_of_others(tmp_path: Path, layout: str) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    if layout == "webdataset":
        pattern = str(folder / "x-%04d.tar")
        with webdataset.ShardWriter(pattern, maxcount=20, verbose=0) as sink:
            for number in range(40):
                sink.write({"__key__": f"k{number}", "png": encode(noise_image(number), "PNG")})
    else:
        write_img2dataset(folder, 2, 20)
    command_line.pretrain(folder, tmp_path / "run", "--steps", 2)
    assert (tmp_path / "run" / "latest" / "model.safetensors").is_file()
