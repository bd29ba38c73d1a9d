"""Disks that fill up, at any moment of a run: "no space left" in words; with more space the same
command ends equal to a run that had it from the start.
"""

import random

import pytest
from fault_runs import TRAINED, budget, make_place
from full_disk import grow, small_disk

DISKS = [(phase, i) for i in range(budget(1, 1, 8)) for phase in TRAINED]
LIMITS = [
    (phase, i) for i in range(budget(1, 1, 6)) for phase in ("distill", "evaluate", "diagnose")
]


def refused_in_words(ended, place) -> None:
    assert ended.code == 2, place.story()
    assert "no space left" in ended.output.lower(), place.story()
    assert "Traceback" not in ended.output, place.story()


@pytest.mark.parametrize("phase, i", DISKS, ids=str)
def test_a_disk_that_is_too_small(server, talkers, whole, tmp_path, record_property, phase, i):
    rng = random.Random(f"{phase} {i}")
    clean = whole(phase)
    size = sum(p.stat().st_size for p in clean.place.directory.rglob("*") if p.is_file())
    megabytes = size / 1e6 * rng.uniform(0.1, 0.9)
    record_property("fault", f"{megabytes:.1f} MB in all")
    with small_disk(tmp_path / "disk", megabytes) as disk:
        place = make_place(server, talkers, disk / phase, phase)
        refused_in_words(place.run(), place)
        record_property("steps kept", kept := steps_kept(place))
        again = place.run()
        refused_in_words(again, place)
        assert steps_kept(place) >= kept, "the second try lost a checkpoint"
        grow(disk, 200)
        differences = clean.outcome.differences(place.ends_well())
    assert not differences, differences


NAMED = [(phase, size) for size in (5, 1, 8) for phase in ("distill", "calibrate", "diagnose")]


@pytest.mark.parametrize("phase, megabytes", NAMED[: budget(1, 2, 9)], ids=str)
def test_disks_of_these_sizes(server, talkers, whole, tmp_path, record_property, phase, megabytes):
    """Large enough for some, or for all of what the run writes."""
    steps = {"steps": 12, "checkpoint": {"interval": 1, "keep_latest_k": 2}}
    over = steps if phase in TRAINED else {}
    clean = whole(phase, f"{phase} long", **over)
    record_property("fault", f"{megabytes} MB in all")
    with small_disk(tmp_path / "disk", megabytes) as disk:
        place = make_place(server, talkers, disk / phase, phase, **over)
        if place.run().code:
            refused_in_words(place.ends[-1], place)
            assert str(disk) in place.ends[-1].output, "which disk is full"
        record_property("code", place.ends[-1].code)
        grow(disk, 200)
        differences = clean.outcome.differences(place.ends_well())
    assert not differences, differences


def steps_kept(place) -> int:
    """The newest step with a manifest."""
    done = [p.parent.name for p in place.folder.glob("checkpoint/step-*/manifest.json")]
    return max((int(name.removeprefix("step-")) for name in done), default=0)


@pytest.mark.parametrize("phase, i", LIMITS, ids=str)
def test_a_limit_on_the_size_of_files(server, talkers, whole, tmp_path, record_property, phase, i):
    rng = random.Random(f"limit {phase} {i}")
    clean = whole(phase)
    largest = max(p.stat().st_size for p in clean.place.folder.rglob("*") if p.is_file())
    limit = int(largest * rng.uniform(0.05, 0.95))
    record_property("fault", f"no file above {limit} bytes")
    place = make_place(server, talkers, tmp_path / phase, phase)
    refused_in_words(place.run(largest_file=limit), place)
    differences = clean.outcome.differences(place.ends_well())
    assert not differences, differences
