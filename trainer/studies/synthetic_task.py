"""The task and the untrained models of `make quickstart`.

    python -m reflux.trainer.studies.synthetic_task --out FOLDER [--seed 0] [--notes]

Task: "Add 3 to each of 7,4,9,2,5,1,0" (last digits only). An answer has one of three styles, named
by its first word; all three are correct:

    left:0;7;2;5;8;4;3      in reading order: the digit needed next is always equally far back
    right:3;4;8;5;2;7;0     backwards: that distance changes from step to step
    outer:0;3;7;4;2;8;5     from the outside in: likewise

All separators are the same, so a model has to work out first which step it is at. Two layers learn
all three styles; one layer with two heads learns `left` (90 % after 300 steps on the mix) and stays
at 1 % of `right` or `outer` even after 450 steps on these alone (one trial; bench/LOG.md has it and
the lengths and orders that were too easy). The style of a worked answer is drawn from a mix that
depends on the wording of the question, so a student of the original teacher sees all styles.
Calibration changes only which of its correct styles a teacher prefers.

With --notes a worked answer goes on with "#" and one to seven of its digits backwards, or with
nothing, each length equally often; the grader does not read it: "left:0;7;2;5;8;4;3#3485". So texts
have 18 to 27 bytes, and a note is something that one layer finds unlikely: the longer, the more.

Writes: tokenizers and untrained models (a teacher of two layers and students of one with a
byte-level BPE; a proxy, a smaller and a deeper one, and a second student with a character
vocabulary; a wider student), train.jsonl and start.jsonl (with worked answers), prompts.jsonl
(questions alone), heldout.jsonl (disjoint questions), choices.jsonl (held-out questions with
options), paraphrases.jsonl (answers in other words). Everything follows from the seed.
"""

import argparse
import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reflux.trainer.data.batch import Prompt
from reflux.trainer.data.graders import Grade
from reflux.trainer.runs.files import write_rows

if TYPE_CHECKING:
    from tokenizers import Tokenizer

DIGITS = 7  # per question; they may repeat, so the digits do not tell which step is next
SHIFT = 3
WORDINGS = ("Add 3 to each of", "Raise by three", "Shift up these", "Plus 3 for all of")
ORDERS = {
    "left": (0, 1, 2, 3, 4, 5, 6),
    "right": (6, 5, 4, 3, 2, 1, 0),
    "outer": (0, 6, 1, 5, 2, 4, 3),
}
# styles by wording
MIX = ((0.70, 0.15, 0.15), (0.15, 0.70, 0.15), (0.15, 0.15, 0.70), (0.34, 0.33, 0.33))
SPECIALS = ("<pad>", "<bos>", "<eos>")
TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
MERGES = 80  # of the BPE vocabulary, on top of the 256 bytes
PARAPHRASES = 8000  # rows
SIZES = {"train": 16000, "start": 4000, "prompts": 4000, "heldout": 1000}  # rows
CHOICES, OPTIONS = 300, 4  # held-out questions with options, one of them correct


@dataclass(frozen=True)
class Architecture:
    """An untrained Qwen3 decoder and its tokenizer."""

    tokenizer: str  # "bpe" | "char"
    layers: int
    hidden: int
    heads: int
    head_size: int
    feed_forward: int


MODELS = {
    "teacher": Architecture("bpe", 2, 64, 2, 32, 192),
    "proxy": Architecture("char", 1, 40, 2, 24, 96),
    "proxy_small": Architecture("char", 1, 24, 1, 16, 48),
    "proxy_deep": Architecture("char", 2, 64, 2, 32, 192),
    "student": Architecture("bpe", 1, 48, 2, 24, 128),
    "student_char": Architecture("char", 1, 48, 2, 24, 128),
    "student_wide": Architecture("bpe", 1, 96, 4, 24, 256),
}


def solve(digits: list[int], style: str) -> list[int]:
    """The shifted digits in the order of the style."""
    return [(digits[i] + SHIFT) % 10 for i in ORDERS[style]]


def write_answer(digits: list[int], style: str) -> str:
    return f"{style}:" + ";".join(map(str, solve(digits, style)))


def write_note(digits: list[int], length: int) -> str:
    """What may follow an answer: that many of its digits, backwards."""
    return "#" + "".join(map(str, solve(digits, "right")[:length])) if length else ""


def grade(prompt: Prompt, text: str) -> Grade:
    """Correct iff every digit is correct in the order of the named style. An unknown style or
    another number of digits is no answer. What follows a "#" is not read.
    """
    style, colon, rest = text.strip().partition("#")[0].partition(":")
    parts = rest.split(";")
    if (
        not colon
        or style not in ORDERS
        or len(parts) != DIGITS
        or not all(p.isdigit() and len(p) == 1 for p in parts)
    ):
        return Grade(0.0, False, None)
    if prompt.answer is None:
        raise ValueError("synthetic_task: a prompt without an answer; want its digits, 7,4,9,...")
    digits = [int(d) for d in prompt.answer.split(",")]
    correct = [int(p) for p in parts] == solve(digits, style)
    return Grade(float(correct), correct, rest)


