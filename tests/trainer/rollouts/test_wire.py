"""What is packed comes back as it was, and nothing else is taken for a message."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reflux.trainer.rollouts import wire
from reflux.trainer.rollouts.engine_texts import (
    SampledText,
    ScoredText,
    ScoreRequest,
    TextRequest,
)

REQUEST = TextRequest((1, 2), 3, 2**62, 8, 0.7, 0.9, 5, (0, 4), 100)


def sampled(rng, n):
    ids = rng.integers(0, 150_000, n)
    return SampledText(ids, rng.normal(size=n).astype(np.float32), -0.5, ("run/3",))


@given(st.lists(st.lists(st.integers(0, 5), max_size=3), max_size=4), st.integers(0, 99))
def test_texts_come_back_bit_for_bit(lengths, seed):
    rng = np.random.default_rng(seed)
    texts = [[sampled(rng, n) for n in group] for group in lengths]
    back = wire.unpack_texts(wire.pack_texts(texts))
    assert [len(g) for g in back] == [len(g) for g in texts]
    for a, b in zip(sum(texts, []), sum(back, [])):
        assert np.array_equal(a.ids, b.ids) and np.array_equal(a.logp, b.logp)
        assert (a.stop_logp, a.versions) == (b.stop_logp, b.versions)


def test_requests_and_scores_come_back():
    assert wire.unpack_requests(wire.pack_requests([REQUEST]), TextRequest) == [REQUEST]
    ask = ScoreRequest((5, 6, 7), 1, 2)
    assert wire.unpack_requests(wire.pack_requests([ask]), ScoreRequest) == [ask]
    score = ScoredText(
        np.array([-1.0, -2.0], np.float32),
        np.array([[3, 4], [5, 6]]),
        np.array([[-0.1, -3.0], [-0.2, -np.inf]], np.float32),
        ("folder",),
    )
    (back,) = wire.unpack_scores(wire.pack_scores([score]))
    assert np.array_equal(back.topk_logp, score.topk_logp) and back.versions == ("folder",)
    assert np.array_equal(back.topk_ids, score.topk_ids) and back.topk_ids.dtype == np.int64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_back_bit_for_bit_also_from_a_view(dtype):
    weight = torch.randn(6, 4).to(dtype)
    ((name, back),) = wire.unpack_weights(wire.pack_weights([("a.b", weight.T)]))
    assert name == "a.b" and torch.equal(back, weight.T)


def test_an_infinite_stop_log_probability_survives():
    text = SampledText(np.array([1]), np.array([-1.0], np.float32), -np.inf, ("v",))
    assert wire.unpack_texts(wire.pack_texts([[text]]))[0][0].stop_logp == -np.inf


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"\xff" * 40, wire.pack({"other": 1}), json.dumps({}).encode()]
)
def test_anything_else_is_an_error_in_words(body):
    for read in (wire.unpack_texts, wire.unpack_scores):
        with pytest.raises(ValueError, match="no message of reflux|another version of reflux"):
            read(body)
    with pytest.raises(ValueError, match="no message of reflux|another version of reflux"):
        wire.unpack_requests(body, TextRequest)


def test_a_request_of_the_other_kind_is_refused():
    with pytest.raises(ValueError, match="a request of another version"):
        wire.unpack_requests(wire.pack_requests([REQUEST]), ScoreRequest)
