"""One division by the token count, however the work is cut; metrics are sums, "max/..." maxima."""

import pytest
import torch
from engine_cases import likelihood_loss, samples

from reflux.trainer.data.batch import pack
from reflux.trainer.engine.gradients import accumulate_gradients, token_means
from reflux.trainer.engine.ranks import RankGroup


def gradients(engine, tokens: int, loss) -> tuple[dict, dict]:
    """Sums and gradients of the samples in micro-batches of at most `tokens` positions."""
    engine.clear_gradients()
    batches = engine.pad_across_ranks(pack(samples(), tokens=tokens, seq_len=64))
    sums = accumulate_gradients(
        engine._trainer, batches, loss, vocab_size=engine.vocab_size, tokens=15.0
    )
    return sums, {n: p.grad.full_tensor().clone() for n, p in engine.model.named_parameters()}


def test_sums_are_divided_once_however_the_work_is_cut(engine):
    want_sums, want = gradients(engine, 1, likelihood_loss)
    for tokens in (12, 999):
        sums, got = gradients(engine, tokens, likelihood_loss)
        assert float(sums["loss"]) == pytest.approx(float(want_sums["loss"]), rel=1e-6)
        for name, grad in got.items():
            assert (grad - want[name]).norm() <= 2e-6 * grad.norm(), name


def test_metrics_are_summed_and_maxima_are_maxima(engine):
    def loss(out, batch):
        total, _ = likelihood_loss(out, batch)
        tokens = torch.tensor(float(batch.tokens))
        return total, {"tokens": tokens, "max/tokens": tokens}

    sums, _ = gradients(engine, 1, loss)
    assert sums["tokens"] == 15 and sums["max/tokens"] == 7
    means = token_means(RankGroup(None, engine.device), sums, 15.0)
    assert means["tokens"] == 1.0 and means["max/tokens"] == 7.0
    assert means["loss"] == pytest.approx(float(sums["loss"]) / 15)
