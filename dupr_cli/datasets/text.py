"""Reads text files as people save them: UTF-8 with or without a byte order mark, and UTF-16."""

from __future__ import annotations

from pathlib import Path

from dupr_cli.errors import UsageError
from dupr_cli.parsing import ParseError, read_limited


def encoding_of(path: Path) -> str:
    """The encoding that the byte order mark of a file names; UTF-8 if it has no mark."""
    with path.open("rb") as file:
        start = file.read(2)
    # Excel and Notepad write these marks.
    return "utf-16" if start in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


def read_text(path: Path) -> str:
    """The text of a file. Raises OSError, or UsageError if the file is not text or too large."""
    try:
        text = read_limited(path).decode(encoding_of(path))
    except UnicodeError as error:
        raise not_text(path, error) from error
    except ParseError as error:
        raise UsageError(f"{path}: {error}. Give the file that was meant.") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def not_text(path: Path, error: UnicodeError) -> UsageError:
    return UsageError(f"{path}: the file is not UTF-8 text ({error}). Save it as UTF-8.")
