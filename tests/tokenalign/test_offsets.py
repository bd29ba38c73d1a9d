"""What ids spell, and whether a side gives the source back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from span_cases import side_of, span_bytes
from tokenizer_fixtures import TEXTS, byte_level, metaspace, sentencepiece, table_of

from reflux.tokenalign.byte_table import CONTROL, encode_text, normalizer_of
from reflux.tokenalign.offsets import side, spell
from reflux.tokenalign.spans import after_prompt, align_spans


@given(text=TEXTS)
def test_spelling_undoes_encoding(text):
    for tokenizer in (byte_level(), byte_level(size=258)):
        spelled = spell(table_of(tokenizer), encode_text(tokenizer, text))
        assert (spelled.text, spelled.bytes, spelled.cut) == (text, text.encode(), False)


@given(text=TEXTS.filter(bool), data=st.data())
def test_a_cut_inside_a_character_keeps_the_whole_characters(text, data):
    tokenizer = byte_level(size=258)
    ids = encode_text(tokenizer, text)
    cut = data.draw(st.integers(0, len(ids)))
    spelled = spell(table_of(tokenizer), ids[:cut])
    whole = max(k for k in range(len(text) + 1) if len(text[:k].encode()) <= cut)
    assert spelled.text == text[:whole] and spelled.bytes == text[:whole].encode()
    assert spelled.cut == (len(spelled.bytes) < cut)


@pytest.mark.parametrize(
    "raw", [b"a\xffb", b"\x80", b"\xed\xa0\x80", b"\xe2\x82a", b"ok\xc0\xaf"], ids=repr
)
def test_bytes_that_are_no_text_are_said_to_be_none(raw):
    tokenizer = byte_level(size=258)
    table = table_of(tokenizer)
    one_byte = {piece: i for i, piece in enumerate(table.pieces)}
    spelled = spell(table, [one_byte[raw[k : k + 1]] for k in range(len(raw))])
    assert spelled.text is None and spelled.bytes == raw


@pytest.mark.parametrize(
    "tokenizer",
    [
        lambda: byte_level(),
        lambda: byte_level(prefix=True),
        lambda: sentencepiece("bpe"),
        lambda: sentencepiece("unigram"),
        lambda: sentencepiece("unigram", False),
        lambda: metaspace("bpe", "legacy"),
        lambda: metaspace("bpe", "first"),
    ],
)
@given(text=TEXTS)
def test_encoding_a_text_gives_a_side_that_reproduces_it(tokenizer, text):
    tokenizer = tokenizer()
    table, ids = table_of(tokenizer), encode_text(tokenizer, text)
    one = side(table, ids, text.encode())
    # becomes a space: the source cannot come back
    if "\u2581" in text and table.family == "sentencepiece":
        assert not one.reproduces
        return
    assert one.reproduces
    assert one.lens.sum() == len(text.encode()) and (one.lens >= 0).all()
    assert table.bytes_of(ids)[one.skip :] == text.encode()


def test_the_same_ids_with_and_without_a_space_in_front():
    """Metaspace "always" gives "hello" and " hello" equal ids: only the source decides."""
    tokenizer = metaspace("bpe", "always")
    table, ids = table_of(tokenizer), encode_text(tokenizer, "hello")
    assert ids == encode_text(tokenizer, " hello")
    assert [
        (s.skip, s.reproduces) for s in (side(table, ids, b"hello"), side(table, ids, b" hello"))
    ] == [(1, True), (0, True)]


@pytest.mark.parametrize("name", ["</s>", "<0x41>"])
def test_a_name_that_the_tokenizer_reads_as_its_token_does_not_reproduce(name):
    tokenizer = metaspace("unigram", "never")
    for text, same in ((name[1:], True), (f"a {name}", False)):
        assert (
            side(table_of(tokenizer), encode_text(tokenizer, text), text.encode()).reproduces
            == same
        )


def test_a_prefix_is_dropped_only_where_the_tokenizer_has_that_habit():
    tokenizer = byte_level()
    got = side(table_of(tokenizer), encode_text(tokenizer, " hello"), b"hello")
    assert not got.reproduces and got.skip == 0


def test_a_prefix_can_empty_the_first_token():
    tokenizer = sentencepiece("bpe")
    got = side(table_of(tokenizer), encode_text(tokenizer, "\nfoo"), b"\nfoo")
    # the lone mark: a token of no bytes, still scored
    assert got.reproduces and got.lens[0] == 0 and got.ids[0] >= 0


def test_a_normaliser_that_changes_the_text_is_not_guessed_around():
    tokenizer = byte_level("NFC")
    for text, same in (("café", True), ("cafe\u0301", False)):
        assert (
            side(table_of(tokenizer), encode_text(tokenizer, text), text.encode()).reproduces
            == same
        )


def test_control_and_masked_tokens_are_outside():
    tokenizer = byte_level()
    bos, stop = tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>")
    ids = encode_text(tokenizer, "hello there")
    bare = side(table_of(tokenizer), ids, b"hello there")
    dressed = side(table_of(tokenizer), [bos, *ids[:1], -1, *ids[1:], stop], b"hello there")
    assert dressed.reproduces and dressed.ids.tolist() == [-1, ids[0], -1, *ids[1:], -1]
    assert np.array_equal(dressed.lens[dressed.ids >= 0], bare.lens)


def test_the_producer_of_a_cut_text_still_reproduces_it():
    tokenizer = byte_level(size=258)
    table, ids = table_of(tokenizer), encode_text(tokenizer, "hi 你")[:-1]
    spelled = spell(table, ids)
    assert spelled.text == "hi " and spelled.cut
    assert side(table, ids, spelled.bytes).reproduces
    assert not side(table, [*ids, ids[0]], spelled.bytes).reproduces


def test_an_empty_text_is_a_side():
    for tokenizer in (byte_level(), sentencepiece("bpe")):
        one = side(table_of(tokenizer), encode_text(tokenizer, ""), b"")
        assert one.reproduces and one.lens.sum() == 0


# Spaces put in front, stretch by stretch


def legacy_rows(stretches):
    """Ids of a SentencePiece pipeline that puts a mark behind every control token."""
    tokenizer = metaspace("bpe", "legacy")
    stop = tokenizer.token_to_id("</s>")
    ids = []
    for stretch in stretches:
        ids += [*encode_text(tokenizer, stretch), stop]
    return tokenizer, ids[:-1]


STRETCHES = st.lists(
    st.sampled_from(["a", " b", "", " ", "  ", "x y", "\nfoo", "12 ", "é  你"]),
    min_size=1,
    max_size=5,
)


@given(STRETCHES)
def test_a_space_behind_every_control_token_is_dropped(stretches):
    tokenizer, ids = legacy_rows(stretches)
    source = "".join(stretches).encode()
    one = side(table_of(tokenizer), ids, source)
    assert one.reproduces and one.lens.sum() == len(source) and (one.lens >= 0).all()
    other = side(
        table_of(byte_level(size=258)),
        encode_text(byte_level(size=258), "".join(stretches)),
        source,
    )
    got = align_spans([one], [other])[0]
    assert got.exact.all() and got.bytes_a == got.bytes_b == len(source)
    assert ((got.span_a >= 0) == (one.ids >= 0)).all() or not source


def test_which_spaces_were_dropped_is_told():
    tokenizer, ids = legacy_rows(["a", "b", " c"])
    one = side(table_of(tokenizer), ids, b"ab c")
    spelled = [table_of(tokenizer).pieces[i] if i >= 0 else None for i in one.ids]
    assert one.skip == 1 and [spelled[k][:1] for k in one.skips] == [b" "] * 3
    assert len(one.later_skips) == 2


def test_a_completion_encoded_apart_has_a_mark_of_its_own():
    tokenizer = sentencepiece("bpe")
    table = table_of(tokenizer)
    prompt, completion = encode_text(tokenizer, "2 + 2 ="), encode_text(tokenizer, "4 so")
    source = b"2 + 2 =4 so"
    assert not side(table, [*prompt, *completion], source).reproduces
    one = side(table, [*prompt, *completion], source, starts=[len(prompt)])
    assert one.reproduces and one.later_skips == (len(prompt),)
    assert one.lens[: len(prompt)].sum() == len("2 + 2 =")


def test_a_space_goes_only_where_it_has_to():
    """A real space behind a control token stays, although the tokenizer has the habit."""
    tokenizer = metaspace("bpe", "first")
    table = table_of(tokenizer)
    ids = [
        *encode_text(tokenizer, "a"),
        table_of(tokenizer).kind.tolist().index(CONTROL),
        *encode_text(tokenizer, " b"),
    ]
    one = side(table, ids, b"a b")
    assert one.reproduces and one.skip == 1


# Control tokens, masks, and what the source is


def test_control_tokens_as_events_surface_or_errors():
    tokenizer = byte_level()
    table, stop = table_of(tokenizer), tokenizer.token_to_id("</s>")
    ids = [*encode_text(tokenizer, "ab"), stop, *encode_text(tokenizer, "cd")]
    assert (
        spell(table, ids).text == "abcd" and spell(table, ids, control="surface").text == "ab</s>cd"
    )
    one = side(table, ids, b"ab</s>cd", control="surface")
    assert (
        one.reproduces
        and (one.ids >= 0).all()
        and one.lens.sum() == 8
        and one.lens[ids.index(stop)] == 4
    )
    other = side(
        table_of(byte_level(size=258)), encode_text(byte_level(size=258), "ab</s>cd"), b"ab</s>cd"
    )
    got = align_spans([one], [other])[0]
    assert got.exact.all() and got.bounds[-1] == 8 and (got.span_a >= 0).all()
    event = align_spans(
        [side(table, ids, b"abcd")], [side(table, encode_text(tokenizer, "abcd"), b"abcd")]
    )[0]
    assert event.exact.all() and event.span_a[ids.index(stop)] == -1
    for call in (
        lambda: spell(table, ids, control="error"),
        lambda: side(table, ids, b"abcd", control="error"),
    ):
        with pytest.raises(
            ValueError,
            match=rf"id {stop} \(b'</s>'\) at position {ids.index(stop)} is a control token",
        ):
            call()
    with pytest.raises(ValueError, match="control = 'text'; want one of event, surface, error"):
        spell(table, ids, control="text")
    with pytest.raises(ValueError, match="another `control`"):
        align_spans([one, side(table, ids, b"abcd")], [other, other])


def test_a_producers_leading_space_can_be_left_out_of_the_source():
    tokenizer = sentencepiece("bpe")
    table, ids = table_of(tokenizer), encode_text(tokenizer, "hello")
    assert (spell(table, ids).text, spell(table, ids, drop_space=True).text) == (" hello", "hello")
    one = side(table, ids, spell(table, ids, drop_space=True).bytes)
    assert one.reproduces and one.skip == 1


def test_tokens_behind_a_cut_character_are_outside():
    tokenizer, other = byte_level(size=258), byte_level()
    ids = encode_text(tokenizer, "hi 你")[:-1]
    spelled = spell(table_of(tokenizer), ids)
    sampled, encoded = (
        side(table_of(tokenizer), ids, spelled.bytes),
        side(table_of(other), encode_text(other, spelled.text), spelled.bytes),
    )
    got = align_spans([sampled], [encoded])[0]
    assert (
        got.exact.all()
        and got.bounds[-1] == 3
        and got.span_a[-2:].tolist() == [-1, -1]
        and (got.span_b >= 0).all()
    )


@given(st.binary(max_size=20))
def test_any_bytes_have_a_verdict(raw):
    """Invalid UTF-8 has no text, a cut text its whole characters; both are reproduced."""
    tokenizer = byte_level(size=258)
    table = table_of(tokenizer)
    one_byte = {piece: i for i, piece in enumerate(table.pieces)}
    ids = [one_byte[raw[k : k + 1]] for k in range(len(raw))]
    spelled = spell(table, ids)
    assert side(table, ids, spelled.bytes).reproduces
    assert raw.startswith(spelled.bytes) and (
        spelled.text is None or spelled.text.encode() == spelled.bytes
    )
    try:
        raw.decode()
        assert spelled.text is not None and not spelled.cut
    except UnicodeDecodeError as error:
        assert (spelled.text is None) == (error.reason != "unexpected end of data")


def test_ids_of_any_integer_type():
    tokenizer = byte_level()
    table, ids = table_of(tokenizer), encode_text(tokenizer, "hello there")
    for form in (
        ids,
        tuple(ids),
        np.array(ids, np.int32),
        np.array(ids, np.uint32),
        np.array(ids, np.int64)[::1],
    ):
        assert side(table, form, b"hello there").reproduces
    for bad in ([len(table)], np.array([-2], np.int32), [2**40]):
        with pytest.raises(
            ValueError, match=f"at position 0 is outside this table of {len(table)} ids"
        ):
            side(table, bad, b"")


# Normalisers


@pytest.mark.parametrize("form", ["NFC", "NFKC"])
@given(text=TEXTS.filter(bool))
def test_a_normalised_text_is_mapped_back(form, text):
    tokenizer, plain = byte_level(form), byte_level(size=258)
    normalize, source = normalizer_of(tokenizer), text.encode()
    one = side(table_of(tokenizer), encode_text(tokenizer, text), source, normalize=normalize)
    other = side(table_of(plain), encode_text(plain, text), source)
    got = align_spans([one], [other])[0]
    assert one.reproduces and got.exact.all() and got.bounds[-1] == got.bytes_a == len(source)
    assert (one.lens >= 0).all() and one.lens.sum() == len(source) and (got.span_a >= 0).all()
    if normalize(text) == text:
        assert one.ends is None
    # what a span's tokens spell is N of its piece of the source
    for k, (begin, end) in enumerate(span_bytes(got)):
        spelled = table_of(tokenizer).bytes_of(one.ids[got.span_a == k].tolist())
        piece = source[begin:end].decode(errors="replace")
        # N keeps what is cut inside
        assert spelled == (source[begin:end] if "\ufffd" in piece else normalize(piece).encode())


def test_a_space_in_front_and_a_normaliser():
    tokenizer = sentencepiece("bpe")
    one = side(
        table_of(tokenizer),
        encode_text(tokenizer, "a\u2581b"),
        "a\u2581b".encode(),
        normalize=normalizer_of(tokenizer),
    )
    assert one.reproduces and one.skip == 1 and one.lens.sum() == 5


def test_a_cut_character_behind_a_normalised_text():
    tokenizer = byte_level("NFC", size=258)
    source = "e\u0301x"
    ids = [*encode_text(tokenizer, source), *encode_text(tokenizer, "你")[:2]]
    one = side(table_of(tokenizer), ids, source.encode(), normalize=normalizer_of(tokenizer))
    other = side(
        table_of(byte_level(size=258)), encode_text(byte_level(size=258), source), source.encode()
    )
    got = align_spans([one], [other])[0]
    assert (
        one.reproduces
        and got.bounds.tolist() == [3, 4]
        and got.span_a.tolist() == [0, 0, 1, -1, -1]
    )


# The seam


@given(
    TEXTS.filter(lambda t: t and "\u2581" not in t), TEXTS.filter(lambda t: t and "\u2581" not in t)
)
def test_usable_spans_lie_behind_the_prompt_on_both_sides(prompt, completion):
    """One side encoded as one text, the other apart, in absolute bytes."""
    joint, apart = byte_level(), sentencepiece("bpe")
    source, seam = (prompt + completion).encode(), len(prompt.encode())
    head = encode_text(apart, prompt)
    one = side(table_of(joint), encode_text(joint, prompt + completion), source)
    other = side(
        table_of(apart), [*head, *encode_text(apart, completion)], source, starts=[len(head)]
    )
    assert one.reproduces and other.reproduces
    whole = align_spans([one], [other])[0]
    got = after_prompt(whole, seam)
    begin = np.concatenate([[0], whole.bounds[:-1]])
    assert (got.exact == (begin >= seam)).all() and np.array_equal(got.bounds, whole.bounds)
    for tokens, span in ((one, got.span_a), (other, got.span_b)):
        start = np.cumsum(tokens.lens) - tokens.lens
        inside = span >= 0
        inside[inside] = got.exact[span[inside]]
        assert (start[inside] >= seam).all()


def test_a_token_across_the_seam_takes_its_span_with_it():
    """lm-eval PR 242: cutting at len(encode(context)) is wrong when a merge crosses the seam."""
    joint, apart = side_of([b"2+2", b"=4", b"."]), side_of([b"2+2=", b"4", b"."])
    got = after_prompt(align_spans([joint], [apart])[0], 4)
    assert got.bounds.tolist() == [5, 6] and got.exact.tolist() == [False, True]
