"""An alignment as one HTML file: no scripts, no links, readable in light and dark.

Lane A is above the byte ruler (a number where a span starts, a tick per byte), lane B below it, one
column per span. Ids, bytes, byte range, span and values of a token stand at the foot of the window
while the pointer or the keyboard's focus is on it.
"""

import html
from collections.abc import Sequence

import numpy as np

from .offsets import Side
from .spans import Alignment
from .view import MEANINGS, NO_MARKS, Box, Column, Marks, columns, largest, used_marks, visible

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --dim: #57606a; --line: #d0d7de;
  --bad: #cf222e; --more: 9 105 218; --less: 216 90 10;
  --c0: #dbe9fb; --c1: #fbe6c8; --c2: #d8f0d8; --c3: #f8dbe6; --c4: #e6e0f8; --c5: #e9ecc6 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #0d1117; --dim: #9da7b1;
  --line: #3d444d; --bad: #ff7b72; --more: 88 166 255; --less: 247 129 60;
  --c0: #1c3353; --c1: #4a3413; --c2: #193d24; --c3: #4b2135; --c4: #33295a; --c5: #3a3d14 } }
body { margin: 0; padding: 1.2rem 1.5rem 7rem; background: var(--paper); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif }
h1 { font-size: 1.15rem; margin: 0 0 .6rem }
ul { list-style: none; margin: 0 0 1rem; padding: 0; color: var(--dim); font-size: .87rem }
ul li { display: inline-block; margin-right: 1.4rem }
ul b { color: var(--ink); font-weight: 600 }
main { display: flex; flex-wrap: wrap; row-gap: 1rem;
  font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace }
.column { display: flex; flex-direction: column; min-width: 1.2rem; max-width: 100% }
.column:hover { outline: 2px solid var(--dim); outline-offset: 1px; border-radius: 4px }
.lane { display: flex; flex-wrap: wrap; flex: 1; gap: 2px; padding: 2px 1px; min-height: 1.5em;
  background: var(--color) }
.lane:first-child { border-radius: 5px 5px 0 0; align-items: end }
.lane.below { border-radius: 0 0 5px 5px }
.column.bad .lane { box-shadow: inset 0 0 0 1px var(--bad);
  background: repeating-linear-gradient(45deg, var(--color) 0 5px, transparent 5px 9px) }
main.tinted { column-gap: 5px }
.tinted .lane { --color: rgb(127 127 127/.13) }
.column.tail .lane { background: none; outline: 1px dashed var(--line) }
.ruler { height: 15px; font: 10px/15px system-ui, sans-serif; color: var(--dim); padding-left: 3px;
  border-left: 1px solid var(--dim); white-space: nowrap;
  background: repeating-linear-gradient(90deg,
    transparent 0 calc(100%/var(--bytes) - 1px), var(--line) 0 calc(100%/var(--bytes)))
    0 100%/100% 4px no-repeat }
.token { flex: 1 0 auto; max-width: 100%; box-sizing: border-box; text-align: center;
  padding: 0 3px; border: 1px solid rgb(127 127 127/.45); border-radius: 3px;
  unicode-bidi: isolate; overflow-wrap: anywhere; cursor: default;
  background: linear-gradient(rgb(var(--tint, 0 0 0/0)), rgb(var(--tint, 0 0 0/0))) }
.token.empty { flex: 0 0 5px; padding: 0; border: 0; border-radius: 0; background: var(--dim) }
.token.outside { border-style: dashed; color: var(--dim) }
.token:hover, .token:focus { outline: 2px solid var(--ink); outline-offset: 0 }
.space, .escape, .hex { color: var(--dim) }
.escape, .hex { font-size: .82em }
.value { font: 10px/15px system-ui, sans-serif; height: 15px; text-align: center; padding: 0 3px;
  white-space: nowrap; background: rgb(var(--tint, 0 0 0/0)) }
.mark { color: var(--bad); font-weight: 700 }
.seam { border-left: 4px double var(--bad); margin: 0 4px }
.seam span { font: 10px system-ui; color: var(--bad) }
.token:hover::after, .token:focus::after { content: attr(data-tip); position: fixed; left: 0;
  right: 0; bottom: 0; padding: .6rem 1.5rem; white-space: pre-wrap; text-align: left;
  font: 13px/1.45 ui-monospace, "DejaVu Sans Mono", monospace; color: var(--ink);
  background: var(--paper); border-top: 2px solid var(--ink); unicode-bidi: plaintext }
