"""--exclude: copies of the images of another set stay out of the shards, and each is named."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from dupr_cli import prepare
from dupr_cli.artifacts.shards import Manifest, open_shards
from dupr_cli.errors import RunError, StoppedRunError, UsageError
from dupr_cli.recipe import PrepareRecipe, load_recipe
from tests.support.command_line import dupr
from tests.support.images import encode, noise_image
from tests.support.labelled_files import coco_json, skipped, yolo_line
from tests.support.labelled_scenes import add_split, annotation_xml
from tests.support.reporters import Listening
from tests.support.trees import file_digests, tree_bytes
from tests.support.workspace import Workspace

SIZE = (160, 120)
TESTED = range(100, 104)  # seeds of the images to exclude


def recipe(exclude: dict[str, list[str]], **overrides: object) -> PrepareRecipe:
    keys = [f"{key.replace('__', '.')}={value}" for key, value in overrides.items()]
    loaded = load_recipe(PrepareRecipe, None, ["shard.max_samples=5", *keys])
    return PrepareRecipe.model_validate({**loaded.model_dump(), "exclude": exclude})


def jpeg(seed: int) -> bytes:
    return encode(noise_image(seed, *SIZE), quality=90)


@pytest.fixture
def tested(tmp_path: Path) -> Path:
    """A folder of test images."""
    folder = tmp_path / "tested"
    folder.mkdir()
    for seed in TESTED:
        (folder / f"test{seed}.jpg").write_bytes(jpeg(seed))
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """20 images that are no copies, a byte-equal copy of test100 and smaller ones of two others."""
    folder = tmp_path / "source"
    folder.mkdir()
    for seed in range(20):
        (folder / f"{seed:03d}.jpg").write_bytes(jpeg(seed))
    (folder / "equal.jpg").write_bytes(jpeg(100))
    small = noise_image(101, *SIZE).resize((100, 75))
    (folder / "smaller.jpg").write_bytes(encode(small, quality=60))
    (folder / "other-format.png").write_bytes(encode(noise_image(102, *SIZE), "PNG"))
    return folder


def sources(out: Path) -> set[str]:
    shards = open_shards(str(out))
    return {shards[number].source for number in range(len(shards))}


def test_copies_by_bytes_and_by_look_are_left_out_and_nothing_else(
    source: Path, tested: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = prepare.run(recipe({str(tested): []}), source, out, workers=1)
    assert sources(out) == {f"{seed:03d}.jpg" for seed in range(20)}
    reasons = skipped(out)
    assert reasons.keys() == {"equal.jpg", "smaller.jpg", "other-format.png"}
    assert reasons["equal.jpg"] == f"excluded (same bytes): test100.jpg of {tested}"
    looks = f"excluded (looks the same): test101.jpg of {tested}; "
    assert reasons["smaller.jpg"].startswith(looks)
    assert reasons["smaller.jpg"].endswith(" of 64 bits differ")
    counts = {"excluded (looks the same)": 2, "excluded (same bytes)": 1}
    assert result.skip_reasons == Manifest.read(out).skip_reasons == counts
    assert (result.samples, result.skipped, result.excluded) == ({"train": 20}, 3, 3)


def test_images_that_prepare_changes_are_found_by_the_bytes_of_their_source(tmp_path: Path) -> None:
    """A grey photograph is re-encoded and shrunk on its way into a shard."""
    source, tested = tmp_path / "source", tmp_path / "tested"
    for folder in (source, tested):
        folder.mkdir()
        noise_image(1, *SIZE).convert("L").save(folder / "grey.png")
    noise_image(2).save(source / "other.png")
    settings = recipe({str(tested): []}, image__max_side=20)
    prepare.run(settings, source, tmp_path / "out", workers=1)
    assert skipped(tmp_path / "out")["grey.png"].startswith("excluded (same bytes)")


def voc(root: Path) -> dict[str, list[str]]:
    add_to_voc(root)
    return {str(root): ["val"]}


def add_to_voc(root: Path) -> None:
    """The tested images as val; train holds images that the source has as well."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for seed in (*TESTED, 0, 1, 2):
        (root / "JPEGImages" / f"{seed}.jpg").write_bytes(jpeg(seed))
        xml = annotation_xml([("thing", 10, 10, 60, 60)])
        (root / "Annotations" / f"{seed}.xml").write_text(xml)
    add_split(root, "val", [str(seed) for seed in TESTED])
    add_split(root, "train", ["0", "1", "2"])


