"""Valid files of every kind that dupr reads, their readers, and ways to damage them.

`READERS` maps a name to a reader: the valid files, which of them is damaged, and the call that
reads. Damage is drawn by hypothesis: bytes that change, vanish, repeat, or give way to text that
has broken parsers before; and for JSON a value that becomes another one. `probe` makes examples;
run as a program, this module does so for a given time, with limits on time and memory:

    python -m tests.support.fuzzing READER SECONDS
"""

from __future__ import annotations

import gzip
import io
import json
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from dupr_cli.artifacts.label_curves import LABELS_SAVED, LabelCurves
from dupr_cli.artifacts.pixel_formats import PixelFormat
from dupr_cli.artifacts.results import RESULTS, Results
from dupr_cli.artifacts.run import (
    ENVIRONMENT_FILE,
    METRICS_FILE,
    RECIPE_FILE,
    STATE_FILE,
    Checkpoint,
    CheckpointState,
    MetricsLog,
    read_environment,
)
from dupr_cli.artifacts.shards import MANIFEST, open_shards
from dupr_cli.artifacts.weights import read_weights
from dupr_cli.datasets.coco import read_coco
from dupr_cli.datasets.masks import read_mask
from dupr_cli.datasets.pixels import IMAGE_ERRORS
from dupr_cli.datasets.shards import labels_of
from dupr_cli.datasets.tensors import decode_tensor
from dupr_cli.datasets.voc import VocTree
from dupr_cli.datasets.yolo import YoloSet
from dupr_cli.errors import DuprError
from dupr_cli.evaluate.detection_files import score_files
from dupr_cli.export.checkpoint_files import flat_tensors, read_checkpoint
from dupr_cli.outside_text import json_text
from dupr_cli.prepare.exclusion import ExcludedImages
from dupr_cli.prepare.source_record import read_record
from dupr_cli.prepare.sources.address_list import ListSource
from dupr_cli.prepare.unfinished import State
from dupr_cli.recipe import load_recipe
from dupr_cli.recipe.load import RECIPE_MODELS, shipped_recipes
from dupr_cli.recipe.prepare import SourceSection
from dupr_cli.report.page import render
from dupr_cli.report.sources import open_sources
from dupr_cli.runtime.output import read_claim
from dupr_cli.study.report import StudyReport
from tests.support.images import encode, noise_image, write_shards
from tests.support.mask_sets import save_palette, scene
from tests.support.weights import METADATA

SECONDS, BYTES = 10, 1 << 30  # limits of one example; the time is that of the processor

_OLD = Path(__file__).resolve().parent.parent / "artifacts" / "old"
_TOKENS = [
    b"[" * 3000, b'{"a":' * 3000, b"- " * 300, b"1" * 5000, b"1000000000000", b"-1", b"0", b"1e999",
    b"NaN", b"-Infinity", b"null", b"true", b'""', b"[]", b"{}", b'"\\ud800"', b"\xed\xa0\x80",
    b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"../outside", b"/etc/passwd", b"2024-13-45",
    b"2024-01-31", b"!!int x", b"!!timestamp x", b"!!bool x", b"!!binary x", b"!!set {a, b}",
    b"&a [*a]", b"*a", b"&a", b"<<: 1", b"? [a]", b"!!python/object:os.system x", b"\n", b":", b",",
    b"\t", b" ", b"<", b"]]>", b"<!DOCTYPE a [<!ENTITY b 'c'>]>", b"&b;", b"encoding='x'",
]  # fmt: skip
_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([10**12, 10**30, -1, 0, "\ud800", "../x", "", "x" * 300, 1e308]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)


@dataclass(frozen=True)
class Reader:
    """files: valid ones by name, made once. damaged: the name of the one that is changed. read:
    reads what is in a folder of these files. json: whether the file is JSON."""

    files: Callable[[], Mapping[str, bytes]]
    damaged: str
    read: Callable[[Path], object]
    json: bool = False


@st.composite
def _damaged_bytes(draw: st.DrawFn, valid: bytes) -> bytes:
    data = valid
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.sampled_from([0, 1, 2, 8, 64, 4096])))
        kind = draw(st.sampled_from(["token", "bytes", "cut", "repeat"]))
        if kind == "token":
            data = data[:start] + draw(st.sampled_from(_TOKENS)) + data[end:]
        elif kind == "bytes":
            data = data[:start] + draw(st.binary(max_size=8)) + data[end:]
        elif kind == "cut":
            data = data[:start] + data[end:] if draw(st.booleans()) else data[:start]
        else:
            data = data[:end] + data[start:]
    return data


