"""Types of the native core (native/module.cpp). Arrays are contiguous and of the exact dtype."""

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]

class Table:
    """What each id spells; a copy of the arrays, laid out for the aligner."""

    def __init__(self, bytes: NDArray[np.uint8], begin: Int64) -> None: ...
    def spell(self, ids: Int32) -> bytes: ...
    def __len__(self) -> int: ...

def mask(ids: Int32, keep: NDArray[np.uint8]) -> Int32: ...
def align_ids(
    table_a: Table,
    ids_a: Int32,
    row_a: Int64,
    trim_a: Int64,
    table_b: Table,
    ids_b: Int32,
    row_b: Int64,
    trim_b: Int64,
    threads: int,
) -> tuple[Int32, Int32, Int64, Int64, Int64, Int64, Int64]:
    """(span_a, span_b, bounds, spans, equal, end_a, end_b) of concatenated rows."""

def align_ends(
    end_a: Int64, row_a: Int64, end_b: Int64, row_b: Int64, threads: int
) -> tuple[Int32, Int32, Int64, Int64, Int64, Int64, Int64]:
    """The same from the byte at which each token ends; equal is 0."""
