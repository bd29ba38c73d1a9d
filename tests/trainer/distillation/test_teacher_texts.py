"""A query budget is bought once: a resumed run reads it, and another recipe refuses to go on."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import config, run_here

from reflux.trainer.data.batch import Prompt, Rollout
from reflux.trainer.distillation.teacher_texts import (
    FILE,
    load_teacher_texts,
    recipe_of,
    save_teacher_texts,
)
from reflux.trainer.distillation.texts import TextSource

IDS = st.lists(st.integers(0, 10**6), max_size=5).map(tuple)
FLOATS = st.floats(-1e6, 0.0)
PROMPTS = [Prompt(i, ({"role": "user", "content": str(i)},)) for i in range(4)]


@st.composite
def rollouts(draw, prompt):
    ids = draw(IDS)
    logp = tuple(draw(FLOATS) for _ in ids)
    return Rollout(prompt, draw(IDS), ids, logp, draw(FLOATS), draw(st.text()), draw(st.booleans()))


@given(data=st.data())
def test_what_is_read_is_what_was_written(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    groups = [
        [(data.draw(st.integers(0, 2)), data.draw(rollouts(p))) for _ in range(2)]
        for p in PROMPTS[: data.draw(st.integers(0, 4))]
    ]
    save_teacher_texts(folder, {"seed": 1}, groups)
    assert load_teacher_texts(folder, {"seed": 1}, PROMPTS.__getitem__) == groups
    with pytest.raises(ValueError, match=r"bought with other values of seed \(1 then, 2 now\)"):
        load_teacher_texts(folder, {"seed": 2}, PROMPTS.__getitem__)


def test_no_file_is_no_texts(tmp_path):
    assert load_teacher_texts(tmp_path, recipe_of(seed=1), PROMPTS.__getitem__) is None


RECIPE = {
    "data": {"parts": {"x": {"source": "x"}, "y": {"source": "y"}}, "too_long": "drop"},
    "rollout": {"server_retries": 3, "top_k": 0},
    "teacher": {"servers": ["http://a:1"], "path": "t"},
}
SAME = {
    "another server": {"teacher": {"servers": ["http://b:1"], "path": "t"}},
    "more patience": {"rollout": {"server_retries": 5, "top_k": 0}},
    "too long": {"data": RECIPE["data"] | {"too_long": "error"}},
    "an option of another version": {"rollout": {"top_k": 0, "a_new_one": 1}},
}
OTHER = {
    "teacher.path": {"teacher": {"servers": ["http://a:1"], "path": "u"}},
    "rollout.top_k": {"rollout": {"server_retries": 3, "top_k": 5}},
    "data.parts": {"data": {"parts": dict(reversed(RECIPE["data"]["parts"].items()))}},
    "privileged": {"privileged": ["hint", "{hint}"]},
}


def test_only_what_makes_other_texts_is_another_recipe(tmp_path):
    save_teacher_texts(tmp_path, RECIPE, [])
    for change in SAME.values():
        assert load_teacher_texts(tmp_path, RECIPE | change, PROMPTS.__getitem__) == []
    for name, change in OTHER.items():
        with pytest.raises(ValueError, match=rf"other values of {name} \("):
            load_teacher_texts(tmp_path, RECIPE | change, PROMPTS.__getitem__)


def test_a_text_is_not_put_behind_another_question(tmp_path):
    group = [(0, Rollout(PROMPTS[1], (1,), (2,), (-1.0,), 0.0, "a", True))]
    save_teacher_texts(tmp_path, {}, [group])
    assert load_teacher_texts(tmp_path, {}, PROMPTS.__getitem__) == [group]
    with pytest.raises(ValueError, match="prompt 1 were bought for another question .*'2'"):
        load_teacher_texts(tmp_path, {}, lambda row: PROMPTS[row + 1])
    file = tmp_path / FILE
    head, row = map(json.loads, file.read_text().splitlines())
    del row["key"]  # as older versions wrote it
    file.write_text("\n".join(map(json.dumps, (head, row))))
    assert load_teacher_texts(tmp_path, {}, PROMPTS.__getitem__) == [group]


@pytest.fixture
def bought(talkers, tmp_path):
    """Configuration of a run of two steps that has bought its budget."""
    budget = {"objective": "nll", "on_policy": 0.0, "query_budget": 6, "keep_likeliest": 0.5}
    cfg = config(talkers, tmp_path / "run", "distill", distill=budget)
    run_here(cfg)
    return replace(cfg, steps=4, on_existing_run="resume")


@pytest.mark.usefixtures("titan_process")
def test_a_resumed_run_does_not_sample_its_budget_again(bought, tmp_path, monkeypatch):
    written = (tmp_path / "run" / FILE).read_text()

    def sampled_again(self, count):
        raise AssertionError("the budget was sampled again")

    monkeypatch.setattr(TextSource, "_sample_query_budget", sampled_again)
    patient = replace(bought.rollout, server_retries=9)
    more = run_here(replace(bought, rollout=patient, data=replace(bought.data, too_long="drop")))
    assert [s["step"] for s in more.steps] == [1, 2, 3, 4]
    assert (tmp_path / "run" / FILE).read_text() == written


@pytest.mark.usefixtures("titan_process")
@pytest.mark.parametrize("how, says", [("other", "seed"), ("lost", "no such file")])
def test_a_budget_is_not_bought_in_the_middle_of_a_run(bought, tmp_path, how, says):
    """A student that has learned from the first texts would choose the next ones."""
    file = tmp_path / "run" / FILE
    if how == "lost":
        file.unlink()
    else:
        file.write_text(file.read_text().replace('"seed": 0', '"seed": 7', 1))
    before = file.exists() and file.read_text()
    with pytest.raises(ValueError, match=f"{FILE}.*({says}).*The run is at step 2, .*put back"):
        run_here(bought)
    assert (file.exists() and file.read_text()) == before


@pytest.mark.usefixtures("titan_process")
def test_before_the_first_step_another_budget_is_bought_and_said(talkers, tmp_path, caplog):
    budget = {"objective": "nll", "on_policy": 0.0, "query_budget": 6}
    cfg = config(talkers, tmp_path / "run", "distill", steps=1, distill=budget)
    save_teacher_texts(tmp_path / "run", {"query_budget": 4}, [])
    run_here(cfg)
    assert "query_budget (4 then, 6 now)" in caplog.text and "bought anew" in caplog.text
    assert json.loads((tmp_path / "run" / FILE).read_text().splitlines()[0])["recipe"]["seed"] == 0
