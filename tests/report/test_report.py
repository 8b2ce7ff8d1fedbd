"""`dupr report`: what the page says, and what it refuses."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dupr_cli.artifacts.results import Results
from dupr_cli.report.figures import thinned
from tests.support.command_line import dupr
from tests.support.images import noise_image
from tests.support.report_sources import (
    make_results,
    write_labels,
    write_results,
    write_run,
    write_study,
)

VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """The elements of a page, its visible text, and whether every element is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.well_formed = True
        self._open: list[str] = []
        self.feed(text)
        self.close()
        self.well_formed &= not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        self.well_formed &= bool(self._open) and self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.text += data


def report(out: Path, *words: object) -> Page:
    dupr("report", *words, "--out", out)
    page = Page(out.read_text())
    assert page.well_formed
    return page


def require_self_contained(page: Page) -> None:
    """No element loads or runs anything that is not in the page."""
    assert "script" not in page.tags
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
            assert value.startswith(("#", "data:")), (tag, name, value[:80])


def test_a_run_that_learns_is_said_to(tmp_path: Path) -> None:
    page = report(tmp_path / "r.html", write_run(tmp_path / "run"))
    require_self_contained(page)
    assert "Run A (run) learns: at step 400" in page.text
    assert "res4 2.0 % to 30.0 %" in page.text
    assert "mirrored alike" in page.text
    assert "ln(1 + 512)" in page.text
    assert page.tags.count("svg") >= 6


@pytest.mark.parametrize("last", [0.02, 0.021, 0.005])
def test_a_run_that_does_not_learn_is_said_not_to(tmp_path: Path, last: float) -> None:
    run = write_run(tmp_path / "run", retrieval=(0.02, last))
    page = report(tmp_path / "r.html", run)
    assert "is not seen to learn" in page.text
    assert " learns: " not in page.text


def test_a_mirrored_case_that_is_not_learned_is_named(tmp_path: Path) -> None:
    last = {"retrieval_opposite_flip/res4": 0.02}
    page = report(tmp_path / "r.html", write_run(tmp_path / "run", last=last))
    assert "learns: at step 400" in page.text
    assert "where one of two views is mirrored, patches are not found clearly more" in page.text


def test_trouble_in_the_log_is_a_warning(tmp_path: Path) -> None:
    trouble = {"bad_steps": 3.0, "spread/patch/res4": 0.01, "unreadable": 2.0}
    page = report(tmp_path / "r.html", write_run(tmp_path / "run", last=trouble))
    assert "3 steps had a loss or gradient that was not finite" in page.text
    assert "2 times, an image could not be decoded" in page.text
    assert "the embeddings collapse; spread/patch/res4 is 0.010" in page.text


def test_results_alone_say_what_helps(tmp_path: Path) -> None:
    results = make_results({"ours": [30.0, 32.0, 31.0], "none": [20.0, 21.0, 22.0]})
    page = report(tmp_path / "r.html", write_results(tmp_path / "eval", results))
    require_self_contained(page)
    assert "Yes: eval: ours gives a better detector than none: +10.0 AP [+9.0, +11.0]" in page.text
    assert "none (baseline)" in page.text
    assert "31.0 ± 0.5" in page.text
    assert 'id="runs"' not in (tmp_path / "r.html").read_text()


def test_a_difference_that_may_be_chance_is_not_sold(tmp_path: Path) -> None:
    results = make_results({"ours": [30.0, 20.0], "none": [24.0, 25.0]}, real=False)
    page = report(tmp_path / "r.html", write_results(tmp_path / "eval", results))
    assert "these differences of AP may be chance" in page.text
    assert "ours minus none is +0.5 [-0.5, +1.5]" in page.text
    assert "better detector" not in page.text


def test_weights_that_are_worse_are_said_to_be(tmp_path: Path) -> None:
    results = make_results({"ours": [10.0, 11.0], "none": [20.0, 21.0]})
    page = report(tmp_path / "r.html", write_results(tmp_path / "eval", results))
    assert "Look: eval: none gives a better detector than ours: +10.0 AP" in page.text


def test_one_seed_is_no_evidence(tmp_path: Path) -> None:
    results = make_results({"ours": [30.0], "none": [20.0]})
    page = report(tmp_path / "r.html", write_results(tmp_path / "eval", results))
    assert "any difference between its weights may be chance" in page.text


