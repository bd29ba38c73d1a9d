"""Where a token of a *normalised* text ends in the source text.

A tokenizer with a normaliser N (NFC, NFKC, lower-casing) spells N(text), not the text. The text is
cut into clusters c over which N distributes,

    N(c_1 + ... + c_m) = N(c_1) + ... + N(c_m),

so a cluster edge in N(text) has a position in the text, and so has every byte that a cluster and
its image have in common at either end. No other byte has one: half of a ligature that became two
letters is nowhere in the source.

Every cut is tested on the two strings that it separates, so the law above holds by construction,
whatever N does. N has to be the tokenizer's own function (`byte_table.normalizer_of`): Unicode
tables differ between versions.

n: tokens.
"""

from collections.abc import Callable, Iterator
from os.path import commonprefix

import numpy as np

Normalize = Callable[[str], str]


def clusters(text: str, normalize: Normalize) -> list[tuple[str, str]]:
    """Pairs (c, N(c)) that spell `text` and N(text), cut where N changes something.

    The text is halved as long as N distributes over the halves and changes them, so the cost grows
    with the number of changes, not with the length: one call of N when nothing changes, O(L log L)
    characters through N at worst, L the length.
    """
    done, todo = [], [(text, normalize(text))] if text else []
    while todo:
        whole, image = todo.pop()
        halves = None if whole == image else _cut(whole, image, normalize)
        if halves:
            todo += reversed(halves)
        else:
            done.append((whole, image))
    return done


def source_ends(text: str, normalize: Normalize, ends: np.ndarray) -> np.ndarray:
    """Byte ends of tokens in N(text) -> byte ends in `text`, int64 [n].

    ends: int64 [n], non-decreasing, from 0 to the bytes of N(text). normalize: N, which must not
    put a prefix before the text. An end without a position in the source takes that of the last end
    before it that has one: such a token has no bytes, and the next token whose end has a position
    carries them. The end of N(text) is always the end of the text. Where N deletes characters, they
    belong to the token before them. Where N changes nothing, the result equals `ends`. ValueError
    when `ends` is not sorted or runs past N(text).
    """
    ends = np.asarray(ends, np.int64)
    pairs = [part for pair in clusters(text, normalize) for part in _trim(*pair)]
    source = np.cumsum([0, *(len(c.encode()) for c, _ in pairs)], dtype=np.int64)
    image = np.cumsum([0, *(len(n.encode()) for _, n in pairs)], dtype=np.int64)
    if len(ends) and (ends[0] < 0 or ends[-1] > image[-1] or (np.diff(ends) < 0).any()):
        raise ValueError(
            f"source_ends: ends run from {ends[0]} to {ends[-1]}; want non-decreasing ends within "
            f"the {image[-1]} bytes of the normalised text. Are these the ends of another text, or "
            "with a space prefix still counted?"
        )
    same = np.array([c == n for c, n in pairs] + [False])
    # the last edge at or before: past what was deleted
    k = np.searchsorted(image, ends, side="right") - 1
    inside = np.where(same[k], source[k] + ends - image[k], 0)
    mapped = np.where(image[k] == ends, source[k], inside)
    # characters deleted at the very start belong to the first token that has bytes
    mapped[ends == 0] = 0
    return np.maximum.accumulate(mapped) if len(mapped) else mapped


def _cut(whole: str, image: str, normalize: Normalize) -> list[tuple[str, str]] | None:
    """Two parts, about halves, with N(left) + N(right) = `image` = N(whole); None without a cut."""
    for at in _tries(len(whole)):
        left, right = normalize(whole[:at]), normalize(whole[at:])
        if left + right == image:
            return [(whole[:at], left), (whole[at:], right)]
    return None


def _trim(source: str, image: str) -> list[tuple[str, str]]:
    """The pair without its common beginning and end, which are pairs of their own."""
    if source == image:
        return [(source, image)]
    head = len(commonprefix([source, image]))
    tail = len(commonprefix([source[head:][::-1], image[head:][::-1]]))
    cut, image_cut = len(source) - tail, len(image) - tail
    return [
        (source[:head], image[:head]),
        (source[head:cut], image[head:image_cut]),
        (source[cut:], image[image_cut:]),
    ]


def _tries(length: int) -> Iterator[int]:
    """Cuts to try, from the middle outwards: every one nearby, then by doubling, to step over long
    runs (spaces that N collapses, stacked marks); last, the same from both ends inwards.
    """
    steps = [*range(1, 9), *(1 << p for p in range(4, length.bit_length()))]
    middle = length // 2
    near = [middle, *(middle + sign * step for step in steps for sign in (1, -1))]
    far = [cut for step in reversed(steps) for cut in (step, length - step)]
    yield from (cut for cut in dict.fromkeys(near + far) if 0 < cut < length)
