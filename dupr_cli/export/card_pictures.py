"""Pictures of the model card: curves of the weights' own evaluation or training, and given files.

Curves hold no images. Everything else that dupr draws shows images of the user, so that it is
published only if the recipe names it.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from dupr_cli.artifacts.files import atomic_file
from dupr_cli.errors import UsageError
from dupr_cli.export.card_evaluations import Evaluations
from dupr_cli.export.run_facts import RunFacts
from dupr_cli.outside_text import markdown_text

PICTURES = "pictures"
_LABEL_CURVE = "labels-saved.png"
_WIDTH = 1280  # pixels


def add_pictures(
    folder: Path, evaluations: Evaluations, run: RunFacts | None, given: Sequence[str]
) -> list[str]:
    """Write the pictures into `folder`/pictures; returns their Markdown, with relative paths.

    given: files of the recipe. Raises UsageError for one that is no PNG or JPEG.
    """
    pictures = folder / PICTURES
    found: list[str] = []

    def new(name: str, shows: str) -> Path:
        pictures.mkdir(exist_ok=True)
        found.append(f"![{shows}]({PICTURES}/{name})")
        return pictures / name

    for number, curve in enumerate(evaluations.curves):
        drawn = curve.folder / _LABEL_CURVE
        if drawn.is_file():
            name = f"labels-saved-{number + 1}.png"
            shutil.copyfile(drawn, new(name, "AP by number of labelled images, with intervals"))
    if run is not None and len(run.retrieval) > 1:
        _draw_retrieval(new("retrieval.png", "Held-out patch retrieval during the training"), run)
    for number, file in enumerate(given):
        source = Path(file)
        suffix = ".png" if source.suffix.lower() == ".png" else ".jpg"
        # The name of the file is its caption; it may hold anything.
        shows = markdown_text(source.stem)
        _shrink(source, new(f"{number + 1:02d}{suffix}", shows))
    return found


def _shrink(source: Path, target: Path) -> None:
    """Write a picture of at most `_WIDTH`, without the metadata that cameras add (places, names).

    Raises UsageError for a file that is no PNG or JPEG.
    """
    try:
        with Image.open(source, formats=("PNG", "JPEG")) as opened:
            picture = opened.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(
            f"{source}: this is no PNG or JPEG file ({error}). (recipe key: card.pictures)"
        ) from error
    picture.thumbnail((_WIDTH, 10 * _WIDTH))
    picture.info.clear()
    with atomic_file(target) as file:
        if target.suffix == ".png":
            picture.save(file, "PNG", optimize=True)
        else:
            picture.save(file, "JPEG", quality=90)


def _draw_retrieval(path: Path, run: RunFacts) -> None:
    """Percent of the patches found again, by step; dashed, the network at the start."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axis = figure.add_subplot()
    for number, level in enumerate(run.retrieval[0][1]):
        points = [(step, of[level]) for step, of in run.retrieval if level in of]
        axis.plot(*zip(*points, strict=True), "o-", color=f"C{number}", markersize=4, label=level,
                  clip_on=False)  # fmt: skip
        if run.retrieval[0][0] == 0:
            axis.axhline(points[0][1], color=f"C{number}", linestyle="--", linewidth=1)
    axis.set_xlabel("step (dashed: before the training)")
    axis.set_ylabel("patches found again, %")
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    highest = max(share for _, of in run.retrieval for share in of.values())
    axis.set_ylim(0, 1.08 * highest or 1)
    axis.grid(alpha=0.3)
    axis.legend()
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=120)
