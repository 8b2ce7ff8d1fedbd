"""`dupr import`: checkpoints as the projects publish them, and what is refused."""

from __future__ import annotations

import argparse
import datetime
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dupr_cli.artifacts.weights import Weights, WeightsMetadata, read_weights
from dupr_cli.errors import UsageError
from dupr_cli.export import checkpoint_files, public_checkpoints
from dupr_cli.export.formats import make_format
from dupr_cli.export.formats.detectron2_format import detectron2_arrays
from dupr_cli.export.public_checkpoints import import_weights
from dupr_cli.models.compared import open_compared
from dupr_cli.models.resnet import ResNetBackbone
from tests.support.command_line import RESNET18, dupr, pretrain

Tensors = dict[str, Tensor]


def backbone(architecture: str = "resnet18", seed: int = 0) -> Tensors:
    torch.manual_seed(seed)
    network = ResNetBackbone(architecture)
    network.train()(torch.randn(2, 3, 64, 64))
    return dict(network.state_dict())


def under(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


OWN, OTHER = backbone(), backbone(seed=1)
HEAD = {"fc.0.weight": torch.zeros(3, 3), "fc.2.bias": torch.zeros(3)}


def sequential(tensors: Tensors) -> Tensors:
    """nn.Sequential of a ResNet's children, as lightly's examples have it."""
    network = torchvision.models.resnet18()
    network.fc = nn.Identity()
    network.load_state_dict(tensors)
    return dict(nn.Sequential(*list(network.children())[:-1]).state_dict())


def written_for(name: str, folder: Path) -> Tensors:
    """As `dupr export` writes it; test_formats.py holds that to the framework itself."""
    folder.mkdir()
    metadata = WeightsMetadata("torchvision", "resnet18", (0.5,) * 3, (0.2,) * 3, 64)
    make_format(name).write(Weights("w", metadata, OWN), folder, "other")
    return load_file(folder / "model.safetensors")


FORMS: dict[str, Callable[[], object]] = {
    "torchvision": lambda: {**OWN, "fc.weight": torch.zeros(1000, 512)},
    "moco": lambda: {
        "epoch": 200,
        "arch": "resnet18",
        "state_dict": {
            **under("module.encoder_k.", {**OTHER, **HEAD}),
            **under("module.encoder_q.", {**OWN, **HEAD}),
            "module.queue": torch.zeros(128, 16),
        },
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.03}]},
    },
    "swav": lambda: {
        **under("module.", OWN), "module.projection_head.0.weight": torch.zeros(4, 4),
        "module.prototypes.weight": torch.zeros(4, 4),
    },
    "dino": lambda: {
        "student": under("module.backbone.", OTHER),
        "teacher": under("backbone.", OWN),
        "epoch": 800,
        "args": argparse.Namespace(arch="resnet18", lr=0.3),
    },
    "openselfsup": lambda: {
        "state_dict": {
            **under("encoder_q.0.", OWN), **under("encoder_k.0.", OTHER),
            "queue": torch.zeros(2, 2),
        },
        "meta": {"mmcv_version": "1.0"},
    },
    "mmselfsup": lambda: {"state_dict": under("backbone.", OWN), "meta": {}},
    "lightly": lambda: {"state_dict": under("backbone.", sequential(OWN)), "epoch": 1},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_public_checkpoints(form: str, tmp_path: Path) -> None:
    torch.save(FORMS[form](), tmp_path / "checkpoint.pth")
    found = import_weights(str(tmp_path / "checkpoint.pth"), tmp_path / "w.safetensors")
    assert (found.architecture, found.tensors) == ("resnet18", 120)
    read = read_weights(str(tmp_path / "w.safetensors"))
    assert read.tensors.keys() == OWN.keys()
    assert all(torch.equal(read.tensors[name], tensor) for name, tensor in OWN.items())
    (candidate,) = open_compared([str(tmp_path / "w.safetensors")])
    assert candidate.loaded.startswith("120 of 120")


