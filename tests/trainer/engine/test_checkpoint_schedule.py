"""When a checkpoint is written: a step that asks for it, the last one, an interrupted one."""

import pytest
from checkpoint_runs import make_config, memory, names, opened, same, take_steps
from engine_cases import likelihood_loss, samples

from reflux.trainer.data.batch import pack

pytestmark = pytest.mark.usefixtures("titan_process")


@pytest.mark.parametrize("more", [{}, {"async_mode": "async"}])
@pytest.mark.parametrize("option", ["last_save_model_only", "weights_only_at_end"])
def test_a_checkpoint_that_a_step_asks_for_is_not_the_last_one(talkers, tmp_path, option, more):
    """It holds everything, once and with the notes of the step's end, and takes none away."""
    cfg = make_config(talkers, tmp_path / "run", 5, interval=2, **{option: True}, **more)
    with opened(cfg) as engine:
        for step in engine.steps():
            if step == 4:
                break
            engine.step([[pack(samples(), tokens=99, seq_len=64)]], likelihood_loss)
            if step > 1:
                engine.save_this_step()
            engine.notes["answer"] = float(step)
            wanted = memory(engine)
    assert names(cfg) == ["step-2", "step-3"]
    with opened(cfg) as engine:
        assert engine.resumed_step == 3 and same(memory(engine), wanted)


def test_a_step_that_is_due_and_asked_for_is_saved_as_the_run_saves(talkers, tmp_path, monkeypatch):
    """Asynchronously where it is told so; one that is not due is written at once."""
    cfg = make_config(talkers, tmp_path / "run", 3, interval=2, async_mode="async")
    with opened(cfg) as engine:
        checkpointer, at_once = engine._trainer.checkpointer, []
        write = checkpointer.write
        monkeypatch.setattr(
            checkpointer, "write", lambda n, **x: (at_once.append(n), write(n, **x))
        )
        for _ in engine.steps():
            engine.step([[pack(samples(), tokens=99, seq_len=64)]], likelihood_loss)
            engine.save_this_step()
    assert at_once == [1, 3] and names(cfg) == ["step-1", "step-2", "step-3"]


def test_the_last_step_is_written_once_whoever_asks(talkers, tmp_path):
    cfg = make_config(talkers, tmp_path / "run", 2, interval=100)
    with opened(cfg) as engine:
        for _ in engine.steps():
            engine.step([[pack(samples(), tokens=99, seq_len=64)]], likelihood_loss)
            engine.save_this_step()
        engine.checkpoint()
    assert names(cfg) == ["step-1", "step-2"]


def test_an_interrupted_run_saves_everything_whatever_the_last_one_holds(talkers, tmp_path):
    cfg = make_config(talkers, tmp_path / "run", 5, interval=100, weights_only_at_end=True)
    with opened(cfg) as engine:
        wanted = take_steps(engine, last=2)
    with opened(cfg) as engine:
        assert engine.resumed_step == 2 and same(memory(engine), wanted[2])
