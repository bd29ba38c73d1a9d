import os
import re
import tomllib
from pathlib import Path

import pytest
from toy_matrix import write_toy

from reflux.trainer.matrix_file import read_matrix

ROOT = Path(__file__).parents[2]


@pytest.fixture
def toy(tmp_path):
    write_toy(tmp_path)
    return tmp_path


def test_combinations_and_seeds_are_written_out(toy):
    cells = read_matrix(toy / "m.toml", {}).cells
    assert [c.name for c in cells] == ["a@0", "b-1@0", "b-2@0", "a@1", "b-1@1", "b-2@1"]
    assert cells[1].after == ("a@0",) and cells[5].labels == {
        "role": "student",
        "teacher": "t",
        "attack": "2",
        "seed": "1",
    }


def test_a_matrix_may_stand_on_another(toy):
    """Cells come behind the base's, other keys over the base's; a config is relative to the file
    that names it.
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
    matrix = read_matrix(toy / "more" / "n.toml", {})
    cells = matrix.cells
    assert [c.name for c in cells] == ["a@3", "b-1@3", "b-2@3", "c@3"] and matrix.title == "More"
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
        cell = f'[[cell]]\nname = "{name}"\nmodule = "toy_cell"\n'
        (toy / "more" / f"{name}.toml").write_text(f'base = "../m.toml"\ntitle = "{name}"\n{cell}')
    bases = 'base = ["more/left.toml", "more/right.toml"]\nseeds = [0]\n'
    (toy / "all.toml").write_text(f'{bases}[[cell]]\nname = "c"\nmodule = "toy_cell"\n')
    matrix = read_matrix(toy / "all.toml", {})
    names = ["a@0", "b-1@0", "b-2@0", "left@0", "right@0", "c@0"]
    assert [c.name for c in matrix.cells] == names and matrix.title == "right"
    (toy / "all.toml").write_text('base = ["m.toml", 3]\n')
    with pytest.raises(ValueError, match="want the name of another matrix file"):
        read_matrix(toy / "all.toml", {})


def test_a_name_alone_keeps_its_type(toy):
    """`each` may hold numbers: "{eta}" is a number, "x-{eta}" a text; labels are always texts."""
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
    cells = read_matrix(toy / "e.toml", {}).cells
    assert [c.name for c in cells] == ["x-0.1@0", "x-3.0@0"] and cells[1].labels == {
        "eta": "-3.0",
        "strength": "3.0",
        "seed": "0",
    }
    assert "calibration.strength=0.1" in cells[0].arguments


def test_overrides_win(toy):
    matrix = read_matrix(toy / "m.toml", {"seeds": [7]})
    assert matrix.seeds == (7,) and {c.labels["seed"] for c in matrix.cells} == {"7"}


@pytest.mark.parametrize(
    "old, new, message",
    [
        ('after = ["a"]', 'after = ["z"]', "waits for z@0, which is no cell of this matrix"),
        ('name = "b-{x}"', 'name = "b"', "two cells are called b@0"),
        (
            "parallel = 2",
            "paralel = 2",
            "unknown key paralel, did you mean parallel? Known there: folder, seeds",
        ),
        ("seeds = [0, 1]", "", "no key seeds; want"),
    ],
)
def test_a_table_that_cannot_be_run_is_an_error(toy, old, new, message):
    path = toy / "m.toml"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=re.escape(message)):
        read_matrix(path, {})


def test_the_quickstart_is_complete():
    cells = read_matrix(ROOT / "configs/quickstart.toml", {"seeds": [0]}).cells
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


def test_the_quickstart_has_results_within_two_minutes_of_two_idle_cores():
    """By its costs, CPU seconds: the cells in the order in which two of them at a time start."""
    cells = read_matrix(ROOT / "configs/quickstart.toml", {"seeds": [0]}).cells
    waiting, free, ends = list(cells), [0.0, 0.0], {}
    while waiting:
        now = min(free)
        done = {name for name, end in ends.items() if end <= now}
        ready = next((c for c in waiting if set(c.after) <= done), None)
        core = free.index(now)
        if ready is None:
            free[core] = min(end for end in ends.values() if end > now)
            continue
        waiting.remove(ready)
        ends[ready.name] = free[core] = now + ready.cost
    assert all(cell.says for cell in cells)
    assert ends["teacher-original@0"] < 120 and ends["baseline-sft@0"] < 120
    assert ends["student-original-seq_kd@0"] < 120, "the first student"
    assert ends["student-distillable-seq_kd@0"] < 150, "the first comparison"
    assert max(ends.values()) < 720


def test_words_costs_and_the_grid_of_a_matrix(toy):
    path = toy / "m.toml"
    path.write_text(
        'says = "why"\ngrid = ["attack", "teacher"]\n'
        + path.read_text().replace(
            'name = "b-{x}"', 'name = "b-{x}"\ncost = 7\nsays = "{x} of two"'
        )
    )
    matrix = read_matrix(path, {"seeds": [0]})
    assert matrix.says == "why" and matrix.grid == ("attack", "teacher")
    assert [(c.cost, c.says) for c in matrix.cells[1:]] == [(7.0, "1 of two"), (7.0, "2 of two")]
    with pytest.raises(ValueError, match="grid = .*; want two labels"):
        read_matrix(path, {"grid": ["attack"]})


@pytest.mark.parametrize(
    "labels, missing",
    [
        ('role = "student", attack = "x"', "teacher"),
        ('role = "student"', "teacher and attack"),
        ('role = "teacher"', "teacher"),
        ('role = "baseline"', "attack"),
        ('role = "start"', "student"),
    ],
)
def test_a_role_without_the_labels_of_its_report_is_refused_before_anything_runs(
    toy, labels, missing
):
    old = 'role = "student", teacher = "t", attack = "{x}"'
    table = (toy / "m.toml").read_text()
    assert old in table
    (toy / "m.toml").write_text(table.replace(old, labels))
    with pytest.raises(ValueError, match=f"b-1@0 has the label role = .* without {missing}; want"):
        read_matrix(toy / "m.toml", {})


@pytest.mark.parametrize("eta", ["high", "nan", "inf", "", "0,5"])
def test_an_eta_that_is_no_number_is_refused_before_anything_runs(toy, eta):
    old = 'role = "student", teacher = "t", attack = "{x}"'
    table = (toy / "m.toml").read_text()
    (toy / "m.toml").write_text(table.replace(old, f'role = "student", eta = "{eta}"'))
    with pytest.raises(ValueError, match=f"b-1@0 has the label eta = '{eta}'; want a number"):
        read_matrix(toy / "m.toml", {})


@pytest.mark.parametrize(
    "labels",
    [
        'role = "student", eta = "-1"',
        'role = "student", ablation = "x", teacher = "undistillable"',
        'role = "student", defence = "x"',
    ],
)
def test_cells_of_other_reports_need_the_labels_of_these_alone(toy, labels):
    old = 'role = "student", teacher = "t", attack = "{x}"'
    table = (toy / "m.toml").read_text().replace(old, labels).replace('["1", "2"]', '["1"]')
    (toy / "m.toml").write_text(table)
    assert read_matrix(toy / "m.toml", {}).cells


# --- cells in one place of a report


@pytest.mark.parametrize(
    "labels",
    [
        'role = "student", teacher = "t", attack = "kd"',
        'role = "student", teacher = "t", attack = "kd", size = "{x}"',
        'role = "student", teacher = "t{x}", attack = "kd", eta = "1.0"',
        'role = "student", teacher = "t{x}", attack = "kd", defence = "d"',
        'role = "teacher", teacher = "t"',
        'role = "proxy"',
        'pair = "p", set = "{x}"',
    ],
)
def test_cells_that_would_count_as_two_seeds_are_refused_before_anything_runs(toy, labels):
    old = 'role = "student", teacher = "t", attack = "{x}"'
    (toy / "m.toml").write_text((toy / "m.toml").read_text().replace(old, labels))
    with pytest.raises(ValueError, match="b-1@0 and b-2@0 stand in one place of a report"):
        read_matrix(toy / "m.toml", {})


@pytest.mark.parametrize(
    "more, refused",
    [
        ('family = "{x}"', ""),
        ('family = "f"', "b-1@0 and b-2@0"),
        ('family = "{x}", eta = "1"', "b-1@0 and b-2@0"),  # the sweep is of all families
    ],
)
def test_each_family_has_places_of_its_own(toy, more, refused):
    old, labels = 'attack = "{x}"', f'attack = "kd", {more}'
    (toy / "m.toml").write_text((toy / "m.toml").read_text().replace(old, labels))
    if not refused:
        assert len(read_matrix(toy / "m.toml", {}).cells) == 6
        return
    with pytest.raises(ValueError, match=refused):
        read_matrix(toy / "m.toml", {})


# --- what a file may hold


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("after =", "afte =", "cell b-{x}: unknown key afte, did you mean after?"),
        ("labels =", "label =", "cell b-{x}: unknown key label, did you mean labels?"),
        ("role =", "rolle =", "b-1@0 has the label rolle, did you mean role?"),
        ('"student"', '"studnet"', "the label role = 'studnet', did you mean student?"),
        ('"student"', '"judge"', "the label role = 'judge'. Known: teacher, student"),
        ('["1", "2"]', '"hard"', "cell b-{x}: each = {'x': 'hard'}; want a list of values"),
        ('["1", "2"]', "3", "cell b-{x}: each = {'x': 3}; want a list of values"),
        ('["1", "2"]', "[]", "cell b-{x}: each = {'x': []}; want a list of values"),
        ('after = ["a"]', 'after = "a"', "cell b-{x}: after = 'a'; want a list of names"),
        ('after = ["a"]', 'after = ["{y}"]', "cell b-{x}: {y} stands for nothing. Known there: x"),
        ('["b{x}"]', '["{foldr}/b"]', "{foldr} stands for nothing, did you mean folder?"),
        ('["b{x}"]', '"b"', "cell b-{x}: arguments = 'b'; want a list of texts"),
        ('name = "a"', "", "cell 1: no key name"),
        ('name = "a"', "name = 3", "cell 3: name = 3; want a text"),
        ('name = "a"', 'name = "a"\ncost = "long"', "cell a: cost = 'long'; want seconds"),
        ('name = "a"', 'name = "a"\nconfig = "x"', "cell a: has both of config and module"),
        ('name = "a"', 'name = "a"\nset = { x = 1 }', "cell a: set belongs to a cell with config"),
        ('module = "toy_cell"\narguments = ["a"]', "", "cell a: has neither of config and module"),
        ("[0, 1]", "[0.5]", "seeds = [0.5]; want a list of one whole number or more"),
        ("[0, 1]", "[]", "seeds = []; want a list of one whole number or more"),
        ("[0, 1]", "3", "seeds = 3; want a list of one whole number or more"),
        ("parallel = 2", "parallel = 0", "parallel = 0; want the cells at a time, 1 or more"),
        ("parallel = 2", 'styles = { a = "(" }', "styles = {'a': '('}; want a table of answer"),
    ],
)
def test_what_a_file_says_and_nothing_reads_is_refused(toy, old, new, message):
    text = (toy / "m.toml").read_text()
    assert old in text
    (toy / "m.toml").write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        read_matrix(toy / "m.toml", {})
    assert str(refused.value).startswith(f"{toy / 'm.toml'}: ")


def test_a_single_cell_without_its_second_brackets_is_refused(toy):
    (toy / "n.toml").write_text('folder = "f"\nseeds = [0]\n[cell]\nname = "a"\n')
    with pytest.raises(ValueError, match=r"want one table or more under \[\[cell\]\]"):
        read_matrix(toy / "n.toml", {})


# --- what {name} stands for

FILLED = r"""folder = "runs/x"
seeds = [4]
[[cell]]
name = "a-{n}"
each = { n = [1, 2] }
config = "c.toml"
[cell.set]
"data.parts" = { sums = { source = "{folder}/sums.jsonl", limit = "{n}", more = ["{n}"] } }
"rollout.seed" = "{seed}"
"data.template" = "{question} of {n}: {{n}}"
"task.options.pattern" = '\{(\d{2})\}'
"""


def test_names_are_filled_in_however_deep_and_other_braces_stay(toy):
    (toy / "n.toml").write_text(FILLED)
    cell = read_matrix(toy / "n.toml", {}).cells[1]
    sets = cell.arguments[3::2]
    assert cell.name == "a-2@4"
    parts = '{sums = {source = "runs/x/seed-4/sums.jsonl", limit = 2, more = [2]}}'
    assert f"data.parts={parts}" in sets
    assert "rollout.seed=4" in sets and "seed=4" in sets
    assert 'data.template="{question} of 2: {2}"' in sets
    (pattern,) = (x.partition("=")[2] for x in sets if x.startswith("task.options.pattern="))
    assert tomllib.loads(f"x = {pattern}")["x"] == r"\{(\d{2})\}"


def test_an_argument_of_a_module_is_a_text(toy):
    table = (toy / "m.toml").read_text().replace('["1", "2"]', "[1, 2]")
    (toy / "m.toml").write_text(table.replace('"b{x}"', '"{x}", 3'))
    cell = read_matrix(toy / "m.toml", {"keep_checkpoints": False}).cells[1]
    assert cell.arguments[:2] == ("1", "3")
