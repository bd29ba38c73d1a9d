"""Two vocabularies matched by bytes: the spellings they share, and partitions of both.

A vocabulary partition sends every id of both vocabularies to one of N classes, so that a loss can
compare the two models' class masses (`class_losses.class_kl`). From coarse to fine:

    first_byte   256 first bytes, and one class of stop and control ids. Needs no common spelling
    common       one class per common spelling, one of the stop ids where both sides name some, and
                 the tail bucket: everything else
    prefix       the longest prefix of the piece that is a token on both sides, and one class of
                 stop and control ids; refines first_byte

Bytes are matched, never the piece strings of different families: llama3 and gemma3 have 86,434
spellings in common; their piece strings, with the space marks swapped, give 65,197, of which 186
are wrong.

Control ids are never matched by name (their bytes are b"" here). Stop ids are, as a set: ending is
the same event on both sides. Ids that are not in the softmax have class -1: padding rows of a head,
and tokens of one side for a byte that texts do without and the other side cannot spell (SmolLM2
lacks 21 of the 256). Anything else that the teacher has and the student cannot reach is an error.

V: student ids, W: teacher ids, N: classes, C: common spellings.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import Literal, Protocol

import numpy as np

from .byte_table import TEXT, ByteTable
from .table_files import NEEDED_BYTES

OUT = -1  # class of an id that is not in the softmax
Rule = Callable[[bytes], int]  # the class of a spelling
Kind = Literal["first_byte", "common", "prefix"]
ALL_BYTES = tuple(bytes([b]) for b in range(256))
RARE_BYTES = frozenset(range(256)) - set(NEEDED_BYTES)


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """One model's ids: a byte table, the ids that end a text, and the rows of the model's head."""

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
        """Bytes of every row of the head that has a token; b"" for control and stop ids."""
        pieces = [
            p if k == TEXT else b""
            for p, k in zip(self.table.pieces[: self.num_rows], self.table.kind.tolist())
        ]
        for i in self.stop_ids:
            pieces[i] = b""
        return pieces

    def class_of_rows(self, rule: Rule, control: int, stop: int) -> np.ndarray:
        """int32 [rows]: rule(bytes) of text, `control` of ids without bytes, `stop` of stop ids.

        Padding rows are OUT.
        """
        class_V = np.full(self.num_rows, OUT, np.int32)
        class_V[: len(self.spellings)] = np.fromiter(
            (rule(p) if p else control for p in self.spellings), np.int32, len(self.spellings)
        )
        class_V[list(self.stop_ids)] = stop
        return class_V


@dataclass(frozen=True, eq=False)
class Partition:
    """Both vocabularies in N classes. Every class that has a teacher id has a student id."""

    kind: Kind
    student_class: np.ndarray  # int32 [V], OUT where the id is not in the softmax
    teacher_class: np.ndarray  # int32 [W]
    num_classes: int
    control_class: int  # of control ids and others without bytes; in `common` the tail bucket
    student_fingerprint: str
    teacher_fingerprint: str

    def __post_init__(self) -> None:
        refuse_unreachable(self.kind, self.student_class, self.teacher_class, self.num_classes)

    @cached_property
    def student_only(self) -> int:
        """Number of classes without a teacher id. With any, the reverse KL is infinite."""
        return len(set(self.student_class.tolist()) - set(self.teacher_class.tolist()) - {OUT})

    def check(self, student: ByteTable, teacher: ByteTable) -> None:
        """ValueError unless the partition was built from these two tables."""
        refuse_other_tables(f"Partition ({self.kind})", self, student, teacher)


def first_byte(student: Vocabulary, teacher: Vocabulary) -> Partition:
    """N = 257: the first byte of the piece; class 256 holds stop and control ids."""
    first: Rule = itemgetter(0)
    return _partition("first_byte", student, teacher, first, 257, control=256, stop=256)


def common(student: Vocabulary, teacher: Vocabulary) -> Partition:
    """N = C + 1 or C + 2: the common spellings in byte order, the stop ids, the tail bucket.

    Duplicates of one spelling share its class. The stop ids have a class if both sides name some.
    The tail bucket, the last class, holds control ids and every spelling that is not common.
    """
    class_of_piece = _shared(student, teacher)
    stops = bool(student.stop_ids) and bool(teacher.stop_ids)
    stop, tail = len(class_of_piece), len(class_of_piece) + stops

    def spelling_or_tail(piece: bytes) -> int:
        return class_of_piece.get(piece, tail)

    return _partition(
        "common", student, teacher, spelling_or_tail, tail + 1, control=tail, stop=stop
    )


def prefix(student: Vocabulary, teacher: Vocabulary) -> Partition:
    """One class per common spelling and per single byte, in byte order; last, stop and control ids.

    A piece goes to its longest prefix that is a class. So the partition refines `first_byte` and
    covers every id; in a vocabulary with the 256 single bytes every class has ids.
    """
    spellings = sorted({*_shared(student, teacher), *ALL_BYTES})
    class_of_piece = {piece: k for k, piece in enumerate(spellings)}
    longest, last = max(map(len, spellings)), len(spellings)

    def longest_prefix(piece: bytes) -> int:
        for n in range(min(len(piece), longest), 0, -1):
            if (k := class_of_piece.get(piece[:n])) is not None:
                return k
        raise AssertionError("every single byte is a class")

    return _partition("prefix", student, teacher, longest_prefix, last + 1, control=last, stop=last)


def first_merge(table: ByteTable) -> tuple[bytes, bytes] | None:
    """Two tokens of text, the second beginning with the first; None where no token begins with
    another: bytes, or characters without byte tokens.

    With one, where a token ends depends on what follows it: "un" before "it" may have to be "unit".
    """
    pieces = sorted({p for p, n in zip(table.pieces, table.lens.tolist()) if n})
    # a piece that begins others stands right before one of them
    return next(((a, b) for a, b in zip(pieces, pieces[1:]) if b.startswith(a)), None)


def common_spellings(table_a: ByteTable, table_b: ByteTable) -> int:
    """C: how many byte strings are a text token on both sides."""
    return len(_shared(Vocabulary(table_a), Vocabulary(table_b)))


def common_ids(table_a: ByteTable, table_b: ByteTable) -> np.ndarray:
    """int64 [C, 2] pairs of ids with equal bytes, in byte order, one pair per spelling.

    Of several ids with one spelling the pair has the id that an encoder emits: the ordinary piece
    before SentencePiece's byte token, then the lowest id. Only text ids are paired.
    """
    id_a, id_b = table_a.by_bytes(), table_b.by_bytes()
    return np.array(
        [(id_a[p], id_b[p]) for p in sorted(id_a.keys() & id_b.keys())], np.int64
    ).reshape(-1, 2)


def student_id_of(student: Vocabulary, teacher: Vocabulary) -> np.ndarray:
    """int32 [W]: the student id with the bytes of each teacher id, or OUT; none occurs twice.

    The first stop id of the teacher goes to the first of the student. For `class_losses.map_topk`.
    """
    student_id_W = np.full(teacher.num_rows, OUT, np.int32)
    for t, s in common_ids(teacher.table, student.table):
        in_heads = t < teacher.num_rows and s < student.num_rows
        if in_heads and t not in teacher.stop_ids and s not in student.stop_ids:
            student_id_W[t] = s
    if student.stop_ids and teacher.stop_ids:
        student_id_W[teacher.stop_ids[0]] = student.stop_ids[0]
    return student_id_W


def without_rare_bytes(
    class_V: np.ndarray, other_class_W: np.ndarray, num_classes: int, vocabulary: Vocabulary
) -> np.ndarray:
    """class_V with OUT for ids of a class of this side alone that hold a byte texts do without."""
    alone = _alone(class_V, other_class_W, num_classes)
    spellings, reachable_V = vocabulary.spellings, class_V.copy()
    reachable_V[[i for i in alone if not RARE_BYTES.isdisjoint(spellings[i])]] = OUT
    return reachable_V


def refuse_unreachable(
    kind: str, student_class: np.ndarray, teacher_class: np.ndarray, num_classes: int
) -> None:
    """ValueError for a class with teacher ids and no student id: the KL would be infinite."""
    lost = _alone(teacher_class, student_class, num_classes)
    if len(lost):
        raise ValueError(
            f"vocabulary partition {kind!r}: {len(lost)} teacher ids are in classes without a "
            f"student id, the first is id {lost[0]}; the KL would be infinite. A student without "
            "control ids needs its stop_ids named, and the student needs all bytes that the "
            "teacher can spell. `common` has room for anything the student lacks."
        )


def _alone(class_V: np.ndarray, other_class_W: np.ndarray, num_classes: int) -> np.ndarray:
    """Ids whose class holds none of the other side's."""
    shared_N = np.zeros(num_classes, bool)
    shared_N[other_class_W[other_class_W != OUT]] = True
    return np.flatnonzero((class_V != OUT) & ~shared_N[class_V])


