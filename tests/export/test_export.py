"""export: the file loads where it should, and nothing half-right gets a name."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dupr_cli import export
from dupr_cli.artifacts.files import sha256_file
from dupr_cli.artifacts.weights import Weights, WeightsMetadata, read_weights, write_weights
from dupr_cli.errors import UsageError
from dupr_cli.export.types import PushOptions
from dupr_cli.models.resnet import ResNetBackbone
from dupr_cli.recipe import ExportRecipe, load_recipe
from tests.support.weights import make_run

pytestmark = pytest.mark.slow

RECIPE = load_recipe(ExportRecipe, "default")


def test_key_encoder_on_request_and_a_second_export_is_the_same_file(tmp_path: Path) -> None:
    query = make_run(tmp_path / "run", "resnet18")
    keys = load_recipe(ExportRecipe, "default", ["encoder=key"])
    export.run(keys, str(tmp_path / "run"), tmp_path / "k.safetensors")
    assert not torch.equal(
        load_file(tmp_path / "k.safetensors")["conv1.weight"], query["conv1.weight"]
    )
    for name in ("a", "b"):
        export.run(RECIPE, str(tmp_path / "run"), tmp_path / f"{name}.safetensors")
    export.run(RECIPE, str(tmp_path / "a.safetensors"), tmp_path / "c.safetensors")
    assert len({(tmp_path / f"{n}.safetensors").read_bytes() for n in "abc"}) == 1


def test_file_in_the_way_is_kept_without_overwrite(tmp_path: Path) -> None:
    make_run(tmp_path / "run", "resnet18")
    out = tmp_path / "b.safetensors"
    out.write_text("precious")
    with pytest.raises(UsageError, match="this file exists"):
        export.run(RECIPE, str(tmp_path / "run"), out)
    with pytest.raises(UsageError, match="--overwrite keeps it"):
        export.run(RECIPE, str(tmp_path / "run"), out, overwrite=True)
    assert out.read_text() == "precious"
    out.unlink()
    for overwrite in (False, True):
        export.run(RECIPE, str(tmp_path / "run"), out, overwrite=overwrite)
    assert read_weights(str(out)).metadata.step == 5


def test_a_link_to_another_file_system_and_a_mount(tmp_path: Path) -> None:
    """Files cannot be renamed from one to another."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no other file system")
    make_run(tmp_path / "run", "resnet18")
    with tempfile.TemporaryDirectory(dir=memory) as there:
        out = tmp_path / "out"
        out.symlink_to(there)
        for overwrite in (False, True):
            export.run(RECIPE, str(tmp_path / "run"), out, overwrite=overwrite)
        assert sorted(path.name for path in Path(there).iterdir()) == [
            "backbone.safetensors", "export.json",
        ]  # fmt: skip


