"""The files that go to the Hub beside the weights: model card, the run's recipe, evaluations.

Weights and evaluations may be of others, so what they say is shown as text and never as Markdown.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from dupr_cli import __version__
from dupr_cli.addresses import without_secrets
from dupr_cli.artifacts.files import write_text
from dupr_cli.artifacts.hub_weights import repository_of
from dupr_cli.artifacts.pixel_formats import counted
from dupr_cli.artifacts.results import RESULTS, Results, WeightsResult
from dupr_cli.artifacts.run import RECIPE_FILE
from dupr_cli.artifacts.weights import Weights, WeightsMetadata
from dupr_cli.errors import UsageError
from dupr_cli.export.run_facts import RunFacts, describe, facts_of
from dupr_cli.export.types import ExportedFormat, ExportResult
from dupr_cli.outside_text import markdown_text, one_line, several_lines, tar_key
from dupr_cli.recipe import ExportRecipe
from dupr_cli.recipe.pretrain import DUPR

CARD = "README.md"
_PAPER = "10.1109/TPAMI.2022.3164911"


def write_companions(
    folder: Path,
    result: ExportResult,
    weights: Weights,
    recipe: ExportRecipe,
    repository: str,
    results: Sequence[Path],
) -> None:
    """Write README.md, recipe.yaml and results/*.json into the folder to be pushed.

    results: folders of evaluations given by hand. Raises UsageError for any other folder.
    """
    evaluations = find_results(weights, result, results)
    for number, (_, found) in enumerate(evaluations):
        (folder / "results").mkdir(exist_ok=True)
        found.write(folder / "results")
        name = f"{number + 1:02d}-{tar_key(found.protocol).replace('/', '_')}.json"
        (folder / "results" / RESULTS).replace(folder / "results" / name)
    run = facts_of(weights)
    if run is not None:
        shutil.copyfile(run.folder / RECIPE_FILE, folder / RECIPE_FILE)
    card = model_card(result, weights, recipe, repository, evaluations, run)
    write_text(folder / CARD, str(card))


def find_results(
    weights: Weights, result: ExportResult, given: Sequence[Path]
) -> list[tuple[WeightsResult, Results]]:
    """Find evaluations of these weights: given ones, and those in or next to the run or file.

    They are recognised by the sha256 of the weights, whatever their address.
    """
    digests = {weights.sha256, *(d for f in result.formats for d in f.files.values())}
    origin = Path(weights.address)
    near: list[Path] = []
    if origin.exists():
        near = sorted({*origin.glob(f"*/{RESULTS}"), *origin.parent.glob(f"*/{RESULTS}")})
    found: dict[Path, tuple[WeightsResult, Results]] = {}
    for path in [*(folder / RESULTS for folder in given), *near]:
        try:
            results = Results.read(path)
        except UsageError:
            if path in near:
                continue  # a results.json of another program
            raise
        own = [entry for entry in results.results if entry.weights_sha256 in digests]
        if own:
            found.setdefault(path.resolve(), (own[0], results))
        elif path not in near:
            raise UsageError(f"{path}: this is not an evaluation of {weights.address}.")
    return list(found.values())


def model_card(
    result: ExportResult,
    weights: Weights,
    recipe: ExportRecipe,
    repository: str,
    evaluations: Sequence[tuple[WeightsResult, Results]],
    run: RunFacts | None,
) -> ModelCard:
    """The README.md: front matter, origin, how to load each format, results, limitations."""
    metadata, name = weights.metadata, repository.rpartition("/")[2]
    front = ModelCardData(
        library_name=_library(recipe.formats or []),
        pipeline_tag="object-detection" if evaluations else "image-feature-extraction",
        license=recipe.card.license,
        datasets=recipe.card.datasets or None,
        base_model=recipe.card.base_model or _base_model(weights, run),
        tags=["dupr", *([] if metadata.imported else ["self-supervised"]), "object-detection",
              "backbone", one_line(metadata.architecture), *map(one_line, recipe.card.tags)],
        model_name=name,
        eval_results=[
            e for pair in evaluations if not _is_trial(pair[1]) for e in _eval_results(*pair)
        ] or None,
    )  # fmt: skip
    parts = [
        f"---\n{front.to_yaml()}\n---",
        f"# {markdown_text(name)}",
        f"Backbone weights of a {markdown_text(metadata.architecture)}, {_origin(metadata)}. They "
        f"are meant to be fine-tuned as the backbone of an object detector.",
        recipe.card.about,
        *_training(weights, run),
        "## How to load it",
        "In the folder of this repository"
        + ", for example after `hf download " + repository + " --local-dir weights && cd weights`:",
        *[_section(exported) for exported in result.formats],
        _input(weights),
        *_tables(evaluations),
        "## Limitations",
        "The weights carry whatever biases their training images have. Without fine-tuning, they "
        "are neither a classifier nor a detector. "
        + ("" if evaluations else "This card has no evaluation of them."),
        "## Citation",
        _citation(metadata),
    ]  # fmt: skip
    text = "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"
    return ModelCard(without_secrets(several_lines(text)))


def _library(formats: Sequence[str]) -> str:
    """The library for which the Hub shows a button."""
    return next((name for name in ("timm", "transformers") if name in formats), "dupr")


