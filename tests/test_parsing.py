"""JSON and YAML that are damaged or made to do harm."""

from __future__ import annotations

import time

import pytest

from dupr_cli.parsing import ParseError, parse_json, parse_yaml, require_distinct_keys


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[" * 100_000, "nested deeper than 100 levels"),
        ("[" * 150 + "]" * 150, "nested deeper than 100 levels"),
        ("1" * 5000, "limit"),
        ("{", "Expecting property name"),
    ],
)
def test_json_that_no_reader_can_use_is_one_error(text: str, problem: str) -> None:
    with pytest.raises(ParseError, match=problem) as caught:
        parse_json(text)
    assert "set_int_max_str_digits" not in str(caught.value)


def test_json_may_write_a_character_as_two_halves() -> None:
    assert parse_json(r'"\ud83d\ude00"') == "\U0001f600"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[" * 100_000, "nested deeper"),
        ("- " * 100_000, "nested deeper"),
        ("&a [*a]", r"alias \*a is inside the value"),
        ("a: 2024-13-45", "month must be in 1..12"),
        ("!!int x", "as its type says"),
        ("1" * 5000, "as its type says"),
        ("a: @", "line 1: found character"),
    ],
)
def test_yaml_that_no_reader_can_use_is_one_error(text: str, problem: str) -> None:
    with pytest.raises(ParseError, match=problem):
        parse_yaml(text)


def billion_laughs() -> str:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    for before, name in zip("abcdefgh", "bcdefghi", strict=True):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]")
    return "\n".join(lines)


def test_aliases_are_counted_before_they_are_expanded() -> None:
    start = time.monotonic()
    with pytest.raises(ParseError, match="more than 100000 values"):
        parse_yaml(billion_laughs())
    assert time.monotonic() - start < 1


def test_plain_aliases_stay_allowed() -> None:
    assert parse_yaml("a: &a [1, 2]\nb: *a\n") == {"a": [1, 2], "b": [1, 2]}


def test_a_key_given_twice_is_named_at_any_depth() -> None:
    require_distinct_keys(b'{"a": {"b": 1}, "b": 2}')
    with pytest.raises(ParseError, match="'b' twice"):
        require_distinct_keys(b'{"a": {"b": 1, "b": 2}}')
