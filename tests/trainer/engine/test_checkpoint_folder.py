"""What lies in checkpoint/ under which name, and what an inspection says of it."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from reflux.trainer.engine.checkpoint_folder import (
    clear_leftovers,
    inspect,
    listed,
    set_aside,
    sizes_are_right,
    steps_in,
    wrong_files,
)
from reflux.trainer.engine.manifest import Manifest, data_files, digest_and_sync, write_manifest

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def save(folder, *, manifest=True, **entries):
    state = {"weight": torch.arange(1000.0), "train_state.step": 3} | entries
    dcp.save({k: v for k, v in state.items() if v is not None}, checkpoint_id=folder, no_dist=True)
    if manifest:
        files = {name: digest_and_sync(folder / name) for name in data_files(folder)}
        write_manifest(folder, Manifest(3, files))
    return folder


def test_only_finished_folders_count_as_steps(tmp_path):
    for n in (10, 9):
        save(tmp_path / f"step-{n}", manifest=n == 9)
    for name in ("step-11", "step-x", "writing-12", "damaged-13", "given-up-14", "step-15.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__0_0.distcp").write_bytes(b"half")
    assert steps_in(tmp_path) == [9, 10] and steps_in(tmp_path / "nowhere") == []
    assert listed([9, 10]) == "step-9, step-10" and listed([]) == "none"


def test_a_whole_checkpoint_has_no_findings(tmp_path):
    found = inspect(save(tmp_path / "step-3"))
    assert found.damage == () and not found.weights_only and found.has_manifest
    assert set(found.files) == {".metadata", "__0_0.distcp"}
    assert wrong_files(tmp_path / "step-3", found.files) == []
    assert found.bytes > 4000 and sizes_are_right(tmp_path / "step-3")


def test_one_without_a_manifest_is_checked_by_its_description(tmp_path):
    folder = save(tmp_path / "step-3", manifest=False)
    found = inspect(folder)
    assert found.damage == () and not found.has_manifest and sizes_are_right(folder)
    file = folder / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:100])
    assert "100 bytes" in inspect(folder).damage[0]


def test_weights_alone_are_told_from_everything(tmp_path):
    assert inspect(save(tmp_path / "a", **{"train_state.step": None})).weights_only
    (tmp_path / "b").mkdir()
    save_file({"weight": torch.ones(3)}, tmp_path / "b" / "model.safetensors")
    found = inspect(tmp_path / "b")
    assert found.weights_only and found.is_hf and found.damage == ()


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "manifest.json"])
@pytest.mark.parametrize("how", ["cut", "removed", "empty"])
def test_damage_to_any_file_is_found(tmp_path, name, how):
    file = save(tmp_path / "step-3") / name
    if how == "removed":
        file.unlink()
    else:
        file.write_bytes(b"" if how == "empty" else file.read_bytes()[:-7])
    found = inspect(tmp_path / "step-3")
    if (name, how) == ("manifest.json", "removed"):
        assert not found.damage and not found.has_manifest
        return
    assert found.damage and name in found.damage[0]
    assert not sizes_are_right(tmp_path / "step-3")


def test_names_aside_are_never_taken_twice(tmp_path):
    for _ in range(3):
        save(tmp_path / "step-3")
        set_aside(tmp_path, 3, "damaged")
    assert {p.name for p in tmp_path.iterdir()} == {"damaged-3", "damaged-3-2", "damaged-3-3"}


def test_leftovers_go_and_everything_else_stays(tmp_path):
    stay = {"step-3", "damaged-2", "given-up-4"}
    for name in stay | {"writing-5", "deleting-1"}:
        save(tmp_path / name)
    clear_leftovers(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == stay
