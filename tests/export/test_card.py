"""The model card says where the weights come from, and nothing that is not so."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, metadata_load
from PIL import Image
from safetensors.torch import save_file

from dupr_cli import export
from dupr_cli.artifacts.results import DatasetIdentity, Results, WeightsResult
from dupr_cli.artifacts.run import MetricsLog, read_environment
from dupr_cli.artifacts.weights import WeightsMetadata, read_weights, write_weights
from dupr_cli.errors import UsageError
from dupr_cli.export.card import PAPER
from dupr_cli.export.types import PushOptions
from dupr_cli.models.resnet import ResNetBackbone
from dupr_cli.recipe import ExportRecipe, PretrainRecipe, load_recipe
from tests.support.command_line import RESNET18, dupr, pretrain
from tests.support.report_sources import write_labels


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
    before, after = MetricsLog(run).retrieval()
    pool = MetricsLog(run).latest()["retrieval_pool/res5"]
    assert "| level | patches to choose from | step 0, random weights | step 3 |" in text
    assert f"| res5 | {pool:,.0f} | {before['res5']:.1f} % | {after['res5']:.1f} % |" in text
    data = read_environment(run)["data"]
    assert f"- Shards: sha256 {data['sha256']} over" in text
    assert "- Supervision: none, neither labels nor a teacher network" in text
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
    assert "Cite the authors of MoCo v2" in text
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
    configs = [result["dataset"]["config"] for result in model["results"]]
    assert configs == ["whole, 4 labelled images"]


def test_a_library_that_is_missing_is_said_before_anything_is_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    recipe = load_recipe(ExportRecipe, "default", ["formats=[torchvision, onnx]"])
    for attempt in (export.plan, export.run):
        with pytest.raises(UsageError, match=r"--to onnx needs onnxscript: pip install"):
            attempt(recipe, str(run), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_picture_of_a_run_is_in_the_folder_and_on_the_card(run: Path, tmp_path: Path) -> None:
    text, _ = card(run, tmp_path / "out")
    names = re.findall(r"!\[.+?\]\((.+?)\)", text)
    assert names == ["pictures/retrieval.png"]
    with Image.open(tmp_path / "out" / names[0]) as picture:
        assert picture.width >= 600
    record = json.loads((tmp_path / "out" / "export.json").read_bytes())
    assert "pictures/retrieval.png" in record["files"]


def test_given_pictures_lose_what_cameras_add(run: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010F] = "camera of m4rked"
    Image.new("RGB", (3000, 1500), "red").save(tmp_path / "one](x).jpg", exif=exif)
    text, _ = card(run, tmp_path / "out", f'card.pictures=["{tmp_path}/one](x).jpg"]')
    assert "![one\\](x)](pictures/01.jpg)" in text
    with Image.open(tmp_path / "out" / "pictures" / "01.jpg") as picture:
        assert picture.size == (1280, 640)
        assert not picture.getexif()
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UsageError, match=r"text\.png: this is no PNG or JPEG file"):
        card(run, tmp_path / "other", f"card.pictures=[{tmp_path}/text.png]")
    assert not (tmp_path / "other").exists()


def test_the_citation_is_that_of_the_documentation() -> None:
    page = Path(__file__).parents[2] / "docs" / "citing.md"
    assert f"```bibtex\n{PAPER}\n```" in page.read_text()


@pytest.mark.parametrize(
    ("changes", "front", "section"),
    [
        ([], {"license": "other"}, "has not stated a licence"),
        (["card.license=cc-by-4.0"], {"license": "cc-by-4.0"},
         "[cc-by-4.0](https://creativecommons.org/licenses/by/4.0/)"),
        (["card.license_name=acme-1", "card.license_link=https://acme.example/terms"],
         {"license": "other", "license_name": "acme-1",
          "license_link": "https://acme.example/terms"},
         "[acme-1](https://acme.example/terms)"),
    ],
)  # fmt: skip
def test_licences(
    run: Path, tmp_path: Path, changes: list[str], front: dict[str, str], section: str
) -> None:
    text, read = card(run, tmp_path / "out", *changes)
    assert {key: value for key, value in read.items() if key.startswith("license")} == front
    assert section in text.partition("## Licence")[2].partition("##")[0]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (["card.license_name=acme-1"], "give both or neither"),
        (["card.license=mit", "card.license_name=a", "card.license_link=https://a.example"],
         "describes another license"),
        (["card.license_name=My License", "card.license_link=https://a.example"], "license_name"),
        (["card.license_name=a", "card.license_link=javascript:alert(1)"], "license_link"),
    ],
)  # fmt: skip
def test_licences_that_the_hub_would_refuse(changes: list[str], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        load_recipe(ExportRecipe, "default", changes)


def test_a_card_without_a_licence_is_warned_about(run: Path, tmp_path: Path) -> None:
    options = ("--push-to-hub", "me/model", "--local-only", "--to", "torchvision")
    silent = dupr("export", run, "--out", tmp_path / "a", *options, "--set", "card.license=mit")
    warned = dupr("export", run, "--out", tmp_path / "b", *options)
    assert "card.license" not in silent.stderr
    assert "--set card.license=cc-by-4.0" in warned.stderr


@pytest.mark.parametrize(
    ("formats", "library"),
    [
        ("torchvision, timm", "timm"),
        ("transformers", "transformers"),
        ("torchvision, transformers", "dupr"),  # its files are in a folder, where no button looks
        ("torchvision", "dupr"),
    ],
)
def test_the_library_is_the_one_that_finds_its_files(
    run: Path, tmp_path: Path, formats: str, library: str
) -> None:
    _, front = card(run, tmp_path / "out", f"formats=[{formats}]")
    assert front["library_name"] == library
    assert front["pipeline_tag"] == "image-feature-extraction"


def labelled(run: Path, folder: Path) -> None:
    """A comparison over numbers of labels of the run's weights, with its picture."""
    write_labels(folder)
    sha256 = read_weights(str(run)).sha256
    for file in folder.glob("labels-*/results.json"):
        file.write_text(
            file.read_text().replace('"weights_sha256": "0"', f'"weights_sha256": "{sha256}"')
        )
    Image.new("RGB", (640, 300), "white").save(folder / "labels-saved.png")


