"""A query budget is sampled once: a resumed run reads it, another recipe samples anew."""

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
    assert load_teacher_texts(folder, {"seed": 2}, PROMPTS.__getitem__) is None


def test_no_file_is_no_texts(tmp_path):
    assert load_teacher_texts(tmp_path, recipe_of(seed=1), PROMPTS.__getitem__) is None


@pytest.mark.usefixtures("titan_process")
def test_a_resumed_run_does_not_sample_its_budget_again(talkers, tmp_path, monkeypatch):
    budget = {"objective": "nll", "on_policy": 0.0, "query_budget": 6}
    cfg = config(talkers, tmp_path / "run", "distill", distill=budget)
    run_here(cfg)
    written = (tmp_path / "run" / FILE).read_text()

    def sampled_again(self, count):
        raise AssertionError("the budget was sampled again")

    monkeypatch.setattr(TextSource, "_sample_query_budget", sampled_again)
    more = run_here(replace(cfg, steps=4, on_existing_run="resume"))
    assert [s["step"] for s in more.steps] == [1, 2, 3, 4]
    assert (tmp_path / "run" / FILE).read_text() == written
