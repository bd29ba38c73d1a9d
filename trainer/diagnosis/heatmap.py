"""A standalone page of texts whose tokens are coloured by KL, with every number on hover. No
script, no network.
"""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

STYLE = """
:root { color-scheme: light dark; --ink: 0 0 0; --paper: #fff; --rule: #d4d4d8; --muted: #6b7280 }
@media (prefers-color-scheme: dark) { :root { --paper: #18181b; --rule: #3f3f46; --muted: #a1a1aa } }
body { background: var(--paper); font: 15px/1.7 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem }
article { border-top: 1px solid var(--rule); margin-top: 1.2rem; padding-top: .6rem }
h2 { color: var(--muted); font-size: .85rem; font-weight: 600; margin: 0 }
.text { font-family: ui-monospace, monospace; margin: .3rem 0; overflow-wrap: anywhere; white-space: pre-wrap }
.text span { border-radius: 3px; padding: 1px 0 }
.text span:hover { outline: 1px solid currentColor }
.spans span { border-bottom: 2px solid var(--rule); border-left: 1px solid var(--muted) }
.spans .apart { border-bottom-style: dotted }
input[name=way] { margin-right: .3rem } label { margin-right: 1.2rem }
#reverse:checked ~ main .forward, #forward:checked ~ main .reverse { display: none }
"""
WAYS = {
    "forward": ("37 99 235", "teacher || student"),
    "reverse": ("220 38 38", "student || teacher"),
}


def heat_page(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    """rows: those of tokens.jsonl. Of two tokenizers every unit is a byte span that both spell,
    underlined, with both models' tokens on hover; dotted where their distributions cannot be
    compared. Full colour is the 99th percentile of a direction's KL over all rows shown.
    """
    top = {
        way: _percentile([v for row in rows for v in row[f"kl_{way}"] if v is not None])
        for way in WAYS
    }
    switches = "".join(
        f'<input type="radio" name="way" id="{way}"{" checked" if way == "forward" else ""}><label for="{way}">'
        f"KL({name}), full colour {top[way]:.2f} nats</label>"
        for way, (_, name) in WAYS.items()
    )
    articles = "".join(_article(row, top) for row in rows)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style></head>'
        f"<body><h1>{html.escape(title)}</h1>{switches}<main>{articles}</main></body></html>\n"
    )


def _percentile(values: Sequence[float]) -> float:
    ranked = sorted(values)
    return max(ranked[math.ceil(0.99 * (len(ranked) - 1))], 1e-9) if ranked else 1.0


def _article(row: Mapping[str, Any], top: Mapping[str, float]) -> str:
    grade = {True: ", right", False: ", wrong", None: ""}[row["right"]]
    head = f"<h2>prompt {row['prompt']}, written by the {row['writer']}{grade}</h2>"
    kind = " spans" if "teacher_pieces" in row else ""
    return (
        "<article>"
        + head
        + "".join(f'<p class="text {way}{kind}">{_tokens(row, way, top[way])}</p>' for way in WAYS)
        + "</article>"
    )


def _tokens(row: Mapping[str, Any], way: str, top: float) -> str:
    colour, cells = WAYS[way][0], []
    for i, piece in enumerate(row["pieces"]):
        kl = row[f"kl_{way}"][i]
        share = 0.0 if kl is None else min(kl / top, 1.0)
        mark = ' class="apart"' if kl is None else ""
        cells.append(
            f'<span{mark} style="background:rgb({colour} / {0.75 * max(share, 0):.3f})" title="{html.escape(_told(row, i))}">'
            f"{html.escape(piece)}</span>"
        )
    return "".join(cells)


def _told(row: Mapping[str, Any], i: int) -> str:
    """What a unit says under the pointer."""
    pair = row["kl_forward"][i], row["kl_reverse"][i]
    kls = (
        "distributions not compared here"
        if None in pair
        else f"KL forward {pair[0]:.4f}, reverse {pair[1]:.4f}"
    )
    if "teacher_pieces" in row:
        who = "".join(
            f"{name}: {' | '.join(map(repr, row[f'{name}_pieces'][i]))}\n"
            for name in ("student", "teacher")
        )
    else:
        who = f"{row['pieces'][i]!r} (id {row['ids'][i]})\n"
    return f"{who}{kls}\nlog p: student {row['student_logp'][i]:.3f}, teacher {row['teacher_logp'][i]:.3f}"
