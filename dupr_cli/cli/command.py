"""What all commands share: global options, error messages, exit codes, JSON.

A command is a function that returns its result; `command` registers it, adds the global options to
its signature, turns a `DuprError` into its message and exit code, and prints the result, as JSON
with --json and by the command's own `show` otherwise.

Options that several commands share are fields of a dataclass. A command takes it as one parameter,
and `command` puts its fields into the signature that Typer reads.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import inspect
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, NoReturn, TypeGuard, TypeVar, get_type_hints

import typer

from dupr_cli.errors import DuprError, RunError
from dupr_cli.progress import Reporter

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from dupr_cli.recipe import Section

T = TypeVar("T")

GLOBAL = "Global"
COMMON = "Common"

Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Only warnings and errors.", rich_help_panel=GLOBAL)
]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="More detail.", rich_help_panel=GLOBAL)
]
Traceback = Annotated[
    bool,
    typer.Option("--traceback", help="Python's traceback with an error.", rich_help_panel=GLOBAL),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json",
        help="The result as JSON on standard output, nothing else.",
        rich_help_panel=GLOBAL,
    ),
]

Recipe = Annotated[
    str | None,
    typer.Option("--recipe", "-r", help="A recipe file, or the name of a shipped one."),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a recipe key, for example data.workers=4. Repeatable.",
        rich_help_panel=COMMON,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", help="Overrides the recipe's seed.", rich_help_panel=COMMON),
]
Device = Annotated[
    str,
    typer.Option("--device", help="auto, cpu, cuda or cuda:N.", rich_help_panel=COMMON),
]
Workers = Annotated[
    int | None,
    typer.Option("--workers", help="Processes that load images.", rich_help_panel=COMMON),
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace what is at the output.", rich_help_panel=COMMON),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Print the resolved recipe and the plan, and do nothing.",
        rich_help_panel=COMMON,
    ),
]


@dataclasses.dataclass(frozen=True)
class Common:
    """What every command that takes weights and a recipe offers."""

    recipe: Recipe = None
    set_: Set = None
    seed: Seed = None
    device: Device = "auto"
    workers: Workers = None
    overwrite: Overwrite = False
    dry_run: DryRun = False


@dataclasses.dataclass(frozen=True)
class Planned:
    """The result of --dry-run: the resolved recipe and the plan."""

    recipe: Section
    plan: DataclassInstance


@dataclasses.dataclass
class Globals:
    """The global options, as given before or after the command's name."""

    quiet: bool = False
    verbose: bool = False
    traceback: bool = False
    json: bool = False


# Set by the root command's options, before a command runs.
root_globals = Globals()


def make_reporter(options: Globals) -> Reporter:
    from dupr_cli.cli.console import ConsoleReporter

    return ConsoleReporter(-1 if options.quiet or options.json else 1 if options.verbose else 0)


