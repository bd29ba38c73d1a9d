"""Partitions against brute force on drawn vocabularies, and on trained tokenizers."""

import numpy as np
import pytest
from hypothesis import given
from tokenizer_fixtures import byte_level, sentencepiece
from vocab_pairs import pairs, table_of

from reflux.tokenalign.byte_table import CONTROL, TEXT, UNKNOWN, UNUSED, ByteTable
from reflux.tokenalign.vocab_map import (
    OUT,
    Partition,
    Vocabulary,
    common,
    common_ids,
    common_spellings,
    first_byte,
    prefix,
    student_id_of,
)


def text_ids(v):
    return [i for i in range(len(v.table)) if v.table.kind[i] == TEXT]


@given(pairs)
def test_first_byte_is_the_first_byte(pair):
    partition = first_byte(*pair)
    for v, class_V in zip(pair, (partition.student_class, partition.teacher_class), strict=True):
        for i in text_ids(v):
            assert class_V[i] == v.table.pieces[i][0]
        control = [i for i in range(len(v.table)) if v.table.kind[i] == CONTROL]
        assert (
            set(class_V[control]) == {256}
            and set(class_V[len(v.table) :]) <= {OUT}
            and len(class_V) == v.num_rows
        )
    assert partition.num_classes == 257


@given(pairs)
def test_ids_share_a_common_class_exactly_when_their_bytes_are_equal(pair):
    partition = common(*pair)
    shared = {v.table.pieces[i] for v in pair[:1] for i in text_ids(v)} & {
        pair[1].table.pieces[i] for i in text_ids(pair[1])
    }
    assert (
        partition.num_classes
        == len(shared) + 2
        == common_spellings(pair[0].table, pair[1].table) + 2
    )
    spelled = {}
    for v, class_V in zip(pair, (partition.student_class, partition.teacher_class), strict=True):
        for i in text_ids(v):
            piece = v.table.pieces[i]
            assert (class_V[i] == partition.control_class) == (piece not in shared)
            if piece in shared:
                assert spelled.setdefault(piece, class_V[i]) == class_V[i]
        assert (
            class_V[v.stop_ids[0]] == len(shared)
            and class_V[v.stop_ids[0] + 1] == partition.control_class
        )
    assert len(set(spelled.values())) == len(shared)


@given(pairs)
def test_prefix_is_the_longest_common_prefix_and_refines_first_byte(pair):
    partition, coarse = prefix(*pair), first_byte(*pair)
    shared = {pair[0].table.pieces[i] for i in text_ids(pair[0])} & {
        pair[1].table.pieces[i] for i in text_ids(pair[1])
    }
    of_piece, byte_of_class = {}, {}
    for v, class_V, byte_V in zip(
        pair,
        (partition.student_class, partition.teacher_class),
        (coarse.student_class, coarse.teacher_class),
        strict=True,
    ):
        for i in text_ids(v):
            longest = max((p for p in shared if v.table.pieces[i].startswith(p)), key=len)
            assert of_piece.setdefault(longest, class_V[i]) == class_V[i]
        for c, b in zip(class_V, byte_V, strict=True):
            assert byte_of_class.setdefault(c, b) == b
    assert len(set(of_piece.values())) == len(of_piece)
    used = set(partition.student_class) | set(partition.teacher_class)
    assert used - {OUT} <= set(of_piece.values()) | {partition.control_class}


@pytest.mark.parametrize("rule", [first_byte, common, prefix])
@given(pair=pairs)
def test_every_class_of_the_teacher_has_a_student_id(rule, pair):
    partition = rule(*pair)
    assert set(partition.teacher_class) - {OUT} <= set(partition.student_class)
    assert partition.student_only == len(
        set(partition.student_class) - set(partition.teacher_class) - {OUT}
    )


@given(pairs)
def test_common_ids_pair_each_spelling_once(pair):
    a, b = pair[0].table, pair[1].table
    ids = common_ids(a, b)
    assert all(a.pieces[i] == b.pieces[j] and a.kind[i] == b.kind[j] == TEXT for i, j in ids)
    assert len({a.pieces[i] for i, _ in ids}) == len(ids) == common_spellings(a, b)
    assert np.array_equal(common_ids(b, a)[:, ::-1], ids)
    back = student_id_of(*pair)
    assert {(s, t) for t, s in enumerate(back) if s != OUT} == {(i, j) for i, j in ids} | {
        (pair[0].stop_ids[0], pair[1].stop_ids[0])
    }


def test_bytes_and_not_characters():
    """`©` as a piece of byte-level BPE is byte A9, in SentencePiece C2 A9."""
    level, piece = byte_level(), sentencepiece("bpe")
    a, b = ByteTable.of(level), ByteTable.of(piece)
    half = level.token_to_id("©")
    assert a.pieces[half] == b"\xa9"
    whole = piece.piece_to_id("©")
    assert b.pieces[whole] in (b"", b"\xc2\xa9")
    assert [half, whole] not in common_ids(a, b).tolist()
    (partner,) = [j for i, j in common_ids(a, b) if i == half]
    assert piece.id_to_piece(int(partner)) == "<0xA9>"


