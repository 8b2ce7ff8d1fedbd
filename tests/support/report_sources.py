"""Runs, evaluations and comparisons over labels as files, with figures that a test chooses."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from dupr_cli.artifacts.label_curves import CurvePoint, LabelCurves, LabelsNeeded
from dupr_cli.artifacts.results import (
    DatasetIdentity,
    PairedDifference,
    Results,
    TrialResult,
    WeightsResult,
)
from dupr_cli.recipe import PretrainRecipe, load_recipe, recipe_yaml
from dupr_cli.study.report import ProtocolReport, StudyReport


def write_run(
    run: Path,
    retrieval: tuple[float, float] = (0.02, 0.3),
    steps: int = 400,
    every: int = 10,
    overrides: Sequence[str] = (),
    last: Mapping[str, float] | None = None,
) -> Path:
    """A run directory with the log of a run. retrieval: at the start and at the end, all cases.

    last: values of the last log line.
    """
    run.mkdir(parents=True)
    recipe = load_recipe(PretrainRecipe, "dupr-r18-cpu-smoke", list(overrides))
    (run / "recipe.yaml").write_text(recipe_yaml(recipe))
    data = {"name": "shards:train", "images": 1000, "sha256": "0"}
    facts = {"format_version": 1, "dupr": "0.1.0", "torch": "2.11.0", "device": "cpu", "data": data}
    (run / "environment.json").write_text(json.dumps(facts))
    lines: list[dict[str, float]] = []
    for step in range(0, steps + 1, every):
        done = step / steps
        share = retrieval[0] + (retrieval[1] - retrieval[0]) * done
        if step % (10 * every) == 0 or step == steps:
            cases = ("retrieval", "retrieval_same_flip", "retrieval_opposite_flip")
            lines.append({"step": step, "retrieval_pool/res4": 2000})
            lines[-1] |= {f"{case}/res4": share for case in cases}
        if step:
            line = {"step": step, "epoch": done, "loss": 9 - done, "lr": 0.1, "data_wait": 0.05}
            line |= {"images_per_second": 50, "bad_steps": 0, "unreadable": 0}
            for place in ("image/res5", "patch/res4"):
                line |= {
                    f"loss/{place}": 6 - done, f"spread/{place}": 0.8,
                    f"queue_fill/{place}": min(1.0, 4 * done),
                    f"reference/{place}": math.log(1 + 512),
                }  # fmt: skip
            lines.append(line)
    lines[-1] |= last or {}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def make_results(
    figures: Mapping[str, Sequence[float]], real: bool = True, notes: Sequence[str] = ()
) -> Results:
    """An evaluation of weights by their AP of each seed; the last ones are the baseline."""
    seeds = list(range(len(next(iter(figures.values())))))
    entries = []
    for name, values in figures.items():
        trials = [TrialResult(seed, {"AP": v}, {}) for seed, v in zip(seeds, values, strict=True)]
        mean = sum(values) / len(values)
        entries.append(
            WeightsResult(
                weights=name,
                weights_sha256=None if name == "none" else "0",
                architecture="resnet18",
                metrics={"AP": mean, "AP50": mean + 10, "AP75": mean / 2, "AR100": 50.0},
                per_class={"cat": {"AP": mean}, "dog": {"AP": mean}},
                seconds={"train": 1.0},
                extra={"folder": name},
                deviations={"AP": 0.5} if len(seeds) > 1 else {},
                trials=trials,
            )
        )
    *others, base = entries
    differences = [
        PairedDifference(
            first=str(entry.extra["folder"]), second=str(base.extra["folder"]), metric="AP",
            trials=len(seeds), mean=entry.metrics["AP"] - base.metrics["AP"],
            low=entry.metrics["AP"] - base.metrics["AP"] - 1,
            high=entry.metrics["AP"] - base.metrics["AP"] + 1,
            confidence=0.95, adjusted_p=0.01 if real else 0.4,
        )
        for entry in others
    ]  # fmt: skip
    return Results(
        protocol="voc-frozen-tiny",
        metric="AP of VOC",
        train=DatasetIdentity("labelled", "train", 80, 200, "0"),
        test=DatasetIdentity("labelled", "val", 100, 250, "0"),
        classes=["cat", "dog"],
        results=entries,
        recipe={"train": {"iterations": 40}},
        recipe_sha256="0",
        seeds=seeds,
        dupr_version="0.1.0",
        environment={"torch": "2.11.0"},
        differences=differences if len(seeds) > 1 else [],
        notes=list(notes),
    )


def write_results(folder: Path, results: Results) -> Path:
    folder.mkdir(parents=True)
    results.write(folder)
    return folder


def write_study(folder: Path) -> Path:
    """A finished study of one protocol, whose curves are those of `write_labels`."""
    curves = LabelCurves.read(write_labels(folder / "evaluate"))
    values = {40: 10.0, 80: 7.0}
    differences = {
        count: [PairedDifference("ours", "none", "AP", 2, v, v - 1, v + 1, 0.95, 0.01)]
        for count, v in values.items()
    }
    protocol = ProtocolReport("frozen", "AP", curves, differences, {}, "frozen.png")
    retrieval = {"ours-s0": {"res4": 14.0, "res5": 12.0}}
    (folder / "study.yaml").write_text("stage: study\n")
    study = StudyReport("example", "", "none", [protocol], retrieval, "")
    (folder / "report.json").write_text(json.dumps(asdict(study)))
    return folder


def write_labels(folder: Path) -> Path:
    """A comparison with 40 and 80 labels, in which `ours` needs 52 labels for what 80 give."""
    figures = {40: {"ours": 20.0, "none": 10.0}, 80: {"ours": 30.0, "none": 23.0}}
    for count, of in figures.items():
        results = make_results({name: [value - 1, value + 1] for name, value in of.items()})
        write_results(folder / f"labels-{count}", results)

    def point(count: int, name: str) -> CurvePoint:
        value = figures[count][name]
        return CurvePoint(count, value, value - 1, value + 1, {0: value - 1, 1: value + 1})

    LabelCurves(
        protocol="voc-frozen-tiny",
        metric="AP of VOC",
        baseline="none",
        confidence=0.95,
        weights={"ours": "runs/ours", "none": "none"},
        curves={"AP": {name: [point(40, name), point(80, name)] for name in ("ours", "none")}},
        saved={"AP": [LabelsNeeded("ours", 80, 23.0, 52.0, "", 47.0, 60.0)]},
        folders={40: "labels-40", 80: "labels-80"},
        test_images=100,
        seeds=[0, 1],
        notes=["Drawn afresh for every seed."],
    ).write(folder)
    return folder
