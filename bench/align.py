"""Time the aligner against what people do instead; the three must agree on every boundary first.

    python -m bench.align                        # tokens/s, ratios, peak memory
    python -m bench.align --record --scale       # also 10^5 to 10^8 tokens, and a record in
        bench/records/ (clean tree only)

    core       ids of both sides, tables -> spans, bytes compared; arrays ready, results as arrays
    call       offsets.side for either side from int32 arrays, then spans.align_spans: what a
               trainer pays
    call+list  the same from Python lists, as `encode` gives them
    walk       a two-pointer loop in Python over byte ends that are ready; it compares no bytes
    offsets    both fast tokenizers encode the text again and their character offsets are merged;
               not for text that is split inside a character

"text" is the standard library's source under two byte-level BPEs of 32k and 16k ids trained on it
in this process, "random" uniform bytes in pieces of 1 to 12 over about 10^5 ids in no order: nearly
every look-up leaves the cache. One core, n and m tokens of either side counted together.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core for everybody

from reflux.tokenalign import _native
from reflux.tokenalign.byte_table import TEXT, ByteTable, encode_text
from reflux.tokenalign.offsets import Side, side, spelling
from reflux.tokenalign.spans import align_spans

from .records import device, git, write

ALIGNER = ["CMakeLists.txt", "tokenalign/native", "tokenalign/offsets.py", "tokenalign/spans.py"]
SEED, ROWS, ROUNDS = 0, 64, 21
TOKENS = 1 << 20  # of both sides together


@dataclass(frozen=True)
class Case:
    name: str
    tables: tuple[ByteTable, ByteTable]
    ids: tuple[list[np.ndarray], list[np.ndarray]]  # int32, row by row
    sources: list[bytes]
    tokenizers: tuple | None = None

    @property
    def tokens(self) -> int:
        return sum(len(row) for side_ids in self.ids for row in side_ids)

    def sides(self, form: Callable = np.asarray) -> tuple[list[Side], list[Side]]:
        return tuple(
            [side(table, form(row), source) for row, source in zip(rows, self.sources)]
            for table, rows in zip(self.tables, self.ids)
        )

    def arrays(self) -> list:
        out = []
        for table, rows in zip(self.tables, self.ids):
            row = np.cumsum([0, *map(len, rows)], dtype=np.int64)
            out += [spelling(table, False).native, np.concatenate(rows), row, np.empty(0, np.int64)]
        return out


def text_case(tokens: int) -> Case:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    files = sorted(Path(os.__file__).parent.glob("*.py"))
    text = "".join(f.read_text(encoding="utf-8", errors="ignore") for f in files)
    tokenizers = []
    for size, digits in ((32_000, False), (16_000, True)):
        tokenizer = Tokenizer(models.BPE())
        own = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.pre_tokenizer = (
            pre_tokenizers.Sequence([pre_tokenizers.Digits(True), own]) if digits else own
        )
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.train_from_iterator(
            [text[i : i + 8192] for i in range(0, len(text), 8192)],
            trainers.BpeTrainer(
                vocab_size=size, initial_alphabet=own.alphabet(), show_progress=False
            ),
        )
        tokenizers.append(tokenizer)
    cut = len(text) // ROWS
    rows = [text[r * cut : (r + 1) * cut] for r in range(ROWS)]
    once = sum(len(encode_text(t, row)) for t in tokenizers for row in rows)
    length = max(1, int(cut * min(1.0, tokens / once)))
    rows = [row[:length] for row in rows]
    ids = tuple([np.array(encode_text(t, row), np.int32) for row in rows] for t in tokenizers)
    return Case(
        "text",
        tuple(map(ByteTable.of, tokenizers)),
        ids,
        [row.encode() for row in rows],
        tuple(tokenizers),
    )


def random_case(tokens: int, vocabulary: int = 1 << 17) -> Case:
    rng = np.random.default_rng(SEED)
    text = rng.integers(0, 256, 2 * tokens, dtype=np.uint8).tobytes()  # 4 bytes a token and side
    per = len(text) // ROWS
    tables, ids = [], []
    for _ in "ab":
        ends = np.cumsum(np.minimum(rng.geometric(0.25, len(text)), 12))
        cuts = np.unique(np.concatenate([ends[ends < per * ROWS], np.arange(1, ROWS + 1) * per]))
        pieces = [text[a:b] for a, b in zip([0, *cuts], cuts)]
        known = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
        id_of = rng.permutation(len(known))
        order = [b""] * len(known)
        for piece, i in known.items():
            order[id_of[i]] = piece
        tables.append(ByteTable(tuple(order), np.full(len(order), TEXT, np.int8), "byte_level"))
        flat = id_of[np.fromiter((known[piece] for piece in pieces), np.int64, len(pieces))].astype(
            np.int32
        )
        ids.append(np.split(flat, np.searchsorted(cuts, np.arange(1, ROWS) * per, side="right")))
    return Case(
        "random", tuple(tables), tuple(ids), [text[r * per : (r + 1) * per] for r in range(ROWS)]
    )


def walk(ends_a: list[int], ends_b: list[int]) -> tuple[list[int], list[int], list[int]]:
    """The loop that everybody writes: boundaries and the span of each token."""
    i = j = closed = 0
    bounds, span_a, span_b = [], [], []
    while i < len(ends_a) and j < len(ends_b):
        a, b = ends_a[i], ends_b[j]
        if a <= b:
            span_a.append(len(bounds))
            i += 1
        if b <= a:
            span_b.append(len(bounds))
            j += 1
        if a == b > closed:
            bounds.append(a)
            closed = a
    return bounds, span_a, span_b


def by_offsets(tokenizers: tuple, texts: list[str]) -> list[list[int]]:
    """Boundaries in characters, from the offsets of two fast tokenizers."""
    out = []
    for text in texts:
        ends = [
            [end for _, end in t.encode(text, add_special_tokens=False).offsets] for t in tokenizers
        ]
        out.append(walk(*ends)[0])
    return out


def check(case: Case) -> None:
    """All methods agree on the boundaries of this very input, or nothing is timed."""
    alignments = align_spans(*case.sides())
    ends = [[np.cumsum(one.lens).tolist() for one in sides] for sides in case.sides()]
    for got, a, b, source in zip(alignments, *ends, case.sources):
        assert got.exact.all() and got.bounds[-1] == len(source)
        assert walk(a, b) == (got.bounds.tolist(), got.span_a.tolist(), got.span_b.tolist())
    if case.tokenizers:
        # elsewhere characters are not bytes
        ascii_rows = [r for r, source in enumerate(case.sources) if source.isascii()][:4]
        for r, bounds in zip(
            ascii_rows, by_offsets(case.tokenizers, [case.sources[r].decode() for r in ascii_rows])
        ):
            assert bounds == alignments[r].bounds.tolist()


def methods(case: Case) -> dict[str, tuple[Callable[[], object], int]]:
    """Name -> what to time, and how many rows it does (slow ones do few)."""
    arrays, lists = case.arrays(), tuple([row.tolist() for row in rows] for rows in case.ids)
    ends = [[np.cumsum(one.lens).tolist() for one in sides[:8]] for sides in case.sides()]
    few = [source.decode() for source in case.sources[:4]] if case.tokenizers else []

    def from_lists() -> None:
        align_spans(
            *(
                [side(t, row, s) for row, s in zip(rows, case.sources)]
                for t, rows in zip(case.tables, lists)
            ),
            threads=1,
        )

    timed = {
        "core": (lambda: _native.align_ids(*arrays, 1), ROWS),
        "core, 2 threads": (lambda: _native.align_ids(*arrays, 2), ROWS),
        "call": (lambda: align_spans(*case.sides(), threads=1), ROWS),
        "call+list": (from_lists, ROWS),
        "walk": (lambda: [walk(a, b) for a, b in zip(*ends)], 8),
    }
    if few:
        timed["offsets"] = (lambda: by_offsets(case.tokenizers, few), 4)
    return timed


def measure(case: Case) -> dict[str, dict]:
    """p20, p50, p80 over interleaved rounds; ns a token and 10^6 tokens a second of the median."""
    todo, seen = methods(case), {}
    for _ in range(ROUNDS):
        for name, (run, _) in todo.items():
            start = time.perf_counter()
            run()
            seen.setdefault(name, []).append(time.perf_counter() - start)
    out = {}
    for name, (_, rows) in todo.items():
        tokens = sum(len(row) for side_ids in case.ids for row in side_ids[:rows])
        p20, p50, p80 = np.quantile(seen[name], [0.2, 0.5, 0.8])
        out[name] = {
            "tokens": tokens,
            "ms_p20_p50_p80": [round(1e3 * x, 3) for x in (p20, p50, p80)],
            "ns_per_token": round(1e9 * p50 / tokens, 2),
            "mtokens_per_s": round(tokens / p50 / 1e6, 2),
        }
    for row in out.values():
        row["times_core"] = round(row["ns_per_token"] / out["core"]["ns_per_token"], 1)
    return out


def peak_bytes(run: Callable[[], object]) -> int | None:
    """Peak of this process' memory during `run`, above what it held before; None if not known."""

    def read(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(x for x in lines if x.startswith(name)).split()[1]) * 1024

    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except OSError:
        return None
    before = read("VmRSS")
    run()
    return read("VmHWM") - before


