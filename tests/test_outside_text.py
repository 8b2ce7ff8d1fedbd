"""Text from outside comes out as it is if it is plain, and otherwise as something harmless."""

from __future__ import annotations

import csv
import io
import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dupr_cli.outside_text import (
    csv_cell,
    html_text,
    json_text,
    latex_text,
    markdown_text,
    message_text,
    one_line,
    plot_label,
    several_lines,
    tar_key,
)

HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
ANYTHING = st.text(st.characters())  # also controls, format characters and surrogates
FUNCTIONS = [one_line, markdown_text, html_text, csv_cell, latex_text, plot_label, tar_key]


def hidden(text: str) -> set[str]:
    return {c for c in text if unicodedata.category(c) in HIDDEN}


@pytest.mark.parametrize("function", FUNCTIONS)
@given(text=ANYTHING)
def test_nothing_hidden_comes_out_and_all_of_it_on_one_line(function, text: str) -> None:  # type: ignore[no-untyped-def]
    found = function(text)
    assert hidden(found) <= {"\u200d"}
    assert len(found.splitlines()) <= 1
    found.encode()


@given(text=ANYTHING)
def test_a_message_keeps_its_breaks_and_nothing_else_hidden(text: str) -> None:
    assert hidden(several_lines(text)) <= {"\n", "\u200d"}
    assert all(line.startswith("  ") for line in message_text(text).split("\n")[1:] if line)


@pytest.mark.parametrize(
    "text",
    ["", "plain", "Gänsefüßchen é e\u0301", "東京\u3000タワー", "한국어", "नमस्ते", "שלום", "a\\b",
     "10\u00a0%", "😀 👍🏽 ❤️", "👩\u200d👩\u200d👧", "🏳️\u200d🌈"],
)  # fmt: skip
@pytest.mark.parametrize("function", [one_line, several_lines, message_text, plot_label, csv_cell])
def test_plain_text_stays(function, text: str) -> None:  # type: ignore[no-untyped-def]
    assert function(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", r"\x1b[31mred"),
        ("a\r\nb\tc", r"a\r\nb\tc"),
        ("gpj.\u202ecat", r"gpj.\u202ecat"),
        ("\u2066a\u2069\u200e\u200f\u061c", r"\u2066a\u2069\u200e\u200f\u061c"),
        ("in\u200bvisible \ufeff \u200dx", r"in\u200bvisible \ufeff \u200dx"),
        ("\x85\x9b2J\x7f", r"\x85\x9b2J\x7f"),
        ("\u2028\u2029", r"\u2028\u2029"),
        ("bad \udcff name", r"bad \udcff name"),
    ],
)
def test_what_is_hidden_is_shown_as_an_escape(text: str, shown: str) -> None:
    assert one_line(text) == shown


def test_a_name_cannot_begin_a_line_of_a_message() -> None:
    name = "x.jpg\nerror: all is lost"
    assert message_text(f"{name} is missing:\n  a\nGive another.") == (
        "x.jpg\n  error: all is lost is missing:\n  a\n  Give another."
    )


def test_markdown_shows_markup_as_text() -> None:
    assert markdown_text("a | b <b> [x](y) *z* `c` _d_ ~~e~~ &amp; $f$") == (
        r"a \| b \<b\> \[x\](y) \*z\* \`c\` \_d\_ \~\~e\~\~ \&amp; \$f\$"
    )
    assert [*map(markdown_text, ("# a", "- a", "1. a", "moco_v2, 0.5 - 1"))] == [
        r"\# a", r"\- a", r"1\. a", "moco_v2, 0.5 - 1"
    ]  # fmt: skip


@pytest.mark.parametrize("start", "=+-@")
def test_a_cell_is_no_formula(start: str) -> None:
    assert csv_cell(f"{start}HYPERLINK(1)") == f"'{start}HYPERLINK(1)"


@given(text=ANYTHING)
def test_a_cell_is_read_as_one_cell(text: str) -> None:
    file = io.StringIO()
    csv.writer(file).writerow([csv_cell(text), "b"])
    file.seek(0)
    assert [*csv.reader(file)] == [[csv_cell(text), "b"]]


def test_latex_has_no_commands_of_a_name() -> None:
    assert latex_text(r"50% of a_b & \input{x} $1$ #2 ^~") == (
        r"50\% of a\_b \& \textbackslash{}input\{x\} \$1\$ \#2 "
        r"\textasciicircum{}\textasciitilde{}"
    )


@given(text=ANYTHING)
def test_json_keeps_the_true_value_in_valid_utf8(text: str) -> None:
    for layout in ({"indent": 1}, {"separators": (",", ":")}):
        dumped = json_text({text: [text]}, **layout)
        assert hidden(dumped) <= {"\n"}
        assert (
            json.loads(dumped.encode()) == {text: [text]} == json.loads(json.dumps({text: [text]}))
        )


def test_json_of_plain_text_has_the_bytes_of_the_standard_library() -> None:
    value = {"a": ["東京", 1, None, {"é": "😀"}], "b": "x\ny"}
    assert json_text(value, indent=1) == json.dumps(value, indent=1, ensure_ascii=False)


@given(first=ANYTHING, second=ANYTHING)
def test_different_names_are_different_keys(first: str, second: str) -> None:
    assert (tar_key(first) == tar_key(second)) == (first == second)


@given(text=st.text("abc$^_{}\\ \n\x1b"))
def test_a_label_is_drawn_as_text(text: str) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib import cbook

    assert not cbook.is_math_text(plot_label(text))


def test_html_shows_text_as_it_is_between_tags_and_in_attributes() -> None:
    text = "<b title='x'>\"a\" & b</b>\x1b"
    assert html_text(text) == ("&lt;b title=&#x27;x&#x27;&gt;&quot;a&quot; &amp; b&lt;/b&gt;\\x1b")
