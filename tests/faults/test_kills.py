"""SIGKILL at random moments: the same command again ends equal to a run that nothing disturbed, in
every loss and every byte that it leaves.
"""

import random

import pytest
from fault_runs import PHASES, budget, draw_kill, make_place

KILLS = [(phase, i) for i in range(budget(1, 4, 20)) for phase in PHASES]


@pytest.mark.parametrize("phase, i", KILLS, ids=lambda v: str(v))
def test_a_killed_run_ends_as_if_nothing_had_happened(
    server, talkers, whole, tmp_path, record_property, phase, i
):
    rng = random.Random(f"{phase} {i}")
    clean = whole(phase)
    place = make_place(server, talkers, tmp_path / phase, phase)
    kills = [draw_kill(rng, clean) for _ in range(rng.choice((1, 1, 2)))]
    record_property("fault", "SIGKILL")
    record_property("seed", f"{phase} {i}")
    record_property("kills", kills)
    codes = [place.run(**kill).code for kill in kills]
    record_property("codes", codes)
    assert set(codes) <= {-9, place.code}, place.story()
    differences = clean.outcome.differences(place.ends_well())
    assert not differences, differences


@pytest.mark.parametrize("phase", PHASES)
def test_two_undisturbed_runs_are_equal(server, talkers, whole, tmp_path, phase):
    """What the others compare with is no accident, and what they compare is not empty."""
    clean, place = whole(phase), make_place(server, talkers, tmp_path / phase, phase)
    again = place.ends_well()
    differences = clean.outcome.differences(again)
    assert not differences, differences
    assert again.files and (again.steps or again.results)
    other = make_place(server, talkers, tmp_path / "other" / phase, phase)
    assert clean.outcome.differences(other.ends_well("seed=1")), "nothing depends on the seed"