"""


def to_html(
    side_a: Side,
    side_b: Side,
    alignment: Alignment,
    marks: Marks = NO_MARKS,
    *,
    title: str = "Two tokenizers, one text",
    facts: Sequence[tuple[str, str]] = (),
) -> str:
    """A whole HTML page. facts: (name, value) pairs shown above the picture."""
    picture = columns(side_a, side_b, alignment, marks)
    token_peak = largest(b.value for column in picture for lane in column.lanes for b in lane)
    span_peak = largest(column.value for column in picture)
    listed = [*facts, ("above the ruler", marks.names[0]), ("below", marks.names[1])]
    listed += [
        (label, f"up to ±{peak:.3g}: blue +, orange −")
        for label, peak in ((marks.token_label, token_peak), (marks.span_label, span_peak))
        if peak
    ]
    legend = "".join(
        f"<li>{html.escape(name)} <b>{html.escape(value)}</b></li>" for name, value in listed
    )
    meanings = "".join(
        f"<li><b>{mark}</b> {MEANINGS[mark]}</li>" for mark in used_marks(picture, marks)
    )
    body = "".join(_html_column(column, marks, token_peak, span_peak) for column in picture)
    name, classes = html.escape(title), " class=tinted" if token_peak else ""
    return (
        "<!doctype html>\n<html lang=en><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width">'
        f"<title>{name}</title><style>{_STYLE}</style>\n"
        f"<h1>{name}</h1><ul>{legend}</ul><ul>{meanings}</ul>\n"
        f"<main{classes}>{body}{_html_stop(marks)}</main></html>\n"
    )


def _html_stop(marks: Marks) -> str:
    if marks.stop is None:
        return ""
    above, below = (
        f'<span class="token outside">■{html.escape(name)}</span>' for name in marks.stop
    )
    value = '<div class="value"></div>' if marks.span_values is not None else ""
    return (
        f'<div class="column"><div class="lane">{above}</div>'
        '<div class="ruler" style="--bytes:1">end</div>'
        f'<div class="lane below">{below}</div>{value}</div>'
    )


def _html_column(column: Column, marks: Marks, token_peak: float, span_peak: float) -> str:
    above, below = (
        "".join(_html_box(box, column, marks, token_peak) for box in lane) for lane in column.lanes
    )
    mark = f'<span class="mark">{column.mark}</span>' if column.mark else ""
    kind = "column tail" if column.span < 0 else "column bad" if column.mark else "column"
    color = f"--color:var(--c{column.span % 6})" if column.span >= 0 else ""
    seam = (
        '<div class="seam"><span>seam</span></div>'
        if marks.seam and marks.seam == column.start
        else ""
    )
    value, tint, shown = "", "", ""
    if column.value is not None:
        tint, shown = _html_tint(column.value, span_peak), f"{column.value:+.2f}"
    if marks.span_values is not None:
        value = f'<div class="value" style="{tint}">{shown}</div>'
    num_bytes = max(1, column.end - column.start)
    return (
        f'{seam}<div class="{kind}" style="{color}"><div class="lane">{above}</div>'
        f'<div class="ruler" style="--bytes:{num_bytes}">{column.start}{mark}</div>'
        f'<div class="lane below">{below}</div>{value}</div>\n'
    )


def _html_box(box: Box, column: Column, marks: Marks, peak: float) -> str:
    shown = "".join(
        html.escape(text) if kind == "text" else f'<span class="{kind}">{html.escape(text)}</span>'
        for kind, text in visible(box.piece)
    )
    kind = "token" + (" outside" if box.span < 0 else "" if box.piece else " empty")
    style = "" if box.value is None else f' style="{_html_tint(box.value, peak)}"'
    tip, mark = html.escape(_tip(box, column, marks)), "⊘" if box.outside else ""
    return f'<span class="{kind}" tabindex="0" data-tip="{tip}"{style}>{mark}{shown}</span>'


def _tip(box: Box, column: Column, marks: Marks) -> str:
    lines = [
        f"{marks.names[box.lane]}: token {box.position}, "
        + (f"id {box.id}" if box.id >= 0 else "outside (masked or control)"),
        f"bytes {box.start}..{box.start + box.size}: "
        f"{box.piece[:64].hex(' ') or 'none'}{' ...' if len(box.piece) > 64 else ''}",
    ]
    if box.span >= 0:
        lines.append(f"span {box.span}, {column.kind}, bytes {column.start}..{column.end}")
        lines += [MEANINGS[column.mark]] if column.mark else []
    else:
        lines.append(MEANINGS["⊘" if box.outside else "…"])
    if box.value is not None:
        lines.append(f"{marks.token_label} {box.value:+.4f}")
    if column.value is not None and box.span >= 0:
        lines.append(f"{marks.span_label} {column.value:+.4f}")
    return "\n".join(lines)


def _html_tint(value: float, largest: float) -> str:
    if not largest or np.isnan(value) or not value:
        return ""
    sign, opacity = "more" if value > 0 else "less", min(1.0, abs(value) / largest) * 0.75
    return f"--tint:var(--{sign})/{opacity:.2f}"
