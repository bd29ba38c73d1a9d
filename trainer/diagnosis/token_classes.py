"""What kind of token is it, and how often does it occur?

Types are decided on a token's bytes, so that they mean the same for two tokenizers. First match
wins: stop or control, whitespace, digit, operator, punctuation, function word, code or markup,
content word, other (half a character, emoji, mixtures).

Frequency bands rank the ids over all texts of a diagnosis, so that they are the same for every
text:
    top 10, 11-100, 101-1000    ids by number of occurrences, the most frequent first; of equally
                                frequent ones the smaller id
    rest seen, never seen       all others that occur, and what is left of the vocabulary

Shapes: V vocabulary.
"""

import unicodedata
from collections.abc import Iterable

import numpy as np

from reflux.tokenalign.byte_table import TEXT, ByteTable

TYPES = (
    "stop",
    "whitespace",
    "digit",
    "operator",
    "punctuation",
    "function",
    "code",
    "content",
    "other",
)
BANDS = ("top 10", "11-100", "101-1000", "rest seen", "never seen")
BAND_ENDS = (10, 100, 1000)  # rank at which a band ends
OPERATORS = set("+-*/=<>^%±×÷≤≥≠≈√∑∏∫∞∂·−∓∝≡")
OPERATORS |= set("∈∉∪∩⊂⊆→←↔⇒⇔¬∧∨∀∃")
CODE = set("{}[]\\_#$@&|~`<>")
# The closed classes of English: articles, pronouns, prepositions, conjunctions, auxiliaries,
# particles.
FUNCTION_WORDS = frozenset(
    """
a an the this that these those some any no every each either neither all both half such what which
whose
i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself
she her hers herself it its itself they them their theirs themselves one ones who whom there here
of in to for with on at from by about as into like through after over between out against during
without before under around among within along across behind beyond up down off above near since
until upon toward towards onto via per
and or but nor so yet if because although though while whereas unless than whether when where why
how then thus hence
be am is are was were been being have has had having do does did doing done will would shall should
can could may might must ought
not n't 's 're 've 'll 'd 'm too also just only very even still again ever never now
""".split()
)


def type_of(piece: bytes) -> str:
    """The type of a TEXT token by its bytes; "stop" is not a property of bytes."""
    try:
        text = piece.decode()
    except UnicodeDecodeError:
        return "other"
    word = text.strip()
    if not word:
        return "whitespace"
    if any(c.isdigit() for c in word) and all(c.isdigit() or c in ".,:" for c in word):
        return "digit"
    if all(c in OPERATORS for c in word):
        return "operator"
    if all(unicodedata.category(c).startswith("P") and c not in CODE for c in word):
        return "punctuation"
    if word.lower() in FUNCTION_WORDS:
        return "function"
    if any(c in CODE for c in word) and all(
        c in CODE or unicodedata.category(c)[0] in "PSLN" for c in word
    ):
        return "code"
    if all(unicodedata.category(c)[0] in "LM" or c in "'’-" for c in word):
        return "content"
    return "other"


def token_types(table: ByteTable, stop_ids: Iterable[int] = ()) -> np.ndarray:
    """int8 [V], an index into TYPES for every id of a tokenizer. CONTROL, UNKNOWN and UNUSED ids
    and the stop set are "stop".
    """
    type_V = np.zeros(len(table), np.int8)
    index = {name: i for i, name in enumerate(TYPES)}
    for i in np.flatnonzero(table.kind == TEXT).tolist():
        type_V[i] = index[type_of(table.pieces[i])]
    type_V[[i for i in stop_ids if i < len(type_V)]] = index["stop"]
    return type_V


def count_ids(texts: Iterable[Iterable[int]], vocab_size: int) -> np.ndarray:
    """int64 [V] occurrences of every id. Counts of parts of the texts add up."""
    count_V = np.zeros(vocab_size, np.int64)
    for ids in texts:
        count_V += np.bincount(np.fromiter(ids, np.int64), minlength=vocab_size)
    return count_V


def frequency_bands(count_V: np.ndarray) -> np.ndarray:
    """int8 [V], an index into BANDS for every id, from its occurrences."""
    order_V = np.argsort(-count_V, kind="stable")
    band_V = np.full(len(count_V), BANDS.index("never seen"), np.int8)
    band_V[order_V] = np.searchsorted(BAND_ENDS, np.arange(len(count_V)), side="right")
    band_V[count_V == 0] = BANDS.index("never seen")
    return band_V
