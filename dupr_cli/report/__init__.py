"""`dupr report`: one HTML page about any number of runs, evaluations and studies.

sources.py recognises and reads what is given, summary.py says in words what it means, figures.py
draws curves and galleries.py pictures, and page.html.j2 is the page. The page needs nothing beside
itself: styles, figures and pictures are in it, and it has no script.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dupr_cli.artifacts.files import write_bytes
from dupr_cli.errors import UsageError
from dupr_cli.progress import Reporter, SilentReporter
from dupr_cli.report.galleries import evaluation_gallery, run_gallery
from dupr_cli.report.page import GENERATOR, render
from dupr_cli.report.sources import open_sources
from dupr_cli.runtime.devices import choose_device

_HEAD_BYTES = 1000  # of a page, within which its generator is named


@dataclass(frozen=True)
class Report:
    """The page, and what it is about, by the names that it uses."""

    path: str
    bytes: int
    runs: list[str]
    results: list[str]
    labels: list[str]
    studies: list[str]


def run(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    shards: str | Path | None = None,
    images: Sequence[Path] = (),
    title: str = "",
    device: str = "auto",
    reporter: Reporter | None = None,
) -> Report:
    """Write the page.

    sources: run directories, evaluations, comparisons over labels and studies. shards, images: for
    pictures of views and matches of the runs. Raises UsageError for anything else, and when `out`
    is a file that this function did not write.
    """
    reporter, out = reporter or SilentReporter(), Path(out)
    _require_own(out)
    found = open_sources([Path(source) for source in sources])
    galleries = []
    if shards is not None or images:
        chosen = choose_device(device)
        with reporter.task("draw galleries", len(found.runs), "runs") as progress:
            for each in found.runs:
                galleries += run_gallery(each, shards, images, chosen)
                progress.advance()
    pictures, notes = evaluation_gallery(found)
    page = render(found, [*galleries, *pictures], title, notes).encode()
    out.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(out, page)
    return Report(
        str(out),
        len(page),
        [each.name for each in found.runs],
        [each.name for each in found.results],
        [each.name for each in found.labels],
        [each.name for each in found.studies],
    )


def _require_own(out: Path) -> None:
    """Raises UsageError unless `out` is a new name, or a page that was written here before."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--out {out}: a page is written; give a name that ends in .html.")
    if out.is_dir():
        raise UsageError(f"--out {out} is a directory; give the name of a file.")
    if out.exists():
        with out.open("rb") as file:
            if GENERATOR.encode() not in file.read(_HEAD_BYTES):
                raise UsageError(f"--out {out}: dupr did not write this file. Give another name.")
