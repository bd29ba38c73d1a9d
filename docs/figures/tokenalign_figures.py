"""Draws the pictures of docs/tokenalign.md: python docs/figures/tokenalign_figures.py

The cuts are those of Mistral 7B v0.1 (SentencePiece) and DeepSeek-V3 (byte-level BPE), written out
so that no tokenizer is needed.
"""

from html import escape
from pathlib import Path

import numpy as np

from reflux.tokenalign.byte_table import CONTROL, TEXT, ByteTable
from reflux.tokenalign.offsets import Side
from reflux.tokenalign.spans import align_spans
from reflux.tokenalign.view import Box, Column, Marks, columns, visible

CELL, LEFT, LANE, RULER = 30, 92, 26, 22  # pixels: a byte, the names, a lane's height, the ruler's
STYLE = """
text { font: 13px ui-monospace, 'DejaVu Sans Mono', monospace; fill: #1b1f24;
  text-anchor: middle; dominant-baseline: central }
.name { text-anchor: start; font: 12px system-ui, sans-serif } .byte, .hex, .space { fill: #57606a }
.byte, .hex { font-size: 10px }
.c0 { fill: #dbe9fb } .c1 { fill: #fbe6c8 } .c2 { fill: #d8f0d8 }
.c3 { fill: #f8dbe6 } .c4 { fill: #e6e0f8 } .c5 { fill: #e9ecc6 }
rect { stroke: #8c959f } .out { fill: none; stroke-dasharray: 3 2 } .bad { fill: url(#hatch) }
line { stroke: #1b1f24 } .tick, .seam { stroke-width: 3 } .seam { stroke: #cf222e }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .byte, .hex, .space { fill: #9da7b1 }
.c0 { fill: #1c3353 } .c1 { fill: #4a3413 } .c2 { fill: #193d24 }
.c3 { fill: #4b2135 } .c4 { fill: #33295a } .c5 { fill: #3a3d14 }
line { stroke: #e6edf3 } .seam { stroke: #ff7b72 } }
"""
HATCH = (
    '<pattern id="hatch" width="7" height="7" patternUnits="userSpaceOnUse" '
    'patternTransform="rotate(45)"><rect width="2" height="7" class="c3" stroke="none"/></pattern>'
)


def lane_of(pieces: list[bytes], *, skip: int = 0, control: bytes = b"") -> tuple[Side, list[int]]:
    """A side made of these pieces and, last, a control token; with its ids."""
    named = [*pieces, *[control] * bool(control)]
    kind = np.array([TEXT] * len(pieces) + [CONTROL] * bool(control), np.int8)
    ids = np.where(kind == TEXT, np.arange(len(named)), -1).astype(np.int32)
    table = ByteTable(tuple(named), kind, "byte_level")
    return Side(table, ids, skip, True), list(range(len(named)))


def draw(a: tuple[Side, list[int]], b: tuple[Side, list[int]], marks: Marks) -> str:
    """Both lanes with boxes as wide as their bytes, the bytes between them.

    Tokens of no bytes are bars, control tokens dashed.
    """
    alignment = align_spans([a[0]], [b[0]])[0]
    picture = columns(a[0], b[0], alignment, Marks(marks.names, (a[1], b[1]), marks.seam))
    source = b"".join(box.piece for column in picture for box in column.lanes[0] if not box.outside)
    body = [
        _text(2, y, name, "name")
        for name, y in zip(marks.names, (LANE / 2, LANE * 1.5 + RULER), strict=True)
    ]
    body += [
        _text(LEFT + (i + 0.5) * CELL, LANE + RULER / 2, f"{byte:02x}", "byte")
        for i, byte in enumerate(source)
    ]
    body += [
        _box(box, column, lane * (LANE + RULER))
        for column in picture
        for lane in (0, 1)
        for box in column.lanes[lane]
    ]
    body += [_line(LEFT + column.start * CELL, LANE, LANE + RULER) for column in picture]
    if marks.seam is not None:
        body.append(_line(LEFT + marks.seam * CELL, 0, 2 * LANE + RULER, "seam"))
    width = LEFT + len(source) * CELL + (3 * CELL if picture[-1].span < 0 else 2)
    height = 2 * LANE + RULER
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}">'
        f"<style>{STYLE}</style>{HATCH}\n" + "\n".join(body) + "\n</svg>\n"
    )


