"""reflux init: what it writes is the recipe, whole, from any folder."""

import tomllib

import pytest

from reflux.trainer import cli
from reflux.trainer.config import recipes
from reflux.trainer.config.loader import load
from reflux.trainer.matrix_file import is_matrix, read_matrix
from reflux.trainer.recipe_files import own_file

CONFIGS = [n for n in recipes.names() if not is_matrix(recipes.recipe(n))]
MATRICES = [n for n in recipes.names() if is_matrix(recipes.recipe(n))]
GIVEN = ("model.path=m", "proxy.path=p", "teacher.path=t", "data.source=d", "folder=f")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_written_recipe_is_the_recipe(name, tmp_path, capsys):
    assert cli.main(["init", name, "--out", "mine.toml"]) == 0
    text = (tmp_path / "mine.toml").read_text()
    assert "base =" not in text and text.startswith("# ")
    assert load("mine.toml", GIVEN) == load(name, GIVEN)


def test_most_keys_carry_the_reason_of_the_recipe():
    text = own_file(recipes.recipe("miniature/calibrate"))
    assert "kl_budget = 0.3  # a style is one early token" in text
    assert 'mixed_precision_param = "float32"  # exact on a CPU' in text, "a base's"
    assert "decay_ratio = 0.0\n" in text, "the base's reason is that of another value"


def test_a_hash_in_quotes_is_no_comment(tmp_path):
    (tmp_path / "x.toml").write_text('# x\n[task]\nname = "a#b"  # why\n[data]\nsource = "#c"\n')
    text = own_file(tmp_path / "x.toml")
    assert 'name = "a#b"  # why' in text and 'source = "#c"\n' in text


@pytest.mark.parametrize("name", MATRICES)
def test_a_table_of_runs_is_built_on_the_shipped_one(name, tmp_path):
    assert cli.main(["init", name, "--out", "mine.toml"]) == 0
    mine = read_matrix(tmp_path / "mine.toml", {})
    shipped = read_matrix(recipes.recipe(name), {})
    assert [c.arguments for c in mine.cells] == [c.arguments for c in shipped.cells]
    assert mine.folder == shipped.folder and mine.seeds == shipped.seeds


def test_nothing_is_overwritten_without_a_word(tmp_path, capsys):
    assert cli.main(["init", "debug_cpu_distill"]) == 0
    assert (tmp_path / "debug_cpu_distill.toml").exists()
    with pytest.raises(SystemExit) as ended:
        cli.main(["init", "debug_cpu_distill"])
    assert ended.value.code == 2 and "exists; want another --out" in capsys.readouterr().err
    assert cli.main(["init", "debug_cpu_distill", "--force"]) == 0


def test_without_a_name_there_are_a_few_recipes_and_which_to_take_first(capsys):
    assert cli.main(["init"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Take quickstart first: reflux run quickstart\n")
    assert 3 <= len(recipes.SUGGESTED) <= 6 and len(out.splitlines()) <= 24
    for s in recipes.SUGGESTED:
        assert f"\n{s.name}\n    {s.purpose}\n    {s.takes}; needs {s.needs}\n" in out
    assert f"All {len(recipes.names())} recipes: reflux init --all" in out


def test_the_list_names_every_recipe_and_its_purpose(capsys):
    assert cli.main(["init", "--all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == recipes.names()
    assert all(len(line.split()) > 3 for line in lines)
    with pytest.raises(SystemExit):
        cli.main(["init", "quikstart"])
    assert "did you mean quickstart?" in capsys.readouterr().err


def test_what_is_written_is_toml():
    for name in CONFIGS:
        tomllib.loads(own_file(recipes.recipe(name)))
