"""A source that is not as it was: refused with what changed, or its new images added."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dupr_cli import prepare
from dupr_cli.artifacts.shards import Manifest, open_shards
from dupr_cli.errors import UsageError
from dupr_cli.prepare.listing import survey
from dupr_cli.prepare.sources import make_source
from dupr_cli.recipe import PrepareRecipe, load_recipe
from tests.support.command_line import dupr
from tests.support.images import encode, noise_image
from tests.support.trees import file_digests, tree_bytes


def recipe(*overrides: str) -> PrepareRecipe:
    return load_recipe(PrepareRecipe, "default", ["shard.max_samples=4", *overrides])


def images(folder: Path, numbers: range) -> Path:
    folder.mkdir(exist_ok=True)
    for number in numbers:
        noise_image(number).save(folder / f"{number:03d}.jpg")
    return folder


def sources(out: Path) -> list[str]:
    shards = open_shards(str(out))
    return [shards[number].source for number in range(len(shards))]


def test_a_changed_image_is_refused_by_name(tmp_path: Path) -> None:
    source, out = images(tmp_path / "in", range(6)), tmp_path / "out"
    prepare.run(recipe(), source, out, workers=1)
    before = tree_bytes(out)
    (source / "003.jpg").write_bytes(encode(noise_image(99)))
    with pytest.raises(UsageError, match=r"1 has changed \(003\.jpg\)"):
        prepare.run(recipe(), source, out, workers=1)
    with pytest.raises(UsageError, match=r"1 has changed \(003\.jpg\)"):
        prepare.run(recipe(), source, out, workers=1, append=True)
    assert tree_bytes(out) == before
    prepare.run(recipe(), source, out, workers=1, overwrite=True)
    assert open_shards(str(out))[3].image == (source / "003.jpg").read_bytes()


def test_bytes_that_change_within_their_size_are_seen(tmp_path: Path) -> None:
    source, out = images(tmp_path / "in", range(6)), tmp_path / "out"
    prepare.run(recipe(), source, out, workers=1)
    path = source / "003.jpg"
    data = bytearray(path.read_bytes())
    data[-10] ^= 1
    path.write_bytes(data)
    os.utime(path, (2e9, 2e9))
    with pytest.raises(UsageError, match="has changed"):
        prepare.run(recipe(), source, out, workers=1)


def test_content_decides_where_asked(tmp_path: Path) -> None:
    """A copied folder has other times and the same images; a change that keeps them is seen."""
    source, out = images(tmp_path / "in", range(6)), tmp_path / "out"
    by_content = recipe("source.identity=content")
    prepare.run(by_content, source, out, workers=1)
    for path in source.iterdir():
        os.utime(path, (1e9, 1e9))
    prepare.run(by_content, source, out, workers=1)
    path = source / "003.jpg"
    data = bytearray(path.read_bytes())
    data[-10] ^= 1
    path.write_bytes(data)
    os.utime(path, (1e9, 1e9))
    with pytest.raises(UsageError, match=r"1 has changed \(003\.jpg\)"):
        prepare.run(by_content, source, out, workers=1)


def test_new_images_are_told_and_added_on_request(tmp_path: Path) -> None:
    source, out = images(tmp_path / "in", range(6)), tmp_path / "out"
    prepare.run(recipe(), source, out, workers=1)
    shards = [f"train-{n:06d}{suffix}" for n in range(2) for suffix in (".tar", ".index.json")]
    before = {name: facts for name, facts in tree_bytes(out).items() if name in shards}
    images(source, range(6, 9))
    with pytest.raises(UsageError, match=r"3 are new \(006.jpg, 007.jpg, 008.jpg\).*--append"):
        prepare.run(recipe(), source, out, workers=1)
    result = prepare.run(recipe(), source, out, workers=1, append=True)
    assert result.samples == {"train": 9}
    assert sources(out) == [f"{n:03d}.jpg" for n in range(9)]
    assert {name: tree_bytes(out)[name] for name in shards} == before
    complete = tree_bytes(out)
    prepare.run(recipe(), source, out, workers=1)
    prepare.run(recipe(), source, out, workers=1, append=True)
    assert tree_bytes(out) == complete


def test_images_are_added_twice_to_several_splits(tmp_path: Path) -> None:
    """The records of earlier samples stay in the order of the shards."""
    source, out = images(tmp_path / "in", range(12)), tmp_path / "out"
    settings = recipe("split.held_out=0.4")
    for last in (12, 24, 36):
        images(source, range(last - 12, last))
        prepare.run(settings, source, out, workers=1, append=True)
    # A copy of one that was prepared in each call: all are found as duplicates.
    for number in (1, 13, 25):
        data = (source / f"{number:03d}.jpg").read_bytes()
        (source / f"copy-{number}.jpg").write_bytes(data)
    result = prepare.run(settings, source, out, workers=1, append=True)
    assert result.skip_reasons == {"duplicate of": 3}
    skipped = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    keys = {line["path"]: line["reason"].removeprefix("duplicate of: ") for line in skipped}
    assert {path: key[:3] for path, key in keys.items()} == {
        "copy-1.jpg": "001", "copy-13.jpg": "013", "copy-25.jpg": "025"
    }  # fmt: skip
    assert sorted(sources(out)) == [f"{n:03d}.jpg" for n in range(36)]
    assert Manifest.read(out).skipped == 3


def test_images_that_are_gone_stay_in_the_shards_and_are_told(tmp_path: Path) -> None:
    source, out = images(tmp_path / "in", range(6)), tmp_path / "out"
    prepare.run(recipe(), source, out, workers=1)
    (source / "001.jpg").unlink()
    images(source, range(6, 7))
    done = dupr("prepare", source, out, "--set", "shard.max_samples=4", code=2)
    assert "1 is new (006.jpg), 1 is gone (001.jpg)" in done.stderr
    done = dupr("prepare", source, out, "--set", "shard.max_samples=4", "--append")
    assert "1 is gone (001.jpg)" in done.stderr
    assert sources(out) == [f"{n:03d}.jpg" for n in range(7)]


def test_an_append_that_is_killed_is_finished_by_the_same_command(tmp_path: Path) -> None:
    source, out = images(tmp_path / "in", range(6)), tmp_path / "out"
    prepare.run(recipe(), source, out, workers=1)
    quiet, old = tmp_path / "quiet", file_digests(out)
    quiet.mkdir()
    for path in out.iterdir():
        (quiet / path.name).write_bytes(path.read_bytes())
    images(source, range(6, 18))
    prepare.run(recipe(), source, quiet, workers=1, append=True)

    class Killed(BaseException):
        pass

    for survived in range(14):
        calls = 0

        def advance(number: int = survived) -> None:
            nonlocal calls
            calls += 1
            if calls > number:
                raise Killed

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dupr_cli.prepare.engines.raise_if_stopped", advance)
            try:
                prepare.run(recipe(), source, out, workers=1, append=True)
            except Killed:
                # The set as it was is whole all the while.
                assert len(open_shards(str(out))) == 6
                kept = {k: v for k, v in file_digests(out).items() if not k.startswith(".prepare")}
                assert kept == old
    assert file_digests(out) == file_digests(quiet)


def test_a_set_of_an_older_dupr_is_compared_by_names(tmp_path: Path) -> None:
    source, out = images(tmp_path / "in", range(6)), tmp_path / "out"
    prepare.run(recipe(), source, out, workers=1)
    (out / "source.jsonl.gz").unlink()
    (out / "records.bin").unlink()
    manifest = json.loads((out / "manifest.json").read_text())
    source_kind = make_source("folder", str(source), recipe().source, out)
    names = survey(source_kind, recipe()).names_alone
    manifest["fingerprint"] = f"{'0' * 64}-{names}"
    del manifest["recipe"]["source"]["identity"]  # dupr 0.1 had no such key
    (out / "manifest.json").write_text(json.dumps(manifest))
    before = tree_bytes(out)
    prepare.run(recipe(), source, out, workers=1)
    assert tree_bytes(out) == before
    images(source, range(6, 7))
    with pytest.raises(UsageError, match="the names of the images differ"):
        prepare.run(recipe(), source, out, workers=1)


def test_another_recipe_is_refused_with_its_keys(tmp_path: Path) -> None:
    source, out = images(tmp_path / "in", range(6)), tmp_path / "out"
    prepare.run(recipe(), source, out, workers=1)
    with pytest.raises(UsageError, match=r"image\.quality: 95 there, 80 now"):
        prepare.run(recipe("image.quality=80"), source, out, workers=1)


def test_going_back_to_the_finished_recipe_keeps_unfinished_work_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = images(tmp_path / "in", range(6)), tmp_path / "out"
    prepare.run(recipe(), source, out, workers=1)
    monkeypatch.setattr("dupr_cli.prepare.engines.raise_if_stopped", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare.run(recipe("image.quality=80"), source, out, workers=1, overwrite=True)
    monkeypatch.undo()
    before = tree_bytes(out)
    prepare.run(recipe(), source, out, workers=1)
    assert tree_bytes(out) == before


def interrupt() -> None:
    raise KeyboardInterrupt
