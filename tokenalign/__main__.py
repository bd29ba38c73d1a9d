"""Show two tokenizations of a text, one above the other, cut where both agree.

    python -m reflux.tokenalign TOKENIZER_A TOKENIZER_B --text "the catalog"

The arguments are Hugging Face folders (or names in the local cache). Spans are separated by a double bar, tokens by a single one; a
space is shown as U+00B7, a token of no bytes as U+2205, bytes that are no character alone in hex.
"""
import argparse
from collections.abc import Sequence
from typing import Any

from .byte_table import ByteTable, encode_text
from .offsets import Side, side
from .spans import Alignment, align_spans


def show(side_a: Side, side_b: Side, alignment: Alignment) -> str:
    """Two lines, padded so that every span starts in one column. Bytes after the last boundary are left out."""
    lanes = [_lane(one, span, alignment.num_spans)
             for one, span in ((side_a, alignment.span_a), (side_b, alignment.span_b))]
    widths = [max(map(len, cells)) for cells in zip(*lanes, strict=True)]
    return "\n".join(f"{name} " + " ‖ ".join(cell.ljust(w) for cell, w in zip(lane, widths, strict=True)).rstrip()
                     for name, lane in zip("AB", lanes, strict=True))


def compare(tokenizer_a: Any, tokenizer_b: Any, text: str) -> str:
    """Both tokenizations of `text` and a line of counts. ValueError when one of them does not give the text back."""
    sides = []
    for name, tokenizer in (("A", tokenizer_a), ("B", tokenizer_b)):
        one = side(table := ByteTable.of(tokenizer), encode_text(tokenizer, text), text.encode())
        if not one.reproduces:
            raise ValueError(f"tokenizer {name} spells {table.bytes_of(one.ids.tolist())!r} for {text.encode()!r}: its normaliser "
                             "changes this text, or it has no token for a character.")
        sides.append(one)
    alignment = align_spans(sides[:1], sides[1:])[0]
    counts = f"{len(text.encode())} bytes, {len(sides[0].ids)} and {len(sides[1].ids)} tokens, {alignment.num_spans} spans"
    return f"{show(*sides, alignment)}\n{counts}"


def _lane(one: Side, span: Sequence[int], num_spans: int) -> list[str]:
    pieces = [one.table.pieces[i] if i >= 0 else b"" for i in one.ids]
    cells: list[list[str]] = [[] for _ in range(num_spans)]
    for piece, length, k in zip(pieces, one.lens, span, strict=True):
        if k >= 0:
            cells[k].append(_visible(piece[len(piece) - length:]))
    return ["|".join(cell) for cell in cells]


def _visible(piece: bytes) -> str:
    try:
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in piece.decode()).replace(" ", "·") or "∅"
    except UnicodeDecodeError:
        return f"<{piece.hex(' ')}>"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m reflux.tokenalign", description="Align two tokenizations of a text.")
    parser.add_argument("tokenizers", nargs=2, metavar=("A", "B"), help="Hugging Face folders")
    parser.add_argument("--text", required=True)
    arguments = parser.parse_args()
    from transformers import AutoTokenizer  # slow to import, and only a command-line user needs it
    print(compare(*map(AutoTokenizer.from_pretrained, arguments.tokenizers), arguments.text))


if __name__ == "__main__":
    main()