def test_label_curves_are_one_table_one_picture_and_a_result_for_each_number(
    run: Path, tmp_path: Path
) -> None:
    labelled(run, tmp_path / "curve")
    recipe = load_recipe(ExportRecipe, "default", ["card.license=mit"])
    out = tmp_path / "out"
    export.run(
        recipe, str(run), out, push=PushOptions("me/model"), local_only=True,
        results=[tmp_path / "curve"],
    )  # fmt: skip
    loaded = ModelCard.load(out / "README.md")
    assert "| AP with labelled images | 40 | 80 |" in loaded.text
    assert "| **this** | 20.0 ± 1.0 | 30.0 ± 1.0 |" in loaded.text
    assert "| random weights | 10.0 ± 1.0 | 23.0 ± 1.0 |" in loaded.text
    assert "(pictures/labels-saved-1.png)" in loaded.text
    assert (out / "pictures" / "labels-saved-1.png").is_file()
    assert len([*(out / "results").glob("*-voc-frozen-tiny.json")]) == 2
    assert loaded.data.eval_results is not None
    values = {
        (result.dataset_config, result.metric_type): (result.metric_value, result.metric_args)
        for result in loaded.data.eval_results
    }
    value, arguments = values["voc-frozen-tiny, 80 labelled images", "AP"]
    assert value == 30.0
    assert arguments == {"seeds": 2, "standard_deviation": 0.5, "random_weights": 23.0}


def test_the_branch_is_in_the_code_of_the_card(run: Path, tmp_path: Path) -> None:
    recipe = load_recipe(
        ExportRecipe, "default", ["formats=[torchvision, timm, transformers, onnx]"]
    )
    export.run(
        recipe,
        str(run),
        tmp_path / "out",
        push=PushOptions("me/model", revision="v2"),
        local_only=True,
    )
    text = (tmp_path / "out" / "README.md").read_text()
    assert 'timm.create_model("hf-hub:me/model@v2", pretrained=True)' in text
    assert 'from_pretrained("me/model", subfolder="transformers", revision="v2")' in text
    assert 'hf_hub_download("me/model", "torchvision/backbone.safetensors", revision="v2")' in text
    assert "hf download me/model --revision v2" in text
    assert text.index("### timm") < text.index("### transformers") < text.index("### torchvision")
