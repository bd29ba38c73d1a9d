"""Sums and counts: their quotient is the mean however the entries came."""

import numpy as np

from reflux.trainer.engine.metrics import MetricSums


def test_sums_and_counts():
    t = MetricSums()
    t.add("a", [1, 2.0, True])
    t.add("a", 4)
    t.add("b", np.array([1.0, 3.0], np.float32))
    for scalar in (2, 2.0, np.float32(2), np.int64(2), np.float64(2)):
        t.add("c", scalar)
    t.add("none", [])
    assert t.sums == {"a": [8.0, 4.0], "b": [4.0, 2.0], "c": [10.0, 5.0], "none": [0.0, 0.0]}
