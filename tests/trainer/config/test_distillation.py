"""[distill] across tokenizers: what is refused is what has a biased fixed point, by enumeration."""

from functools import cache, partial
from itertools import product

import pytest
from fixed_point_cases import PAIRS, FixedPoint

from reflux.trainer.config.distillation import (
    OF_OFF_POLICY_TEXTS,
    OF_TEACHER_TEXTS,
    DistillSection,
    exact_settings,
)
from reflux.trainer.config.roles import distill_advice
from reflux.trainer.config.schema import Config

EXACT = {"objective": "class", "on_policy": 0.0, "divergence": "forward"}


@cache
def biased(partition, divergence, inner, temperature) -> bool:
    """Of a student of letters, in the world of one of the teachers at least."""
    how = {"divergence": divergence, "inner": inner, "temperature": temperature}
    worlds = (FixedPoint(*PAIRS[f"teacher merges {k}"], longest=3) for k in (2, 3))
    return any(w.gradient(partial(w.class_loss, partition=partition, **how)) > 1e-9 for w in worlds)


@pytest.mark.parametrize(
    "partition, divergence, on_policy, inner, temperature",
    product(
        ("prefix", "first_byte", "uld", "projection"),
        ("forward", "reverse", "jsd", "skew_forward", "skew_reverse"),
        (0.0, 0.5, 1.0),
        (0.0, 1.0, 2.0),
        (1.0, 2.0),
    ),
)
def test_class_is_refused_exactly_where_its_fixed_point_is_biased(
    partition, divergence, on_policy, inner, temperature
):
    """On the student's own texts there is no likelihood, so any part of them counts as inner 0."""
    options = {
        "objective": "class",
        "partition": partition,
        "divergence": divergence,
        "on_policy": on_policy,
        "inner_weight": inner,
        "temperature": temperature,
    }
    assert DistillSection(**options, allow_biased=True).allow_biased
    wrong = biased(partition, divergence, inner, temperature) or bool(
        on_policy and biased(partition, divergence, 0.0, temperature)
    )
    if not wrong:
        assert DistillSection(**options)
        return
    with pytest.raises(ValueError, match="objective = 'class' with .*allow_biased = true") as error:
        DistillSection(**options)
    wanted = exact_settings(DistillSection(**options, allow_biased=True))
    for name, value in wanted.items():
        assert f"{name} = {value!r}" in str(error.value)
        assert f"{name} = {options[name]!r}" in str(error.value)
    assert DistillSection(**options | wanted), "what it says to write is accepted"


def test_the_defaults_of_class_are_refused_with_the_settings_to_write():
    with pytest.raises(
        ValueError,
        match="objective = 'class' with on_policy = 1.0, divergence = 'reverse': .* Write "
        "on_policy = 0.0, divergence = 'forward', or objective = 'byte', .* or allow_biased",
    ):
        DistillSection(objective="class")
    assert DistillSection(**EXACT)


@pytest.mark.parametrize("option", OF_OFF_POLICY_TEXTS)
def test_what_is_done_to_off_policy_texts_needs_some(option):
    """T29 on the other side: an option that would change nothing is refused."""
    value = {"query_budget": 8, "rewrite": "m:f", "nll_weight": 0.5}.get(option, True)
    with pytest.raises(ValueError, match=f"^{option} = .* with on_policy = 1.0, the default: "):
        DistillSection(**{option: value})
    assert DistillSection(on_policy=0.5, **{option: value})
    given = {"on_policy": 0.5, "source": "dataset", option: value}
    if option in OF_TEACHER_TEXTS:
        with pytest.raises(ValueError, match=f"^{option} = .* with source = 'dataset': no teacher"):
            DistillSection(**given)
    else:
        assert DistillSection(**given)


def test_what_would_do_nothing_is_named_as_a_file_writes_it():
    with pytest.raises(ValueError, match="^query_budget = 8, correct_only = true with on_policy"):
        DistillSection(query_budget=8, correct_only=True)
    with pytest.raises(ValueError, match="nll_weight = 0.5 with objective = 'nll', which is that"):
        DistillSection(objective="nll", on_policy=0.0, nll_weight=0.5)


def test_exact_bytes_need_no_permission():
    for divergence in ("forward", "reverse", "jsd", "skew_forward", "skew_reverse"):
        for on_policy in (0.0, 0.5, 1.0):
            options = {"divergence": divergence, "on_policy": on_policy, "temperature": 2.0}
            assert DistillSection(objective="byte", **options)
    with pytest.raises(ValueError, match="top_k = 8 need objective"):
        DistillSection(objective="byte", top_k=8, tail="bucket")
    for wrong in ({"on_policy": 0.5}, {"nll_weight": 1.0}):
        with pytest.raises(ValueError, match="only the student's own texts"):
            DistillSection(objective="policy_gradient", **wrong)
    with pytest.raises(ValueError, match="'policy_gradient' takes one teacher"):
        DistillSection(objective="policy_gradient", more_teachers=("x",))
    with pytest.raises(ValueError, match="max_missing = 1.5; want 0 to 1"):
        DistillSection(objective="byte", max_missing=1.5)


def test_a_top_k_teacher_is_a_baseline():
    options = EXACT | {"partition": "common", "top_k": 8, "tail": "bucket"}
    with pytest.raises(ValueError, match="partition = 'prefix', top_k = 0, tail = 'full'"):
        DistillSection(**options)
    assert DistillSection(**options, allow_biased=True)


def test_spans_are_a_baseline():
    with pytest.raises(
        ValueError, match="objective = 'span': .*'byte', or 'nll' with on_policy = 0.0"
    ):
        DistillSection(objective="span", on_policy=0.0)
    assert DistillSection(objective="span", allow_biased=True)


@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize("merge", [None, (b"un", b"unit"), (b"\xff", b"\xff\x00")])
@pytest.mark.parametrize("same_ids", [False, True])
def test_a_student_that_merges_is_known_with_its_tokenizer(merge, same_ids, allow):
    cfg = object.__new__(Config)
    object.__setattr__(cfg, "distill", DistillSection(**EXACT, allow_biased=allow))
    advice = distill_advice(cfg, same_ids, merge)
    if merge and not same_ids and not allow:
        assert advice.level == "error" and "allow_biased = true" in advice.text
        assert ("'unit' begins with its token 'un'" in advice.text) == (merge[0] == b"un")
    else:
        assert (advice and advice.level) == ("warning" if same_ids else None)


@pytest.mark.parametrize(
    "options", [{"tail": "bucket", "top_k": 4}, {"objective": "byte"}, {"objective": "span"}]
)
def test_measures_need_a_loss_that_sees_both_models_logits(options):
    with pytest.raises(ValueError, match="measures = true with objective = .*; want objective"):
        DistillSection(measures=True, allow_biased=True, **options)
