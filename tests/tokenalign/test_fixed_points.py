"""Does a student that is right stay right? Gradients at the truth, summed over every text of a
Markov source that the teacher knows exactly; merges of 2 and 3 letters on either side.
"""

from functools import cache, partial

import pytest
import torch
from fixed_point_cases import BUILD, PAIRS, FixedPoint
from hypothesis import given
from hypothesis import strategies as st
from vocab_pairs import table_of

from reflux.tokenalign.vocab_map import first_merge

LETTERS = [name for name, (student, _) in PAIRS.items() if student == "a b c"]
MERGING = [name for name in PAIRS if name not in LETTERS]
DIVERGENCES = ("forward", "reverse", "jsd", "skew_forward", "skew_reverse")


@cache
def world(name: str) -> FixedPoint:
    return FixedPoint(*PAIRS[name])


@cache
def short_world(name: str) -> FixedPoint:
    """For descents; a teacher of finite KL."""
    return FixedPoint(*PAIRS[name], longest=3, floor=1e-6)


@pytest.mark.parametrize("partition", ["first_byte", "prefix"])
@pytest.mark.parametrize("name", LETTERS)
def test_forward_with_the_likelihood_inside_spans_is_exact_for_a_student_of_letters(
    name, partition
):
    w = world(name)
    assert w.gradient(partial(w.class_loss, partition=partition)) < 1e-12


@pytest.mark.parametrize("name", PAIRS)
def test_the_likelihood_of_the_teachers_texts_is_exact_for_any_two(name):
    assert world(name).gradient(world(name).nll) < 1e-12


@pytest.mark.parametrize("partition", ["first_byte", "prefix"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("inner", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", ["teacher merges 2", "teacher merges 3"])
def test_no_other_setting_is(name, partition, divergence, inner, temperature):
    """inner = 0 is also the loss on the student's own texts, which are those of the truth here."""
    if (divergence, inner, temperature) == ("forward", 1.0, 1.0):
        return
    w = world(name)
    how = {"divergence": divergence, "inner": inner, "temperature": temperature}
    assert w.gradient(partial(w.class_loss, partition=partition, **how)) > 0.01


@pytest.mark.parametrize("partition", BUILD)
@pytest.mark.parametrize("name", MERGING)
def test_no_partition_is_exact_for_a_student_that_merges(name, partition):
    w = world(name)
    assert w.gradient(partial(w.class_loss, partition=partition)) > 0.05


@pytest.mark.parametrize("partition", ["projection", "uld"])
@pytest.mark.parametrize("name", [n for n in PAIRS if n != "no merge"])
def test_projection_and_uld_are_never_exact(name, partition):
    w = world(name)
    assert w.gradient(partial(w.class_loss, partition=partition)) > 0.01


@pytest.mark.parametrize("name", PAIRS)
def test_spans_are_exact_for_one_vocabulary_alone(name):
    gradient = world(name).gradient(world(name).span_loss)
    assert gradient < 1e-12 if name == "no merge" else gradient > 0.05


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_exact_bytes_are_exact_for_any_two_and_every_setting(name, divergence, temperature):
    """Merges on either side; on the student's own texts, too, which are those of the truth here."""
    w = world(name)
    how = {"divergence": divergence, "temperature": temperature}
    assert w.gradient(partial(w.byte_loss, **how)) < 1e-12


@pytest.mark.parametrize("name", ["teacher merges 2", "student merges 2", "both merge"])
def test_positions_with_mass_left_out_would_bias_and_are_not_compared(name):
    w = world(name)
    assert w.gradient(partial(w.byte_loss, missing=1.0)) > 1e-4


@pytest.mark.parametrize("name", ["teacher merges 2", "student merges 3", "both merge"])
def test_on_the_students_own_texts_exact_bytes_lead_back_to_the_truth(name):
    w = short_world(name)
    g = torch.Generator().manual_seed(0)
    start = w.student.logits(1e-4)
    start = start + torch.randn(start.shape, generator=g, dtype=start.dtype)
    before = w.kl_per_byte(start)
    for divergence in ("forward", "reverse"):
        loss = partial(w.byte_loss, divergence=divergence, missing=1e-2)
        after = w.descend(loss, on_policy=True, steps=300, start=start)
        assert before > 0.1 and w.kl_per_byte(after) < 2e-3


def test_one_vocabulary_is_exact_with_every_setting():
    w = world("no merge")
    for divergence in DIVERGENCES:
        for inner in (0.0, 1.0):
            how = {"divergence": divergence, "inner": inner}
            assert w.gradient(partial(w.class_loss, **how)) < 1e-12


def after_a(w, z) -> float:
    """p(b | a); 0.5 in the source."""
    return float(z[w.student.row[(0,)]].softmax(0)[1])


def test_on_the_students_own_texts_the_class_loss_teaches_never_b():
    """The trap: a boundary behind "a" exists only where no "b" follows."""
    w = short_world("teacher merges 2")
    exact = w.descend(w.class_loss, steps=200)
    assert after_a(w, exact) == pytest.approx(0.5, abs=0.01) and w.kl_per_byte(exact) < 1e-3
    for divergence in ("forward", "reverse"):
        loss = partial(w.class_loss, divergence=divergence, inner=0.0)
        trapped = w.descend(loss, on_policy=True, steps=300)
        assert after_a(w, trapped) < 0.05 and w.kl_per_byte(trapped) > 0.3


@pytest.mark.parametrize(
    "name, low, high", [("teacher merges 2", 0.04, 0.1), ("both merge", 0.06, 0.16)]
)
def test_the_bias_of_spans_is_bounded_and_small_beside_the_likelihood(name, low, high):
    """Nats a byte: no trap, on-policy hardly more than off-policy."""
    w = short_world(name)
    assert low < w.kl_per_byte(w.descend(w.span_loss, steps=300)) < high
    assert low < w.kl_per_byte(w.descend(w.span_loss, on_policy=True, steps=300)) < high
    both = w.descend(lambda z, p: w.span_loss(z, p) + w.nll(z, p), steps=200)
    assert 1e-4 < w.kl_per_byte(both) < 0.01


def test_a_student_that_merges_is_pulled_off_by_the_forward_class_loss():
    w = short_world("student merges 2")
    assert 0.03 < w.kl_per_byte(w.descend(w.class_loss, steps=400)) < 0.12


@given(st.lists(st.text("ab€", min_size=1, max_size=3), max_size=6))
def test_the_first_merge_is_found_iff_a_token_begins_with_another(pieces):
    raw = [p.encode() for p in pieces]
    got = first_merge(table_of(raw))
    assert (got is not None) == any(x != y and y.startswith(x) for x in raw for y in raw)
    assert got is None or got[0] != got[1] and got[1].startswith(got[0]) and set(got) <= set(raw)


def test_a_student_that_merges_is_one_whose_tokens_begin_with_others():
    for name, (student, _) in PAIRS.items():
        assert (first_merge(world(name).student.table) is None) == (name in LETTERS), student