@st.composite
def _damaged_json(draw: st.DrawFn, valid: bytes) -> bytes:
    """JSON in which one value has become another, or is missing."""
    root = {"root": json.loads(valid)}
    holder, key = root, "root"
    while draw(st.integers(0, 3)):
        inner = holder[key]
        if isinstance(inner, dict) and inner:
            holder, key = inner, draw(st.sampled_from(sorted(inner)))
        elif isinstance(inner, list) and inner:
            holder, key = inner, draw(st.integers(0, len(inner) - 1))  # type: ignore[assignment]
        else:
            break
    if draw(st.integers(0, 4)) or holder is root:
        holder[key] = draw(_VALUES)
    else:
        del holder[key]
    return json.dumps(root["root"]).encode()


def _strategy(reader: Reader, valid: bytes) -> st.SearchStrategy[bytes]:
    by_bytes = _damaged_bytes(valid)
    return by_bytes | _damaged_json(valid) if reader.json else by_bytes


def _shards() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as made:
        folder = write_shards(Path(made) / "shards", 6, per_shard=3)
        return {path.name: path.read_bytes() for path in folder.iterdir()}


def _mask() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as made:
        save_palette(scene(0), Path(made) / "mask.png")
        return {"mask.png": (Path(made) / "mask.png").read_bytes()}


def _index_only() -> dict[str, bytes]:
    return {name: data for name, data in _shards().items() if name.startswith("train-000000")}


def _tar_only() -> dict[str, bytes]:
    return {"train-000000.tar": _shards()["train-000000.tar"]}


def _read_shards(folder: Path) -> None:
    opened = open_shards(str(folder))
    opened.require_indexes()
    for number in range(min(len(opened), 10)):
        sample = opened.whole(number)
        labels_of(sample)


