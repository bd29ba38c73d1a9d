"""Every update is saved, and each can be restored."""

from pathlib import Path

import torch
from engine_cases import likelihood_loss, samples, whole_weights

from reflux.trainer.data.batch import pack


def test_every_update_is_saved_and_each_can_be_restored(engine):
    start, after = whole_weights(engine), {}
    for step in engine.steps():
        engine.step(pack(samples(), tokens=99, seq_len=64), likelihood_loss)
        engine.notes["answer"] = float(step)
        after[step] = whole_weights(engine)
    assert engine.restore(2) == 2 and engine.notes["answer"] == 2.0
    folder = Path(engine.cfg.folder) / "checkpoint"
    assert not (folder / "step-3").exists(), "a resumed run would start from step 3"
    assert (folder / "given-up-3").exists()
    assert all(torch.equal(w, after[2][n]) for n, w in whole_weights(engine).items())
    assert engine.restore(0) == 0
    assert all(torch.equal(w, start[n]) for n, w in whole_weights(engine).items())
