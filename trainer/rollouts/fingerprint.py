"""Whether two folders, on two machines, hold the same model, told by a few kilobytes of each."""

import hashlib
import json
from pathlib import Path
from typing import Any

SAMPLE_BYTES = 1 << 16  # of every weight file, at its start, middle and end
# of config.json: what only says how or by what a folder was written
NOT_THE_MODEL = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")


def model_fingerprint(path: str) -> dict[str, str]:
    """`config`: of what config.json describes. `weights`: of names, shapes and samples of the
    weight files, empty where the folder has none. Hex digits.
    """
    folder = Path(path)
    config = _without(json.loads((folder / "config.json").read_bytes()))
    digest = hashlib.sha256()
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        _add_file(digest, file)
    return {
        "config": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:32],
        "weights": digest.hexdigest()[:32] if files else "",
    }


def tokenizer_fingerprint(path: str) -> str:
    """Of the whole id -> token map; hex digits. ValueError where there is no tokenizer."""
    from transformers import AutoTokenizer

    try:
        vocabulary = AutoTokenizer.from_pretrained(path, trust_remote_code=False).get_vocab()
    except Exception as error:  # transformers raises what its parsers raise
        raise ValueError(f"{path}: its tokenizer cannot be loaded ({error})") from error
    pairs = sorted((i, piece) for piece, i in vocabulary.items())
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:32]


def _without(table: Any) -> Any:
    if isinstance(table, dict):
        return {k: _without(v) for k, v in table.items() if k not in NOT_THE_MODEL}
    return table


def _add_file(digest: Any, file: Path) -> None:
    size = file.stat().st_size
    with file.open("rb") as content:
        header = int.from_bytes(content.read(8), "little")
        digest.update(content.read(min(header, size)))
        for start in (8 + header, size // 2, size - SAMPLE_BYTES):
            content.seek(max(start, 0))
            digest.update(content.read(SAMPLE_BYTES))
