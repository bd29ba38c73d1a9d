"""The tokenizer of every role: its files, its ids against the head, its stop set, its template."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich import box
from rich.table import Table

from reflux.trainer.config.roles import Role
from reflux.trainer.data.chat import Chat

from .report import Finding, first_line
from .shapes import Shape

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def open_chats(roles: Sequence[Role]) -> tuple[dict[str, Chat], list[Finding]]:
    """The tokenizer of every role that has one, by role name; roles of one folder share it."""
    known: dict[str, Chat] = {}
    chats, findings = {}, []
    for role in roles:
        path = os.path.expanduser(role.model.path)
        # transformers would invent an empty one
        if not any((Path(path) / file).is_file() for file in TOKENIZER_FILES):
            findings.append(_no_tokenizer(role, "none of " + ", ".join(TOKENIZER_FILES)))
            continue
        try:
            model = replace(role.model, path=path)
            spec = repr((path, model.template, model.template_arguments))
            chats[role.name] = known[spec] = known.get(spec) or Chat.of(model)
        except (OSError, ValueError, ImportError) as error:
            findings.append(_no_tokenizer(role, first_line(error)))
    return chats, findings


def _no_tokenizer(role: Role, why: str) -> Finding:
    return Finding(
        "error",
        f"{role.name}: no tokenizer in {role.section}.path = {role.model.path!r}: {why}",
        "put tokenizer.json and tokenizer_config.json beside the weights",
    )


def tokenizer_table(shapes: Sequence[Shape], chats: Mapping[str, Chat]) -> Table:
    """The tokenizers side by side."""
    rows = {s.role.name: s.config.vocab_size for s in shapes}
    columns = {name: describe(chat, rows[name]) for name, chat in chats.items()}
    table = Table("", *columns, box=box.SIMPLE, title="tokenizers")
    for label in next(iter(columns.values())):
        table.add_row(label, *(column[label] for column in columns.values()))
    return table


def describe(chat: Chat, head_rows: int) -> dict[str, str]:
    """A tokenizer in words: family, size, special tokens by name and id, stop set, padding of the
    head.
    """
    t = chat.tokenizer
    try:
        family, fingerprint = chat.table.family, chat.table.fingerprint()[:12]
    except ValueError:
        family, fingerprint = "no byte table", "-"
    return {
        "family": family,
        "fingerprint": fingerprint,
        "ids": str(chat.vocab_size),
        "head rows": str(head_rows),
        "padded columns": str(max(head_rows - chat.vocab_size, 0)),
        "BOS": _token(chat, t.bos_token_id),
        "EOS": _token(chat, t.eos_token_id),
        "pad": _token(chat, t.pad_token_id),
        "stop set": ", ".join(_token(chat, i) for i in chat.stop_ids),
        "ends a turn": _token(chat, chat.stop_id),
        "template": "yes" if t.chat_template else "none",
    }


def _token(chat: Chat, i: int | None) -> str:
    return "none" if i is None else f"{chat.tokenizer.convert_ids_to_tokens(i)} {i}"


def tokenizer_findings(shapes: Sequence[Shape], chats: Mapping[str, Chat]) -> list[Finding]:
    """Of every role with a tokenizer of its own: ids without a row in the head, stop tokens that
    cannot be sampled, templates that end a turn with no stop token.
    """
    return [
        f
        for s in shapes
        if s.role.name in chats and not s.role.is_copy
        for f in _findings_of(s.role, chats[s.role.name], s.config.vocab_size)
    ]


def _findings_of(role: Role, chat: Chat, head_rows: int) -> list[Finding]:
    findings = [_head_finding(role, chat, head_rows)]
    outside = [i for i in chat.stop_ids if i >= head_rows]
    if outside:
        findings.append(
            Finding(
                "error",
                f"{role.name}: stop ids {outside} lie outside its head of {head_rows} rows",
                "take the tokenizer that belongs to the weights",
            )
        )
    if not chat.tokenizer.chat_template:
        findings.append(
            Finding(
                "warning",
                f"{role.name}: no chat template; messages are joined by line breaks",
                "fine for a base model. An instruct model needs its chat_template",
            )
        )
    elif chat.stop_id not in _ids_behind_a_response(chat):
        findings.append(
            Finding(
                "warning",
                f"{role.name}: its template ends a turn with no stop token; "
                f"{chat.tokenizer.convert_ids_to_tokens(chat.stop_id)!r} is used",
                "name the token that ends a turn in generation_config.json, eos_token_id",
            )
        )
    return findings


def _head_finding(role: Role, chat: Chat, rows: int) -> Finding:
    if chat.vocab_size <= rows:
        return Finding(
            "ok",
            f"{role.name}: {chat.vocab_size} ids, {rows} head rows ({rows - chat.vocab_size} "
            "padded columns, never used)",
        )
    added = chat.tokenizer.added_tokens_decoder
    beyond = [i for i in range(rows, chat.vocab_size) if not (i in added and added[i].special)]
    if not beyond:
        return Finding(
            "warning",
            f"{role.name}: {chat.vocab_size - rows} special tokens beyond its head of {rows} rows",
            "harmless while prompts do not hold them",
        )
    return Finding(
        "error",
        f"{role.name}: its tokenizer has {chat.vocab_size} ids, its head {rows} rows",
        "take the tokenizer that belongs to the weights",
    )


def _ids_behind_a_response(chat: Chat) -> list[int]:
    """What the template writes behind an assistant's message."""
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text = str(chat.tokenizer.apply_chat_template(turn, tokenize=False, **chat.arguments))
    return chat.tokenizer(text.rpartition("b")[2], add_special_tokens=False)["input_ids"]
