import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reflux.trainer.matrix import read_matrix, run_matrix

ROOT = Path(__file__).parents[2]
TOY = """
import json, pathlib, sys
def main(arguments):
    out = pathlib.Path(arguments[arguments.index("--out") + 1])
    word = arguments[0]
    with open(out.parent / "order.txt", "a") as f:
        f.write(word + "\\n")
    return 3 if word == "bad" else 0
"""
TABLE = """
folder = "{folder}"
seeds = [0, 1]
parallel = 2
[[cell]]
name = "a"
module = "toy_cell"
arguments = ["a"]
[[cell]]
name = "b-{{x}}"
each = {{ x = ["1", "2"] }}
after = ["a"]
module = "toy_cell"
arguments = ["b{{x}}"]
labels = {{ role = "student", attack = "{{x}}" }}
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    (tmp_path / "toy_cell.py").write_text(TOY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "m.toml").write_text(TABLE.format(folder=tmp_path / "runs"))
    return tmp_path


def test_combinations_and_seeds_are_written_out(toy):
    _, cells = read_matrix(toy / "m.toml", {})
    assert [c.name for c in cells] == ["a@0", "b-1@0", "b-2@0", "a@1", "b-1@1", "b-2@1"]
    assert cells[1].after == ("a@0",) and cells[5].labels == {
        "role": "student",
        "attack": "2",
        "seed": "1",
    }


def test_a_matrix_may_stand_on_another(toy):
    """Cells behind the base's, config files relative to the file that names them, other keys over
    the base's.
    """
    (toy / "more").mkdir()
    (toy / "more" / "n.toml").write_text("""base = "../m.toml"
title = "More"
seeds = [3]
[[cell]]
name = "c"
after = ["b-2"]
config = "x.toml"
[cell.set]
"distill.more_teachers" = ["{folder}/t", "u"]
""")
    table, cells = read_matrix(toy / "more" / "n.toml", {})
    assert [c.name for c in cells] == ["a@3", "b-1@3", "b-2@3", "c@3"] and table["title"] == "More"
    assert cells[0].folder.parent == cells[3].folder.parent
    config = cells[3].arguments[cells[3].arguments.index("--config") + 1]
    assert os.path.normpath(config) == os.path.relpath(toy / "more" / "x.toml")
    assert f'distill.more_teachers=["{cells[3].folder.parent}/t", "u"]' in cells[3].arguments
    (toy / "m.toml").write_text('base = "more/n.toml"\n' + (toy / "m.toml").read_text())
    with pytest.raises(ValueError, match="none that leads back here"):
        read_matrix(toy / "more" / "n.toml", {})


def test_a_matrix_may_stand_on_several_that_share_cells(toy):
    (toy / "more").mkdir()
    for name in ("left", "right"):
        (toy / "more" / f"{name}.toml").write_text(
            f'base = "../m.toml"\ntitle = "{name}"\n[[cell]]\nname = "{name}"\nmodule = "toy_cell"\n'
        )
    (toy / "all.toml").write_text(
        'base = ["more/left.toml", "more/right.toml"]\nseeds = [0]\n[[cell]]\nname = "c"\nmodule = "toy_cell"\n'
    )
    table, cells = read_matrix(toy / "all.toml", {})
    assert [c.name for c in cells] == [
        "a@0",
        "b-1@0",
        "b-2@0",
        "left@0",
        "right@0",
        "c@0",
    ] and table["title"] == "right"
    (toy / "all.toml").write_text('base = ["m.toml", 3]\n')
    with pytest.raises(ValueError, match="want the name of another matrix file"):
        read_matrix(toy / "all.toml", {})


def test_a_name_alone_keeps_its_type(toy):
    """`each` may hold numbers: "{eta}" is the number, "x-{eta}" a text with it, a label always a
    text.
    """
    (toy / "e.toml").write_text(f"""folder = "{toy / "runs"}"
seeds = [0]
[[cell]]
name = "x-{{eta}}"
each = {{ eta = [0.1, 3.0] }}
config = "x.toml"
labels = {{ eta = "-{{eta}}", strength = "{{eta}}" }}
[cell.set]
"calibration.strength" = "{{eta}}"
""")
    _, cells = read_matrix(toy / "e.toml", {})
    assert [c.name for c in cells] == ["x-0.1@0", "x-3.0@0"] and cells[1].labels == {
        "eta": "-3.0",
        "strength": "3.0",
        "seed": "0",
    }
    assert "calibration.strength=0.1" in cells[0].arguments


def test_overrides_win(toy):
    table, cells = read_matrix(toy / "m.toml", {"seeds": [7]})
    assert table["seeds"] == [7] and {c.labels["seed"] for c in cells} == {"7"}


def test_a_cell_that_waits_for_nobody_is_refused(toy):
    path = toy / "m.toml"
    path.write_text(path.read_text().replace('after = ["a"]', 'after = ["z"]'))
    with pytest.raises(ValueError, match="waits for z@0"):
        read_matrix(path, {})


def test_the_quickstart_is_complete():
    _, cells = read_matrix(ROOT / "configs/quickstart.toml", {"seeds": [0]})
    for cell in cells:
        if not cell.module:
            from reflux.trainer.config.loader import load

            flags = cell.arguments
            sets = [flags[i + 1] for i, x in enumerate(flags) if x == "--set"]
            load(flags[flags.index("--config") + 1], tuple(sets))
    labels = {
        (c.labels.get("teacher"), c.labels.get("attack"))
        for c in cells
        if c.labels.get("role") == "student"
    }
    assert len(labels) == 4 * 7


def test_prerequisites_run_first_done_cells_are_skipped_and_failures_stop_only_their_followers(toy):
    table, cells = read_matrix(toy / "m.toml", {"seeds": [0]})
    assert run_matrix(cells, 2) == []
    order = (toy / "runs/seed-0/order.txt").read_text().split()
    assert order[0] == "a" and sorted(order[1:]) == ["b1", "b2"]
    (cells[1].folder / "summary.json").unlink()
    assert run_matrix(cells, 2) == []
    # only what was missing ran again
    assert (toy / "runs/seed-0/order.txt").read_text().split()[3:] == ["b1"]

    path = toy / "bad.toml"
    path.write_text(
        (toy / "m.toml").read_text().replace('arguments = ["a"]', 'arguments = ["bad"]')
    )
    _, cells = read_matrix(path, {"seeds": [5]})
    assert sorted(run_matrix(cells, 2)) == ["a@5", "b-1@5", "b-2@5"]
    assert (toy / "runs/seed-5/order.txt").read_text().split() == ["bad"]


def test_ctrl_c_is_passed_on_and_the_next_call_goes_on(toy):
    (toy / "toy_cell.py").write_text(
        TOY.replace("    return 3", "    import time; time.sleep(0.3)\n    return 3")
    )
    env = os.environ | {"PYTHONPATH": str(toy)}
    command = [
        sys.executable,
        "-m",
        "reflux.trainer.matrix",
        str(toy / "m.toml"),
        "--set",
        "seeds=[0]",
        "--set",
        "parallel=1",
    ]
    process = subprocess.Popen(
        command, env=env, cwd=toy, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    order = toy / "runs/seed-0/order.txt"
    for _ in range(600):
        if order.exists() or process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(2)
    assert process.wait(300) == 130, process.stdout.read()
    assert subprocess.run(command, env=env, cwd=toy, capture_output=True).returncode == 0
    assert set(order.read_text().split()) == {"a", "b1", "b2"}
    assert {c["name"] for c in json.loads((toy / "runs/matrix.json").read_text())["cells"]} == {
        "a@0",
        "b-1@0",
        "b-2@0",
    }
