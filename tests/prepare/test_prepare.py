"""prepare: everything good arrives once, everything bad is named, and the bytes do not vary."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image

from dupr_cli import prepare
from dupr_cli.artifacts.labels import Box
from dupr_cli.artifacts.shard_files import Sample, write_shard
from dupr_cli.artifacts.shards import Manifest, open_shards
from dupr_cli.errors import RunError, UsageError
from dupr_cli.recipe import PrepareRecipe, load_recipe
from dupr_cli.recipe.prepare import ShardSection
from tests.support.images import encode, noise_image, write_shards
from tests.support.labelled_scenes import voc_year

SMALL = load_recipe(PrepareRecipe, None, ["shard.max_samples=5"])


def digests(folder: Path) -> dict[str, str]:
    """sha256 of everything that prepare wrote."""
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.iterdir())
        if p.is_file()
    }


def test_folder_becomes_full_shards_in_order_with_untouched_bytes(
    image_folder: Path, tmp_path: Path
) -> None:
    result = prepare.run(SMALL, image_folder, tmp_path / "out", workers=1)
    assert result.samples == {"train": 24}
    manifest = Manifest.read(tmp_path / "out")
    assert [entry.samples for entry in manifest.splits["train"]] == [5, 5, 5, 5, 4]
    shards = open_shards(str(tmp_path / "out"), "train")
    found = [shards[i] for i in range(24)]
    assert [s.source for s in found] == sorted(s.source for s in found)
    for sample in found:
        assert sample.image == (image_folder / sample.source).read_bytes()
        assert (sample.width, sample.height) == Image.open(image_folder / sample.source).size
    assert (tmp_path / "out" / "skipped.jsonl").read_text() == ""


@pytest.mark.parametrize("workers", [2, 5])
def test_output_does_not_depend_on_the_number_of_workers(
    image_folder: Path, tmp_path: Path, workers: int
) -> None:
    (image_folder / "bad.jpg").write_bytes(b"\xff\xd8 no")
    prepare.run(SMALL, image_folder, tmp_path / "one", workers=1)
    prepare.run(SMALL, image_folder, tmp_path / "many", workers=workers)
    assert digests(tmp_path / "one") == digests(tmp_path / "many")


def damaged(name: str) -> bytes:
    whole = encode(noise_image(1, 200, 150))
    return {
        "truncated.jpg": whole[: len(whole) // 2],
        "empty.jpg": b"",
        "text.jpg": b"this is a text",
        "cut.png": encode(noise_image(2), "PNG")[:-200],
    }[name]


def test_bad_files_are_listed_with_their_reasons_and_good_ones_kept(
    image_folder: Path, tmp_path: Path
) -> None:
    names = ("truncated.jpg", "empty.jpg", "text.jpg", "cut.png")
    for name in names:
        (image_folder / name).write_bytes(damaged(name))
    (image_folder / "wrong-suffix.jpg").write_bytes(encode(noise_image(3), "PNG"))
    (image_folder / "notes.txt").write_text("left alone")
    result = prepare.run(SMALL, image_folder, tmp_path / "out", workers=1)
    lines = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    reasons = {entry["path"]: entry["reason"] for entry in map(json.loads, lines)}
    assert set(reasons) == set(names)
    assert reasons["empty.jpg"] == "the file is empty"
    assert reasons["text.jpg"] == "not an image of a known format"
    assert reasons["truncated.jpg"].startswith("does not decode")
    assert reasons["cut.png"].startswith("does not decode")
    assert result.samples == {"train": 25}
    assert result.skipped == 4
    shards = open_shards(str(tmp_path / "out"))
    renamed = next(s for s in map(shards.__getitem__, range(25)) if "wrong" in s.key)
    assert renamed.extension == "png"


def test_voc_tree_becomes_labelled_splits(tmp_path: Path) -> None:
    tree = voc_year(
        tmp_path / "VOCdevkit" / "VOC2012",
        "<object><name>cat</name><bndbox><xmin>3</xmin><ymin>2</ymin><xmax>10</xmax>"
        "<ymax>9</ymax></bndbox></object>",
        split="a\n",
    )
    (tree.root / "ImageSets/Main/val.txt").write_text("b\nmissing\n")
    (tree.root / "Annotations/b.xml").write_text("<annotation/>")
    for name in ("a", "b"):
        noise_image(1).save(tree.root / "JPEGImages" / f"{name}.jpg")
    result = prepare.run(SMALL, tmp_path, tmp_path / "out", workers=1)
    assert result.samples == {"train": 1, "val": 1}
    assert result.skip_reasons == {"cannot be used": 1}
    assert Manifest.read(tmp_path / "out").classes == ["cat"]
    sample = open_shards(str(tmp_path / "out"), "train")[0]
    assert (sample.key, sample.boxes) == ("a", (Box("cat", 2, 1, 10, 9),))


def test_shards_can_be_sharded_again(tmp_path: Path) -> None:
    source = write_shards(tmp_path / "source", 30)
    prepare.run(SMALL, source, tmp_path / "out", workers=1)
    before, after = (open_shards(str(p)) for p in (source, tmp_path / "out"))
    assert [before[i].image for i in range(30)] == [after[i].image for i in range(30)]
    assert len(after.shards) == 6


def test_finished_output_is_left_alone_and_another_recipe_is_refused(
    image_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    prepare.run(SMALL, image_folder, out, workers=1)
    before = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    prepare.run(SMALL, image_folder, out, workers=1)
    assert {p: p.stat().st_mtime_ns for p in out.iterdir()} == before
    other = load_recipe(PrepareRecipe, None, ["shard.max_samples=7"])
    with pytest.raises(UsageError, match="another recipe or source"):
        prepare.run(other, image_folder, out, workers=1)
    assert {p: p.stat().st_mtime_ns for p in out.iterdir()} == before
    result = prepare.run(other, image_folder, out, workers=1, overwrite=True)
    assert result.shards == 4
    assert len(list(out.glob("*.tar"))) == 4


def test_a_recipe_key_of_a_later_dupr_is_named(image_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare.run(SMALL, image_folder, out, workers=1)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["recipe"]["polish"] = {"shine": 3}
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match=r"polish.shine: 3 there, None now"):
        prepare.run(SMALL, image_folder, out, workers=1)


def test_damaged_manifest_can_be_overwritten(image_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare.run(SMALL, image_folder, out, workers=1)
    before = digests(out)
    (out / "manifest.json").write_text("{")
    with pytest.raises(UsageError, match="not a whole manifest"):
        prepare.run(SMALL, image_folder, out, workers=1)
    prepare.run(SMALL, image_folder, out, workers=1, overwrite=True)
    assert digests(out) == before


def test_a_complete_set_that_lost_a_shard_says_so(image_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare.run(SMALL, image_folder, out, workers=1)
    before = digests(out)
    (out / "train-000002.tar").unlink()
    with pytest.raises(UsageError, match=r"train-000002.tar is missing .* --overwrite"):
        prepare.run(SMALL, image_folder, out, workers=1)
    prepare.run(SMALL, image_folder, out, workers=1, overwrite=True)
    assert digests(out) == before


def test_source_without_a_usable_image_leaves_an_output_that_can_be_used(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    (source / "a.jpg").write_bytes(b"x")
    with pytest.raises(RunError, match="none of 1 images could be used"):
        prepare.run(SMALL, source, out, workers=1)
    assert not out.exists()
    noise_image(0).save(source / "b.jpg")
    assert prepare.run(SMALL, source, out, workers=1).samples == {"train": 1}


def test_foreign_directory_is_never_written_into(image_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="not empty and holds no shards"):
            prepare.run(SMALL, image_folder, out, workers=1, overwrite=overwrite)
    assert [p.name for p in out.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("stop_after", [0, 1, 3])
def test_interrupted_output_is_finished_with_the_same_bytes(
    image_folder: Path, tmp_path: Path, stop_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (image_folder / "a-bad.jpg").write_bytes(b"no")
    prepare.run(SMALL, image_folder, tmp_path / "whole", workers=1)
    from dupr_cli.artifacts.shard_files import ShardWriter

    finish, count = ShardWriter.finish, iter(range(100))

    def failing(self: ShardWriter, *arguments: object) -> object:
        if next(count) == stop_after:
            raise KeyboardInterrupt
        return finish(self, *arguments)

    monkeypatch.setattr(ShardWriter, "finish", failing)
    with pytest.raises(KeyboardInterrupt):
        prepare.run(SMALL, image_folder, tmp_path / "cut", workers=1)
    monkeypatch.undo()
    with pytest.raises(UsageError, match="did not finish here"):
        open_shards(str(tmp_path / "cut"), "train")
    prepare.run(SMALL, image_folder, tmp_path / "cut", workers=1)
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")


def test_wrong_sources(tmp_path: Path) -> None:
    empty, text = tmp_path / "empty", tmp_path / "text"
    empty.mkdir()
    text.mkdir()
    (text / "a.txt").write_text("x")
    out = tmp_path / "out"
    for source, message in (
        (tmp_path / "nowhere", "the file or folder does not exist"),
        (empty, "the folder is empty"),
        (text, "holds no images"),
    ):
        with pytest.raises(UsageError, match=message):
            prepare.run(SMALL, source, out, workers=1)
        assert not out.exists()
    (text / "a.jpg").write_bytes(b"x")
    with pytest.raises(RunError, match="none of 1 images could be used"):
        prepare.run(SMALL, text, out, workers=1)


@pytest.mark.parametrize("parts", [1, 3, 40])
def test_tasks_and_merge_give_the_set_of_one_call(
    image_folder: Path, tmp_path: Path, parts: int
) -> None:
    (image_folder / "bad.jpg").write_bytes(b"no")
    prepare.run(SMALL, image_folder, tmp_path / "one", workers=1)
    out = tmp_path / "tasks"
    for number in reversed(range(1, parts + 1)):
        if parts > 1:
            with pytest.raises(UsageError, match=r"no task |blocks are not finished"):
                prepare.merge(out)
        prepare.run(SMALL, image_folder, out, workers=1, task=(number, parts))
    merged = prepare.merge(out)
    assert merged.samples == {"train": 24}
    assert digests(out) == digests(tmp_path / "one")
    assert prepare.merge(out) == merged  # nothing is left to do


def test_work_of_the_future_is_continued(image_folder: Path, tmp_path: Path) -> None:
    """The clock was set back meanwhile."""
    prepare.run(SMALL, image_folder, tmp_path / "one", workers=1)
    out = tmp_path / "tasks"
    prepare.run(SMALL, image_folder, out, workers=1, task=(1, 2))
    for path in out.rglob("*"):
        os.utime(path, (4_000_000_000, 4_000_000_000))
    prepare.run(SMALL, image_folder, out, workers=1, task=(2, 2))
    prepare.merge(out)
    assert digests(out) == digests(tmp_path / "one")
    assert prepare.plan(SMALL, image_folder, out).action == "nothing"


def test_a_link_to_another_file_system(image_folder: Path, tmp_path: Path) -> None:
    """Files cannot be renamed from one to another."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no other file system")
    prepare.run(SMALL, image_folder, tmp_path / "one", workers=1)
    with tempfile.TemporaryDirectory(dir=memory) as there:
        out = tmp_path / "out"
        out.symlink_to(there)
        for overwrite in (False, True):
            prepare.run(SMALL, image_folder, out, workers=1, overwrite=overwrite)
            assert digests(out) == digests(tmp_path / "one")