def _member(suffix: str) -> Callable[[Path], None]:
    """Reads a sample one of whose members is in the file `member`."""

    def read(folder: Path) -> None:
        tar = folder / "made.tar"
        image, content = encode(noise_image(0)), (folder / "member").read_bytes()
        with tarfile.open(tar, "w") as made:
            for name, data in (("a.jpg", image), (f"a.{suffix}", content)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                made.addfile(info, io.BytesIO(data))
        opened = open_shards(str(tar))
        sample = opened.whole(0)
        labels_of(sample)
        json_text(sample.info_json()).encode()

    return read


_INFO = {
    "source": "a.jpg", "width": 48, "height": 40, "sha256": "0", "class": "x", "more": [1],
    "pixels": {"channels": 3, "range": [0, 255], "depth": 8},
}  # fmt: skip
_BOXES = {
    "objects": [
        {
            "class": "a",
            "box": [0, 1, 2, 3],
            "difficult": False,
            "segmentation": [[0, 1, 2, 3, 4, 5]],
        }
    ]
}
_COCO = {
    "images": [{"id": 1, "file_name": "a.jpg", "width": 48, "height": 40}],
    "categories": [{"id": 3, "name": "cat"}],
    "annotations": [
        {
            "id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 2, 10, 12], "area": 120,
            "iscrowd": 0, "segmentation": [[1, 2, 11, 2, 11, 14]], "keypoints": [1, 2, 2],
        },
        {
            "id": 2, "image_id": 1, "category_id": 3, "bbox": [0, 0, 48, 40], "area": 1920,
            "iscrowd": 1, "segmentation": {"size": [40, 48], "counts": [0, 1920]},
        },
    ],
}  # fmt: skip
_FOUND = [
    {"image_id": 1, "category_id": 3, "bbox": [1, 2, 10, 12], "score": 0.9},
    {"image_id": 1, "category_id": 3, "bbox": [2, 2, 10, 12], "score": 0.4},
]
_VOC = """<?xml version="1.0" encoding="UTF-8"?>
<annotation><filename>a.jpg</filename><size><width>48</width><height>40</height></size>
<object><name>cat</name><difficult>0</difficult><bndbox><xmin>1</xmin><ymin>2</ymin>
<xmax>11</xmax><ymax>14</ymax></bndbox></object></annotation>"""
_CURVES = LabelCurves(
    "p", "AP", "a", 0.95, {"a": "none"}, {"AP": {"a": []}}, {"AP": []}, {1: "x"}, 4, [0], []
)
_STATE = CheckpointState(5, "resnet18", [0.4] * 3, [0.2] * 3, 64, "d")
_EXCLUDED = {"images": [["a.jpg", "00" * 32, 7]]}
_PREPARED = {
    "recipe": {}, "kind": "folder", "source": "a", "digest": "d", "labelled": False,
}  # fmt: skip


def _json(name: str, value: object) -> Callable[[], Mapping[str, bytes]]:
    return lambda: {name: json.dumps(value).encode()}


def _text(**files: str) -> Callable[[], Mapping[str, bytes]]:
    return lambda: {name.replace("__", "."): text.encode() for name, text in files.items()}


def _weights() -> dict[str, bytes]:
    return {"w.safetensors": save({"conv1.weight": torch.ones(2, 2)}, METADATA.to_header())}


def _pickled() -> dict[str, bytes]:
    file = io.BytesIO()
    torch.save({"state_dict": {"a.weight": torch.ones(3), "b": torch.zeros(2)}, "epoch": 3}, file)
    return {"w.pt": file.getvalue()}


def _recipe(stage: str) -> Reader:
    model = RECIPE_MODELS[stage]
    name, file = next(iter(shipped_recipes(stage).items()))
    text = file.read_bytes() + b"\n"
    return Reader(lambda: {f"{name}.yaml": text}, f"{name}.yaml",
                  lambda folder: load_recipe(model, str(folder / f"{name}.yaml")))  # fmt: skip


def _read_yolo(folder: Path) -> None:
    opened = YoloSet(folder / "data.yaml")
    for split in opened.splits:
        for image in opened.images(split):
            opened.labels(image)
    assert isinstance(opened.notes, list)


def _read_voc(folder: Path) -> None:
    VocTree(folder, ".", ".").labels("a")


def _score_coco(folder: Path) -> None:
    score_files([folder / "found.json"], str(folder / "coco.json"), "val", "coco")


def _score_own(folder: Path) -> None:
    rows = folder / "detections.json"
    score_files([rows], str(folder / "coco.json"), "val", "voc07")


def _score_text(folder: Path) -> None:
    score_files([folder / "comp4_det_val_cat.txt"], str(folder / "coco.json"), "val", "voc07")


def _list(suffix: str) -> Callable[[Path], object]:
    return lambda folder: list(
        ListSource(str(folder / f"list{suffix}"), SourceSection(), folder / "out").entries()
    )


def _decode(pixels: PixelFormat | None) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        try:
            decode_tensor((folder / "image").read_bytes(), pixels)
        except IMAGE_ERRORS as error:  # those that every caller takes for a damaged image
            raise DuprError(str(error)) from error

    return read


def _image(format_: str) -> Reader:
    return Reader(lambda: {"image": encode(noise_image(1), format_)}, "image", _decode(None))


def _array() -> dict[str, bytes]:
    import numpy as np

    file = io.BytesIO()
    np.save(file, np.ones((8, 9, 4), np.uint16))
    return {"image": file.getvalue()}


def _old(name: str, to: str) -> Callable[[], Mapping[str, bytes]]:
    return lambda: {to: (_OLD / name).read_bytes()}


def _page(folder: Path) -> object:
    return render(open_sources([folder]), [], "")


_YOLO = {
    "data__yaml": "path: .\ntrain: train.txt\nval: [train.txt]\nnames: {0: cat, 1: dog}\nnc: 2\n",
    "train__txt": "a.jpg\n./b.jpg\n",
    "a__txt": "0 0.5 0.5 0.2 0.2\n1 0.1 0.1 0.2 0.1 0.2 0.2\n0 0.5 0.5 0.2 0.2 0.9\n",
}
_WITH_LABELS = json.dumps(_COCO)

READERS: dict[str, Reader] = {
    "manifest": Reader(_shards, MANIFEST, _read_shards, json=True),
    "index": Reader(_index_only, "train-000000.index.json", _read_shards, json=True),
    "tar": Reader(_tar_only, "train-000000.tar", _read_shards),
    "sample": Reader(_json("member", _INFO), "member", _member("json"), json=True),
    "boxes": Reader(_json("member", _BOXES), "member", _member("boxes.json"), json=True),
    **{f"{stage}-recipe": _recipe(stage) for stage in RECIPE_MODELS},
    "safetensors": Reader(
        _weights, "w.safetensors", lambda folder: read_weights(str(folder / "w.safetensors"))
    ),
    "checkpoint": Reader(
        _pickled, "w.pt", lambda folder: [*flat_tensors(read_checkpoint(folder / "w.pt", "w.pt"))]
    ),
    "coco": Reader(
        _json("c.json", _COCO), "c.json", lambda folder: read_coco(folder / "c.json"), json=True
    ),
    "voc": Reader(_text(a__xml=_VOC), "a.xml", _read_voc),
    "mask": Reader(_mask, "mask.png", lambda folder: read_mask(folder / "mask.png", "mask.png")),
    "yolo-data": Reader(_text(**_YOLO), "data.yaml", _read_yolo),
    "yolo-labels": Reader(_text(**_YOLO), "a.txt", _read_yolo),
    "yolo-list": Reader(_text(**_YOLO), "train.txt", _read_yolo),
    "detections-of-coco": Reader(
        _text(coco__json=_WITH_LABELS, found__json=json.dumps(_FOUND)),
        "found.json", _score_coco, json=True,
    ),
    "scored-coco": Reader(
        _text(coco__json=_WITH_LABELS, found__json=json.dumps(_FOUND)),
        "coco.json", _score_coco, json=True,
    ),
    "detections": Reader(
        _text(
            coco__json=_WITH_LABELS,
            detections__json=json.dumps(
                [{"image_id": "a.jpg", "name": "cat", "score": 0.5, "box": [1, 2, 11, 14]}]
            ),
        ),
        "detections.json", _score_own, json=True,
    ),
    "detections-of-voc": Reader(
        _text(coco__json=_WITH_LABELS, comp4_det_val_cat__txt="a 0.9 1 2 11 14\n"),
        "comp4_det_val_cat.txt", _score_text,
    ),
    "lines": Reader(_text(list__txt="a.jpg\nb.jpg 3\n#c\n"), "list.txt", _list(".txt")),
    "table": Reader(_text(list__csv="path,x\na.jpg,1\nb.jpg,2\n"), "list.csv", _list(".csv")),
    "results": Reader(
        _old("eval/results.json", RESULTS), RESULTS, lambda f: Results.read(f), json=True
    ),
    "label-curves": Reader(
        _json(LABELS_SAVED, vars(_CURVES)), LABELS_SAVED, lambda f: LabelCurves.read(f), json=True
    ),
    "report-results": Reader(
        _old("eval/results.json", RESULTS), RESULTS, _page, json=True
    ),
    "report-metrics": Reader(
        lambda: {RECIPE_FILE: (_OLD / "run/recipe.yaml").read_bytes(),
                 METRICS_FILE: (_OLD / "run/metrics.jsonl").read_bytes()},
        METRICS_FILE, _page,
    ),
    "study-report": Reader(
        _json("report.json", {"name": "s", "description": "", "baseline": "a", "out": "",
                              "protocols": [], "retrieval": {"a": {"res4": 1.0}}}),
        "report.json", lambda f: StudyReport.read(f), json=True,
    ),
    "state": Reader(
        _json(STATE_FILE, _STATE.to_json()), STATE_FILE, lambda f: Checkpoint.read(f), json=True
    ),
    "environment": Reader(
        _old("run/environment.json", ENVIRONMENT_FILE), ENVIRONMENT_FILE, read_environment,
        json=True,
    ),
    "metrics": Reader(
        _old("run/metrics.jsonl", METRICS_FILE), METRICS_FILE, lambda f: MetricsLog(f).retrieval()
    ),
    "claim": Reader(
        _json("c.json", {"format_version": 1, "fingerprint": {"a": 1}, "folders": ["x"]}),
        "c.json", lambda folder: read_claim(folder / "c.json"), json=True,
    ),
    "excluded": Reader(
        _json("excluded.json", _EXCLUDED), "excluded.json", ExcludedImages.read, json=True
    ),
    "preparation": Reader(_json("state.json", _PREPARED), "state.json", State.read, json=True),
    "source-record": Reader(
        lambda: {"s.gz": gzip.compress(b'["train","a.jpg","1:2"]\n' * 3, mtime=0)},
        "s.gz", lambda folder: list(read_record(folder / "s.gz")),
    ),
    **{name.lower(): _image(name) for name in ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP")},
    "array": Reader(_array, "image", _decode(PixelFormat(4, (0, 65535)))),
}  # fmt: skip


class LimitError(Exception):
    """An example took longer than it may."""


def _too_slow(_signal: int, _frame: FrameType | None) -> None:
    raise LimitError(f"reading took more than {SECONDS} s of the processor")


def probe(name: str, examples: int, number: int) -> None:
    """Read that many damaged files; anything but success and a DuprError is raised.

    number: seed of the examples.
    """
    reader = READERS[name]
    files = reader.files()
    folder = Path(tempfile.mkdtemp(prefix="dupr-fuzz-"))

    @seed(number)
    @settings(
        max_examples=examples, deadline=None, database=None, phases=[Phase.generate, Phase.shrink],
        suppress_health_check=[*HealthCheck],
    )  # fmt: skip
    @given(_strategy(reader, files[reader.damaged]))
    def read_one(data: bytes) -> None:
        for file, content in files.items():
            (folder / file).write_bytes(data if file == reader.damaged else content)
        message = "none"
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            reader.read(folder)
        except DuprError as error:
            message = str(error)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        assert message.strip(), "an error needs a message"

    before = signal.signal(signal.SIGPROF, _too_slow)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read_one()
    finally:
        signal.signal(signal.SIGPROF, before)
        shutil.rmtree(folder)


def main(name: str, seconds: float) -> None:
    probe(name, 1, 0)  # imports what the reader needs, before memory is limited
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    # Pillow by itself decodes up to 178 million pixels, which are 0.9 GB with their copy in RGB.
    Image.MAX_IMAGE_PIXELS = 2**25
    limit = pages * resource.getpagesize() + BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    end, number = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        number += 1
        probe(name, 200, time.time_ns())


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
