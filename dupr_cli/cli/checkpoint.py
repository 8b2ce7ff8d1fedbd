"""`dupr checkpoint`: lists, verifies and compares checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dupr_cli.cli.command import command, loading
from dupr_cli.cli.help_text import Group
from dupr_cli.outside_text import one_line
from dupr_cli.progress import Reporter

if TYPE_CHECKING:
    from dupr_cli.artifacts.checkpoint_inspection import (
        CheckpointDiff,
        CheckpointList,
        TensorDifference,
        Verified,
    )

_MOST = 20  # differing tensors printed


def add_to(app: typer.Typer) -> None:
    group = typer.Typer(cls=Group, no_args_is_help=True, rich_markup_mode="rich")

    @group.callback()
    def checkpoint() -> None:
        """List, verify and compare the checkpoints of runs."""

    command(group, "list", show_list)(list_checkpoints)
    command(group, "verify", show_verified, lambda found: int(not found.whole))(verify)
    command(group, "diff", show_diff, lambda found: int(not found.identical))(diff)
    app.add_typer(group, name="checkpoint")


def list_checkpoints(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
) -> CheckpointList:
    """List the checkpoints of a run: step, size, time, state, and which one `latest` names.

    The state is judged by the sizes of the files; `dupr checkpoint verify` reads them.

    [bold]Example[/]

      dupr checkpoint list runs/smoke
    """
    with loading():
        from dupr_cli.artifacts.checkpoint_inspection import list_run

    return list_run(run)


def verify(
    addresses: Annotated[
        list[Path],
        typer.Argument(metavar="RUN_OR_CHECKPOINT...", help="Run directories or checkpoints."),
    ],
    *,
    reporter: Reporter,
) -> Verified:
    """Read every file of the checkpoints and compare its sha256 with the recorded one.

    Exit codes: 0 all checkpoints are whole, 1 one is damaged, 2 an address is
    neither a run nor a checkpoint.

    [bold]Examples[/]

      dupr checkpoint verify runs/smoke

      dupr checkpoint verify runs/smoke/checkpoints/step-00000500
    """
    with loading():
        from dupr_cli.artifacts import checkpoint_inspection

    return checkpoint_inspection.verify(addresses, reporter)


def diff(
    a: Annotated[
        Path,
        typer.Argument(metavar="A", help="A checkpoint, or a run (its newest whole checkpoint)."),
    ],
    b: Annotated[Path, typer.Argument(metavar="B", help="The checkpoint or run to compare.")],
    *,
    reporter: Reporter,
) -> CheckpointDiff:
    """Compare two checkpoints: every tensor bit for bit, their state, and their runs' recipes.

    Exit codes, as in diff(1): 0 all tensors are identical, 1 some differ,
    2 they cannot be compared. State and recipe do not affect the code.

    [bold]Examples[/]

      dupr checkpoint diff runs/a runs/b

      dupr checkpoint diff runs/a runs/b/checkpoints/step-00000100 --json
    """
    with loading():
        from dupr_cli.artifacts import checkpoint_inspection

    return checkpoint_inspection.diff(a, b, reporter)


def show_list(listed: CheckpointList) -> None:
    from dupr_cli.cli.console import print_table, print_text

    rows = [
        (
            "?" if facts.step is None else str(facts.step),
            f"{facts.bytes / 1e6:.1f}",
            facts.written[:19].replace("T", " "),
            "; ".join(facts.problems) or "whole",
            "latest" if facts.latest else "",
        )
        for facts in listed.checkpoints
    ]
    if rows:
        print_table(("step", "size (MB)", "written", "state", ""), rows, numbers=2)
    for note in _notes(listed):
        print_text(one_line(note))


def show_verified(found: Verified) -> None:
    from dupr_cli.cli.console import print_text

    for listed in found.addresses:
        lines = [
            f"{facts.path}  {'; '.join(facts.problems) or 'ok'}" for facts in listed.checkpoints
        ]
        print_text("\n".join(map(one_line, [*lines, *_notes(listed)])))


def _notes(listed: CheckpointList) -> list[str]:
    """Notes on a run besides its list of checkpoints."""
    notes = []
    if not listed.checkpoints:
        notes.append(
            f"{listed.path} has no checkpoint; a run writes its first one after "
            f"train.checkpoint_every steps"
        )
    if listed.latest and not any(facts.latest for facts in listed.checkpoints):
        notes.append(f"{listed.path}: `latest` names {listed.latest}, which does not exist")
    notes += [
        f"{path}  left over; may be deleted unless a run is writing here now"
        for path in listed.leftovers
    ]
    return notes


def show_diff(found: CheckpointDiff) -> None:
    from dupr_cli.cli.console import print_facts, print_table, print_text

    print_facts([("first", found.a), ("second", found.b)])
    print_text(f"\n{found.summary}")
    if found.differing:
        rows = [_tensor_row(difference) for difference in found.differing[:_MOST]]
        print_table(("tensor", "values differ", "by at most"), rows)
        more = len(found.differing) - _MOST
        if more > 0:
            print_text(f" and {more} more; --json lists all")
    for title, differences in (("state.json", found.state), ("recipe.yaml", found.recipe)):
        if differences is None:
            print_text(f"\n{title}: not compared, because a checkpoint's run does not have one")
        elif differences:
            print_text(f"\n{title}:")
            rows = [(each.key, str(each.a), str(each.b)) for each in differences]
            print_table(("key", "first", "second"), rows)
        else:
            print_text(f"\n{title}: the same")


def _tensor_row(difference: TensorDifference) -> tuple[str, str, str]:
    if difference.differing is None:
        return difference.name, _mismatch(difference), ""
    largest = "not finite" if difference.largest is None else f"{difference.largest:.2g}"
    return difference.name, f"{difference.differing}/{difference.values}", largest


def _mismatch(difference: TensorDifference) -> str:
    from dupr_cli.artifacts.checkpoint_inspection import ABSENT

    if difference.b == ABSENT:
        return "only in first"
    if difference.a == ABSENT:
        return "only in second"
    return f"{difference.a}, {difference.b}"
