"""Pictures of alignments: nothing lost, nothing invisible, nothing wider than the terminal."""

import re
from pathlib import Path
from runpy import run_path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from span_cases import tokenizations
from tokenizer_fixtures import TEXTS, byte_level, metaspace
from view_cases import aligned, encoded

from reflux.tokenalign.byte_table import CONTROL, TEXT, ByteTable
from reflux.tokenalign.offsets import side
from reflux.tokenalign.spans import align_spans
from reflux.tokenalign.view import Marks, char_width, columns, to_terminal, visible


def uncolored(text):
    return re.sub("\x1b\\[[0-9;]*m", "", text)


def columns_of(line):
    return sum(map(char_width, line))


def drawn_of(*texts, **options):
    return to_terminal(*encoded(*texts), **options).splitlines()


def drawn(*pieces, **options):
    return to_terminal(*aligned(*pieces), **options).splitlines()


def test_spans_stand_above_each_other_on_the_byte_ruler():
    assert drawn([b"the", b" cat", b"alog"], [b"the", b" ca", b"talog"]) == [
        "  0     3",
        "A the ‖ ·cat|alog",
        "B the ‖ ·ca|talog",
    ]


def test_golden_text_of_two_trained_tokenizers():
    text = "12345 + 678 = hence\n\nthe quick 🙂 你好" + " " * 12 + "e\u0301"
    assert to_terminal(
        *encoded(byte_level(), byte_level(size=300), text), width=72
    ).splitlines() == [
        "  0          5    7         11   13       19  20  21  22   24",
        "A 12345    ‖ ·+ ‖ ·678    ‖ ·= ‖ ·hence ‖ ↵ ‖ ↵ ‖ t ‖ he ‖ ·quick",
        "B 1|23|4|5 ‖ ·+ ‖ ·|6|7|8 ‖ ·= ‖ ·hence ‖ ↵ ‖ ↵ ‖ t ‖ he ‖ ·|q|u|i|c|k",
        "  30  31        33          35  36                              42   44",
        "A · ‖ <f0 9f> ‖ <99 82>   ‖ · ‖ 你好                          ‖ ·· ‖ ··",
        "B · ‖ <f0 9f> ‖ <99>|<82> ‖ · ‖ <e4>|<bd>|<a0>|<e5>|<a5>|<bd> ‖ ·· ‖ ··",
        "  46   48   50     53  54  55",
        "A ·· ‖ ·· ‖ ···  ‖ · ‖ e ‖ ◌\u0301",
        "B ·· ‖ ·· ‖ ··|· ‖ · ‖ e ‖ <cc>|<81>",
    ]


def test_golden_text_with_a_space_put_in_front():
    assert drawn_of(metaspace("bpe", "always"), byte_level(), "\nthe end") == [
        "  0     1   2    4   5",
        "A ∅|↵ ‖ t ‖ he ‖ · ‖ en|d",
        "B ↵   ‖ t ‖ he ‖ · ‖ end",
        "∅ a token of no bytes",
    ]


def test_what_cannot_be_seen_is_shown():
    a, b, alignment = aligned([b" ", "\n你".encode()], [b"\n", b"\xe4", b"\xbd\xa0"], skip_a=1)
    assert to_terminal(a, b, alignment).splitlines() == [
        "  0",
        "A ∅|↵你",
        "B ↵|<e4>|<bd a0>",
        "∅ a token of no bytes",
    ]


@pytest.mark.parametrize(
    "piece, shown",
    [
        (b" a\t\r\n", "·a⇥␍↵"),
        (b" " * 8, "·" * 8),
        (b" " * 9, "·×9"),
        (b"\n" * 40 + b"x", "↵×40x"),
        (b"\xf0\x9f", "<f0 9f>"),
        (b"\x80 \xe4\xbd\xa0\xf0", "<80>·你<f0>"),
        ("\u0301".encode(), "◌\u0301"),
        ("e\u0301".encode(), "e\u0301"),
        (" \u0301".encode(), "·◌\u0301"),
        ("👩\u200d👩".encode(), "👩\\u200d👩"),
        ("❤\ufe0f".encode(), "❤\\ufe0f"),
        (b"", ""),
        ("\u00a0\ufeff".encode(), "\\xa0\\ufeff"),
        (b"\x00", "\\x00"),
        ("\U000e0100".encode(), "\\u" + "e0100"),
    ],
)
def test_characters(piece, shown):
    assert "".join(text for _, text in visible(piece)) == shown


