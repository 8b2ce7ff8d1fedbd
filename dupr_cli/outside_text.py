"""Text from outside on its way out: names of files and classes, keys, words of servers.

Such text may hold anything: escape sequences that rewrite a terminal, line breaks that imitate a
message, marks that reverse the order of letters, the syntax of a table. Each kind of output has one
function here, which shows what cannot be shown as an escape, such as \\x1b or \\u202e. Ordinary
text, in any script and with emoji, stays as it is.

A message may have several lines, so its breaks stay, but every line after the first is indented:
whatever a name in it contains, only a message of dupr begins at the margin.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
import unicodedata

# Controls, format characters (also bidirectional and zero-width ones), halves of surrogate pairs,
# and separators of lines and paragraphs.
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
# A zero-width joiner is kept where it makes one emoji of two.
_EMOJI = r"[\u2190-\u2bff\ufe0f\U0001f000-\U0001faff]"
_JOINED = re.compile(rf"(?<={_EMOJI})\u200d(?={_EMOJI})")


def one_line(text: str) -> str:
    """Text for a place within a line: a cell of a table, a name in a file that people read."""
    if text.isprintable():
        return text
    joiners = {match.start() for match in _JOINED.finditer(text)}
    return "".join(
        ascii(character)[1:-1]
        if unicodedata.category(character) in _HIDDEN and place not in joiners
        else character
        for place, character in enumerate(text)
    )


def several_lines(text: str) -> str:
    """Text of several lines, whose breaks dupr itself has set."""
    return "\n".join(map(one_line, text.split("\n")))


def message_text(text: str) -> str:
    """A message, whose lines after the first are indented by at least two spaces."""
    return re.sub(r"\n(?! {2}|\n|\Z)", "\n  ", several_lines(text))


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is: no markup, HTML, link or end of a table's cell."""
    escaped = re.sub(r"[\\`*\[\]<>&|~$]|(?<!\w)_|_(?!\w)", r"\\\g<0>", one_line(text))
    # At the start of a line: a heading, a list, a quotation, a rule.
    escaped = re.sub(r"\A(\s*)([#+=-])", r"\1\\\2", escaped)
    return re.sub(r"\A(\s*\d+)([.)])", r"\1\\\2", escaped)


def html_text(text: str) -> str:
    """Text that HTML shows as it is, between tags and in quoted attributes."""
    return html.escape(one_line(text))


def csv_cell(text: str) -> str:
    """Text of a CSV cell that no spreadsheet takes for a formula."""
    shown = one_line(text)
    return f"'{shown}" if shown.lstrip().startswith(("=", "+", "-", "@")) else shown


_LATEX = {
    **{character: f"\\{character}" for character in "{}$&#%_"},
    "\\": "\\textbackslash{}",
    "^": "\\textasciicircum{}",
    "~": "\\textasciitilde{}",
}


def latex_text(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return "".join(_LATEX.get(character, character) for character in one_line(text))


def plot_label(text: str) -> str:
    """Text of a matplotlib figure, in which a pair of dollars would begin a formula."""
    return one_line(text).replace("$", r"\$")


def json_text(value: object, **layout: object) -> str:
    """JSON with the true value of every text: what cannot be shown, or is not UTF-8, is escaped.

    layout: `indent` or `separators` of `json.dumps`.
    """
    dumped = json.dumps(value, ensure_ascii=False, **layout)  # type: ignore[arg-type]
    if dumped.isprintable():
        return dumped
    # JSON's own breaks are between its values; those within texts are already escaped.
    return "\n".join(map(_json_line, dumped.split("\n")))


def _json_line(line: str) -> str:
    if line.isprintable():
        return line
    return "".join(
        json.dumps(character)[1:-1] if unicodedata.category(character) in _HIDDEN else character
        for character in line
    )


def tar_key(name: str) -> str:
    """A key or suffix of a tar's members; a name that cannot be shown gets its hash instead."""
    if one_line(name) == name:
        return name
    plain = "".join("_" if unicodedata.category(c) in _HIDDEN else c for c in name)
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:10]
    return f"{plain}-{digest}"