def test_labels_saved_and_the_evaluations_within_are_shown(tmp_path: Path) -> None:
    page = report(tmp_path / "r.html", write_labels(tmp_path / "eval"))
    require_self_contained(page)
    assert "with 80 labels none reaches 23.0 AP; ours needs 52 [47, 60] labels" in page.text
    assert "eval, 40 labels" in page.text
    assert "eval, 80 labels" in page.text
    assert "Drawn afresh for every seed." in page.text


def test_a_study_shows_its_curves_and_what_beats_the_baseline(tmp_path: Path) -> None:
    page = report(tmp_path / "r.html", write_study(tmp_path / "study"))
    require_self_contained(page)
    assert "study, frozen, 40 labels: ours minus none is +10.0 [+9.0, +11.0] AP" in page.text
    assert "more than chance" in page.text
    assert "study: held-out patch retrieval" in page.text
    assert "ours-s0" in page.text


def test_two_runs_are_side_by_side_with_what_differs_in_their_recipes(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "one", overrides=["optimizer.lr=0.01"]),
        write_run(tmp_path / "two", overrides=["optimizer.lr=0.5"], retrieval=(0.02, 0.02)),
    ]
    page = report(tmp_path / "r.html", *runs)
    assert "Run A (one) learns" in page.text
    assert "Run B (two) is not seen to learn" in page.text
    (recipe,) = re.findall(r"Recipe keys in which the runs differ.*?Environment", page.text, re.S)
    assert "optimizer.lr" in recipe
    assert "method.queue_length" not in recipe


