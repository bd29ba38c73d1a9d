"""The aligner against its definition on 10^5 and more random token streams. Not a test: run it by
hand, from the root.

    python tests/long_run_align.py --streams 120000 [--record]

A stream is a text drawn from words, digits, spaces, joiners, combining marks, scripts and half-open
tags, or what random ids of one tokenizer spell (never a canonical encoding; often cut inside a
character). One tokenizer of a drawn pair writes it, the other reads it. Tokenizers: those that the
tests train in process, and the real ones of installed packages (real_tokenizers.py).

For every stream: no exception; both sides reproduce the source (through their normaliser where they
have one); every span is exact; boundaries and spans equal align_spans_ref, the definition; the
joined pieces are the source's bytes by Python's own arithmetic; the torch path gives the same
spans. --record writes bench/records/<date>_align_long_run_cpu.json (a clean tree only).
"""

import argparse
import datetime
import itertools
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import pytest
import torch
from real_tokenizers import SOURCES, real
from tokenizer_fixtures import byte_level, metaspace, sentencepiece

from reflux.tokenalign.byte_table import PROBES, TEXT, ByteTable, encode_text, normalizer_of
from reflux.tokenalign.offsets import Side, side, spell
from reflux.tokenalign.prefix_hash import PieceHashes, exact_spans, prefix_hashes
from reflux.tokenalign.spans import Alignment, align_batch, align_spans, align_spans_ref

ROOT = Path(__file__).resolve().parents[1]
ALIGNER = [
    "CMakeLists.txt",
    "tokenalign/native",
    *(
        f"tokenalign/{x}.py"
        for x in ("offsets", "spans", "prefix_hash", "norm_map", "byte_table", "table_readers")
    ),
]
BATCH = 200  # streams of one pair, aligned by one call
TRAINED = {
    "byte level": byte_level,
    "characters": lambda: byte_level(size=258),
    "byte level, prefix": lambda: byte_level(prefix=True),
    "NFC": lambda: byte_level("NFC"),
    "NFKC": lambda: byte_level("NFKC"),
    "SentencePiece BPE": lambda: sentencepiece("bpe"),
    "SentencePiece Unigram": lambda: sentencepiece("unigram"),
    "SentencePiece, no prefix": lambda: sentencepiece("unigram", False),
    "Metaspace": lambda: metaspace("bpe", "first"),
    "Prepend": lambda: metaspace("bpe", "legacy"),
}
WORDS = [
    *PROBES,
    "the",
    "cat",
    "alog",
    " ",
    "  ",
    "\n",
    "\t",
    "\r\n",
    "1",
    "23",
    "4567",
    ",",
    ".",
    "-",
    "_",
    "é",
    "e\u0301",
    "你好",
    "🙂",
    "👩\u200d👧",
    "\u0301",
    "\ufb01",
    "ﷺ",
    "Å",
    "İ",
    "ß",
    "\u00a0",
    "\u200b",
    "\ufffd",
    "<|",
    "|>",
    "</",
    "<s",
    "नि",
    "กำ",
    "한",
    "ᄒ\u1161",
]


@dataclass(frozen=True, eq=False)
class Tokenizer:
    name: str
    encoder: Any
    table: ByteTable
    hashes: PieceHashes

    @classmethod
    def of(cls, name: str, encoder: Any, table: ByteTable | None = None) -> "Tokenizer":
        table = table or ByteTable.of(encoder)
        return cls(name, encoder, table, PieceHashes.of(table))

    def side(self, ids: list[int], source: bytes) -> Side:
        return side(self.table, ids, source, normalize=normalizer_of(self.encoder), strict=True)


def tokenizers() -> tuple[list[Tokenizer], dict[str, str]]:
    """Those there are, and why the others are not."""
    found, absent = [Tokenizer.of(name, make()) for name, make in TRAINED.items()], {}
    for name in SOURCES:
        try:
            one = real(name)
            found.append(Tokenizer.of(name, one.tokenizer, one.table))
        except pytest.skip.Exception as reason:
            absent[name] = str(reason)
    return found, absent


def draw(rng: np.random.Generator, writer: Tokenizer) -> tuple[list[int], bytes] | None:
    """Ids of the writer and their source, or None when the ids spell no text."""
    if rng.random() < 0.5:
        text = "".join(WORDS[i] for i in rng.integers(0, len(WORDS), rng.integers(1, 9)))
        return encode_text(writer.encoder, text), text.encode()
    ids = rng.choice(np.flatnonzero(writer.table.kind == TEXT), rng.integers(1, 17)).tolist()
    spelled = spell(writer.table, ids)
    return (ids, spelled.bytes) if spelled.text else None


