"""Positions of a normalised text in its source."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, normalizers

from reflux.tokenalign.norm_map import clusters, source_ends

collapse = normalizers.Sequence([normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()])
NORMALIZERS = {
    "NFC": normalizers.NFC(),
    "NFD": normalizers.NFD(),
    "NFKC": normalizers.NFKC(),
    "NFKD": normalizers.NFKD(),
    "lowercase": normalizers.Lowercase(),
    "BERT": normalizers.BertNormalizer(),
    "accents": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
    "collapse": collapse,
}
each_normalizer = pytest.mark.parametrize("name", NORMALIZERS)
# what normalisers change: marks, ligatures, Hangul, final sigma, runs of spaces
CHANGED = (
    "  \n\tab eÉA\u0301\u0323\u0308ﬁ①Ａ²㎏Σσ\u0130\u1112\u1161\u11ab\uac00\u0958\u2126\u0344\ufdfa"
    "\u200d🙂你"
)
TEXTS = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(CHANGED)), max_size=40
)


def ends_of(cuts, text):
    """Sorted byte ends over `text` from drawn numbers, always with the end itself."""
    size = len(text.encode())
    return np.array(sorted([*(c % (size + 1) for c in cuts), size]), np.int64)


@each_normalizer
@given(text=TEXTS)
def test_the_normaliser_distributes_over_the_clusters(name, text):
    normalize = NORMALIZERS[name].normalize_str
    pairs = clusters(text, normalize)
    assert "".join(c for c, _ in pairs) == text
    assert [n for _, n in pairs] == [normalize(c) for c, _ in pairs]
    assert "".join(n for _, n in pairs) == normalize(text)


@each_normalizer
@given(text=TEXTS, cuts=st.lists(st.integers(0, 999), max_size=12))
def test_mapped_ends_are_monotone_and_the_end_is_the_end(name, text, cuts):
    normalize = NORMALIZERS[name].normalize_str
    ends = ends_of(cuts, normalize(text))
    mapped = source_ends(text, normalize, ends)
    assert mapped.dtype == np.int64 and mapped.shape == ends.shape
    assert (np.diff(mapped) >= 0).all() and mapped[0] >= 0
    assert mapped[-1] == (len(text.encode()) if normalize(text) else 0)


@each_normalizer
@given(text=TEXTS, cuts=st.lists(st.integers(0, 999), max_size=12))
def test_unchanged_text_maps_to_itself(name, text, cuts):
    normalize = NORMALIZERS[name].normalize_str
    text = normalize(text)
    # Unicode promises it for NFC and the like; a lower-cased text may lower-case again
    if normalize(text) == text:
        ends = ends_of(cuts, text)
        assert (source_ends(text, normalize, ends) == ends).all()


@each_normalizer
@given(text=TEXTS, cuts=st.lists(st.integers(0, 999), max_size=12))
def test_every_mapped_end_is_an_edge_or_lies_in_bytes_that_did_not_change(name, text, cuts):
    """The bytes up to a mapped end are N's image, or equal bytes on both sides."""
    normalize = NORMALIZERS[name].normalize_str
    pairs = [(c.encode(), n.encode()) for c, n in clusters(text, normalize)]
    known, at, image_at = {0: 0}, 0, 0
    for c, n in pairs:
        for k in range(len(n) + 1):
            if n[:k] == c[:k]:
                known.setdefault(image_at + k, at + k)
            if n[k:] == (c[len(c) - len(n) + k :] if len(n) - k <= len(c) else None):
                known.setdefault(image_at + k, at + len(c) - len(n) + k)
        at, image_at = at + len(c), image_at + len(n)
        known[image_at] = at
    ends = ends_of(cuts, normalize(text))
    mapped_ends, last = source_ends(text, normalize, ends).tolist(), 0
    for end, mapped in zip(ends.tolist(), mapped_ends, strict=True):
        assert mapped == last or mapped == known[end]
        last = mapped


def test_half_a_ligature_has_no_position():
    normalize = normalizers.NFKC().normalize_str
    text = "a\ufb01b"  # a, the fi ligature (3 bytes), b; normalised: a f i b
    assert source_ends(text, normalize, np.arange(5)).tolist() == [0, 1, 1, 4, 5]
    # a token over "i" and "b" carries the whole ligature, one over "af" nothing of it
    assert source_ends(text, normalize, np.array([2, 4])).tolist() == [0, 5]


def test_a_composed_letter_leaves_the_positions_around_it():
    normalize = normalizers.NFC().normalize_str
    text = "cafe\u0301 au lait"
    ends = np.array([3, 5, 8])  # caf | é | " au"
    assert source_ends(text, normalize, ends).tolist() == [3, 6, 9]


def test_a_token_without_a_position_leaves_its_bytes_to_the_next():
    """It ends with the last token before it; 4 is a cluster edge, but no token ends there."""
    normalize = normalizers.NFKC().normalize_str
    text = "abcd\ufb01e"
    assert source_ends(text, normalize, np.array([3, 5, 7])).tolist() == [3, 3, 8]


def test_deleted_characters_belong_to_the_token_before_them():
    normalize = NORMALIZERS["accents"].normalize_str
    assert source_ends("e\u0301a\u0323", normalize, np.array([0, 1, 2])).tolist() == [0, 3, 6]
    assert source_ends("  a  ", collapse.normalize_str, np.array([0, 1])).tolist() == [0, 5]


def test_whitespace_that_collapses_leaves_the_positions_of_words():
    text = "one" + " " * 1000 + "two"
    assert source_ends(text, collapse.normalize_str, np.array([3, 4, 7])).tolist() == [
        3,
        1003,
        1006,
    ]


def test_a_sigma_that_is_final_only_at_the_end_of_a_word():
    text = "ΟΔΟΣ ΣΟΦΙΑ"
    normalize = NORMALIZERS["lowercase"].normalize_str
    assert "".join(n for _, n in clusters(text, normalize)) == normalize(text)
    assert source_ends(text, normalize, np.array([8, 9, 19])).tolist() == [8, 9, 19]


def test_a_normaliser_that_never_distributes_gives_one_cluster():
    text = "abc" * 500
    assert clusters(text, lambda s: "\u2581" + s) == [(text, "\u2581" + text)]


def test_ends_of_another_text_are_refused():
    normalize = normalizers.NFC().normalize_str
    for ends in ([0, 9], [3, 2], [-1, 3]):
        with pytest.raises(ValueError, match="within the 3 bytes of the normalised text"):
            source_ends("abc", normalize, np.array(ends))
    assert source_ends("", normalize, np.array([], np.int64)).tolist() == []
    assert source_ends("", normalize, np.array([0, 0])).tolist() == [0, 0]


def test_cost_follows_the_changes_not_the_length():
    calls = 0

    def normalize(text):
        nonlocal calls
        calls += 1
        return NORMALIZERS["NFC"].normalize_str(text)

    clean = "The quick brown fox. 你好 🙂\n" * 2000
    assert len(clusters(clean, normalize)) == calls == 1
    calls = 0
    started = time.perf_counter()
    pairs = clusters(clean + "cafe\u0301" + clean, normalize)
    assert calls < 60 and ("e\u0301", "\u00e9") in pairs
    assert time.perf_counter() - started < 5