def answers_only(prompt: Prompt, text: str) -> str | None:
    """The result without the steps: every digit in reading order. None where the text has no
    answer.

    This is what a provider serves who withholds the reasoning, and what an attacker gets who
    rewrites the texts. Here it is also the style that one layer learns.
    """
    style, _, rest = text.strip().partition(":")
    if grade(prompt, text).extracted is None:
        return None
    digit_at = dict(zip(ORDERS[style], rest.split(";")))
    return "left:" + ";".join(digit_at[i] for i in range(DIGITS))


def learnable_only(prompt: Prompt, text: str) -> str | None:
    """The text if it is in the style that one layer learns, else None: the attacker knows what
    its student can use.
    """
    return text if text.startswith("left:") else None


def is_held_out(digits: list[int]) -> bool:
    """One question in eight, by its digits alone: no wording of it is in the training data."""
    return sum(d * k for d, k in zip(digits, (1, 101, 201, 301, 77, 313, 55))) % 1009 % 8 == 0


def questions(
    rng: random.Random, count: int, *, held_out: bool, worked: bool, notes: bool = False
) -> Iterator[dict[str, str]]:
    """Rows of a data file; `worked` adds an answer in a style drawn for the wording, `notes` a note
    of 0 to DIGITS digits to that.
    """
    while count:
        digits = rng.choices(range(10), k=DIGITS)
        wording = rng.randrange(len(WORDINGS))
        style = rng.choices(list(ORDERS), MIX[wording])[0]
        if is_held_out(digits) != held_out:
            continue
        row = {
            "prompt": f"{WORDINGS[wording]} {','.join(map(str, digits))}?",
            "answer": ",".join(map(str, digits)),
        }
        note = write_note(digits, rng.randint(0, DIGITS)) if notes else ""
        yield row | ({"response": write_answer(digits, style) + note} if worked else {})
        count -= 1


def write_data(out: Path, seed: int, notes: bool = False) -> list[str]:
    """The data files; returns the texts that the BPE tokenizer learns from."""
    texts: list[str] = []
    for name, size in SIZES.items():
        rng = random.Random(f"{seed}/{name}")
        worked = name in ("train", "start")
        held_out = name == "heldout"
        rows = list(questions(rng, size, held_out=held_out, worked=worked, notes=notes and worked))
        write_rows(out / f"{name}.jsonl", rows)
        if name == "start":
            texts = [row["prompt"] + row["response"] for row in rows]
    write_rows(out / "choices.jsonl", choices(seed))
    write_rows(out / "paraphrases.jsonl", paraphrases(seed))
    return texts


def paraphrases(seed: int) -> Iterator[dict[str, str]]:
    """Answers as questions, and what they say in a style drawn at random, right or wrong as they
    are: what an attacker teaches a paraphraser with, who knows no style to be better.
    """
    rng = random.Random(f"{seed}/paraphrases")
    for _ in range(PARAPHRASES):
        digits = rng.choices(range(10), k=DIGITS)
        here, there = rng.choices(list(ORDERS), k=2)
        yield {"prompt": write_answer(digits, here), "response": write_answer(digits, there)}


def choices(seed: int) -> Iterator[dict[str, str | list[str]]]:
    """Held-out questions with a correct and three wrong answers of one style, one digit changed in
    each; styles take turns.
    """
    rng = random.Random(f"{seed}/choices")
    rows = questions(rng, CHOICES, held_out=True, worked=False)
    for row, style in zip(rows, itertools.cycle(ORDERS)):
        correct = solve(list(map(int, row["answer"].split(","))), style)
        options = [correct]
        for i in rng.sample(range(DIGITS), OPTIONS - 1):
            wrong = (correct[i] + rng.randrange(1, 10)) % 10
            options.append([*correct[:i], wrong, *correct[i + 1 :]])
        option_index = rng.randrange(OPTIONS)
        options[0], options[option_index] = options[option_index], options[0]
        yield {
            "prompt": row["prompt"],
            "answer": str(option_index),
            "choices": [f"{style}:" + ";".join(map(str, o)) for o in options],
        }


def train_tokenizer(texts: list[str], merges: int) -> "Tokenizer":
    """Byte-level BPE with one token per digit; without merges a character (byte) vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = len(SPECIALS) + len(alphabet) + merges
    tok.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=list(SPECIALS),
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    return tok


def write_model(
    folder: Path, tokenizer: "Tokenizer", model: Architecture, positions: int = 128
) -> None:
    """config.json and tokenizer of an untrained decoder that takes that many positions."""
    from transformers import Qwen3Config

    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    pad, bos, eos = SPECIALS
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "pad_token": pad,
                "bos_token": bos,
                "eos_token": eos,
                "chat_template": TEMPLATE,
                "model_max_length": positions,
            }
        )
    )
    Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=model.hidden,
        intermediate_size=model.feed_forward,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.heads,
        head_dim=model.head_size,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        initializer_range=0.05,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        architectures=["Qwen3ForCausalLM"],
        dtype="float32",
    ).save_pretrained(folder)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m reflux.trainer.studies.synthetic_task",
        description="Write the data and the untrained models of the quickstart.",
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--notes", action="store_true", help="answers of varying length")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    texts = write_data(args.out, args.seed, args.notes)
    tokenizers = {"bpe": train_tokenizer(texts, MERGES), "char": train_tokenizer([], 0)}
    for name, model in MODELS.items():
        if not (args.out / name).exists():
            write_model(args.out / name, tokenizers[model.tokenizer], model)
    print(f"wrote {', '.join(SIZES)} and models {', '.join(MODELS)} to {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
