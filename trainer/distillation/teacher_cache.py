"""A teacher's rows on disk: what it says at every token of given or sampled texts.

    cache.json             what wrote the rows, what they mean, and which shards are whole
    rows-SSSSS-RRR.arrow   one text a row, shard S as rank R wrote it; Arrow, for `datasets`:
                           datasets.load_dataset("arrow", data_files="<folder>/rows-*.arrow")
    tokenizer, config.json those of the teacher, so that the folder can stand in for it

Columns: prompt (row of its source), key (of the messages), messages (JSON), member (of its group),
text, ids, ended, logp (of the sampled ids), stop_logp, then the bytes of row_codec.py.

A shard counts when cache.json names it: what a killed run leaves beside it is written again.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from reflux.trainer.data.batch import Prompt, Rollout, TopKRows
from reflux.trainer.data.chat import Chat
from reflux.trainer.file_hash import file_sha256
from reflux.trainer.runs.files import named, write_json

from .row_codec import Encoded, Layout, decode_rows, encode_rows

DESCRIPTION, FORMAT = "cache.json", 1
BATCH = 32  # texts of an Arrow record batch


@dataclass(frozen=True)
class Shard:
    """Prompts first to last - 1 of the source's rows that fit, and the files with their texts."""

    first: int
    last: int
    files: Mapping[str, str]  # name -> sha256
    texts: int
    tokens: int
    error: float  # largest of a stored log-probability after it is read, nats


@dataclass(frozen=True)
class Description:
    """What the rows are of: cache.json."""

    teacher: Mapping[str, Any]  # path, and the sha256 of its files by name
    tokenizer: str  # fingerprints, see tokenizer_fingerprint and template_fingerprint
    template: str
    vocab_size: int  # ids that the softmax runs over
    tail: str  # bucket | sampled
    top_k: int
    temperature: float
    logp: str  # float32 | float16 | uint8
    texts: Mapping[str, Any]  # how they were made: dataset or teacher, and the settings of sampling
    shards: tuple[Shard, ...] = ()
    complete: bool = False
    format: int = FORMAT
    error: float = field(default=0.0)  # the largest of all shards, nats

    @property
    def layout(self) -> Layout:
        return Layout(self.vocab_size, self.top_k, self.tail, self.logp)

    def with_shard(self, shard: Shard) -> "Description":
        error = max(self.error, shard.error)
        return replace(self, shards=(*self.shards, shard), error=error)


def tokenizer_fingerprint(chat: Chat) -> str:
    """sha256 of every piece and its id."""
    vocabulary = sorted(chat.tokenizer.get_vocab().items(), key=lambda x: x[1])
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def template_fingerprint(chat: Chat) -> str:
    """sha256 of the chat template, or of "" for a base model, with the stop set, and with the
    template's arguments where it is given any.
    """
    spec: list[Any] = [chat.tokenizer.chat_template or "", list(chat.stop_ids)]
    spec += [sorted((name, repr(value)) for name, value in chat.arguments.items())] * bool(
        chat.arguments
    )
    return hashlib.sha256(json.dumps(spec).encode()).hexdigest()


def key_of(prompt: Prompt) -> str:
    """Of a prompt's messages."""
    messages = json.dumps([dict(m) for m in prompt.messages], sort_keys=True)
    return hashlib.sha256(messages.encode()).hexdigest()[:32]


def read_description(folder: Path) -> Description | None:
    """What cache.json says; None where there is none. ValueError where it cannot be read."""
    path = folder / DESCRIPTION
    if not path.is_file():
        return None
    try:
        table = json.loads(path.read_text())
        if table["format"] != FORMAT:
            raise ValueError(f"format {table['format']}; this version reads {FORMAT}")
        table["shards"] = tuple(Shard(**shard) for shard in table["shards"])
        return Description(**table)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: no description of a cache ({type(error).__name__}: {error}). Write the cache "
            'again with phase = "cache"'
        ) from error


def write_description(folder: Path, description: Description) -> None:
    write_json(folder / DESCRIPTION, asdict(description))


@dataclass(frozen=True, eq=False)
class CachedText:
    """A text and the teacher's rows of it."""

    rollout: Rollout
    rows: TopKRows
    member: int = 0  # of its prompt's group


def write_rows(path: Path, texts: Sequence[CachedText], layout: Layout) -> str:
    """Writes one file whole. Returns its sha256."""
    import pyarrow as pa

    table = pa.table(_columns(texts, layout), schema=_schema(pa))
    partial = path.with_name(path.name + ".partial")
    try:
        with named(path):
            with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, table.schema) as out:
                out.write_table(table, max_chunksize=BATCH)
            digest = file_sha256(partial)
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return digest


def _schema(pa: Any) -> Any:
    whole, text, binary = pa.int32(), pa.string(), pa.binary()
    types = {"prompt": pa.int64(), "key": text, "messages": text, "member": whole, "text": text}
    types |= {"ids": pa.list_(whole), "ended": pa.bool_(), "logp": pa.list_(pa.float32())}
    types |= {"stop_logp": pa.float32()} | {f"topk_{name}": binary for name in Encoded._fields}
    return pa.schema(list(types.items()))


