"""Two vocabularies matched by bytes: the spellings they share, and maps of both onto one set of
classes.

Never by strings of different families: llama3 and gemma3 have 86,434 spellings in common, and
matching their piece strings (with the space marks swapped) finds 65,197 of which 186 are wrong. A
class map sends every id of both vocabularies to one of N classes, so that a loss can compare the
two models' class masses (`class_losses.class_kl`). From coarse to fine:

    first_byte   256 first bytes, and one class of stop and control ids. Needs no common spelling
    common       one class per common spelling, one of the stop ids where they are known, and OTHER
    prefix       the longest prefix of the piece that is a token on both sides, and one class of
                 stop and control ids; refines first_byte

Control ids are never matched by name (their bytes are b"" here); stop ids are, as a set: ending is
the same event on both sides. Ids beyond the table, rows of a padded head, have class -1: they are
not in the softmax. Nor are tokens of one side for a byte that texts do without and the other side
cannot write (SmolLM2 lacks 21 of the 256). Anything else that the teacher has and the student
cannot reach is an error.

V: student ids, W: teacher ids, N: classes, C: common spellings.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from .byte_table import TEXT, ByteTable
from .table_files import NEEDED_BYTES

OUT = -1  # class of an id that is not in the softmax
ALL_BYTES = tuple(bytes([b]) for b in range(256))
RARE_BYTES = frozenset(range(256)) - set(NEEDED_BYTES)


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """One side of a map: a byte table, the ids that end a text, and how many rows the model's head
    has.
    """

    table: ByteTable
    stop_ids: Sequence[int] = ()
    # None: as many as the table has ids. More: padding. Fewer: the last ids have no logit
    rows: int | None = None

    def __post_init__(self) -> None:
        wrong = [i for i in self.stop_ids if not 0 <= i < min(len(self.table), self.num_rows)]
        if wrong or self.num_rows < 1:
            raise ValueError(
                f"Vocabulary: stop_ids {wrong} with a table of {len(self.table)} ids and "
                f"{self.num_rows} rows; want ids of this tokenizer. Are they another tokenizer's?"
            )

    @property
    def num_rows(self) -> int:
        return len(self.table) if self.rows is None else self.rows

    @cached_property
    def spellings(self) -> list[bytes]:
        """Bytes of every row of the head that has a token; b"" where the id is no text or ends
        it.
        """
        pieces = [
            p if k == TEXT else b""
            for p, k in zip(self.table.pieces[: self.num_rows], self.table.kind.tolist())
        ]
        for i in self.stop_ids:
            pieces[i] = b""
        return pieces

    def classes(self, rule: Callable[[bytes], int], silent: int, stop: int) -> np.ndarray:
        """int32 [rows]: rule(bytes) for text, `silent` for an id without bytes, `stop` for a stop
        id, OUT for padding.
        """
        found = np.full(self.num_rows, OUT, np.int32)
        found[: len(self.spellings)] = np.fromiter(
            (rule(p) if p else silent for p in self.spellings), np.int32, len(self.spellings)
        )
        found[list(self.stop_ids)] = stop
        return found


@dataclass(frozen=True, eq=False)
class ClassMap:
    """Ids of two vocabularies -> one set of classes. Every class that has a teacher id has a
    student id.
    """

    kind: Literal["first_byte", "common", "prefix"]
    student_class: np.ndarray  # int32 [V], OUT where the id is not in the softmax
    teacher_class: np.ndarray  # int32 [W]
    num_classes: int
    # class of control ids and others without bytes; in `common` also of all that is not common:
    # OTHER
    silent: int
    student_fingerprint: str
    teacher_fingerprint: str

    def __post_init__(self) -> None:
        refuse_unreachable(self.kind, self.student_class, self.teacher_class, self.num_classes)

    @cached_property
    def student_only(self) -> int:
        """Classes that no teacher id is in: where there are some, the reverse KL of a student that
        uses them is infinite.
        """
        return len(set(self.student_class.tolist()) - set(self.teacher_class.tolist()) - {OUT})

    def check(self, student: ByteTable, teacher: ByteTable) -> None:
        """ValueError unless the map was built from these two tables."""
        refuse_other_tables(f"ClassMap ({self.kind})", self, student, teacher)


def first_byte(student: Vocabulary, teacher: Vocabulary) -> ClassMap:
    """N = 257: the first byte of the piece; class 256 holds stop and control ids."""
    first = lambda piece: piece[0]
    return _class_map("first_byte", student, teacher, first, 257, silent=256, stop=256)


def common(student: Vocabulary, teacher: Vocabulary) -> ClassMap:
    """One class per common spelling in byte order (duplicates of one spelling share it), then STOP
    if both sides name stop ids, and OTHER, the last.
    """
    both = _shared(student, teacher)
    stops = bool(student.stop_ids) and bool(teacher.stop_ids)
    other = len(both) + stops
    return _class_map(
        "common",
        student,
        teacher,
        lambda piece: both.get(piece, other),
        other + 1,
        silent=other,
        stop=len(both) if stops else other,
    )


def prefix(student: Vocabulary, teacher: Vocabulary) -> ClassMap:
    """One class per common spelling and per single byte, in byte order; the last holds stop and
    control ids.

    A piece goes to its longest prefix that both sides have as a token, or to its first byte if
    there is none. So the map refines `first_byte` and covers every id; in a vocabulary with the 256
    single bytes every class has ids.
    """
    found = {piece: k for k, piece in enumerate(sorted({*_shared(student, teacher), *ALL_BYTES}))}
    longest = max(map(len, found))

    def longest_prefix(piece: bytes) -> int:
        for n in range(min(len(piece), longest), 0, -1):
            if (k := found.get(piece[:n])) is not None:
                return k
        raise AssertionError("every single byte is a class")

    return _class_map(
        "prefix",
        student,
        teacher,
        longest_prefix,
        len(found) + 1,
        silent=len(found),
        stop=len(found),
    )


def common_spellings(table_a: ByteTable, table_b: ByteTable) -> int:
    """C: how many byte strings are a text token on both sides."""
    return len(_shared(Vocabulary(table_a), Vocabulary(table_b)))


def common_ids(table_a: ByteTable, table_b: ByteTable) -> np.ndarray:
    """int64 [C, 2] pairs of ids with equal bytes, in byte order, one pair per spelling.

    Of several ids with one spelling the pair has the ordinary piece, not SentencePiece's byte
    token, then the lowest id: the id that an encoder emits. Control, unknown and unused ids are in
    no pair.
    """
    id_a, id_b = table_a.by_bytes(), table_b.by_bytes()
    return np.array(
        [(id_a[p], id_b[p]) for p in sorted(id_a.keys() & id_b.keys())], np.int64
    ).reshape(-1, 2)


def student_id_of(student: Vocabulary, teacher: Vocabulary) -> np.ndarray:
    """int32 [W]: for each row of the teacher's head the student id of equal bytes, or OUT. No
    student id occurs twice.

    The first stop id of the teacher goes to the first of the student. Use it with
    `class_losses.map_topk`.
    """
    found = np.full(teacher.num_rows, OUT, np.int32)
    for t, s in common_ids(teacher.table, student.table):
        if (
            t < teacher.num_rows
            and s < student.num_rows
            and t not in teacher.stop_ids
            and s not in student.stop_ids
        ):
            found[t] = s
    if student.stop_ids and teacher.stop_ids:
        found[teacher.stop_ids[0]] = student.stop_ids[0]
    return found


def without_rare_bytes(
    class_of_id: np.ndarray, others: np.ndarray, num_classes: int, vocabulary: Vocabulary
) -> np.ndarray:
    """class_of_id with OUT for ids of a class that only this side has, because they hold a byte
    that texts do without.
    """
    alone = _alone(class_of_id, others, num_classes)
    kept = class_of_id.copy()
    kept[[i for i in alone if not RARE_BYTES.isdisjoint(vocabulary.spellings[i])]] = OUT
    return kept


def refuse_unreachable(
    kind: str, student_class: np.ndarray, teacher_class: np.ndarray, num_classes: int
) -> None:
    """ValueError if a class holds a teacher id and no student id: the KL would be infinite whatever
    the student learns.
    """
    lost = _alone(teacher_class, student_class, num_classes)
    if len(lost):
        raise ValueError(
            f"vocabulary map {kind!r}: {len(lost)} teacher ids are in classes without a student "
            f"id, the first is id {lost[0]}; the KL would be infinite. A student without control "
            "ids needs its stop_ids named, and a map needs all bytes that the teacher can write. "
            "`common` has room for anything the student lacks."
        )


def _alone(class_of_id: np.ndarray, others: np.ndarray, num_classes: int) -> np.ndarray:
    """Ids whose class holds none of the other side's."""
    shared = np.zeros(num_classes, bool)
    shared[others[others != OUT]] = True
    return np.flatnonzero((class_of_id != OUT) & ~shared[class_of_id])


