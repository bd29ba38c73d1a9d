"""What of a source reaches no prompt and no response, told once before it is trained on without.

Looked at are the first rows. A column counts where one of them has something in it, and no option
of the run names it.
"""

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from reflux.trainer.config.schema import Config

from .prompt import Prompt

log = logging.getLogger(__name__)

FIRST = 100  # rows that are looked at
# columns without which a row asks for something else
ASKING = (
    *("instruction", "input", "context", "ctx", "passage", "document", "article", "paragraph"),
    *("system", "system_prompt", "history", "schema", "tools", "functions"),
)
TOOLS = ("tools", "functions")
BODIES = ("messages", "conversations", "prompt", "instruction", "question", "problem", "chosen")
TALKS = ("messages", "conversations", "chosen", "completion")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")


def named_columns(cfg: Config) -> set[str]:
    """Columns that options name: of graders, of privileged texts, of routes."""
    tasks = [cfg.task, *(p.task for s in (cfg.data, cfg.eval) for p in s.parts.values())]
    words = {cfg.distill.privileged, cfg.distill.route, cfg.calibration.proxy_route}
    for task in tasks:
        words.update(_texts(task.options))
    return words


def _texts(value: Any) -> Iterable[str]:
    """All texts inside the values of a table."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)


def warn_of_unused(
    source: str,
    rows: Sequence[tuple[Mapping[str, Any], Prompt]],
    named: Collection[str],
    body: str | None = None,
) -> None:
    """rows: the first ones of a source, and what was read of them. named: columns that something
    else uses. body: the column with the prompt, where the user named it.
    """
    extras = [prompt.extra for _, prompt in rows]
    unused = tuple(
        name
        for name in ASKING
        if name not in named and any(extra.get(name) not in (None, "", [], {}) for extra in extras)
    )
    asked = any(prompt.messages for _, prompt in rows)
    if unused and asked:
        first, extra = rows[0][0], extras[0]
        body = body or next((c for c in BODIES if c in first and c not in extra), "prompt")
        _warn_of_columns(source, unused, body)
    thoughts = sorted({key for values, _ in rows for key in _thoughts(values)})
    if thoughts:
        _warn_of_thoughts(source, thoughts[0])


def _thoughts(values: Mapping[str, Any]) -> Iterable[str]:
    """Keys of thoughts beside the content of a conversation's last message."""
    for column in TALKS:
        talk = values.get(column)
        last = talk[-1] if isinstance(talk, list) and talk else None
        if isinstance(last, Mapping):
            yield from (key for key in THOUGHTS if last.get(key))


@lru_cache  # once each
def _warn_of_columns(source: str, columns: tuple[str, ...], body: str) -> None:
    tools = any(c in TOOLS for c in columns)
    log.warning(
        "%s: column%s not in the prompt, which is column %s alone; write what belongs to the "
        "question into one column%s",
        source,
        f"s {', '.join(columns)} are" if len(columns) > 1 else f" {columns[0]} is",
        body,
        ". No template is given tools: describe them in a system message" if tools else "",
    )


@lru_cache
def _warn_of_thoughts(source: str, key: str) -> None:
    log.warning(
        "%s: %s of the assistant's last message is no part of the response, which is its content; "
        "to train on thoughts, write them into the content as the model's template does",
        source,
        key,
    )
