"""Folders and findings of the pre-flight's tests."""

import json
import shutil
from pathlib import Path

from reflux.trainer.preflight.report import Finding


def problems(findings: list[Finding], level: str = "error") -> str:
    """What the findings of a level say, a line each."""
    return "\n".join(f"{f.what} | {f.advice}" for f in findings if f.level == level)


def files(folder: Path) -> dict:
    """Every file and folder with its time stamp."""
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in sorted(folder.rglob("*"))}


def only_descriptions(source: Path, out: Path) -> Path:
    """config.json and tokenizer without the weights."""
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"))
    return out


def changed_tokenizer(source: Path, out: Path, change) -> Path:
    """The same model behind a tokenizer whose table `change` has edited."""
    shutil.copytree(source, out)
    table = json.loads((out / "tokenizer.json").read_text())
    change(table)
    (out / "tokenizer.json").write_text(json.dumps(table))
    return out


def swallow_space(table: dict) -> None:
    """ "!" becomes an added token that eats the space before it: the ids do not spell the text."""
    vocab = table["model"]["vocab"]
    if isinstance(vocab, dict):
        token_id = vocab["!"]
    else:
        token_id = next(i for i, (piece, _) in enumerate(vocab) if piece == "!")
    token = {"id": token_id, "content": "!", "single_word": False, "lstrip": True}
    token |= {"rstrip": False, "normalized": False, "special": False}
    table["added_tokens"].append(token)
