"""A public data set as rows of ours: python -m reflux.trainer.data.prepare NAME --out FOLDER

Reads the set from the hub, or from files that are at hand (--source), in whatever shape it has
(shapes.py); leaves out rows that occur twice, and training rows that share 13 words in a row with a
held-out question (arXiv:2005.14165, appendix C, used 13-grams first); writes train.jsonl,
test.jsonl and manifest.json with counts, seeds and hashes. A row goes to the same side whatever
else is in the set: its side is a hash of the question and the seed. Two questions are the same
where their texts and options are, but for upper case, spaces and the order of the options.
"""

import argparse
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from reflux.trainer.config.data import SourceSection
from reflux.trainer.config.fit import nearest

from .prompt import Prompt
from .prompts import SYSTEM, Prompts, load_prompts
from .shapes import CORRECT, OPTIONS, SHAPES, user
from .sources import has_splits

GRAM = 13  # words
WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class PublicSet:
    """A data set of the hub. test: its own held-out split; empty: a fraction is held out."""

    source: str
    subset: str = ""
    train: str = "train"
    test: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    task: str = ""  # the grader for it, for whoever reads the manifest


SETS = {
    "bigmath": PublicSet("SynthLabsAI/Big-Math-RL-Verified", task="math"),
    "math500": PublicSet("HuggingFaceH4/MATH-500", train="test", task="math"),
    "gsm8k": PublicSet("openai/gsm8k", "main", test="test", task="math"),
    "csqa": PublicSet("tau/commonsense_qa", test="validation", task="multiple_choice"),
    "mmlu": PublicSet("cais/mmlu", "all", "auxiliary_train", "test", task="multiple_choice"),
    "mmlu_pro": PublicSet(
        "TIGER-Lab/MMLU-Pro", train="validation", test="test", task="multiple_choice"
    ),
    "supergpqa": PublicSet("m-a-p/SuperGPQA", task="multiple_choice"),
    "arc": PublicSet("allenai/ai2_arc", "ARC-Challenge", test="test", task="multiple_choice"),
    "dolly": PublicSet("databricks/databricks-dolly-15k", task="reward_model"),
    "ifeval": PublicSet("google/IFEval", task="instructions"),
}


@dataclass(frozen=True)
class Manifest:
    """What was made of which rows. Counts of rows; sha256 of the files written."""

    name: str
    source: str
    shape: str
    task: str
    seed: int
    test_fraction: float
    where: Mapping[str, Sequence[str]]
    held_out: Sequence[str]
    read: int
    filtered: int  # by `where`
    repeated: int
    contaminated: int
    train: int
    test: int
    files: Mapping[str, str]
    left_out: Sequence[str] = ()  # columns that JSON cannot write, or that are named as a part is


@dataclass(frozen=True)
class Choice:
    """What to make of a set."""

    out: Path
    test_fraction: float = 0.05
    where: Mapping[str, Sequence[str]] = field(default_factory=dict)
    held_out: Sequence[str] = ()
    limit: int | None = None
    seed: int = 0
    force: bool = False

    def __post_init__(self):
        if not 0 <= self.test_fraction < 1:
            raise ValueError(f"--test-fraction {self.test_fraction}; want 0 to less than 1")


def prepare(name: str, public: PublicSet, choice: Choice) -> Manifest:
    """Writes the three files. ValueError for a source that cannot be read or has no split of that
    name, a folder that holds a set already, and where no row is left to train on.
    """
    if (choice.out / "manifest.json").exists() and not choice.force:
        raise ValueError(f"{choice.out}: holds a prepared set already; another --out, or --force")
    if public.test and not has_splits(public.source):
        raise ValueError(
            f"{public.source}: has no splits, so none is called {public.test!r}; without "
            "--test-split a part is held out (--test-fraction), or name files by --held-out"
        )
    counts: Counter[str] = Counter()
    train_rows = _open(public, public.train, choice.limit)
    shape = train_rows.shape
    train = list(_distinct(_chosen(train_rows, choice.where, counts), counts))
    if public.test:
        rows = _open(public, public.test, choice.limit)
        test = list(_distinct(_chosen(rows, choice.where, counts), counts))
    else:
        sides = [_side(p, choice) for p in train]
        test = [p for p, held in zip(train, sides) if held]
        train = [p for p, held in zip(train, sides) if not held]
    others = [p for source in choice.held_out for p in load_prompts(source)]
    grams = set().union(*map(_grams, [*test, *others])) if test or others else set()
    clean = [p for p in train if not grams & _grams(p)]
    counts["contaminated"] = len(train) - len(clean)
    if not clean:
        raise ValueError(
            f"{public.source}: no row is left of {counts['read']} to train on: "
            f"{counts['filtered']} filtered by --where, {counts['repeated']} repeated, "
            f"{len(test)} held out, {counts['contaminated']} share {GRAM} words with a held-out one"
        )
    written = written_shape([*clean, *test], shape)
    files = {"train.jsonl": _write(choice.out, "train", clean, written)}
    files["test.jsonl"] = _write(choice.out, "test", test, written)
    left_out = {key for p in (*clean, *test) for key in _left_out(p, written)}
    manifest = Manifest(
        name,
        public.source,
        shape,
        public.task,
        choice.seed,
        choice.test_fraction,
        choice.where,
        list(choice.held_out),
        counts["read"],
        counts["filtered"],
        counts["repeated"],
        counts["contaminated"],
        len(clean),
        len(test),
        files,
        sorted(left_out),
    )
    _write_whole(choice.out / "manifest.json", json.dumps(asdict(manifest), indent=1) + "\n")
    return manifest


