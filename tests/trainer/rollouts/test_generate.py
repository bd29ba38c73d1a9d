"""Sampling from a table-driven Markov model, where every probability is known.

Shapes: B rows, L length, V vocabulary.
"""

import math
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reflux.trainer.data.batch import Prompt
from reflux.trainer.phase import Sampling
from reflux.trainer.rollouts.generate import (
    LEAVING,
    EmbeddedSampler,
    _Job,
    _noise,
    generate,
    given_rollout,
)
from reflux.trainer.rollouts.samplers import EngineSampler

V, PADDED = 7, 9  # the head has two rows more than the tokenizer knows
STOPS = (3, 5)
TABLE = torch.randn(V, PADDED, generator=torch.Generator().manual_seed(0))
TABLE[:, V:] = 60.0  # never to be sampled, nor to count in the softmax


class Chat:
    vocab_size, stop_ids, stop_id = V, STOPS, 5

    def prompt_ids(self, messages):
        return tuple(int(c) for c in messages[0]["content"])

    def encode(self, text):
        return tuple(int(c) for c in text)

    def decode(self, ids):
        return "".join(map(str, ids))


def logits_after(token: int, position: int) -> torch.Tensor:
    return TABLE[token] + torch.cat(
        [torch.linspace(0, 0.3 * (position % 4), V), torch.zeros(PADDED - V)]
    )


@contextmanager
def decode(rows: int, max_length: int):
    """The next token depends on the last one and on its position; padding must have none."""
    fed, before = 0, 0

    def step(ids_BL, position_BL, real_BL, first, rows_B=None):
        nonlocal fed, before
        fed += ids_BL.shape[1]
        assert len(ids_BL) <= rows and (first or rows_B is not None or len(ids_BL) == before)
        assert rows_B is None or (len(rows_B) == len(ids_BL) and int(rows_B.max()) < before)
        before = len(ids_BL)
        assert fed <= max_length and first == (fed == ids_BL.shape[1])
        assert (
            real_BL.shape == (len(ids_BL), fed)
            and (real_BL.sum(1) == position_BL[:, -1] + 1).all()
            and real_BL[:, -1].all()
        )
        return torch.stack(
            [logits_after(int(i[-1]), int(p[-1])) for i, p in zip(ids_BL, position_BL)]
        )

    yield step, torch.device("cpu")


def prompts(*texts: str) -> list[Prompt]:
    return [Prompt(index, ({"role": "user", "content": text},)) for index, text in enumerate(texts)]


def distributions(rollout, s: Sampling) -> list[np.ndarray]:
    """The log-probabilities that each token of a rollout was drawn from, in plain float64."""
    out = []
    for t in range(len(rollout.ids)):
        before = (*rollout.prompt_ids, *rollout.ids[:t])
        z = logits_after(before[-1], len(before) - 1)[:V].double().numpy() / (
            1.0 if s.greedy else s.temperature
        )
        keep = np.ones(V, bool)
        order = np.argsort(-z)
        if s.top_k and not s.greedy:
            keep[order[s.top_k :]] = False
        if s.top_p < 1 and not s.greedy:
            p = np.where(keep, np.exp(z), 0)[order]
            keep[order[np.cumsum(p / p.sum()) - p / p.sum() >= s.top_p]] = False
        z = np.where(keep, z, -np.inf)
        out.append(z - np.log(np.exp(z - z.max()).sum()) - z.max())
    return out


SOME = prompts("0", "120", "66", "4", "0120")
SAMPLINGS = st.builds(
    Sampling,
    max_tokens=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
    step=st.integers(0, 2**31),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    top_p=st.sampled_from([1.0, 0.9, 0.4]),
    top_k=st.sampled_from([0, 1, 3, 50]),
    rows=st.integers(1, 12),
    greedy=st.booleans(),
)


@given(SAMPLINGS)
def test_log_probabilities_are_those_of_what_was_sampled(s):
    """T9: after temperature and truncation: the same policy has an importance ratio of 1."""
    for rollout in (r for group in generate(decode, Chat(), SOME, 2, s) for r in group):
        assert 1 <= len(rollout.ids) <= s.max_tokens and len(rollout.logp) == len(rollout.ids)
        logps = distributions(rollout, s)
        np.testing.assert_allclose(
            rollout.logp, [x[i] for x, i in zip(logps, rollout.ids)], atol=1e-5
        )
        assert rollout.ended == (rollout.ids[-1] in STOPS) and not set(rollout.ids[:-1]) & set(
            STOPS
        )
        assert rollout.ended or len(rollout.ids) == s.max_tokens
        assert rollout.text == "".join(map(str, rollout.content_ids))
        stop = np.logaddexp.reduce(logps[-1][list(STOPS)]) if rollout.ended else 0.0
        assert rollout.stop_logp == pytest.approx(stop, abs=1e-5)
        if s.greedy:
            assert all(i == x.argmax() for i, x in zip(rollout.ids, logps))