@pytest.mark.parametrize(("name", "prefix"), [("timm", ""), ("transformers", "resnet.")])
def test_safetensors_of_other_frameworks(name: str, prefix: str, tmp_path: Path) -> None:
    tensors = under(prefix, written_for(name, tmp_path / "out"))
    save_file(tensors, tmp_path / "c.safetensors", metadata={"format": "pt"})
    found = import_weights(str(tmp_path / "c.safetensors"), tmp_path / "w.safetensors")
    assert (found.naming, found.prefix) == (
        "torchvision" if name == "timm" else "transformers", prefix
    )  # fmt: skip
    read = read_weights(str(tmp_path / "w.safetensors")).tensors
    assert all(torch.equal(read[name], tensor) for name, tensor in OWN.items())


def test_arrays_of_detectron2(tmp_path: Path) -> None:
    """Which are published as pickles; somebody saved them as safetensors."""
    metadata = WeightsMetadata("torchvision", "resnet18", (0.5,) * 3, (0.2,) * 3, 64)
    arrays = detectron2_arrays(Weights("w", metadata, OWN))
    tensors = {f"backbone.{n}": torch.from_numpy(array) for n, array in arrays.items()}
    save_file(tensors, tmp_path / "c.safetensors")
    found = import_weights(str(tmp_path / "c.safetensors"), tmp_path / "w.safetensors")
    assert (found.naming, found.prefix) == ("detectron2", "backbone.")
    read = read_weights(str(tmp_path / "w.safetensors")).tensors
    kept = [name for name in OWN if not name.endswith("num_batches_tracked")]
    assert all(torch.equal(read[name], OWN[name]) for name in kept)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["resnet34", "resnet101"])
def test_architecture_is_told_by_the_shapes(architecture: str, tmp_path: Path) -> None:
    torch.save(ResNetBackbone(architecture).state_dict(), tmp_path / "c.pth")
    out = tmp_path / "w.safetensors"
    assert import_weights(str(tmp_path / "c.pth"), out).architecture == architecture


def test_the_averaged_network_on_request(tmp_path: Path) -> None:
    torch.save(FORMS["moco"](), tmp_path / "c.pth")
    out = tmp_path / "w.safetensors"
    found = import_weights(str(tmp_path / "c.pth"), out, prefix="module.encoder_k.")
    assert found.others == ["module.encoder_q."]
    assert torch.equal(read_weights(str(out)).tensors["conv1.weight"], OTHER["conv1.weight"])
    with pytest.raises(
        UsageError, match=r"no ResNet has the prefix 'x\.'; the prefixes are 'module\.encoder_k\.'"
    ):
        import_weights(str(tmp_path / "c.pth"), out, prefix="x.", overwrite=True)


def test_counters_that_are_not_there_are_zero(tmp_path: Path) -> None:
    bare = {n: t for n, t in OWN.items() if not n.endswith("num_batches_tracked")}
    torch.save(bare, tmp_path / "c.pth")
    found = import_weights(str(tmp_path / "c.pth"), tmp_path / "w.safetensors")
    assert (found.tensors, found.left_out) == (120, 0)
    assert read_weights(str(tmp_path / "w.safetensors")).tensors["bn1.num_batches_tracked"] == 0


# Networks that are near a ResNet of torchvision's: attention (SE, ECA, GC), deep stems, split
# attention, selective kernels, other norms, none, or another form of the block, further stages.
RELATIVES = (
    "seresnet18", "seresnet50", "ecaresnet26t", "resnet18d", "resnet50d", "resnetrs50",
    "resnest14d", "skresnet18", "res2net50_14w_8s", "resnet50_gn", "legacy_seresnet18",
    "resnetv2_50", "resnetv2_18", "nf_resnet26", "gcresnet33ts", "resnet26", "hrnet_w18_small",
    "seresnext50_32x4d", "wide_resnet101_2", "resnext101_32x4d", "resnet152", "cspresnet50",
    "resnet50_clip",
)  # fmt: skip


@pytest.mark.parametrize("name", RELATIVES)
def test_another_network_does_not_pass_as_a_plain_resnet(name: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        network = timm.create_model(name)
    # Views of one number: names and shapes are what counts, and the file stays small.
    tensors = {n: torch.zeros(()).expand(t.shape) for n, t in network.state_dict().items()}
    torch.save(tensors, tmp_path / "c.pth")
    with pytest.raises(UsageError, match=r"not a (plain|torchvision)|holds no ResNet"):
        import_weights(str(tmp_path / "c.pth"), tmp_path / "w.safetensors")
    assert not (tmp_path / "w.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2"])
