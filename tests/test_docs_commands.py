"""The commands of README.md and of pages of the documentation run as written."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.support.command_line import dupr, pretrain
from tests.support.images import noise_image
from tests.support.labelled_scenes import make_tree
from tests.support.recipes import SMALL_DETECTOR

README = Path(__file__).parents[1] / "README.md"
# What is added to keep each step to seconds; nothing that is written is taken away.
BRIEFLY = {
    "plan": ["--seconds", "1", "--device", "cpu"],
    "pretrain": ["--set", "train.steps=2", "--device", "cpu"],
    "evaluate": [*(word for key in SMALL_DETECTOR for word in ("--set", key)), "--device", "cpu"],
}


def commands() -> list[list[str]]:
    """The dupr commands of the block that begins with `dupr prepare photos/`."""
    blocks = re.findall(r"```bash\n(.*?)```", README.read_text(), re.DOTALL)
    (block,) = (block for block in blocks if block.startswith("dupr prepare photos/"))
    return [shlex.split(line, comments=True)[1:] for line in block.splitlines()]


@pytest.mark.slow
def test_the_path_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for number in range(48):
        noise_image(number).save(tmp_path / "photos" / f"{number}.png")
    make_tree(tmp_path / "VOCdevkit" / "VOC2007")
    stages = commands()
    assert [words[0] for words in stages] == [
        "prepare", "plan", "pretrain", "export", "evaluate", "report",
    ]  # fmt: skip
    for words in stages:
        dupr(*words, *BRIEFLY.get(words[0], []))
    assert "AP50" in (tmp_path / "eval" / "table.txt").read_text()
    assert "<html" in (tmp_path / "report.html").read_text()[:300]


def lines_of(page: str) -> list[list[str]]:
    """Every dupr command in the blocks of a page."""
    text = (README.parent / "docs" / page).read_text()
    blocks = "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", "")
    lines = [line for line in blocks.splitlines() if line.startswith("dupr ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


@pytest.mark.slow
def test_the_pages_on_pictures_and_reports_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for number in range(24):
        noise_image(number).save(tmp_path / "photos" / f"{number}.png")
    for number, name in enumerate(("one.jpg", "two.jpg")):
        noise_image(number, 320, 240).save(tmp_path / name)
    dupr("prepare", "photos", "shards")
    for run, seed in (("a", 0), ("b", 1)):
        pretrain("shards", f"runs/{run}", "--seed", seed)
    for out in ("backbone.safetensors", "other.safetensors"):
        dupr("export", f"runs/{'a' if out[0] == 'b' else 'b'}", "--to", "safetensors", "--out", out)
    make_tree(tmp_path / "tree")
    dupr("evaluate", "voc", "none", "--frozen", "--data", "tree", "--out", "eval",
         "--recipe", "voc-frozen-tiny", *BRIEFLY["evaluate"])  # fmt: skip
    pictures, pages = lines_of("inspect.md"), lines_of("report.md")
    assert len(pictures) >= 11
    for words in pictures:
        dupr(*words)
    for words in pages:
        if "study/" not in words:  # tests/report makes a page about a study
            dupr(*words)
    assert (tmp_path / "report.html").is_file()
