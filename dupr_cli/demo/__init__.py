"""`dupr demo`: the four stages on generated scenes, from nothing to one table.

scenes.py generates the input of a user: unlabelled images and a small labelled VOC tree. Frozen
evaluation shows what minutes of pre-training are worth: fine-tuning a whole detector takes longer
than that to tell weights apart.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dupr_cli.artifacts.files import write_text
from dupr_cli.artifacts.label_curves import LabelCurves
from dupr_cli.artifacts.results import Results
from dupr_cli.artifacts.run import MetricsLog
from dupr_cli.artifacts.shards import UNFINISHED
from dupr_cli.errors import UsageError
from dupr_cli.progress import Reporter, SilentReporter
from dupr_cli.runtime.output import holds, remove, writing
from dupr_cli.runtime.stopping import stoppable

UNLABELLED = 4000
LABELLED = {"train": 200, "val": 200}
PRETRAIN_RECIPE, EVALUATE_RECIPE = "demo-dupr-r18", "demo-frozen"

_MARKER, _SCENES_DONE = ".dupr-demo", ".scenes-done"
_PICTURES = ("views", "curves", "labels-saved", "detections")
_NAMES = ("random", "DUPR")


@dataclass(frozen=True)
class DemoResult:
    """The measurements, in percent. report: the table as text.

    ap50: by weights and number of labels. gain: of DUPR over random weights, mean and interval, by
    number of labels. retrieval: by weights and level.
    """

    out: str
    ap50: dict[str, dict[int, float]]
    gain: dict[int, tuple[float, float, float]]
    retrieval: dict[str, dict[str, float]]
    pictures: dict[str, str]
    images_per_second: float
    seconds: float
    report: str


def describe(out: Path) -> str:
    """Describe what the demo would do."""
    return (
        f"{out}/images      {UNLABELLED} unlabelled scenes, prepared into {out}/shards\n"
        f"{out}/run         pre-training ({PRETRAIN_RECIPE}), exported to backbone.safetensors\n"
        f"{out}/VOC2026     {LABELLED['train']} labelled scenes, {LABELLED['val']} for testing\n"
        f"{out}/evaluation  detectors on DUPR and random features ({EVALUATE_RECIPE})\n"
        f"{out}/pictures    view pairs, curves, labels saved, detections\n"
    )


def run(
    out: Path,
    *,
    seed: int = 0,
    device: str = "auto",
    workers: int | None = None,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> DemoResult:
    """Run all four stages in `out`, or continue an interrupted call.

    Raises UsageError when `out` holds something else, and the errors of the stages.
    """
    reporter = reporter or SilentReporter()
    with (
        stoppable("Finished steps are kept, and the same command continues."),
        writing(out, "dupr demo"),
    ):
        return _run(out, seed, device, workers, overwrite, reporter)


def _run(
    out: Path, seed: int, device: str, workers: int | None, overwrite: bool, reporter: Reporter
) -> DemoResult:
    from dupr_cli import evaluate, export, prepare, pretrain
    from dupr_cli.demo.scenes import write_unlabelled, write_voc_tree
    from dupr_cli.inspect.curves import draw_curves
    from dupr_cli.inspect.views import draw_views
    from dupr_cli.recipe import (
        EvaluateRecipe,
        ExportRecipe,
        PrepareRecipe,
        PretrainRecipe,
        load_recipe,
    )

    start = time.perf_counter()
    _claim(out, seed, overwrite)
    images, tree, shards = out / "images", out / "VOC2026", out / "shards"
    run_dir, weights, results = out / "run", out / "backbone.safetensors", out / "evaluation"
    pictures = out / "pictures"
    pictures.mkdir(exist_ok=True)
    processes = workers or os.cpu_count() or 1
    overrides = [] if workers is None else [f"data.workers={workers}"]

    reporter.info("1/5 generating scenes")
    done = out / _SCENES_DONE
    if not done.is_file():
        total = UNLABELLED + sum(LABELLED.values())
        with reporter.task("scenes", total, "scenes") as progress:
            write_unlabelled(
                images, UNLABELLED, seed, workers=processes, on_progress=progress.advance
            )
            write_voc_tree(tree, LABELLED, seed, workers=processes, on_progress=progress.advance)
        write_text(done, "")
    reporter.info("2/5 prepare: shards from the unlabelled scenes")
    prepare.run(load_recipe(PrepareRecipe, "default"), images, shards, reporter=reporter)
    reporter.info("3/5 pretrain: DUPR, ResNet-18")
    recipe = load_recipe(PretrainRecipe, PRETRAIN_RECIPE, [*overrides, f"seed={seed}"])
    draw_views(pictures / "views.png", recipe, str(shards))
    pretrain.run(recipe, str(shards), run_dir, device=device, reporter=reporter)
    draw_curves(run_dir, pictures / "curves.png")
    reporter.info("4/5 export: the backbone in torchvision's layout")
    export.run(load_recipe(ExportRecipe, "default"), str(run_dir), weights, overwrite=True)
    reporter.info("5/5 evaluate: detectors on frozen DUPR features and on random ones")
    settings = load_recipe(EvaluateRecipe, EVALUATE_RECIPE, [f"seed={seed}"])
    curves = evaluate.run_labels(
        settings, ["none", str(weights)], str(tree), results, device=device, reporter=reporter
    )
    most = results / curves.folders[max(curves.folders)]
    for name, source in (("detections", most), ("labels-saved", results)):
        (pictures / f"{name}.png").write_bytes((source / f"{name}.png").read_bytes())
    retrieval = MetricsLog(run_dir).retrieval()
    result = DemoResult(
        str(out),
        ap50={
            name: {point.labels: point.mean for point in points}
            for name, points in zip(_NAMES, curves.curves["AP50"].values(), strict=True)
        },
        gain=_gains(results, curves),
        retrieval=dict(zip(_NAMES, (retrieval[0], retrieval[-1]), strict=True)),
        pictures={name: str(pictures / f"{name}.png") for name in _PICTURES},
        images_per_second=MetricsLog(run_dir).latest().get("images_per_second", 0.0),
        seconds=time.perf_counter() - start,
        report="",
    )
    report = _report(result, curves)
    write_text(out / "report.txt", report)
    return replace(result, report=report)


def _gains(results: Path, curves: LabelCurves) -> dict[int, tuple[float, float, float]]:
    """The difference of AP50 between DUPR and random weights, paired by seed, with its interval."""
    found = {}
    for labels, folder in curves.folders.items():
        (difference,) = (
            d for d in Results.read(results / folder).differences if d.metric == "AP50"
        )
        # The table has random minus DUPR.
        found[labels] = (-difference.mean, -difference.high, -difference.low)
    return found


def _claim(out: Path, seed: int, overwrite: bool) -> None:
    """Make `out` the directory of this demo, or check that it already is."""
    marker = out / _MARKER
    if holds(out, [_MARKER], "demo"):
        there = marker.read_text().strip()
        if there != str(seed) and not overwrite:
            raise UsageError(
                f"{out}: it holds a demo with seed {there}. Give another --out, or --overwrite."
            )
        if overwrite:
            _clear(out)
    write_text(marker, f"{seed}\n")


def _clear(out: Path) -> None:
    """Remove the files that a demo and its stages wrote, and nothing else."""
    from dupr_cli.demo.scenes import scene_files, voc_tree_files
    from dupr_cli.evaluate.label_curves import label_curve_files as evaluation_files
    from dupr_cli.prepare.assembly import output_files as shard_files
    from dupr_cli.prepare.unfinished import clear
    from dupr_cli.pretrain import output_files as run_files

    (out / _SCENES_DONE).unlink(missing_ok=True)
    if (out / "shards" / UNFINISHED).is_dir():
        clear(out / "shards" / UNFINISHED)
    files = [
        *shard_files(out / "shards"),
        *run_files(out / "run"),
        *evaluation_files(out / "evaluation"),
        *scene_files(out / "images", UNLABELLED),
        *voc_tree_files(out / "VOC2026", LABELLED),
        *(out / "pictures" / f"{name}.png" for name in _PICTURES),
        *(out / name for name in ("backbone.safetensors", "backbone.export.json", "report.txt")),
    ]
    remove(out, files)


def _report(result: DemoResult, curves: LabelCurves) -> str:
    counts, levels = list(result.gain), sorted(result.retrieval["DUPR"])
    heads = [f"AP50: {count} labels" for count in counts] + [f"{v} retrieval" for v in levels]
    rows = [
        (
            name,
            [f"{p.mean:.1f} ±{p.high - p.mean:.1f}" for p in points]
            + [f"{result.retrieval[name][level]:.1f}%" for level in levels],
        )
        for name, points in zip(_NAMES, curves.curves["AP50"].values(), strict=True)
    ]
    gains = [f"{m:+z.1f} [{low:+z.1f}, {high:+z.1f}]" for m, low, high in result.gain.values()]
    rows.append(("gain", gains))
    widths = [20] * len(counts) + [16] * len(levels)  # a line of 80

    def line(name: str, cells: Sequence[str]) -> str:
        return f"{name:<8}" + "".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=False))

    lines = [line("weights", heads), *(line(*row) for row in rows)]
    saved = [
        f"DUPR needs {row.described(curves)} labelled scenes for what random weights reach "
        f"with {row.baseline_labels}."
        for row in curves.saved["AP50"]
    ]
    return "\n".join(
        [
            *lines,
            "",
            *saved,
            "",
            f"AP50: a small FCOS head on the frozen backbone's features, tested on "
            f"{curves.test_images} scenes;",
            f"means and {round(100 * curves.confidence)} % intervals over {len(curves.seeds)} "
            f"seeds, each with its own draw of the labelled scenes.",
            "retrieval: a held-out patch finds itself in the other view, among all patches.",
            "",
            *(f"{name:<13} {path}" for name, path in result.pictures.items()),
            f"{'tables':<13} {result.out}/evaluation/labels-saved.txt",
            f"{result.seconds:.0f} s, pre-training at {result.images_per_second:.0f} images/s",
            "",
        ]
    )
