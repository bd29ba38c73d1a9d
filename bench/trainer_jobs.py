"""What both trainers of `python -m bench trainer` work on: random models, texts, and the jobs; and
how a worker is asked for one step at a time.

The models are llamas: student or policy, a teacher of the same size, a proxy of half the layers. A
random model does not end its texts, so every sampled text is as long as the limit; the job
`sampling` ends them where TEXT_LENGTHS says, on both sides.
"""

import json
import random
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

VOCAB, WIDTH, LAYERS = 16384, 256, 4
PROMPTS, GROUP = 4, 4  # of a step that samples; a step on given texts has their product
PROMPT_WORDS, NEW_TOKENS = 48, 64
LR, SEED = 1e-5, 0
JOBS = ("sft", "kd_reverse", "kd_jsd", "on_policy", "grpo", "sampling")
SPACE = "\u0120"  # a space in a byte-level vocabulary
SPECIALS = ["<|pad|>", "<|bos|>", "<|eos|>"]
TEMPLATE = (
    "{% for m in messages %}<|bos|>{{ m['role'] }}: {{ m['content'] }}<|eos|>{% endfor %}"
    "{% if add_generation_prompt %}<|bos|>assistant: {% endif %}"
)
# of NEW_TOKENS, by member of a group: half of the limit in the mean, one text in four full
TEXT_LENGTHS = (0.2, 0.35, 0.5, 1.0)


def make_assets(folder: Path) -> None:
    """student, teacher and proxy as Hugging Face folders, and data.jsonl."""
    tokenizer = _train_tokenizer()
    words = sorted(x[1:] for x in tokenizer.get_vocab() if x.startswith(SPACE) and len(x) > 3)
    for name, layers in (("student", LAYERS), ("teacher", LAYERS), ("proxy", LAYERS // 2)):
        _save_model(folder / name, layers, seed=len(name))
        _save_tokenizer(folder / name, tokenizer)
    rng = random.Random(SEED)

    def text(tokens: int) -> str:
        while True:  # words are tokens, all but a few
            drawn = " " + " ".join(rng.choices(words, k=tokens))
            if len(tokenizer.encode(drawn).ids) == tokens:
                return drawn

    rows = [
        {
            "prompt": text(PROMPT_WORDS),
            "response": text(NEW_TOKENS - 1),
            "answer": rng.choice("aeiou"),
        }
        for _ in range(256)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _train_tokenizer():
    """A byte-level BPE of VOCAB entries, most of which are made-up words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    rng = random.Random(SEED)
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    words = ["".join(rng.choices(syllables, k=rng.randint(2, 3))) for _ in range(2 * VOCAB)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        (" " + word for word in words),
        trainers.BpeTrainer(
            vocab_size=VOCAB,
            special_tokens=SPECIALS,
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    return tokenizer


def _save_tokenizer(folder: Path, tokenizer) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": SPECIALS[0],
        "bos_token": SPECIALS[1],
        "eos_token": SPECIALS[2],
        "chat_template": TEMPLATE,
        "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _save_model(folder: Path, layers: int, seed: int) -> None:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def answer_steps(step: Callable[[], dict], peak: Callable[[], float] | None = None) -> None:
    """One step for every line of the standard input; its seconds as a line of JSON."""
    print("ready", flush=True)
    for _ in sys.stdin:
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        parts = step()
        report = {"cpu_s": time.process_time() - cpu_s, "wall_s": time.perf_counter() - wall_s}
        print(json.dumps(report | parts | {"peak_mib": peak_mib()}), flush=True)


def peak_mib() -> float:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
