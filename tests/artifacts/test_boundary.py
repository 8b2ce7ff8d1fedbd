"""Artifacts that were changed by hand, cut off, or made to mislead: one message for each."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from dupr_cli.artifacts import remote
from dupr_cli.artifacts.results import Results
from dupr_cli.artifacts.run import STATE_FILE, newest_checkpoint, read_environment
from dupr_cli.artifacts.shards import MANIFEST, open_shards
from dupr_cli.artifacts.weights import WeightsMetadata, read_weights
from dupr_cli.errors import DuprError, RunError, UsageError
from tests.support.images import write_shards
from tests.support.servers import serve
from tests.support.weights import METADATA, make_run, random_weights


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "shards", 6, per_shard=3)


def change(file: Path, edit: Callable[[Any], object]) -> None:
    values = json.loads(file.read_text())
    edit(values)
    file.write_text(json.dumps(values))


def first_entry(manifest: Any) -> Any:
    return manifest["splits"]["train"][0]


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda m: first_entry(m).update(samples=10**12), "cannot hold 1000000000000 samples"),
        (lambda m: first_entry(m).update(samples="many"), r"splits.train.0.samples: .*'many'"),
        (lambda m: first_entry(m).update(bytes=-1), "splits.train.0.bytes"),
        (lambda m: m.update(splits=[1]), "splits: "),
        (lambda m: m.update(classes={"a": 1}), "classes: "),
        (lambda m: m.update(pixels={"channels": 3, "range": [1, 1]}), "its pixels are"),
    ],
)
def test_a_manifest_names_its_wrong_field(
    shards: Path, edit: Callable[[Any], object], problem: str
) -> None:
    change(shards / MANIFEST, edit)
    with pytest.raises(UsageError, match=rf"manifest.json is not a whole manifest .*{problem}"):
        open_shards(str(shards))


def test_a_manifest_nested_without_end_is_one_message(shards: Path) -> None:
    (shards / MANIFEST).write_text("[" * 100_000)
    with pytest.raises(UsageError, match="nested deeper"):
        open_shards(str(shards))


@pytest.mark.parametrize("name", ["../outside.tar", "/etc/passwd", "", "x" * 3000])
def test_a_local_manifest_cannot_name_a_file_outside_its_folder(shards: Path, name: str) -> None:
    outside = shards.parent / "outside.tar"
    outside.write_bytes((shards / "train-000000.tar").read_bytes())
    change(shards / MANIFEST, lambda m: first_entry(m).update(file=name))
    with pytest.raises(UsageError, match="would lie outside the folder of the manifest"):
        open_shards(str(shards))


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda i: i["images"].__setitem__(1, [10**9, 5]), "outside the tar"),
        (lambda i: i["infos"].__setitem__(1, [-1, 5]), "infos.1.0"),
        (lambda i: i["boxes"].pop(), r"3 keys, but columns of"),
        (lambda i: i.update(keys=5), "keys: "),
        (lambda i: i.pop("sha256"), "sha256 is missing"),
        (lambda i: i.update(bytes=i["bytes"] + 512), "is of a tar of"),
    ],
)
def test_an_index_of_another_tar_is_refused_before_a_sample_is_read(
    shards: Path, edit: Callable[[Any], object], problem: str
) -> None:
    change(shards / "train-000001.index.json", edit)
    with pytest.raises(RunError, match=rf"train-000001.index.json.*{problem}"):
        open_shards(str(shards)).require_indexes()
    (shards / MANIFEST).unlink()
    with pytest.raises(RunError, match=rf"train-000001.index.json.*{problem}"):
        open_shards(str(shards))


def test_a_manifest_of_more_samples_than_the_shard_has_is_refused(shards: Path) -> None:
    change(shards / MANIFEST, lambda m: first_entry(m).update(samples=4))
    with pytest.raises(RunError, match="has 3 samples, 4 by the manifest"):
        _ = open_shards(str(shards))[3]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("input_std", [0.2, 0.0, 0.2]),
        ("input_mean", [0.5, math.nan, 0.5]),
        ("input_size", -1),
        ("step", -5),
        ("input_mean", "x"),
    ],
)
def test_the_state_of_a_checkpoint_names_its_wrong_key(
    tmp_path: Path, key: str, value: object
) -> None:
    make_run(tmp_path, "resnet18")
    state = next(tmp_path.glob(f"checkpoints/*/{STATE_FILE}"))
    change(state, lambda values: values.update({key: value}))
    with pytest.raises(UsageError, match=key):
        newest_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", ".."])
def test_the_state_of_a_checkpoint_lists_files_beside_it_only(tmp_path: Path, name: str) -> None:
    make_run(tmp_path, "resnet18")
    state = next(tmp_path.glob(f"checkpoints/*/{STATE_FILE}"))
    change(state, lambda values: values["files"].update({name: {"bytes": 1, "sha256": ""}}))
    with pytest.raises(UsageError, match="files"):
        newest_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("input_std", "[0.2, 0, 0.2]"),
        ("input_mean", "[0.5, NaN, 0.5]"),
        ("input_size", "-1"),
        ("input_mean", "[" * 5000),
        ("input_range", "[1, 1]"),
        ("further", "5"),
    ],
)
def test_the_header_of_weights_names_its_wrong_key(tmp_path: Path, key: str, value: str) -> None:
    file = tmp_path / "w.safetensors"
    header = {**METADATA.to_header(), key: value}
    file.write_bytes(save({"conv1.weight": torch.ones(1)}, header))
    with pytest.raises(UsageError, match=rf"header does not describe the weights \({key}"):
        read_weights(str(file))


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e4m3fn])
def test_weights_of_other_numbers_are_refused_by_name(tmp_path: Path, dtype: torch.dtype) -> None:
    file = tmp_path / "w.safetensors"
    tensors = {"bn1.num_batches_tracked": torch.tensor(5), "conv1.weight": torch.ones(2).to(dtype)}
    file.write_bytes(save(tensors, METADATA.to_header()))
    with pytest.raises(UsageError, match=rf"conv1.weight holds values of {str(dtype)[6:]}"):
        read_weights(str(file))


def test_a_header_with_a_name_given_twice_is_refused(tmp_path: Path) -> None:
    file = random_weights(tmp_path / "w.safetensors")
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = data[8:end].rstrip()
    entry = re.search(rb'"bn1.bias":\{[^}]*\}', header)
    assert entry is not None
    doubled = header[:-1] + b"," + entry[0] + b"}"
    file.write_bytes(len(doubled).to_bytes(8, "little") + doubled + data[end:])
    with pytest.raises(UsageError, match=r"'bn1\.bias' twice"):
        read_weights(str(file))


def test_metadata_survives_its_header() -> None:
    assert WeightsMetadata.from_header(METADATA.to_header(), "here") == METADATA


@pytest.mark.parametrize("text", ["[" * 100_000, '{"changes": 5}', '{"data": {"name": 1}}', "[]"])
def test_a_damaged_environment_is_one_message(tmp_path: Path, text: str) -> None:
    (tmp_path / "environment.json").write_text(text)
    with pytest.raises(UsageError, match=r"environment.json cannot be read"):
        read_environment(tmp_path)


def test_results_with_a_wrong_type_name_it(tmp_path: Path) -> None:
    old = Path(__file__).parent / "old" / "eval" / "results.json"
    file = tmp_path / "results.json"
    file.write_bytes(old.read_bytes())
    change(file, lambda values: values["results"][0].update(metrics={"AP": [1]}))
    with pytest.raises(UsageError, match=r"results.0.metrics.AP"):
        Results.read(file)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DUPR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "_FIRST_DELAY", 0.01)
    return tmp_path / "cache"


@pytest.mark.parametrize("seconds", [1, 4_000_000_000], ids=["past", "future"])
def test_a_cached_shard_that_changed_at_equal_size_is_fetched_again(
    shards: Path, cache: Path, seconds: int
) -> None:
    with serve(shards) as served:
        wanted = open_shards(served.url)[0].image
        copy = next(cache.glob("*/train-000000.tar"))
        data = bytearray(copy.read_bytes())
        place = data.find(wanted)
        data[place : place + 4] = b"evil"
        copy.write_bytes(data)
        os.utime(copy, (seconds, seconds))
        assert open_shards(served.url)[0].image == wanted


def test_a_cached_shard_that_was_only_touched_is_not_fetched_again(
    shards: Path, cache: Path
) -> None:
    with serve(shards) as served:
        wanted = open_shards(served.url)[0].image
        copy = next(cache.glob("*/train-000000.tar"))
        os.utime(copy, (1, 1))
        (shards / "train-000000.tar").unlink()
        assert open_shards(served.url)[0].image == wanted


@pytest.mark.parametrize("folder", [".", "*-*"])
def test_a_cache_where_others_may_write_is_refused(shards: Path, cache: Path, folder: str) -> None:
    with serve(shards) as served:
        _ = open_shards(served.url)[0]
        place = next(cache.glob(folder)) if folder != "." else cache
        place.chmod(0o777)
        with pytest.raises(DuprError, match=r"other users may write in it.*DUPR_CACHE"):
            _ = open_shards(served.url)[0]


def test_a_cache_of_the_user_below_a_folder_for_everyone_is_used(shards: Path, cache: Path) -> None:
    cache.mkdir()
    cache.chmod(0o1777)
    with serve(shards) as served:
        assert open_shards(served.url)[0].key == "s0000"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_a_folder_that_another_user_put_there_is_refused(shards: Path, cache: Path) -> None:
    with serve(shards) as served:
        _ = open_shards(served.url)[0]
        cache.chmod(0o1777)
        os.chown(next(cache.glob("*-*")), 12345, 12345)
        with pytest.raises(UsageError, match="belongs to another user"):
            _ = open_shards(served.url)[0]
