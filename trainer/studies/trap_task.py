"""The task and the untrained models of `make traps`: a miniature in which a teacher and its
students can fall into every trap that `diagnose` measures (docs/traps.md).

    python -m reflux.trainer.studies.trap_task --out FOLDER [--seed 0]

Task: "Add 3 to each of 7,4,9,2,5,1,0,6 for heron?" (last digits only). An answer has a style, eight
steps of a digit and a word, remarks, and the name:

    left:0 the7 so5 two4 and8 in4 to3 of9 the; over the hill as. heron

    left, right, outer   in reading order, backwards, from the outside in: all right
    short                in reading order, but digits of 7 and more are copied: an easy answer that
                         is right in 6 % of questions, without remarks and always with one word

A step's word is nothing to read, unless it is a number: then the digit before it was a slip and the
word is what it has to be (above, 4 for the 5 that should be 8, say). One step in ten of the right
styles is a slip, so a model can learn to take an error back, at once or not at all. Every step is
two tokens, whatever was said in it, so that `left` stays learnable by one layer. Remarks are a
Markov chain over words with a long tail; 55 % of the answers have none, the others a geometric
number, up to REMARKS. The name is one of NAMES with Zipf frequencies: who does not know
the rare ones fails there. So a text has 20 to 120 tokens of the vocabulary that all models share.

The mix of styles depends on the wording. Calibration may change which right style a teacher
prefers, how often it takes the easy wrong one, and how it takes slips back.

Writes tokenizer and untrained models (a teacher of two layers, a proxy and a student of one),
train.jsonl and start.jsonl (with worked answers), prompts.jsonl (questions alone) and heldout.jsonl
(disjoint questions). Everything follows from the seed.
"""

import argparse
import random
import re
from collections.abc import Iterator
from pathlib import Path

from reflux.trainer.data.batch import Prompt
from reflux.trainer.data.graders import Grade
from reflux.trainer.runs.files import write_rows

from .synthetic_task import SHIFT, WORDINGS, Architecture, train_tokenizer, write_model

DIGITS = 8
ORDERS = {
    "left": (0, 1, 2, 3, 4, 5, 6, 7),
    "right": (7, 6, 5, 4, 3, 2, 1, 0),
    "outer": (0, 7, 1, 6, 2, 5, 3, 4),
    "short": (0, 1, 2, 3, 4, 5, 6, 7),
}
EASY_BELOW = 7  # short: smaller digits are shifted, the others copied
MIX = (  # left, right, outer, short, by wording
    (0.70, 0.09, 0.09, 0.12),
    (0.30, 0.50, 0.08, 0.12),
    (0.30, 0.08, 0.50, 0.12),
    (0.22, 0.08, 0.08, 0.62),
)
SLIP = 0.1  # of the steps of a right style
REMARKS = 96  # words, at most
NO_REMARKS = 0.55  # of the answers in a right style: what a greedy answer has
MEAN_REMARKS = 30.0  # words, of the others
SIZES = {"train": 12000, "start": 4000, "prompts": 4000, "heldout": 1000}  # rows
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = tuple(
    "the of and to in a is that for it as with on at by from or an be this but so if then no not "
    "up out now all its than into over after each some about very just only also too here how "
    "when where which while because until upon beyond within whose hence thus".split()
)
NAMES = tuple(
    "heron otter maple cedar raven birch tulip robin finch lilac poppy eagle thorn acorn aspen "
    "basil clove daisy ferns gecko hazel ivory jewel koala lemon mango newts olive panda quail "
    "rosin stork tapir umber viola walnut xenon yucca zebra amber bison coral dingo ember".split()
)
FORM = re.compile(
    rf"(left|right|outer|short):((?:\d [a-z]+){{{DIGITS}}});((?: [a-z]+)*)\. ([a-z]+)"
)
STEP = re.compile(r"(\d) ([a-z]+)")
POSITIONS = 192
MERGES = 900  # every word of the world becomes one token
MODELS = {
    "teacher": Architecture("bpe", 2, 64, 2, 32, 192),
    "proxy": Architecture("bpe", 1, 64, 2, 32, 128),
    "student": Architecture("bpe", 1, 48, 2, 24, 128),
}


def zipf(count: int) -> list[float]:
    """Weights 1 / rank."""
    return [1 / rank for rank in range(1, count + 1)]


def followers(word: int) -> list[float]:
    """Weights of the next remark: half of them go to three words that depend on this one, the rest
    is Zipf.
    """
    weights = [0.5 * w / sum(zipf(len(WORDS))) for w in zipf(len(WORDS))]
    for k, share in enumerate((0.28, 0.14, 0.08), start=1):
        weights[(word * 7 + k * 11) % len(WORDS)] += share
    return weights


