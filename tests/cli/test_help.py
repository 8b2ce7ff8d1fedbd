"""Help: what every command says about itself, on a terminal of 80 columns."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest

from dupr_cli.cli.doctor import EXTRAS
from tests.support.command_line import COMMANDS, dupr


def _help(*words: str) -> str:
    return dupr(*words, "--help", env={"COLUMNS": "80"}).stdout


def _paragraphs(text: str) -> list[list[str]]:
    """The lines between the usage and the first panel, by paragraph."""
    about = text.partition("╭")[0].partition("Usage:")[2]
    paragraphs = [part.splitlines() for part in re.split(r"\n\s*\n", about)]
    return [[line.strip() for line in lines] for lines in paragraphs[1:] if any(lines)]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_of_every_command(words: tuple[str, ...]) -> None:
    text = _help(*words)
    for option in ("--quiet", "--verbose", "--traceback", "--json"):
        assert option in text
    assert not re.search(r"<(bool|str|int|float|path)|list\[", text), "names of Python's types"
    assert all(len(line) <= 80 for line in text.splitlines())


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_has_an_example_that_can_be_copied(words: tuple[str, ...]) -> None:
    command = " ".join(("dupr", *words))
    examples = [
        line
        for lines in _paragraphs(_help(*words))
        for line in re.sub(r"\\\n", "", "\n".join(lines)).splitlines()
        if line.startswith(command)
    ]
    assert examples
    for example in examples:  # a line that the terminal broke has lost its end
        assert example.count("'") % 2 == 0, example
        assert not example.endswith("--set"), example


@pytest.mark.parametrize("words", [(), *COMMANDS], ids=" ".join)
def test_paragraphs_fill_their_lines(words: tuple[str, ...]) -> None:
    for lines in _paragraphs(_help(*words)):
        if any(line.startswith(("dupr", "--", "#")) or line.endswith("\\") for line in lines):
            continue
        for line, following in pairwise(lines):
            assert len(line) + 1 + len(following.split()[0]) > 76, (line, following)


def test_the_stages_come_first_and_in_order() -> None:
    listed = re.findall(r"^│ (\w+) ", _help().partition("Commands")[2], re.MULTILINE)
    assert listed[:4] == ["prepare", "pretrain", "export", "evaluate"]


@pytest.mark.parametrize("words", [("evaluate",), ("recipe",), ("checkpoint",), ("inspect",)])
def test_help_of_groups_lists_their_commands(words: tuple[str, ...]) -> None:
    text = _help(*words)
    for known in COMMANDS:
        if known[: len(words)] == words:
            assert re.search(rf"^│ {known[-1]} ", text, re.MULTILINE), known


def test_stage_commands_share_their_options() -> None:
    for words in (("prepare",), ("pretrain",), ("export",), ("evaluate", "voc")):
        text = _help(*words)
        for option in ("--recipe", "--set", "--overwrite", "--dry-run"):
            assert option in text, (words, option)


def test_help_imports_no_heavy_library() -> None:
    probe = (
        "import sys; from dupr_cli.__main__ import main\n"
        "sys.argv = ['dupr', 'pretrain', '--help']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = ('torch', 'torchvision', 'webdataset', 'numpy', 'PIL')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_doctor_knows_every_extra_of_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    declared = {
        extra: tuple(re.match(r"[\w-]+", requirement)[0] for requirement in requirements)  # type: ignore[index]
        for extra, requirements in project["project"]["optional-dependencies"].items()
    }
    assert {extra: libraries for extra, (libraries, _) in EXTRAS.items()} == declared
