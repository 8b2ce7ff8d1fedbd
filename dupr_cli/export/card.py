"""The files that go to the Hub beside the weights: model card, pictures, the run's recipe, results.

Weights and evaluations may be of others, so what they say is shown as text and never as Markdown.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from dupr_cli.addresses import without_secrets
from dupr_cli.artifacts.files import write_text
from dupr_cli.artifacts.hub_weights import repository_of
from dupr_cli.artifacts.pixel_formats import counted
from dupr_cli.artifacts.results import RESULTS
from dupr_cli.artifacts.run import RECIPE_FILE
from dupr_cli.artifacts.weights import Weights, WeightsMetadata
from dupr_cli.export.card_evaluations import (
    Evaluations,
    find_evaluations,
    index_of,
    tables_of,
)
from dupr_cli.export.card_pictures import add_pictures
from dupr_cli.export.formats import ExportFormat, HubFolder, LoadedByName
from dupr_cli.export.run_facts import RunFacts, describe, facts_of
from dupr_cli.export.types import ExportedFormat, ExportResult, PushOptions
from dupr_cli.outside_text import markdown_text, one_line, several_lines, tar_key
from dupr_cli.recipe import ExportRecipe
from dupr_cli.recipe.export import CardSection
from dupr_cli.recipe.pretrain import DUPR

CARD = "README.md"
# Those with the most users first: the Hub shows the beginning of a card.
_FIRST = ("timm", "transformers", "torchvision")
_LICENSE_TEXTS = {
    "apache-2.0": "https://www.apache.org/licenses/LICENSE-2.0",
    "mit": "https://opensource.org/license/mit",
    "bsd-3-clause": "https://opensource.org/license/bsd-3-clause",
    "gpl-3.0": "https://www.gnu.org/licenses/gpl-3.0.html",
    "agpl-3.0": "https://www.gnu.org/licenses/agpl-3.0.html",
    "cc0-1.0": "https://creativecommons.org/publicdomain/zero/1.0/",
    **{
        f"cc-{terms}-4.0": f"https://creativecommons.org/licenses/{terms}/4.0/"
        for terms in ("by", "by-sa", "by-nc", "by-nd", "by-nc-sa", "by-nc-nd")
    },
}
PAPER = """@article{ding2024dupr,
  title   = {Deeply Unsupervised Patch Re-Identification for Pre-training Object Detectors},
  author  = {Ding, Jian and Xie, Enze and Xu, Hang and Jiang, Chenhan and Li, Zhenguo and Luo, \
Ping and Xia, Gui-Song},
  journal = {IEEE Transactions on Pattern Analysis and Machine Intelligence},
  volume  = {46},
  number  = {3},
  pages   = {1348--1361},
  year    = {2024},
  doi     = {10.1109/TPAMI.2022.3164911}
}"""


def write_companions(
    folder: Path,
    result: ExportResult,
    weights: Weights,
    recipe: ExportRecipe,
    push: PushOptions,
    places: dict[ExportFormat, str],
    results: Sequence[Path],
) -> None:
    """Write README.md, pictures, recipe.yaml and results/*.json into the folder to be pushed.

    places: the folder of each format, as of `folders_of`. results: folders of evaluations given by
    hand. Raises UsageError for any other folder, and for pictures that cannot be read.
    """
    evaluations = find_evaluations(weights, result, results)
    for number, each in enumerate(evaluations.all):
        (folder / "results").mkdir(exist_ok=True)
        each.results.write(folder / "results")
        name = f"{number + 1:02d}-{tar_key(each.results.protocol).replace('/', '_')}.json"
        (folder / "results" / RESULTS).replace(folder / "results" / name)
    run = facts_of(weights)
    if run is not None:
        shutil.copyfile(run.folder / RECIPE_FILE, folder / RECIPE_FILE)
    pictures = add_pictures(folder, evaluations, run, recipe.card.pictures)
    hub = {
        chosen: HubFolder(push.repository, push.revision, place) for chosen, place in places.items()
    }
    card = model_card(result, weights, recipe, hub, evaluations, run, pictures)
    write_text(folder / CARD, str(card))


def model_card(
    result: ExportResult,
    weights: Weights,
    recipe: ExportRecipe,
    hub: dict[ExportFormat, HubFolder],
    evaluations: Evaluations,
    run: RunFacts | None,
    pictures: Sequence[str],
) -> ModelCard:
    """The README.md: front matter, how to load it, results, origin, limitations, licence.

    hub: the formats and their places. pictures: Markdown.
    """
    metadata, repository = weights.metadata, next(iter(hub.values())).repository
    name = repository.rpartition("/")[2]
    index = index_of(evaluations)
    front = ModelCardData(
        library_name=_library(hub),
        pipeline_tag="image-feature-extraction",
        license=recipe.card.license,
        license_name=recipe.card.license_name or None,
        license_link=recipe.card.license_link or None,
        datasets=recipe.card.datasets or None,
        base_model=recipe.card.base_model or _base_model(weights, run),
        tags=["dupr", *([] if metadata.imported else ["self-supervised"]), "object-detection",
              "backbone", one_line(metadata.architecture), *map(one_line, recipe.card.tags)],
        model_name=name if index else None,
        eval_results=index or None,
    )  # fmt: skip
    parts = [
        f"---\n{front.to_yaml()}\n---",
        f"# {markdown_text(name)}",
        f"Backbone weights of a {markdown_text(metadata.architecture)}, {_origin(metadata)}. They "
        f"are meant to be fine-tuned as the backbone of an object detector.",
        recipe.card.about,
        "## How to load it",
        *_loading(result, weights, hub),
        _input(weights),
        *tables_of(evaluations),
        *pictures,
        *_training(weights, run),
        "## Limitations",
        "The weights carry whatever biases their training images have. Without fine-tuning, they "
        "are neither a classifier nor a detector. "
        + ("" if evaluations.all else "This card has no evaluation of them."),
        "## Licence",
        _license(recipe.card),
        "## Citation",
        _citation(metadata),
        "## Files",
        *map(_files, result.formats),
    ]  # fmt: skip
    text = "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"
    return ModelCard(without_secrets(several_lines(text)))


def _library(hub: dict[ExportFormat, HubFolder]) -> str:
    """The library for which the Hub shows a button; it looks for the files at the top."""
    top = {chosen.name for chosen, place in hub.items() if not place.folder}
    if "timm" in top:
        return "timm"
    return "transformers" if top & {"transformers", "d-fine", "rt-detr"} else "dupr"


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
        parts += _retrieval(run)
        parts.append(
            "All settings are in `recipe.yaml`: `dupr pretrain recipe.yaml --data SHARDS` repeats "
            "the run."
        )
    return parts


def _retrieval(run: RunFacts) -> list[str]:
    """A table of held-out patch retrieval: the weights, and the network before the training."""
    if not run.retrieval:
        return []
    (first, before), (last, after) = run.retrieval[0], run.retrieval[-1]
    start = f"step 0, {run.start}" if first == 0 and last > 0 else None
    rows = [
        f"| level | patches to choose from |{f' {markdown_text(start)} |' if start else ''} step "
        f"{last:,} |",
        f"|---|---|---|{'---|' if start else ''}",
    ]
    for level, share in sorted(after.items()):
        pool = run.log.get(f"retrieval_pool/{level}")
        cells = [
            markdown_text(level),
            "" if pool is None else f"{pool:,.0f}",
            *([f"{before[level]:.1f} %" if level in before else ""] if start else []),
            f"{share:.1f} %",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return [
        "Held-out patch retrieval: how often a patch's nearest neighbour in the other views is the "
        "same patch.\n\n" + "\n".join(rows)
    ]


def _license(card: CardSection) -> str:
    if card.license_name:
        return f"[{markdown_text(card.license_name)}]({card.license_link})"
    if card.license == "other":
        return (
            "The author of this repository has not stated a licence of the weights. Without one "
            "nobody else may use them: ask for it before you do."
        )
    name = markdown_text(card.license)
    text = _LICENSE_TEXTS.get(card.license)
    return f"[{name}]({text})" if text else name


def _citation(metadata: WeightsMetadata) -> str:
    if metadata.imported:
        return "Cite those who trained the weights."
    block = f"```bibtex\n{PAPER}\n```"
    if metadata.method in (DUPR, ""):
        return block
    return f"Cite the authors of {markdown_text(metadata.method)}, and for the software:\n\n{block}"


def _loading(
    result: ExportResult, weights: Weights, hub: dict[ExportFormat, HubFolder]
) -> list[str]:
    """One section for each format: by name where Python loads it so, else from a download."""
    by_name, from_files = [], []
    exported = {each.name: each for each in result.formats}
    for chosen in sorted(hub, key=lambda of: _FIRST.index(of.name) if of.name in _FIRST else 9):
        if isinstance(chosen, LoadedByName):
            by_name.append(_section(chosen.name, chosen.hub_usage(weights, hub[chosen])))
        else:
            from_files.append(_section(chosen.name, exported[chosen.name].usage))
    if from_files:
        place = next(iter(hub.values()))
        revision = f" --revision {place.revision}" if place.revision else ""
        from_files.insert(
            0,
            f"The following take files: first run `hf download {place.repository}{revision} "
            f"--local-dir weights && cd weights`.",
        )
    return by_name + from_files


def _section(name: str, usage: Sequence[tuple[str, str]]) -> str:
    blocks = "\n\n".join(f"```{language}\n{block}\n```" for language, block in usage)
    return f"### {name}\n\n{blocks}"


def _files(exported: ExportedFormat) -> str:
    checked = (
        f"loaded back by {exported.verified_by}; its features differ from dupr's by at most "
        f"{exported.max_difference:.1e} of their largest value"
        if exported.features_compared
        else f"compared: {exported.verified_by}"
    )
    files = "\n".join(f"- `{name}` sha256 `{digest}`" for name, digest in exported.files.items())
    return f"{exported.name}, {checked}:\n\n{files}"


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
