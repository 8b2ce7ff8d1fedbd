"""`dupr evaluate knn|linear|voc07-cls|patch-retrieval`: probes of frozen features."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dupr_cli.cli.command import Common, Planned, command, loading, overrides
from dupr_cli.errors import UsageError
from dupr_cli.progress import Reporter

if TYPE_CHECKING:
    from dupr_cli.artifacts.results import Results
    from dupr_cli.recipe import ProbeRecipe

Weights = Annotated[
    list[str],
    typer.Argument(
        metavar="WEIGHTS...",
        help="Run directories, checkpoints, weights files, or none for random weights.",
    ),
]
Labelled = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="LABELLED",
        help="Labelled shards, class folders, or a VOC tree (whose objects are cut out).",
    ),
]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Directory for the results.")]
TrainSplit = Annotated[str, typer.Option("--train-split", help="Split to learn from.")]
TestSplit = Annotated[str, typer.Option("--test-split", help="Split to test on.")]
TestData = Annotated[
    str | None,
    typer.Option("--test-data", metavar="LABELLED", help="Another set to test on."),
]
Limit = Annotated[
    int | None,
    typer.Option("--limit", help="Run a quick trial on this many training and test images."),
]


@dataclass(frozen=True)
class Splits:
    """Options for the data of a probe that is trained."""

    train_split: TrainSplit = "train"
    test_split: TestSplit = "val"
    test_data: TestData = None
    limit: Limit = None


@dataclass(frozen=True)
class VocSplits(Splits):
    """The same options with VOC's split names."""

    train_split: TrainSplit = "trainval"
    test_split: TestSplit = "test"


@dataclass(frozen=True)
class Split:
    """Options for the data of a probe that is not trained."""

    test_split: Annotated[
        str | None,
        typer.Option("--test-split", help="Split to use; by default all images."),
    ] = None
    limit: Limit = None


def add_to(group: typer.Typer) -> None:
    command(group, "knn", show)(knn)
    command(group, "linear", show)(linear)
    command(group, "voc07-cls", show)(voc07_cls)
    command(group, "patch-retrieval", show)(patch_retrieval)


def knn(
    weights: Weights,
    data: Labelled,
    out: Out,
    splits: Splits,
    common: Common,
    *,
    reporter: Reporter,
) -> Results | Planned:
    """Classify test images by a vote of their nearest training images, without any training.

    [bold]Examples[/]

      dupr evaluate knn backbone.safetensors none --data IMAGENET --out eval/

      dupr evaluate knn runs/a runs/b --data photos/ --set data.test_fraction=0.2 --out eval/
    """
    recipe = _recipe("knn", ["knn"], splits.limit, common)
    return _probe(recipe, weights, data, out, splits, common, reporter)


def linear(
    weights: Weights,
    data: Labelled,
    out: Out,
    splits: Splits,
    common: Common,
    *,
    reporter: Reporter,
) -> Results | Planned:
    """Train a linear classifier on the frozen features of each level.

    Without --recipe, the shipped linear-fast is used: logistic regression on features computed
    once. linear-in1k-moco is the protocol of published tables, with 100 epochs of SGD.

    [bold]Examples[/]

      dupr evaluate linear backbone.safetensors none --data IMAGENET --out eval/

      dupr evaluate linear backbone.safetensors -r linear-in1k-moco --data IMAGENET --out eval/
    """
    recipe = _recipe("linear-fast", ["linear", "linear-fast"], splits.limit, common)
    return _probe(recipe, weights, data, out, splits, common, reporter)


def voc07_cls(
    weights: Weights,
    data: Annotated[
        str,
        typer.Option(
            "--data",
            metavar="VOC_TREE",
            help="A VOCdevkit, one year's folder, or labelled shards of one.",
        ),
    ],
    out: Out,
    splits: VocSplits,
    common: Common,
    *,
    reporter: Reporter,
) -> Results | Planned:
    """Classify images with a linear SVM per class on frozen features, and report mAP.

    This needs scikit-learn: pip install 'dupr-cli[probes]'.

    [bold]Example[/]

      dupr evaluate voc07-cls backbone.safetensors none --data VOCdevkit/VOC2007 --out eval/
    """
    recipe = _recipe("voc07-cls", ["voc07-cls"], splits.limit, common)
    return _probe(recipe, weights, data, out, splits, common, reporter)


def patch_retrieval(
    weights: Weights,
    data: Annotated[
        str,
        typer.Option(
            "--data",
            metavar="IMAGES",
            help="Any shards or folder of images; if it has boxes, objects are retrieved too.",
        ),
    ],
    out: Out,
    split: Split,
    common: Common,
    *,
    reporter: Reporter,
) -> Results | Planned:
    """Retrieve patches from another view of their image, and objects by others of their class.

    [bold]Examples[/]

      dupr evaluate patch-retrieval backbone.safetensors none --data shards/ --out eval/

      dupr evaluate patch-retrieval runs/a none --data VOCdevkit/VOC2007 --test-split test --out e/
    """
    recipe = _recipe("patch-retrieval", ["patch-retrieval"], split.limit, common)
    return _probe(recipe, weights, data, out, split, common, reporter)


def _recipe(
    default: str, protocols: Collection[str], limit: int | None, common: Common
) -> ProbeRecipe:
    """The recipe of a command. Raises UsageError if its protocol belongs to another command."""
    from dupr_cli.recipe import ProbeRecipe, load_recipe

    name = common.recipe or default
    options = overrides(
        common.set_,
        limit=("data.limit", limit),
        workers=("images.workers", common.workers),
        seed=("seed", common.seed),
    )
    recipe = load_recipe(ProbeRecipe, name, options)
    if recipe.protocol not in protocols:
        raise UsageError(
            f"{name}: the protocol is {recipe.protocol}, but this command runs "
            f"{' or '.join(protocols)}. (recipe key: protocol)"
        )
    return recipe


def _probe(
    recipe: ProbeRecipe,
    weights: list[str],
    data: str,
    out: Path,
    splits: Splits | Split,
    common: Common,
    reporter: Reporter,
) -> Results | Planned:
    with loading():
        from dupr_cli import probe as stage

    which = {field.name: getattr(splits, field.name) for field in fields(splits)}
    del which["limit"]  # the recipe contains it
    if common.dry_run:
        plan = stage.plan(
            recipe, weights, data, out, **which, device=common.device, overwrite=common.overwrite
        )
        return Planned(recipe, plan)
    return stage.run(
        recipe, weights, data, out, **which, device=common.device, overwrite=common.overwrite,
        reporter=reporter,
    )  # fmt: skip


def show(results: Results) -> None:
    from dupr_cli.cli.console import print_text
    from dupr_cli.probe.results_table import table

    print_text(table(results))