def test_a_run_and_its_evaluation_are_one_page_in_json_too(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    results = write_results(tmp_path / "eval", make_results({"ours": [3.0, 3.0], "none": [1, 2]}))
    out = tmp_path / "new" / "r.html"
    shown = json.loads(dupr("report", results, run, "--out", out, "--json").stdout)
    size = out.stat().st_size
    assert shown == {
        "path": str(out), "bytes": size, "runs": ["run"], "results": ["eval"], "labels": [],
        "studies": [],
    }  # fmt: skip


def test_a_real_run_has_pictures_of_its_views_and_matches(
    tiny_run: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    image = tmp_path / "mine.png"
    noise_image(7, 60, 60).save(image)
    page = report(tmp_path / "r.html", tiny_run, "--shards", tiny_shards, "--image", image)
    require_self_contained(page)
    pictures = [value for tag, name, value in page.attributes if (tag, name) == ("img", "src")]
    assert len(pictures) == 3
    assert all(picture.startswith("data:image/jpeg;base64,") for picture in pictures)
    assert "views" in page.text
    assert "matches at step 6" in page.text


HOSTILE = '<script>alert(1)</script>"><img src=x onerror=alert(2)>\x1b[2J\u202e{{ 7*7 }}'


def test_the_detections_of_evaluations_are_shown(tmp_path: Path) -> None:
    shown = write_results(tmp_path / "shown", example())
    Image.new("RGB", (1650, 900), (0, 158, 115)).save(shown / "detections.png")
    broken = write_results(tmp_path / "broken", example())
    (broken / "detections.png").write_bytes(b"no picture")
    page = report(tmp_path / "page.html", shown, broken)
    require_self_contained(page)
    assert page.tags.count("img") == 1
    picture = {name: value for tag, name, value in page.attributes if tag == "img"}
    assert picture["alt"] == "Detections beside the ground truth"
    assert (picture["width"], picture["height"]) == ("1650", "900")
    content = base64.b64decode(picture["src"].partition(",")[2])
    with Image.open(io.BytesIO(content)) as inlined:
        assert inlined.getpixel((5, 5)) == pytest.approx((0, 158, 115), abs=3)
    assert "broken: detections.png cannot be read" in page.text


def test_pictures_that_make_a_page_too_large_for_a_mail_are_named(tmp_path: Path) -> None:
    folders = []
    noise = np.random.default_rng(0).integers(0, 256, (1000, 1900, 3), dtype=np.uint8)
    for name in "abcdef":
        folders.append(write_results(tmp_path / name, example()))
        Image.fromarray(noise).save(folders[-1] / "detections.png", compress_level=1)
    page = report(tmp_path / "page.html", *folders)
    assert (tmp_path / "page.html").stat().st_size < 10_000_000
    shown = page.tags.count("img")
    assert 1 <= shown < 6
    assert page.text.count("detections.png is left out to keep this page small") == 6 - shown


def test_hostile_names_are_shown_as_they_are(tmp_path: Path) -> None:
    results = make_results({HOSTILE: [3.0, 4.0], "none": [1.0, 2.0]}, notes=[HOSTILE])
    folder = write_results(tmp_path / "<b>eval", results)
    run = write_run(tmp_path / "<img src=x>", overrides=[f"description={json.dumps(HOSTILE)}"])
    out = tmp_path / "r.html"
    page = report(out, folder, run, "--title", HOSTILE)
    require_self_contained(page)
    assert "img" not in page.tags
    assert "b" in page.tags  # of the page itself, in its findings
    assert "<script>alert(1)</script>" in page.text
    assert "{{ 7*7 }}" in page.text
    assert "\x1b" not in out.read_text()
    assert "\u202e" not in out.read_text()
    assert "<b>eval" in page.text


def test_secrets_in_addresses_are_left_out(tmp_path: Path) -> None:
    secret = "s3://me:hunter2@host/shards?token=abc"
    results = make_results({"ours": [3.0, 4.0], "none": [1.0, 2.0]}, notes=[f"read {secret}"])
    page = report(tmp_path / "r.html", write_results(tmp_path / "eval", results))
    assert "hunter2" not in page.text


@pytest.mark.slow
def test_a_long_run_stays_far_below_ten_megabytes(tmp_path: Path) -> None:
    # 200 epochs of ImageNet in batches of 256, with a line every 20 steps.
    run = write_run(tmp_path / "run", steps=1_000_000, every=20)
    page = report(tmp_path / "r.html", run)
    assert (tmp_path / "r.html").stat().st_size < 2_000_000
    assert "1,000,000" in page.text


def test_thinned_curves_keep_their_ends_and_their_mean() -> None:
    points = [(float(step), float(step % 7)) for step in range(10_001)]
    thin = thinned(points, 100)
    assert len(thin) == 100
    assert (thin[0], thin[-1]) == (points[0], points[-1])
    mean = sum(value for _, value in thin) / len(thin)
    assert mean == pytest.approx(3, abs=0.1)
    assert thinned(points[:50], 100) == points[:50]


def test_a_run_that_has_not_logged_yet_is_no_fault(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text("")
    page = report(tmp_path / "r.html", run)
    assert "has not logged a step yet" in page.text


def damaged_results(folder: Path, **change: Any) -> Path:
    folder.mkdir()
    values = json.loads((write_results(folder / "x", example()) / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps({**values, **change}))
    return folder


def example() -> Results:
    return make_results({"ours": [3.0, 4.0], "none": [1.0, 2.0]})


def test_wrong_use_is_one_message_with_exit_code_2(tmp_path: Path) -> None:
    run, out = write_run(tmp_path / "run"), tmp_path / "new" / "r.html"
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "results.json").write_text('{"protocol": "x", ')
    mine = tmp_path / "mine.html"
    mine.write_text("<html>my own page</html>")
    other = tmp_path / "other"
    other.mkdir()
    study = tmp_path / "study"
    study.mkdir()
    (study / "study.yaml").write_text("stage: study")
    for words, message in (
        ((tmp_path / "nowhere", "--out", out), "does not exist"),
        ((other, "--out", out), "none of the things that a report is about"),
        ((run, cut, "--out", out), "not a results file of dupr"),
        ((damaged_results(tmp_path / "a", results=[]), "--out", out), "holds no figures"),
        ((damaged_results(tmp_path / "b", seeds="x"), "--out", out), "not a results file"),
        ((study, "--out", out), "not the report of a study"),
        ((run, "--out", mine), "dupr did not write this file"),
        ((run, "--out", tmp_path / "r.pdf"), "ends in .html"),
        ((run, "--out", out, "--shards", other), "no checkpoint yet"),
    ):
        done = dupr("report", *words, code=2)
        assert message in done.stderr, done.stderr
        assert done.stderr.count("error:") == 1
    assert not out.parent.exists()
    assert mine.read_text() == "<html>my own page</html>"


def test_a_report_replaces_an_earlier_one(tmp_path: Path) -> None:
    run, out = write_run(tmp_path / "run"), tmp_path / "r.html"
    report(out, run)
    page = report(out, run, "--title", "second")
    assert "second" in page.text


def test_help_has_examples() -> None:
    shown = dupr("report", "--help").stdout
    assert "dupr report runs/a --out report.html" in html.unescape(shown)
