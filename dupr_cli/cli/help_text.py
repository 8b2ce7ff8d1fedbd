"""Help that reads well at 80 columns: whole paragraphs, examples to copy, no names of types.

Typer keeps the line breaks of a docstring, which then fall in the middle of a line of the terminal,
and puts Python's types beside options. The commands and groups here change both.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

from typer.core import TyperArgument, TyperCommand, TyperGroup

_WIDTH = 76  # of a line of an example: 80 columns less the margins
_INDENT = "  "


def help_text(docstring: str | None) -> str:
    """A docstring as help: each paragraph is one line, and indented lines stay lines.

    Examples stand below one another, and one that is too long goes on in the next line, as a shell
    reads it.
    """
    parts: list[str] = []
    was_example = False
    for paragraph in inspect.cleandoc(docstring or "").split("\n\n"):
        lines = paragraph.splitlines()
        is_example = bool(lines) and all(line.startswith(_INDENT) for line in lines)
        if is_example:
            text = "\n".join(part for line in lines for part in _example(line))
        else:
            text = " ".join(line.strip() for line in lines)
        if parts:
            parts.append("\n" if is_example and was_example else "\n\n")
        parts.append(text)
        was_example = is_example
    return "".join(parts)


def _example(line: str) -> list[str]:
    """A command in lines that fit the terminal, broken before options where it can be."""
    lines = [line]
    while len(lines[-1]) > _WIDTH:
        fitting = lines[-1][: _WIDTH - len(" \\")]
        end = max(fitting.rfind(" --"), fitting.rfind(" -r "))
        if not fitting[: max(end, 0)].strip():
            break
        lines[-1:] = [lines[-1][:end] + " \\", 2 * _INDENT + lines[-1][end + 1 :]]
    return lines


class Command(TyperCommand):
    def get_params(self, ctx: Any) -> Any:
        return _without_types(super().get_params(ctx))


class Group(TyperGroup):
    def get_params(self, ctx: Any) -> Any:
        return _without_types(super().get_params(ctx))


def _without_types(parameters: Any) -> Any:
    for parameter in parameters:
        if isinstance(parameter, TyperArgument):
            # The name of an argument says what it is. Older versions of Typer have no such method.
            if hasattr(parameter, "display_type_rich"):
                parameter.display_type_rich = _nothing  # type: ignore[method-assign]
        elif parameter.metavar is None and getattr(parameter, "is_flag", False):
            parameter.metavar = ""
    return parameters


def _nothing(ctx: Any) -> None:
    return None


def placeholder(kind: object, parameter: str) -> str | None:
    """What stands in help for the value of an option; None leaves it to Typer.

    kind: the type of the value. parameter: the name of the function's parameter. Choices are left
    to Typer, which lists them.
    """
    kinds = {part for part in (get_args(kind) or (kind,)) if part is not NoneType}
    kinds |= {part for item in kinds for part in get_args(item) if get_origin(item) is list}
    if int in kinds:
        return "N"
    if float in kinds:
        return "X"
    if kinds & {str, Path}:
        return parameter.rstrip("_").rpartition("_")[2].upper()
    return None