def scale(case: Case) -> list[dict]:
    """The same rows repeated: time and memory per token must not grow. At the end one long row."""
    table_a, flat_a, _, none, table_b, flat_b, _, _ = case.arrays()
    out = []
    for total, rows in ((10**5, 8), (10**6, 64), (10**7, 64), (10**8, 64), (10**8, 1)):
        times = max(1, total // case.tokens)
        if total < case.tokens:
            few = max(1, int(ROWS * total / case.tokens))
            flat = [np.concatenate(rows_of[:few]) for rows_of in case.ids]
            begin = [
                np.cumsum([0, *map(len, rows_of[:few])], dtype=np.int64) for rows_of in case.ids
            ]
        else:
            flat = [np.tile(x, times) for x in (flat_a, flat_b)]
            per = max(1, times // rows)
            begin = [
                np.append(np.arange(0, times, per) * len(x), times * len(x)).astype(np.int64)
                for x in (flat_a, flat_b)
            ]
        arguments = [table_a, flat[0], begin[0], none, table_b, flat[1], begin[1], none, 1]
        seen = []
        peak = peak_bytes(lambda: _native.align_ids(*arguments))  # noqa: B023  called at once
        for _ in range(3 if total > 10**7 else 7):
            start = time.perf_counter()
            _native.align_ids(*arguments)
            seen.append(time.perf_counter() - start)
        tokens = len(flat[0]) + len(flat[1])
        out.append(
            {
                "tokens": tokens,
                "rows": len(begin[0]) - 1,
                "ms_p50": round(1e3 * float(np.median(seen)), 2),
                "ns_per_token": round(1e9 * float(np.median(seen)) / tokens, 2),
                "peak_bytes_per_token": None if peak is None else round(peak / tokens, 1),
            }
        )
    return out


def write_record(cases: dict, scaling: list[dict] | None) -> None:
    if git("status", "--porcelain", "--", *ALIGNER, "bench/align.py"):
        sys.exit("No record: the aligner or this file has changes that are not committed.")
    path = write(
        "align_cpu",
        {
            "op": "align",
            "gate": "all methods gave the same boundaries on these inputs",
            "seed": SEED,
            "rounds": ROUNDS,
            "rows": ROWS,
            **device(),
            "cases": cases,
            "scale": scaling,
        },
        command="python -m bench.align",
    )
    print(f"Recorded in {path}")


def _align_on_one_thread(case: Case) -> None:
    align_spans(*case.sides(), threads=1)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.align",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--record", action="store_true", help="write bench/records/<date>_align_cpu.json"
    )
    parser.add_argument(
        "--scale", action="store_true", help="10^5 to 10^8 tokens too (about 3 GB of memory)"
    )
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens of both sides together")
    arguments = parser.parse_args()
    cases = {}
    for case in (text_case(arguments.tokens), random_case(arguments.tokens)):
        check(case)
        peak = peak_bytes(partial(_align_on_one_thread, case))
        results = measure(case)
        cases[case.name] = {
            "tokens": case.tokens,
            "vocabularies": [len(t) for t in case.tables],
            "call_peak_bytes_per_token": None if peak is None else round(peak / case.tokens, 1),
            "methods": results,
        }
        for name, row in results.items():
            p20, p50, p80 = row["ms_p20_p50_p80"]
            print(
                f"{case.name:6} {name:15} {row['mtokens_per_s']:8.2f} M tokens/s  "
                f"{row['ns_per_token']:8.1f} ns a token  {p50:8.2f} ms ({p20:.2f} to {p80:.2f}) "
                f"for {row['tokens']:,}  {row['times_core']:.1f} x core"
            )
        if case.name == "text":
            scaling = scale(case) if arguments.scale else None
    for row in scaling or ():
        print(
            f"scale  {row['tokens']:>11,} tokens in {row['rows']} rows: {row['ms_p50']:.1f} ms, "
            f"{row['ns_per_token']} ns a token, peak {row['peak_bytes_per_token']} bytes a token"
        )
    if arguments.record:
        write_record(cases, scaling)


if __name__ == "__main__":
    main()
