"""Small runs of the tests' talkers, to be checked before they start."""

import pytest
from runs import config

EXACT = {"name": "exact", "options": {"marker": "=>"}}


@pytest.fixture
def calibrate(talkers, tmp_path):
    """over -> a configuration of phase calibrate."""
    base = {"task": EXACT, "calibration": {"mode": "distillable", "max_unaligned": 0.05}}
    return lambda **over: config(talkers, tmp_path / "run", "calibrate", **base | over)


@pytest.fixture
def distill(talkers, tmp_path):
    """over -> a configuration of phase distill."""
    return lambda **over: config(talkers, tmp_path / "run", "distill", **{"task": EXACT} | over)