def refuse_other_tables(name: str, built, student: ByteTable, teacher: ByteTable) -> None:
    for side, table, known in (
        ("student", student, built.student_fingerprint),
        ("teacher", teacher, built.teacher_fingerprint),
    ):
        if table.fingerprint() != known:
            raise ValueError(
                f"{name}: built for the {side} tokenizer {known[:12]}, got "
                f"{table.fingerprint()[:12]}. Another vocabulary, added tokens, space prefix or "
                "normaliser: build the map again."
            )


def _shared(student: Vocabulary, teacher: Vocabulary) -> dict[bytes, int]:
    """Common spelling -> its rank in byte order."""
    both = set(student.spellings) & set(teacher.spellings) - {b""}
    return {piece: k for k, piece in enumerate(sorted(both))}


def _class_map(
    kind,
    student: Vocabulary,
    teacher: Vocabulary,
    rule,
    num_classes: int,
    *,
    silent: int,
    stop: int,
) -> ClassMap:
    of_student, of_teacher = (
        student.classes(rule, silent, stop),
        teacher.classes(rule, silent, stop),
    )
    return ClassMap(
        kind,
        without_rare_bytes(of_student, of_teacher, num_classes, student),
        without_rare_bytes(of_teacher, of_student, num_classes, teacher),
        num_classes,
        silent,
        student.table.fingerprint(),
        teacher.table.fingerprint(),
    )
