"""What kind of token is it? Decided on its bytes, so that two tokenizers are asked the same
question.

First match wins: stop or control, whitespace, digit, operator, punctuation, function word, code or
markup, content word, other (half a character, emoji, mixtures).
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
OPERATORS = set("+-*/=<>^%±×÷≤≥≠≈√∑∏∫∞∂∈∉∪∩⊂⊆→←↔⇒⇔¬∧∨∀∃·−∓∝≡")
CODE = set("{}[]\\_#$@&|~`<>")
# The closed classes of English: articles, pronouns, prepositions, conjunctions, auxiliaries,
# particles.
FUNCTION_WORDS = frozenset(
    """
a an the this that these those some any no every each either neither all both half such what which whose
i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself she her hers herself it its
itself they them their theirs themselves one ones who whom there here
of in to for with on at from by about as into like through after over between out against during without before under around
among within along across behind beyond up down off above near since until upon toward towards onto via per
and or but nor so yet if because although though while whereas unless than whether when where why how then thus hence
be am is are was were been being have has had having do does did doing done will would shall should can could may might must ought
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
    found = np.zeros(len(table), np.int8)
    at = {name: i for i, name in enumerate(TYPES)}
    for i in np.flatnonzero(table.kind == TEXT):
        found[i] = at[type_of(table.pieces[i])]
    found[[i for i in stop_ids if i < len(found)]] = at["stop"]
    return found
