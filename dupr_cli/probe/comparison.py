"""A probe from its arguments to results.json: open, check, and measure each of the weights.

    OUT/probe.json             what all results in OUT share: recipe, data, device
    OUT/01-NAME/result.json    one of the weights, with its fingerprint
    OUT/results.json  table.txt

Each result is recorded when it is done, so the same command continues after an interruption.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dupr_cli import __version__
from dupr_cli.artifacts.files import remove_leftovers, write_text
from dupr_cli.artifacts.pixel_formats import PixelFormat
from dupr_cli.artifacts.results import RESULTS, Results, WeightsResult
from dupr_cli.datasets.pixel_statistics import measured_input
from dupr_cli.errors import UsageError
from dupr_cli.models.backbone import require_levels_of
from dupr_cli.models.compared import RANDOM_WEIGHTS, ComparedWeights, open_compared, taking
from dupr_cli.probe.data import (
    LIMIT_TEST,
    LIMIT_TRAIN,
    ImageSet,
    check_classes,
    open_pictured,
    open_train_and_test,
    open_voc,
)
from dupr_cli.probe.features import precision
from dupr_cli.probe.protocols import PROTOCOLS, ProbeTask
from dupr_cli.probe.results_table import table
from dupr_cli.probe.types import ProbeData, ProbePlan
from dupr_cli.probe.voc_classification import require_scikit_learn
from dupr_cli.progress import Reporter
from dupr_cli.recipe import ProbeRecipe, recipe_digest, recipe_keys
from dupr_cli.runtime.devices import choose_device
from dupr_cli.runtime.output import (
    RESULT_FILE,
    Claim,
    damaged_result,
    environment,
    read_claim,
    read_result,
    write_result,
)

# How bins are read, in the record of an output: results of an older dupr are not comparable.
_CELLS = "cells of a level"
CLAIM_FILE = "probe.json"
TABLE_FILE = "table.txt"


@dataclass(frozen=True)
class ProbeComparison:
    """Everything that was checked before the first image is decoded."""

    task: ProbeTask
    weights: list[ComparedWeights]
    out: Path

    def plan(self) -> ProbePlan:
        task = self.task
        return ProbePlan(
            protocol=task.recipe.protocol,
            metric=PROTOCOLS[task.recipe.protocol].metric(task.recipe),
            weights=[compared.address for compared in self.weights],
            architectures=[compared.architecture for compared in self.weights],
            levels=list(task.recipe.levels),
            train_images=0 if task.train is task.test else len(task.train),
            test_images=len(task.test),
            classes=task.classes,
            device=str(task.device),
            out=str(self.out),
        )

    def fingerprint(self) -> dict[str, object]:
        """What must be equal for results to be compared, by recipe key or name."""
        task = self.task
        values = task.recipe.model_dump(mode="json")
        section = PROTOCOLS[task.recipe.protocol].section
        measured = ("protocol", "levels", "images", "data", section, "seed")
        keys = recipe_keys({key: values[key] for key in measured})
        del keys["images.workers"]  # does not affect what is measured
        if task.recipe.protocol == "patch-retrieval":
            keys[_CELLS] = "where the backbone centres them"
        return {
            **keys,
            "images.precision": str(precision(task.recipe.images, task.device)),
            "training images": task.train.digest,
            "test images": task.test.digest,
            "device": task.device.type,
            **({"pixels": str(pixels)} if (pixels := self.weights[0].input.pixels) else {}),
        }

    def claim(self) -> Claim:
        folders = [weights.folder for weights in self.weights]
        defaults = recipe_keys(ProbeRecipe().model_dump(mode="json"))
        defaults[_CELLS] = "at (i + 1/2) strides"
        return Claim(CLAIM_FILE, "probe", self.fingerprint(), folders, defaults)


def prepare_comparison(
    recipe: ProbeRecipe,
    weights: Sequence[str],
    data: ProbeData,
    out: Path,
    device: str,
    reporter: Reporter,
) -> ProbeComparison:
    """Open and check weights, data and device; nothing is written.

    Raises UsageError for unusable input, RunError for damaged data.
    """
    chosen = choose_device(device)
    if recipe.protocol == "voc07-cls":
        require_scikit_learn()
    compared = _open_weights(recipe, weights)
    compared = taking(compared, lambda: measured_input(data.address))
    train, test = _open(recipe, data, reporter, compared[0].input.pixels)
    limit, seed = recipe.data.limit, recipe.seed
    same = train is test
    test = test.drawn(limit, seed, LIMIT_TEST)
    train = test if same else train.drawn(limit, seed, LIMIT_TRAIN)
    classes: list[str] = []
    if recipe.protocol == "voc07-cls":
        classes = _voc_classes(train, test, reporter)
    elif not same:
        classes = check_classes(train, test, reporter)
    if recipe.protocol == "knn" and max(recipe.knn.neighbours) > len(train):
        reporter.warning(
            f"{data.address}: {len(train)} training images are fewer than the "
            f"{max(recipe.knn.neighbours)} neighbours in the recipe, so all images vote."
        )
    return ProbeComparison(ProbeTask(recipe, train, test, classes, chosen), compared, out)


def _open_weights(recipe: ProbeRecipe, weights: Sequence[str]) -> list[ComparedWeights]:
    only_random = all(address == RANDOM_WEIGHTS for address in weights)
    compared = open_compared(weights, recipe.backbone if only_random else "auto")
    for one in compared:
        require_levels_of(one.architecture, recipe.levels, "levels")
        if recipe.backbone not in ("auto", one.architecture):
            raise UsageError(
                f"{one.address}: the weights are of a {one.architecture}, but the "
                f"recipe asks for {recipe.backbone}. Set backbone to auto. (recipe key: backbone)"
            )
    return compared


def _open(
    recipe: ProbeRecipe, data: ProbeData, reporter: Reporter, pixels: PixelFormat | None
) -> tuple[ImageSet, ImageSet]:
    """Training and test images; the same object if the protocol trains nothing."""
    if recipe.protocol == "patch-retrieval":
        images = open_pictured(data.address, data.test_split, reporter, pixels)
        return images, images
    assert data.test_split is not None
    if recipe.protocol == "voc07-cls":
        train = open_voc(data.address, data.train_split, reporter, pixels)
        return train, open_voc(data.test_data or data.address, data.test_split, reporter, pixels)
    return open_train_and_test(
        data.address,
        data.test_data,
        data.train_split,
        data.test_split,
        recipe.data.test_fraction,
        recipe.data.min_object,
        reporter,
        pixels,
    )


def _voc_classes(train: ImageSet, test: ImageSet, reporter: Reporter) -> list[str]:
    """Names of all classes, sorted; warns of those that cannot be learnt or measured.

    Raises UsageError when no class can be measured.
    """
    classes = sorted({*train.classes, *test.classes})

    def present(images: ImageSet, name: str) -> int:
        return sum(verdict.get(name) == 1 for verdict in images.verdicts)

    tested = [name for name in classes if present(test, name)]
    if not tested:
        raise UsageError(
            f"{test.address}: the {len(test)} images of the split {test.split!r} have no class to "
            f"find (difficult objects do not count)."
        )
    left_out = sorted(set(classes) - set(tested))
    if left_out:
        reporter.warning(
            f"{test.address}: {', '.join(left_out)}: no test image of {test.split} has these "
            f"classes, so the mean leaves them out."
        )
    unlearnt = [name for name in tested if not 2 <= present(train, name) <= len(train) - 2]
    if unlearnt:
        reporter.warning(
            f"{train.address}: {', '.join(unlearnt)}: too few training images to learn these "
            f"classes (each needs two with it and two without it); their AP of 0 counts in the "
            f"mean."
        )
    shared = set(train.ids) & set(test.ids)
    if shared and train.address == test.address:
        reporter.warning(
            f"{train.address}: {len(shared)} images, the first is {min(shared)}, are in both "
            f"{train.split} and {test.split}: the result includes images that were trained on."
        )
    return classes


def measure_all(comparison: ProbeComparison, overwrite: bool, reporter: Reporter) -> Results:
    """Measure all weights that are not finished in OUT, and write the results."""
    out, claim = comparison.out, comparison.claim()
    claim.take(out, overwrite, _files_of)
    entries = []
    for compared in comparison.weights:
        folder = out / compared.folder
        fingerprint = {
            **claim.fingerprint,
            "architecture": compared.architecture,
            "weights": compared.sha256 or RANDOM_WEIGHTS,
        }
        entry = _finished(folder, fingerprint, compared.address)
        if entry is not None:
            reporter.info(f"{compared.address}: finished before; its result is reused.")
        else:
            entry = _measure(comparison, compared, reporter)
            folder.mkdir(exist_ok=True)
            remove_leftovers(folder)
            write_result(folder, fingerprint, {"result": asdict(entry)})
        entries.append(entry)
    recipe = comparison.task.recipe
    results = Results(
        protocol=recipe.protocol,
        metric=PROTOCOLS[recipe.protocol].metric(recipe),
        train=comparison.task.train.identity,
        test=comparison.task.test.identity,
        classes=comparison.task.classes,
        results=entries,
        recipe=recipe.model_dump(mode="json"),
        recipe_sha256=recipe_digest(recipe),
        seeds=[recipe.seed],
        dupr_version=__version__,
        environment=environment(comparison.task.device),
    )
    write_text(out / TABLE_FILE, table(results))
    results.write(out)
    return results


def _files_of(out: Path) -> Iterator[Path]:
    """The files of a probe by its own record, which comes last."""
    try:
        _, folders = read_claim(out / CLAIM_FILE)
    except UsageError:  # damaged: results are recognised by their folder names
        folders = []
    # Older versions of dupr recorded no folders.
    folders = folders or [path.parent.name for path in out.glob(f"[0-9][0-9]-*/{RESULT_FILE}")]
    yield from (out / name / RESULT_FILE for name in folders)
    yield from (out / name for name in (RESULTS, TABLE_FILE, CLAIM_FILE))


def _finished(folder: Path, fingerprint: dict[str, object], address: str) -> WeightsResult | None:
    """A result that an earlier call wrote, or None."""
    values = read_result(folder, fingerprint, address)
    if values is None:
        return None
    try:
        return replace(WeightsResult(**values["result"]), weights=address)
    except (TypeError, KeyError) as error:
        raise damaged_result(folder, error) from error


def _measure(
    comparison: ProbeComparison, compared: ComparedWeights, reporter: Reporter
) -> WeightsResult:
    recipe = comparison.task.recipe
    protocol = PROTOCOLS[recipe.protocol]
    measured = protocol.measure(comparison.task, compared, reporter)
    level = recipe.levels[0]
    columns = [c for c in protocol.columns(recipe) if f"{level}/{c}" in measured.metrics]
    return WeightsResult(
        weights=compared.address,
        weights_sha256=compared.sha256,
        architecture=compared.architecture,
        metrics=measured.metrics,
        per_class=measured.per_class,
        seconds=measured.seconds,
        extra={
            "folder": compared.folder,
            "columns": columns,
            "chance": measured.chance,
            "chosen": measured.chosen,
            "batch_norm": "measured on these images" if compared.sha256 is None else "as given",
        },
    )
