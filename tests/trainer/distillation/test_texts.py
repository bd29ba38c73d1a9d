"""Where the texts of a step come from: student, teachers, query budget, rewrites."""

import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from runs import config, run_here, write_data

from reflux.trainer.config.distillation import DistillSection
from reflux.trainer.data.batch import Prompt, Rollout
from reflux.trainer.data.chat import Chat
from reflux.trainer.data.prompts import epoch_indices
from reflux.trainer.distillation.texts import TextSource, rewritten

pytestmark = pytest.mark.usefixtures("titan_process")


def test_a_query_budget_gives_the_same_texts_again_and_again(talkers, tmp_path, seen):
    run_here(
        config(
            talkers,
            tmp_path / "run",
            "distill",
            steps=3,
            rollout={"prompts": 3, "group": 2},
            distill={"objective": "nll", "on_policy": 0.0, "query_budget": 3},
        )
    )
    steps = [{t.rollout.ids for group in step for t in group} for step in seen["sample"]]
    assert steps[0] == steps[1] == steps[2]


@pytest.mark.parametrize("how", ["weights", "no shuffle", "as ever"])
def test_a_query_budget_is_drawn_as_the_prompts_of_a_run(talkers, tmp_path, seen, how):
    """By the weights of the parts, or in the data's order; else the rows of the recorded runs."""
    data, parts = write_data(tmp_path), {}
    for name in ("a", "b"):
        parts[name] = {"source": str(shutil.copy(data, tmp_path / f"{name}.jsonl"))}
    parts["b"]["weight"] = 3.0
    over = {
        "weights": {"source": "", "parts": parts},
        "no shuffle": {"source": str(data), "shuffle": False},
        "as ever": {"source": str(data)},
    }[how]
    options = {"objective": "nll", "on_policy": 0.0, "query_budget": 8}
    rollout = {"prompts": 4, "group": 1, "max_tokens": 12}
    run_here(
        config(
            talkers, tmp_path / "run", "distill", steps=2, distill=options, data=over,
            rollout=rollout,
        )
    )  # fmt: skip
    steps = [[g[0].rollout.prompt for g in step] for step in seen["sample"]]
    if how == "weights":
        assert [[p.part for p in step].count("b") for step in steps] == [3, 3]
        lines = (tmp_path / "run" / "teacher_texts.jsonl").read_text().splitlines()[1:]
        bought = [json.loads(line)["prompt"] for line in lines]
        assert len(bought) == 8 and sum(row >= 24 for row in bought) == 6
        return
    rows = [[p.index for p in step] for step in steps]
    if how == "no shuffle":
        assert rows == [[0, 1, 2, 3], [4, 5, 6, 7]]
        return
    bought = sorted(epoch_indices(24, 0, 8, seed=0))
    assert rows == [[bought[i] for i in epoch_indices(8, step, 4, seed=0)] for step in (0, 1)]


def test_only_correct_answers_count_in_a_query_budget(talkers, tmp_path, seen):
    run_here(
        config(
            talkers,
            tmp_path / "run",
            "distill",
            task={"name": "exact", "options": {"marker": "=>"}},
            rollout={"prompts": 3, "group": 4, "max_tokens": 14},
            distill={
                "objective": "nll",
                "on_policy": 0.0,
                "query_budget": 24,
                "correct_only": True,
            },
        )
    )
    texts = [t.rollout for step in seen["sample"] for group in step for t in group]
    assert texts and all(x.text.rpartition("=>")[2].strip() == x.prompt.answer for x in texts)


def test_no_correct_answer_at_all_says_what_to_do(talkers, tmp_path):
    with pytest.raises(
        ValueError, match="none of the teacher's 2 answers is correct.*task.options"
    ):
        run_here(
            config(
                talkers,
                tmp_path / "run",
                "distill",
                task={"name": "exact", "options": {"marker": "never"}},
                distill={
                    "objective": "nll",
                    "on_policy": 0.0,
                    "query_budget": 2,
                    "correct_only": True,
                },
            )
        )


