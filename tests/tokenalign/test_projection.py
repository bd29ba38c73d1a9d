"""The projection by hand, by its laws, and why it has a backward pass."""

import numpy as np
import pytest
from hypothesis import given
from tokenizer_fixtures import byte_level, sentencepiece
from vocab_pairs import pairs, table_of

from reflux.tokenalign.byte_table import TEXT, ByteTable
from reflux.tokenalign.projection import Projection, spell_with
from reflux.tokenalign.vocab_map import Vocabulary, refuse_unreachable


def dense(built):
    W = np.zeros((built.student_rows, built.num_classes))
    np.add.at(W, (built.student_id, built.column), built.weight)
    return W


@given(pairs)
def test_rows_sum_to_one_and_no_column_is_out_of_reach(pair):
    built = Projection.build(*pair)
    W = dense(built)
    inside = np.arange(built.student_rows) < len(pair[0].table)
    assert (
        np.allclose(W[inside].sum(1), 1, atol=1e-12)
        and not W[~inside].any()
        and (built.weight > 0).all()
    )
    used = built.teacher_class[built.teacher_class >= 0]
    assert (W[:, used].sum(0) > 0).all()
    assert len({(i, c) for i, c in zip(built.student_id, built.column, strict=True)}) == len(
        built.weight
    )


@given(pairs)
def test_equal_spellings_have_equal_rows_and_equal_columns(pair):
    built = Projection.build(*pair)
    W = dense(built)
    student, teacher = pair[0].table, pair[1].table
    for i in range(len(student)):
        if student.kind[i] == TEXT:
            assert np.array_equal(W[i], W[student.pieces.index(student.pieces[i])])
    for t in range(len(teacher)):
        if teacher.kind[t] == TEXT:
            assert (
                built.teacher_class[t]
                == built.teacher_class[teacher.pieces.index(teacher.pieces[t])]
            )
        else:
            assert built.teacher_class[t] == built.num_classes - 1


@given(pairs)
def test_nothing_gets_more_than_the_same_spelling(pair):
    built = Projection.build(*pair)
    W, teacher = dense(built), pair[1].table
    for i, piece in enumerate(pair[0].spellings):
        if piece and piece in pair[1].spellings:
            assert W[i, built.teacher_class[teacher.pieces.index(piece)]] == W[i].max() > 0


def test_by_hand():
    student, teacher = (
        Vocabulary(table_of([b"a", b"b", b"ab"])),
        Vocabulary(table_of([b"a", b"b", b"ba"])),
    )
    W = dense(Projection.build(student, teacher))
    one, tenth = 10 / 11, 1 / 11
    # a: itself, and the second piece of "ba"
    want = np.array(
        [
            [1 / (1 + tenth), 0, tenth / (1 + tenth), 0],
            # b: itself, and the first piece of "ba"
            [0, 1 / (1 + one), one / (1 + one), 0],
            [one, tenth, 0, 0],  # ab = a + b
            [0, 0, 0, 1],
        ]
    )  # control
    np.testing.assert_allclose(W, want, atol=1e-15)


def test_only_the_first_pieces_count():
    letters = [bytes([b]) for b in b"abcdef"]
    built = Projection.build(
        Vocabulary(table_of([*letters, b"abcdef"])), Vocabulary(table_of(letters)), top=2, decay=0.5
    )
    np.testing.assert_allclose(dense(built)[6], [2 / 3, 1 / 3, 0, 0, 0, 0, 0])
    assert spell_with(b"abab", {b"a": 0, b"b": 1, b"ab": 2, b"aba": 3}, 3, 4) == [3, 1], (
        "longest first"
    )


def test_without_the_backward_pass_columns_starve():
    """First pieces only: nothing reaches the teacher's "ba", and the build-time check says so."""
    student, teacher = (
        Vocabulary(table_of([b"a", b"b", b"ab"])),
        Vocabulary(table_of([b"a", b"b", b"ba"])),
    )
    built = Projection.build(student, teacher)
    first_pieces = np.array([0, 1, 0, 3])
    with pytest.raises(
        ValueError, match="1 teacher ids are in classes without a student id, the first is id 2"
    ):
        refuse_unreachable("projection", first_pieces, built.teacher_class, built.num_classes)


def test_a_byte_that_texts_do_without_may_be_missing():
    short, long = Vocabulary(table_of([b"a"])), Vocabulary(table_of([b"a", b"\xff", b"a\xff"]))
    assert Projection.build(short, long).teacher_class.tolist() == [0, -1, -1, 3]
    np.testing.assert_allclose(
        dense(Projection.build(long, short)), [[1, 0], [0, 0], [0, 0], [0, 1]]
    )


def test_trained_tokenizers_project_both_ways():
    a, b = ByteTable.of(byte_level()), ByteTable.of(sentencepiece("bpe"))
    for student, teacher in ((a, b), (b, a)):
        built = Projection.build(Vocabulary(student), Vocabulary(teacher))
        built.check(student, teacher)
        assert (
            np.bincount(built.column, weights=built.weight, minlength=built.num_classes)[
                built.teacher_class
            ]
            > 0
        ).all()
    with pytest.raises(ValueError, match="built for the student tokenizer"):
        built.check(a, b)


def test_what_people_get_wrong():
    one, two = Vocabulary(table_of([b"a", b"b"])), Vocabulary(table_of([b"b"]))
    with pytest.raises(
        ValueError, match="no token begins b'a', the rest of b'a'; want the 256 single bytes"
    ):
        Projection.build(one, two)
    with pytest.raises(ValueError, match="top = 0"):
        Projection.build(one, one, top=0)
    with pytest.raises(ValueError, match="decay = 0"):
        Projection.build(one, one, decay=0)
    with pytest.raises(ValueError, match="without a student id"):
        Projection.build(Vocabulary(table_of([b"a"], controls=0)), Vocabulary(table_of([b"a"])))