@given(SAMPLINGS, st.integers(1, 12), st.permutations(range(5)))
def test_texts_do_not_depend_on_blocks_order_or_rank(s, rows, order):
    counts = []
    whole = generate(decode, Chat(), SOME, 3, s, counts.append)
    assert sum(counts) == 3 * len(SOME)
    shuffled = generate(decode, Chat(), [SOME[i] for i in order], 3, replace(s, rows=rows))
    assert [shuffled[order.index(i)] for i in range(5)] == whole
    shards = [generate(decode, Chat(), SOME[rank::2], 3, s) for rank in range(2)]
    assert [shards[i % 2][i // 2] for i in range(5)] == whole
    assert [g[:2] for g in whole] == generate(decode, Chat(), SOME, 2, s), (
        "a member is the same in a smaller group"
    )


def test_equal_prompts_are_fed_once_and_ended_texts_are_left_out():
    fed = []

    @contextmanager
    def watched(rows: int, max_length: int):
        with decode(rows, max_length) as (step, device):

            def seen(ids_BL, position_BL, real_BL, first, rows_B=None):
                fed.append(len(ids_BL))
                return step(ids_BL, position_BL, real_BL, first, rows_B)

            yield seen, device

    groups = generate(watched, Chat(), SOME[:2], 40, Sampling(9, seed=2))
    texts = [r for group in groups for r in group]
    assert fed[0] == 2 and fed[1] <= 80 and fed[1:] == sorted(fed[1:], reverse=True)
    for t, rows in enumerate(fed[1:], 1):
        going_on = sum(len(r.ids) > t for r in texts)
        assert going_on <= rows <= max(1, going_on / (1 - LEAVING)) + 1


def test_every_part_of_the_key_matters():
    base = Sampling(8, seed=3, step=4)

    def texts(s: Sampling, index: int = 0, repeat: int = 0) -> tuple[tuple[int, ...], ...]:
        prompt = Prompt(index, SOME[0].messages, repeat=repeat)
        group = generate(decode, Chat(), [prompt], 4, s)[0]
        return tuple(r.ids for r in group)

    assert len(set(texts(base))) == 4, "members differ"
    seen = {
        texts(base),
        texts(replace(base, seed=4)),
        texts(replace(base, step=3)),
        texts(replace(base, step=5)),
        texts(base, 1),
        texts(base, repeat=1),
        texts(base, repeat=2),
    }
    assert len(seen) == 7 and texts(base) == texts(base)
    assert texts(replace(base, seed=4, step=3)) != texts(replace(base, seed=3, step=4)), (
        "seed and step do not trade places"
    )


@given(st.integers(0, 2**32 - 1), st.integers(0, 1 << 31), st.integers(0, 2**40))
def test_the_noise_of_a_prompt_that_comes_once_is_what_it_always_was(seed, step, index):
    """Repeats start at another counter of the same generator; texts of older runs stay."""
    key = np.array([(seed << 32) ^ step, (index << 16) ^ 2], dtype=np.uint64)
    want = np.random.Generator(np.random.Philox(key=key)).random(5)
    jobs = [_Job(Prompt(index, (), repeat=k), (), 2, 5) for k in range(3)]
    noise_BT = _noise(jobs, Sampling(5, seed=seed, step=step)).numpy()
    assert (noise_BT[0] == want).all()
    assert len(np.unique(noise_BT)) == 15


def test_a_longer_limit_continues_the_same_text():
    short, long = (generate(decode, Chat(), SOME, 4, Sampling(n, seed=1)) for n in (2, 9))
    for a, b in zip(sum(short, []), sum(long, [])):
        assert b.ids[:2] == a.ids


@pytest.mark.parametrize(
    "s",
    [
        Sampling(1, seed=1),
        Sampling(1, seed=2, temperature=0.5),
        Sampling(1, seed=3, top_k=3),
        Sampling(1, seed=4, top_p=0.7),
    ],
)
def test_frequencies_are_the_probabilities(s):
    n = 4000
    drawn = generate(decode, Chat(), prompts("0"), n, replace(s, rows=n))[0]
    count = Counter(r.ids[0] for r in drawn)
    p = np.exp(distributions(drawn[0], s)[0])
    assert set(count) <= set(np.flatnonzero(p)), (
        "nothing outside the truncation, nothing of the padding"
    )
    expected = n * p[p > 0]
    chi2 = sum((count[i] - e) ** 2 / e for i, e in zip(np.flatnonzero(p), expected))
    assert chi2 < 22.5, "0.1 % quantile of chi square with 6 degrees of freedom"


def test_several_stop_ids_all_stop_and_all_count():
    rollouts = [r for g in generate(decode, Chat(), SOME, 40, Sampling(6, seed=1)) for r in g]
    assert {r.ids[-1] for r in rollouts if r.ended} == set(STOPS) and any(
        not r.ended for r in rollouts
    )
    assert all(r.stop_logp > r.logp[-1] for r in rollouts if r.ended), (
        "the set is likelier than the one that was drawn"
    )


def test_no_prompts_no_texts():
    assert generate(decode, Chat(), [], 4, Sampling(4)) == []


@contextmanager
def decode_within(rooms, rows, max_length):
    """As `decode`; the prompt in each row has positions for so many tokens, and no more."""
    room_N = None

    def step(ids_BL, position_BL, real_BL, first, rows_B=None):
        nonlocal room_N
        if first:
            texts = ["".join(str(int(i)) for i in x[r]) for x, r in zip(ids_BL, real_BL)]
            room_N = torch.tensor([rooms[text] for text in texts])
        room_N = room_N if rows_B is None else room_N[rows_B]
        assert (position_BL[:, -1] < room_N).all(), "a position that the model does not have"
        return torch.stack(
            [logits_after(int(i[-1]), int(p[-1])) for i, p in zip(ids_BL, position_BL)]
        )

    yield step, torch.device("cpu")


@given(SAMPLINGS, st.lists(st.integers(0, 8), min_size=5, max_size=5))
def test_a_begun_answer_gets_what_is_left_of_its_tokens(s, spent):
    """The same tokens as without a beginning, up to its own limit; no position behind that."""
    spent = tuple(min(n, s.max_tokens - 1) for n in spent)
    texts = [p.messages[0]["content"] for p in SOME]
    rooms = {x: len(x) + s.max_tokens - n - 1 for x, n in zip(texts, spent)}
    rooms = {x: max(room, len(x)) for x, room in rooms.items()}
    groups = generate(partial(decode_within, rooms), Chat(), SOME, 3, replace(s, spent=spent))
    for whole, begun, n in zip(generate(decode, Chat(), SOME, 3, s), groups, spent):
        limit = s.max_tokens - n
        assert [r.ids for r in begun] == [r.ids[:limit] for r in whole]
        assert [r.ended for r in begun] == [r.ended and len(r.ids) <= limit for r in whole]
        for r in begun:
            assert r.text == "".join(map(str, r.content_ids)) and len(r.logp) == len(r.ids)


def test_an_engine_is_asked_for_what_is_left_of_a_begun_answer():
    asked = []

    class Source:
        def texts(self, requests, advance):
            asked.extend(requests)
            return [[]] * len(requests)

    EngineSampler(Source(), Chat()).sample(SOME[:3], 2, Sampling(9, spent=(0, 4, 8)))
    assert [r.max_tokens for r in asked] == [9, 5, 1]


def test_a_sampler_gathers_the_weights_once_for_every_call():
    events, counts = [], []

    @contextmanager
    def weights():
        events.append("gathered")
        yield decode
        events.append("freed")

    sampler, sampling = EmbeddedSampler(weights, Chat()), Sampling(4, seed=2)
    for calls in (1, 2):
        got = sampler.sample(SOME, 3, sampling, counts.append)
        assert got == generate(decode, Chat(), SOME, 3, sampling)
        assert events == ["gathered", "freed"] * calls and sum(counts) == 15 * calls


def test_a_given_text_is_closed_with_the_templates_stop():
    prompt = replace(SOME[1], response="0124")
    whole = given_rollout(Chat(), prompt, 5)
    assert (
        whole.ids == (0, 1, 2, 4, 5)
        and whole.ended
        and whole.text == "0124"
        and whole.prompt_ids == (1, 2, 0)
    )
    assert whole.logp == (0.0,) * 5 and whole.content_ids == (0, 1, 2, 4)
    cut = given_rollout(Chat(), prompt, 4)
    assert (
        cut.ids == (0, 1, 2, 4)
        and not cut.ended
        and cut.content_ids == cut.ids
        and len(cut.logp) == 4
    )
    assert given_rollout(Chat(), prompt, 2).text == "01"
    assert given_rollout(Chat(), replace(prompt, response=""), 2).ids == (5,), (
        "an empty answer is a stop"
    )
    with pytest.raises(ValueError, match="prompt 1 has no response; want a `response` column"):
        given_rollout(Chat(), SOME[1], 5)


def test_stop_log_probability_is_a_set_sum_by_hand():
    r = generate(decode, Chat(), prompts("0"), 1, Sampling(1, greedy=True))[0][0]
    p = logits_after(0, 0)[:V].double().softmax(0)
    assert r.ids == (int(p.argmax()),) and r.logp[0] == pytest.approx(math.log(p.max()), abs=1e-6)
