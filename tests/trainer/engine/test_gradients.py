"""One division by the token count, however the work is cut; metrics are sums, "max/..." maxima."""

import pytest
import torch
from engine_cases import likelihood_loss, samples

from reflux.trainer.data.batch import pack
from reflux.trainer.engine.gradients import (
    Update,
    accumulate_gradients,
    dumped,
    epoch_means,
    totals,
)
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


def test_gradients_reduced_once_a_step_are_the_same(engine):
    want_sums, want = gradients(engine, 12, likelihood_loss)
    engine._trainer.config.training.sync_every_microbatch = False
    sums, got = gradients(engine, 12, likelihood_loss)
    assert float(sums["loss"]) == float(want_sums["loss"])
    for name, grad in got.items():
        assert (grad - want[name]).norm() <= 2e-6 * grad.norm(), name
    engine._trainer.config.training.sync_every_microbatch = True
    again = gradients(engine, 12, likelihood_loss)[1]
    assert all(torch.equal(again[name], want[name]) for name in want), "the switch is put back"


def test_metrics_are_summed_and_maxima_are_maxima(engine):
    def loss(out, batch):
        total, _ = likelihood_loss(out, batch)
        tokens = torch.tensor(float(batch.tokens))
        return total, {"size": tokens, "max/size": tokens}

    sums, _ = gradients(engine, 1, loss)
    assert sums["size"] == 15 and sums["max/size"] == 7
    update = Update(totals(RankGroup(None, engine.device), sums), grad_norm=3.0, tokens=15.0)
    means = epoch_means([update])
    assert means["size"] == 1.0 and means["max/size"] == 7.0 and means["tokens"] == 15.0
    assert means["loss"] == pytest.approx(float(sums["loss"]) / 15)
    other = Update({"loss": 5.0, "size": 5.0, "max/size": 9.0}, grad_norm=1.0, tokens=5.0)
    both = epoch_means([update, other])
    assert both["size"] == 1.0 and both["max/size"] == 9.0 and both["grad_norm"] == 2.0
    assert both["loss"] == pytest.approx((float(sums["loss"]) + 5.0) / 20)


def test_where_a_batch_went_is_told(tmp_path):
    batches = pack(samples(), tokens=99, seq_len=64)
    assert dumped(batches, {"loss": 1.0}, tmp_path / "a.pt") == f"is saved in {tmp_path / 'a.pt'}"
    assert torch.load(tmp_path / "a.pt", weights_only=False)["stats"] == {"loss": 1.0}
    assert "could not be saved (" in dumped(batches, {}, tmp_path / "none" / "a.pt")
