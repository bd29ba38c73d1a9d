"""Checkpoints that recover: written whole, verified, taken from the newest whole one, retained."""

import json
import logging
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoint_runs import (
    cut,
    flip,
    make_config,
    memory,
    names,
    opened,
    same,
    step_folder,
    take_steps,
)
from full_disk import limited_files, small_disk
from payloads import PAYLOADS
from safetensors import safe_open

from reflux.trainer.disk_space import DiskError
from reflux.trainer.engine.checkpoint_folder import steps_in
from reflux.trainer.engine.manifest import NAME, digest_and_sync, read_manifest
from reflux.trainer.engine.safe_metadata import read_metadata

pytestmark = pytest.mark.usefixtures("titan_process")
DATA = "__0_0.distcp"


@pytest.fixture(scope="module")
def made(talkers, titan_process, tmp_path_factory):
    """A run of three saved steps, and what each left in memory."""
    cfg = make_config(talkers, tmp_path_factory.mktemp("made") / "run")
    with opened(cfg) as engine:
        return cfg, take_steps(engine)


@pytest.fixture
def run(made, tmp_path):
    """A copy of it that may be damaged."""
    shutil.copytree(made[0].folder, tmp_path / "run")
    return replace(made[0], folder=str(tmp_path / "run"))


@pytest.fixture
def told(caplog):
    """What the engine said in words."""
    caplog.set_level(logging.WARNING)
    return lambda: [r.getMessage() for r in caplog.records if "reflux" in r.name]


# --- what is written


def test_every_file_is_in_the_manifest_with_its_hash(made):
    folder = step_folder(made[0], 2)
    manifest = read_manifest(folder)
    assert set(manifest.files) == {".metadata", DATA} and manifest.step == 2
    for name, digest in manifest.files.items():
        assert digest_and_sync(folder / name) == digest
    assert names(made[0]) == ["step-1", "step-2", "step-3"]


def test_the_newest_whole_checkpoint_restores_everything(made, run, told):
    with opened(run) as engine:
        assert engine.resumed_step == 3 and same(memory(engine), made[1][3])
    assert told() == [] and names(run) == ["step-1", "step-2", "step-3"]


def test_random_numbers_go_on_where_they_were(run):
    with opened(replace(run, steps=4)) as engine:
        next(engine.steps())
        wanted = torch.rand(3)
        engine._trainer.checkpointer.write(4)
        assert not torch.equal(torch.rand(3), wanted)
    saved = {"random": {"cpu-0": torch.zeros_like(torch.get_rng_state())}}
    dcp.load(saved, checkpoint_id=step_folder(run, 3), no_dist=True)
    torch.set_rng_state(saved["random"]["cpu-0"])
    assert torch.equal(torch.rand(3), wanted)


def test_a_checkpoint_of_an_older_version_loads_with_a_warning(made, run, told):
    """No manifest, no random state, named as torchtitan names it."""
    with opened(replace(run, steps=4)) as engine:
        take_steps(engine, 3)
        checkpointer = engine._trainer.checkpointer
        states = {
            k: v for k, v in checkpointer._flattened_model_states_sd().items() if k != "random"
        }
        dcp.save(states, checkpoint_id=step_folder(run, 9))
        wanted = memory(engine)
    with opened(replace(run, steps=9)) as engine:
        assert engine.resumed_step == engine._trainer.step and same(memory(engine), wanted)
    assert any("step-9: no manifest" in line for line in told())


# --- damage: the newest whole one is taken, in words

