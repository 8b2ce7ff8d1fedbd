"""`dupr evaluate detections`: scores the detections of any detector."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dupr_cli.cli.command import command, loading

if TYPE_CHECKING:
    from dupr_cli.evaluate.detection_files import Scored


class MetricChoice(StrEnum):
    VOC07 = "voc07"
    VOC10 = "voc10"
    COCO = "coco"


def add_to(group: typer.Typer) -> None:
    command(group, "detections", show)(detections)


def detections(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILES...",
            help="VOC's text files, one per class (*_<class>.txt), or one JSON: COCO's results, or "
            "detections.json of an evaluation.",
            exists=True,
            dir_okay=False,
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            "--data",
            metavar="VOC_TREE_OR_COCO_JSON",
            help="The ground truth: a VOC tree, a COCO folder, or COCO's JSON.",
        ),
    ],
    split: Annotated[
        str,
        typer.Option(
            "--split", help="Split of a VOC tree or COCO folder: val, 2007/test, val2017."
        ),
    ] = "val",
    metric: Annotated[
        MetricChoice,
        typer.Option("--metric", help="voc07: 11 points; voc10: area under the curve; coco."),
    ] = MetricChoice.VOC07,
    iou: Annotated[
        list[float] | None,
        typer.Option("--iou", min=0.01, max=0.99, help="Also report AP at this IoU; repeatable."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Directory for the figures, precision-recall curves, confusion and error types.",
        ),
    ] = None,
) -> Scored:
    """Score detections of any detector like VOC or COCO.

    The figures are those of the VOC development kit (with the mean over IoU 0.50:0.05:0.95 that
    detectron2 adds) or of pycocotools. Images are not needed.

    [bold]Examples[/]

      dupr evaluate detections comp4_det_test_*.txt --data VOCdevkit/VOC2007 --split test

      dupr evaluate detections results.json --data annotations/instances_val2017.json --metric coco

      dupr evaluate detections eval/01-mine/seed-0/detections.json --data VOCdevkit/VOC2007 \\
        --metric voc10 --iou 0.3 --out analysis/
    """
    with loading():
        from dupr_cli.evaluate.detection_files import score_files

    return score_files(files, data, split, metric.value, iou or (), out)


def show(scored: Scored) -> None:
    from dupr_cli.cli.console import print_text
    from dupr_cli.evaluate.detection_files import scored_table

    print_text(scored_table(scored))
