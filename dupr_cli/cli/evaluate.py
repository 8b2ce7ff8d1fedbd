"""`dupr evaluate`: one subcommand per protocol."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dupr_cli.cli import evaluate_detections, evaluate_probes
from dupr_cli.cli.command import (
    Device,
    DryRun,
    Overwrite,
    Recipe,
    Seed,
    Set,
    Workers,
    command,
    overrides,
)
from dupr_cli.cli.plan import show_plan
from dupr_cli.errors import UsageError
from dupr_cli.progress import Reporter

if TYPE_CHECKING:
    from dupr_cli.artifacts.results import Results
    from dupr_cli.evaluate.summary import Summary
    from dupr_cli.recipe import EvaluateRecipe


def add_to(app: typer.Typer) -> None:
    group = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")
    for name, function in (("voc", voc), ("coco", coco), ("cityscapes", cityscapes)):
        command(group, name, show)(function)
    command(group, "report", show_report)(report)
    evaluate_detections.add_to(group)
    evaluate_probes.add_to(group)

    @group.callback()
    def evaluate() -> None:
        """Measure what weights are worth: by a fine-tuned detector, or by probes."""

    app.add_typer(group, name="evaluate")


WeightsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="WEIGHTS...",
        help="Runs, checkpoints, weights files, hf://OWNER/NAME, torchvision:IMAGENET1K_V1, or "
        "none for random weights.",
    ),
]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Directory for the results.")]
TrainSplit = Annotated[
    list[str] | None,
    typer.Option("--train-split", help="Split to fine-tune on; repeat to join several."),
]
TestSplit = Annotated[
    list[str] | None, typer.Option("--test-split", help="Split to test on; repeatable.")
]
Seeds = Annotated[
    int | None,
    typer.Option("--seeds", min=1, help="Trials of each weights; differences get an interval."),
]
Labels = Annotated[
    str | None,
    typer.Option(
        "--labels",
        metavar="N|P%|FILE",
        help="Train on so many labelled images only, stratified, or on those of a labels.json.",
    ),
]
Limit = Annotated[
    int | None,
    typer.Option("--limit", min=1, help="A quick trial: so many iterations and test images."),
]
ScaleToDevice = Annotated[
    bool,
    typer.Option(
        "--scale-to-device", help="Scale batch, lr and schedule to the devices that are there."
    ),
]
LeaksIn = Annotated[
    list[str] | None,
    typer.Option(
        "--leaks", metavar="SHARDS", help="Look for test images in this pre-training data."
    ),
]
Nproc = Annotated[
    int | None, typer.Option("--nproc", min=1, help="Processes on this machine, one per GPU.")
]
MaxHours = Annotated[
    float | None,
    typer.Option("--max-hours", min=0, help="Save and stop after this time, exit code 75."),
]


def voc(
    weights: WeightsArgument,
    data: Annotated[
        str,
        typer.Option(
            "--data",
            metavar="VOC_TREE_OR_SHARDS",
            help="A VOCdevkit, one year's folder, COCO's or YOLO's layout, or labelled shards.",
        ),
    ],
    out: Out,
    train_split: TrainSplit = None,
    test_split: TestSplit = None,
    seeds: Seeds = None,
    labels: Labels = None,
    limit: Limit = None,
    scale_to_device: ScaleToDevice = False,
    leaks: LeaksIn = None,
    nproc: Nproc = None,
    max_hours: MaxHours = None,
    recipe: Recipe = None,
    set_: Set = None,
    seed: Seed = None,
    device: Device = "auto",
    workers: Workers = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    *,
    reporter: Reporter,
) -> Results | None:
    """Fine-tune a detector on each of the weights and compare AP, AP50, AP75 as VOC has them.

    All weights get the same budget, the same images and the same random numbers. Without
    --recipe the shipped voc-tiny is used: small images, minutes on a CPU.

    [bold]Examples[/]

      dupr evaluate voc backbone.safetensors none --data VOCdevkit/VOC2007 --out eval/

      dupr evaluate voc runs/a runs/b none --data shards/ --labels 200 --seeds 5 --out eval/

      dupr evaluate voc runs/a -r voc0712-r50c4-24k --data VOCdevkit --nproc 8 --out eval/
    """
    options = overrides(set_, workers=("train.workers", workers), seed=("seed", seed))
    resolved = _resolve("voc", recipe, options, train_split, test_split, seeds, labels)
    return _carry_out(
        resolved, weights, data, out, limit, scale_to_device, leaks, nproc, max_hours, device,
        overwrite, dry_run, reporter,
    )  # fmt: skip


def coco(
    weights: WeightsArgument,
    data: Annotated[
        str,
        typer.Option(
            "--data",
            metavar="COCO_OR_SHARDS",
            help="A folder with annotations/*.json and images as COCO has them, or labelled "
            "shards.",
        ),
    ],
    out: Out,
    train_split: TrainSplit = None,
    test_split: TestSplit = None,
    seeds: Seeds = None,
    labels: Labels = None,
    limit: Limit = None,
    scale_to_device: ScaleToDevice = False,
    leaks: LeaksIn = None,
    nproc: Nproc = None,
    max_hours: MaxHours = None,
    recipe: Recipe = None,
    set_: Set = None,
    seed: Seed = None,
    device: Device = "auto",
    workers: Workers = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    *,
    reporter: Reporter,
) -> Results | None:
    """Fine-tune a detector on each of the weights and compare COCO's AP of boxes and masks.

    Without --recipe the shipped coco-tiny is used: small images, a short schedule.

    [bold]Examples[/]

      dupr evaluate coco runs/a none --data coco/ --out eval/

      dupr evaluate coco runs/a -r coco-maskrcnn-r50c4-1x --data coco/ --nproc 8 --out eval/

      dupr evaluate coco runs/a -r coco-semi-1pct --data coco/ --scale-to-device --out eval/
    """
    options = overrides(set_, workers=("train.workers", workers), seed=("seed", seed))
    resolved = _resolve("coco", recipe, options, train_split, test_split, seeds, labels)
    return _carry_out(
        resolved, weights, data, out, limit, scale_to_device, leaks, nproc, max_hours, device,
        overwrite, dry_run, reporter,
    )  # fmt: skip


def cityscapes(
    weights: WeightsArgument,
    data: Annotated[
        str,
        typer.Option(
            "--data",
            metavar="CITYSCAPES",
            help="The folder that holds leftImg8bit and gtFine.",
        ),
    ],
    out: Out,
    train_split: TrainSplit = None,
    test_split: TestSplit = None,
    seeds: Seeds = None,
    labels: Labels = None,
    limit: Limit = None,
    scale_to_device: ScaleToDevice = False,
    leaks: LeaksIn = None,
    nproc: Nproc = None,
    max_hours: MaxHours = None,
    recipe: Recipe = None,
    set_: Set = None,
    seed: Seed = None,
    device: Device = "auto",
    workers: Workers = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    *,
    reporter: Reporter,
) -> Results | None:
    """Fine-tune a Mask R-CNN on Cityscapes and compare COCO's AP of its instances.

    Without --recipe the shipped cityscapes-tiny is used. The figure is COCO's AP, not that of
    Cityscapes' own scripts, which leaves small instances out.

    [bold]Examples[/]

      dupr evaluate cityscapes runs/a none --data cityscapes/ --out eval/

      dupr evaluate cityscapes runs/a -r cityscapes-instance --data cityscapes/ --out eval/
    """
    options = overrides(set_, workers=("train.workers", workers), seed=("seed", seed))
    resolved = _resolve("cityscapes", recipe, options, train_split, test_split, seeds, labels)
    return _carry_out(
        resolved, weights, data, out, limit, scale_to_device, leaks, nproc, max_hours, device,
        overwrite, dry_run, reporter,
    )  # fmt: skip


def _resolve(
    protocol: str,
    recipe: str | None,
    options: list[str],
    train_split: list[str] | None,
    test_split: list[str] | None,
    seeds: int | None,
    labels: str | None,
) -> EvaluateRecipe:
    from dupr_cli.recipe import EvaluateRecipe, load_recipe

    given = overrides(
        options,
        train=("data.train_splits", _yaml_list(train_split)),
        test=("data.test_splits", _yaml_list(test_split)),
        trials=("trials", seeds),
        labels=("data.labels", labels),
    )
    resolved = load_recipe(EvaluateRecipe, recipe or f"{protocol}-tiny", given)
    if resolved.protocol != protocol:
        raise UsageError(
            f"{recipe}: a recipe of the protocol {resolved.protocol}; give it to "
            f"`dupr evaluate {resolved.protocol}`. (recipe key: protocol)"
        )
    return resolved


def _yaml_list(values: list[str] | None) -> str | None:
    import json

    return None if values is None else json.dumps(values)


def _carry_out(
    recipe: EvaluateRecipe,
    weights: list[str],
    data: str,
    out: Path,
    limit: int | None,
    scale_to_device: bool,
    leaks: list[str] | None,
    nproc: int | None,
    max_hours: float | None,
    device: str,
    overwrite: bool,
    dry_run: bool,
    reporter: Reporter,
) -> Results | None:
    from dupr_cli import evaluate as stage
    from dupr_cli.cli.launch import launch
    from dupr_cli.evaluate.scaling import limited, scale_to_devices
    from dupr_cli.runtime.parallel import world_size

    processes, notes = max(nproc or 1, world_size()), []
    if scale_to_device:
        recipe, note = scale_to_devices(recipe, processes)
        notes.append(note)
    if limit is not None:
        recipe, note = limited(recipe, limit)
        notes.append(note)
    if dry_run:
        plan = stage.plan(
            recipe, weights, data, out, device=device, processes=processes, notes=notes,
            reporter=reporter,
        )  # fmt: skip
        show_plan(recipe, plan)
        return None
    if processes > 1 and "RANK" not in os.environ:
        # What is wrong is said once, here, before any process is started.
        stage.plan(recipe, weights, data, out, device=device, processes=processes)
        launch(processes, 1, "", sys.argv[1:])
        from dupr_cli.artifacts.results import Results

        return Results.read(out)
    results = stage.run(
        recipe,
        weights,
        data,
        out,
        device=device,
        overwrite=overwrite,
        leaks_in=leaks or (),
        notes=notes,
        max_hours=max_hours,
        reporter=reporter,
    )
    return results if processes == 1 else None


def show(results: Results) -> None:
    from dupr_cli.cli.console import print_text
    from dupr_cli.evaluate.results_table import table

    print_text(table(results))


def report(
    results: Annotated[
        list[Path],
        typer.Argument(metavar="DIR...", help="Directories of finished evaluations."),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Write summary.json, summary.txt and a plot."),
    ] = None,
    *,
    reporter: Reporter,
) -> Summary:
    """Compare any number of finished evaluations in one table and one plot.

    [bold]Examples[/]

      dupr evaluate report eval/a eval/b eval/c --out comparison/
    """
    from dupr_cli.evaluate.summary import summarise

    return summarise(results, out, reporter)


def show_report(summary: Summary) -> None:
    from dupr_cli.cli.console import print_text
    from dupr_cli.evaluate.summary import summary_table

    print_text(summary_table(summary))
