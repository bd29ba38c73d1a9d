"""The engine: steps without tokens, means over ranks, reads that change no weight, errors."""

import pytest
import torch
from engine_cases import likelihood_loss, samples, whole_weights
from runs import config

from reflux.trainer.data.batch import pack
from reflux.trainer.engine.engine import Engine
from reflux.trainer.engine.metrics import MetricSums
from reflux.trainer.losses import token_logprob_of

pytestmark = pytest.mark.usefixtures("titan_process")


def test_a_step_without_tokens_changes_no_weight(engine):
    before = whole_weights(engine)
    next(engine.steps())
    stats = engine.step([[[]]], likelihood_loss)
    assert stats["tokens"] == 0 and stats["loss"] == 0
    assert all(torch.equal(w, before[n]) for n, w in whole_weights(engine).items())


def test_minibatches_and_epochs_are_updates_one_after_the_other(engine):
    """Against the same engine from the same weights, one update a step; lr is constant there."""
    first, second = (pack(samples(n), tokens=99, seq_len=64) for n in ((3, 7), (5, 2, 4)))
    before = {name: p.clone() for name, p in engine.model.named_parameters()}
    next(engine.steps())
    alone = [engine.step([[x]], likelihood_loss) for x in (first, second, second, first)]
    wanted = whole_weights(engine)
    with torch.no_grad():
        for name, p in engine.model.named_parameters():
            p.copy_(before[name])
    for optimizer in engine._trainer.optimizers.optimizers:
        optimizer.state.clear()
    stats = engine.step([[first, second], [second, first]], likelihood_loss)
    assert all(torch.equal(w, wanted[n]) for n, w in whole_weights(engine).items())
    for prefix, updates in (("", alone[:2]), ("epoch2/", alone[2:])):
        tokens = [u["tokens"] for u in updates]
        loss = sum(u["loss"] * t for u, t in zip(updates, tokens)) / sum(tokens)
        assert stats[f"{prefix}tokens"] == sum(tokens) == 21
        assert stats[f"{prefix}loss"] == pytest.approx(loss, rel=1e-12)
        norm = sum(u["grad_norm"] for u in updates) / 2
        assert stats[f"{prefix}grad_norm"] == pytest.approx(norm, rel=1e-12)
    assert alone[3]["loss"] < alone[0]["loss"], "updates that change nothing would prove nothing"


def test_published_weights_are_those_of_a_folder_and_have_another_name_after_a_step(engine):
    from safetensors.torch import load_file

    stored = load_file(f"{engine.cfg.model.path}/model.safetensors")
    names = [engine.weights_version]
    published = dict(engine.named_weights())
    assert engine.compute_dtype == "float32" and published.keys() == stored.keys()
    current = list(whole_weights(engine).values())
    for name, weight in published.items():
        assert weight.shape == stored[name].shape
        assert any(torch.equal(weight, w) for w in current if w.shape == weight.shape), name
    next(engine.steps())
    names.append(engine.weights_version)
    batch = pack(samples(), tokens=99, seq_len=64)
    engine.step([[batch]], likelihood_loss)
    names.append(engine.weights_version)
    assert names[0] == names[1] != names[2]
    moved = dict(engine.named_weights())
    assert any(not torch.equal(moved[n], published[n]) for n in moved)


def test_means_are_over_entries_and_missing_ones_are_zero(engine):
    metric_sums = MetricSums()
    metric_sums.add("a", [1.0, 2.0, 6.0])
    metric_sums.add("a", 3)
    metric_sums.add("none", [])
    assert engine.mean(metric_sums) == {"a": 3.0}  # a mean of nothing is no number
    assert engine.gather([1, 2]) == [1, 2] and engine.sum(2.5) == 2.5


def test_a_forward_and_sampling_leave_the_model_as_it_was(engine):
    before = whole_weights(engine)
    batch = pack(samples(), tokens=99, seq_len=64)[0]
    target_T = batch.target_T.clamp(max=399)
    with engine.forward_no_grad(engine, batch, 400) as out:
        assert out.vocab_size == 400 and not out.hidden_TD.requires_grad
        first = token_logprob_of(out, target_T).logp
    with engine.gathered_weights():
        pass
    with engine.forward_no_grad(engine, batch, 400) as out:
        assert torch.equal(first, token_logprob_of(out, target_T).logp)
    assert all(torch.equal(w, before[n]) for n, w in whole_weights(engine).items())


def test_a_loss_that_is_not_finite_stops_before_any_weight_moves(engine):
    before = whole_weights(engine)
    next(engine.steps())

    def infinite(out, batch):
        total, metrics = likelihood_loss(out, batch)
        return total * torch.inf, metrics

    with pytest.raises(FloatingPointError, match="step 1: loss inf.*nonfinite-step-1-rank-0.pt"):
        engine.step([[pack(samples(), tokens=99, seq_len=64)]], infinite)
    assert all(torch.equal(w, before[n]) for n, w in whole_weights(engine).items())


def test_a_folder_without_a_model_is_named(talkers, tmp_path):
    with pytest.raises(ValueError, match="model.path = .*no config.json"):
        Engine(config(talkers, tmp_path / "run", "distill", model={"path": str(tmp_path)}))