def test_a_piece_is_preferred_to_its_byte_token():
    processor = sentencepiece("bpe")
    table, other = ByteTable.of(processor), ByteTable.of(byte_level())
    twice = [
        i
        for i in range(len(table))
        if processor.is_byte(i) and table.pieces.count(table.pieces[i]) > 1
    ]
    assert twice, "this vocabulary has no duplicate spellings: the test is blind"
    assert not set(twice) & set(common_ids(table, other)[:, 0].tolist())
    assert not set(twice) & set(common_ids(other, table)[:, 1].tolist())
    both = common(Vocabulary(table), Vocabulary(other))
    for i in twice:  # but in a partition both spellings are one event
        assert (
            both.student_class[i]
            == both.student_class[table.pieces.index(table.pieces[i])]
            != both.control_class
        )


def test_a_byte_that_texts_do_without_may_be_missing():
    """SmolLM2 has no token for 21 bytes that Qwen has: those are left out, not refused."""
    student = Vocabulary(table_of([b"a"]))
    teacher = Vocabulary(table_of([b"a", b"\xff", b"\xff\xfe"]))
    for rule, teacher_class in (
        (first_byte, [97, OUT, OUT, 256]),
        (prefix, [97, OUT, OUT, 256]),
        (common, [0, 1, 1, 1]),
    ):
        assert rule(student, teacher).teacher_class.tolist() == teacher_class
    back = first_byte(teacher, student)
    assert back.student_class.tolist() == [97, OUT, OUT, 256] and back.student_only == 0


def test_control_ids_match_by_role_and_never_by_name():
    a = Vocabulary(table_of([b"a", b"<0>"], controls=2))  # the text "<0>" is an ordinary piece here
    b = Vocabulary(table_of([b"a"], controls=2))
    assert common_ids(a.table, b.table).tolist() == [[0, 0]]
    named = common(Vocabulary(a.table, (2, 3)), Vocabulary(b.table, (2,)))
    assert named.student_class.tolist() == [0, 2, 1, 1] and named.teacher_class.tolist() == [
        0,
        2,
        1,
    ]


def test_a_stop_token_that_is_listed_as_text_still_stops():
    table = table_of([b"a", b"<|im_end|>"], controls=1)
    partition = common(Vocabulary(table, (1,)), Vocabulary(table, (1,)))
    assert partition.student_class.tolist() == [0, 1, 2] and partition.num_classes == 3
    assert prefix(Vocabulary(table, (1,)), Vocabulary(table, (1,))).student_class.tolist() == [
        ord("a"),
        256,
        256,
    ]


def test_a_stop_set_on_one_side_only_is_no_class():
    a, b = table_of([b"a"], controls=2), table_of([b"a"], controls=1)
    partition = common(Vocabulary(a, (1,)), Vocabulary(b))
    assert (
        partition.num_classes == 2
        and partition.student_class.tolist() == [0, 1, 1]
        and partition.teacher_class.tolist() == [0, 1]
    )


def test_mapped_ids_leave_out_stop_text_and_ids_without_a_row():
    """The teacher's stop token is text; the student has its letters as an ordinary token."""
    student, teacher = table_of([b"a", b"<|im_end|>", b"b"]), table_of([b"<|im_end|>", b"b", b"a"])
    assert student_id_of(Vocabulary(student, (3,)), Vocabulary(teacher, (0,))).tolist() == [
        3,
        2,
        0,
        OUT,
    ]
    assert student_id_of(Vocabulary(student, (1,)), Vocabulary(teacher, (3,))).tolist() == [
        OUT,
        2,
        0,
        1,
    ]
    assert student_id_of(Vocabulary(student, rows=2), Vocabulary(teacher, rows=2)).tolist() == [
        1,
        OUT,
    ]


def test_unknown_and_unused_ids_are_control_ids_and_in_the_softmax():
    kind = np.array([TEXT, UNKNOWN, UNUSED, CONTROL], np.int8)
    v = Vocabulary(ByteTable((b"a", b"", b"", b"</s>"), kind, "sentencepiece"))
    assert first_byte(v, v).student_class.tolist() == [ord("a"), 256, 256, 256]


def test_a_head_smaller_than_the_table_loses_the_last_ids():
    v = Vocabulary(table_of([b"a", b"b", b"c"], controls=1), rows=2)
    assert first_byte(v, v).student_class.tolist() == [97, 98]
    assert common(v, v).num_classes == 3  # a, b and an empty tail bucket


@pytest.mark.parametrize("rule", [first_byte, prefix])
def test_a_class_out_of_the_students_reach_is_refused(rule):
    student, teacher = Vocabulary(table_of([b"a"])), Vocabulary(table_of([b"a", b"b"]))
    with pytest.raises(
        ValueError, match="1 teacher ids are in classes without a student id, the first is id 1"
    ):
        rule(student, teacher)
    assert rule(teacher, student).student_only == 1
    assert common(student, teacher).num_classes == 2


def test_another_tokenizer_is_refused():
    a, b, c = table_of([b"a"]), table_of([b"a", b"b"]), table_of([b"b", b"a"])
    built = common(Vocabulary(b), Vocabulary(a))
    built.check(b, a)
    with pytest.raises(ValueError, match="built for the student tokenizer"):
        built.check(c, a)
    with pytest.raises(ValueError, match="built for the teacher tokenizer"):
        built.check(b, c)


def test_what_people_get_wrong():
    with pytest.raises(ValueError, match=r"stop_ids \[7\] with a table of 2 ids and 2 rows"):
        Vocabulary(table_of([b"a"]), (7,))
    with pytest.raises(ValueError, match="0 rows"):
        Vocabulary(table_of([b"a"]), rows=0)
    with pytest.raises(ValueError, match="'common'"):
        Partition("common", np.array([0], np.int32), np.array([1], np.int32), 2, 1, "", "")
