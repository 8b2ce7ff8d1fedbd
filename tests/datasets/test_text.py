"""Label files as people save them, and files that cannot be what their name says."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dupr_cli import prepare
from dupr_cli.artifacts.files import is_present
from dupr_cli.datasets.coco import image_path
from dupr_cli.datasets.text import read_text
from dupr_cli.datasets.voc import find_voc_trees
from dupr_cli.errors import RunError, UsageError
from tests.support.images import noise_image
from tests.support.labelled_files import voc_xml

GIBIBYTE = 1 << 30


def sparse(path: Path, size: int) -> Path:
    """A file of zeros that takes no space."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.truncate(path, size)
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_every_encoding_and_line_end_gives_the_same_text(
    tmp_path: Path, encoding: str, end: str
) -> None:
    file = tmp_path / "classes.txt"
    file.write_bytes(f"Schraube{end}Muttermäher{end}".encode(encoding))
    assert read_text(file) == "Schraube\nMuttermäher\n"


def test_a_list_of_gigabytes_is_refused_by_name(tmp_path: Path) -> None:
    file = sparse(tmp_path / "train.txt", GIBIBYTE)
    with pytest.raises(UsageError, match=r"train\.txt: it is larger than 256 MiB"):
        read_text(file)


def test_an_annotation_of_gigabytes_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "JPEGImages").mkdir()
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\nb\n")
    (tmp_path / "Annotations" / "a.xml").write_text(voc_xml((2, 2, 9, 9), (40, 30)))
    sparse(tmp_path / "Annotations" / "b.xml", GIBIBYTE)
    (tree,) = find_voc_trees(tmp_path)
    assert len(tree.boxes("a")) == 1
    with pytest.raises(RunError, match=r"b\.xml: the annotation cannot be used: it is larger"):
        tree.boxes("b")


def test_a_name_that_no_file_can_have_is_that_of_a_missing_file(tmp_path: Path) -> None:
    """The fault behind this test: one such name ended the preparation of the whole set."""
    name = "x" * 5000
    assert not is_present(image_path(tmp_path, f"{name}.jpg"))
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    noise_image(1).save(tmp_path / "JPEGImages/a.png")
    (tmp_path / "Annotations/a.xml").write_text(voc_xml((2, 2, 9, 9), (48, 40)))
    (tmp_path / "ImageSets/Main/train.txt").write_text(f"a\n{name}\n")
    assert prepare.run("default", tmp_path, tmp_path / "out", workers=1).samples == {"train": 1}
    (line,) = (tmp_path / "out/skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == "cannot be read: File name too long"
