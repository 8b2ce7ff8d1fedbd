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

ROOT = Path(__file__).parents[1]
# What is added to keep each step to seconds; nothing that is written is taken away.
BRIEFLY = {
    "plan": ["--seconds", "1", "--device", "cpu"],
    "pretrain": ["--set", "train.steps=2", "--device", "cpu"],
    "evaluate": [*(word for key in SMALL_DETECTOR for word in ("--set", key)), "--device", "cpu"],
}


def lines_of(page: Path, first: str = "") -> list[list[str]]:
    """Every dupr command in the blocks of a page that begin with these words."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    text = "".join(block for block in blocks if block.startswith(first)).replace("\\\n", "")
    lines = [line for line in text.splitlines() if line.startswith("dupr ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_path_from_photographs_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for number in range(48):
        noise_image(number).save(tmp_path / "photos" / f"{number}.png")
    stages = lines_of(ROOT / page, "dupr prepare photos/")
    assert [words[0] for words in stages][:5] == [
        "prepare", "plan", "pretrain", "export", "evaluate",
    ]  # fmt: skip
    evaluate = stages[4]
    make_tree(tmp_path / evaluate[evaluate.index("--data") + 1])
    for words in stages:
        dupr(*words, *BRIEFLY.get(words[0], []))
    results = tmp_path / evaluate[evaluate.index("--out") + 1]
    assert "AP50" in (results / "table.txt").read_text()


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
    pictures, pages = (lines_of(ROOT / "docs" / page) for page in ("inspect.md", "report.md"))
    assert len(pictures) >= 11
    for words in pictures:
        dupr(*words)
    for words in pages:
        if "study/" not in words:  # tests/report makes a page about a study
            dupr(*words)
    assert (tmp_path / "report.html").is_file()
