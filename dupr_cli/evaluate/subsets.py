"""Few labels: the choice of labelled images that a detector is trained on.

A draw is random or keeps the share of every class, and is the same for all weights and seeds. It
is stored, so that others can train on the same images.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dupr_cli.artifacts.files import write_json
from dupr_cli.artifacts.versions import parse_record
from dupr_cli.datasets.labelled import Annotation, LabelledSet
from dupr_cli.errors import UsageError
from dupr_cli.parsing import ParseError, read_limited, validated
from dupr_cli.recipe.evaluate import DetectionDataSection, label_count

FORMAT_VERSION = 1
LABELS_FILE = "labels.json"


def with_objects(images: LabelledSet) -> list[int]:
    """Positions of the images to train on: those with at least one object that is not a crowd.

    Images without objects would train only the background, and the protocols leave them out.
    """
    return [i for i, annotation in enumerate(images.annotations) if (~annotation.crowd).any()]


def require_objects(images: LabelledSet, what: str) -> None:
    """Raises UsageError unless an object is to be found in the images. what: for the message."""
    if all((a.difficult | a.crowd).all() for a in images.annotations):
        raise UsageError(
            f"{images.address}: the {len(images)} images of {what} have no object to find "
            f"(difficult objects do not count)."
        )


def choose_labels(
    images: LabelledSet, data: DetectionDataSection, trial: int | None = None
) -> list[int]:
    """Positions of the images to train on, in the order of the split.

    trial: seed of the trial, if each draws its own images.
    Raises UsageError when `data.labels` names a file that does not fit the images.
    """
    positions = with_objects(images)
    labels = data.labels
    if labels is None:
        return positions
    if isinstance(labels, str) and labels.endswith(".json"):
        return stored_labels(Path(labels), images)
    assert not isinstance(labels, list)
    wanted = label_count(labels, len(positions))
    seed = data.labels_seed if trial is None else [data.labels_seed, trial]
    if data.labels_draw == "random":
        chosen = np.random.default_rng(seed).permutation(len(positions))[:wanted]
    else:
        of_positions = [images.annotations[i] for i in positions]
        chosen = np.array(stratified(of_positions, wanted, seed))
    return sorted(positions[i] for i in chosen)


def draw_note(labelled: LabelledSet, drawn: LabelledSet, data: DetectionDataSection) -> str:
    """What a stratified draw does to the number of objects per image; empty for other draws.

    drawn: the images drawn from those labelled; of the first trial, if each draws its own.
    """
    labels = data.labels
    stored = isinstance(labels, str) and labels.endswith(".json")
    if stored or data.labels_draw == "random" or len(drawn) == len(labelled):
        return ""

    def objects(of: LabelledSet) -> float:
        return float(np.mean([(~annotation.crowd).sum() for annotation in of.annotations]))

    what = "classes" if labelled.annotations[0].mask_sha256 else "objects"
    return (
        f"the {len(drawn)} labelled images are drawn so that every class keeps its share: they "
        f"hold {objects(drawn):.1f} {what} per image, and all labelled images "
        f"{objects(labelled):.1f}. Published few-label results use data.labels_draw=random."
    )


def stratified(annotations: Sequence[Annotation], count: int, seed: int | list[int]) -> list[int]:
    """`count` of the images, drawn so that each class keeps its share.

    Classes are served from the rarest on: each gets random images until it has its share (at least
    one image, while any are left to give). The remaining places go to random images.
    Source: the idea of iterative stratification, Sechidis et al. 2011.
    """
    random = np.random.default_rng(seed)
    order = random.permutation(len(annotations)).tolist()
    names = [set(annotation.names) for annotation in annotations]
    having: dict[str, list[int]] = {}
    for i in order:
        for name in names[i]:
            having.setdefault(name, []).append(i)
    share = count / max(1, len(annotations))
    chosen: set[int] = set()
    for name in sorted(having, key=lambda n: (len(having[n]), n)):
        wanted = max(1, round(share * len(having[name])))
        missing = wanted - sum(i in chosen for i in having[name])
        for i in [i for i in having[name] if i not in chosen][: max(0, missing)]:
            if len(chosen) < count:
                chosen.add(i)
    for i in order:
        if len(chosen) >= count:
            break
        chosen.add(i)
    return sorted(chosen)


def write_labels(folder: Path, images: LabelledSet, data: DetectionDataSection) -> None:
    """labels.json: the images trained on, so that others can use the same."""
    content = {"labels": data.labels, "draw": data.labels_draw, "seed": data.labels_seed}
    write_json(
        folder / LABELS_FILE,
        {
            "format_version": FORMAT_VERSION,
            **content,
            "split": images.split,
            "image_ids": images.ids,
        },
    )


def stored_labels(path: Path, images: LabelledSet) -> list[int]:
    """Positions of the images that a labels.json names. Raises UsageError, naming the file.

    Raises VersionError when a later dupr wrote it.
    """
    try:
        content = parse_record(read_limited(path), FORMAT_VERSION, path)
        wanted = validated(list[str], content["image_ids"])
        known = {image_id: i for i, image_id in enumerate(images.ids)}
        unknown = [image_id for image_id in wanted if image_id not in known]
    except (OSError, ParseError, KeyError) as error:
        raise UsageError(
            f"{path}: not a list of labelled images ({error}). Give a {LABELS_FILE} that an "
            f'evaluation wrote, or JSON such as {{"image_ids": [...]}}.'
        ) from error
    if unknown:
        raise UsageError(
            f"{path}: {len(unknown)} of its {len(wanted)} images are not among those of "
            f"{images.address}, split {images.split}, that have an object; the first is "
            f"{unknown[0]}."
        )
    return sorted(known[image_id] for image_id in set(wanted))
