"""Random models and small data for configs/debug_cpu_*.toml: nothing is downloaded or learned.

    python -m reflux.trainer.studies.debug_models [--out runs/debug]

Writes in a few seconds: six models of two layers and 64 dimensions (a folder per name in MODELS, in
transformers' format, gemma3 with a tokenizer of its own), text.jsonl (sentences), vowels.jsonl
(prompts whose answer is a vowel, which a random model gives now and then) and vowel_choices.jsonl
(the same with options). Everything is the same on every call.
"""

import argparse
import json
import os
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reflux.trainer.runs.files import write_rows

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from reflux.trainer.data.prompt import Prompt

SPECIALS = ["<|pad|>", "<|bos|>", "<|eos|>"]  # ids 0, 1, 2
CHAT_TEMPLATE = (
    "{% for m in messages %}<|bos|>{{ m['role'] }}: {{ m['content'] }}<|eos|>{% endfor %}"
    "{% if add_generation_prompt %}<|bos|>assistant: {% endif %}"
)
LARGE_VOCAB, SMALL_VOCAB = 512, 384
BASE: dict[str, Any] = dict(
    vocab_size=LARGE_VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    initializer_range=0.2,  # large, so that logits differ enough for parity to mean something
    dtype="float32",
)
PLAIN_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e6}
LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: dict[
    str, tuple[str, dict[str, Any]]
] = {  # name -> (model_type, config over BASE); gemma3 has the other tokenizer
    "qwen3": ("qwen3", dict(head_dim=32, tie_word_embeddings=False, rope_parameters=PLAIN_ROPE)),
    "qwen3_tied": (
        "qwen3",
        dict(head_dim=32, tie_word_embeddings=True, rope_parameters=PLAIN_ROPE),
    ),
    "llama3": (
        "llama",
        dict(tie_word_embeddings=False, rms_norm_eps=1e-5, rope_parameters=LLAMA3_ROPE),
    ),
    "qwen2": ("qwen2", dict(tie_word_embeddings=True)),
    "mistral": ("mistral", dict(tie_word_embeddings=False, sliding_window=None)),
    "gemma3": (
        "gemma3_text",
        dict(
            vocab_size=SMALL_VOCAB,
            head_dim=16,
            sliding_window=8,
            tie_word_embeddings=True,
            layer_types=["sliding_attention", "full_attention"],
        ),
    ),
}


def sentences(count: int) -> list[str]:
    """Generated arithmetic sentences, the same on every call."""
    rng = random.Random(0)
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(500)]
    return [
        f"{rng.choice(words).title()} has {a} {what} and gives {b} to {rng.choice(words).title()}, "
        f"so {a - b} {what} remain."
        for a, b, what in (
            (rng.randint(10, 999), rng.randint(1, 9), rng.choice(words)) for _ in range(count)
        )
    ]


def train_tokenizer(texts: list[str], size: int) -> "Tokenizer":
    """A byte-level BPE of exactly `size` entries with SPECIALS first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=SPECIALS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    assert tokenizer.get_vocab_size() == size
    return tokenizer


def save_tokenizer(tokenizer: "Tokenizer", path: str | Path) -> None:
    os.makedirs(path, exist_ok=True)
    tokenizer.save(os.path.join(path, "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": SPECIALS[0],
        "bos_token": SPECIALS[1],
        "eos_token": SPECIALS[2],
        "add_bos_token": True,
        "add_eos_token": False,
        "model_max_length": 256,
        "chat_template": CHAT_TEMPLATE,
    }
    Path(path, "tokenizer_config.json").write_text(json.dumps(settings))


def save_model(path: str | Path, model_type: str, seed: int = 0, **config: Any) -> None:
    """A random transformers checkpoint, BASE with `config` over it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **BASE | config))
        with torch.no_grad():
            for weight in model.parameters():  # norms of ones would hide a norm that is not used
                if weight.dim() == 1:
                    weight.add_(torch.randn_like(weight) * 0.1)
    model.save_pretrained(path)


def write_models(folder: Path) -> Path:
    """Every model of MODELS in a folder of its name, and text.jsonl. Returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = sentences(600)
    write_rows(folder / "text.jsonl", [{"text": text} for text in texts])
    large, small = (train_tokenizer(texts, size) for size in (LARGE_VOCAB, SMALL_VOCAB))
    for seed, (name, (model_type, config)) in enumerate(MODELS.items()):
        save_model(folder / name, model_type, seed, **config)
        save_tokenizer(small if name == "gemma3" else large, folder / name)
    return folder


def write_prompts(folder: Path) -> None:
    """vowels.jsonl and vowel_choices.jsonl: name the vowel."""
    vowels = [
        {"prompt": f"Write word {i}. Its last vowel is {vowel}.", "answer": vowel}
        for i in range(8)
        for vowel in "aeiou"
    ]
    choices = [
        {
            "prompt": f"What is the last vowel of word {i} with {vowel}?",
            "answer": vowel,
            "choices": list("aeiou"),
        }
        for i in range(4)
        for vowel in "aeiou"
    ]
    write_rows(folder / "vowels.jsonl", vowels)
    write_rows(folder / "vowel_choices.jsonl", choices)


def is_even(prompt: "Prompt", text: str) -> bool:
    """A grader that finds about half of all texts correct, whatever they say."""
    return sum(map(ord, text)) % 2 == 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m reflux.trainer.studies.debug_models",
        description="Write the random models and the data of configs/debug_cpu_*.toml.",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/debug"))
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    write_prompts(args.out)
    write_models(args.out)
    print(f"wrote the models {', '.join(MODELS)} and their data to {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
