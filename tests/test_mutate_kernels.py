"""The faults that mutate_kernels.py seeds still fit the kernels: each applies once and parses."""

import ast
from pathlib import Path

import pytest
from kernel_faults import BY_HAND, EQUIVALENT, GATE, TESTS
from mutate_kernels import Mutant, by_hand, by_rule

KERNELS = {p.stem: p for p in (Path(__file__).parents[1] / "kernels").glob("*.py")}


def test_the_lists_name_files_and_tests_that_exist():
    assert {fault[0] for fault in BY_HAND} | {key[0] for key in EQUIVALENT} <= set(KERNELS)
    # _aot: no arithmetic of ours; its tests build a library
    assert set(KERNELS) - set(TESTS) == {"_aot", "_triton"}
    named = " ".join(TESTS.values()).split() + [t for *_, t in BY_HAND if t not in (None, GATE)]
    tests = {p.stem for p in (Path(__file__).parent / "kernels").glob("test_*.py")}
    assert {f"test_{name}" for name in named} <= tests


@pytest.mark.parametrize("file", sorted(KERNELS))
def test_every_fault_applies_once_and_leaves_python(file):
    source = KERNELS[file].read_bytes()
    for mutant in [*by_hand(file), *by_rule(file)]:
        assert source[mutant.start : mutant.end].decode() == mutant.old != mutant.new, mutant
        ast.parse(source[: mutant.start] + mutant.new.encode() + source[mutant.end :])


def test_as_many_faults_apply_as_are_declared():
    assert sum(len(by_hand(file)) for file in KERNELS) == len(BY_HAND)


@pytest.mark.parametrize("file, line, old, new", EQUIVALENT)
def test_an_equivalent_fault_can_still_be_drawn(file, line, old, new):
    drawn: list[Mutant] = [*by_hand(file), *by_rule(file)]
    assert (file, line, old, new) in {mutant.key for mutant in drawn}


def test_a_fault_that_no_longer_fits_is_an_error(monkeypatch):
    monkeypatch.setattr("mutate_kernels.BY_HAND", [("span_sum", "no such text", "", None)])
    with pytest.raises(ValueError, match="0 times in kernels/span_sum.py"):
        by_hand("span_sum")
