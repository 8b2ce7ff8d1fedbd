"""Parses JSON and YAML that may be damaged or hostile.

A file that dupr reads may come from anywhere. Text goes in, plain values come out, or a
`ParseError` that says what is wrong; readers add the file and what to do about it. Size, nesting
and, in YAML, the values that aliases stand for are limited, because a few hundred bytes can
otherwise cost gigabytes, or end in a RecursionError wherever the values are used later.
`validated` then gives the values the types of a dataclass.
"""

from __future__ import annotations

import json
import os
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

T = TypeVar("T")

MEBIBYTE = 1 << 20
# Of one file. Records of dupr are far below it; the index of a shard has about 100 bytes a sample.
MAX_RECORD_BYTES = 256 * MEBIBYTE
MAX_RECIPE_BYTES = MEBIBYTE // 4
MAX_DEPTH = 100
# Values in YAML, with those that aliases stand for counted each time.
MAX_YAML_VALUES = 100_000

if TYPE_CHECKING:
    FastSafeLoader = yaml.SafeLoader
else:  # LibYAML, where PyYAML has it, parses ten times as fast
    FastSafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class ParseError(ValueError):
    """Why text is not read; the message is one line and names no file."""


def read_limited(path: Path, max_bytes: int = MAX_RECORD_BYTES) -> bytes:
    """The content of a file. Raises ParseError if it is larger than allowed, and OSError."""
    with path.open("rb") as file:
        # `read` reserves all the memory that it is asked for: no more than the file has.
        size = os.fstat(file.fileno()).st_size
        data = file.read(min(max_bytes, size) + 1)
        if size < len(data) <= max_bytes:  # it has grown, or is one of those without a size
            data += file.read(max_bytes + 1 - len(data))
    require_bytes(len(data), max_bytes)
    return data


def require_bytes(size: int, max_bytes: int) -> None:
    """Raises ParseError for more bytes than are allowed."""
    if size > max_bytes:
        raise ParseError(f"it is larger than {max_bytes / MEBIBYTE:g} MiB, which no such file is")


def read_json(path: Path, max_bytes: int = MAX_RECORD_BYTES) -> Any:
    """The value in a JSON file. Raises ParseError, and OSError."""
    return parse_json(read_limited(path, max_bytes))


def parse_json(data: bytes | str) -> Any:
    """The value in a JSON text. Raises ParseError.

    Its texts may hold halves of surrogate pairs: so Python has names of files that are not UTF-8.
    """
    try:
        text = data if isinstance(data, str) else data.decode(json.detect_encoding(data))
        value = json.loads(text)
    except RecursionError:
        raise _too_deep() from None
    except UnicodeDecodeError as error:
        raise ParseError(f"it is not {error.encoding} text") from None
    except ValueError as error:
        raise ParseError(_without_advice(error)) from None
    _require_depth(value)
    return value


def require_distinct_keys(data: bytes) -> None:
    """Raises ParseError when an object in a JSON text has a key twice.

    Parsers disagree on which of the two counts, so that one file means different things to them.
    """

    def distinct(pairs: list[tuple[str, object]]) -> None:
        seen = set[str]()
        for key, _ in pairs:
            if key in seen:
                raise ParseError(f"it has the key {_brief(key)} twice")
            seen.add(key)

    try:
        json.loads(data, object_pairs_hook=distinct)
    except RecursionError:
        raise _too_deep() from None
    except ParseError:
        raise
    except ValueError as error:
        raise ParseError(_without_advice(error)) from None


def _without_advice(error: Exception) -> str:
    """The message, without Python's advice to programmers on numbers of thousands of digits."""
    return str(error).partition("; use sys.set_int_max_str_digits")[0]


def _too_deep() -> ParseError:
    return ParseError(f"values are nested deeper than {MAX_DEPTH} levels")


def _require_depth(value: object) -> None:
    """Level by level, which needs no stack and is fast for the millions of rows of a COCO file."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise _too_deep()


def read_yaml(path: Path, max_bytes: int = MAX_RECIPE_BYTES) -> object:
    """The value in a YAML file. Raises ParseError, and OSError."""
    return parse_yaml(as_text(read_limited(path, max_bytes)))


def as_text(data: bytes) -> str:
    """Raises ParseError unless the bytes are UTF-8, with or without a byte order mark."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ParseError("it is not UTF-8 text") from None


def parse_yaml(text: str) -> object:
    """The value in a YAML text. Raises ParseError."""
    require_modest_yaml(text)
    try:
        return yaml.load(text, FastSafeLoader)
    except yaml.YAMLError as error:
        raise ParseError(yaml_problem(error)) from None
    # Explicit tags let constructors fail in many ways (!!int x, !!timestamp x, !!bool x).
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        problem = _without_advice(error)
        raise ParseError(f"a value cannot be read as its type says ({problem})") from None


def yaml_problem(error: yaml.YAMLError) -> str:
    """What is wrong with a YAML text, and in which line."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        return f"line {mark.line + 1}: {error.problem}" if mark else str(error.problem)
    return " ".join(str(error).split())


def require_modest_yaml(text: str) -> None:
    """Raises ParseError unless depth and number of values are within the limits.

    Events are counted as they are parsed, before any value is made. Syntax errors are left to the
    reader that makes the values, whose message is better.
    """
    for loader in (
        FastSafeLoader,
        yaml.SafeLoader,
    ):  # each accepts a little that the other does not
        try:
            _count_values(text, loader)
        except yaml.YAMLError:
            continue
        return


def _count_values(text: str, loader: type[yaml.SafeLoader]) -> None:
    """Raises ParseError like `require_modest_yaml`, and YAMLError."""
    sizes: dict[str, int] = {}  # values that an alias stands for, by anchor
    opened: list[tuple[str, int]] = []  # anchor, and the count before it
    count = 0
    for event in yaml.parse(text, loader):
        anchor: str = getattr(event, "anchor", None) or ""
        if isinstance(event, yaml.CollectionStartEvent):
            opened.append((anchor, count))
            sizes.pop(anchor, None)
            count += 1
            if len(opened) > MAX_DEPTH:
                raise _too_deep()
        elif isinstance(event, yaml.CollectionEndEvent):
            of, before = opened.pop()
            sizes[of] = count - before
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == of for of, _ in opened):
                raise ParseError(f"the alias *{anchor} is inside the value that it stands for")
            count += sizes.get(anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
            sizes[anchor] = 1
        if count > MAX_YAML_VALUES:
            raise ParseError(
                f"it stands for more than {MAX_YAML_VALUES} values, with aliases counted each time"
            )


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    if is_dataclass(kind):  # like its constructor, takes no further names
        configured: Any = with_config(ConfigDict(extra="forbid"))
        kind = configured(kind)
    return TypeAdapter(kind)


def validated(kind: type[T], values: object) -> T:
    """Values as a dataclass or another type, with the types of the fields at any depth.

    Raises ParseError that names the first wrong field.
    """
    try:
        return cast(T, _adapter(cast(Any, kind)).validate_python(values))
    except ValidationError as error:
        raise ParseError(_first_problem(error)) from None


def _first_problem(error: ValidationError) -> str:
    first, *others = error.errors(include_url=False)
    place = ".".join(map(str, first["loc"]))
    problem = f"{place + ': ' if place else ''}{first['msg'][0].lower()}{first['msg'][1:]}"
    if first["type"] != "missing":
        problem += f", not {_brief(first['input'])}"
    return problem + (f"; {len(others)} more like it" if others else "")


def _brief(value: object) -> str:
    text = repr(value) if not isinstance(value, dict | list) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