def test_plain_resnets_of_timm_are_imported_with_their_features(name: str, tmp_path: Path) -> None:
    network: Any = timm.create_model(name).eval()
    torch.save({"arch": name, "state_dict": network.state_dict()}, tmp_path / "c.pth")
    found = import_weights(str(tmp_path / "c.pth"), tmp_path / "w.safetensors")
    assert (found.architecture, found.left_out) == (name, 2)  # fc
    (ours,) = open_compared([str(tmp_path / "w.safetensors")])
    backbone = ResNetBackbone(name).eval()
    backbone.load_state_dict(read_weights(ours.address).tensors)
    images = torch.randn(1, 3, 64, 64)
    assert torch.allclose(backbone(images)["res5"], network.forward_features(images), atol=1e-5)


BLURRED: dict[str, Callable[[Tensors], tuple[str, object, str | None]]] = {
    "file name": lambda tensors: ("resnetblur18-84f4748f.pth", tensors, None),
    "arch": lambda tensors: ("c.pth", {"arch": "resnetblur18", "state_dict": tensors}, None),
    "options": lambda tensors: (
        "c.pth", {"args": argparse.Namespace(model="resnetblur18"), "state_dict": tensors}, None,
    ),
    "config.json": lambda tensors: ("c.pth", tensors, '{"architecture": "resnetblur18"}'),
}  # fmt: skip


@pytest.mark.parametrize("place", BLURRED)
def test_anti_aliased_network_is_known_by_its_name(place: str, tmp_path: Path) -> None:
    """Its tensors are those of a plain ResNet, all and no more."""
    tensors = timm.create_model("resnetblur18", num_classes=0).state_dict()
    assert tensors.keys() == OWN.keys()
    name, content, config = BLURRED[place](tensors)
    torch.save(content, tmp_path / name)
    if config:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(UsageError, match=r"resnetblur18.* blurs before it subsamples"):
        import_weights(str(tmp_path / name), tmp_path / "w.safetensors")


NAMINGS = {naming.name: naming.translate for naming in public_checkpoints._NAMINGS}


@pytest.mark.parametrize(
    ("naming", "name"),
    [
        *((naming, name) for naming in NAMINGS
          for name in ("conv1.bias", "layer2.0.se.fc1.weight", "layer1.0.bn4.weight")),
        *(("torchvision", name) for name in
          ("bn2.weight", "maxpool.0.weight", "layer5.0.conv1.weight", "act1.weight")),
    ],
)  # fmt: skip
def test_unknown_tensor_of_the_stem_or_a_stage_is_named(
    naming: str, name: str, tmp_path: Path
) -> None:
    translate = NAMINGS[naming]
    tensors = {f"backbone.{translate(n)}": t for n, t in OWN.items()}
    theirs = translate(name)
    torch.save({**tensors, f"backbone.{theirs}": torch.zeros(1)}, tmp_path / "c.pth")
    with pytest.raises(UsageError, match=f"not a plain resnet18.*{re.escape(theirs)}"):
        import_weights(str(tmp_path / "c.pth"), tmp_path / "w.safetensors")


def test_weights_of_detectron2_come_with_what_they_want_of_their_input(tmp_path: Path) -> None:
    metadata = WeightsMetadata("torchvision", "resnet18", (0.5,) * 3, (0.2,) * 3, 64)
    arrays = detectron2_arrays(Weights("w", metadata, OWN))
    torch.save({"model": {n: torch.from_numpy(a) for n, a in arrays.items()}}, tmp_path / "c.pth")
    done = dupr("import", tmp_path / "c.pth", "--out", tmp_path / "w.safetensors")
    said = " ".join(done.stdout.split())
    assert all(word in said for word in ("BGR", "0 to 255", "stride in the 1x1 convolution"))


