"""Stage 4, `dupr evaluate`: weights and a labelled set to AP, and to whether a difference is real.

A detector is fine-tuned on each of the compared weights, with the same images, budget and random
numbers, once for every seed, and tested with the protocol's metric. comparison.py carries it out;
data, detectors, their training, metrics and statistics are modules of their own.
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
    device: str = "auto",
    processes: int = 1,
    notes: Sequence[str] = (),
    reporter: Reporter | None = None,
) -> EvaluatePlan:
    """Check everything that `run` needs and say what it would do.

    Raises UsageError, or RunError for damaged data, as `run` does before it starts.
    """
    from dupr_cli.evaluate.comparison import prepare_comparison
    from dupr_cli.runtime.devices import choose_device

    chosen = choose_device(device)
    return prepare_comparison(recipe, weights, data, out, chosen, processes, notes, reporter).plan()


def run(
    recipe: EvaluateRecipe,
    weights: Sequence[str],
    data: str,
    out: Path,
    *,
    device: str = "auto",
    overwrite: bool = False,
    leaks_in: Sequence[str] = (),
    notes: Sequence[str] = (),
    max_hours: float | None = None,
    stop_after: int | None = None,
    reporter: Reporter | None = None,
) -> Results:
    """Fine-tune and test a detector on each of the weights, and write what came of it into `out`.

    weights: run directories, checkpoints, weights files or torchvision:NAME; `none` is a random
    backbone. data: a VOC tree, COCO's or Cityscapes' layout, or labelled shards. device: auto, cpu,
    cuda or cuda:N; under torchrun each process takes its own GPU and its part of every batch.
    leaks_in: pre-training shards in which test images are looked for. notes: said with the results.
    `out` gets results.json, table.txt, pictures, and a folder per weights with its trials. Trials
    that were finished there before, under the same recipe, data and device, are not run again, and
    one that was interrupted goes on.
    Raises UsageError for inputs that cannot be used or an `out` that holds another evaluation
    (`overwrite` replaces it), RunError for damaged images and for training that diverges,
    StoppedRunError when a signal or a limit stops it.
    """
    from dupr_cli.evaluate.comparison import compare, prepare_comparison
    from dupr_cli.runtime.parallel import join
    from dupr_cli.runtime.stopping import Limits

    with join(device) as world:
        say: Reporter = (reporter or SilentReporter()) if world.is_main else SilentReporter()
        comparison = prepare_comparison(
            recipe, weights, data, out, world.device, world.size, notes, say
        )
        limits = Limits(max_hours, stop_after)
        return compare(comparison, world, overwrite, say, limits, leaks_in)
