"""Leaks: test images are found in pre-training shards by their bytes and by their look."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dupr_cli.artifacts.shard_files import Sample, write_shard
from dupr_cli.artifacts.shards import Manifest, ShardEntry
from dupr_cli.datasets.labelled import LabelledSet, open_labelled
from dupr_cli.evaluate.leaks import find_leaks
from dupr_cli.progress import SilentReporter
from tests.support.labelled_files import save
from tests.support.labelled_scenes import add_split, annotation_xml


def picture(seed: int) -> Image.Image:
    """Clouds of colour: no two seeds look alike."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((160, 120), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


@pytest.fixture
def tested(tmp_path: Path) -> LabelledSet:
    """Test images 0 to 4."""
    root = tmp_path / "VOC"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for number in range(5):
        (root / "JPEGImages" / f"t{number}.jpg").write_bytes(jpeg(picture(number)))
        xml = annotation_xml([("thing", 10, 10, 60, 60)])
        (root / "Annotations" / f"t{number}.xml").write_text(xml)
    add_split(root, "val", [f"t{number}" for number in range(5)])
    return open_labelled(str(root), ["val"], SilentReporter())


def shards(folder: Path, images: dict[str, bytes]) -> str:
    folder.mkdir()
    samples = [Sample(key, "jpg", data) for key, data in images.items()]
    index = write_shard(folder / "train-000000.tar", samples)
    entry = ShardEntry("train-000000.tar", len(index), index.bytes, index.sha256)
    Manifest({"train": [entry]}, [], 0, {}, "", {}, "", "").write(folder)
    return str(folder)


def test_a_photograph_that_its_camera_turned_is_found_upright(tmp_path: Path) -> None:
    root = tmp_path / "VOC"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    save(root / "JPEGImages/a.jpg", picture(1).transpose(Image.Transpose.ROTATE_90), 6)
    (root / "Annotations/a.xml").write_text(annotation_xml([("thing", 10, 10, 60, 60)]))
    add_split(root, "val", ["a"])
    photograph = open_labelled(str(root), ["val"], SilentReporter())
    upright = shards(tmp_path / "seen", {"upright": jpeg(picture(1))})
    assert find_leaks(photograph, upright, 0, SilentReporter()).test_images == 1


def test_copies_and_resized_copies_are_found_and_nothing_else(
    tested: LabelledSet, tmp_path: Path
) -> None:
    seen = {
        **{f"other{number}": jpeg(picture(number)) for number in range(100, 140)},
        "same": jpeg(picture(1)),
        "smaller": jpeg(picture(3).resize((80, 60)), quality=60),
        "broken": b"no image",
    }
    leaks = find_leaks(tested, shards(tmp_path / "s", seen), 0, SilentReporter())
    found = {(leak.test_image, leak.pretraining_image, leak.same_bytes) for leak in leaks.found}
    assert found == {("t1", "same", True), ("t3", "smaller", False)}
    assert (leaks.test_images, leaks.tested, leaks.pretraining_images) == (2, 5, 43)
    assert str(leaks).startswith("2 of 5 test images are among the 43 of")


def test_workers_find_the_same(tested: LabelledSet, tmp_path: Path) -> None:
    address = shards(tmp_path / "s", {f"x{n}": jpeg(picture(n)) for n in range(4)})
    assert find_leaks(tested, address, 0, SilentReporter()) == find_leaks(
        tested, address, 2, SilentReporter()
    )


@pytest.mark.slow
def test_the_real_sets_overlap_is_seen(shared_data: Path) -> None:
    """The unlabelled photographs hold the labelled ones' training images, at another size."""
    tree = str(shared_data / "voc_animals_160px")
    tested = open_labelled(tree, ["val"], SilentReporter()).subset(range(40))
    address = str(shared_data / "unlabelled_96px" / "shard-{000000..000007}.tar")
    leaks = find_leaks(tested, address, 0, SilentReporter())
    assert leaks.pretraining_images == 14_402
    assert leaks.test_images >= 38