def test_plain_values_and_numbers_of_numpy_beside_the_tensors(tmp_path: Path) -> None:
    beside = {
        "best_acc1": np.float64(71.5), "step": np.int64(3), "flag": np.bool_(True),
        "half": np.float16(0.5), "losses": np.arange(3.0), "saved": datetime.datetime(2024, 1, 1),
        "args": argparse.Namespace(data=Path("/data"), lr=0.1, aug={"a", "b"}),
        "span": slice(1, 2), "epochs": range(3),
    }  # fmt: skip
    torch.save({"state_dict": OWN, **beside}, tmp_path / "c.pth")
    found = import_weights(str(tmp_path / "c.pth"), tmp_path / "w.safetensors")
    assert (found.tensors, found.left_out) == (120, 0)


@pytest.mark.parametrize("core", ["core", "_core"])
def test_numbers_of_older_and_newer_numpy(core: str, tmp_path: Path) -> None:
    torch.save({"state_dict": OWN, "acc": np.float64(1)}, tmp_path / "c.pth")
    moved = tmp_path / "moved.pth"
    with zipfile.ZipFile(tmp_path / "c.pth") as old, zipfile.ZipFile(moved, "w") as new:
        for entry in old.namelist():
            there = re.sub(rb"numpy\._?core", f"numpy.{core}".encode(), old.read(entry))
            new.writestr(entry, there)
    import_weights(str(moved), tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    "message",
    [
        "WeightsUnpickler error: " + "Unsupported class " * 20,
        "WeightsUnpickler error: " + "Unsupported class" + "x" * 300,
    ],
)
def test_reason_of_the_unpickler_is_not_cut_within_a_word(message: str) -> None:
    said = checkpoint_files._refusal(message)
    assert set(said.removesuffix(" ...").split()) <= set(message.split())


class Hostile:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {Path.cwd() / 'was-run'}",)


def test_pickle_that_would_run_code_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": OWN, "extra": Hostile()}, tmp_path / "evil.pth")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Hostile()))
    for name in ("evil.pth", "evil.pkl"):
        done = dupr("import", tmp_path / name, "--out", tmp_path / "w.safetensors", code=2)
        said = " ".join(done.stderr.split())
        assert "refused" in said
        assert "could run code. Nothing was run" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["evil.pkl", "evil.pth"]


def damaged(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / "c.pth"
    if kind == "missing":
        return path
    tensors: object = OWN
    if kind == "shape":
        tensors = {**OWN, "layer3.1.conv2.weight": torch.zeros(3, 3)}
    if kind == "short":
        tensors = {n: t for n, t in OWN.items() if n != "layer4.1.bn2.weight"}
    if kind == "other":
        tensors = {"blocks.0.attn.qkv.weight": torch.zeros(3, 3)}
    if kind == "nan":
        tensors = {**OWN, "layer3.1.conv2.weight": OWN["layer3.1.conv2.weight"] * float("nan")}
    torch.save(tensors, path)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:100_000])
    contents = {"text": b"<html>404</html>", "word": b"hello", "nothing": b"", "zeros": bytes(99)}
    if kind in contents:
        path.write_bytes(contents[kind])
    return path


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("missing", "this file does not exist"),
        (
            "shape",
            r"nearest is resnet18, but layer3\.1\.conv2\.weight is 3x3 instead of 256x256x3x3",
        ),
        ("short", r"nearest is resnet18, but layer4\.1\.bn2\.weight is missing"),
        ("other", r"holds no ResNet.*blocks\.0\.attn"),
        ("nan", r"layer3\.1\.conv2\.weight holds values that are not finite"),
        ("cut", r"cannot be read as a checkpoint"),
        *(
            (kind, r"cannot be read as a checkpoint \(.+\)")
            for kind in ("text", "word", "nothing", "zeros")
        ),
    ],
)
def test_what_is_no_checkpoint_is_one_message(kind: str, problem: str, tmp_path: Path) -> None:
    path = damaged(tmp_path, kind)
    with pytest.raises(UsageError, match=problem):
        import_weights(str(path), tmp_path / "w.safetensors")
    assert not (tmp_path / "w.safetensors").exists()


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=48) | st.text("()]}0abcijlopqrstuRNV.\n", max_size=24).map(str.encode))
@example(b"root:x:0:0:root:/root:/bin/bash\n")
def test_arbitrary_bytes_are_one_message(data: bytes) -> None:
    with TemporaryDirectory() as folder:
        (Path(folder) / "c.pth").write_bytes(data)
        with pytest.raises(UsageError, match=r"c\.pth"):
            import_weights(f"{folder}/c.pth", Path(folder) / "w.safetensors")


