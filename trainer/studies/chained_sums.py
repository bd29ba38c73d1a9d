"""Task a of bench/PROTOCOL.md: sums and differences in words, answered at once or step by step.

    python -m reflux.trainer.studies.chained_sums --out FOLDER [--seed 0]

    seven plus six minus four?
    in one go seven plus six minus four is nine             direct
    seven plus six is thirteen, minus four is nine          worked

Both answers are honest and equally right, and within a few bytes of each other, so that a reward
that looks at length has nothing to hold on to. They differ in what they ask of a model. `direct`
wants the whole chain in one forward pass, so layers; `worked` asks for one operation at a time,
with its operands in sight. Numbers are the words zero to twenty, one token each for most
tokenizers; partial results stay in that range.

The grader is `exact` with the marker "is ": what follows the last "is " has to be the answer's
word. A worked answer with a wrong step is correct only if the last number is.

Writes train.jsonl (both answers to every question, the direct one twice), start.jsonl (one answer
to each, in either style), prompts.jsonl (questions alone) and heldout.jsonl (questions that are in
none of these). Everything follows from the seed.
"""

import argparse
import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from reflux.trainer.runs.files import write_rows

WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen twenty"
).split()
SIGNS = {1: "plus", -1: "minus"}
STYLES = ("worked", "direct")
OPERATIONS = 2  # of a question
# questions of a file; there are 1,815
SIZES = {"train": 1200, "start": 1200, "prompts": 1200, "heldout": 220}
# of the answers to each question in `train`: the direct one is learned more slowly
TAUGHT = ("worked", "direct", "direct")
HELD_OUT = 8  # one question in eight
AT_ONCE = "in one go "  # as long as the " is thirteen," of a worked answer, on average


@dataclass(frozen=True)
class Sum:
    """first + signs[0] * numbers[0] + signs[1] * numbers[1] ..., from left to right."""

    first: int
    signs: tuple[int, ...]
    numbers: tuple[int, ...]

    @property
    def results(self) -> tuple[int, ...]:
        """After each operation."""
        out, value = [], self.first
        for sign, number in zip(self.signs, self.numbers):
            value += sign * number
            out.append(value)
        return tuple(out)

    @property
    def question(self) -> str:
        return f"{WORDS[self.first]}{''.join(self._operations())}?"

    @property
    def answer(self) -> str:
        return WORDS[self.results[-1]]

    @property
    def is_held_out(self) -> bool:
        """By the question alone, whatever the seed: no seed trains on another's held-out ones."""
        return hashlib.sha256(self.question.encode()).digest()[0] % HELD_OUT == 0

    def response(self, style: str) -> str:
        """The correct answer in one of STYLES."""
        if style == "direct":
            return f"{AT_ONCE}{self.question[:-1]} is {self.answer}"
        steps = (f"{o} is {WORDS[r]}" for o, r in zip(self._operations(), self.results))
        return WORDS[self.first] + ",".join(steps)

    def _operations(self) -> list[str]:
        return [f" {SIGNS[s]} {WORDS[n]}" for s, n in zip(self.signs, self.numbers)]


def draw(rng: random.Random, operations: int) -> Sum:
    """Numbers from one to nine; all partial results from zero to twenty."""
    while True:
        one_to_nine = [rng.randint(1, 9) for _ in range(operations + 1)]
        signs = tuple(rng.choice((1, -1)) for _ in range(operations))
        drawn = Sum(one_to_nine[0], signs, tuple(one_to_nine[1:]))
        if all(0 <= r < len(WORDS) for r in drawn.results):
            return drawn


def questions(rng: random.Random, count: int, *, held_out: bool) -> Iterator[Sum]:
    """Different ones."""
    seen: set[Sum] = set()
    while len(seen) < count:
        drawn = draw(rng, OPERATIONS)
        if drawn.is_held_out == held_out and drawn not in seen:
            seen.add(drawn)
            yield drawn


def write_data(out: Path, seed: int, sizes: Mapping[str, int] = SIZES) -> None:
    """The four files. Both styles of `train` see the same sums."""
    for name, size in sizes.items():
        rng = random.Random(f"{seed}/{name}")
        drawn = questions(rng, size, held_out=name == "heldout")
        rows = [row for s in drawn for row in _rows(s, _styles(name, rng))]
        rng.shuffle(rows)
        write_rows(out / f"{name}.jsonl", rows)


def _styles(name: str, rng: random.Random) -> Sequence[str]:
    if name == "train":
        return TAUGHT
    return (rng.choice(STYLES),) if name == "start" else ()


def _rows(s: Sum, styles: Sequence[str]) -> list[dict[str, str]]:
    row = {"prompt": s.question, "answer": s.answer}
    return [row | {"response": s.response(style)} for style in styles] or [row]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m reflux.trainer.studies.chained_sums",
        description="Write sums in words with their worked and their direct answers.",
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    write_data(args.out, args.seed)
    print(f"wrote {', '.join(SIZES)} to {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