@given(st.one_of(TEXTS.map(str.encode), st.binary(max_size=20)))
def test_no_character_is_invisible(piece):
    shown = "".join(text for _, text in visible(piece))
    assert shown.isprintable() and " " not in re.sub("<[0-9a-f ]+>", "", shown)
    assert bool(shown) == bool(piece) and (not shown or char_width(shown[0]) > 0)


@pytest.mark.parametrize(
    "char, columns_wide",
    [
        ("a", 1),
        ("你", 2),
        ("🙂", 2),
        ("\u0301", 0),
        ("ि", 1),
        ("ｱ", 1),
        ("ア", 2),
        ("\u1161", 0),
        ("\u1100", 2),
        ("\u200d", 0),
        ("é", 1),
        ("ا", 1),
        ("़", 0),
    ],
)
def test_terminal_columns(char, columns_wide):
    assert char_width(char) == columns_wide


@given(tokenizations())
def test_every_token_is_drawn_once_and_every_column_spells_one_text(pieces):
    picture = columns(*aligned(*pieces))
    for lane in (0, 1):
        boxes = [box for column in picture for box in column.lanes[lane]]
        assert [box.position for box in boxes] == list(range(len(pieces[lane])))
        assert [box.piece for box in boxes] == pieces[lane]
    for column in picture:
        one, other = (b"".join(box.piece for box in lane) for lane in column.lanes)
        assert one == other and len(one) == column.end - column.start and column.mark == ""
        assert all(
            column.start <= box.start <= box.start + box.size <= column.end
            for lane in column.lanes
            for box in lane
        )


@given(TEXTS.filter(bool), st.integers(20, 90), st.booleans())
def test_lines_fit_and_hold_everything_and_color_changes_no_letter(text, width, valued):
    a, b, alignment = encoded(byte_level(), byte_level(size=300), text)
    marks = (
        Marks(
            span_values=np.arange(alignment.num_spans),
            token_values=(np.ones(len(a.ids)), -np.ones(len(b.ids))),
        )
        if valued
        else Marks()
    )
    plain, colored = (
        to_terminal(a, b, alignment, marks, width=width, color=color) for color in (False, True)
    )
    assert uncolored(colored) == plain and colored != plain
    lines = plain.splitlines()
    assert all(columns_of(line) <= width for line in lines if line[:2] in ("A ", "B ", "  "))
    for name, one in (("A ", a), ("B ", b)):
        got = "".join(line[2:] for line in lines if line.startswith(name))
        want = "".join(text for i in one.ids for _, text in visible(one.table.pieces[i]))
        assert re.sub(r"[ |‖]|<[0-9a-f ]+>", "", got) == re.sub(r"[ |‖]|<[0-9a-f ]+>", "", want)


@pytest.mark.parametrize(
    "seam, lines",
    [
        (
            3,
            [
                "  0         5       7       end",
                "A §Q:·|ab ‖ cd    ‖ ≠ef   ‖ ■<eos>",
                "B §Q:·a|b ‖ cd    ‖ ≠eX   ‖ ■</s>",
                "  +0.50     -1.25   +3.00",
            ],
        ),
        (
            5,
            [
                "  0             5       7       end",
                "A Q:·|ab ‖seam‖ cd    ‖ ≠ef   ‖ ■<eos>",
                "B Q:·a|b ‖seam‖ cd    ‖ ≠eX   ‖ ■</s>",
                "  +0.50         -1.25   +3.00",
            ],
        ),
    ],
)
def test_seam_stop_values_and_bytes_that_differ(seam, lines):
    a, b, alignment = aligned([b"Q: ", b"ab", b"cd", b"ef"], [b"Q: a", b"b", b"cd", b"eX"])
    marks = Marks(seam=seam, stop=("<eos>", "</s>"), span_values=[0.5, -1.25, 3.0])
    got = to_terminal(a, b, alignment, marks, width=60).splitlines()
    assert got[:4] == lines and [line[0] for line in got[4:]] == (
        ["≠", "§", "■"] if seam == 3 else ["≠", "■"]
    )


