"""pack: every response token is in one batch, once, and is predicted from its own past and nothing
else; prompts are frozen.
"""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reflux.trainer.data.batch import Prompt, Rollout, Sample, TeacherView, empty_batch, pack

SEQ_LEN = 12


def sample(prompt=(1,), ids=(2,), **more) -> Sample:
    return Sample(
        Rollout(Prompt(7, ()), tuple(prompt), tuple(ids), (0.0,) * len(ids), 0.0, "", True), **more
    )


def _views(rng, n, teachers):
    """Teachers with another template, some with other tokens, too, and a few aligned positions."""
    views = []
    for _ in range(teachers):
        prompt, m = tuple(rng.integers(1, 99, rng.integers(1, 6)).tolist()), int(rng.integers(0, 6))
        P = min(int(rng.integers(0, 4)), n, m)
        view = TeacherView(prompt)
        if rng.integers(2) and n:
            ids = tuple(rng.integers(1, 99, m).tolist())
            student, teacher = (np.sort(rng.choice(k, P, replace=False)) for k in (n, m))
            view = TeacherView(prompt, ids, student, teacher)
        views.append(None if rng.integers(4) == 0 else view)
    return tuple(views)


@st.composite
def samples(draw, most=8):
    """Ragged samples up to the limit, responses of length 0 and 1 among them, with spans and
    teachers' prompts.
    """
    rng, out = np.random.default_rng(draw(st.integers(0, 2**32 - 1))), []
    for _ in range(draw(st.integers(1, most))):
        p = draw(st.integers(1, SEQ_LEN))
        n = draw(st.integers(0, SEQ_LEN + 1 - p))
        spans = draw(st.integers(0, n))
        more = dict(
            advantage=rng.normal(size=n),
            old_logp=rng.normal(size=n),
            off_policy=bool(rng.integers(2)),
        )
        if draw(st.booleans()):
            more |= dict(
                span=rng.integers(-1, spans, n) if n else np.zeros(0, int),
                teacher_span_logp=rng.normal(size=spans),
            )
        if draw(st.booleans()):
            more |= dict(teacher_views=_views(rng, n, draw(st.integers(1, 2))))
        out.append(sample(rng.integers(1, 99, p).tolist(), rng.integers(1, 99, n).tolist(), **more))
    return out


def states(input_NL, position_NL) -> list[int]:
    """What a causal model could know at each position: a hash of the document so far. Position 0
    begins a document.
    """
    known = []
    for ids, positions in zip(input_NL.tolist(), position_NL.tolist()):
        state, before = 0, -1
        for token, position in zip(ids, positions):
            state = hash((0 if position == 0 else state, token))
            assert position in (0, before + 1), "positions count up or begin anew"
            known.append(state)
            before = position
    return known


def past(prompt, ids) -> list[int]:
    """The state that each response token has to be predicted from."""
    state, out = 0, []
    for token in (*prompt, *ids):
        out.append(state)
        state = hash((state, token))
    return out[len(prompt) :]


BUDGETS = st.integers(1, 60)


@given(samples(), BUDGETS, st.booleans())
def test_every_token_once_with_its_numbers(samples_N, tokens, joined):
    batches = pack(samples_N, tokens=tokens, seq_len=SEQ_LEN, joined=joined)
    seen = []
    for batch in batches:
        for i in batch.sample_T.unique().tolist():
            mine, s = batch.sample_T == i, samples_N[i]
            seen.append(i)
            assert batch.target_T[mine].tolist() == list(s.rollout.ids)
            np.testing.assert_array_equal(
                batch.advantage_T[mine].numpy(), s.advantage.astype(np.float32)
            )
            np.testing.assert_array_equal(
                batch.old_logp_T[mine].numpy(), s.old_logp.astype(np.float32)
            )
            assert (batch.off_policy_T[mine] == float(s.off_policy)).all()
    assert sorted(seen) == [i for i, s in enumerate(samples_N) if s.rollout.ids]
    assert sum(b.tokens for b in batches) == sum(len(s.rollout.ids) for s in samples_N)


@given(samples(), BUDGETS, st.booleans())
def test_each_target_is_predicted_from_its_own_past_in_both_views(samples_N, tokens, joined):
    for batch in pack(samples_N, tokens=tokens, seq_len=SEQ_LEN, joined=joined):
        known = states(batch.input_NL, batch.position_NL)
        wanted = {
            i: iter(past(samples_N[i].rollout.prompt_ids, samples_N[i].rollout.ids))
            for i in batch.sample_T.tolist()
        }
        assert [known[row] for row in batch.row_T.tolist()] == [
            next(wanted[i]) for i in batch.sample_T.tolist()
        ]


@given(samples(), BUDGETS, st.booleans())
def test_each_teacher_predicts_from_its_own_past_at_the_aligned_positions(
    samples_N, tokens, joined
):
    """Sample by sample, in the batch's order: the teacher's rows are its predictors at the aligned
    positions, and `aligned_positions` are the student's tokens that they are compared with.
    """
    for batch in pack(samples_N, tokens=tokens, seq_len=SEQ_LEN, joined=joined):
        order = list(dict.fromkeys(batch.sample_T.tolist()))
        for teacher in range(2):
            view, aligned_P = batch.for_teacher(teacher), batch.aligned_positions(teacher)
            known = states(view.input_NL, view.position_NL)
            got = [known[row] for row in view.row_T.tolist()]
            rows = torch.arange(batch.tokens) if aligned_P is None else aligned_P
            assert len(got) == len(rows)
            wanted, mine = [], []
            for i in order:
                r, views = samples_N[i].rollout, samples_N[i].teacher_views
                v = (views[teacher] if teacher < len(views) else None) or TeacherView(r.prompt_ids)
                ids = r.ids if v.ids is None else v.ids
                student, theirs = v.student_positions, v.teacher_positions
                student = range(len(r.ids)) if student is None else student
                theirs = range(len(ids)) if theirs is None else theirs
                wanted += [past(v.prompt_ids, ids)[k] for k in theirs]
                mine += [int((batch.sample_T == i).nonzero()[k, 0]) for k in student]
            assert got == wanted and rows.tolist() == mine


