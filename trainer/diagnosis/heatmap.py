"""The token-KL heatmap: a standalone page of texts whose tokens are coloured by KL, with every
number on hover. No script, no network.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from .metrics import DIVERGENCES, Divergence
from .token_rows import TextRow

COLOURS: dict[Divergence, str] = {"forward": "37 99 235", "reverse": "220 38 38"}  # r g b
ARGUMENTS: dict[Divergence, str] = {
    "forward": "teacher || student",
    "reverse": "student || teacher",
}
GRADES = {True: ", correct", False: ", wrong", None: ""}
PAGES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    keep_trailing_newline=True,
)


@dataclass(frozen=True)
class HeatmapCell:
    """One coloured token or span."""

    piece: str
    opacity: str
    compared: bool
    numbers: str  # on hover


@dataclass(frozen=True)
class HeatmapText:
    """One text."""

    title: str
    question: str  # empty behind another text of the same prompt
    spans: bool  # of two tokenizers
    cells: dict[Divergence, list[HeatmapCell]]


def heatmap_page(rows: Sequence[TextRow], title: str) -> str:
    """HTML. Of two tokenizers every unit is a byte span that both spell, underlined, with both
    models' tokens on hover; dotted where their distributions cannot be compared. Full colour is
    the 99th percentile of a divergence's KL over all rows shown.
    """
    top = {d: _percentile([x for row in rows for x in row.kl(d) if x is not None]) for d in COLOURS}
    return PAGES.get_template("heatmap.html.jinja").render(
        title=title,
        divergences=DIVERGENCES,
        colours=COLOURS,
        arguments=ARGUMENTS,
        full_colour={d: f"{x:.2f}" for d, x in top.items()},
        articles=[
            _article(row, top, new=i == 0 or rows[i - 1].prompt != row.prompt)
            for i, row in enumerate(rows)
        ],
    )


def _percentile(values: Sequence[float]) -> float:
    ranked = sorted(values)
    return max(ranked[math.ceil(0.99 * (len(ranked) - 1))], 1e-9) if ranked else 1.0


def _article(row: TextRow, top: Mapping[Divergence, float], new: bool) -> HeatmapText:
    """new: the row before it is of another prompt."""
    return HeatmapText(
        f"prompt {row.prompt}, sampled by the {row.sampled_by}{GRADES[row.correct]}",
        row.question if new else "",
        row.teacher_pieces is not None,
        {d: _cells(row, d, top[d]) for d in DIVERGENCES},
    )


def _cells(row: TextRow, divergence: Divergence, top: float) -> list[HeatmapCell]:
    cells = []
    for i, (piece, kl) in enumerate(zip(row.pieces, row.kl(divergence))):
        fraction = 0.0 if kl is None else min(max(kl / top, 0.0), 1.0)
        cells.append(HeatmapCell(piece, f"{0.75 * fraction:.3f}", kl is not None, _numbers(row, i)))
    return cells


def _numbers(row: TextRow, i: int) -> str:
    """What a unit shows on hover."""
    forward, reverse = row.kl_forward[i], row.kl_reverse[i]
    if forward is None or reverse is None:
        kls = "distributions not compared here"
    else:
        kls = f"KL forward {forward:.4f}, reverse {reverse:.4f}"
    if row.student_pieces is None or row.teacher_pieces is None:
        tokens = f"{row.pieces[i]!r} (id {row.ids[i]})"
    else:
        tokens = (
            f"student: {' | '.join(map(repr, row.student_pieces[i]))}\n"
            f"teacher: {' | '.join(map(repr, row.teacher_pieces[i]))}"
        )
    logps = f"log p: student {row.student_logp[i]:.3f}, teacher {row.teacher_logp[i]:.3f}"
    return f"{tokens}\n{kls}\n{logps}"
