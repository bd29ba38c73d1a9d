"""The exact next-byte machinery over many texts and real tokenizers, and its memory.

    python -m bench.byte_texts             # 10,000 texts, four of tests/real_tokenizers.py
    python -m bench.byte_texts --memory    # peak of the fused head over T
    python -m bench.byte_texts --record    # with either: a record in bench/records/ (clean tree)

Texts: half are lines of the standard library's source, half random strings of letters, digits,
spaces, accents, Chinese and emoji. Of each text every tokenizer has to give the same byte
positions and the same byte behind each; of one text in ten a random model's next-byte
distributions have to sum to 1, and the probability of the empty prefix to be 1 where no space was
put in front. What fails is counted.

Memory: peak above hidden states and heads of a forward and backward of `byte_kl`, by counting
tensors (bench.memory), beside what a [T, V] softmax in fp32 would take.
"""

import argparse
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from reflux.tokenalign.byte_trie import ByteTrie, alphabet
from reflux.tokenalign.byte_windows import ByteWindows, Tokens, byte_windows
from reflux.tokenalign.linear_next_byte import ByteDivergence, byte_kl, next_bytes
from reflux.tokenalign.linear_rows import Linear
from reflux.tokenalign.vocab_map import Vocabulary

from .byte_step import source, trained
from .memory import peak_mib
from .records import ROOT, device, git, write

MEASURED = ["tokenalign", "kernels", "bench/byte_texts.py"]
NAMES = ("mistral_v3", "tekken", "qwen", "deepseek")
SEED, TEXTS, HIDDEN, TOGETHER = 0, 10_000, 4, 200
STOPS = 1  # the last id of each table is taken for the stop
LETTERS = "abcdefgh ABC 0123456789 .,;:!?'\"-_()"
LETTERS += "éüñßøžışλжя你好世界日本語한국어🙂👩‍👩‍👧🎉 \n\t"
TOKENS, VOCABULARY, WIDTH = (512, 1024, 2048, 4096), 8000, 64


