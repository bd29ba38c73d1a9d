"""An alignment as text: two lanes of token boxes over one text, cut where both tokenizers agree.

    terminal    0     3
                A the ‖ ·cat|alog
                B the ‖ ·ca|talog       ‖ between spans, | between tokens; ruler in bytes

`to_terminal` wraps to a width and colours spans on request; without its colour codes it is the same
text, letter for letter. `view_html.to_html` draws the same columns as a page.

What cannot be seen is shown: a space as ·, line ends and tabs as arrows, other invisible
characters escaped, bytes that are no whole character in hex, a token of no bytes as ∅ (HTML: a
thin tick).

n, m: tokens of a row on side a, b. S: spans.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, zip_longest

import numpy as np

from .offsets import Side
from .spans import Alignment

MEANINGS = {  # of every mark that can stand in a picture
    "∅": "a token of no bytes",
    "≠": "an id spells other bytes than the text here: not scored",
    "§": "the prompt ends inside this span: not scored",
    "⊘": "outside every span: control, masked or unknown",
    "…": "after the last common boundary",
    "■": "the end of the text, a token of no bytes",
}
_PIECES = re.compile("([\udc80-\udcff]+)|(([ \n\t\r])\\3*)|(.)", re.S)
_SPACE = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"}
_RUN = 8  # of one white space; a longer one is shown as its length
# Pastel backgrounds under black text are readable in light and in dark terminals.
_SPAN_COLORS = tuple(f"38;5;16;48;5;{n}" for n in (153, 223, 157, 218, 189, 187))
_VALUE_COLORS = {
    sign: tuple(f"38;5;16;48;5;{n}" for n in ramp)
    for sign, ramp in ((1, (195, 159, 117, 75)), (-1, (230, 223, 215, 209)))
}
_DIM, _BAD = "2", "38;5;16;48;5;203"


Values = Sequence[float] | np.ndarray


@dataclass(frozen=True, eq=False)
class Marks:
    """What to draw besides the alignment. Positive values are blue, negative ones orange."""

    names: tuple[str, str] = ("A", "B")
    # [n] and [m] as sampled; a Side has no ids outside the spans
    ids: tuple[Sequence[int], Sequence[int]] | None = None
    seam: int | None = None  # bytes of the prompt, when the text holds prompt and completion
    stop: tuple[str, str] | None = None  # how each side ended: a name, a log p
    token_values: tuple[Values, Values] | None = None  # [n] and [m], e.g. credit or token KL
    span_values: Values | None = None  # [S], e.g. T_k - S_k; NaN: none
    token_label: str = "token value"
    span_label: str = "span value"


NO_MARKS = Marks()


@dataclass(frozen=True)
class Box:
    """One token as drawn."""

    lane: int  # 0 is A, 1 is B
    position: int  # in its side
    id: int  # -1: not known
    piece: bytes  # what it spells of the text; for a token outside, its name
    start: int  # bytes of the text before it
    size: int  # bytes of the text in it
    span: int  # -1 outside every span
    value: float | None

    @property
    def outside(self) -> bool:
        """No part of the text: control, masked or unknown."""
        return self.span < 0 and not self.size


@dataclass(frozen=True)
class Column:
    """One span and its tokens on both lanes; a token outside stands before the next span."""

    span: int  # -1: what comes after the last boundary
    start: int
    end: int
    mark: str  # "", or the sign of MEANINGS: why this span is not scored
    lanes: tuple[tuple[Box, ...], tuple[Box, ...]]
    value: float | None

    @property
    def kind(self) -> str:
        """Tokens on A : tokens on B, those of no bytes included."""
        return ":".join(str(sum(box.span >= 0 for box in lane)) for lane in self.lanes)


def columns(
    side_a: Side, side_b: Side, alignment: Alignment, marks: Marks = NO_MARKS
) -> list[Column]:
    """Every token of both sides once, in order, before it is drawn.

    ValueError: values of a wrong length.
    """
    num = alignment.num_spans
    span_values = _checked(marks.span_values, num, "span_values", "span")
    lanes = (
        _boxes(0, side_a, alignment.span_a, marks),
        _boxes(1, side_b, alignment.span_b, marks),
    )
    cells: list[tuple[list[Box], list[Box]]] = [([], []) for _ in range(num + 1)]
    for boxes in lanes:
        span = num  # tokens outside go in front of the next span of their lane
        for box in reversed(boxes):
            span = box.span if box.span >= 0 else span
            cells[span][box.lane].append(box)
    bounds = [0, *alignment.bounds.tolist()]
    out = []
    for k, cell in enumerate(cells):
        pair = tuple(cell[0][::-1]), tuple(cell[1][::-1])
        if k < num:
            inside = marks.seam is not None and bounds[k] < marks.seam < bounds[k + 1]
            mark = "≠" if not alignment.exact[k] else "§" if inside else ""
            value = span_values[k]
            value = None if value is None or np.isnan(value) else value
            out.append(Column(k, bounds[k], bounds[k + 1], mark, pair, value))
        elif any(pair):
            end = max(alignment.bytes_a, alignment.bytes_b)
            out.append(Column(-1, bounds[-1], end, "…" if end > bounds[-1] else "", pair, None))
    return out


def _boxes(lane: int, side: Side, span: np.ndarray, marks: Marks) -> list[Box]:
    lens, known = side.lens.tolist(), side.ids.tolist()
    ids = known if marks.ids is None else [int(i) for i in marks.ids[lane]]
    given = None if marks.token_values is None else marks.token_values[lane]
    values = _checked(given, len(known), f"token_values[{lane}]", "token")
    _checked(ids, len(known), f"ids[{lane}]", "token")
    out, start, skips = [], 0, set(side.skips.tolist())
    for i, size in enumerate(lens):
        piece = side.table.pieces[ids[i]] if ids[i] >= 0 else b""
        # a space that was put in front is not in the text
        out.append(Box(lane, i, ids[i], piece[i in skips :], start, size, int(span[i]), values[i]))
        start += size
    return out


def _checked(
    values: Values | None, count: int, name: str, unit: str
) -> Sequence[float | None] | np.ndarray:
    if values is not None and len(values) != count:
        raise ValueError(
            f"view: {len(values)} {name} for {count} {unit}s; want one per {unit} of this "
            "alignment."
        )
    return [None] * count if values is None else values


def visible(piece: bytes) -> list[tuple[str, str]]:
    """A piece in visible runs of (class, characters): "text", "space", "escape" or "hex"."""
    out = []
    for broken, space, one, char in _PIECES.findall(piece.decode(errors="surrogateescape")):
        if broken:
            out.append(("hex", f"<{broken.encode(errors='surrogateescape').hex(' ')}>"))
        elif space:
            count = len(space)
            out.append(
                ("space", _SPACE[one] * count if count <= _RUN else f"{_SPACE[one]}×{count}")
            )
        elif not char.isprintable():
            out.append(("escape", repr(char)[1:-1]))
        elif unicodedata.name(char, "").startswith("VARIATION SELECTOR"):
            out.append(("escape", f"\\u{ord(char):04x}"))
        elif char_width(char) == 0 and (not out or out[-1][0] != "text"):
            # a mark that begins a token stands on a dotted circle
            out.append(("text", "\u25cc" + char))
        else:
            out.append(("text", char))
    return [
        (kind, "".join(c for _, c in run)) for kind, run in groupby(out, key=lambda part: part[0])
    ]


def char_width(char: str) -> int:
    """Terminal columns: 2 for East Asian wide and emoji, 0 for what combines, else 1."""
    if unicodedata.category(char) in ("Mn", "Me", "Cf") or "\u1160" <= char <= "\u11ff":
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


# Terminal. A glyph is (characters, columns, style); marks that combine stay with their base.
Glyph = tuple[str, int, str]


@dataclass(frozen=True)
class _Block:
    """A column, or as much of one as fits on a line."""

    ruler: str
    lanes: tuple[list[Glyph], list[Glyph]]
    value: str = ""
    seam: bool = False  # the prompt ends right before it

    @property
    def width(self) -> int:
        return max(len(self.value), *(sum(w for _, w, _ in lane) for lane in self.lanes))

    def gap(self, position: int) -> str:
        """What stands before it in its line."""
        if position == 0:
            return "seam‖ " if self.seam else ""
        return " ‖seam‖ " if self.seam else " ‖ "


def to_terminal(
    side_a: Side,
    side_b: Side,
    alignment: Alignment,
    marks: Marks = NO_MARKS,
    *,
    width: int = 100,
    color: bool = False,
) -> str:
    """Lines of at most `width` columns: the byte ruler, both lanes, span values if any, and the
    meaning of the marks used.

    color: ANSI background per span, or per token value where there are token values. ValueError:
    width < 20.
    """
    if width < 20:
        raise ValueError(f"to_terminal: width = {width}; want at least 20 columns.")
    picture = columns(side_a, side_b, alignment, marks)
    peak = largest(box.value for column in picture for lane in column.lanes for box in lane)
    room = width - 2 - len("seam‖ ")
    blocks = [block for column in picture for block in _blocks(column, peak, room, marks.seam)]
    if marks.stop:
        seam = marks.seam is not None and marks.seam == alignment.bytes_a
        end_a, end_b = (_chop(_glyphs(f"■{name}", _DIM), room)[0] for name in marks.stop)
        blocks.append(_Block("end", (end_a, end_b), seam=seam))
    lines = [line for row in _rows(blocks, width - 2) for line in _draw(row, color, width - 2)]
    return "\n".join([*lines, *(f"{mark} {MEANINGS[mark]}" for mark in used_marks(picture, marks))])


def _blocks(column: Column, peak: float, room: int, seam: int | None) -> list[_Block]:
    lines_a, lines_b = (_chop(_cell(column, lane, peak), room) for lane in (0, 1))
    value = "" if column.value is None else f"{column.value:+.2f}"
    after_seam = seam is not None and seam == column.start > 0
    blocks = [_Block(str(column.start), (lines_a[0], lines_b[0]), value, after_seam)]
    for one, other in zip_longest(lines_a[1:], lines_b[1:]):
        blocks.append(_Block("⋯", (one or [], other or [])))
    return blocks


def _cell(column: Column, lane: int, peak: float) -> list[Glyph]:
    base = _SPAN_COLORS[column.span % len(_SPAN_COLORS)]
    if column.mark in ("≠", "§"):
        base = _BAD
    elif column.span < 0:
        base = _DIM
    out = _glyphs(column.mark, base)
    for position, box in enumerate(column.lanes[lane]):
        style = base if box.span >= 0 else _DIM
        if peak and box.value is not None:
            style = _value_color(box.value / peak)
        shown = "".join(text for _, text in visible(box.piece)) or ("" if box.outside else "∅")
        out += _glyphs("|", base) if position else []
        out += _glyphs(("⊘" if box.outside else "") + shown, style)
    return out


def _glyphs(text: str, style: str) -> list[Glyph]:
    out: list[Glyph] = []
    for char in text:
        if out and not char_width(char):
            out[-1] = (out[-1][0] + char, out[-1][1], style)
        else:
            out.append((char, char_width(char), style))
    return out


def _chop(glyphs: list[Glyph], room: int) -> list[list[Glyph]]:
    parts: list[list[Glyph]] = [[]]
    used = 0
    for glyph in glyphs:
        if used + glyph[1] > room:
            parts.append([])
            used = 0
        parts[-1].append(glyph)
        used += glyph[1]
    return parts


def _rows(blocks: list[_Block], room: int) -> list[list[_Block]]:
    rows: list[list[_Block]] = []
    used = room + 1  # full: the first block opens a row
    for block in blocks:
        used += len(block.gap(1)) + block.width
        if used > room:
            rows.append([])
            used = len(block.gap(0)) + block.width
        rows[-1].append(block)
    return rows


def _draw(row: list[_Block], color: bool, room: int) -> list[str]:
    """The lines of one row of blocks, every block as wide in each of them."""
    ruler, values, at = "", "", 0
    lanes: tuple[list[Glyph], list[Glyph]] = ([], [])
    for position, block in enumerate(row):
        gap = block.gap(position)
        at += len(gap)
        # a number that does not fit is left out
        if (len(ruler) < at or not ruler) and at + len(block.ruler) <= room:
            ruler = ruler.ljust(at) + block.ruler
        values = values.ljust(at) + block.value
        for glyphs, own in zip(lanes, block.lanes, strict=True):
            blank = block.width - sum(w for _, w, _ in own) if block is not row[-1] else 0
            glyphs += [(gap, len(gap), ""), *own, (" " * blank, blank, "")]
        at += block.width
    out = [_paint([("  " + ruler, 0, _DIM)], color)]
    out += [
        _paint([(name + " ", 2, ""), *glyphs], color)
        for name, glyphs in zip("AB", lanes, strict=True)
    ]
    return [*out, ("  " + values).rstrip()] if values.strip() else out


def _paint(glyphs: list[Glyph], color: bool) -> str:
    if not color:
        return "".join(text for text, _, _ in glyphs).rstrip()
    runs = (
        (style, "".join(text for text, _, _ in run))
        for style, run in groupby(glyphs, key=lambda glyph: glyph[2])
    )
    return "".join(
        f"\x1b[{style}m{text}\x1b[0m" if style else text for style, text in runs
    ).rstrip()


def used_marks(picture: list[Column], marks: Marks) -> list[str]:
    """The marks of a picture, in the order of MEANINGS."""
    used = {column.mark for column in picture} | ({"■"} if marks.stop else set())
    for column in picture:
        for box in column.lanes[0] + column.lanes[1]:
            used |= {"" if box.piece or box.outside else "∅", "⊘" if box.outside else ""}
    return [mark for mark in MEANINGS if mark in used]


def _value_color(fraction: float) -> str:
    """Of a value as a fraction of the largest; none for 0 and NaN."""
    if not fraction or np.isnan(fraction):
        return ""
    return _VALUE_COLORS[1 if fraction > 0 else -1][min(3, int(4 * abs(fraction)))]


def largest(values: Iterable[float | None]) -> float:
    """The largest finite |value|; 0 without any."""
    return max((abs(v) for v in values if v is not None and np.isfinite(v)), default=0.0)
