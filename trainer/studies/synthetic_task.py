"""The miniature world of `make quickstart`: python -m reflux.trainer.studies.synthetic_task --out
FOLDER [--seed 0]

Task: "Add 3 to each of 7,4,9,2,5,1,0" (last digits only). Three honest styles, announced by the
first word, all of them right:

    left:0;7;2;5;8;4;3      in reading order: the digit needed next always lies the same distance
                            back
    right:3;4;8;5;2;7;0     backwards: that distance changes from step to step
    outer:0;3;7;4;2;8;5     from the outside in: likewise

Every separator looks alike, so which step it is has to be worked out first. Two layers learn all
three styles; one layer with two heads learns `left` (90 % after 300 steps on the mix) and stays at
1 % of `right` or `outer` even on 450 steps of nothing else (one trial; bench/LOG.md has it and the
lengths and orders that were too easy). The style is the writer's choice, drawn by a mix that
depends on the wording of the question, so that a student of the original teacher sees all styles.
What differs between teachers is only which of its right answers a teacher prefers: that is the
knob.

Writes: tokenizers and untrained models (a teacher of two layers and students of one with a
byte-level BPE; a proxy, a smaller and a deeper one, and a second student with a character
vocabulary; a wider student), train.jsonl and start.jsonl (with worked answers), prompts.jsonl
(questions alone), heldout.jsonl (disjoint questions), choices.jsonl (held-out questions with
options). Everything follows from the seed.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

from reflux.trainer.data.batch import Prompt
from reflux.trainer.data.graders import Grade

# per question; they may repeat, so that what is left to do cannot be told from what is done
DIGITS = 7
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
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
MERGES = 80  # of the BPE vocabulary, on top of the 256 bytes
# name -> tokenizer, layers, hidden, heads, head size, feed-forward
MODELS = {
    "teacher": ("bpe", 2, 64, 2, 32, 192),
    "proxy": ("char", 1, 40, 2, 24, 96),
    "proxy_small": ("char", 1, 24, 1, 16, 48),
    "proxy_deep": ("char", 2, 64, 2, 32, 192),
    "student": ("bpe", 1, 48, 2, 24, 128),
    "student_char": ("char", 1, 48, 2, 24, 128),
    "student_wide": ("bpe", 1, 96, 4, 24, 256),
}
SIZES = {"train": 16000, "start": 4000, "prompts": 4000, "heldout": 1000}
CHOICES, OPTIONS = 300, 4  # held-out questions with options, one of them right


def solve(digits: list[int], style: str) -> list[int]:
    """The shifted digits in the order the style announces."""
    return [(digits[i] + SHIFT) % 10 for i in ORDERS[style]]


def write_answer(digits: list[int], style: str) -> str:
    return f"{style}:" + ";".join(map(str, solve(digits, style)))


def grade(prompt: Prompt, text: str) -> Grade:
    """Right iff every digit is right in the announced order; an unknown style or a wrong shape is
    no answer.
    """
    style, colon, rest = text.strip().partition(":")
    parts = rest.split(";")
    if (
        not colon
        or style not in ORDERS
        or len(parts) != DIGITS
        or not all(p.isdigit() and len(p) == 1 for p in parts)
    ):
        return Grade(0.0, False, None)
    digits = [int(d) for d in prompt.answer.split(",")]
    right = [int(p) for p in parts] == solve(digits, style)
    return Grade(float(right), right, rest)


def answers_only(prompt: Prompt, text: str) -> str | None:
    """The result without the way to it: every digit back at its place, in reading order. None where
    the text has no answer.

    What is left when a provider withholds the reasoning, or when a buyer rewrites what it bought.
    In this world it is also the style that one layer learns.
    """
    style, _, rest = text.strip().partition(":")
    if grade(prompt, text).extracted is None:
        return None
    placed = dict(zip(ORDERS[style], rest.split(";")))
    return "left:" + ";".join(placed[i] for i in range(DIGITS))


def learnable_only(prompt: Prompt, text: str) -> str | None:
    """The text if it is in the style that one layer learns, else None: an attacker who has found
    out what its student can use.
    """
    return text if text.startswith("left:") else None


def is_held_out(digits: list[int]) -> bool:
    """One question in eight, by its digits alone: no wording of a held-out question is ever trained
    on.
    """
    return sum(d * k for d, k in zip(digits, (1, 101, 201, 301, 77, 313, 55))) % 1009 % 8 == 0


def questions(rng: random.Random, count: int, *, held_out: bool, worked: bool) -> Iterator[dict]:
    """Rows of a data file; `worked` adds an answer in a style drawn for the wording."""
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
        yield row | ({"response": write_answer(digits, style)} if worked else {})
        count -= 1


def write_data(out: Path, seed: int) -> list[str]:
    """The four data files; returns the texts that the tokenizer learns from."""
    texts: list[str] = []
    for name, size in SIZES.items():
        rng = random.Random(f"{seed}/{name}")
        rows = list(
            questions(rng, size, held_out=name == "heldout", worked=name in ("train", "start"))
        )
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        texts += (
            [row["prompt"] + row.get("response", "") for row in rows] if name == "start" else []
        )
    (out / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in choices(seed)))
    return texts


def choices(seed: int) -> Iterator[dict]:
    """Held-out questions with a right and three wrong answers of one style, one digit changed in
    each; styles take turns.
    """
    rng = random.Random(f"{seed}/choices")
    for i, row in enumerate(questions(rng, CHOICES, held_out=True, worked=False)):
        style = list(ORDERS)[i % len(ORDERS)]
        right = solve(list(map(int, row["answer"].split(","))), style)
        texts = [right]
        for at in rng.sample(range(DIGITS), OPTIONS - 1):
            texts.append([*right[:at], (right[at] + rng.randrange(1, 10)) % 10, *right[at + 1 :]])
        place = rng.randrange(OPTIONS)
        texts[0], texts[place] = texts[place], texts[0]
        yield {
            "prompt": row["prompt"],
            "answer": str(place),
            "choices": [f"{style}:" + ";".join(map(str, t)) for t in texts],
        }


def train_tokenizer(texts: list[str], merges: int):
    """Byte-level BPE in which every digit stays a token of its own; without merges it is a
    character (byte) vocabulary.
    """
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


def write_model(folder: Path, tokenizer, shape: tuple[int, int, int, int, int]) -> None:
    """config.json and tokenizer of an untrained Qwen3 decoder."""
    from transformers import Qwen3Config

    layers, hidden, heads, head_size, wide = shape
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
                "model_max_length": 128,
            }
        )
    )
    Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=hidden,
        intermediate_size=wide,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=head_size,
        max_position_embeddings=128,
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
        prog="python -m reflux.trainer.studies.synthetic_task", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    texts = write_data(args.out, args.seed)
    tokenizers = {"bpe": train_tokenizer(texts, MERGES), "char": train_tokenizer([], 0)}
    for name, (tokenizer, *shape) in MODELS.items():
        if not (args.out / name).exists():
            write_model(args.out / name, tokenizers[tokenizer], tuple(shape))
    print(f"wrote {', '.join(SIZES)} and models {', '.join(MODELS)} to {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
