"""Stage 4, `dupr evaluate`: weights and a labelled set to AP, AP50 and AP75.

A Faster R-CNN is fine-tuned on each of the compared weights, with the same images, budget and
random numbers, and tested with VOC's metric. comparison.py carries it out; the data, the detector,
its training and the metric are modules of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dupr_cli.progress import Reporter, SilentReporter
from dupr_cli.recipe import EvaluateRecipe

if TYPE_CHECKING:
    from dupr_cli.artifacts.results import Results
    from dupr_cli.evaluate.comparison import EvaluatePlan

# torch is imported when it is needed: the help of the command line does without.


def plan(
    recipe: EvaluateRecipe,
    weights: Sequence[str],
    data: str,
    out: Path,
    *,
    train_split: str = "train",
    test_split: str = "val",
    device: str = "auto",
) -> EvaluatePlan:
    """Check everything that `run` needs and say what it would do.

    Raises UsageError, or RunError for damaged data, as `run` does before it starts.
    """
    from dupr_cli.evaluate.comparison import prepare_comparison

    return prepare_comparison(recipe, weights, data, out, train_split, test_split, device).plan()


def run(
    recipe: EvaluateRecipe,
    weights: Sequence[str],
    data: str,
    out: Path,
    *,
    train_split: str = "train",
    test_split: str = "val",
    device: str = "auto",
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> Results:
    """Fine-tune and test a detector on each of the weights, and write what came of it into `out`.

    weights: run directories, checkpoints or weights files; `none` is a random backbone. data: a VOC
    tree or labelled shards. device: auto, cpu, cuda or cuda:N.
    `out` gets results.json, table.txt, detections.png, losses.png, and a folder per weights with
    its result and detections. Weights that were finished there before, under the same recipe, data
    and device, are not run again.
    Raises UsageError for inputs that cannot be used or an `out` that holds another evaluation
    (`overwrite` replaces it), RunError for damaged images and for training that diverges.
    """
    from dupr_cli.evaluate.comparison import compare, prepare_comparison

    reporter = reporter or SilentReporter()
    comparison = prepare_comparison(
        recipe, weights, data, out, train_split, test_split, device, reporter
    )
    return compare(comparison, overwrite, reporter)
