"""Does a proxy find the easy answers of a study likelier than the hard ones? Asked before any arm.

    python -m reflux.trainer.studies.proxy_gate --proxy MODEL --data train.jsonl --out FOLDER
                                                [--hard "in one go "]

The calibration reward follows what the proxy finds likely, and a proxy that cannot take a single
step yet finds the worked answer to a sum *less* likely: it has two numbers to guess and the direct
one has one. Calibrated by it, the distillable teacher would answer directly (bench/LOG.md,
2026-11-29). Hard answers are told by how they begin (--hard).

    gap = mean over questions of log p_proxy(easy | question) - log p_proxy(hard | question)

in nats, of the correct answers, which a good teacher finds about equally likely. gate.json has it
with its item-level interval. Exit code 1 unless the whole interval is above --least.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from reflux.trainer.runs.files import write_json
from reflux.trainer.runs.stats import Estimate, paired_difference

from .chained_sums import AT_ONCE
from .side_by_side import Read, make_reader
from .worked_answers import read_rows

QUESTIONS = 200


@dataclass(frozen=True)
class Gate:
    """Nats of a whole answer."""

    proxy: str
    questions: int
    easy: float  # mean negative log-likelihood
    hard: float
    gap: Estimate  # hard - easy; item-level, paired by question
    least: float
    passed: bool


def pairs_of(
    rows: Sequence[Mapping[str, str]], count: int, hard: str = AT_ONCE
) -> list[tuple[str, str, str]]:
    """(question, easy answer, hard answer) of the first questions that have both. Hard ones begin
    with `hard`."""
    found: dict[str, dict[bool, str]] = {}
    for row in rows:
        is_hard = row["response"].startswith(hard)
        found.setdefault(row["prompt"], {})[is_hard] = row["response"]
    both = [(q, texts[False], texts[True]) for q, texts in found.items() if len(texts) == 2]
    return both[:count]


def measure(proxy: str, pairs: Sequence[tuple[str, str, str]], read: Read, least: float) -> Gate:
    """ValueError without a pair."""
    if len(pairs) < 2:
        raise ValueError(
            f"{len(pairs)} questions with an easy and a hard answer; want 2 or more. --hard says "
            "how hard answers begin"
        )
    easy = [nats for nats, _ in read([(q, text) for q, text, _ in pairs])]
    hard = [nats for nats, _ in read([(q, text) for q, _, text in pairs])]
    gap = paired_difference(hard, easy)
    return Gate(
        proxy=proxy,
        questions=len(pairs),
        easy=sum(easy) / len(easy),
        hard=sum(hard) / len(hard),
        gap=gap,
        least=least,
        passed=gap.low > least,
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m reflux.trainer.studies.proxy_gate",
        description="Does a proxy find easy answers likelier than hard ones?",
    )
    parser.add_argument("--proxy", required=True, help="a model folder")
    parser.add_argument("--data", type=Path, required=True, help="train.jsonl of the study")
    parser.add_argument("--hard", default=AT_ONCE, help="how hard answers begin")
    parser.add_argument("--least", type=float, default=0.0, help="nats")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    try:
        rows = read_rows(args.data, ("prompt", "response"))
        pairs = pairs_of(rows, QUESTIONS, args.hard)
        gate = measure(args.proxy, pairs, make_reader(args.proxy), args.least)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "gate.json", gate)
    low, high = gate.gap.low, gate.gap.high
    print(
        f"easy {gate.easy:.2f}, hard {gate.hard:.2f} nats; gap {gate.gap.mean:.2f} "
        f"[{low:.2f}, {high:.2f}] over {gate.questions} questions"
    )
    if not gate.passed:
        print(
            f"not above {gate.least}: the reward would lead the distillable teacher to hard "
            "answers. Heal the proxy for more steps"
        )
    return 0 if gate.passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