@pytest.mark.parametrize("budget", [0, 4], ids=["step by step", "query budget"])
def test_a_grader_that_fails_is_no_filter(talkers, tmp_path, budget):
    """Every text would be left out, and the run would end well, having learned nothing."""
    options = {"isolate": False, "grade_truncated": True}
    with pytest.raises(ValueError, match="task.max_failed.*no such column"):
        run_here(
            config(
                talkers,
                tmp_path / "run",
                "distill",
                task={"name": "small_tasks:fail_always", "options": options},
                distill={
                    "objective": "nll",
                    "on_policy": 0.0,
                    "query_budget": budget,
                    "correct_only": True,
                },
            )
        )


@pytest.mark.parametrize("budget", [0, 4], ids=["step by step", "query budget"])
def test_a_grader_of_rewards_alone_is_no_filter(talkers, tmp_path, budget):
    """Every text would be left out, without a word; a threshold tells right from wrong."""

    def run(name, **options):
        task = {"name": "small_tasks:praise_or_blame"}
        task["options"] = {"isolate": False, "grade_truncated": True, **options}
        distill = {"objective": "nll", "on_policy": 0.0, "correct_only": True}
        distill["query_budget"] = budget
        return run_here(config(talkers, tmp_path / name, "distill", task=task, distill=distill))

    with pytest.raises(ValueError, match="a reward alone, neither correct nor wrong.*threshold"):
        run("rewards")
    assert all(step["tokens"] > 0 for step in run("threshold", threshold=0.0).steps)


def test_wrong_texts_are_left_out_of_a_step_and_the_step_still_runs(talkers, tmp_path, seen):
    """All of them wrong: no token, no update, no NaN."""
    run = run_here(
        config(
            talkers,
            tmp_path / "run",
            "distill",
            task={"name": "exact", "options": {"marker": "never"}},
            distill={"divergence": "forward", "on_policy": 0.0, "correct_only": True},
        )
    )
    assert seen["score"] == [[], []] and [s["tokens"] for s in run.steps] == [0, 0]
    assert all(
        s["passed_filter"] == 0 and s["loss"] == 0 and s["grad_norm"] == 0 for s in run.steps
    )


def test_each_teacher_samples_its_fraction_of_the_texts(talkers, tmp_path, seen):
    run_here(
        config(
            talkers,
            tmp_path / "run",
            "distill",
            steps=4,
            rollout={"prompts": 6, "group": 1},
            distill={
                "objective": "nll",
                "on_policy": 0.0,
                "more_teachers": [str(talkers / "proxy")],
                "teacher_weights": [1.0, 2.0],
            },
        )
    )
    teachers = [t.teacher for step in seen["sample"] for group in step for t in group]
    assert set(teachers) == {0, 1} and 24 * 0.4 < sum(teachers) < 24 * 0.95
    chat = Chat(str(talkers / "policy"))
    for sample, text in zip(
        (s for step in seen["score"] for s in step),
        (t for step in seen["sample"] for g in step for t in g),
    ):
        if text.teacher == 1:  # in the student's tokens, whoever wrote
            assert (
                sample.rollout.ids[:-1] == chat.encode(text.rollout.text) or not text.rollout.ended
            )


def test_an_attacker_may_rewrite_teacher_texts(talkers, tmp_path, seen):
    run_here(
        config(
            talkers,
            tmp_path / "run",
            "distill",
            steps=2,
            rollout={"prompts": 4, "group": 3},
            distill={
                "objective": "nll",
                "on_policy": 0.0,
                "rewrite": "rewrites:shout",
                "dedup": True,
            },
        )
    )
    texts = [t.rollout for step in seen["sample"] for group in step for t in group]
    assert texts and all(
        x.text == x.text.upper() and any(c.isdigit() for c in x.text) for x in texts
    )
    chat = Chat(str(talkers / "teacher"))
    assert all(chat.decode(x.content_ids) == x.text for x in texts), (
        "the ids spell the text that is trained on"
    )
    for step in seen["sample"]:
        for group in step:
            assert len({t.rollout.text for t in group}) == len(group)