def _is_trial(results: Results) -> bool:
    """Whether --limit left out test images: its AP is reported with a note but not indexed."""
    data = results.recipe.get("data")
    return isinstance(data, dict) and data.get("test_images") is not None


def _eval_results(own: WeightsResult, results: Results) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="image-segmentation" if metric == "mIoU" else "object-detection",
            dataset_type=one_line(results.protocol),
            dataset_name=one_line(f"{results.protocol}, {results.test.split}"),
            metric_type=metric,
            metric_name=metric,
            metric_value=round(value, 3),
        )
        for metric, value in own.metrics.items()
        if metric in ("AP", "AP50", "AP75", "segm_AP", "mIoU")
    ]


def _origin(metadata: WeightsMetadata) -> str:
    if metadata.imported:
        return f"trained by others, imported with dupr {markdown_text(metadata.dupr_version)}"
    method = {"": "", DUPR: " by Deeply Unsupervised Patch Re-Identification (DUPR)"}.get(
        metadata.method, f" by {metadata.method}"
    )
    return markdown_text(
        f"pre-trained without labels{method} with dupr {metadata.dupr_version}: {metadata.origin}"
    )


def _base_model(weights: Weights, run: RunFacts | None) -> str | None:
    """The Hub repository of the weights, or of the weights that their training started from."""
    start = run.recipe.model.init if run is not None and run.recipe is not None else None
    return repository_of(weights.address) or repository_of(start or "")


def _training(weights: Weights, run: RunFacts | None) -> list[str]:
    metadata = weights.metadata
    if metadata.imported:
        return []
    parts = ["## How it was trained"]
    lines = describe(run, weights) if run is not None else []
    # For weights without their run, only the header is available.
    lines = lines or [f"Views of {metadata.input_size} x {metadata.input_size} pixels"]
    parts.append("\n".join(f"- {markdown_text(line)}" for line in lines))
    if run is not None:
        parts.append(
            "All settings are in `recipe.yaml`: `dupr pretrain recipe.yaml --data SHARDS` repeats "
            "the run."
        )
    return parts


def _citation(metadata: WeightsMetadata) -> str:
    if metadata.imported:
        return "Cite those who trained the weights."
    paper = (
        'Ding, Xie, Xu, Jiang, Li, Luo, Xia, "Deeply Unsupervised Patch Re-Identification for '
        f'Pre-training Object Detectors", IEEE TPAMI 46(3):1348-1361, 2024, DOI {_PAPER}.'
    )
    if metadata.method in (DUPR, ""):
        return paper
    return f"The authors of {markdown_text(metadata.method)}, and for the software: {paper}"


def _section(exported: ExportedFormat) -> str:
    checked = (
        f"Loaded back by {exported.verified_by}; its features differ from dupr's by at most "
        f"{exported.max_difference:.1e} of their largest value."
        if exported.features_compared
        else f"Compared: {exported.verified_by}."
    )
    files = "\n".join(f"- `{name}` sha256 `{digest}`" for name, digest in exported.files.items())
    blocks = "\n\n".join(f"```{language}\n{block}\n```" for language, block in exported.usage)
    return f"### {exported.name}\n\n{blocks}\n\n{checked}\n\n{files}"


def _input(weights: Weights) -> str:
    metadata = weights.metadata
    if metadata.input_range is not None:
        low, high = metadata.input_range
        return (
            f"Input: images of {counted(metadata.input.channels)} in the order of the training "
            f"images, every value v scaled to (v - {low:g}) / {high - low:g} and cut to 0..1; mean "
            f"{list(metadata.input_mean)}, standard deviation {list(metadata.input_std)}."
        )
    return (
        f"Input: {metadata.channel_order} images scaled to 0..1, mean {list(metadata.input_mean)}, "
        f"standard deviation {list(metadata.input_std)}."
    )


def _tables(evaluations: Sequence[tuple[WeightsResult, Results]]) -> list[str]:
    if not evaluations:
        return []
    parts = ["## Evaluation"]
    for own, results in evaluations:
        names = [m for m in ("AP", "AP50", "AP75", "segm_AP", "mIoU") if m in own.metrics]
        rows = [f"| weights | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
        for entry in results.results:
            title = "**this**" if entry is own else markdown_text(Path(entry.weights).name)
            figures = [_figure(entry, name) for name in names]
            rows.append(f"| {title} | {' | '.join(figures)} |")
        parts.append(
            f"{markdown_text(f'{results.protocol}: {results.metric}')}. Fine-tuned on "
            f"{results.train.images} images, tested on {results.test.images}, "
            f"{_seeds(len(results.seeds))}.\n\n" + "\n".join(rows)
        )
        changes = (f"{key} is {now}, not {was}" for key, (was, now) in results.changes.items())
        notes = [*results.notes, *changes]
        if notes:
            parts.append("\n".join(f"- {markdown_text(note)}" for note in notes))
    parts.append(f"Measured with dupr {__version__}.")
    return parts


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def _figure(entry: WeightsResult, name: str) -> str:
    spread = f" ± {entry.deviations[name]:.1f}" if name in entry.deviations else ""
    return f"{entry.metrics[name]:.1f}{spread}" if name in entry.metrics else ""