@given(samples(), BUDGETS, st.booleans())
def test_the_budget_holds_for_both_views_or_the_batch_is_one_row(samples_N, tokens, joined):
    for batch in pack(samples_N, tokens=tokens, seq_len=SEQ_LEN, joined=joined):
        for view in (batch, batch.for_teacher(0), batch.for_teacher(1)):
            assert view.input_NL.numel() <= tokens or len(view.input_NL) == 1
            assert view.input_NL.shape == view.position_NL.shape and view.input_NL.shape[1] >= 1
        assert batch.input_NL.shape[1] <= SEQ_LEN and batch.packed == joined


@given(samples(), st.booleans())
def test_unjoined_rows_are_padded_to_the_longest_and_no_further(samples_N, joined):
    (batch,) = pack(samples_N, tokens=10**6, seq_len=SEQ_LEN, joined=joined)
    lengths = [max(1, len(s.rollout.prompt_ids) + len(s.rollout.ids) - 1) for s in samples_N]
    if not joined:
        assert batch.input_NL.shape == (len(samples_N), max(lengths))
    assert len(batch.input_NL) <= len(samples_N)


@given(samples(), BUDGETS, st.booleans())
def test_spans_stay_those_of_their_sample(samples_N, tokens, joined):
    for batch in pack(samples_N, tokens=tokens, seq_len=SEQ_LEN, joined=joined):
        for i in batch.sample_T.unique().tolist():
            got, s = batch.span_T[batch.sample_T == i], samples_N[i]
            span = s.span if s.span is not None else np.full(len(got), -1)
            assert ((got >= 0).numpy() == (span >= 0)).all()
            inside = span >= 0
            if inside.any():
                np.testing.assert_array_equal(
                    batch.teacher_span_logp_S[got[torch.from_numpy(inside)]].numpy(),
                    s.teacher_span_logp[span[inside]].astype(np.float32),
                )


def test_the_last_token_is_a_target_and_never_an_input():
    (a,) = pack([sample((5, 6), (7, 8))], tokens=64, seq_len=SEQ_LEN)
    (b,) = pack([sample((5, 6), (7, 99))], tokens=64, seq_len=SEQ_LEN)
    assert torch.equal(a.input_NL, b.input_NL) and a.input_NL.tolist() == [[5, 6, 7]]
    assert a.row_T.tolist() == [1, 2]
    assert a.target_T.tolist() == [7, 8] and b.target_T.tolist() == [7, 99]


def test_joined_rows_by_hand():
    """Longest first; two short ones share what is left of a row, each counting from 0."""
    three = [sample((1, 2), (3,)), sample((4, 5, 6), (7, 8)), sample((9,), (10, 11))]
    (batch,) = pack(three, tokens=64, seq_len=6, joined=True)
    assert batch.input_NL.tolist() == [[4, 5, 6, 7, 1, 2], [9, 10, 9, 9, 9, 9]]
    assert batch.position_NL.tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 0, 1, 2, 3]]
    assert batch.target_T.tolist() == [7, 8, 3, 10, 11] and batch.row_T.tolist() == [2, 3, 5, 6, 7]
    assert batch.sample_T.tolist() == [1, 1, 0, 2, 2]


def test_joining_saves_rows():
    many = [sample((1,), (2, 3)) for _ in range(12)]  # two inputs each
    assert len(pack(many, tokens=10**6, seq_len=SEQ_LEN, joined=True)[0].input_NL) == 2


@pytest.mark.parametrize("prompt, ids", [((), (1,)), ((1,) * 7, (1,) * 7)])
def test_what_does_not_fit_is_an_error_with_the_fix(prompt, ids):
    with pytest.raises(
        ValueError,
        match=f"prompt 7: {len(prompt)} prompt and {len(ids)} response tokens; want .* at most "
        r"training.seq_len \+ 1 = 13 in all. Raise training.seq_len or lower rollout.max_tokens",
    ):
        pack([sample(), sample(prompt, ids)], tokens=64, seq_len=SEQ_LEN)
    pack([sample((1,) * 7, (1,) * 6)], tokens=1, seq_len=SEQ_LEN)  # one row, whatever the budget


def test_no_samples_give_no_batch():
    assert pack([], tokens=64, seq_len=SEQ_LEN) == []
    empty = empty_batch()
    assert empty.tokens == 0 and empty.input_NL.numel() == 1
    assert all(
        len(getattr(empty, f.name)) == 0 for f in fields(empty) if f.name.endswith(("_T", "_S"))
    )


def test_a_batch_moves_with_its_teacher_view():
    (batch,) = pack(
        [sample((1,), (2,), teacher_views=(None, TeacherView((3, 4))))], tokens=64, seq_len=SEQ_LEN
    )
    moved = batch.to(torch.device("meta"))
    assert moved.target_T.is_meta and not moved.packed
    assert all(x.is_meta for x in moved.teacher_views[1][:3])
    view = batch.for_teacher(1)
    assert view.input_NL.tolist() == [[3, 4]] and view.row_T.tolist() == [1]
    assert batch.aligned_positions(1) is None
    assert all(batch.for_teacher(i).input_NL.tolist() == [[1]] for i in (0, 2))


def test_content_is_the_response_without_its_stop():
    rollout = sample((1,), (2, 3)).rollout
    assert rollout.content_ids == (2,) and replace(rollout, ended=False).content_ids == (2, 3)