def test_of_equal_texts_the_first_is_kept():
    """With its ids, log-probabilities and end: the same text may be sampled in other tokens."""
    first = Rollout(Prompt(0, ()), (1,), (5, 9), (-1.0, -1.0), -0.1, "ab", True)
    other = replace(first, ids=(7,), logp=(-1.0,), text="c")
    again = replace(first, ids=(6, 7), logp=(-3.0, -1.0), ended=False)
    source = SimpleNamespace(spec=SimpleNamespace(dedup=True), rewrite=None)
    assert TextSource._rewritten(source, None, [first, other, again]) == [first, other]


def test_a_rewrite_reads_whole_characters_and_what_it_leaves_keeps_its_ids(talkers):
    chat, read = Chat(str(talkers / "teacher")), []
    ids = chat.encode("ok \u20ac")[:-1]
    cut = Rollout(Prompt(0, ()), (1,), ids, (-1.0,) * len(ids), 0.0, chat.decode(ids), False)
    source = SimpleNamespace(
        spec=SimpleNamespace(dedup=False, rewrite="mine:f"),
        cfg=SimpleNamespace(rollout=SimpleNamespace(max_tokens=9)),
        rewrite=lambda prompt, text: read.append(text) or text,
    )
    assert TextSource._rewritten(source, chat, [cut]) == [cut] and read == ["ok "]


def test_under_a_query_budget_too_a_rewrite_may_drop_all_of_a_prompts(talkers, tmp_path, seen):
    options = {"objective": "nll", "on_policy": 0.0, "query_budget": 8}
    run_here(
        config(
            talkers,
            tmp_path / "run",
            "distill",
            distill=options | {"rewrite": "rewrites:only_of_even_prompts"},
        )
    )
    texts = [t.rollout for step in seen["sample"] for group in step for t in group]
    assert texts and all(x.prompt.index % 2 == 0 for x in texts)
    with pytest.raises(ValueError, match="dropped all of the teacher's 8 answers"):
        run_here(
            config(
                talkers,
                tmp_path / "none",
                "distill",
                distill=options | {"rewrite": "rewrites:nothing"},
            )
        )


def test_a_rewrite_that_makes_texts_too_long_says_so(talkers, tmp_path):
    with pytest.raises(ValueError, match="rollout.max_tokens = 12"):
        run_here(
            config(
                talkers,
                tmp_path / "run",
                "distill",
                distill={"objective": "nll", "on_policy": 0.0, "rewrite": "rewrites:double"},
            )
        )


@pytest.mark.parametrize(
    "rewrite, says",
    [
        (lambda prompt, text: {}["x"], "failed on a text of prompt 4: KeyError: 'x' .*Mend it"),
        (lambda prompt, text: 5, "returned int 5 for a text of prompt 4; want a text"),
        (lambda prompt, text: text + "\ud800", "returned str .* want a text of whole characters"),
    ],
    ids=["raises", "a number", "half a character"],
)
def test_a_rewrite_that_fails_or_returns_no_text_says_so(rewrite, says):
    with pytest.raises(ValueError, match=f"distill.rewrite = 'mine:f' {says}"):
        rewritten(rewrite, "mine:f", Prompt(4, ()), "a text")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_the_student_answers_its_fraction_of_every_step(share):
    """No step is left to luck: 10 prompts at 0.3 are 3, at any step; a fraction of a prompt is
    right on average.
    """
    source = object.__new__(TextSource)
    source.spec = DistillSection(on_policy=share)
    source.cfg = SimpleNamespace(seed=1, rollout=SimpleNamespace(prompts=10))
    assert {len(source._on_policy_slots(step)) for step in range(50)} == {round(10 * share)}
    source.cfg.rollout.prompts = 3
    counts = [len(source._on_policy_slots(step)) for step in range(400)]
    assert set(counts) <= {math.floor(3 * share), math.ceil(3 * share)} and np.mean(
        counts
    ) == pytest.approx(3 * share, abs=0.1)
    assert len({frozenset(source._on_policy_slots(step)) for step in range(40)}) > 1 or share in (
        0.0,
        1.0,
    )
