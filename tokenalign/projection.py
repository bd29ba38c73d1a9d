"""A sparse linear map of the student's distribution onto the teacher's vocabulary, as in X-Token
(arXiv 2605.21699): a baseline.

    p_hat_c = sum_i W_ic p_i, every row of W sums to one
    loss: a divergence of q and p_hat (`class_losses.class_kl`)

W by bytes. A spelling that both sides have goes to itself. Others are spelled with the longest
prefix first:

    forward    a student piece is spelled with teacher pieces, piece j with weight decay^j:
               " unhappy" = " un" 1, "happy" 0.1
    backward   a teacher piece is spelled with student pieces, and each of those gets decay^j of it

and rows are normalised. Without the backward pass most teacher pieces that the student lacks get no
student mass and the KL is infinite (41,818 of 151,655 Qwen3 columns for a Llama-3 student); W is
checked for that when it is built. With it a common spelling is no longer one-hot: it lends mass to
the longer teacher pieces that begin with it.

W is fixed, so agreement (p_hat = q) is in general out of reach, and the minimum of the loss is not
the teacher's distribution over texts. `vocab_map.prefix` compares the same information without
invented weights.

Columns are teacher spellings (duplicates share one) and, last, one column of stop and control ids
of both sides. V: student ids, W: teacher ids, N: columns, M: non-zeros.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from .byte_table import ByteTable
from .vocab_map import (
    RARE_BYTES,
    Vocabulary,
    refuse_other_tables,
    refuse_unreachable,
    without_rare_bytes,
)


@dataclass(frozen=True, eq=False)
class Projection:
    """W as coordinates, and the column of every teacher id."""

    student_id: np.ndarray  # int32 [M], rising
    column: np.ndarray  # int32 [M]
    weight: np.ndarray  # float64 [M], > 0; those of one student id sum to one
    teacher_class: np.ndarray  # int32 [W], the column of each teacher id; OUT: not in the softmax
    num_classes: int  # N; the last is stop and control
    student_rows: int  # V
    student_fingerprint: str
    teacher_fingerprint: str

    @classmethod
    def build(
        cls, student: Vocabulary, teacher: Vocabulary, *, top: int = 4, decay: float = 0.1
    ) -> "Projection":
        """W from the bytes of both tables. The first `top` pieces of a spelling count, piece j with
        weight decay^j.

        Padding rows of either head are in no row and no column, nor are pieces that cannot be
        spelled for a byte that texts do without. ValueError: a byte that one side has no token for,
        a column without student mass, top < 1, decay outside (0, 1].
        """
        if top < 1 or not 0 < decay <= 1:
            raise ValueError(
                f"Projection: top = {top}, decay = {decay}; want top >= 1 and 0 < decay <= 1."
            )
        words_s, words_t = _rank_of_spelling(student), _rank_of_spelling(teacher)
        control_row, control_column = len(words_s), len(words_t)
        row, column, weight = _cells(words_s, words_t, decay ** np.arange(top))
        row, column = np.append(row, control_row), np.append(column, control_column)
        row_V = student.class_of_rows(words_s.__getitem__, control_row, control_row)
        ids, column, weight = _cells_of_ids(row_V, row, column, np.append(weight, 1.0))
        teacher_class = without_rare_bytes(
            teacher.class_of_rows(words_t.__getitem__, control_column, control_column),
            column,
            control_column + 1,
            teacher,
        )
        refuse_unreachable("projection", column, teacher_class, control_column + 1)
        return cls(
            ids,
            column,
            weight,
            teacher_class,
            control_column + 1,
            student.num_rows,
            student.table.fingerprint(),
            teacher.table.fingerprint(),
        )

    def check(self, student: ByteTable, teacher: ByteTable) -> None:
        """ValueError unless W was built from these two tables."""
        refuse_other_tables("Projection", self, student, teacher)


def spell_with(piece: bytes, words: dict[bytes, int], longest: int, most: int) -> list[int]:
    """At most `most` words covering `piece` from the left, each the longest that fits.

    When none does: nothing if a byte is one that texts do without, else ValueError.
    """
    spelled: list[int] = []
    at = 0
    while at < len(piece) and len(spelled) < most:
        for end in range(min(len(piece), at + longest), at, -1):
            word = words.get(piece[at:end])
            if word is not None:
                spelled.append(word)
                at = end
                break
        else:
            if not RARE_BYTES.isdisjoint(piece):
                return []
            raise ValueError(
                f"Projection: no token begins {piece[at:]!r}, the rest of {piece!r}; want the 256 "
                "single bytes on both sides. Use the partition `common`: it need not spell what is "
                "not common."
            )
    return spelled


def _rank_of_spelling(vocabulary: Vocabulary) -> dict[bytes, int]:
    """Every spelling once -> its rank in the order of ids."""
    words = dict.fromkeys(p for p in vocabulary.spellings if p)
    return {piece: k for k, piece in enumerate(words)}


def _cells(
    words_s: dict[bytes, int], words_t: dict[bytes, int], decay: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """W over spellings as (row, column, weight), sorted by row, rows summing to one."""
    fractions = [(decay[:n] / decay[:n].sum()).tolist() for n in range(len(decay) + 1)]
    cells: defaultdict[tuple[int, int], float] = defaultdict(float)
    longest = max(map(len, words_t), default=0)
    for piece, i in words_s.items():
        same = words_t.get(piece)
        spelled = [same] if same is not None else spell_with(piece, words_t, longest, len(decay))
        for t, fraction in zip(spelled, fractions[len(spelled)]):
            cells[i, t] += fraction
    longest = max(map(len, words_s), default=0)
    for piece, t in words_t.items():
        if piece not in words_s:
            spelled = spell_with(piece, words_s, longest, len(decay))
            for i, fraction in zip(spelled, fractions[len(spelled)]):
                cells[i, t] += fraction
    index = np.array(list(cells), np.int64).reshape(-1, 2)
    weight = np.fromiter(cells.values(), np.float64, len(cells))
    order = np.lexsort((index[:, 1], index[:, 0]))
    row, column, weight = index[order, 0], index[order, 1], weight[order]
    return row, column, weight / np.bincount(row, weights=weight)[row]


def _cells_of_ids(
    row_V: np.ndarray, row: np.ndarray, column: np.ndarray, weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(id, column, weight) of every cell: each id takes those of its row, none if that is OUT.

    `row` is sorted.
    """
    ids = np.flatnonzero(row_V >= 0)
    begin = np.searchsorted(row, np.arange(row[-1] + 2))
    rows = row_V[ids]
    count = begin[rows + 1] - begin[rows]
    first = np.cumsum(count) - count
    cell = np.repeat(begin[rows] - first, count) + np.arange(count.sum())
    return np.repeat(ids, count).astype(np.int32), column[cell].astype(np.int32), weight[cell]
