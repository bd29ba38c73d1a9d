"""Whatever ends a step, the one before it is saved: weights, optimizer, schedule, notes, random
state; and nothing is saved of a step that was moving weights.
"""

import pytest
import torch
from checkpoint_runs import make_config, memory, names, opened, same, step_folder
from engine_cases import likelihood_loss, samples
from full_disk import limited_files

from reflux.trainer.data.batch import pack

pytestmark = pytest.mark.usefixtures("titan_process")


@pytest.fixture
def cfg(talkers, tmp_path):
    """A run that would save nothing before its end."""
    return make_config(talkers, tmp_path / "run", 9, interval=100)


def run_until(engine, fails_at: int, fail) -> dict:
    """Steps until `fail(engine)` raises in step `fails_at`. Returns what the last whole one left,
    after its random numbers.
    """
    left: dict = {}
    with engine.keeps_last_step():
        for step in engine.steps():
            engine.notes["seen"] = float(step)  # as a guard does while it scores
            torch.rand(step)
            if step == fails_at:
                fail(engine)
            engine.step([[pack(samples(), tokens=99, seq_len=64)]], likelihood_loss)
            left |= memory(engine) | {"random": torch.get_rng_state().clone()}
            engine.left = left
    return left


def raising(error: BaseException):
    def fail(engine):
        raise error

    return fail


ERRORS = [
    ValueError("row 17 has no prompt"),
    KeyError("answer"),
    torch.OutOfMemoryError("CUDA out of memory"),
    KeyboardInterrupt(),
    SystemExit(3),
    AssertionError(),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_the_last_finished_step_is_saved_before_the_error_is_told(cfg, error):
    with opened(cfg) as engine:
        with pytest.raises(type(error)) as caught:
            run_until(engine, 4, raising(error))
        left = engine.left
    assert caught.value.__notes__ == [f"step 3 is saved in {cfg.folder}"]
    assert names(cfg) == ["step-3"]
    with opened(cfg) as engine:
        assert engine.resumed_step == 3 and engine.notes == {"seen": 3.0}
        assert same(memory(engine) | {"random": left["random"]}, left)
        next(engine.steps())
        assert torch.equal(torch.get_rng_state(), left["random"])


def test_a_run_goes_on_from_there_as_if_nothing_had_been(cfg, talkers, tmp_path):
    whole = make_config(talkers, tmp_path / "whole", 9, interval=100)
    with opened(whole) as engine:
        wanted = run_until(engine, 0, None)
    with opened(cfg) as engine, pytest.raises(ValueError):
        run_until(engine, 6, raising(ValueError("bad row")))
    with opened(cfg) as engine:
        assert same(run_until(engine, 0, None), wanted)


def failing(cfg, *, closes: bool) -> None:
    """Step 2 is made, and noted on; then the run fails, before it is closed or after."""
    with opened(cfg) as engine, pytest.raises(ValueError), engine.keeps_last_step():
        for step in engine.steps():
            if step == 3:
                raise ValueError("bad row")
            stats = engine.step([[pack(samples(), tokens=99, seq_len=64)]], likelihood_loss)
            engine.measured(stats | {"length": 7.0})
            engine.notes["seen"] = float(step)  # as a guard does
            if step == 2 and not closes:
                raise ValueError("the grader went away")


def test_what_guards_note_after_the_updates_is_saved_too(cfg):
    failing(cfg, closes=True)
    with opened(cfg) as engine:
        assert (engine.resumed_step, engine.notes, engine.to_close) == (2, {"seen": 2.0}, None)


def test_a_step_that_is_not_closed_is_saved_with_its_numbers(cfg):
    """And with the notes of before, so that who closes it does so once."""
    failing(cfg, closes=False)
    with opened(cfg) as engine:
        assert (engine.resumed_step, engine.notes) == (2, {"seen": 1.0})
        assert engine.to_close["length"] == 7.0 and engine.to_close["tokens"] > 0
        next(engine.steps())
        engine._trainer.checkpointer.write(3)
    with opened(cfg) as engine:
        assert engine.to_close is None


@pytest.mark.parametrize("where", ["optimizers", "lr_schedulers"])
def test_a_step_that_was_moving_weights_is_not_saved(cfg, monkeypatch, where):
    with opened(cfg) as engine:
        part = getattr(engine._trainer, where)

        def no_memory(*_):
            raise MemoryError("in the middle")

        def breaks(engine):
            monkeypatch.setattr(part, "step", no_memory)

        with pytest.raises(MemoryError):
            run_until(engine, 4, breaks)
    assert not (step_folder(cfg, 1).parent).exists()


def test_an_error_in_the_first_step_saves_nothing(cfg):
    with opened(cfg) as engine, pytest.raises(ValueError):
        run_until(engine, 1, raising(ValueError("bad row")))
    assert not step_folder(cfg, 1).parent.exists()


def test_what_is_saved_already_is_not_saved_again(talkers, tmp_path):
    cfg = make_config(talkers, tmp_path / "run", 9, interval=3)
    with opened(cfg) as engine, pytest.raises(ValueError):
        run_until(engine, 4, raising(ValueError("bad row")))
    assert names(cfg) == ["step-3"]


def test_saving_that_is_off_stays_off(talkers, tmp_path):
    cfg = make_config(talkers, tmp_path / "run", 9, enable=False)
    with opened(cfg) as engine, pytest.raises(ValueError):
        run_until(engine, 4, raising(ValueError("bad row")))
    assert not step_folder(cfg, 1).parent.exists()


def test_a_full_disk_does_not_hide_the_error(cfg):
    with opened(cfg) as engine:

        def fails(engine):
            raise ValueError("bad row")

        with limited_files(100_000), pytest.raises(ValueError, match="bad row") as caught:
            run_until(engine, 4, fails)
    (note,) = caught.value.__notes__
    assert note.startswith("the last finished step is not saved: no space left in ")
    assert names(cfg) == []


def test_after_a_restore_there_is_nothing_to_save(talkers, tmp_path):
    cfg = make_config(talkers, tmp_path / "run", 9, interval=2)
    with opened(cfg) as engine:

        def restores(engine):
            assert engine.restore(2) == 2
            raise ValueError("afterwards")

        with pytest.raises(ValueError, match="afterwards"):
            run_until(engine, 4, restores)
    assert names(cfg) == ["step-2"]


def test_an_error_of_which_nothing_may_be_written(cfg):
    with opened(cfg) as engine:
        with pytest.raises(RuntimeError):
            with engine.keeps_last_step(unless=RuntimeError):
                for step in engine.steps():
                    if step == 3:
                        raise RuntimeError("the folder has another owner")
                    engine.step([[pack(samples(), tokens=99, seq_len=64)]], likelihood_loss)
    assert not step_folder(cfg, 1).parent.exists()


def test_the_state_can_be_read_beside_the_main_thread(cfg):
    with opened(cfg) as engine:
        assert engine._trainer.checkpointer.weights_keep_their_storage()
