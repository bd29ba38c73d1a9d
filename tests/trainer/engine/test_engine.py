"""The engine: one division by the global token count, empty batches, checkpoints that are
restored, errors.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from assets import free_port
from runs import config

from reflux.trainer.data.batch import Prompt, Rollout, Sample, pack
from reflux.trainer.engine.engine import Engine
from reflux.trainer.engine.metrics import MetricSums
from reflux.trainer.losses import token_logprob_of

pytestmark = pytest.mark.usefixtures("titan_process")


@pytest.fixture
def engine(talkers, tmp_path):
    os.environ["MASTER_PORT"] = str(free_port())
    engine = Engine(
        config(
            talkers,
            tmp_path / "run",
            "distill",
            steps=3,
            checkpoint={"interval": 1, "keep_latest_k": 9},
        )
    )
    yield engine
    engine.close()


def samples(lengths=(3, 7, 5)) -> list[Sample]:
    rng = np.random.default_rng(0)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(rng.integers(3, 500, n).tolist())

    return [
        Sample(Rollout(Prompt(i, ()), ids(4 + i), ids(n), (0.0,) * n, 0.0, "", True))
        for i, n in enumerate(lengths)
    ]


def loss(out, batch):
    return -token_logprob_of(out, batch.target_T).logp.sum(), {}


def weights(engine) -> dict:
    return {name: p.full_tensor().clone() for name, p in engine.model.state_dict().items()}


def test_sums_are_divided_once_however_the_work_is_cut(engine):
    gradients = []
    for tokens in (1, 12, 999):
        engine._trainer.optimizers.zero_grad()
        sums = engine._accumulate(
            engine.pad_across_ranks(pack(samples(), tokens=tokens, seq_len=64)), loss, 15.0
        )
        gradients.append(
            (
                float(sums["loss"]),
                {n: p.grad.full_tensor().clone() for n, p in engine.model.named_parameters()},
            )
        )
    for value, grads in gradients[1:]:
        assert value == pytest.approx(gradients[0][0], rel=1e-6)
        for name, grad in grads.items():
            assert (grad - gradients[0][1][name]).norm() <= 2e-6 * grad.norm(), name


def test_a_step_without_tokens_changes_no_weight(engine):
    before = weights(engine)
    next(engine.steps())
    stats = engine.step([], loss)
    assert (
        stats["tokens"] == 0
        and stats["loss"] == 0
        and all(torch.equal(w, before[n]) for n, w in weights(engine).items())
    )


def test_every_update_is_saved_and_each_can_be_restored(engine, talkers):
    start, after = weights(engine), {}
    for step in engine.steps():
        engine.step(pack(samples(), tokens=99, seq_len=64), loss)
        engine.notes["answer"] = float(step)
        after[step] = weights(engine)
    assert engine.restore(2) == 2 and engine.notes["answer"] == 2.0
    folder = Path(engine.cfg.folder) / "checkpoint"
    assert not (folder / "step-3").exists() and (folder / "given-up-3").exists(), (
        "a resumed run would start from step 3"
    )
    assert all(torch.equal(w, after[2][n]) for n, w in weights(engine).items())
    assert engine.restore(0) == 0 and all(
        torch.equal(w, start[n]) for n, w in weights(engine).items()
    )


def test_means_are_over_entries_and_missing_ones_are_zero(engine):
    metric_sums = MetricSums()
    metric_sums.add("a", [1.0, 2.0, 6.0])
    metric_sums.add("a", 3)
    metric_sums.add("none", [])
    assert (
        engine.mean(metric_sums) == {"a": 3.0, "none": 0.0}
        and engine.gather([1, 2]) == [1, 2]
        and engine.sum(2.5) == 2.5
    )


def test_reading_the_model_leaves_it_as_it_was(engine):
    before = weights(engine)
    batch = pack(samples(), tokens=99, seq_len=64)[0]
    with engine.forward_no_grad(engine, batch, 400) as out:
        assert out.vocab_size == 400 and not out.hidden_TD.requires_grad
        first = token_logprob_of(out, batch.target_T.clamp(max=399)).logp
    with engine.gathered_weights():
        pass
    with engine.forward_no_grad(engine, batch, 400) as out:
        assert torch.equal(first, token_logprob_of(out, batch.target_T.clamp(max=399)).logp)
    assert all(torch.equal(w, before[n]) for n, w in weights(engine).items())


def test_a_folder_without_a_model_is_named(talkers, tmp_path):
    with pytest.raises(ValueError, match="model.path = .*no config.json"):
        Engine(config(talkers, tmp_path / "run", "distill", model={"path": str(tmp_path)}))