def check(got: Alignment, a: Side, b: Side, source: bytes) -> None:
    """Against the definition and the bytes; AssertionError with what differs."""
    assert a.reproduces and b.reproduces and got.exact.all(), "a span is not exact"
    pieces = []
    for one in (a, b):
        end = np.cumsum(one.lens)
        pieces.append(
            [source[e - n : e] for e, n in zip(end.tolist(), one.lens.tolist(), strict=True)]
        )
        if one.ends is None:
            raw = [one.table.pieces[i] if i >= 0 else b"" for i in one.ids.tolist()]
            for at in one.skips.tolist():
                raw[at] = raw[at][1:]
            assert b"".join(raw)[: len(source)] == source, "other bytes than the source"
    # else the writer's last character was cut: an open tail
    if a.lens.sum() == b.lens.sum() == len(source):
        span_a, span_b, num = align_spans_ref(*pieces)
        assert (got.span_a.tolist(), got.span_b.tolist(), got.num_spans) == (span_a, span_b, num), (
            "other spans than the definition's"
        )
    assert got.bounds.tolist() == sorted(
        set(np.cumsum(a.lens).tolist()) & set(np.cumsum(b.lens).tolist()) - {0}
    ), "other boundaries"


def check_torch(
    rows: list[Alignment], sides: tuple[list[Side], list[Side]], pair: tuple[Tokenizer, Tokenizer]
) -> int:
    """The padded device path over the rows that need no position map; how many there were."""
    plain = [
        r
        for r in range(len(rows))
        if sides[0][r].ends is None
        and sides[1][r].ends is None
        and not (sides[0][r].later_skips or sides[1][r].later_skips)
    ]
    if not plain:
        return 0
    found = []
    for tokenizer, chosen in zip(pair, sides, strict=True):
        ids = torch.nn.utils.rnn.pad_sequence(
            [torch.from_numpy(chosen[r].ids) for r in plain], batch_first=True, padding_value=-1
        )
        found += [
            ids >= 0,
            *prefix_hashes(
                tokenizer.hashes, ids, ids >= 0, torch.tensor([chosen[r].skip for r in plain])
            ),
        ]
    mask_a, len_a, hash_a, mask_b, len_b, hash_b = found
    span_a, span_b, num = align_batch(len_a, len_b, mask_a, mask_b)
    exact = exact_spans(hash_a, span_a, hash_b, span_b)
    for k, r in enumerate(plain):
        got = rows[r]
        assert (
            num[k] == got.num_spans and exact[k, : got.num_spans].tolist() == got.exact.tolist()
        ), "torch: other exact spans"
        assert span_a[k, : len(got.span_a)].tolist() == got.span_a.tolist(), "torch: other spans"
        assert span_b[k, : len(got.span_b)].tolist() == got.span_b.tolist(), "torch: other spans"
    return len(plain)


def run(streams: int, seed: int) -> dict:
    rng, counts, problems = np.random.default_rng(seed), Counter(), []
    found, absent = tokenizers()
    pairs = list(itertools.permutations(found, 2))
    start = time.perf_counter()
    while counts["streams"] < streams:
        pair = writer, reader = pairs[rng.integers(len(pairs))]
        batch, sides = [], ([], [])
        for _ in range(BATCH):
            drawn = draw(rng, writer)
            if drawn is None:
                counts["not text"] += 1
                continue
            ids, source = drawn
            try:
                both = (
                    writer.side(ids, source),
                    reader.side(encode_text(reader.encoder, source.decode()), source),
                )
            except Exception as error:  # every exception is a finding
                problems.append(
                    f"{writer.name} -> {reader.name}, {source!r}: {type(error).__name__}: {error}"
                )
                continue
            batch.append(source), sides[0].append(both[0]), sides[1].append(both[1])
        try:
            rows = align_spans(*sides)
            counts["torch rows"] += check_torch(rows, sides, pair)
        except Exception as error:
            problems.append(
                f"{writer.name} -> {reader.name}, a batch: {type(error).__name__}: {error}"
            )
            continue
        for got, a, b, source in zip(rows, *sides, batch, strict=True):
            try:
                check(got, a, b, source)
            except AssertionError as error:
                problems.append(f"{writer.name} -> {reader.name}, {source!r}: {error}")
            counts.update(
                {
                    "streams": 1,
                    "tokens": len(a.ids) + len(b.ids),
                    "bytes": len(source),
                    "spans": got.num_spans,
                    "through a normaliser": a.ends is not None or b.ends is not None,
                    "a space in front": bool(a.skip or b.skip),
                    "cut inside a character": got.bytes_a != len(source),
                }
            )
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "tokenizers": [t.name for t in found],
        "absent": absent,
        "pairs": len(pairs),
        **counts,
        "findings": len(problems),
        "first_findings": problems[:20],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=120_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    git = lambda *args: subprocess.run(
        ["git", *args], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    commit = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--", *ALIGNER, "tests/long_run_align.py")
    if arguments.record and changed:
        sys.exit(
            f"No record: the aligner or this script has changes that are not committed:\n{changed}"
        )
    result = run(arguments.streams, arguments.seed)
    print(json.dumps(result, indent=1, ensure_ascii=False))
    if arguments.record:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        path = ROOT / "bench/records" / f"{now[:10]}_align_long_run_cpu.json"
        record = {
            "op": "align_long_run",
            "commit": commit,
            "dirty": False,
            "date": now,
            "seed": arguments.seed,
            "command": " ".join(["python tests/long_run_align.py", *sys.argv[1:]]),
            "python": platform.python_version(),
            "numpy": np.__version__,
            "torch": torch.__version__,
            **result,
        }
        path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        print(f"Recorded in {path.relative_to(ROOT)}")
    sys.exit(bool(result["findings"]))


if __name__ == "__main__":
    main()
