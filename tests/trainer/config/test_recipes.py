"""Names of recipes: found from any folder, behind files of one's own, and as a base."""

import re
from pathlib import Path

import pytest

from reflux.trainer.config import recipes
from reflux.trainer.config.loader import load


def test_a_name_is_a_shipped_file_and_a_file_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recipes.find("miniature/calibrate") == recipes.FOLDER / "miniature/calibrate.toml"
    assert recipes.find("recipe:quickstart") == recipes.FOLDER / "quickstart.toml"
    assert recipes.find("quickstart.toml") == Path("quickstart.toml"), "a path, there or not"
    Path("quickstart").write_text("")
    assert recipes.find("quickstart") == Path("quickstart"), "what is here comes first"


@pytest.mark.parametrize("given", ["miniature/calibrat", "recipe:miniature/calibrat"])
def test_an_unknown_name_is_answered_with_the_nearest(given):
    with pytest.raises(ValueError, match="did you mean miniature/calibrate?"):
        recipes.find(given)


@pytest.mark.parametrize("suggested", recipes.SUGGESTED, ids=lambda s: s.name)
def test_what_is_suggested_costs_what_the_recipe_says(suggested):
    head = recipes.recipe(suggested.name).read_text().splitlines()[0]
    assert suggested.takes in head
    assert ("NOT RUN" in head) == ("not run yet" in suggested.purpose)
    for model in re.findall(r"models/[\w.-]*\w", suggested.needs):
        assert model in head
    assert len(suggested.purpose) <= 96 and len(f"{suggested.takes}; needs {suggested.needs}") <= 96


def test_a_file_builds_on_a_recipe(tmp_path):
    (tmp_path / "x.toml").write_text('base = "recipe:debug_cpu_distill"\nsteps = 3\n')
    mine, shipped = load(tmp_path / "x.toml"), load("debug_cpu_distill")
    assert mine.steps == 3 and mine.distill == shipped.distill