def test_a_folder_keeps_files_of_others_and_loses_those_of_the_export_before(
    tmp_path: Path,
) -> None:
    make_run(tmp_path / "run", "resnet18")
    run, out = str(tmp_path / "run"), tmp_path / "out"
    both = load_recipe(ExportRecipe, "default", ["formats=[torchvision, timm]"])
    export.run(both, run, out)
    (out / "README.md").write_text("mine")
    before = {path.name for path in out.rglob("*") if path.is_file()}
    export.run(RECIPE, run, out, overwrite=True)
    after = {path.name for path in out.rglob("*") if path.is_file()}
    assert (out / "README.md").read_text() == "mine"
    assert "config.json" in before - after
    with pytest.raises(UsageError, match=r"README\.md: no earlier export wrote this file"):
        export.run(RECIPE, run, out, overwrite=True, push=PushOptions("me/m"), local_only=True)
    assert (out / "README.md").read_text() == "mine"


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    metadata = WeightsMetadata("torchvision", "resnet50", (0.5,) * 3, (0.2,) * 3, 64)
    wrong = Weights("w", metadata, ResNetBackbone("resnet18").state_dict())
    write_weights(tmp_path / "wrong.safetensors", wrong.tensors, metadata)
    with pytest.raises(UsageError, match="the weights do not fit a resnet50"):
        export.run(RECIPE, str(tmp_path / "wrong.safetensors"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["wrong.safetensors"]


def test_header_says_what_the_weights_are(tmp_path: Path) -> None:
    make_run(tmp_path / "run", "resnet18")
    result = export.run(RECIPE, str(tmp_path / "run"), tmp_path / "b.safetensors")
    with safe_open(result.path, framework="pt") as file:
        header = file.metadata()
    assert header["architecture"] == "resnet18"
    assert header["layout"] == "torchvision"
    assert header["step"] == "5"


def files_in(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_a_single_format_is_a_file_or_in_a_folder_with_its_record(tmp_path: Path) -> None:
    make_run(tmp_path / "run", "resnet18")
    export.run(RECIPE, str(tmp_path / "run"), tmp_path / "b.safetensors")
    result = export.run(RECIPE, str(tmp_path / "run"), tmp_path / "folder")
    names = sorted(
        p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*b*.*") if p.is_file()
    )
    assert names == ["b.export.json", "b.safetensors", "folder/backbone.safetensors"]
    record = json.loads((tmp_path / "folder" / "export.json").read_text())
    (of,) = record["formats"]
    assert of["files"] == {"backbone.safetensors": sha256_file(tmp_path / "b.safetensors")}
    assert of["features_compared"]
    assert of["max_difference"] == result.formats[0].max_difference <= 1e-6


def test_several_formats_lie_apart(tmp_path: Path) -> None:
    make_run(tmp_path / "run", "resnet18")
    several = load_recipe(ExportRecipe, "default", ["formats=[torchvision, timm, mmdetection]"])
    export.run(several, str(tmp_path / "run"), tmp_path / "out")
    found = sorted(
        p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.*")
    )
    assert found == [
        "config.json", "export.json", "mmdetection/backbone.pth", "model.safetensors",
        "torchvision/backbone.safetensors",
    ]  # fmt: skip
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(UsageError, match="this file exists"):
        export.run(several, str(tmp_path / "run"), tmp_path / "out")
    export.run(several, str(tmp_path / "run"), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "mine.txt").read_text() == "precious"
    assert not list(tmp_path.glob(".*"))


def test_unknown_format_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"darknet is unknown; use d-fine, .*mmdet.*timm"):
        load_recipe(ExportRecipe, "default", ["formats=[darknet]"])


def test_format_of_another_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that is installed with an entry point, and says that its library is missing."""
    facts = tmp_path / "site" / "theirs-1.0.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[dupr.export_formats]\ntext = their_format:Text\n")
    (tmp_path / "site" / "their_format.py").write_text(
        """import numpy
import torch
from dupr_cli.export.formats import LibraryMissingError


class Text:
    name, top = "text", False

    def write(self, weights, folder, license_name):
        numpy.savez(folder / "weights.npz", **{n: t.numpy() for n, t in weights.tensors.items()})

    def load(self, weights, folder, images):
        raise LibraryMissingError("theirs is not installed")

    def tensors(self, weights, folder):
        return {n: torch.from_numpy(v) for n, v in numpy.load(folder / "weights.npz").items()}

    def usage(self, weights, place):
        return [("text", f"unzip {place}weights.npz")]
"""
    )
    monkeypatch.syspath_prepend(tmp_path / "site")
    make_run(tmp_path / "run", "resnet18")
    chosen = load_recipe(ExportRecipe, "default", ["formats=[text]"])
    (of,) = export.run(chosen, str(tmp_path / "run"), tmp_path / "out").formats
    assert of.verified_by == "names, shapes and values only, because theirs is not installed"
    assert files_in(tmp_path / "out") == ["export.json", "weights.npz"]
