"""The pictures of a report: views and matches of runs, and detections of evaluations.

Pictures of runs are drawn from shards or images that are given with the report; a run directory
holds none of its images. Those of evaluations are the ones in their folders. Pictures are inlined
as JPEG, which needs a tenth of a PNG's bytes.
"""

from __future__ import annotations

import base64
import io
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from dupr_cli.artifacts.pixel_formats import AnyImage
from dupr_cli.artifacts.shards import open_shards
from dupr_cli.errors import UsageError
from dupr_cli.inspect.matches import draw_matches
from dupr_cli.inspect.network import Network, open_network, read_image
from dupr_cli.inspect.views import draw_views
from dupr_cli.pretrain.data import decode, held_out
from dupr_cli.recipe import PretrainRecipe, load_recipe
from dupr_cli.report.sources import Run, Sources

_WIDTH = 1280  # pixels of a picture in the page
_QUALITY = 80
# Boxes and texts of an evaluation's sheet cannot be read any smaller.
_SHEET_WIDTH = 1900
# Pages are sent by mail, where 10 MB is a usual limit; curves and tables need the rest.
_EVALUATION_BYTES = 6_000_000
_EVALUATION_PICTURES = {
    "detections.png": "Detections beside the ground truth",
    "predictions.png": "Predicted classes of pixels beside the ground truth",
}
_VIEWS, _IMAGES = 2, 2  # images of a gallery


@dataclass(frozen=True)
class Inlined:
    """A picture in the page. uri: data:image/jpeg;base64,... alt: what it shows, in words."""

    title: str
    alt: str
    uri: str
    width: int
    height: int


def inlined(path: Path, title: str, alt: str, width: int = _WIDTH) -> Inlined:
    """Read a picture and shrink it to this width."""
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    if picture.width > width:
        height = max(1, round(picture.height * width / picture.width))
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=_QUALITY, optimize=True)
    uri = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    return Inlined(title, alt, uri, picture.width, picture.height)


def evaluation_gallery(sources: Sources) -> tuple[list[Inlined], list[str]]:
    """Detections, or predicted classes of pixels, of all evaluations that have such a picture.

    They are added while there is room for them in the page. Also returns notes on those that are
    left out. Raises nothing: a picture that cannot be read is left out like one that is missing.
    """
    found: list[Inlined] = []
    notes: list[str] = []
    room = _EVALUATION_BYTES
    for each in sources.results:
        for name, shows in _EVALUATION_PICTURES.items():
            path = each.path / name
            if not path.is_file():
                continue
            try:
                picture = inlined(path, f"{each.name}: {shows.lower()}", shows, _SHEET_WIDTH)
            except (OSError, ValueError, Image.DecompressionBombError) as error:
                notes.append(f"{each.name}: {name} cannot be read ({error}).")
                continue
            if len(picture.uri) > room:
                notes.append(f"{each.name}: {name} is left out to keep this page small.")
                continue
            room -= len(picture.uri)
            found.append(picture)
    return found, notes


def run_gallery(
    run: Run, shards: str | Path | None, images: Sequence[Path], device: torch.device
) -> list[Inlined]:
    """Views of held-out images, and matches of the first and the last checkpoint that are kept.

    Without shards only matches of `images`; without both nothing. Raises UsageError when the run
    has no checkpoint, or the shards or images do not fit it.
    """
    if shards is None and not images:
        return []
    if not run.checkpoints:
        raise UsageError(f"{run.path}: it has no checkpoint yet, so no matches can be drawn.")
    found = []
    name = f"Run {run.title}"
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "picture.png"
        if shards is not None:
            recipe = load_recipe(PretrainRecipe, str(run.path / "recipe.yaml"))
            draw_views(picture, recipe, shards, _VIEWS)
            found.append(inlined(picture, f"{name}: views", "Pairs of views with their patches"))
        kept = [run.checkpoints[0], run.checkpoints[-1]]
        for checkpoint in dict.fromkeys(kept):
            network = open_network(checkpoint, device)
            draw_matches(picture, network, _pictured(network, shards, images, run), count=1)
            step = int(checkpoint.name.removeprefix("step-"))
            alt = "Heat maps of the similarity of patches over another view"
            found.append(inlined(picture, f"{name}: matches at step {step:,}", alt))
    return found


def _pictured(
    network: Network, shards: str | Path | None, images: Sequence[Path], run: Run
) -> list[tuple[str, AnyImage]]:
    """The given images, or the first held-out ones of the shards."""
    if images:
        return [(path.name, read_image(path, network.taken.input.pixels)) for path in images]
    assert shards is not None
    opened = open_shards(str(shards), str(run.recipe.get("data.split", "train")))
    wanted = run.recipe.get("data.holdout")
    numbers = held_out(len(opened), wanted if isinstance(wanted, int) else 0)
    chosen = [*map(int, numbers), *range(len(opened))][:_IMAGES]
    return [(opened[number].key, decode(opened[number])) for number in chosen]
