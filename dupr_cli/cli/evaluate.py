"""`dupr evaluate`: one subcommand per protocol."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dupr_cli.cli import evaluate_detections, evaluate_probes
from dupr_cli.cli.command import Common, Planned, Profile, command, loading, overrides, shell_words
from dupr_cli.cli.help_text import Group
from dupr_cli.errors import UsageError
from dupr_cli.progress import Reporter

if TYPE_CHECKING:
    from dupr_cli.artifacts.label_curves import LabelCurves
    from dupr_cli.artifacts.results import Results
    from dupr_cli.evaluate.summary import Summary
    from dupr_cli.recipe import EvaluateRecipe


def add_to(app: typer.Typer) -> None:
    group = typer.Typer(cls=Group, no_args_is_help=True, rich_markup_mode="rich")
    for name, function in _PROTOCOLS:
        command(group, name, show, following=following)(function)
    command(group, "report", show_report)(report)
    evaluate_detections.add_to(group)
    evaluate_probes.add_to(group)

    @group.callback()
    def evaluate() -> None:
        """Measure the quality of weights, by fine-tuning a detector or by probes."""

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


@dataclass(frozen=True)
class FineTuning:
    """Options of every protocol that fine-tunes a detector."""

    train_split: Annotated[
        list[str] | None,
        typer.Option("--train-split", help="Split to fine-tune on; repeat it to join several."),
    ] = None
    test_split: Annotated[
        list[str] | None, typer.Option("--test-split", help="Split to test on; repeatable.")
    ] = None
    seeds: Annotated[
        int | None,
        typer.Option(
            "--seeds", min=1, help="Trials per weights; differences get a confidence interval."
        ),
    ] = None
    labels: Annotated[
        str | None,
        typer.Option(
            "--labels",
            metavar="N|P%|FILE|N,N,...",
            help="Train only on this number or share of labelled images, stratified, or on those "
            "of a labels.json. A list such as 50,100,all evaluates each, and says how many labels "
            "the weights save.",
        ),
    ] = None
    frozen: Annotated[
        bool,
        typer.Option(
            "--frozen",
            help="Train only a small head, on features of the frozen backbone: the weights "
            "themselves are compared, in minutes.",
        ),
    ] = False
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline",
            metavar="WEIGHTS",
            help="Which of the weights the labels saved refer to; none by default.",
        ),
    ] = None
    iterations: Annotated[
        int | None,
        typer.Option(
            "--iterations",
            min=1,
            help="Train for this many iterations; warm-up and milestones are rescaled.",
        ),
    ] = None
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit", min=1, help="Run a quick trial of this many iterations and test images."
        ),
    ] = None
    scale_to_device: Annotated[
        bool,
        typer.Option(
            "--scale-to-device", help="Scale batch, lr and schedule to the available devices."
        ),
    ] = False
    leaks: Annotated[
        list[str] | None,
        typer.Option(
            "--leaks", metavar="SHARDS", help="Look for test images in this pre-training data."
        ),
    ] = None
    nproc: Annotated[
        int | None,
        typer.Option("--nproc", min=1, help="Number of processes on this machine, one per GPU."),
    ] = None
    max_hours: Annotated[
        float | None,
        typer.Option(
            "--max-hours", min=0, help="Save and stop after this time, with exit code 75."
        ),
    ] = None
    profile: Profile = False


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
    options: FineTuning,
    common: Common,
    *,
    reporter: Reporter,
) -> Results | LabelCurves | Planned | None:
    """Fine-tune a detector from each of the weights and compare VOC's AP, AP50 and AP75.

    All weights get the same budget, the same images and the same random numbers. Without
    --recipe, the shipped voc-tiny is used, with small images and minutes on a CPU.

    [bold]Examples[/]

      dupr evaluate voc backbone.safetensors none --data VOCdevkit/VOC2007 --out eval/

      dupr evaluate voc runs/a runs/b none --data shards/ --labels 200 --seeds 5 --out eval/

      dupr evaluate voc runs/a -r voc0712-r50c4-24k --data VOCdevkit --nproc 8 --out eval/
    """
    recipe = _resolve("voc", options, common)
    return _carry_out(recipe, weights, data, out, options, common, reporter)


def coco(
    weights: WeightsArgument,
    data: Annotated[
        str,
        typer.Option(
            "--data",
            metavar="COCO_OR_SHARDS",
            help="A folder with annotations/*.json and images in COCO's layout, or labelled "
            "shards.",
        ),
    ],
    out: Out,
    options: FineTuning,
    common: Common,
    *,
    reporter: Reporter,
) -> Results | LabelCurves | Planned | None:
    """Fine-tune a detector from each of the weights and compare COCO's AP of boxes and masks.

    Without --recipe, the shipped coco-tiny is used, with small images and a short schedule.

    [bold]Examples[/]

      dupr evaluate coco runs/a none --data coco/ --out eval/

      dupr evaluate coco runs/a -r coco-maskrcnn-r50c4-1x --data coco/ --nproc 8 --out eval/

      dupr evaluate coco runs/a -r coco-semi-1pct --data coco/ --scale-to-device --out eval/
    """
    recipe = _resolve("coco", options, common)
    return _carry_out(recipe, weights, data, out, options, common, reporter)


def yolo(
    weights: WeightsArgument,
    data: Annotated[
        str,
        typer.Option(
            "--data",
            metavar="DATA_YAML",
            help="A data.yaml, or a folder with images and labels in YOLO's layout.",
        ),
    ],
    out: Out,
    options: FineTuning,
    common: Common,
    *,
    reporter: Reporter,
) -> Results | LabelCurves | Planned | None:
    """Train a detector from each of the weights on a YOLO data set and compare COCO's AP.

    Its train and val splits are used as they are. Without --recipe, the shipped yolo-tiny is used;
    every recipe of `dupr evaluate coco` without masks can be extended with `protocol: yolo`.

    [bold]Examples[/]

      dupr evaluate yolo runs/a none --data data.yaml --frozen --labels 50,100,all --out eval/

      dupr evaluate yolo runs/a none --data data.yaml --test-split test --out eval/
    """
    recipe = _resolve("yolo", options, common)
    return _carry_out(recipe, weights, data, out, options, common, reporter)


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
    options: FineTuning,
    common: Common,
    *,
    reporter: Reporter,
) -> Results | LabelCurves | Planned | None:
    """Fine-tune a Mask R-CNN on Cityscapes and compare COCO's AP and Cityscapes' own.

    Without --recipe, the shipped cityscapes-tiny is used. cityscapes_AP is the figure of the
    literature; with gtInstances.json in gtFine/, it is given within 50 and 100 m too.

    [bold]Examples[/]

      dupr evaluate cityscapes runs/a none --data cityscapes/ --out eval/

      dupr evaluate cityscapes runs/a -r cityscapes-instance --data cityscapes/ --out eval/
    """
    recipe = _resolve("cityscapes", options, common)
    return _carry_out(recipe, weights, data, out, options, common, reporter)


def semantic(
    weights: WeightsArgument,
    data: Annotated[
        str,
        typer.Option(
            "--data",
            metavar="MASKS",
            help="A VOC tree with SegmentationClass, Cityscapes, or a folder with images and masks "
            "of class numbers.",
        ),
    ],
    out: Out,
    options: FineTuning,
    common: Common,
    *,
    reporter: Reporter,
) -> Results | LabelCurves | Planned | None:
    """Train an FCN from each of the weights and compare the mean IoU of semantic segmentation.

    The metric is that of VOC and Cityscapes. Without --recipe, the shipped semantic-tiny is used,
    with small images and minutes on a CPU.

    [bold]Examples[/]

      dupr evaluate semantic runs/a none --data VOCdevkit/VOC2012 --frozen --out eval/

      dupr evaluate semantic runs/a -r voc-fcn-r50-20k --data VOCdevkit --nproc 8 --out eval/

      dupr evaluate semantic runs/a -r cityscapes-fcn-r50-40k --data cityscapes/ --out eval/
    """
    recipe = _resolve("semantic", options, common)
    return _carry_out(recipe, weights, data, out, options, common, reporter)


_PROTOCOLS = (
    ("voc", voc),
    ("coco", coco),
    ("yolo", yolo),
    ("cityscapes", cityscapes),
    ("semantic", semantic),
)


def _resolve(protocol: str, options: FineTuning, common: Common) -> EvaluateRecipe:
    from dupr_cli.recipe import EvaluateRecipe, load_recipe

    given = overrides(
        common.set_,
        workers=("train.workers", common.workers),
        seed=("seed", common.seed),
        train_split=("data.train_splits", _yaml_list(options.train_split)),
        test_split=("data.test_splits", _yaml_list(options.test_split)),
        seeds=("trials", options.seeds),
        labels=("data.labels", _labels(options.labels)),
    )
    if options.frozen and protocol == "cityscapes":
        raise UsageError(
            "--frozen: Cityscapes is measured by masks, which need a fine-tuned detector. "
            "`dupr evaluate coco --frozen` takes its boxes in COCO's layout."
        )
    default = f"{protocol}-frozen-tiny" if options.frozen else f"{protocol}-tiny"
    resolved = load_recipe(EvaluateRecipe, common.recipe or default, given)
    if options.frozen and not resolved.is_frozen:
        raise UsageError(
            f"--frozen: {common.recipe} fine-tunes the backbone. Give a recipe with "
            f"detector.frozen = res5, such as {protocol}-frozen-tiny. (recipe key: detector.frozen)"
        )
    if resolved.protocol != protocol:
        raise UsageError(
            f"{common.recipe} is a recipe of the protocol {resolved.protocol}; give it to "
            f"`dupr evaluate {resolved.protocol}`. (recipe key: protocol)"
        )
    return resolved


def _labels(given: str | None) -> str | None:
    """The value of `data.labels`: a list is separated by commas."""
    if given is None or "," not in given or given.endswith(".json"):
        return given
    return f"[{given}]"


def _yaml_list(values: list[str] | None) -> str | None:
    import json

    return None if values is None else json.dumps(values)


def _carry_out(
    recipe: EvaluateRecipe,
    weights: list[str],
    data: str,
    out: Path,
    options: FineTuning,
    common: Common,
    reporter: Reporter,
) -> Results | LabelCurves | Planned | None:
    with loading():
        from dupr_cli import evaluate as stage
    from dupr_cli.cli.launch import launch
    from dupr_cli.evaluate.scaling import limited, rescaled, scale_to_devices
    from dupr_cli.runtime.parallel import world_size
    from dupr_cli.runtime.profiling import profiling

    processes, notes = max(options.nproc or 1, world_size()), []
    if options.iterations is not None:
        recipe = rescaled(recipe, options.iterations)
    if options.scale_to_device:
        recipe, note = scale_to_devices(recipe, processes)
        notes.append(note)
    if options.limit is not None:
        recipe, note = limited(recipe, options.limit)
        notes.append(note)
    launched = "RANK" in os.environ
    if common.dry_run or (processes > 1 and not launched):
        # Checks the inputs once, before any process is started.
        plan = stage.plan(
            recipe, weights, data, out, device=common.device, processes=processes,
            overwrite=common.overwrite, notes=notes, reporter=reporter,
        )  # fmt: skip
        if common.dry_run:
            return Planned(recipe, plan)
        launch(processes, 1, "", sys.argv[1:])
        from dupr_cli.artifacts.label_curves import LabelCurves
        from dupr_cli.artifacts.results import Results

        sweep = isinstance(recipe.data.labels, list)
        return LabelCurves.read(out) if sweep else Results.read(out)
    given: dict[str, Any] = {
        "device": common.device,
        "overwrite": common.overwrite,
        "leaks_in": options.leaks or (),
        "notes": notes,
        "max_hours": options.max_hours,
        "reporter": reporter,
    }
    if options.baseline is not None and not isinstance(recipe.data.labels, list):
        raise UsageError("--baseline needs several numbers of labels, such as --labels 50,100,all.")
    results: Results | LabelCurves
    with profiling(out / "profile" if options.profile else None, reporter):
        if isinstance(recipe.data.labels, list):
            results = stage.run_labels(
                recipe, weights, data, out, baseline=options.baseline, **given
            )
        else:
            results = stage.run(recipe, weights, data, out, **given)
    return results if processes == 1 else None


def show(results: Results | LabelCurves) -> None:
    from dupr_cli.artifacts.results import Results
    from dupr_cli.cli.console import print_text
    from dupr_cli.evaluate.label_curves import text
    from dupr_cli.evaluate.results_table import table

    print_text(table(results) if isinstance(results, Results) else text(results))


def following(results: Results | LabelCurves, arguments: Mapping[str, object]) -> str:
    from dupr_cli.artifacts.results import Results

    if isinstance(results, Results) and len(results.seeds) == 1 and len(results.results) > 1:
        return "the same command with --seeds 5 gives each difference an interval"
    return shell_words("dupr", "report", arguments["out"], "--out", "report.html")


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
    with loading():
        from dupr_cli.evaluate.summary import summarise

    return summarise(results, out, reporter)


def show_report(summary: Summary) -> None:
    from dupr_cli.cli.console import print_text
    from dupr_cli.evaluate.summary import summary_table

    print_text(summary_table(summary))
