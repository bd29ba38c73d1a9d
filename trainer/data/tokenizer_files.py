"""The files of a tokenizer in a model folder, and the chat template among them."""

import json
import shutil
from pathlib import Path
from typing import Any

from reflux.trainer.adapter_folder import file_of, tokenizer_of

TEMPLATE = "chat_template.jinja"  # transformers takes it before the one in tokenizer_config.json
MORE_TEMPLATES = "additional_chat_templates"  # a folder: others by name, "tool_use"
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    TEMPLATE,
    "chat_template.json",
)
COPIED = (
    *TOKENIZER,
    # what else a multimodal model reads
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    # byte for byte: a tokenizer that was loaded and saved again is another file
    "generation_config.json",
)
# those that may hold a template, too, for older readers
WITH_TEMPLATE = ("tokenizer_config.json", "chat_template.json", "processor_config.json")


def read_template(file: str | Path) -> str:
    """ValueError where it cannot be read."""
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"template = {str(file)!r}: it cannot be read: {error}") from error


def write_template(folder: Path, text: str) -> None:
    """Makes `text` the only chat template of a model folder, for every reader; empty: it has none.
    Templates by name go: they were written for the one that is replaced.
    """
    shutil.rmtree(folder / MORE_TEMPLATES, ignore_errors=True)
    (folder / TEMPLATE).unlink(missing_ok=True)
    if text:
        (folder / TEMPLATE).write_text(text, encoding="utf-8")
    for file in (folder / name for name in WITH_TEMPLATE):
        table = _table(file)
        if "chat_template" in table:
            kept = {k: v for k, v in table.items() if k != "chat_template"}
            table = {**kept, "chat_template": text} if text else kept
            file.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def copy_tokenizer(folder: Path, source: str, template: str | None = None) -> None:
    """COPIED, of the source or of its base, into a model folder. template: the text of the one that
    prompts are rendered with; None: the source's own, and those that it has by name.
    """
    own = Path(tokenizer_of(source))
    for name in COPIED:
        file = own / name if name in TOKENIZER else Path(file_of(source, name))
        if file.is_file():
            shutil.copyfile(file, folder / name)
    if template is not None:
        write_template(folder, template)
    elif (own / MORE_TEMPLATES).is_dir():
        shutil.copytree(own / MORE_TEMPLATES, folder / MORE_TEMPLATES, dirs_exist_ok=True)


def has_template(path: str, template: str = "") -> bool:
    """Whether a model folder, or the file that is used in its stead, has a chat template."""
    if template:
        return bool(read_template(template))
    folder = Path(tokenizer_of(path))
    if (folder / TEMPLATE).is_file():
        return bool(read_template(folder / TEMPLATE))
    return bool(_table(folder / "tokenizer_config.json").get("chat_template"))


def _table(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none."""
    try:
        table = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return table if isinstance(table, dict) else {}
