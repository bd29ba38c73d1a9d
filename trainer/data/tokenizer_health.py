"""Is the tokenizer that transformers loaded the one that lies in the folder?

Newer classes of transformers build a tokenizer from its vocabulary and merges and put their own
normaliser and splitting beside it, so a folder whose class name is wrong is read without its regex,
and every text is cut in another way than in training. Compared on the probes of
`byte_table.PROBES`, whose ids tokenizer.json itself gives.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from reflux.tokenalign.byte_table import PROBES

# what splitting by a regex decides: contractions, digits, spaces, line ends, letters of two scripts
MORE_PROBES = (
    "I'm sure they'LL say we've",
    "1234567 89",
    "a  b   c\n\n\nd",
    "naïveтекст漢字 x_y-z",
)


def warn_of_another_tokenizer(path: str, tokenizer: Any) -> None:
    """A warning where tokenizer.json of the folder gives other ids than `tokenizer` for a probe.

    Nothing is said of a folder without a tokenizer.json, and of one that cannot be read: loading
    says that.
    """
    raw = Path(path) / "tokenizer.json"
    if not raw.is_file() or not getattr(tokenizer, "is_fast", False):
        return
    expected = _ids_of(str(raw), raw.stat().st_mtime_ns)
    for probe, ids in expected.items():
        got = tuple(tokenizer(probe, add_special_tokens=False)["input_ids"])
        if got != ids:
            warnings.warn(
                f"{path}: transformers reads this tokenizer as {type(tokenizer).__name__}, which "
                f"cuts {probe!r} into {len(got)} tokens, while its tokenizer.json cuts it into "
                f"{len(ids)}, first {_first_difference(got, ids)}: a model trained with one of "
                "them reads other texts through the other. Look at tokenizer_class in "
                "tokenizer_config.json; PreTrainedTokenizerFast takes tokenizer.json as it is",
                stacklevel=3,
            )
            return


@contextmanager
def panics_in_words(path: str, text: str) -> Iterator[None]:
    """ValueError in place of a panic of the tokenizer's Rust code, which is a BaseException and
    would end a run without a word.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(
            f"{path}: the tokenizer's own code broke off on {text[:60]!r} ({error}). Its "
            "tokenizer.json may be damaged, or of another version of the package tokenizers"
        ) from error


@lru_cache(maxsize=64)
def _ids_of(file: str, _changed: int) -> dict[str, tuple[int, ...]]:
    from tokenizers import Tokenizer

    try:
        raw = Tokenizer.from_file(file)
        raw.no_truncation()
        raw.no_padding()
        return {p: tuple(raw.encode(p, add_special_tokens=False).ids) for p in _probes()}
    except Exception:  # of the library; transformers has read the folder in its own way
        return {}


def _probes() -> tuple[str, ...]:
    return (*PROBES, *MORE_PROBES)


def _first_difference(got: tuple[int, ...], want: tuple[int, ...]) -> str:
    at = next((i for i, (a, b) in enumerate(zip(got, want)) if a != b), min(len(got), len(want)))
    ours, theirs = (str(x[at]) if at < len(x) else "no token" for x in (got, want))
    return f"at token {at}: id {ours} and {theirs}"