def question(prompt: Prompt) -> str:
    """What is compared by words: all that the model is shown, options too, or the document."""
    return "\n".join([_asked(prompt), *_option_texts(prompt)])


def _asked(prompt: Prompt) -> str:
    asked = "\n".join(m["content"] for m in prompt.messages if m["role"] != "system")
    return asked or prompt.response or ""


def _option_texts(prompt: Prompt) -> list[str]:
    given = prompt.extra.get("choices")
    texts = given.get("text") if isinstance(given, Mapping) else given
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        return []
    return [str(text) for text in texts]


def _identity(prompt: Prompt) -> str:
    """Equal for equal questions. Signs count: 7 + 2 is not 7 - 2."""
    asked, *options = (
        " ".join(text.casefold().split()) for text in (_asked(prompt), *_option_texts(prompt))
    )
    return "\n".join([asked, *sorted(options)])


def _open(public: PublicSet, split: str, limit: int | None) -> Prompts:
    section = SourceSection(
        public.source, split=split, subset=public.subset, columns=public.columns, limit=limit
    )
    return load_prompts(section)


def _chosen(
    prompts: Iterable[Prompt], where: Mapping[str, Sequence[str]], counts: Counter[str]
) -> Iterator[Prompt]:
    """Rows whose columns have one of the values. ValueError for a column that there is not."""
    for prompt in prompts:
        counts["read"] += 1
        for column in where:
            if column not in prompt.extra:
                raise ValueError(
                    f"--where {column}: no such column{nearest(column, prompt.extra)} There are: "
                    f"{', '.join(prompt.extra) or 'none beside those that are used'}"
                )
        if all(str(prompt.extra[column]) in values for column, values in where.items()):
            yield prompt
        else:
            counts["filtered"] += 1


def _distinct(prompts: Iterable[Prompt], counts: Counter[str]) -> Iterator[Prompt]:
    seen = set()
    for prompt in prompts:
        key = _identity(prompt)
        if key in seen:
            counts["repeated"] += 1
            continue
        seen.add(key)
        yield prompt


def _side(prompt: Prompt, choice: Choice) -> bool:
    """Whether it is held out."""
    text = f"{choice.seed}\n{_identity(prompt)}"
    draw = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
    return draw < choice.test_fraction


def _grams(prompt: Prompt) -> set[str]:
    """Every 13 words in a row; of a question with fewer words, its identity."""
    words = WORD.findall(question(prompt).lower())
    if len(words) < GRAM:
        return {_identity(prompt)}
    return {" ".join(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1)}


def _write(out: Path, name: str, prompts: Sequence[Prompt], shape: str) -> str:
    """One line a row. Returns the sha256 of the file."""
    out.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row_of(p, shape), ensure_ascii=False) + "\n" for p in prompts)
    _write_whole(out / f"{name}.jsonl", text)
    return hashlib.sha256(text.encode()).hexdigest()