def covers(text: str, at: int, rows: list[tuple[str, list[tuple[str, str]], str]]) -> str:
    """The covers of text[:at]. rows: name, its tokens with their classes, what it says of the next
    byte. The line stands behind the bytes so far.
    """
    left, gap = 150, 8
    body = [_text(left + (i + 0.5) * CELL, RULER / 2, c, "byte") for i, c in enumerate(text)]
    for row, (name, tokens, says) in enumerate(rows):
        y, x = RULER + row * (LANE + gap), left
        body.append(_text(2, y + LANE / 2, name, "name"))
        for piece, kind in tokens:
            width = len(piece) * CELL
            body.append(
                f'<rect class="{kind}" x="{x + 1.5:g}" y="{y + 1.5:g}" width="{width - 3:g}" '
                f'height="{LANE - 3}" rx="4"/>' + _text(x + width / 2, y + LANE / 2, piece, "")
            )
            x += width
        body.append(_text(left + (len(text) + 0.5) * CELL, y + LANE / 2, says, "name"))
    height = RULER + len(rows) * (LANE + gap)
    body.append(_line(left + at * CELL, 0, height, "seam"))
    width = left + len(text) * CELL + 340
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}">'
        f"<style>{STYLE}</style>{HATCH}\n" + "\n".join(body) + "\n</svg>\n"
    )


def _box(box: Box, column: Column, y: int) -> str:
    x = LEFT + box.start * CELL
    if not box.size and not box.outside:
        # beside the box that begins at the same byte
        return _line(x - 5, y + 3, y + LANE - 3, "tick")
    width = (box.size or 2.6) * CELL
    kind = "out" if box.outside else "bad" if column.mark else f"c{column.span % 6}"
    hexed = " hex" if any(part == "hex" for part, _ in visible(box.piece)) else ""
    shown = "".join(
        text.strip("<>") if part == "hex" else text for part, text in visible(box.piece)
    )
    return (
        f'<rect class="{kind}" x="{x + 1.5:g}" y="{y + 1.5:g}" width="{width - 3:g}" '
        f'height="{LANE - 3}" rx="4"/>' + _text(x + width / 2, y + LANE / 2, shown, hexed.strip())
    )


def _text(x: float, y: float, text: str, kind: str) -> str:
    classes = f' class="{kind}"' if kind else ""
    return f'<text x="{x:g}" y="{y:g}"{classes}>{escape(text)}</text>'


def _line(x: float, y: float, end: float, kind: str = "edge") -> str:
    return f'<line class="{kind}" x1="{x:g}" y1="{y:g}" x2="{x:g}" y2="{end:g}"/>'


def figures() -> dict[str, str]:
    """File name -> SVG."""
    names = ("Mistral v0.1", "DeepSeek-V3")
    mistral = [b" ", b"1", b"2", b"3", b" ", "😊".encode(), b" ", "你".encode(), "好".encode()]
    deepseek = [b"123", b" \xf0\x9f\x98", b"\x8a", b" ", "你好".encode()]
    joint, apart = [b"2", b"+", b"2", b"=", b" 4", b"."], [b"2", b"+", b"2", b"=", b" ", b"4", b"."]
    return {
        "tokenalign_spans.svg": draw(lane_of(mistral, skip=1), lane_of(deepseek), Marks(names)),
        "tokenalign_seam.svg": draw(
            lane_of(joint, control=b"<eos>"),
            lane_of(apart, control=b"</s>"),
            Marks(("joint", "apart"), seam=5),
        ),
        "tokenalign_covers.svg": covers(
            "unhappy",
            3,
            [
                ("the text's tokens", [("un", "c1"), ("happy", "c0")], ""),
                ("from the start", [("unhappy", "c0")], "p(unhappy) says: a"),
                ("behind un", [("un", "c1"), ("happy", "c0")], "p(un) p(happy | un) says: a"),
                ("missing", [("un", "c1"), ("h", "bad")], "p(un) p(h | un): another forward"),
            ],
        ),
    }


if __name__ == "__main__":
    for name, svg in figures().items():
        (Path(__file__).parent / name).write_text(svg, encoding="utf-8")
