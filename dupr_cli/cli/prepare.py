"""`dupr prepare`: makes shards; merge, verify, stats and view work on its output."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dupr_cli.cli.command import (
    DryRun,
    Overwrite,
    Planned,
    Recipe,
    Seed,
    Set,
    Workers,
    command,
    overrides,
    parse_task,
    shell_words,
)
from dupr_cli.cli.help_text import Group
from dupr_cli.errors import UsageError
from dupr_cli.outside_text import one_line
from dupr_cli.progress import Reporter

if TYPE_CHECKING:
    from dupr_cli.prepare.stats import Stats
    from dupr_cli.prepare.types import PrepareResult
    from dupr_cli.prepare.verify import Verified
    from dupr_cli.prepare.view import View

_STAGE = "run"

Shards = Annotated[
    str,
    typer.Argument(
        metavar="SHARDS", help="A folder of shards, a tar, or a brace pattern, local or remote."
    ),
]
Split = Annotated[
    str | None, typer.Option("--split", help="Split of the manifest; by default all splits.")
]
Picture = Annotated[
    Path | None,
    typer.Option("--out", metavar="PNG", help="Picture to write; replaces an existing one."),
]


class _StageGroup(Group):
    """A group that runs the stage itself unless its first argument is a subcommand."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args:
            args = ["--help"]
        if args[0] not in self.commands:
            args = [_STAGE, *args]
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, found, rest = super().resolve_command(ctx, args)
        # Users never type the name of the stage's own command, so help does not show it.
        return "" if name == _STAGE else name, found, rest


def add_to(app: typer.Typer) -> None:
    group = typer.Typer(cls=_StageGroup, rich_markup_mode="rich")

    @group.callback()
    def stage() -> None:
        """Make shards from images."""

    command(group, _STAGE, show, following=following)(prepare)
    command(group, "merge", show, following=following)(merge)
    command(group, "verify", show_verified, lambda found: int(not found.whole))(verify)
    command(group, "stats", show_stats)(stats)
    command(group, "view", show_view)(view)
    app.add_typer(group, name="prepare")


def prepare(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Images of any layout: a folder, class folders, archives, shards, VOC, COCO's "
            "JSON, YOLO, a list (.txt, .csv, .parquet), hf://owner/name.",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory for the shards.")],
    recipe: Recipe = None,
    set_: Set = None,
    seed: Seed = None,
    workers: Workers = None,
    task: Annotated[
        str | None,
        typer.Option(
            "--task", metavar="I/N", help="Do part I of N; `dupr prepare merge` joins the parts."
        ),
    ] = None,
    engine: Annotated[
        str, typer.Option("--engine", help="processes, or ray on a running Ray cluster.")
    ] = "processes",
    download: Annotated[
        list[str] | None,
        typer.Option(
            "--download",
            metavar="SET",
            help="Fetch voc2007, voc2012 or coco2017 into SOURCE first. Repeatable.",
        ),
    ] = None,
    mirror: Annotated[
        str | None,
        typer.Option("--mirror", metavar="URL", help="Address from which --download fetches."),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            "--exclude",
            metavar="SET",
            help="Leave out copies of the images of SET, such as a test set. Repeatable.",
        ),
    ] = None,
    exclude_split: Annotated[
        list[str] | None,
        typer.Option(
            "--exclude-split",
            metavar="SPLIT",
            help="Leave out only this split of every --exclude SET. Repeatable.",
        ),
    ] = None,
    append: Annotated[
        bool,
        typer.Option(
            "--append", help="Add shards of new images in SOURCE; existing shards do not change."
        ),
    ] = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    *,
    reporter: Reporter,
) -> PrepareResult | Planned:
    """Make shards from images.

    The kind of SOURCE is detected; override it with --set source.kind=KIND. Images that cannot be
    used are left out and listed in OUT/skipped.jsonl with the reason. After an interruption, the
    same command continues. These commands examine the result:

      dupr prepare verify|stats|view SHARDS

    [bold]Examples[/]

      dupr prepare photos/ shards/

      dupr prepare photos/ shards/ --set image.min_side=512 --set split.held_out=0.01

      dupr prepare VOCdevkit/ voc0712/ --set 'source.splits=\\[trainval, 2007/test]'

      dupr prepare photos/ shards/ --exclude VOCdevkit/VOC2007 --exclude-split test

      dupr prepare list.parquet shards/ --task 3/64   # then: dupr prepare merge shards/
    """
    if engine == "processes" and workers != 1 and not dry_run:
        _start_server_of_workers()
    from dupr_cli import prepare as stage
    from dupr_cli.recipe import PrepareRecipe, load_recipe
    from dupr_cli.recipe.load import Override, apply_overrides

    resolved = load_recipe(PrepareRecipe, recipe or "default", overrides(set_, seed=("seed", seed)))
    if exclude_split and not exclude:
        raise UsageError("--exclude-split needs --exclude SET.")
    if exclude:
        sets = {**resolved.exclude, **dict.fromkeys(exclude, exclude_split or [])}
        resolved = apply_overrides(resolved, [Override("exclude", sets, "--exclude")])
    part = parse_task(task)
    if download:
        from dupr_cli.prepare.download import download_sets

        fetched = download_sets(download, Path(source), mirror, dry_run, reporter)
        if dry_run and fetched.archives:  # the source does not exist yet
            return Planned(resolved, fetched)
    if dry_run:
        plan = stage.plan(resolved, source, out, overwrite=overwrite, append=append)
        return Planned(resolved, plan)
    return stage.run(
        resolved, source, out, workers=workers or 0, overwrite=overwrite, append=append,
        engine=engine, task=part, reporter=reporter,
    )  # fmt: skip