def texts(count: int) -> list[str]:
    """Seeded; none is empty."""
    rng = random.Random(SEED)
    lines = [line for line in source().splitlines() if line.strip()]
    drawn = [rng.choice(lines)[:80] for _ in range(count // 2)]
    for _ in range(count - len(drawn)):
        drawn.append("".join(rng.choices(LETTERS, k=rng.randint(1, 40))))
    return drawn


class Side:
    """A real tokenizer, and a random model over its ids."""

    def __init__(self, name: str):
        sys.path.insert(0, str(ROOT / "tests"))
        from real_tokenizers import real

        self.name, self.real = name, real(name)
        V = len(self.real.table)
        self.stop = V - STOPS
        self.trie = ByteTrie.of(Vocabulary(self.real.table, [self.stop]))
        random_numbers = torch.Generator().manual_seed(SEED)
        self.head_VD = torch.randn(V, HIDDEN, generator=random_numbers)

    def read(self, text: str) -> tuple[list[int], bool] | None:
        """(ids with the stop, was a space put in front?), None where they do not spell the text."""
        ids, raw = self.real.encode(text), text.encode()
        spelled = self.real.table.bytes_of(ids)
        space = spelled == b" " + raw
        if not (space or spelled == raw) or not self.real.table.lens[ids].all() or self.stop in ids:
            return None
        return [*ids, self.stop], space

    def windows(self, rows: Sequence[tuple[list[int], bool]]) -> ByteWindows:
        ids_R = torch.tensor([i for ids, _ in rows for i in ids])
        text_R = torch.tensor([m for m, (ids, _) in enumerate(rows) for _ in ids])
        space_R = torch.tensor([s and t == 0 for ids, s in rows for t in range(len(ids))])
        return byte_windows(self.trie, Tokens(ids_R, text_R, space_R))


def check(sides: Sequence[Side], drawn: Sequence[str]) -> dict[str, Any]:
    """Counts, and the largest errors."""
    found: dict[str, Any] = {"texts": len(drawn), "bytes": 0, "positions": 0, "distributions": 0}
    found |= {"unaligned": {s.name: 0 for s in sides}, "tokens": {s.name: 0 for s in sides}}
    found |= {"disagree": 0, "sum_error": 0.0, "prefix_error": 0.0, "missing": {}}
    missing: dict[str, list[float]] = {s.name: [] for s in sides}
    for start in range(0, len(drawn), TOGETHER):
        part = drawn[start : start + TOGETHER]
        read = {s.name: [s.read(text) for text in part] for s in sides}
        for name, rows in read.items():
            found["unaligned"][name] += sum(r is None for r in rows)
        whole = [i for i in range(len(part)) if all(rows[i] is not None for rows in read.values())]
        found["bytes"] += sum(len(part[i].encode()) for i in whole)
        windows = {}
        for s in sides:
            rows = [r for i in whole if (r := read[s.name][i]) is not None]
            windows[s.name] = s.windows(rows)
            found["tokens"][s.name] += len(windows[s.name].ids_R)
        byte = [w.byte_P for w in windows.values()]
        want = torch.tensor([b for i in whole for b in (*part[i].encode(), 256)])
        found["disagree"] += sum(not torch.equal(b, want) for b in byte)
        found["positions"] += len(want)
        for s in sides:
            _distributions(s, [r for i in whole[::10] if (r := read[s.name][i])], found, missing)
    found["missing"] = {name: round(sum(x) / max(len(x), 1), 4) for name, x in missing.items()}
    return found


def _distributions(
    side: Side, rows, found: dict[str, Any], missing: dict[str, list[float]]
) -> None:
    if not rows:
        return
    w = side.windows(rows)
    random_numbers = torch.Generator().manual_seed(len(w.ids_R))
    hidden_TD = torch.randn(len(w.ids_R), HIDDEN, generator=random_numbers)
    got = next_bytes(Linear(hidden_TD, side.head_VD), side.trie, w)
    error = (got.logp_PS.double().exp().sum(1) - 1).abs().max()
    found["sum_error"] = max(found["sum_error"], float(error))
    plain = [r for r, (_, space) in zip(w.text_rows, rows) if not space]
    first = torch.tensor([int(w.starts_R[r, 0]) for r in plain], dtype=torch.long)
    error = got.prefix_P[first].abs().max() if plain else torch.zeros(())
    found["prefix_error"] = max(found["prefix_error"], float(error))
    found["distributions"] += w.positions
    missing[side.name] += got.missing_P.tolist()


def memory(tokens: Sequence[int] = TOKENS, size: int = 2000) -> list[dict[str, Any]]:
    """Peak MiB over T, of texts of `size` bytes that a student and a teacher of other tokenizers
    read.
    """
    text = source()
    own, other = trained(text[:300_000], VOCABULARY), trained(text[100_000:400_000], VOCABULARY)
    symbols = alphabet([own.trie, other.trie])
    random_numbers = torch.Generator().manual_seed(SEED)
    heads = [
        torch.randn(len(s.trie.order_V), WIDTH, generator=random_numbers) / 8 for s in (own, other)
    ]
    rows = []
    for T in tokens:
        piece = text[: _bytes_of(own, text, T)]
        parts = [piece[i : i + size] for i in range(0, len(piece), size)]
        ids = [s.rows(parts) for s in (own, other)]
        windows = [s.windows(x) for s, x in zip((own, other), ids)]
        hidden = [
            torch.randn(len(w.ids_R), WIDTH, generator=random_numbers).requires_grad_(i == 0)
            for i, w in enumerate(windows)
        ]

        def step(hidden=hidden, windows=windows) -> None:
            teacher = Linear(hidden[1], heads[1])
            wanted = next_bytes(teacher, other.trie, windows[1], symbols=symbols)
            student = Linear(hidden[0], heads[0])
            how = ByteDivergence("reverse")
            result = byte_kl(student, own.trie, windows[0], wanted, how, symbols=symbols)
            result.total.backward()

        student_tokens = len(windows[0].ids_R)
        peak = peak_mib(step, [*hidden, *heads])
        softmax = student_tokens * len(own.trie.order_V) * 4 / 2**20
        rows.append(
            {
                "student_tokens": student_tokens,
                "byte_positions": windows[0].positions,
                "peak_mib": round(peak, 1),
                "softmax_mib": round(softmax, 1),
                "logits_of_both_and_gradient_mib": round(3 * softmax, 1),
            }
        )
    return rows


def _bytes_of(side, text: str, tokens: int) -> int:
    """How much of the text has about that many tokens."""
    share = len(side.tokenizer.encode(text[:20_000]).ids) / 20_000
    return int(tokens / share)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.byte_texts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--texts", type=int, default=TEXTS)
    parser.add_argument("--record", action="store_true", help="write a record")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    start = time.monotonic()
    if args.memory:
        op, fields = "byte_memory", {"vocabulary": VOCABULARY, "rows": memory()}
    else:
        op = "byte_texts"
        fields = {"tokenizers": NAMES, **check([Side(n) for n in NAMES], texts(args.texts))}
    fields |= {"seconds": round(time.monotonic() - start, 1)}
    print(fields)
    if args.record:
        if git("status", "--porcelain", "--", *MEASURED):
            sys.exit("No record: the code that is measured has changes that are not committed.")
        path = write(
            f"{op}_cpu", {"op": op, "seed": SEED, **device(), **fields}, command=_spelled(args)
        )
        print("Recorded in", Path(path))
    wrong = fields.get("disagree", 0) or fields.get("sum_error", 0) > 1e-5
    return int(bool(wrong))


def _spelled(args: argparse.Namespace) -> str:
    return "python -m bench.byte_texts" + " --memory" * args.memory + " --record"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
