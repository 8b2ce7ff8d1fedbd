"""The history of weights for the model card: from the recipe and the log of their run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dupr_cli.artifacts.hub_weights import HUB
from dupr_cli.artifacts.run import RECIPE_FILE, MetricsLog, read_environment, retrieval_of
from dupr_cli.artifacts.weights import Weights
from dupr_cli.errors import UsageError
from dupr_cli.models.published import is_published
from dupr_cli.recipe import PretrainRecipe, load_recipe, recipe_digest

_OF_OTHERS = ", whose own training and licence count as well"


@dataclass(frozen=True)
class RunFacts:
    """The run that produced the weights, if it is available.

    recipe: None if this version cannot read it. images: number of training images. data_sha256:
    digest of their shards. changed: recipe keys that changed during the run. log: the newest value
    of everything logged up to the weights' step. retrieval: each measurement of held-out patch
    retrieval up to then, as its step and the percent by level.
    """

    folder: Path
    recipe: PretrainRecipe | None
    images: int | None
    data_sha256: str | None
    changed: list[str]
    log: Mapping[str, float]
    retrieval: list[tuple[int, dict[str, float]]]

    @property
    def start(self) -> str:
        """The weights at step 0. A local path means nothing elsewhere, and may reveal too much."""
        address = self.recipe.model.init if self.recipe is not None else None
        if address is None:
            return "random weights" if self.recipe is not None else "unknown weights"
        if is_published(address) or address.startswith(HUB):
            return address
        return Path(address).name


def facts_of(weights: Weights) -> RunFacts | None:
    """None if the run is not available: weights from elsewhere, or a file that was moved."""
    path = Path(weights.address)
    if not path.exists():
        return None
    for folder in (path, *path.parents[:3]):
        if (folder / RECIPE_FILE).is_file():
            recipe = _recipe(folder)
            # A file may lie in the folder of a run that did not produce it.
            if path.is_file() and (
                recipe is None or recipe_digest(recipe) != weights.metadata.recipe_sha256
            ):
                return None
            return _facts(folder, recipe, weights.metadata.step)
    return None


def _recipe(folder: Path) -> PretrainRecipe | None:
    try:
        return load_recipe(PretrainRecipe, str(folder / RECIPE_FILE))
    except UsageError:  # from another version, or with a method that is not installed
        return None


def _facts(folder: Path, recipe: PretrainRecipe | None, step: int) -> RunFacts:
    environment = read_environment(folder)
    data = environment.get("data", {})
    log: dict[str, float] = {}
    retrieval = []
    for line in MetricsLog(folder).read():
        if line["step"] <= step:
            log |= line
            if shares := retrieval_of(line):
                retrieval.append((int(line["step"]), shares))
    return RunFacts(
        folder,
        recipe,
        data.get("images"),
        data.get("sha256"),
        [str(change["key"]) for change in environment.get("changes", [])],
        log,
        retrieval,
    )


def describe(facts: RunFacts, weights: Weights) -> list[str]:
    """Lines of a Markdown list: method, images, length, optimiser, start."""
    lines = []
    if facts.recipe is not None:
        lines = _by_recipe(facts.recipe, facts, weights)
    if facts.data_sha256:
        lines.append(f"Shards: sha256 {facts.data_sha256} over their names, sizes and counts")
    if facts.changed:
        lines.append(f"Changed during the run: {', '.join(facts.changed)}")
    return lines


def _by_recipe(recipe: PretrainRecipe, facts: RunFacts, weights: Weights) -> list[str]:
    method, optimizer = recipe.method, recipe.optimizer
    image = [level for level, weight in sorted(method.image.weights.items()) if weight]
    patch = [
        f"{level} ({method.patch.bins[level]} x {method.patch.bins[level]} patches)"
        for level, weight in sorted(method.patch.weights.items())
        if weight
    ]
    parts = [f"image contrast at {', '.join(image)}"] if image else []
    parts += [f"patch contrast at {', '.join(patch)}"] if patch else []
    # What a method of another package learns from is its own affair.
    own = method.name in ("dupr", "densecl")
    images = f"{facts.images:,} without labels, " if facts.images else ""
    passes = f" ({facts.log['epoch']:.3g} passes)" if "epoch" in facts.log else ""
    return [
        f"Method: {method.title}; {'; '.join(parts)}; queues of {method.queue_length:,} keys, "
        f"momentum {method.momentum}",
        f"Images: {images}two views of {method.views.size} x {method.views.size} pixels of each",
        f"Length: {weights.metadata.step:,} steps of {recipe.data.batch_size} images{passes}",
        f"Optimiser: SGD, learning rate {optimizer.lr} ({optimizer.schedule}), momentum "
        f"{optimizer.momentum}, weight decay {optimizer.weight_decay}; {recipe.train.precision}",
        *(["Supervision: none, neither labels nor a teacher network"] if own else []),
        f"Start: {facts.start}{_OF_OTHERS if recipe.model.init else ''}",
    ]
