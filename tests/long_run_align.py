"""The aligner against its definition on 10^5 and more random token streams. Not a test: run it by
hand, from the root.

    python tests/long_run_align.py --streams 120000 [--record]

A stream is a text drawn from words, digits, spaces, joiners, combining marks, scripts and half-open
tags, or what random ids of one tokenizer spell (never a canonical encoding; often cut inside a
character). One tokenizer of a drawn pair produces it, the other encodes it. Tokenizers: those that
the tests train in process, and the real ones of installed packages (real_tokenizers.py).

For every stream: no exception; both sides reproduce the source (through their normaliser where they
have one); every span is exact; boundaries and spans equal align_spans_ref, the definition; the
joined pieces are the source's bytes by Python's own arithmetic; align_batch gives the same spans.
--record writes bench/records/<date>_align_long_run_cpu.json (a clean tree only).
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
from reflux.tokenalign.spans import Alignment, align_batch, align_spans, align_spans_ref

ROOT = Path(__file__).resolve().parents[1]
ALIGNER = [
    "CMakeLists.txt",
    "tokenalign/native",
    *(
        f"tokenalign/{x}.py"
        for x in ("offsets", "spans", "norm_map", "byte_table", "table_readers")
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
class DrawnTokenizer:
    name: str
    encoder: Any
    table: ByteTable

    def side(self, ids: list[int], source: bytes) -> Side:
        return side(self.table, ids, source, normalize=normalizer_of(self.encoder), strict=True)


def tokenizers() -> tuple[list[DrawnTokenizer], dict[str, str]]:
    """All that are installed, and the reasons why others are not."""
    present, absent = [], {}
    for name, make in TRAINED.items():
        encoder = make()
        present.append(DrawnTokenizer(name, encoder, ByteTable.of(encoder)))
    for name in SOURCES:
        try:
            one = real(name)
            present.append(DrawnTokenizer(name, one.tokenizer, one.table))
        except pytest.skip.Exception as reason:
            absent[name] = str(reason)
    return present, absent


def draw(rng: np.random.Generator, producer: DrawnTokenizer) -> tuple[list[int], bytes] | None:
    """Ids of the producer and their source, or None when the ids spell no text."""
    if rng.random() < 0.5:
        text = "".join(WORDS[i] for i in rng.integers(0, len(WORDS), rng.integers(1, 9)))
        return encode_text(producer.encoder, text), text.encode()
    ids = rng.choice(np.flatnonzero(producer.table.kind == TEXT), rng.integers(1, 17)).tolist()
    spelled = spell(producer.table, ids)
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
    # else the producer's last character was cut: an open tail
    if a.lens.sum() == b.lens.sum() == len(source):
        span_a, span_b, num = align_spans_ref(*pieces)
        assert (got.span_a.tolist(), got.span_b.tolist(), got.num_spans) == (span_a, span_b, num), (
            "other spans than the definition's"
        )
    assert got.bounds.tolist() == sorted(
        set(np.cumsum(a.lens).tolist()) & set(np.cumsum(b.lens).tolist()) - {0}
    ), "other boundaries"


def check_batch(rows: list[Alignment], sides: tuple[list[Side], list[Side]]) -> int:
    """align_batch over the rows that need no position map; returns how many there were."""
    plain = [
        r
        for r, (a, b) in enumerate(zip(*sides, strict=True))
        if a.ends is None and b.ends is None and not (a.later_skips or b.later_skips)
    ]
    if not plain:
        return 0
    (len_a, mask_a), (len_b, mask_b) = (padded([side[r] for r in plain]) for side in sides)
    span_a, span_b, num = align_batch(len_a, len_b, mask_a, mask_b)
    for k, r in enumerate(plain):
        got = rows[r]
        assert num[k] == got.num_spans, "align_batch: another number of spans"
        for name, span, want in (("a", span_a[k], got.span_a), ("b", span_b[k], got.span_b)):
            assert span[: len(want)].tolist() == want.tolist(), (
                f"align_batch: other spans of {name}"
            )
    return len(plain)


def padded(sides: list[Side]) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes of each token [B, n], and which of them are tokens of the text."""
    lens, ids = (
        torch.nn.utils.rnn.pad_sequence(
            [torch.from_numpy(x) for x in rows], batch_first=True, padding_value=-1
        )
        for rows in ([side.lens for side in sides], [side.ids for side in sides])
    )
    return lens, ids >= 0


def align_drawn(
    rng: np.random.Generator, pair: tuple[DrawnTokenizer, DrawnTokenizer], counts: Counter
) -> list[str]:
    """Draw, align and check one batch; returns what is wrong."""
    (producer, other), problems = pair, []
    sources, sides = [], ([], [])
    for _ in range(BATCH):
        drawn = draw(rng, producer)
        if drawn is None:
            counts["not text"] += 1
            continue
        ids, source = drawn
        try:
            a = producer.side(ids, source)
            b = other.side(encode_text(other.encoder, source.decode()), source)
        except Exception as error:  # every exception is a finding
            problems.append(f"{source!r}: {type(error).__name__}: {error}")
            continue
        sources.append(source)
        sides[0].append(a)
        sides[1].append(b)
    try:
        rows = align_spans(*sides)
        counts["torch rows"] += check_batch(rows, sides)
    except Exception as error:
        return [*problems, f"a batch: {type(error).__name__}: {error}"]
    for got, a, b, source in zip(rows, *sides, sources, strict=True):
        try:
            check(got, a, b, source)
        except AssertionError as error:
            problems.append(f"{source!r}: {error}")
        counts["streams"] += 1
        counts["tokens"] += len(a.ids) + len(b.ids)
        counts["bytes"] += len(source)
        counts["spans"] += got.num_spans
        counts["through a normaliser"] += a.ends is not None or b.ends is not None
        counts["a space in front"] += bool(a.skip or b.skip)
        counts["cut inside a character"] += got.bytes_a != len(source)
    return problems


def run(streams: int, seed: int) -> dict:
    rng, counts, problems = np.random.default_rng(seed), Counter(), []
    present, absent = tokenizers()
    pairs = list(itertools.permutations(present, 2))
    start = time.perf_counter()
    while counts["streams"] < streams:
        pair = pairs[rng.integers(len(pairs))]
        names = " -> ".join(tokenizer.name for tokenizer in pair)
        problems += [f"{names}, {problem}" for problem in align_drawn(rng, pair, counts)]
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "tokenizers": [t.name for t in present],
        "absent": absent,
        "pairs": len(pairs),
        **counts,
        "findings": len(problems),
        "first_findings": problems[:20],
    }


def git(*arguments: str) -> str:
    command = ["git", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return result.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=120_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
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