DAMAGE = {
    "half of the data": lambda f: cut(f / DATA, 0.5),
    "no data": lambda f: (f / DATA).unlink(),
    "half of the description": lambda f: cut(f / ".metadata", 0.5),
    "no description": lambda f: (f / ".metadata").unlink(),
    "half of the manifest": lambda f: cut(f / NAME, 0.5),
    "empty manifest": lambda f: (f / NAME).write_bytes(b""),
    "a bit of the data": lambda f: flip(f / DATA, 0.7),
    "a bit of the description": lambda f: flip(f / ".metadata", 0.3),
    "data of another step": lambda f: shutil.copy(f.parent / "step-1" / DATA, f / DATA),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_renamed_and_the_one_before_is_used(made, run, told, damage):
    DAMAGE[damage](step_folder(run, 3))
    with opened(run) as engine:
        assert engine.resumed_step == 2 and same(memory(engine), made[1][2])
        (message,) = engine.resume_messages
    assert told() == [message]
    assert "step-3 is damaged: " in message and message.endswith(
        "It is renamed to damaged-3. The run goes on from step 2"
    )
    assert names(run) == ["damaged-3", "step-1", "step-2"]


@pytest.mark.parametrize("where", [0.01, 0.2, 0.4, 0.6, 0.8, 0.99])
def test_a_flipped_bit_of_the_optimizers_state_is_found(made, run, where):
    folder = step_folder(run, 3)
    entries = [
        info
        for index, info in read_metadata(folder).storage_data.items()
        if index.fqn.startswith("optimizer.state.") and index.fqn.endswith("exp_avg_sq")
    ]
    entry = entries[int(where * len(entries))]
    data = bytearray((folder / DATA).read_bytes())
    data[entry.offset + int(where * entry.length)] ^= 64
    (folder / DATA).write_bytes(data)
    with opened(run) as engine:
        assert engine.resumed_step == 2 and same(memory(engine), made[1][2])
        assert f"{DATA} was changed after it was written" in engine.resume_messages[0]


def test_the_run_goes_on_equal_after_damage(made, run):
    cut(step_folder(run, 3) / DATA, 0.9)
    with opened(run) as engine:
        assert same(take_steps(engine)[3], made[1][3])
    assert names(run) == ["damaged-3", "step-1", "step-2", "step-3"]


def test_several_damaged_ones_are_all_named(made, run):
    for step in (2, 3):
        flip(step_folder(run, step) / DATA, 0.1 * step)
    with opened(run) as engine:
        assert engine.resumed_step == 1 and same(memory(engine), made[1][1])
        assert ["step-3" in m or "step-2" in m for m in engine.resume_messages] == [True, True]
    assert names(run) == ["damaged-2", "damaged-3", "step-1"]


def test_where_none_is_whole_nothing_is_changed_and_nothing_started_over(run):
    for step in (1, 2, 3):
        cut(step_folder(run, step) / DATA, 0.3)
    with pytest.raises(
        ValueError, match="no checkpoint to go on from: step-3 is damaged: .*step-1"
    ):
        with opened(run):
            pass
    assert names(run) == ["step-1", "step-2", "step-3"]


def test_the_step_that_was_asked_for_has_no_substitute(run):
    cfg = replace(run, titan={**run.titan, "checkpoint": {"load_step": 2, "keep_latest_k": 9}})
    flip(step_folder(run, 2) / DATA, 0.5)
    with pytest.raises(ValueError, match="step-2 is damaged"), opened(cfg):
        pass
    missing = replace(run, titan={**run.titan, "checkpoint": {"load_step": 8, "keep_latest_k": 9}})
    with pytest.raises(ValueError, match="load_step = 8: .*step-1, step-2, step-3"):
        with opened(missing):
            pass
    assert names(run) == ["step-1", "step-2", "step-3"]


def test_fewer_steps_than_were_made_are_told(run):
    with pytest.raises(ValueError, match="steps = 2, .*holds step-3.*steps = 3 .*load_step = 2"):
        with opened(replace(run, steps=2)):
            pass
    assert names(run) == ["step-1", "step-2", "step-3"]


def test_going_back_on_purpose_gives_up_what_came_later(made, run):
    cfg = replace(run, titan={**run.titan, "checkpoint": {"load_step": 1, "interval": 1}})
    with opened(cfg) as engine:
        assert same(memory(engine), made[1][1])
    assert names(run) == ["given-up-2", "given-up-3", "step-1"]


def test_every_update_is_saved_and_each_can_be_restored(made, run):
    with opened(run) as engine:
        assert engine.restore(2) == 2 and same(memory(engine), made[1][2])
        assert names(run) == ["given-up-3", "step-1", "step-2"]
        assert engine.restore(0) == 0
    assert names(run) == ["given-up-1", "given-up-2", "given-up-3"]


def test_restoring_passes_over_damage(made, run):
    with opened(run) as engine:
        flip(step_folder(run, 2) / DATA, 0.5)
        assert engine.restore(2) == 1 and same(memory(engine), made[1][1])
    assert names(run) == ["damaged-2", "given-up-3", "step-1"]


# --- what a checkpoint says is never done


def reseal(folder: Path) -> None:
    """The manifest of whoever planted something."""
    table = json.loads((folder / NAME).read_text())
    for name in table["files"]:
        digest = digest_and_sync(folder / name)
        table["files"][name] = {"bytes": digest.bytes, "sha256": digest.sha256}
    (folder / NAME).write_text(json.dumps(table))


@pytest.mark.parametrize("with_manifest", [True, False])
@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_payload_in_the_description_does_not_run(run, tmp_path, payload, with_manifest):
    mark, folder = tmp_path / "mark", step_folder(run, 3)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data = {"x": PAYLOADS[payload](mark)}
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    reseal(folder)
    if not with_manifest:
        (folder / NAME).unlink()
    with opened(run) as engine:
        assert engine.resumed_step == 2 and "which no checkpoint needs" in engine.resume_messages[0]
    assert not mark.exists()


@pytest.mark.parametrize("name", ["train_state.step", "dataloader.none", "lr_scheduler.last_epoch"])
def test_a_payload_in_an_entry_does_not_run(run, tmp_path, name):
    mark, folder = tmp_path / "mark", step_folder(run, 3)
    metadata = read_metadata(folder)
    entry = next(info for index, info in metadata.storage_data.items() if index.fqn == name)
    torch.save(PAYLOADS["os.system"](mark), tmp_path / "planted")
    planted = (tmp_path / "planted").read_bytes()
    entry.relative_path, entry.offset, entry.length = "planted", 0, len(planted)
    (folder / "planted").write_bytes(planted)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    reseal(folder)
    with opened(run) as engine:
        assert engine.resumed_step == 2 and "not plain data" in engine.resume_messages[0]
    assert not mark.exists()


# --- saving less


def test_without_saving_the_weights_are_still_the_models(talkers, tmp_path):
    cfg = make_config(talkers, tmp_path / "run", enable=False)
    with opened(cfg) as engine, opened_weights(talkers / "policy") as wanted:
        name = next(iter(wanted.keys()))
        assert any(torch.equal(wanted.get_tensor(name), w) for w in weights_of(engine))
        take_steps(engine)
    assert not (tmp_path / "run" / "checkpoint").exists()


def opened_weights(folder):
    return safe_open(folder / "model.safetensors", "pt")


def weights_of(engine):
    return [p.full_tensor() for p in engine.model.state_dict().values()]


def test_without_saving_a_run_still_resumes_from_what_is_there(made, run):
    cfg = replace(run, steps=4, titan={**run.titan, "checkpoint": {"enable": False}})
    flip(step_folder(run, 3) / DATA, 0.5)
    with opened(cfg) as engine:
        assert engine.resumed_step == 2 and same(memory(engine), made[1][2])
        take_steps(engine)
    assert names(run) == ["step-1", "step-2", "step-3"], "load_only renames nothing either"


@pytest.mark.parametrize("option", ["last_save_model_only", "weights_only_at_end"])
def test_the_last_checkpoint_can_hold_the_weights_alone(made, talkers, tmp_path, option):
    cfg = make_config(talkers, tmp_path / "run", **{option: True})
    with opened(cfg) as engine:
        wanted = take_steps(engine)[3]
    full, last = step_folder(made[0], 3) / DATA, step_folder(cfg, 3) / DATA
    assert last.stat().st_size < 0.4 * full.stat().st_size
    left = ["step-1", "step-2", "step-3"] if option == "last_save_model_only" else ["step-3"]
    assert names(cfg) == left
    with opened(cfg) as engine:  # nothing is left to train: it can be exported again
        assert engine.resumed_step == 3 and list(engine.steps()) == []
        assert all(
            torch.equal(w, wanted[n]) for n, w in memory(engine).items() if n in weights(wanted)
        )


def weights(left: dict) -> set[str]:
    return {name for name in left if not name.startswith(("optimizer.", "lr.", "notes"))}


def test_weights_alone_are_not_trained_further(made, talkers, tmp_path):
    cfg = make_config(talkers, tmp_path / "run", weights_only_at_end=True)
    with opened(cfg) as engine:
        take_steps(engine)
    with pytest.raises(ValueError, match="step-3 holds the weights alone .*to step 5.*steps = 3"):
        with opened(replace(cfg, steps=5)):
            pass
    cfg = make_config(talkers, tmp_path / "kept", last_save_model_only=True)
    with opened(cfg) as engine:
        wanted = take_steps(engine)
    with opened(replace(cfg, steps=5)) as engine:
        assert engine.resumed_step == 2 and same(memory(engine), wanted[2])
        assert same(take_steps(engine)[3], wanted[3])
    assert names(cfg) == ["given-up-3", *(f"step-{n}" for n in range(1, 6))]


def test_the_last_checkpoint_in_hugging_face_format(talkers, tmp_path):
    cfg = make_config(talkers, tmp_path / "run", weights_only_at_end=True, last_save_in_hf=True)
    with opened(cfg) as engine:
        wanted = take_steps(engine)[3]
    assert names(cfg) == ["step-3"] and list(step_folder(cfg, 3).glob("*.safetensors"))
    with opened(cfg) as engine:
        assert engine.resumed_step == 3
        assert all(
            torch.equal(w, wanted[n]) for n, w in memory(engine).items() if n in weights(wanted)
        )


# --- asynchronous saves


def test_asynchronous_saves_are_sealed_too(made, talkers, tmp_path):
    cfg = make_config(talkers, tmp_path / "run", async_mode="async")
    with opened(cfg) as engine:
        assert same(take_steps(engine)[3], made[1][3])
    assert names(cfg) == ["step-1", "step-2", "step-3"]
    assert all(read_manifest(step_folder(cfg, n)) for n in (1, 2, 3))
    shutil.rmtree(step_folder(cfg, 3))
    with opened(cfg) as engine:
        assert engine.resumed_step == 2 and same(memory(engine), made[1][2])


# --- retention


def test_retention_keeps_the_newest_and_leaves_nothing_behind(talkers, tmp_path):
    cfg = make_config(talkers, tmp_path / "run", 6, keep_latest_k=2)
    with opened(cfg) as engine:
        take_steps(engine)
    assert names(cfg) == ["step-5", "step-6"]


@pytest.mark.parametrize(
    "wanted, left",
    [
        ((1,), [1, 5, 6]),
        ((4, 0), [4, 5, 6]),
        ((6, 9), [5, 6]),
        ((0,), [5, 6]),
        ((2, 3), [2, 3, 5, 6]),
    ],
)
def test_retention_leaves_what_a_guard_may_go_back_to(talkers, tmp_path, wanted, left):
    cfg = make_config(talkers, tmp_path / "run", 6, keep_latest_k=2)
    with opened(cfg) as engine:
        engine.steps_to_keep = lambda: wanted
        take_steps(engine)
    assert names(cfg) == [f"step-{n}" for n in left]


def test_of_a_step_without_a_checkpoint_retention_leaves_the_one_before(talkers, tmp_path):
    cfg = make_config(talkers, tmp_path / "run", 12, interval=3, keep_latest_k=2)
    with opened(cfg) as engine:
        engine.steps_to_keep = lambda: [5]
        take_steps(engine)
    assert names(cfg) == ["step-12", "step-3", "step-9"]


def test_retention_counts_whole_ones_only(run):
    """Two of three are cut: the whole one is not deleted for their sake."""
    home = Path(run.folder) / "checkpoint"
    cfg = replace(
        run, steps=4, titan={**run.titan, "checkpoint": {"interval": 1, "keep_latest_k": 2}}
    )
    with opened(cfg) as engine:
        for step in (2, 3):
            cut(step_folder(run, step) / DATA, 0.5)
        take_steps(engine)
    assert steps_in(home) == [1, 2, 3, 4]


def test_where_the_next_one_does_not_fit_retention_makes_room_first(talkers, tmp_path, made):
    """The disk holds two checkpoints, and two are to be kept: the third has to fit all the same."""
    size = sum(p.stat().st_size for p in step_folder(made[0], 3).iterdir())
    with small_disk(tmp_path / "disk", 2.3 * size / 2**20) as disk:
        cfg = make_config(talkers, disk / "run", 5, keep_latest_k=2)
        with opened(cfg) as engine:
            take_steps(engine)
        assert names(cfg) == ["step-4", "step-5"]


def test_room_is_not_made_of_what_a_guard_may_go_back_to(talkers, tmp_path, made):
    """Three fit, and beside the one to go back to one stays."""
    size = sum(p.stat().st_size for p in step_folder(made[0], 3).iterdir())
    with small_disk(tmp_path / "disk", 3.3 * size / 2**20) as disk:
        cfg = make_config(talkers, disk / "run", 5, keep_latest_k=2)
        with opened(cfg) as engine:
            engine.steps_to_keep = lambda: [1]
            take_steps(engine)
        assert names(cfg) == ["step-1", "step-4", "step-5"]


# --- saves that fail


@pytest.mark.parametrize("kilobytes", [0.05, 3, 200, 700])
def test_a_save_without_space_is_told_and_takes_nothing_away(made, run, kilobytes):
    cfg = replace(run, steps=4)
    with opened(cfg) as engine:
        with limited_files(int(kilobytes * 1000)), pytest.raises(DiskError) as caught:
            take_steps(engine)
    words = str(caught.value)
    assert words.startswith(f"no space left in {run.folder}/checkpoint: the checkpoint of step 4")
    assert "Kept: step-1, step-2, step-3, whole." in words
    assert names(run) == ["step-1", "step-2", "step-3"], "the unfinished one gives its space back"
    with opened(cfg) as engine:
        assert engine.resumed_step == 3 and same(memory(engine), made[1][3])


def test_a_save_that_fails_otherwise_is_told_too(run, monkeypatch):
    def broken(*args, **kwargs):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("reflux.trainer.engine.checkpoints.digest_and_sync", broken)
    with opened(replace(run, steps=4)) as engine:
        with pytest.raises(
            DiskError, match="step 4 cannot be written .*Input/output.*Kept: step-1"
        ):
            take_steps(engine)
    assert names(run) == ["step-1", "step-2", "step-3"]


def test_what_a_killed_save_left_is_no_checkpoint(made, run):
    home = Path(run.folder) / "checkpoint"
    for name in ("writing-4", "deleting-0"):
        shutil.copytree(step_folder(run, 3), home / name)
    cut(home / "writing-4" / DATA, 0.5)
    with opened(replace(run, steps=4)) as engine:
        assert engine.resumed_step == 3
        take_steps(engine)
    assert names(run) == ["step-1", "step-2", "step-3", "step-4"]


def test_a_checkpoint_of_another_model_is_told(run, talkers):
    cfg = replace(
        run,
        model=replace(run.model, path=str(talkers / "teacher")),
        on_changed_input="accept",
    )
    with pytest.raises(ValueError, match="step-3 is whole, but does not fit this run"):
        with opened(cfg):
            pass
    assert names(run) == ["step-1", "step-2", "step-3"]
