"""Tiny random checkpoints with tokenizers, made once per test session, and a process in which
torchtitan may run.

    assets            fixture: folder with a subfolder per name in MODELS, in transformers' format,
                      and text.jsonl
    titan_process     fixture: a world of one process; resets the globals that torchtitan changes
"""

import gc
import json
import logging
import os
import random
import socket
from pathlib import Path

import pytest
import torch

SPECIALS = ["<|pad|>", "<|bos|>", "<|eos|>"]  # ids 0, 1, 2
CHAT_TEMPLATE = (
    "{% for m in messages %}<|bos|>{{ m['role'] }}: {{ m['content'] }}<|eos|>{% endfor %}"
    "{% if add_generation_prompt %}<|bos|>assistant: {% endif %}"
)
LARGE_VOCAB, SMALL_VOCAB = 512, 384
BASE = dict(
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
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e6}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS = {  # name -> (model_type, config over BASE); gemma3 has the other tokenizer
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


def train_tokenizer(texts: list[str], size: int):
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


def save_tokenizer(tokenizer, path) -> None:
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


def save_model(path, model_type: str, seed: int = 0, **config) -> None:
    """A random transformers checkpoint, BASE with `config` over it."""
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


def make_assets(folder) -> Path:
    folder = Path(folder)
    texts = sentences(600)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    large, small = (train_tokenizer(texts, size) for size in (LARGE_VOCAB, SMALL_VOCAB))
    for seed, (name, (model_type, config)) in enumerate(MODELS.items()):
        save_model(folder / name, model_type, seed, **config)
        save_tokenizer(small if name == "gemma3" else large, folder / name)
    return folder


@pytest.fixture(scope="session")
def assets(tmp_path_factory) -> Path:
    return make_assets(tmp_path_factory.mktemp("assets"))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def titan_process():
    """RANK, WORLD_SIZE ... of a single process. Afterwards there is no process group, and Python's
    and torch's defaults are back.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    before = {name: os.environ.get(name) for name in names}
    handlers, level = list(logging.root.handlers), logging.root.level
    os.environ.update(zip(names, ("0", "1", "0", "127.0.0.1", str(free_port()))))
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    gc.enable()  # torchtitan leaves both of these off
    torch.autograd.set_multithreading_enabled(True)
    logging.root.handlers[:], logging.root.level = handlers, level
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def make_trainer(path, dump_folder, *, backend="auto", seq_len=64, **sections):
    """torchtitan's own Trainer on one of the checkpoints, loaded, as a host for tests."""
    # first: it prepares torchtitan for this machine
    from reflux.trainer.engine.model_builder import build_spec

    from torchtitan.components.checkpoint import CheckpointManager  # isort: skip
    from torchtitan.components.loss import CrossEntropyLoss
    from torchtitan.components.optimizer import default_adamw
    from torchtitan.config import DebugConfig, ParallelismConfig, TrainingConfig
    from torchtitan.trainer import Trainer

    from reflux.trainer.engine.torchtitan_host import NoData
    from reflux.trainer.engine.weights import load_weights

    path = str(path)
    config = dict(
        model_spec=build_spec(path, backend=backend),
        hf_assets_path=path,
        dump_folder=str(dump_folder),
        loss=CrossEntropyLoss.Config(global_vocab_size=LARGE_VOCAB),
        optimizer=default_adamw(lr=1e-2),
        dataloader=NoData.Config(),
        training=TrainingConfig(
            local_batch_size=2,
            seq_len=seq_len,
            steps=3,
            mixed_precision_param="float32",
            disable_cuda_graphs=True,
        ),
        parallelism=ParallelismConfig(spmd_backend="partial_dtensor"),
        checkpoint=CheckpointManager.Config(
            enable=True,
            interval=1000,
            last_save_model_only=False,
        ),
        debug=DebugConfig(seed=1, enable_structured_logging=False),
    )
    trainer = Trainer.Config(**config | sections).build()
    load_weights(trainer.model_parts[0], trainer.config.model_spec, path)
    return trainer
