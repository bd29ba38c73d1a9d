"""What goes over HTTP between a run and a server: arrays and tensors in safetensors' layout, with a
JSON table beside them. Nothing in it can run code.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import safetensors.numpy
import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from .engine_texts import SampledText, ScoredText, ScoreRequest, TextRequest

META = "reflux"


def pack(table: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> bytes:
    return safetensors.numpy.save(dict(arrays or {}), {META: json.dumps(table)})


def unpack(body: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """ValueError for anything that `pack` has not made."""
    try:
        size = int.from_bytes(body[:8], "little")
        table = json.loads(json.loads(body[8 : 8 + size])["__metadata__"][META])
        return table, safetensors.numpy.load(body)
    except (SafetensorError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{len(body)} bytes that are no message of reflux ({error})") from None


def pack_weights(chunk: Sequence[tuple[str, Tensor]]) -> bytes:
    return safetensors.torch.save({name: w.cpu().contiguous() for name, w in chunk})


def unpack_weights(body: bytes) -> list[tuple[str, Tensor]]:
    try:
        return list(safetensors.torch.load(body).items())
    except SafetensorError as error:
        raise ValueError(f"{len(body)} bytes that are no weights ({error})") from None


# --- texts


def pack_requests(requests: Sequence[TextRequest] | Sequence[ScoreRequest]) -> bytes:
    return pack({"requests": [asdict(request) for request in requests]})


def unpack_requests(body: bytes, kind: type) -> list[Any]:
    """kind: TextRequest or ScoreRequest. ValueError for other fields."""
    table, _ = unpack(body)
    try:
        return [
            kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()})
            for row in table["requests"]
        ]
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"a request of another version of reflux ({error})") from None


def pack_texts(texts_PG: Sequence[Sequence[SampledText]]) -> bytes:
    flat = [text for group in texts_PG for text in group]
    table = {
        "group": [len(group) for group in texts_PG],
        "stop_logp": [text.stop_logp for text in flat],
        "versions": [text.versions for text in flat],
        "tokens": [len(text.ids) for text in flat],
    }
    arrays = {
        "ids": np.concatenate([text.ids for text in flat] or [np.zeros(0)]).astype(np.int32),
        "logp": np.concatenate([text.logp for text in flat] or [np.zeros(0)]).astype(np.float32),
    }
    return pack(table, arrays)


def unpack_texts(body: bytes) -> list[list[SampledText]]:
    table, arrays = unpack(body)
    try:
        ends = np.cumsum(table["tokens"], dtype=np.int64)
        columns = zip(
            np.split(arrays["ids"].astype(np.int64), ends)[:-1],
            np.split(arrays["logp"], ends)[:-1],
            table["stop_logp"],
            map(tuple, table["versions"]),
            strict=True,
        )
        flat = iter([SampledText(*row) for row in columns])
        return [[next(flat) for _ in range(n)] for n in table["group"]]
    except (LookupError, TypeError, ValueError, StopIteration) as error:
        raise ValueError(f"an answer of another version of reflux ({error})") from None


def pack_scores(scores: Sequence[ScoredText]) -> bytes:
    arrays: dict[str, np.ndarray] = {}
    for i, score in enumerate(scores):
        arrays[f"{i}.logp"] = score.logp.astype(np.float32)
        arrays[f"{i}.topk_ids"] = np.ascontiguousarray(score.topk_ids, np.int32)
        arrays[f"{i}.topk_logp"] = np.ascontiguousarray(score.topk_logp, np.float32)
    return pack({"versions": [score.versions for score in scores]}, arrays)


def unpack_scores(body: bytes) -> list[ScoredText]:
    table, arrays = unpack(body)
    try:
        return [
            ScoredText(
                arrays[f"{i}.logp"],
                arrays[f"{i}.topk_ids"].astype(np.int64),
                arrays[f"{i}.topk_logp"],
                tuple(versions),
            )
            for i, versions in enumerate(table["versions"])
        ]
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"an answer of another version of reflux ({error})") from None