def _start_server_of_workers() -> None:
    """Start the server that workers fork from; it imports their modules while we import ours."""
    # Here, so that `--help` of the other commands does not wait for it.
    from multiprocessing import forkserver

    forkserver.set_forkserver_preload(["dupr_cli.prepare.engines"])
    forkserver.ensure_running()


def merge(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory that all tasks wrote to.")],
    *,
    reporter: Reporter,
) -> PrepareResult:
    """Join the blocks that the tasks of `dupr prepare --task I/N` have written.

    [bold]Example[/]

      dupr prepare merge shards/
    """
    from dupr_cli import prepare as stage

    return stage.merge(out, reporter=reporter)


def show(result: PrepareResult) -> None:
    from dupr_cli.cli.console import print_facts

    facts = [(split, f"{count} images") for split, count in result.samples.items()]
    what = "shards" if result.task is None else f"blocks of task {result.task}"
    facts.append((what, f"{result.shards}, {result.bytes / 1e6:.1f} MB"))
    if result.skipped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in result.skip_reasons.items())
        where = "" if result.task else f" ({result.out}/skipped.jsonl)"
        facts.append(("left out", f"{result.skipped}: {reasons}{where}"))
    if result.excluded is not None:
        facts.append(("excluded", f"{result.excluded} of the images left out"))
    facts.append(("written to", result.out))
    print_facts(facts)


def following(result: PrepareResult, arguments: Mapping[str, object]) -> str:
    if result.task is not None:
        merge = shell_words("dupr", "prepare", "merge", result.out)
        return f"{merge}  # when all tasks have ended"
    return f"{shell_words('dupr', 'plan', result.out)}  # proposes a recipe, with its cost"


def verify(shards: Shards, workers: Workers = None, *, reporter: Reporter) -> Verified:
    """Read every shard and every sample, and name what is damaged.

    This compares shards with the manifest (length, sha256) and indexes with tars, and decodes
    every image. The exit code is 1 when anything is damaged.

    [bold]Example[/]

      dupr prepare verify shards/
    """
    from dupr_cli.prepare.verify import verify_shards

    return verify_shards(shards, reporter, workers or 0)


def show_verified(found: Verified) -> None:
    from dupr_cli.cli.console import print_facts, print_text

    for problem in found.problems:
        print_text(one_line(problem))
    verdict = "whole" if found.whole else f"{len(found.problems)} problems"
    print_facts(
        [("shards", str(found.shards)), ("samples", str(found.samples)), ("state", verdict)]
    )


def stats(shards: Shards, split: Split = None, out: Picture = None, *, reporter: Reporter) -> Stats:
    """Measure the images of shards: sizes, aspects, colours, classes, boxes.

    [bold]Example[/]

      dupr prepare stats shards/ --out stats.png
    """
    from dupr_cli.prepare.stats import draw_stats, measure

    found = measure(shards, split, reporter)
    if out is not None:
        draw_stats(found, out)
    return found


def show_stats(found: Stats) -> None:
    from dupr_cli.cli.console import print_facts, print_text
    from dupr_cli.prepare.stats import as_facts

    print_facts(as_facts(found))
    if found.kept is not None:
        print_text("\nFor the recipe of dupr pretrain:")
        for line in found.kept.recipe:
            print_text(line)


def view(
    shards: Shards,
    out: Annotated[Path, typer.Option("--out", metavar="PNG", help="Picture to write.")],
    split: Split = None,
    count: Annotated[int, typer.Option("--count", min=1, max=400, help="Number of images.")] = 40,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed that selects the images.")] = 0,
) -> View:
    """Draw a contact sheet of shards, with the boxes of labelled images.

    [bold]Example[/]

      dupr prepare view shards/ --out sheet.png
    """
    from dupr_cli.prepare.view import draw_sheet

    return draw_sheet(shards, split, out, count, seed)


def show_view(found: View) -> None:
    from dupr_cli.cli.console import print_facts

    facts = [("shows", f"{len(found.keys)} images, drawn at random")]
    if found.pixels is not None:
        from dupr_cli.artifacts.pixel_formats import how_shown

        facts.append(("colours", how_shown(found.pixels)))
    print_facts([*facts, ("written to", found.path)])