def _columns(texts: Sequence[CachedText], layout: Layout) -> dict[str, list[Any]]:
    encoded = [encode_rows(x.rows, layout) for x in texts]
    rollouts = [x.rollout for x in texts]
    return {
        "prompt": [r.prompt.index for r in rollouts],
        "key": [key_of(r.prompt) for r in rollouts],
        "messages": [json.dumps([dict(m) for m in r.prompt.messages]) for r in rollouts],
        "member": [x.member for x in texts],
        "text": [r.text for r in rollouts],
        "ids": [list(r.ids) for r in rollouts],
        "ended": [r.ended for r in rollouts],
        "logp": [list(r.logp) for r in rollouts],
        "stop_logp": [r.stop_logp for r in rollouts],
        **{f"topk_{name}": [getattr(e, name) for e in encoded] for name in Encoded._fields},
    }


class TeacherCache:
    """A whole cache, memory-mapped: rows are read when they are asked for."""

    def __init__(self, folder: str):
        """ValueError where the folder holds no cache, or not all of one."""
        self.folder = Path(folder)
        found = read_description(self.folder)
        if found is None:
            raise ValueError(
                f"teacher.cache = {folder!r}: no {DESCRIPTION} there; want the folder <run>/cache "
                'that phase = "cache" has written'
            )
        if not found.complete:
            texts = sum(s.texts for s in found.shards)
            raise ValueError(
                f"teacher.cache = {folder!r} is not complete: {texts} texts so far. Let its run "
                "end first: on_existing_run = 'resume' goes on with it"
            )
        self.description = found
        self._tables = [self._open(name) for shard in found.shards for name in shard.files]
        self._places: dict[str, list[tuple[int, int]]] = {}
        for i, table in enumerate(self._tables):
            for row, key in enumerate(table["key"].to_pylist()):
                self._places.setdefault(key, []).append((i, row))

    def _open(self, name: str) -> Any:
        import pyarrow as pa

        try:
            return pa.ipc.open_file(pa.memory_map(str(self.folder / name))).read_all()
        except (OSError, pa.ArrowInvalid) as error:
            raise ValueError(
                f"{self.folder / name}: cannot be read ({error}); copy the cache again"
            ) from error

    def texts(self, prompt: Prompt) -> list[Rollout]:
        """The texts of a prompt by member of its group; none where it was not cached. Of several
        rows of the source with its messages: those of its own row, else of the first. They have no
        prompt ids: each model renders the prompt itself.
        """
        rows = [self._row(place) for place in self._places.get(key_of(prompt), [])]
        indices = {row["prompt"] for row in rows}
        of = prompt.index if prompt.index in indices else min(indices, default=0)
        own = sorted((row for row in rows if row["prompt"] == of), key=lambda row: row["member"])
        return [_rollout(prompt, row) for row in own]

    def rows_of(self, rollout: Rollout) -> TopKRows | None:
        """What the teacher says at every token of a text, or of the beginning of a longer one;
        None where the cache has no such text.
        """
        content, n = list(rollout.content_ids), len(rollout.ids)
        for place in self._places.get(key_of(rollout.prompt), []):
            i, row = place
            ids = self._tables[i]["ids"][row].as_py()
            if len(ids) >= n and ids[: len(content)] == content:
                encoded = Encoded(
                    *(self._tables[i][f"topk_{name}"][row].as_py() for name in Encoded._fields)
                )
                rows = decode_rows(encoded, len(ids), self.description.layout)
                return TopKRows(rows.ids[:n], rows.logp[:n], rows.tail[:n])
        return None

    def _row(self, place: tuple[int, int]) -> dict[str, Any]:
        i, row = place
        wanted = ("ids", "logp", "stop_logp", "text", "ended", "member", "prompt")
        return {name: self._tables[i][name][row].as_py() for name in wanted}


def _rollout(prompt: Prompt, row: Mapping[str, Any]) -> Rollout:
    ids, logp = tuple(row["ids"]), tuple(row["logp"])
    return Rollout(prompt, (), ids, logp, row["stop_logp"], row["text"], row["ended"])


def narrowed(rows: TopKRows, k: int) -> TopKRows:
    """The k likeliest ids of a position; the others join its tail."""
    if rows.ids.shape[1] <= k:
        return rows
    rest_nK = np.concatenate([rows.logp[:, k:], rows.tail[:, None]], 1).astype(np.float64)
    tail_n = np.logaddexp.reduce(rest_nK, 1).astype(np.float32)
    return TopKRows(rows.ids[:, :k], rows.logp[:, :k], tail_n)


def check_same(cache: Description, chat: Chat, files: Mapping[str, str], path: str) -> None:
    """ValueError where the teacher of this run is not the one that wrote the cache.

    chat, files: of the folder `path`, teacher.path; hashes by name, as in the head of run.jsonl.
    """
    what = None
    if tokenizer_fingerprint(chat) != cache.tokenizer:
        what = "its tokenizer"
    elif template_fingerprint(chat) != cache.template:
        what = "its chat template, template_arguments or stop set"
    else:
        before = cache.teacher["files"]
        changed = [name for name in files if name in before and files[name] != before[name]]
        what = changed[0] if changed else None
    if what is not None:
        raise ValueError(
            f"teacher.path = {path!r} is not the teacher of this cache, {cache.teacher['path']!r}: "
            f"{what} differs. Name the teacher that wrote it, or write a cache of this one"
        )
