"""How often does a class occur as a token? Ranked over all texts of a diagnosis, so that the bands
are the same for every text.

    top 10, 11-100, 101-1000    ids by number of occurrences, the most frequent first; of equally
                                frequent ones the smaller id
    rest seen, never seen       all others that occur, and the rest of the vocabulary
"""

from collections.abc import Iterable

import numpy as np

BANDS = ("top 10", "11-100", "101-1000", "rest seen", "never seen")
ENDS = (10, 100, 1000)  # rank at which a band ends


def count_ids(texts: Iterable[Iterable[int]], vocab_size: int) -> np.ndarray:
    """int64 [V] occurrences of every id. Counts of parts of the texts add up."""
    count_V = np.zeros(vocab_size, np.int64)
    for ids in texts:
        count_V += np.bincount(np.fromiter(ids, np.int64), minlength=vocab_size)
    return count_V


def frequency_bands(count_V: np.ndarray) -> np.ndarray:
    """int8 [V], an index into BANDS for every id, from its occurrences."""
    order = np.argsort(-count_V, kind="stable")
    band_V = np.full(len(count_V), BANDS.index("never seen"), np.int8)
    band_V[order] = np.searchsorted(ENDS, np.arange(len(count_V)), side="right")
    band_V[count_V == 0] = BANDS.index("never seen")
    return band_V
