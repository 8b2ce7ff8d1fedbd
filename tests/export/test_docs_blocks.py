"""docs/export.md: every block runs as written, in a folder with a run and a public checkpoint."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

from tests.support.command_line import dupr
from tests.support.processes import as_main, forked
from tests.support.weights import make_run

PAGE = Path(__file__).parents[2] / "docs" / "export.md"


@pytest.mark.slow
def test_blocks_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    query = make_run(tmp_path / "runs" / "first", "resnet18")
    moco = {"state_dict": {f"module.encoder_q.{name}": t for name, t in query.items()}}
    torch.save(moco, "moco_v2_200ep_pretrain.pth.tar")
    blocks = re.findall(r"```(bash|python)\n(.*?)```", PAGE.read_text(), re.S)
    assert [language for language, _ in blocks].count("python") == 4
    for language, block in blocks:
        if language == "bash":
            for line in block.strip().splitlines():
                program, *arguments = shlex.split(line)
                assert program == "dupr"
                dupr(*arguments)
    code = "\n".join(block for language, block in blocks if language == "python")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    done = forked(as_main(code))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "pushed" / "README.md").is_file()
