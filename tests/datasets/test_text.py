"""Label files as people save them, and files that cannot be what their name says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dupr_cli.datasets.text import read_text
from dupr_cli.datasets.voc import find_voc_trees
from dupr_cli.errors import RunError, UsageError
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