def command(
    application: typer.Typer,
    command_name: str,
    show: Callable[[T], None],
    exit_code: Callable[[T], int] | None = None,
) -> Callable[[Callable[..., T | Planned | None]], Callable[..., None]]:
    """Register a function as a command of `application`.

    The function may take `reporter: Reporter` besides its options, and dataclasses of options.
    show: prints its result for people; a `Planned` is printed here. exit_code: of the process after
    the result is printed, 0 by default.
    """

    def register(function: Callable[..., T | Planned | None]) -> Callable[..., None]:
        signature = inspect.signature(function)
        # Return types stay unevaluated: they are imported for type checkers only.
        declared = [
            p.replace(annotation=eval(p.annotation, function.__globals__))
            for p in signature.parameters.values()
            if p.name != "reporter"
        ]
        groups = {p.name: p.annotation for p in declared if _are_options(p.annotation)}
        own = [
            option
            for p in declared
            for option in (_options_of(groups[p.name]) if p.name in groups else [p])
        ]
        extra = [("quiet", Quiet), ("verbose", Verbose), ("traceback", Traceback), ("json", Json)]
        added = [
            inspect.Parameter(
                option, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind
            )
            for option, kind in extra
        ]

        @functools.wraps(function)
        def wrapper(**arguments: object) -> None:
            options = Globals(
                **{
                    field.name: bool(arguments.pop(field.name, False))
                    or bool(getattr(root_globals, field.name))
                    for field in dataclasses.fields(Globals)
                }
            )
            if "reporter" in signature.parameters:
                arguments["reporter"] = make_reporter(options)
            for name, group in groups.items():
                fields = [field.name for field in dataclasses.fields(group)]
                arguments[name] = group(**{field: arguments.pop(field) for field in fields})
            try:
                result = function(**arguments)
                _print_result(result, show, options.json)
                if exit_code is not None and result is not None and not isinstance(result, Planned):
                    sys.exit(exit_code(result))
            except BrokenPipeError:
                # Whoever read the output has enough of it; nor may the interpreter complain.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                sys.exit(1)
            except (DuprError, OSError, MemoryError, KeyboardInterrupt) as error:
                _fail(error, options.traceback)

        wrapper.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in [*own, *added]}
        application.command(command_name)(wrapper)
        return wrapper

    return register


def _are_options(kind: object) -> TypeGuard[type[DataclassInstance]]:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _options_of(group: type[DataclassInstance]) -> list[inspect.Parameter]:
    """The fields of a dataclass as parameters of a function."""
    kinds = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=field.default,
            annotation=kinds[field.name],
        )
        for field in dataclasses.fields(group)
    ]


def _print_result(result: T | Planned | None, show: Callable[[T], None], as_json: bool) -> None:
    if result is None:  # this process has nothing to say
        return
    if as_json:
        from dupr_cli.cli.console import print_json

        print_json(_plain(result))
    elif isinstance(result, Planned):
        from dupr_cli.cli.plan import show_plan

        show_plan(result.recipe, result.plan)
    else:
        show(result)


def _plain(result: object) -> object:
    """A result in JSON's own types."""
    from dupr_cli.recipe import Section

    if isinstance(result, Planned):
        return {"recipe": _plain(result.recipe), "plan": _plain(result.plan)}
    if isinstance(result, Section):
        return result.model_dump(mode="json")
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        return dataclasses.asdict(result)
    return result


def _fail(error: BaseException, traceback: bool) -> NoReturn:
    from dupr_cli.cli.launch import report_error

    if traceback:
        import traceback as module

        module.print_exception(error)
    if isinstance(error, KeyboardInterrupt):
        report_error("interrupted; the same command goes on from what is finished.")
        sys.exit(128 + signal.SIGINT)
    if isinstance(error, OSError):
        error = _explain_os_error(error)
    if isinstance(error, MemoryError):
        error = RunError("out of memory. Use smaller batches or images, or fewer workers.")
    report_error(str(error))
    sys.exit(error.exit_code if isinstance(error, DuprError) else 1)


def _explain_os_error(error: OSError) -> DuprError:
    where = f"{error.filename}: " if error.filename else ""
    advice = {
        errno.ENOSPC: "Free some space and give the same command again; it goes on.",
        errno.EFBIG: "The limit on file sizes (ulimit -f) is in the way; raise it and go on.",
        errno.EDQUOT: "Free some space and give the same command again; it goes on.",
        errno.EROFS: "Give an output on a file system that can be written.",
        errno.EACCES: "Give a place that you may read and write.",
        errno.EPERM: "Give a place that you may read and write.",
    }.get(error.errno or 0, "Nothing that was finished before is lost.")
    return RunError(f"{where}{error.strerror or error}. {advice}")


def overrides(given: Sequence[str] | None, **keys: tuple[str, object | None]) -> list[str]:
    """--set options, followed by those that options of their own stand for.

    keys: option name = (recipe key, value); None means the option was not given.
    """
    extra = [f"{key}={value}" for key, value in keys.values() if value is not None]
    return [*(given or []), *extra]