def coco(root: Path) -> dict[str, list[str]]:
    (root / "val2017").mkdir(parents=True)
    (root / "annotations").mkdir()
    names = [f"{seed}.jpg" for seed in TESTED]
    for seed, name in zip(TESTED, names, strict=True):
        (root / "val2017" / name).write_bytes(jpeg(seed))
    boxes = [(1, 1, 30, 30)] * len(names)
    content = coco_json(names, boxes, [SIZE] * len(names))
    (root / "annotations/instances_val2017.json").write_text(json.dumps(content))
    return {str(root): ["val2017"]}


def yolo(root: Path) -> dict[str, list[str]]:
    for part in ("images/val", "labels/val", "images/train", "labels/train"):
        (root / part).mkdir(parents=True)
    for split, seeds in (("val", TESTED), ("train", range(3))):
        for seed in seeds:
            (root / "images" / split / f"{seed}.jpg").write_bytes(jpeg(seed))
            line = yolo_line((10, 10, 60, 60), SIZE)
            (root / "labels" / split / f"{seed}.txt").write_text(line)
    (root / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [thing]\n")
    return {str(root): ["val"]}


def shards(root: Path) -> dict[str, list[str]]:
    add_to_voc(root / "tree")
    prepare.run(recipe({}), root / "tree", root / "shards", workers=1)
    return {str(root / "shards"): ["val"]}


def class_folders_and_stray_images(root: Path) -> dict[str, list[str]]:
    for seed in TESTED:
        place = root / ("train/class" if seed % 2 else "test")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{seed}.jpg").write_bytes(jpeg(seed))
    return {str(root): []}


@pytest.mark.parametrize("make", [voc, coco, yolo, shards, class_folders_and_stray_images])
def test_a_set_of_any_layout_is_excluded_and_its_other_splits_are_not(
    make: Callable[[Path], dict[str, list[str]]], source: Path, tmp_path: Path
) -> None:
    result = prepare.run(recipe(make(tmp_path / "set")), source, tmp_path / "out", workers=1)
    assert (result.samples, result.excluded) == ({"train": 20}, 3)


def test_splits_are_named_for_each_set(source: Path, tested: Path, tmp_path: Path) -> None:
    add_to_voc(tmp_path / "voc")
    settings = recipe({str(tmp_path / "voc"): ["train"], str(tested): []})
    result = prepare.run(settings, source, tmp_path / "out", workers=1)
    assert (result.samples, result.excluded) == ({"train": 17}, 6)


def test_archives_of_one_name_are_not_confused(source: Path, tested: Path, tmp_path: Path) -> None:
    """Both are unpacked while they are read."""
    for folder in (source, tested):
        (tmp_path / f"of-{folder.name}").mkdir()
        with tarfile.open(tmp_path / f"of-{folder.name}" / "images.tar.gz", "w:gz") as tar:
            tar.add(folder, "images")
    settings = recipe({str(tmp_path / "of-tested/images.tar.gz"): []})
    archive, out = tmp_path / "of-source/images.tar.gz", tmp_path / "out"
    assert prepare.run(settings, archive, out, workers=1).excluded == 3
    assert not (out / ".prepare").exists()


def test_workers_and_tasks_give_the_bytes_of_one_call(
    source: Path, tested: Path, tmp_path: Path
) -> None:
    settings = recipe({str(tested): []})
    whole = prepare.run(settings, source, tmp_path / "one", workers=1)
    prepare.run(settings, source, tmp_path / "two", workers=2)
    for number in (2, 1, 3):
        part = prepare.run(settings, source, tmp_path / "tasks", workers=1, task=(number, 3))
        assert part.excluded is not None
    assert prepare.merge(tmp_path / "tasks").excluded == whole.excluded == 3
    for name in ("two", "tasks"):
        assert file_digests(tmp_path / name) == file_digests(tmp_path / "one")


@pytest.mark.parametrize("step", [0, 3, 9, 25, 26])
def test_an_interrupted_call_continues_with_the_same_bytes(
    source: Path, tested: Path, tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted while the test images are hashed, and while blocks are written."""
    settings = recipe({str(tested): []})
    prepare.run(settings, source, tmp_path / "whole", workers=1)
    calls = 0

    def stop() -> None:
        nonlocal calls
        calls += 1
        if calls > step:
            raise StoppedRunError("stopped")

    out = tmp_path / "cut"
    with monkeypatch.context() as patched:
        patched.setattr("dupr_cli.prepare.engines.raise_if_stopped", stop)
        patched.setattr("dupr_cli.prepare.excluded_sets.raise_if_stopped", stop)
        with pytest.raises(StoppedRunError, match="stopped"):
            prepare.run(settings, source, out, workers=1)
    assert out.exists() == (step >= len(TESTED))
    prepare.run(settings, source, out, workers=1)
    assert file_digests(out) == file_digests(tmp_path / "whole")


@pytest.mark.parametrize("finished", [True, False])
def test_other_sets_are_refused_on_an_output_that_exists(
    source: Path, tested: Path, tmp_path: Path, finished: bool
) -> None:
    out, others = tmp_path / "out", tmp_path / "others"
    task = None if finished else (1, 2)
    prepare.run(recipe({str(tested): []}), source, out, workers=1, task=task)
    others.mkdir()
    noise_image(7).save(others / "a.png")
    before = file_digests(out)
    cases: list[tuple[dict[str, list[str]], object]] = [
        ({}, "nothing"), ({str(others): []}, others),
    ]  # fmt: skip
    for exclude, now in cases:
        with pytest.raises(UsageError, match=f"exclude: {tested} there, {now} now"):
            prepare.run(recipe(exclude), source, out, workers=1)
    noise_image(8).save(tested / "new.png")
    with pytest.raises(UsageError, match=f"exclude: images of {tested} are new, changed or gone"):
        prepare.run(recipe({str(tested): []}), source, out, workers=1)
    assert {**before, ".dupr.lock": ""} == {**file_digests(out), ".dupr.lock": ""}
    (tested / "new.png").unlink()
    assert prepare.run(recipe({str(tested): []}), source, out, workers=1).excluded == 3


def test_a_set_made_without_exclusion_is_not_taken_for_one_with_it(
    source: Path, tested: Path, tmp_path: Path
) -> None:
    prepare.run(recipe({}), source, tmp_path / "out", workers=1)
    with pytest.raises(UsageError, match=f"exclude: nothing there, {tested} now"):
        prepare.run(recipe({str(tested): []}), source, tmp_path / "out", workers=1, append=True)


def test_appended_images_are_compared_with_the_excluded_ones_too(
    source: Path, tested: Path, tmp_path: Path
) -> None:
    out, settings = tmp_path / "out", recipe({str(tested): []})
    prepare.run(settings, source, out, workers=1)
    (source / "later.jpg").write_bytes(jpeg(103))
    (source / "new.jpg").write_bytes(jpeg(50))
    result = prepare.run(settings, source, out, workers=1, append=True)
    assert (result.samples, result.excluded) == ({"train": 21}, 4)
    assert skipped(out)["later.jpg"] == f"excluded (same bytes): test103.jpg of {tested}"
    assert len(skipped(out)) == Manifest.read(out).skipped == 4
    complete = tree_bytes(out)
    prepare.run(settings, source, out, workers=1)
    assert tree_bytes(out) == complete


def test_images_that_cannot_be_read_are_counted_and_named(
    source: Path, tested: Path, tmp_path: Path
) -> None:
    (tested / "a-broken.jpg").write_bytes(jpeg(105)[:300])
    (tested / "b-link.jpg").symlink_to(tmp_path / "nowhere.jpg")
    reporter = Listening()
    settings = recipe({str(tested): []})
    result = prepare.run(settings, source, tmp_path / "out", workers=1, reporter=reporter)
    assert result.excluded == 3
    (warning,) = (text for text in reporter.warnings if text.startswith("exclude"))
    assert f"2 of the 6 images of {tested} cannot be used" in warning
    assert "the first is a-broken.jpg: does not decode" in warning


def test_a_set_that_cannot_be_used_is_refused_before_anything_is_written(
    source: Path, tested: Path, tmp_path: Path
) -> None:
    add_to_voc(tmp_path / "voc")
    empty, text, broken = (tmp_path / name for name in ("empty", "text", "broken"))
    for folder in (empty, text, broken):
        folder.mkdir()
    (text / "notes.txt").write_text("no image")
    (broken / "a.jpg").write_bytes(b"no image")
    cases: list[tuple[list[object], str]] = [
        ([tmp_path / "nowhere"], "exclude: .*nowhere: the file or folder does not exist"),
        ([empty], "exclude: .*empty: the folder is empty"),
        ([text], "exclude: .*text holds no images"),
        ([source / "000.jpg"], "exclude: .*the kind of source is not recognised"),
        ([broken], "exclude: .*none of its 1 images can be used. The first is a.jpg"),
        ([tmp_path / "voc", "--exclude-split", "tset"], "exclude: .*no split 'tset'"),
        ([tested, "--exclude-split", "val"], "exclude: .*has no splits, but val is asked for"),
        ([""], "--exclude: exclude is given an empty address"),
    ]
    for options, message in cases:
        done = dupr("prepare", source, tmp_path / "out", "--exclude", *options, code=2)
        assert not (tmp_path / "out").exists()
        error = " ".join(done.stderr.split())
        assert "source.kind" not in error  # the way out of another problem
        assert re.search(message, error), error
    dupr("prepare", source, tmp_path / "out", "--exclude-split", "val", code=2)


def test_a_source_of_excluded_images_alone_is_an_error(tested: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"none of 4 images could be used.*excluded"):
        prepare.run(recipe({str(tested): []}), tested, tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_counts_the_images_of_the_set_and_changes_nothing(
    source: Path, tested: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    call = ("prepare", source, out, "--exclude", tested, "--dry-run", "--json")
    printed = json.loads(dupr(*call).stdout)
    assert printed["plan"]["excluded"] == {str(tested): 4}
    assert printed["recipe"]["exclude"] == {str(tested): []}
    assert not out.exists()
    dupr("prepare", source, out, "--exclude", tested, "--workers", 1)
    before = tree_bytes(out)
    assert json.loads(dupr(*call).stdout)["plan"]["action"] == "nothing"
    noise_image(8).save(tested / "new.png")
    dupr(*call, code=2)
    assert tree_bytes(out) == before


def test_the_summary_says_how_many_were_excluded(
    source: Path, tested: Path, tmp_path: Path
) -> None:
    call = ("prepare", source, tmp_path / "out", "--exclude", tested, "--workers", 1)
    printed = " ".join(dupr(*call).stdout.split())
    assert "left out 3: 2 excluded (looks the same), 1 excluded (same bytes)" in printed
    assert "excluded 3 of the images left out" in printed
    (tmp_path / "others").mkdir()
    noise_image(60).save(tmp_path / "others/a.png")
    call = ("prepare", source, tmp_path / "o", "--exclude", tmp_path / "others", "--workers", 1)
    assert "excluded 0 of the images" in " ".join(dupr(*call).stdout.split())


def test_sets_of_the_command_line_are_added_to_those_of_the_recipe(
    source: Path, tested: Path, tmp_path: Path
) -> None:
    (tmp_path / "r.yaml").write_text(f"stage: prepare\nexclude: {{{tested}: []}}\n")
    add_to_voc(tmp_path / "voc")
    done = dupr(
        "prepare", source, tmp_path / "out", "--recipe", tmp_path / "r.yaml", "--workers", 1,
        "--exclude", tmp_path / "voc", "--exclude-split", "train", "--json",
    )  # fmt: skip
    assert json.loads(done.stdout)["excluded"] == 6


@pytest.mark.slow
def test_the_leak_check_of_evaluate_finds_nothing_in_the_shards(tmp_path: Path) -> None:
    space = Workspace(tmp_path, images=20)
    val = [line.strip() for line in (space.tree / "ImageSets/Main/val.txt").open()]
    for name in val:
        data = (space.tree / "JPEGImages" / f"{name}.png").read_bytes()
        (space.images / f"{name}-equal.png").write_bytes(data)
    with_leaks = tmp_path / "with-leaks"
    dupr("prepare", space.images, with_leaks, "--workers", 1)
    assert space.prepare("--exclude", space.tree, "--exclude-split", "val").code == 0
    assert space.evaluate("--leaks", space.shards, "--leaks", with_leaks).code == 0
    leaks = json.loads((space.evaluation / "results.json").read_text())["leaks"]
    assert [(found["test_images"], found["tested"]) for found in leaks] == [(0, 2), (2, 2)]