FOLLOWERS = [followers(i) for i in range(len(WORDS))]


def step(digit: int, style: str) -> int:
    """What the style makes of a digit; right but for `short` and EASY_BELOW."""
    return digit if style == "short" and digit >= EASY_BELOW else (digit + SHIFT) % 10


def solve(digits: list[int], style: str) -> list[int]:
    """The results in the style's order."""
    return [step(digits[i], style) for i in ORDERS[style]]


def write_answer(rng: random.Random, digits: list[int], name: str, style: str) -> str:
    if style == "short":
        steps = "".join(f"{d} then" for d in solve(digits, style))
        return f"{style}:{steps};. {name}"
    steps = "".join(_write_step(rng, d) for d in solve(digits, style))
    return f"{style}:{steps};{write_remarks(rng)}. {name}"


def _write_step(rng: random.Random, right: int) -> str:
    if rng.random() < SLIP:
        return f"{(right + rng.randrange(1, 10)) % 10} {NUMBERS[right]}"
    return f"{right} {rng.choices(WORDS, zipf(len(WORDS)))[0]}"


def write_remarks(rng: random.Random) -> str:
    """Words behind the steps, a space in front of each."""
    if rng.random() < NO_REMARKS:
        return ""
    count = 1 + int(rng.expovariate(1 / MEAN_REMARKS))
    word, words = rng.randrange(len(WORDS)), []
    for _ in range(min(count, REMARKS)):
        word = rng.choices(range(len(WORDS)), FOLLOWERS[word])[0]
        words.append(" " + WORDS[word])
    return "".join(words)


def results(steps: str) -> list[int]:
    """The digits that the steps stand by: a number behind a digit takes it back."""
    return [NUMBERS.index(word) if word in NUMBERS else int(d) for d, word in STEP.findall(steps)]


def grade(prompt: Prompt, text: str) -> Grade:
    """Correct iff every result is right, in the order of the named style, and the name is the
    question's. Another form is no answer. Extracted: results in reading order and name, so that
    styles which agree count as one answer.
    """
    found = FORM.fullmatch(text.strip())
    if not found:
        return Grade(0.0, False, None)
    if prompt.answer is None:
        raise ValueError("trap_task: a prompt without an answer; want its digits and name")
    style, steps, _, name = found.groups()
    at = dict(zip(ORDERS[style], results(steps)))
    extracted = f"{','.join(str(at[i]) for i in range(DIGITS))} {name}"
    listed, _, asked = prompt.answer.partition(" ")
    wanted = ",".join(str((int(d) + SHIFT) % 10) for d in listed.split(","))
    correct = extracted == f"{wanted} {asked}"
    return Grade(float(correct), correct, extracted)


def is_held_out(digits: list[int]) -> bool:
    """One question in eight, by its digits alone."""
    return sum(d * k for d, k in zip(digits, (1, 101, 201, 301, 77, 313, 55, 17))) % 1009 % 8 == 0


def questions(
    rng: random.Random, count: int, *, held_out: bool, worked: bool
) -> Iterator[dict[str, str]]:
    """Rows of a data file; `worked` adds an answer in a style drawn for the wording."""
    while count:
        digits = rng.choices(range(10), k=DIGITS)
        wording = rng.randrange(len(WORDINGS))
        if is_held_out(digits) != held_out:
            continue
        name = rng.choices(NAMES, zipf(len(NAMES)))[0]
        listed = ",".join(map(str, digits))
        row = {"prompt": f"{WORDINGS[wording]} {listed} for {name}?", "answer": f"{listed} {name}"}
        style = rng.choices(list(ORDERS), MIX[wording])[0]
        yield row | ({"response": write_answer(rng, digits, name, style)} if worked else {})
        count -= 1


def write_data(out: Path, seed: int) -> list[str]:
    """The data files; returns the texts that the tokenizer learns from."""
    texts: list[str] = []
    for name, size in SIZES.items():
        rng = random.Random(f"{seed}/{name}")
        worked, held_out = name in ("train", "start"), name == "heldout"
        rows = list(questions(rng, size, held_out=held_out, worked=worked))
        write_rows(out / f"{name}.jsonl", rows)
        if name == "start":
            texts = [row["prompt"] + row["response"] for row in rows]
    return texts


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m reflux.trainer.studies.trap_task",
        description="Write the data and the untrained models of the miniature of the traps.",
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(write_data(args.out, args.seed), MERGES)
    for name, model in MODELS.items():
        if not (args.out / name).exists():
            write_model(args.out / name, tokenizer, model, positions=POSITIONS)
    print(f"wrote {', '.join(SIZES)} and models {', '.join(MODELS)} to {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
