from reflux.trainer.runs.stats import over_seeds
from reflux.trainer.studies.results import Change, RunRow


def test_a_run_row_is_flat():
    labels = {"role": "student", "seed": "0"}
    row = RunRow(labels, {"sampled": 0.5}, reference_kl=None, seconds=2.0)
    assert row.flat() == labels | {"sampled": 0.5, "reference_kl": None, "seconds": 2.0}


def test_a_change_is_that_of_the_last_or_the_best_checkpoint():
    sampled, greedy, best = (over_seeds([x]) for x in (0.1, 0.2, 0.3))
    change = Change(sampled, greedy, best)
    assert change.at("last") == sampled and change.at("best") == best