def test_file_in_the_way_is_kept(tmp_path: Path) -> None:
    torch.save(OWN, tmp_path / "c.pth")
    (tmp_path / "w.safetensors").write_text("precious")
    with pytest.raises(UsageError, match="this file exists"):
        import_weights(str(tmp_path / "c.pth"), tmp_path / "w.safetensors")
    assert (tmp_path / "w.safetensors").read_text() == "precious"


def test_pretraining_starts_from_imported_weights(tmp_path: Path, tiny_shards: Path) -> None:
    torch.save(FORMS["moco"](), tmp_path / "c.pth")
    printed = dupr("import", tmp_path / "c.pth", "--out", tmp_path / "w.safetensors").stdout
    assert "all 120 tensors" in printed
    out = tmp_path / "run"
    # Another seed than that of OWN, whose weights a random start would have by itself.
    init = (*RESNET18, "--set", f"model.init={tmp_path / 'w.safetensors'}", "--set", "seed=5")
    pretrain(tiny_shards, out, *init, "--steps", 1, "--set", "optimizer.lr=1e-12")
    started = read_weights(str(out)).tensors["layer1.0.conv1.weight"]
    assert torch.allclose(started, OWN["layer1.0.conv1.weight"], atol=1e-6)
    of_both = load_file(out / "latest" / "model.safetensors")
    keys = of_both["key.backbone.layer1.0.conv1.weight"]
    assert torch.allclose(keys, OWN["layer1.0.conv1.weight"], atol=1e-6)
    wrong = (*RESNET18, "--set", f"model.init={tmp_path / 'nowhere.safetensors'}")
    pretrain(tiny_shards, tmp_path / "other", *wrong, code=2)
    assert not (tmp_path / "other").exists()
    # Nor is a run thrown away for one that cannot start.
    pretrain(tiny_shards, out, *wrong, "--overwrite", code=2)
    assert torch.equal(read_weights(str(out)).tensors["layer1.0.conv1.weight"], started)


@pytest.mark.parametrize(
    ("option", "value", "problem"),
    [
        ("--input-mean", "0.5,0.5", "three numbers"),
        ("--input-mean", "0.5,nan,0.5", "three numbers"),
        ("--input-std", "0.2,0,0.2", "numbers above 0"),
    ],
)
def test_statistics_that_are_none(option: str, value: str, problem: str, tmp_path: Path) -> None:
    torch.save(OWN, tmp_path / "c.pth")
    out = tmp_path / "w.safetensors"
    done = dupr("import", tmp_path / "c.pth", "--out", out, option, value, code=2)
    assert f"{option} {value}" in done.stderr
    assert problem in done.stderr
    assert not out.exists()


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e4m3fn])
def test_parameters_that_are_no_plain_floats_are_refused_by_name(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    tensors = dict(backbone())
    tensors["layer1.0.conv1.weight"] = tensors["layer1.0.conv1.weight"].to(dtype)
    torch.save(tensors, tmp_path / "w.pth")
    with pytest.raises(UsageError, match=r"w.pth: layer1.0.conv1.weight holds values of"):
        import_weights(str(tmp_path / "w.pth"), tmp_path / "out.safetensors")


def test_a_checkpoint_that_holds_a_name_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "w.pth"
    torch.save(backbone(), file)
    with zipfile.ZipFile(file, "a") as opened, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        name = opened.namelist()[1]
        opened.writestr(name, b"other")
    with pytest.raises(UsageError, match=rf"refused. The file holds '{name}' 2 times"):
        import_weights(str(file), tmp_path / "out.safetensors")


def test_a_compressed_checkpoint_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "w.pth"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("archive/data.pkl", bytes(10**6))
    with pytest.raises(UsageError, match="The file is compressed"):
        import_weights(str(file), tmp_path / "out.safetensors")