def test_overwriting_keeps_the_old_set_until_the_new_one_is_whole(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    prepare.run(SMALL, image_folder, out, workers=1)
    before = digests(out)
    other = load_recipe(PrepareRecipe, None, ["shard.max_samples=7"])

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("dupr_cli.prepare.blocks.write_bytes", full)
        with pytest.raises(OSError, match="No space"):
            prepare.run(other, image_folder, out, workers=1, overwrite=True)
    assert digests(out) == before
    assert len(open_shards(str(out))) == 24
    with pytest.raises(UsageError, match="unfinished shards of another"):
        prepare.run(load_recipe(PrepareRecipe, None, ["seed=1"]), image_folder, out, workers=1)
    with pytest.raises(UsageError, match="Give --overwrite again"):
        prepare.run(other, image_folder, out, workers=1)
    assert digests(out) == before
    prepare.run(other, image_folder, out, workers=1, overwrite=True)
    prepare.run(other, image_folder, tmp_path / "alone", workers=1)
    assert digests(out) == digests(tmp_path / "alone")


@pytest.mark.parametrize("step", range(1, 12))
def test_naming_shards_may_be_interrupted_anywhere(
    image_folder: Path, tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over an older set, and with a duplicate to take out."""
    recipe = load_recipe(PrepareRecipe, None, ["shard.max_samples=9"])
    (image_folder / "z.jpg").write_bytes((image_folder / "image01.jpg").read_bytes())
    prepare.run(recipe, image_folder, tmp_path / "whole", workers=1)
    out = tmp_path / "cut"
    prepare.run(SMALL, image_folder, out, workers=1)
    renames, replace = iter(range(1000)), Path.replace

    def failing(self: Path, target: Path) -> Path:
        inside = Path(target).parent == out
        if inside and next(renames) == step:
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patched, suppress(KeyboardInterrupt):
        patched.setattr(Path, "replace", failing)
        prepare.run(recipe, image_folder, out, workers=1, overwrite=True)
    prepare.run(recipe, image_folder, out, workers=1, overwrite=True)
    assert digests(out) == digests(tmp_path / "whole")
    assert not (out / ".prepare").exists()


def test_shuffling_is_a_permutation_that_the_seed_decides(
    image_folder: Path, tmp_path: Path
) -> None:
    orders = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        recipe = load_recipe(
            PrepareRecipe, None, ["shard.max_samples=5", "shard.shuffle=true", f"seed={seed}"]
        )
        prepare.run(recipe, image_folder, tmp_path / name, workers=1)
        shards = open_shards(str(tmp_path / name))
        orders.append([shards[i].source for i in range(len(shards))])
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])
    assert orders[0] != sorted(orders[0])


def test_images_are_held_out_by_their_key(image_folder: Path, tmp_path: Path) -> None:
    recipe = load_recipe(PrepareRecipe, None, ["split.held_out=0.3", "split.name=val"])
    prepare.run(recipe, image_folder, tmp_path / "few", workers=1)
    for number in range(40):
        noise_image(100 + number).save(image_folder / f"later{number}.png")
    prepare.run(recipe, image_folder, tmp_path / "many", workers=1)
    few, many = (
        {split: set(open_shards(str(tmp_path / name), split).keys()) for split in ("train", "val")}
        for name in ("few", "many")
    )
    assert few["train"] <= many["train"]
    assert few["val"] <= many["val"]
    assert 8 <= len(many["val"]) <= 32
    assert not many["train"] & many["val"]


def test_shards_stay_below_a_number_of_bytes(image_folder: Path, tmp_path: Path) -> None:
    limit = 20_480
    recipe = load_recipe(PrepareRecipe, None, [f"shard.max_bytes={limit}"])
    prepare.run(recipe, image_folder, tmp_path / "out", workers=1)
    entries = Manifest.read(tmp_path / "out").splits["train"]
    assert len(entries) > 2
    assert sum(entry.samples for entry in entries) == 24
    # A tar ends with two empty blocks and is filled to 10,240 bytes.
    assert all(entry.bytes <= limit + 10_240 for entry in entries)


def test_unfinished_work_of_a_source_that_changed_is_refused(
    image_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    prepare.run(SMALL, image_folder, out, workers=1, task=(1, 2))
    noise_image(1).save(image_folder / "new.png")
    with pytest.raises(UsageError, match="with the source as it was"):
        prepare.run(SMALL, image_folder, out, workers=1)
    (image_folder / "new.png").unlink()
    assert prepare.run(SMALL, image_folder, out, workers=1).samples == {"train": 24}


def test_two_images_of_one_key_both_stay(tmp_path: Path) -> None:
    """As in sets whose shards count from 0 each."""
    source = tmp_path / "source"
    source.mkdir()
    for number in range(2):
        samples = [
            Sample(f"{i:04d}", "jpg", encode(noise_image(10 * number + i))) for i in range(3)
        ]
        write_shard(source / f"{number}.tar", [*samples, Sample("same", "jpg", samples[0].image)])
    recipe = load_recipe(PrepareRecipe, None, ["source.kind=shards", "filter.duplicates=keep"])
    for number, block in enumerate((1000, 4)):
        out = tmp_path / f"out{number}"
        prepare.run(
            recipe.model_copy(update={"shard": ShardSection(max_samples=block)}),
            source, out, workers=1,
        )  # fmt: skip
        shards = open_shards(str(out))
        found = {shards[i].key: shards[i].image for i in range(len(shards))}
        assert len(found) == len(shards) == 8
        assert len(set(found.values())) == 6
        assert {key[:4] for key in found} == {"0000", "0001", "0002", "same"}
