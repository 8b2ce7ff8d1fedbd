"""What a release consists of: the wheel, its scripts, and the files around it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from dupr_cli import __version__
from tests.support.images import noise_image
from tests.support.recipes import SMALL_NETWORK, TINY

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.mark.slow
def test_the_wheel_has_recipes_and_both_scripts(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "uv", "build", "--quiet", "--wheel", "--no-build-isolation",
         "--out-dir", tmp_path, ROOT],
        check=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"dupr_cli-{__version__}-")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (scripts,) = (n for n in names if n.endswith("entry_points.txt"))
        entry_points = archive.read(scripts).decode()
    assert "dupr = dupr_cli.__main__:main" in entry_points
    # `uvx --from dupr-cli` and pipx call the script that has the package's name.
    assert "dupr-cli = dupr_cli.__main__:main" in entry_points
    shipped = {p.relative_to(ROOT / "recipes").as_posix() for p in ROOT.glob("recipes/*/*.yaml")}
    assert {n.removeprefix("dupr_cli/_recipes/") for n in names if "_recipes/" in n} == shipped
    assert "dupr_cli/py.typed" in names


@pytest.mark.parametrize("name", ["tests", "docs", "release"])
def test_workflows_call_what_exists(name: str) -> None:
    workflow: Any = yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text())
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    called = [step["run"] for step in steps if str(step.get("run", "")).startswith("make ")]
    for command in called:
        assert command.removeprefix("make ") in targets
    assert called
    versions = [job.get("strategy", {}) for job in workflow["jobs"].values()]
    for version in (v for found in versions for v in found.get("matrix", {}).get("python", [])):
        assert f"Programming Language :: Python :: {version}" in PROJECT["project"]["classifiers"]


def test_the_tag_check_reads_the_version() -> None:
    workflow: Any = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())
    (check,) = (s for s in workflow["jobs"]["build"]["steps"] if "tag" in s.get("name", ""))
    for tag, code in ((f"v{__version__}", 0), ("v9.9.9", 1)):
        done = subprocess.run(
            ["bash", "-c", check["run"]], cwd=ROOT, check=False,
            env={"GITHUB_REF_NAME": tag, "PATH": "/usr/bin:/bin"},
        )  # fmt: skip
        assert done.returncode == code, tag


def test_the_container_copies_what_exists_and_installs_known_extras() -> None:
    text = (ROOT / ".github" / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
    (extras,) = re.findall(r'"/src\[([\w,]+)\]"', text)
    assert set(extras.split(",")) <= PROJECT["project"]["optional-dependencies"].keys()


@pytest.mark.slow
def test_the_script_for_a_rented_gpu(tmp_path: Path) -> None:
    script = ROOT / "docs" / "cloud" / "pretrain.py"
    about = re.findall(r"^# (?:requires-python|dependencies) = (.+)$", script.read_text(), re.M)
    assert about == [f'"{PROJECT["project"]["requires-python"]}"', '["dupr-cli"]']
    (tmp_path / "photos").mkdir()
    for number in range(24):
        noise_image(number).save(tmp_path / "photos" / f"{number}.png")
    recipe = tmp_path / "tiny.yaml"
    keys: dict[str, Any] = {"stage": "pretrain", "extends": "dupr-r18-cpu-smoke"}
    for override in (*TINY, SMALL_NETWORK.replace("timm:test_resnet", "resnet18")):
        *sections, last = override.partition("=")[0].split(".")
        section = keys
        for name in sections:
            section = section.setdefault(name, {})
        section[last] = yaml.safe_load(override.partition("=")[2])
    recipe.write_text(yaml.safe_dump(keys))
    for _ in range(2):  # the second call continues, and finds everything done
        subprocess.run(
            [sys.executable, script, tmp_path / "photos", tmp_path / "out", recipe], check=True
        )
    assert (tmp_path / "out" / "backbone.safetensors").is_file()


def test_the_cluster_file_is_yaml_whose_command_exists() -> None:
    task: Any = yaml.safe_load((ROOT / "docs" / "cloud" / "sky.yaml").read_text())
    assert task["run"].startswith("dupr pretrain ")
    assert (ROOT / "recipes" / "pretrain" / f"{task['envs']['RECIPE']}.yaml").is_file()
