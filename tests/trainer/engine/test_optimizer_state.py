"""Weights without moments: a run that is resumed goes on as one that was not interrupted."""

import logging
import pickle
from dataclasses import replace

import pytest
from checkpoint_runs import memory, same, step_folder
from engine_cases import likelihood_loss
from lora_cases import batches, close, save_family, start

from bench.model_families import FAMILIES
from reflux.trainer.engine.manifest import NAME
from reflux.trainer.engine.safe_metadata import read_metadata

pytestmark = pytest.mark.usefixtures("titan_process")
# rank of the adapters, and which weights of the family the forward passes by
CASES = {"jamba": (2, "dt_proj.lora_"), "deepseek_v32": (0, "indexer.")}
SAVED = {"checkpoint": {"interval": 1, "keep_latest_k": 9}}


def settings(rank: int) -> dict:
    return SAVED | {"lora": {"rank": rank, "alpha": 12.0}, "optim": {"lr": 0.01}}


def run(engine, last: int, *, empty: int = 0) -> None:
    """Trains to the step `last`; the first `empty` ones have no token."""
    for step in engine.steps():
        engine.step([[[] if step <= empty else batches()]], likelihood_loss)
        engine.asked_to_stop = step == last


def interrupted(path, folder, over: dict, *, empty: int = 0) -> tuple[dict, dict]:
    """What three steps leave in memory, and three steps with a restart after the first."""
    left = []
    for name, stops in (("whole", (3,)), ("parts", (1, 3))):
        for last in stops:
            engine = start(path, folder / name, **over)
            run(engine, last, empty=empty)
            found = memory(engine)
            close(engine)
        left.append(found)
    return left[0], left[1]


@pytest.mark.parametrize("family", CASES)
def test_weights_that_the_forward_passes_by_are_resumed(
    assets, tmp_path, family, monkeypatch, caplog
):
    small = dict(
        num_key_value_heads=4, head_dim=8, index_topk=4, index_head_dim=16, index_n_heads=2
    )
    monkeypatch.setitem(FAMILIES, "deepseek_v32", small)
    path, (rank, idle) = save_family(family, tmp_path / family, assets), CASES[family]
    with caplog.at_level(logging.WARNING):
        whole, parts = interrupted(path, tmp_path, settings(rank))
    moments = {name.rpartition(".")[0] for name in whole if name.endswith(".exp_avg")}
    assert moments and not any(idle in name for name in moments)
    assert any(idle in name for name in whole), "the test is blind"
    assert same(whole, parts)
    told = [r.getMessage() for r in caplog.records if "got no gradient" in r.getMessage()]
    assert len(told) == (3 if rank else 0), "once in each of the three processes"
    assert all("1 adapters" in t and "layers.0.mamba.dt_proj." in t for t in told)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_checkpoint_before_the_first_token_is_resumed(assets, tmp_path, rank):
    whole, parts = interrupted(assets / "qwen3_tied", tmp_path, settings(rank), empty=1)
    assert same(whole, parts)
    steps = {float(v) for n, v in parts.items() if n.startswith("optimizer.state.") and "step" in n}
    assert steps == {2.0}, "a step without tokens is none of AdamW's"


def test_going_back_to_a_step_before_the_first_token(assets, tmp_path):
    engine = start(assets / "qwen3_tied", tmp_path / "run", **settings(2))
    run(engine, 2, empty=1)
    assert any(optimizer.state for optimizer in engine._trainer.optimizers)
    assert engine.restore(1) == 1
    assert not any(optimizer.state for optimizer in engine._trainer.optimizers)
    close(engine)


def test_a_save_makes_no_moments(assets, tmp_path):
    """torchtitan's step of zeros would count in the bias correction from then on."""
    engine = start(assets / "qwen3_tied", tmp_path / "run", **settings(0))
    engine._trainer.step = 1
    engine.clear_gradients()
    engine._trainer.checkpointer.write(1)
    assert not any(optimizer.state for optimizer in engine._trainer.optimizers)
    close(engine)


@pytest.mark.parametrize("lost", ["exp_avg", "lr"])
def test_a_checkpoint_that_lacks_more_is_refused(assets, tmp_path, lost):
    """A part of a weight's moments, or that it was trained at all."""
    engine = start(assets / "qwen3_tied", tmp_path / "run", **settings(2))
    run(engine, 1, empty=0 if lost == "exp_avg" else 1)
    cfg = engine.cfg
    close(engine)
    folder = step_folder(cfg, 1)
    metadata = read_metadata(folder)
    entries = metadata.state_dict_metadata
    name = next(n for n in entries if n.startswith("optimizer.") and n.endswith(f".{lost}"))
    kept = {n: e for n, e in entries.items() if n != name}
    places = {i: p for i, p in metadata.storage_data.items() if i.fqn != name}
    changed = replace(metadata, state_dict_metadata=kept, storage_data=places)
    (folder / ".metadata").write_bytes(pickle.dumps(changed))
    (folder / NAME).unlink()
    with pytest.raises(ValueError, match=r"whole, but does not fit this run: Missing key.*optimiz"):
        start(assets / "qwen3_tied", tmp_path / "run", **settings(2))
