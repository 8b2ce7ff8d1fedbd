"""Shared parts of all commands: global options, error messages, exit codes, JSON.

A command is a function that returns its result. `command` registers it, adds the global options to
its signature, turns a `DuprError` into its message and exit code, and prints the result: as JSON
with --json, otherwise through the command's own `show`.

Options that several commands share are fields of a dataclass. A command takes the dataclass as one
parameter, and `command` puts its fields into the signature that Typer reads.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import inspect
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import (
    TYPE_CHECKING,
    Annotated,
    NoReturn,
    TypeGuard,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

import typer
from typer.models import OptionInfo

from dupr_cli.cli.help_text import Command, help_text, placeholder
from dupr_cli.errors import DuprError, RunError, UsageError
from dupr_cli.progress import Reporter

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from dupr_cli.recipe import Section
    from dupr_cli.recipe.load import Override

T = TypeVar("T")

GLOBAL = "Global"
COMMON = "Common"

Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Print only warnings and errors.", rich_help_panel=GLOBAL),
]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Print more detail.", rich_help_panel=GLOBAL)
]
Traceback = Annotated[
    bool,
    typer.Option(
        "--traceback", help="Print Python's traceback with an error.", rich_help_panel=GLOBAL
    ),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print only the result, as JSON, on standard output.",
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
    typer.Option("--seed", help="Override the recipe's seed.", rich_help_panel=COMMON),
]
Device = Annotated[
    str,
    typer.Option("--device", help="auto, cpu, cuda or cuda:N.", rich_help_panel=COMMON),
]
Workers = Annotated[
    int | None,
    typer.Option("--workers", help="Number of processes that load images.", rich_help_panel=COMMON),
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace an existing output.", rich_help_panel=COMMON),
]
Profile = Annotated[
    bool,
    typer.Option(
        "--profile",
        help="Also record a few steps, as a trace and a table of the top costs in OUT/profile.",
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Print the resolved recipe and the plan, and change nothing.",
        rich_help_panel=COMMON,
    ),
]


@dataclasses.dataclass(frozen=True)
class Common:
    """Options of every command that takes weights and a recipe."""

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


# What torch says when memory runs out on a GPU and on a CPU; it raises a RuntimeError for both.
# The last is said of a library that does not fit into a limit of memory (ulimit -v).
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "failed to map segment")

# Set by the root command's options, before a command runs.
root_globals = Globals()

# The global options of the command that runs.
_given = Globals()


def make_reporter(options: Globals) -> Reporter:
    from dupr_cli.cli.console import ConsoleReporter

    return ConsoleReporter(-1 if options.quiet or options.json else 1 if options.verbose else 0)


@contextmanager
def loading() -> Iterator[None]:
    """Say on a terminal that a stage is being loaded: PyTorch takes seconds."""
    if _given.quiet or _given.json or "torch" in sys.modules:
        yield
        return
    from dupr_cli.cli.console import passing_line

    with passing_line("loading PyTorch ..."):
        yield


def command(
    application: typer.Typer,
    command_name: str,
    show: Callable[[T], None],
    exit_code: Callable[[T], int] | None = None,
    following: Callable[[T, Mapping[str, object]], str | None] | None = None,
) -> Callable[[Callable[..., T | Planned | None]], Callable[..., None]]:
    """Register a function as a command of `application`.

    Besides options, the function may take `reporter: Reporter` and dataclasses of options.
    show: prints its result for people; this function itself prints a `Planned`. exit_code: of the
    process after the result is printed, 0 by default. following: what people do next, from the
    result and the function's arguments.
    """

    def register(function: Callable[..., T | Planned | None]) -> Callable[..., None]:
        signature = inspect.signature(function)
        # Return types are not evaluated, because they are imported only for type checkers.
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
        for option in own:
            _name_value(option)
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
            global _given
            _given = options
            if "reporter" in signature.parameters:
                arguments["reporter"] = make_reporter(options)
            for name, group in groups.items():
                fields = [field.name for field in dataclasses.fields(group)]
                arguments[name] = group(**{field: arguments.pop(field) for field in fields})
            try:
                result = function(**arguments)
                _print_result(result, show, options.json)
                if following is not None and _is_final(result):
                    text = following(result, arguments)
                    if text is not None and not (options.quiet or options.json):
                        from dupr_cli.cli.console import print_following

                        print_following(text)
                if exit_code is not None and _is_final(result):
                    sys.exit(exit_code(result))
            except BrokenPipeError:
                # The reader has closed the pipe; keeps the interpreter from reporting that on exit.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                sys.exit(1)
            except (DuprError, OSError, MemoryError, KeyboardInterrupt) as error:
                _fail(error, options.traceback)
            except (RuntimeError, ImportError) as error:
                if not any(said in str(error) for said in _OUT_OF_MEMORY):
                    raise
                _fail(MemoryError(), options.traceback)

        wrapper.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in [*own, *added]}
        application.command(command_name, cls=Command, help=help_text(function.__doc__))(wrapper)
        return wrapper

    return register


def _name_value(option: inspect.Parameter) -> None:
    """Give an option without a metavar the name of its value."""
    if get_origin(option.annotation) is not Annotated:
        return
    kind, *about = get_args(option.annotation)
    for info in about:
        if isinstance(info, OptionInfo) and info.metavar is None and kind is not bool:
            info.metavar = placeholder(kind, option.name)


def _are_options(kind: object) -> TypeGuard[type[DataclassInstance]]:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


@functools.cache
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


def _is_final(result: T | Planned | None) -> TypeGuard[T]:
    return result is not None and not isinstance(result, Planned)


def _print_result(result: T | Planned | None, show: Callable[[T], None], as_json: bool) -> None:
    if result is None:  # this process has no result
        return
    if as_json:
        from dupr_cli.cli.console import print_json

        print_json(_plain(result))
    elif isinstance(result, Planned):
        from dupr_cli.cli.dry_run import show_plan

        show_plan(result.recipe, result.plan)
    else:
        show(result)


def _plain(result: object) -> object:
    """A result converted to JSON's types."""
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
        from dupr_cli.cli.console import print_traceback

        print_traceback(error)
    if isinstance(error, KeyboardInterrupt):
        report_error("interrupted. Finished work is kept: give the same command again.")
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
        errno.ENOSPC: "Free some space and give the same command again to continue.",
        errno.EFBIG: "Raise the limit on file sizes (ulimit -f) and give the same command again.",
        errno.EDQUOT: "Free some space and give the same command again to continue.",
        errno.EROFS: "Give an output on a writable file system.",
        errno.EACCES: "Give a path that you may read and write.",
        errno.EPERM: "Give a path that you may read and write.",
    }.get(error.errno or 0, "Finished work is kept.")
    return RunError(f"{where}{error.strerror or error}. {advice}")


def overrides(
    given: Sequence[str] | None, **keys: tuple[str, object | None]
) -> list[Override | str]:
    """Join the --set options and the overrides for which other options stand.

    keys: option name = (recipe key, value as YAML); None means that the option was not given. A
    message about the value names the option.
    """
    from dupr_cli.recipe.load import Override

    joined: list[Override | str] = [*(given or [])]
    for option, (key, value) in keys.items():
        if value is not None:
            source = f"--{option.replace('_', '-')} {value}"
            joined.append(Override.parse(f"{key}={value}", source))
    return joined


def shell_words(*words: object) -> str:
    """Words as one command that a shell can be given."""
    return shlex.join(map(str, words))


def parse_task(given: str | None) -> tuple[int, int] | None:
    """I and N of `--task I/N`. Raises UsageError."""
    if given is None:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", given)
    number, total = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= number <= total:
        raise UsageError(f"--task {given}: give I/N with 1 <= I <= N, for example 3/64.")
    return number, total