class Fingerprinted(Protocol):
    """What was built from two byte tables and names their fingerprints."""

    @property
    def student_fingerprint(self) -> str: ...
    @property
    def teacher_fingerprint(self) -> str: ...


def refuse_other_tables(
    name: str, built: Fingerprinted, student: ByteTable, teacher: ByteTable
) -> None:
    """ValueError unless `built` was built from these two tables."""
    for side, table, known in (
        ("student", student, built.student_fingerprint),
        ("teacher", teacher, built.teacher_fingerprint),
    ):
        if table.fingerprint() != known:
            raise ValueError(
                f"{name}: built for the {side} tokenizer {known[:12]}, got "
                f"{table.fingerprint()[:12]}. Another vocabulary, added tokens, space prefix or "
                "normaliser: build it again."
            )


def _shared(student: Vocabulary, teacher: Vocabulary) -> dict[bytes, int]:
    """Common spelling -> its rank in byte order."""
    both = set(student.spellings) & set(teacher.spellings) - {b""}
    return {piece: k for k, piece in enumerate(sorted(both))}


def _partition(
    kind: Kind,
    student: Vocabulary,
    teacher: Vocabulary,
    rule: Rule,
    num_classes: int,
    *,
    control: int,
    stop: int,
) -> Partition:
    class_V, class_W = (x.class_of_rows(rule, control, stop) for x in (student, teacher))
    return Partition(
        kind,
        without_rare_bytes(class_V, class_W, num_classes, student),
        without_rare_bytes(class_W, class_V, num_classes, teacher),
        num_classes,
        control,
        student.table.fingerprint(),
        teacher.table.fingerprint(),
    )
