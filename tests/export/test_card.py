"""The model card says where the weights come from, and nothing that is not so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import metadata_load
from safetensors.torch import save_file

from dupr_cli import export
from dupr_cli.artifacts.results import DatasetIdentity, Results, WeightsResult
from dupr_cli.artifacts.run import MetricsLog
from dupr_cli.artifacts.weights import WeightsMetadata, read_weights, write_weights
from dupr_cli.errors import UsageError
from dupr_cli.export.types import PushOptions
from dupr_cli.models.resnet import ResNetBackbone
from dupr_cli.recipe import ExportRecipe, PretrainRecipe, load_recipe
from tests.support.command_line import RESNET18, dupr, pretrain


@pytest.fixture(scope="module")
def run(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pretrained") / "run"
    pretrain(tiny_shards, out, *RESNET18, "--steps", 3)
    return out


def card(weights: object, out: Path, *changes: str) -> tuple[str, dict[str, Any]]:
    """Text and front matter of what would be pushed."""
    recipe = load_recipe(ExportRecipe, "default", list(changes))
    export.run(recipe, str(weights), out, push=PushOptions("me/model"), local_only=True)
    front = metadata_load(out / "README.md")
    assert front is not None
    return (out / "README.md").read_text(), front


def test_training_is_told_by_recipe_and_log(run: Path, tmp_path: Path) -> None:
    text, front = card(run, tmp_path / "out")
    recipe = load_recipe(PretrainRecipe, str(run / "recipe.yaml"))
    bins = recipe.method.patch.bins["res4"]
    assert "by Deeply Unsupervised Patch Re-Identification (DUPR) with dupr" in text
    assert f"patch contrast at res4 ({bins} x {bins} patches)" in text
    assert "- Images: 90 without labels" in text
    assert f"- Length: 3 steps of {recipe.data.batch_size} images" in text
    assert "- Start: random" in text
    value = MetricsLog(run).latest()["retrieval/res5"]
    assert "Held-out patch retrieval at step 3, top-1: res4 " in text
    assert f"res5 {100 * value:.1f} %" in text
    assert "self-supervised" in front["tags"]
    assert "base_model" not in front


def test_a_file_beside_its_run_is_told_like_the_run_and_one_of_another_run_is_not(
    run: Path, tmp_path: Path
) -> None:
    plain = load_recipe(ExportRecipe, "default")
    inside = run / "backbone.safetensors"
    export.run(plain, str(run), inside, overwrite=True)
    of_run, _ = card(run, tmp_path / "a")
    of_file, _ = card(inside, tmp_path / "b")
    assert of_file == of_run
    metadata = WeightsMetadata(
        "torchvision", "resnet18", (0.5,) * 3, (0.2,) * 3, 96, recipe_sha256="of another run"
    )
    write_weights(run / "guest.safetensors", read_weights(str(inside)).tensors, metadata)
    guest, _ = card(run / "guest.safetensors", tmp_path / "c")
    assert "- Views of 96 x 96 pixels" in guest
    assert "recipe.yaml" not in guest
    assert not (tmp_path / "c" / "recipe.yaml").exists()


def test_a_baseline_is_not_called_dupr(tiny_shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "moco"
    more = (*RESNET18, "--steps", 1, "--set", "method.patch.weights={}")
    pretrain(tiny_shards, out, *more, "--set", "method.image.weights={res5: 1.0}")
    text, _ = card(out, tmp_path / "out", "formats=[timm]")
    assert "pre-trained without labels by MoCo v2 with dupr" in text
    assert "(DUPR)" not in text
    assert "The authors of MoCo v2" in text
    timm = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert "paper_ids" not in timm["pretrained_cfg"]
    written = read_weights(str(tmp_path / "out" / "model.safetensors"))
    assert written.metadata.method == "MoCo v2"


@pytest.mark.parametrize(
    ("changes", "title"),
    [
        ([], "DUPR"),
        (["method.image.weights={}"], "DUPR"),
        (["method.patch.weights={}"], "image contrast at res2, res3, res4, res5"),
        (["method.patch.weights={res4: 0}", "method.image.weights={res5: 1}"], "MoCo v2"),
        (["method.name=densecl"], "DenseCL"),
    ],
)
def test_titles_of_methods(changes: list[str], title: str) -> None:
    assert load_recipe(PretrainRecipe, "dupr-r18-cpu-smoke", changes).method.title == title


def test_weights_of_others_are_not_said_to_be_trained_here(tmp_path: Path) -> None:
    state = ResNetBackbone("resnet18").state_dict()
    save_file(state, tmp_path / "theirs.safetensors")
    dupr("import", tmp_path / "theirs.safetensors", "--out", tmp_path / "w.safetensors")
    text, front = card(
        tmp_path / "w.safetensors", tmp_path / "out", "card.base_model=them/resnet18"
    )
    assert "trained by others, imported with dupr" in text
    assert "How it was trained" not in text
    assert "Deeply Unsupervised" not in text
    assert "self-supervised" not in front["tags"]
    assert front["base_model"] == "them/resnet18"


def test_the_base_model_is_known_from_where_training_started(run: Path, tmp_path: Path) -> None:
    changed = tmp_path / "run"
    changed.mkdir()
    for path in run.iterdir():
        if path.name != "recipe.yaml":
            (changed / path.name).symlink_to(path.resolve())
    text = (run / "recipe.yaml").read_text()
    assert "init: null" in text
    for init, base, start in (
        ("hf://them/start@v1/backbone.safetensors", "them/start", "hf://them/start@v1"),
        ("/home/me/secret/start.safetensors", None, "start.safetensors"),
    ):
        (changed / "recipe.yaml").write_text(text.replace("init: null", f"init: {init}"))
        body, front = card(changed, tmp_path / Path(init).parent.name)
        assert front.get("base_model") == base
        assert f"- Start: {start}" in body
        assert "/home/me" not in body


def test_a_trial_is_shown_with_its_note_but_is_no_result(run: Path, tmp_path: Path) -> None:
    used = DatasetIdentity("animals", "val", 4, 6, "digest")
    for name, images in (("trial", 4), ("whole", None)):
        folder = run.parent / name
        folder.mkdir()
        Results(
            protocol=name, metric="VOC07 11-point AP", train=used, test=used, classes=["cat"],
            results=[
                WeightsResult(str(run), read_weights(str(run)).sha256, "resnet18", {"AP": 1.5}, {})
            ],
            recipe={"data": {"test_images": images}}, recipe_sha256="", seeds=[0],
            dupr_version="0", environment={}, notes=["limited"] if images else [],
        ).write(folder)  # fmt: skip
    text, front = card(run, tmp_path / "out")
    assert "trial: VOC07 11-point AP" in text
    assert "- limited" in text
    (model,) = front["model-index"]
    assert [result["dataset"]["type"] for result in model["results"]] == ["whole"]


def test_a_library_that_is_missing_is_said_before_anything_is_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    recipe = load_recipe(ExportRecipe, "default", ["formats=[torchvision, onnx]"])
    for attempt in (export.plan, export.run):
        with pytest.raises(UsageError, match=r"--to onnx needs onnxscript: pip install"):
            attempt(recipe, str(run), tmp_path / "out")
    assert not list(tmp_path.iterdir())
