"""The documents: links lead somewhere, commands exist, code compiles."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.support.command_line import dupr

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        # The site makes these pages, and checks the links to them.
        if not target.startswith("reference/") and target != "tutorial.md":
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_anchors_within_the_documents_are_headings(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", page.read_text()):
        text = (page.parent / target if target else page).read_text()
        headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        known = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
        assert anchor in known


def test_files_that_contributors_are_sent_to_exist() -> None:
    text = (ROOT / "docs" / "contributing.md").read_text()
    for place in re.findall(r"`((?:dupr_cli|tests|recipes)/[\w./]*)`", text):
        assert (ROOT / place).exists(), place


def blocks(language: str) -> list[str]:
    return [
        block
        for page in PAGES
        for block in re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)
    ]


def dupr_lines() -> list[str]:
    whole = [block.replace("\\\n", "") for block in blocks("bash")]
    lines = [line for block in whole for line in block.splitlines()]
    return sorted({line.split("  #")[0] for line in lines if line.startswith("dupr ")})


def test_there_are_commands_to_check() -> None:
    assert len(dupr_lines()) >= 6


@pytest.mark.parametrize("line", dupr_lines())
def test_commands_of_the_documents_have_known_options(line: str) -> None:
    words = shlex.split(line.split(">")[0])[1:]
    names = [w for w in words if not w.startswith("-")]
    groups = ("checkpoint", "evaluate", "inspect", "recipe")
    after_prepare = ("merge", "verify", "stats", "view")
    grouped = names[0] in groups or (names[0] == "prepare" and names[1] in after_prepare)
    shown = dupr(*names[: 1 + grouped], "--help").stdout
    for option in (w for w in words if w.startswith("--")):
        assert option in shown


@pytest.mark.parametrize("code", blocks("python"))
def test_python_of_the_documents_compiles(code: str) -> None:
    compile(code, "document", "exec")


def test_yaml_of_the_documents_is_a_valid_recipe(tmp_path: Path) -> None:
    from dupr_cli.recipe import RECIPE_MODELS, load_recipe
    from dupr_cli.recipe.load import recipe_stage

    for number, block in enumerate(blocks("yaml")):
        file = str(tmp_path / f"{number}.yaml")
        Path(file).write_text(block)
        load_recipe(RECIPE_MODELS[recipe_stage(file)], file)
