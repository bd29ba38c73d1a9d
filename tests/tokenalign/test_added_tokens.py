"""Added tokens with every combination of their flags: spelled exactly, or named as the reason why a
text is not.
"""

import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_fixtures import byte_level, metaspace, sentencepiece
from tokenizers import AddedToken, Tokenizer

from reflux.tokenalign.byte_table import ByteTable, encode_text, normalizer_of
from reflux.tokenalign.offsets import side
from reflux.tokenalign.spans import align_spans
from reflux.tokenalign.table_cache import cached_table

BASES = {
    "byte level": lambda: byte_level(),
    "byte level, prefix": lambda: byte_level(prefix=True),
    "byte level, NFC": lambda: byte_level("NFC"),
    "Metaspace, always": lambda: metaspace("bpe", "always"),
    "Metaspace, first": lambda: metaspace("unigram", "first"),
    "Metaspace, never": lambda: metaspace("bpe", "never"),
    "Prepend": lambda: metaspace("bpe", "legacy"),
}
FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
COMBINATIONS = [dict(zip(FLAGS, on)) for on in itertools.product((False, True), repeat=4)]
CONTENTS = ("<think>", " tool", "\u2581x\u2581", "\n\n")


def with_token(base, content, flags):
    tokenizer = Tokenizer.from_str(BASES[base]().to_str())
    tokenizer.add_tokens([AddedToken(content, **flags)])
    return tokenizer


def swallowed(text, content):
    """Whether whitespace stands beside `content` in `text`."""
    return re.search(rf"\s{re.escape(content)}|{re.escape(content)}\s", text)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("flags", COMBINATIONS, ids=lambda f: "+".join(k for k in f if f[k]) or "-")
@pytest.mark.parametrize("content", CONTENTS)
def test_every_flag_is_read_and_only_swallowed_whitespace_is_lost(base, flags, content):
    tokenizer = with_token(base, content, flags)
    table = ByteTable.of(tokenizer)
    strips = flags["lstrip"] or flags["rstrip"]
    assert table.swallows_spaces == ((content,) if strips else ())
    normalize = normalizer_of(tokenizer)
    for shape in (
        "{}",
        "a {} b",
        "a{}b",
        " {} ",
        "x{}",
        "{}{}",
        "a  {}\n\n{} b",
        "no name",
        " {}y",
    ):
        text = shape.format(*[content] * 2)
        one = side(table, encode_text(tokenizer, text), text.encode(), normalize=normalize)
        lost = strips and swallowed(text, content)
        # one id for a piece of the model and for a space and the piece
        lost = lost or base == "Prepend" and content == "\n\n" and flags["normalized"]
        assert one.reproduces or lost, (text, one.lens)


PARTS = st.lists(
    st.sampled_from([*CONTENTS, " ", "  ", "\n", "a", "the", "é", "1", "</s>", "x<th"]), max_size=8
)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(sorted(BASES)),
    st.sampled_from(CONTENTS),
    st.sampled_from(COMBINATIONS),
    PARTS.map("".join),
)
def test_no_span_is_exact_over_bytes_that_the_ids_do_not_spell(base, content, flags, text):
    tokenizer = with_token(base, content, flags)
    table, normalize = ByteTable.of(tokenizer), normalizer_of(tokenizer)
    ids, source = encode_text(tokenizer, text), text.encode()
    one = side(table, ids, source, normalize=normalize)
    if one.reproduces:
        assert sum(one.lens) == len(source)
    characters = byte_level(size=258)
    other = side(ByteTable.of(characters), encode_text(characters, text), source)
    (got,) = align_spans([one], [other])
    for k in np.flatnonzero(got.exact):
        begin, end = ([0, *got.bounds][k], got.bounds[k])
        spelled = table.bytes_of([i for i, s in zip(ids, got.span_a) if s == k])
        image = normalize(source[begin:end].decode(errors="replace")).encode()
        # up to a space that the tokenizer put in front
        assert spelled in (source[begin:end], b" " + source[begin:end], image, b" " + image)


def test_a_prefix_space_behind_an_added_token_is_dropped():
    """Llama-2's chat models with a token of their own put a space in front of what follows it."""
    tokenizer = with_token("Metaspace, always", "<think>", {"normalized": False})
    table = ByteTable.of(tokenizer)
    text = "so <think>so</think>"
    ids = encode_text(tokenizer, text)
    assert table.bytes_of(ids) == b" so <think> so</think>"
    one = side(table, ids, text.encode())
    assert one.reproduces and one.skip == 1 and len(one.later_skips) == 1


def test_a_normalised_name_takes_the_space_that_the_normaliser_puts_in_front():
    """Prepend makes it "\u2581<think>": found behind a space only, and spelled with it."""
    tokenizer = with_token("Prepend", "<think>", {"normalized": True})
    table = ByteTable.of(tokenizer)
    i = tokenizer.token_to_id("<think>")
    assert table.pieces[i] == b" <think>"
    assert i in encode_text(tokenizer, "so <think>so") and i not in encode_text(
        tokenizer, "so<think>"
    )


def test_a_cached_table_remembers_the_flags(tmp_path, monkeypatch):
    monkeypatch.setenv("REFLUX_CACHE", str(tmp_path / "cache"))
    tokenizer = with_token("Metaspace, always", "<think>", {"lstrip": True})
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    built = cached_table(path, tokenizer)
    again = cached_table(path, tokenizer)
    assert again.added == built.added == ByteTable.of(tokenizer).added != ()


def test_a_refusal_names_the_true_reason():
    with pytest.raises(ValueError, match="no id for some of these characters.*byte_fallback"):
        ByteTable.of(sentencepiece("bpe", byte_fallback=False))
    tokenizer = byte_level()
    table = ByteTable.of(tokenizer)
    for change, reason in (
        (lambda text: " ".join(text.split()), "It adds or drops whitespace"),
        (lambda text: text[::-1], "Were its files changed, or converted"),
    ):
        ids = encode_text(tokenizer, change("ab  c"))
        with pytest.raises(ValueError, match=reason) as refused:
            table.verify(lambda text, ids=ids: ids, ["ab  c"])
        assert "byte_fallback" not in str(refused.value)
