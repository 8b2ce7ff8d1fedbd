"""docs/detectors: every block runs as written, in a folder with a run of the page's network."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import huggingface_hub.constants
import pytest

from tests.support.command_line import dupr
from tests.support.processes import as_main, forked
from tests.support.weights import make_run

PAGES = Path(__file__).parents[2] / "docs" / "detectors"
NETWORKS = {
    "README": "resnet50",
    "torchvision": "resnet50",
    "rt-detr": "transformers:rt_detr_resnet18",
    "d-fine": "timm:hgnetv2_b0",
    "detr": "resnet18",
    "detectron2": "resnet50",
    "mmdetection": "resnet50",
    "timm": "resnet18",
    "onnx": "resnet18",
}
WITHOUT_CODE = {"ultralytics"}


def test_every_page_is_here() -> None:
    assert {page.stem for page in PAGES.glob("*.md")} == {*NETWORKS, *WITHOUT_CODE}


@pytest.mark.slow
@pytest.mark.parametrize("page", NETWORKS)
def test_blocks_of_the_page_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    make_run(tmp_path / "runs" / "first", NETWORKS[page])
    text = (PAGES / f"{page}.md").read_text()
    code = ""
    for language, block in re.findall(r"```(bash|python)\n(.*?)```", text, re.S):
        if language == "python":
            # Later blocks go on from earlier ones, in a process of their own.
            code += block
            done = forked(as_main(code))
            assert done.returncode == 0, done.stderr
            continue
        for line in block.strip().splitlines():
            program, *arguments = shlex.split(line)
            assert program == "dupr"
            dupr(*arguments)