def test_a_span_without_a_value_shows_none():
    lines = to_terminal(
        *aligned([b"a", b"b"], [b"a", b"b"]), Marks(span_values=[np.nan, 0.0])
    ).splitlines()
    assert lines[3].split() == ["+0.00"]


def test_a_seam_survives_a_line_break():
    words = [b"abcdefgh", b"ijklmnop", b"q"]
    lines = to_terminal(*aligned(words, words), Marks(seam=8), width=20).splitlines()
    assert lines[1::3] == ["A abcdefgh", "A seam‖ ijklmnop ‖ q"]


def test_control_tokens_stand_outside():
    table = ByteTable((b"<s>", b"a", b"b"), np.array([CONTROL, TEXT, TEXT], np.int8), "byte_level")
    a, b = side(table, [0, 1, 2, 0], b"ab"), side(table, [1, 2], b"ab")
    alignment = align_spans([a], [b])[0]
    outside = "⊘ outside every span: control, masked or unknown"
    assert to_terminal(a, b, alignment, Marks(ids=([0, 1, 2, 0], [1, 2]))).splitlines() == [
        "  0        1   2",
        "A ⊘<s>|a ‖ b ‖ ⊘<s>",
        "B a      ‖ b ‖",
        outside,
    ]
    assert to_terminal(a, b, alignment).splitlines()[1:] == [
        "A ⊘|a ‖ b ‖ ⊘",
        "B a   ‖ b ‖",
        outside,
    ]


def test_an_open_tail_has_a_column_of_its_own():
    assert drawn([b"ab", b"cd"], [b"ab"]) == [
        "  0    2",
        "A ab ‖ …cd",
        "B ab ‖ …",
        "… after the last common boundary",
    ]


def test_values_color_tokens_and_zero_is_no_color():
    a, b, alignment = aligned([b"a", b"b", b"c", b"d"], [b"ab", b"cd"])
    line = to_terminal(
        a, b, alignment, Marks(token_values=([0.0, 4.0, -4.0, np.nan], [1.0, -1.0])), color=True
    ).splitlines()[1]
    blue, orange = "\x1b[38;5;16;48;5;75m", "\x1b[38;5;16;48;5;209m"
    assert (
        f"{blue}b\x1b[0m" in line
        and f"{orange}c\x1b[0m" in line
        and line.startswith("A a\x1b")
        and line.endswith("|\x1b[0md")
    )


def test_values_of_a_wrong_length_are_refused():
    a, b, alignment = aligned([b"ab"], [b"a", b"b"])
    for marks, what in (
        (Marks(span_values=[1.0, 2.0]), "2 span_values for 1 spans"),
        (Marks(token_values=([1.0], [1.0])), r"1 token_values\[1\] for 2"),
        (Marks(ids=([0, 0], [0, 1])), r"2 ids\[0\] for 1 token"),
    ):
        with pytest.raises(ValueError, match=what):
            columns(a, b, alignment, marks)
    with pytest.raises(ValueError, match="width = 10"):
        to_terminal(a, b, alignment, width=10)


def test_the_figures_of_the_documentation_are_current():
    folder = Path(__file__).parents[2] / "docs" / "figures"
    for name, svg in run_path(str(folder / "tokenalign_figures.py"))["figures"]().items():
        assert (folder / name).read_text(encoding="utf-8") == svg, (
            f"{name}: run python docs/figures/tokenalign_figures.py"
        )


def test_a_span_wider_than_the_line_is_broken_by_columns_not_characters():
    lines = drawn(["你".encode() * 10], ["你".encode() * 10], width=20)
    assert [columns_of(line) for line in lines if line[0] == "A"] == [14, 10] and lines[
        3
    ].startswith("  ⋯")