def _write_whole(file: Path, text: str) -> None:
    """All of it or nothing."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def written_shape(prompts: Sequence[Prompt], shape: str) -> str:
    """The one shape of SHAPES that all of these rows can be written in. shape: of their source."""
    if shape == "choices" or not all(p.messages for p in prompts):
        return shape
    one = all(p.messages == user(p.question) for p in prompts)
    return "plain" if one else "messages"


def row_of(prompt: Prompt, shape: str) -> dict[str, Any]:
    """A row of this shape that is read back as the same prompt, answer and response; with every
    other column that JSON can write and that would not be taken for a part of it.
    """
    body = {key: value for key, value in _body(prompt, shape).items() if value is not None}
    return body | _others(prompt, shape, body)


def _others(prompt: Prompt, shape: str, body: Collection[str]) -> dict[str, Any]:
    taken = _taken(shape, body)
    return {k: v for k, v in prompt.extra.items() if k not in taken and _is_json(v)}


def _left_out(prompt: Prompt, shape: str) -> set[str]:
    """Columns beside the parts that are not written."""
    body = _body(prompt, shape).keys()
    own = {"choices"} if shape == "choices" else set()
    return prompt.extra.keys() - _others(prompt, shape, body).keys() - own


def _body(prompt: Prompt, shape: str) -> dict[str, Any]:
    if shape == "text":
        return {"text": prompt.response}
    if shape == "choices":
        system = next((m["content"] for m in prompt.messages if m["role"] == "system"), None)
        body = {"question": prompt.question, "choices": prompt.extra["choices"]}
        return {"system": system, **body, "answer": prompt.answer}
    parts = {"answer": prompt.answer, "response": prompt.response}
    if shape == "plain":
        return {"prompt": prompt.question, **parts}
    return {"messages": list(map(dict, prompt.messages)), **parts}


def _taken(shape: str, body: Collection[str]) -> set[str]:
    """Columns that would be read as a part of the row, or make another shape of it."""
    used = {
        "messages": ("messages", "answer", "response", *SYSTEM),
        "plain": ("prompt", "answer", "response", *SYSTEM),
        "choices": ("question", *OPTIONS, *CORRECT, *SYSTEM),
        "text": ("text",),
    }
    earlier = list(SHAPES.values())[: list(SHAPES).index(shape)]
    # without the columns of one of its groups there is no such shape
    tells = (next(g for g in other.needs if not {*g} & {*body}) for other in earlier)
    return {*used[shape], *(column for group in tells for column in group)}


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", help=f"one of {', '.join(SETS)}, or a name for --source")
    parser.add_argument("--out", type=Path, required=True, help="folder of the three files")
    parser.add_argument("--source", help="files, a folder or an id of the hub instead of the set's")
    parser.add_argument("--test-split", help="a folder's or the hub's own split")
    parser.add_argument("--test-fraction", type=float, default=0.05, help="held out, where none is")
    parser.add_argument(
        "--held-out", nargs="*", default=[], help="more files of held-out questions"
    )
    parser.add_argument("--where", nargs="*", default=[], help="column=value,value: rows to take")
    parser.add_argument("--limit", type=int, help="first rows only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="overwrite a prepared set")
    return parser


def _public(args: argparse.Namespace) -> PublicSet:
    known = SETS.get(args.name)
    if known is None and not args.source:
        raise ValueError(
            f"unknown set {args.name!r}{nearest(args.name, SETS)} Known: {', '.join(SETS)}; any "
            "other name wants --source"
        )
    if not args.source:
        assert known is not None
        return known
    own = {f.name: getattr(known, f.name) for f in fields(PublicSet)} if known else {}
    at_hand = Path(args.source).exists() or not has_splits(args.source)
    if at_hand or args.test_split:  # its splits and subsets are not those of the set
        own |= {"subset": "", "train": "train", "test": args.test_split or ""}
    return PublicSet(**own | {"source": args.source})


def _where(words: Sequence[str]) -> dict[str, list[str]]:
    out = {}
    for word in words:
        column, equals, values = word.partition("=")
        if not equals:
            raise ValueError(f"--where {word}: want column=value,value")
        out[column] = values.split(",")
    return out


def main(
    arguments: list[str] | None = None, prog: str = "python -m reflux.trainer.data.prepare"
) -> int:
    """Returns the exit code: 0, or 2 with a reason in words."""
    args = _parser(prog).parse_args(arguments)
    try:
        choice = Choice(
            args.out,
            args.test_fraction,
            _where(args.where),
            args.held_out,
            args.limit,
            args.seed,
            args.force,
        )
        m = prepare(args.name, _public(args), choice)
    except (OSError, ValueError) as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 2
    print(
        f"{m.name}: {m.read:,} rows of shape {m.shape} read, {m.filtered:,} filtered, "
        f"{m.repeated:,} repeated, {m.contaminated:,} share {GRAM} words with a held-out question; "
        f"{m.train:,} in {args.out / 'train.jsonl'}, {m.test:,} in {args.out / 'test.jsonl'}"
    )
    if m.left_out:
        names = ", ".join(m.left_out)
        print(f"columns left out, no JSON or named as a part of a row is: {names}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
