"""`dupr evaluate knn|linear|voc07-cls|patch-retrieval`: frozen features, nothing fine-tuned."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

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
        help="Labelled shards, a tree of class folders, or a VOC tree (its objects are cut out).",
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
    typer.Option("--limit", help="A quick trial: this many training and test images, drawn."),
]


def add_to(group: typer.Typer) -> None:
    command(group, "knn", show)(knn)
    command(group, "linear", show)(linear)
    command(group, "voc07-cls", show)(voc07_cls)
    command(group, "patch-retrieval", show)(patch_retrieval)


def knn(
    weights: Weights,
    data: Labelled,
    out: Out,
    train_split: TrainSplit = "train",
    test_split: TestSplit = "val",
    test_data: TestData = None,
    limit: Limit = None,
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
    """Classify test images by the vote of their nearest training images; nothing is trained.

    [bold]Examples[/]

      dupr evaluate knn backbone.safetensors none --data IMAGENET --out eval/

      dupr evaluate knn runs/a runs/b --data photos/ --set data.test_fraction=0.2 --out eval/
    """
    resolved = _recipe(recipe or "knn", ["knn"], set_, limit, seed, workers)
    return _probe(
        resolved, weights, data, out, train_split, test_split, test_data, device, overwrite,
        dry_run, reporter,
    )  # fmt: skip


def linear(
    weights: Weights,
    data: Labelled,
    out: Out,
    train_split: TrainSplit = "train",
    test_split: TestSplit = "val",
    test_data: TestData = None,
    limit: Limit = None,
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
    """Train a linear classifier on the frozen features of each level.

    Without --recipe the shipped linear-fast is used: logistic regression on features computed
    once. linear-in1k-moco is the protocol of published tables: 100 epochs of SGD.

    [bold]Examples[/]

      dupr evaluate linear backbone.safetensors none --data IMAGENET --out eval/

      dupr evaluate linear backbone.safetensors -r linear-in1k-moco --data IMAGENET --out eval/
    """
    protocols = ["linear", "linear-fast"]
    resolved = _recipe(recipe or "linear-fast", protocols, set_, limit, seed, workers)
    return _probe(
        resolved, weights, data, out, train_split, test_split, test_data, device, overwrite,
        dry_run, reporter,
    )  # fmt: skip


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
    train_split: TrainSplit = "trainval",
    test_split: TestSplit = "test",
    test_data: TestData = None,
    limit: Limit = None,
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
    """Tell which classes are in an image by a linear SVM per class on frozen features; mAP.

    Needs scikit-learn: pip install 'dupr-cli[probes]'.

    [bold]Example[/]

      dupr evaluate voc07-cls backbone.safetensors none --data VOCdevkit/VOC2007 --out eval/
    """
    resolved = _recipe(recipe or "voc07-cls", ["voc07-cls"], set_, limit, seed, workers)
    return _probe(
        resolved, weights, data, out, train_split, test_split, test_data, device, overwrite,
        dry_run, reporter,
    )  # fmt: skip


def patch_retrieval(
    weights: Weights,
    data: Annotated[
        str,
        typer.Option(
            "--data",
            metavar="IMAGES",
            help="Any shards or folder of images; with boxes, objects are looked for, too.",
        ),
    ],
    out: Out,
    test_split: Annotated[
        str | None,
        typer.Option("--test-split", help="Split to take; by default all there is."),
    ] = None,
    limit: Limit = None,
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
    """Find patches again in another view of their image, and objects by objects of their class.

    [bold]Examples[/]

      dupr evaluate patch-retrieval backbone.safetensors none --data shards/ --out eval/

      dupr evaluate patch-retrieval runs/a none --data VOCdevkit/VOC2007 --test-split test --out e/
    """
    protocols = ["patch-retrieval"]
    resolved = _recipe(recipe or "patch-retrieval", protocols, set_, limit, seed, workers)
    return _probe(
        resolved, weights, data, out, "train", test_split, None, device, overwrite, dry_run,
        reporter,
    )  # fmt: skip


def _recipe(
    name: str,
    protocols: Collection[str],
    given: Sequence[str] | None,
    limit: int | None,
    seed: int | None,
    workers: int | None,
) -> ProbeRecipe:
    """The recipe of a command. Raises UsageError when it is of another command's protocol."""
    from dupr_cli.recipe import ProbeRecipe, load_recipe

    options = overrides(
        given,
        limit=("data.limit", limit),
        workers=("images.workers", workers),
        seed=("seed", seed),
    )
    recipe = load_recipe(ProbeRecipe, name, options)
    if recipe.protocol not in protocols:
        raise UsageError(
            f"{name}: the protocol is {recipe.protocol}, but this command carries out "
            f"{' or '.join(protocols)}. (recipe key: protocol)"
        )
    return recipe


def _probe(
    recipe: ProbeRecipe,
    weights: list[str],
    data: str,
    out: Path,
    train_split: str,
    test_split: str | None,
    test_data: str | None,
    device: str,
    overwrite: bool,
    dry_run: bool,
    reporter: Reporter,
) -> Results | None:
    from dupr_cli import probe as probes

    if dry_run:
        plan = probes.plan(
            recipe,
            weights,
            data,
            out,
            train_split=train_split,
            test_split=test_split,
            test_data=test_data,
            device=device,
        )
        show_plan(recipe, plan)
        return None
    return probes.run(
        recipe,
        weights,
        data,
        out,
        train_split=train_split,
        test_split=test_split,
        test_data=test_data,
        device=device,
        overwrite=overwrite,
        reporter=reporter,
    )


def show(results: Results) -> None:
    from dupr_cli.cli.console import print_text
    from dupr_cli.probe.results_table import table

    print_text(table(results))
