"""What a done cell was made from, against what the matrix says now."""

import hashlib
import json
import os

import pytest

from reflux.trainer.config.loader import load
from reflux.trainer.runs.done_cells import changes
from reflux.trainer.runs.run_folder import save_config

FILE = """
phase = "distill"
steps = 3
optim.lr = 1e-3
[model]
path = "m"
[teacher]
path = "t"
[data]
source = "d.jsonl"
"""


def arguments(config, folder, **sets):
    values = {"folder": f'"{folder}"', "teacher.path": f'"{folder.parent}/teacher/export"', **sets}
    return ("--config", str(config), *(x for k, v in values.items() for x in ("--set", f"{k}={v}")))


@pytest.fixture
def done(tmp_path):
    """(its folder, config file) of a cell that read one file of an earlier one."""
    config, folder = tmp_path / "c.toml", tmp_path / "seed-0" / "student"
    config.write_text(FILE)
    weights = tmp_path / "seed-0" / "teacher" / "export" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"old")
    words = arguments(config, folder)
    save_config(load(words[1], words[3::2]))
    digest = hashlib.sha256(b"old").hexdigest()
    inputs = {"teacher": {"path": str(weights.parent), "files": {weights.name: digest}}}
    (folder / "run.jsonl").write_text(json.dumps({"schema": 1, "inputs": inputs}) + "\n{}\n")
    s = weights.stat()
    known = {str(weights): [s.st_size, s.st_mtime_ns, s.st_ctime_ns, digest]}
    (folder / "inputs.json").write_text(json.dumps({"hashes": known}))
    return folder, config


def test_the_same_settings_and_files_are_no_change(done):
    folder, config = done
    assert changes(folder, "", arguments(config, folder)) == []
    quiet = {"log.quiet": "true", "checkpoint.interval": 7, "on_existing_run": '"resume"'}
    assert changes(folder, "", arguments(config, folder, **quiet)) == []


@pytest.mark.parametrize(
    "sets, name",
    [
        ({"steps": 4}, "steps"),
        ({"seed": 1}, "seed"),
        ({"optim.lr": 2e-3}, "optim.lr"),
        ({"eval.samples": 9}, "eval.samples"),
        ({"teacher.path": '"elsewhere"'}, "teacher.path"),
    ],
)
def test_another_setting_is_named(done, sets, name):
    folder, config = done
    assert changes(folder, "", arguments(config, folder, **sets)) == [name]


def test_parts_in_another_order_are_named(done):
    folder, config = done
    x, y = (f'[data.parts.{name}]\nsource = "{name}.jsonl"\n' for name in "xy")
    head = FILE.partition("[data]")[0]
    config.write_text(head + x + y)
    save_config(load(config, arguments(config, folder)[3::2]))
    assert changes(folder, "", arguments(config, folder)) == []
    config.write_text(head + y + x)
    assert changes(folder, "", arguments(config, folder)) == ["data.parts"]


def test_a_changed_file_of_the_configuration_is_seen(done):
    folder, config = done
    config.write_text(FILE.replace("steps = 3", "steps = 5"))
    assert changes(folder, "", arguments(config, folder)) == ["steps"]


def test_a_matrix_that_lies_elsewhere_now_is_the_same(done, tmp_path):
    folder, config = done
    moved = tmp_path / "moved"
    os.rename(tmp_path / "seed-0", moved)
    assert changes(moved / "student", "", arguments(config, moved / "student")) == []


def test_a_file_that_an_earlier_cell_has_replaced_is_seen(done):
    folder, config = done
    weights = folder.parent / "teacher" / "export" / "model.safetensors"
    os.utime(weights, (1, 1))  # the same bytes at another time, as after a copy
    assert changes(folder, "", arguments(config, folder)) == []
    weights.write_bytes(b"new")
    assert changes(folder, "", arguments(config, folder)) == [f"teacher ({weights})"]
    weights.unlink()  # weights may be deleted once they are used
    assert changes(folder, "", arguments(config, folder)) == []


def test_a_folder_that_does_not_say_what_it_was_made_from_is_taken_as_it_is(tmp_path):
    (tmp_path / "summary.json").write_text("{}")
    assert changes(tmp_path, "some.module", ("--out", str(tmp_path))) == []
    (tmp_path / "c.toml").write_text(FILE)
    assert changes(tmp_path, "", arguments(tmp_path / "c.toml", tmp_path)) == []


def test_a_model_of_the_hub_is_saved_as_its_folder(done):
    folder, config = done
    text = (folder / "config.toml").read_text()
    assert 'path = "m"' in text
    (folder / "config.toml").write_text(text.replace('path = "m"', 'path = "/cache/snapshots/1"'))
    hub = {"model.path": '"someone/a-model"'}
    assert changes(folder, "", arguments(config, folder, **hub)) == []
