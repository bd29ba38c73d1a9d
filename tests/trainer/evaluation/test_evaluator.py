"""Held-out answers in whole runs: the log says what the predictions hold, greedy answers never
change, ranks and kills change nothing.
"""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from evaluation_runs import (
    CHOICE,
    EXACT,
    evaluate,
    of_mode,
    predictions,
    results_of,
    write_choices,
)
from runs import REWARD_VOWELS, config, run_here, run_ranks, write_data

from reflux.trainer.data.chat import Chat
from reflux.trainer.rollouts.generate import EmbeddedSampler

pytestmark = pytest.mark.usefixtures("titan_process")
KINDS = ("wrong", "no_answer", "refused", "truncated")


def is_correct(row):
    """By the rule of the task `exact` with the marker =>."""
    _, marker, answer = row["text"].rpartition("=>")
    return row["ended"] and marker != "" and answer.strip() == row["answer"]


def test_the_logged_metrics_are_those_of_the_predictions(talkers, tmp_path):
    over = {"pass_at": [1, 2, 3], "refusal": "is => 5"}
    run, rows = evaluate(talkers, tmp_path / "run", eval=over)
    found = results_of(run)
    for mode, count in (("greedy", 24), ("sampled", 72)):
        mine = of_mode(rows, mode)
        assert len(mine) == count == len({(row["prompt"], row["sample"]) for row in mine})
        accuracy = sum(row["correct"] for row in mine) / count
        assert found[f"eval/{mode}"] == pytest.approx(accuracy)
        assert found[f"eval/{mode}_low"] < found[f"eval/{mode}"]
        length = sum(row["tokens"] for row in mine) / count
        assert found[f"eval/{mode}_length"] == pytest.approx(length)
        outcomes = Counter(row["outcome"] for row in mine)
        kinds = [found[f"eval/{mode}_{kind}"] for kind in KINDS]
        assert kinds == [pytest.approx(outcomes[kind] / count) for kind in KINDS]
        assert found[f"eval/{mode}"] + sum(kinds) == pytest.approx(1)
        for row in mine:
            assert row["correct"] == is_correct(row) and row["nll"] >= 0
    sampled = Counter(row["outcome"] for row in of_mode(rows, "sampled"))
    assert all(sampled[kind] for kind in ("correct", *KINDS)), (
        f"{sampled}: every kind occurs, or nothing is tested"
    )
    correct = Counter(row["prompt"] for row in of_mode(rows, "sampled") if row["correct"])
    assert found["eval/pass@3"] == pytest.approx(len(correct) / 24)
    assert found["eval/pass@1"] == pytest.approx(found["eval/sampled"])
    one_of_two = {0: 0, 1: 2 / 3, 2: 1, 3: 1}
    want = sum(one_of_two[correct[p]] for p in range(24)) / 24
    assert found["eval/pass@2"] == pytest.approx(want)
    assert 0 < found["eval/sampled"] < 1 and run.steps == []
    assert not (tmp_path / "run" / "export").exists()
    saved = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert saved["metrics"]["sampled"]["low"] == found["eval/sampled_low"]
    assert "# Evaluation of" in (tmp_path / "run" / "report.md").read_text()


def texts(rows, mode):
    return [row["text"] for row in of_mode(rows, mode)]


def test_greedy_answers_are_the_same_for_any_seed_and_sampled_ones_are_not(talkers, tmp_path):
    (_, a), (_, b), (_, c) = (
        evaluate(talkers, tmp_path / name, **over)
        for name, over in (("a", {}), ("b", {"seed": 7}), ("c", {"eval": {"at_start": False}}))
    )
    assert texts(a, "greedy") == texts(b, "greedy") == texts(c, "greedy")
    assert texts(a, "sampled") == texts(c, "sampled") != texts(b, "sampled")


def test_answers_are_sampled_as_rollout_says(talkers, tmp_path):
    spec = {"max_tokens": 14}
    plain, cold, other = (
        evaluate(talkers, tmp_path / name, rollout=spec | over)[1]
        for name, over in (
            ("plain", {}),
            ("cold", {"top_k": 1, "temperature": 0.3}),
            ("other", {"top_p": 0.5, "temperature": 1.5}),
        )
    )
    greedy = texts(plain, "greedy")
    assert texts(cold, "greedy") == texts(other, "greedy") == greedy
    assert texts(cold, "sampled")[::3] == texts(cold, "sampled")[1::3] == greedy
    assert len({tuple(texts(rows, "sampled")) for rows in (plain, cold, other)}) == 3
    page = (tmp_path / "other" / "report.md").read_text()
    assert "one greedy and 3 sampled at temperature 1.5, top_p 0.5" in page
    saved = json.loads((tmp_path / "cold" / "evaluation.json").read_text())
    assert saved["sampling"] == {"temperature": 0.3, "top_p": 1.0, "top_k": 1}


def test_an_evaluation_on_the_way_of_a_training_run_samples_at_temperature_1(talkers, tmp_path):
    spec = {"source": str(write_data(tmp_path)), "samples": 2, "limit": 6}
    over = {"task": EXACT, "steps": 0, "eval": spec}
    answers = []
    for name, how in (("plain", {}), ("cold", {"top_k": 1, "temperature": 0.3})):
        rollout = {"max_tokens": 14} | how
        run_here(config(talkers, tmp_path / name, "distill", **over, rollout=rollout))
        answers.append(predictions(tmp_path / name))
    assert answers[0] == answers[1]
    assert texts(answers[0], "sampled")[::2] != texts(answers[0], "greedy")


def test_a_question_that_is_too_long_is_refused_before_anything_is_answered(talkers, tmp_path):
    path = write_data(tmp_path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[7]["prompt"] = "long word " * 12
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    says = (
        "data.jsonl, line 8: 1 of 24 prompts are too long for the model. .* want at most 97, "
        r"training.seq_len \+ 1. Set training.seq_len >= (\d+), .* or leave these rows out"
    )
    with pytest.raises(ValueError, match=says) as error:
        evaluate(talkers, tmp_path / "run", source=str(path))
    assert not (tmp_path / "run" / "predictions").exists()
    least = int(re.search(says, str(error.value))[1])
    chat = Chat(str(talkers / "policy"))
    talk = ({"role": "user", "content": rows[7]["prompt"]},)
    assert least == len(chat.prompt_ids(talk)) + 14 - 1
    over = {"source": str(path), "training": {"seq_len": least}, "eval": {"limit": 8}}
    evaluate(talkers, tmp_path / "run", **over)


def test_options_have_to_fit_too(talkers, tmp_path):
    source = Path(write_choices(tmp_path))
    row = {"prompt": "What?", "answer": "0", "choices": ["long word " * 30, "2"]}
    source.write_text(source.read_text() + json.dumps(row) + "\n")
    over = {"source": str(source), "task": CHOICE}
    for spec in ({"by": "likelihood"}, {"by": "both"}, {"list_options": True}):
        with pytest.raises(ValueError, match="choices.jsonl, line 13: 1 of 13 prompts are too lo"):
            evaluate(talkers, tmp_path / "run", eval=spec, **over)


@pytest.mark.parametrize(
    "rows, says", [(24, "line 1; .*and 21 more: no answer, in 24 of 24"), (1, "line 1: no")]
)
def test_questions_without_answers_are_refused(talkers, tmp_path, rows, says):
    """Else every grade would fail, or, with every text truncated, none would say so."""
    path = write_data(tmp_path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for row in lines[:rows]:
        row["answer"] = None
    path.write_text("".join(json.dumps(row) + "\n" for row in lines[: 24 if rows > 1 else 12]))
    with pytest.raises(ValueError, match=says + ".*task exact compares with it. .* eval.columns"):
        evaluate(talkers, tmp_path / "run", source=str(path))
    assert not (tmp_path / "run" / "predictions").exists()


# --- failed grades


def test_an_evaluation_ends_where_too_many_grades_failed(talkers, tmp_path, monkeypatch):
    """Nothing is concluded; with the grader mended, only what failed is answered again."""
    over = {"task": {"name": "runs:raise_sometimes", "options": {"isolate": False}}}
    over |= {"on_existing_run": "resume", "rollout": {"max_tokens": 14, "rows": 2}}
    says = r"grading failed on \d+ of \d+ texts, more than task.max_failed = 0.05 .*ZeroDivision"
    with pytest.raises(ValueError, match=says) as error:
        evaluate(talkers, tmp_path / "run", **over)
    unfinished = tmp_path / "run" / "predictions" / "unfinished.jsonl"
    assert f"The texts are in {unfinished}" in str(error.value)
    assert not list((tmp_path / "run").glob("*/step-*")), "no predictions that others would read"
    assert not (tmp_path / "run" / "evaluation.json").exists()
    rows = [json.loads(line) for line in unfinished.read_text().splitlines()[1:]]
    assert len(rows) < 96 and any(row["error"] for row in rows), "it ends as soon as it is sure"
    monkeypatch.setattr("runs.raise_sometimes", lambda prompt, text: 0.5)
    run, rows = evaluate(talkers, tmp_path / "run", **over)
    assert len(rows) == 96 and {row["reward"] for row in rows if row["graded"]} >= {0.5}
    assert not any(row["error"] for row in rows)


def test_a_few_failed_grades_leave_the_metrics(talkers, tmp_path):
    task = {"name": "evaluation_runs:fail_on_odd", "max_failed": 1.0}
    task["options"] = {"grade_truncated": True, "isolate": False}
    run, rows = evaluate(talkers, tmp_path / "run", task=task)
    found = results_of(run)
    for mode in ("greedy", "sampled"):
        good = [row for row in of_mode(rows, mode) if row["error"] is None]
        assert 0 < len(good) < len(of_mode(rows, mode))
        prompts = {row["prompt"] for row in good}
        means = [[r["reward"] for r in good if r["prompt"] == p] for p in prompts]
        want = sum(sum(m) / len(m) for m in means) / len(prompts)
        assert found[f"eval/{mode}"] == pytest.approx(want) and want > 0
        assert 0 < found[f"eval/{mode}_grader_error"] < 1


@pytest.mark.parametrize("task, ends", [("raise_sometimes", True), ("fail_on_prompt_1", False)])
def test_an_evaluation_on_the_way_has_the_budget_of_100_texts(talkers, tmp_path, task, ends):
    """One failed grade of 12 ends no training run; a grader that fails on everything does."""
    name = f"{'runs' if ends else 'evaluation_runs'}:{task}"
    over = {"task": {"name": name, "options": {"grade_truncated": True}}, "steps": 0}
    spec = {"source": str(write_data(tmp_path)), "limit": 6}
    cfg = config(talkers, tmp_path / "run", "distill", **over, eval=spec)
    if ends:
        with pytest.raises(ValueError, match="more than task.max_failed"):
            run_here(cfg)
    else:
        found = results_of(run_here(cfg))
        assert found["eval/greedy_grader_error"] == pytest.approx(1 / 6)


def trained(run):
    return [(s["loss"], s["grad_norm"]) for s in run.steps]


def test_training_evaluates_when_it_is_due(talkers, tmp_path):
    over = {"task": EXACT, "steps": 5, "rollout": {"max_tokens": 14}}
    spec = {"source": str(write_data(tmp_path)), "samples": 0, "limit": 4}
    cfg = config(talkers, tmp_path / "run", "distill", **over, eval=spec | {"every": 2})
    run = run_here(cfg)
    assert [e["step"] for e in run.events if e["event"] == "eval"] == [0, 2, 4, 5]
    files = sorted(p.name for p in (tmp_path / "run" / "predictions").iterdir())
    assert files == [f"step-{n}.jsonl" for n in (0, 2, 4, 5)]
    assert len((tmp_path / "run" / "questions.jsonl").read_text().splitlines()) == 4
    assert not any("eval/sampled" in e for e in run.events)
    assert not (tmp_path / "run" / "evaluation.json").exists()
    spec |= {"at_start": False, "against": str(tmp_path / "run")}
    late = run_here(config(talkers, tmp_path / "late", "distill", **over, eval=spec))
    (last,) = [e for e in late.events if e["event"] == "eval"]
    assert last["step"] == 5 and last["eval/greedy_difference"] == 0 and last["eval/greedy_p"] == 1
    bare = run_here(config(talkers, tmp_path / "bare", "distill", **over))
    assert trained(run) == trained(late) == trained(bare), "evaluating must not change training"


def test_rewards_are_averaged_where_no_answer_is_correct_or_wrong(talkers, tmp_path):
    run, rows = evaluate(talkers, tmp_path / "run", task={"name": REWARD_VOWELS})
    found = results_of(run)
    rewards = [row["reward"] for row in of_mode(rows, "greedy")]
    assert found["eval/greedy"] == pytest.approx(sum(rewards) / 24)
    assert found["eval/sampled_low"] < found["eval/sampled"] < found["eval/sampled_high"]
    assert "eval/greedy_wrong" not in found and 0 < found["eval/sampled_truncated"] < 1


def test_a_grader_that_names_no_answers_misses_none(talkers, tmp_path):
    found = results_of(evaluate(talkers, tmp_path / "run", task={"name": "small_tasks:is_even"})[0])
    assert found["eval/sampled_no_answer"] == 0 < found["eval/sampled_wrong"]


def test_a_function_beside_a_grader_that_names_answers_misses_none(talkers, tmp_path):
    """As a part, and as a value of a column."""
    even, data = {"name": "small_tasks:is_even"}, str(write_data(tmp_path))
    parts = {"x": {"source": data, "task": EXACT}, "y": {"source": data, "task": even}}
    spec = {"source": "", "parts": parts}
    _, rows = evaluate(talkers, tmp_path / "parts", eval=spec, task={"name": ""})
    assert any(r["extracted"] for r in rows)
    assert {r["outcome"] for r in rows if r["part"] == "y"} == {"correct", "wrong", "truncated"}
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()[:8]]
    kinds = [row | {"kind": "even" if i % 2 else "sum"} for i, row in enumerate(rows)]
    (tmp_path / "kinds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kinds))
    unmarked = {"name": "exact", "options": {"marker": "nowhere"}}
    column = {"column": "kind", "tasks": {"even": even["name"], "sum": unmarked}}
    task = {"name": "column", "options": column}
    source = str(tmp_path / "kinds.jsonl")
    _, rows = evaluate(talkers, tmp_path / "column", source=source, task=task)
    ended = [r for r in rows if r["ended"] and not r["correct"]]
    of = {kind: {r["outcome"] for r in ended if r["prompt"] % 2 == kind} for kind in (0, 1)}
    assert of == {0: {"no_answer"}, 1: {"wrong"}}


@pytest.mark.parametrize("whole, part, ends", [(0.0, 1.0, False), (1.0, 0.0, True)])
def test_questions_have_the_budget_of_their_own_task(talkers, tmp_path, whole, part, ends):
    task = {"name": "small_tasks:fail_always", "max_failed": part}
    task["options"] = {"grade_truncated": True}
    questions = {"source": str(write_data(tmp_path)), "limit": 3, "task": task}
    over = {"eval": {"source": "", "samples": 0, "parts": {"a": questions}}}
    over["task"] = {"name": "", "max_failed": whole}
    cfg = config(talkers, tmp_path / "run", "evaluate", **over)
    if ends:
        with pytest.raises(ValueError, match="fail_always of part a: grading failed on 3 of 3"):
            run_here(cfg)
    else:
        assert results_of(run_here(cfg))["eval/greedy_grader_error"] == 1.0


# --- against another run


def test_against_itself(talkers, tmp_path):
    evaluate(talkers, tmp_path / "base", eval={"pass_at": [2]})
    spec = {"pass_at": [2], "against": str(tmp_path / "base")}
    same, _ = evaluate(talkers, tmp_path / "same", eval=spec)
    parts = ("difference", "difference_low", "difference_high", "change")
    for metric in ("greedy", "sampled", "pass@2"):
        assert [results_of(same)[f"eval/{metric}_{part}"] for part in parts] == [0.0] * 4


def in_order(rows):
    sampled = of_mode(rows, "sampled")
    return sorted(sampled, key=lambda row: (row["prompt"], row["sample"]))


def test_against_another_model(talkers, tmp_path):
    _, theirs = evaluate(talkers, tmp_path / "base")
    other, ours = evaluate(
        talkers,
        tmp_path / "other",
        eval={"against": str(tmp_path / "base")},
        model={"path": str(talkers / "teacher")},
    )
    found = results_of(other)
    pairs = [(r["correct"], b["correct"]) for r, b in zip(in_order(ours), in_order(theirs))]
    gap = sum(a - b for a, b in pairs)
    assert found["eval/sampled_difference"] == pytest.approx(gap / 72) != 0
    assert found["eval/sampled_change"] == pytest.approx(gap / sum(b for _, b in pairs))
    for name in ("difference", "change"):
        mean, low, high = (found[f"eval/sampled_{name}{end}"] for end in ("", "_low", "_high"))
        assert low < mean < high
    assert 0 < found["eval/sampled_p"] <= 1


def test_other_prompts_are_refused_before_anything_is_answered(talkers, tmp_path):
    evaluate(talkers, tmp_path / "base", eval={"limit": 4})
    for over, says in (
        ({"limit": 5}, "the same eval.source, eval.split, eval.limit and eval.samples"),
        ({"limit": 4, "samples": 2}, "same prompts and samples"),
    ):
        with pytest.raises(ValueError, match=says):
            evaluate(talkers, tmp_path / "run", eval=over | {"against": str(tmp_path / "base")})
    (tmp_path / "data.jsonl").rename(tmp_path / "old.jsonl")
    turned = (tmp_path / "old.jsonl").read_text().splitlines()[::-1]
    (tmp_path / "turned.jsonl").write_text("".join(line + "\n" for line in turned))
    with pytest.raises(ValueError, match="prompt 0 is another question there"):
        evaluate(
            talkers,
            tmp_path / "run",
            source=str(tmp_path / "turned.jsonl"),
            eval={"limit": 4, "against": str(tmp_path / "base")},
        )
    assert not (tmp_path / "run" / "predictions").exists()


# --- options


def score_by_transformers(folder, messages, options):
    from transformers import AutoModelForCausalLM

    chat, model = Chat(str(folder)), AutoModelForCausalLM.from_pretrained(folder)
    before, scores = chat.prompt_ids(messages), []
    for text in options:
        ids = chat.encode(text)
        with torch.no_grad():
            logp = model(torch.tensor([before + ids])).logits[0].log_softmax(-1)
        scores.append(sum(float(logp[len(before) + i - 1, token]) for i, token in enumerate(ids)))
    return scores


def likeliest(row):
    per_byte = row["mode"] == "likelihood_per_byte"
    scores = [x / n if per_byte else x for x, n in zip(row["logp"], row["bytes"])]
    return scores.index(max(scores))


def test_options_by_likelihood(talkers, tmp_path):
    over = {"task": CHOICE, "eval": {"by": "likelihood"}}
    run, rows = evaluate(talkers, tmp_path / "run", source=write_choices(tmp_path), **over)
    modes = ("likelihood_sum", "likelihood_per_byte")
    assert {row["mode"] for row in rows} == set(modes) and len(rows) == 24
    for row in (r for r in of_mode(rows, "likelihood_sum") if r["prompt"] in (0, 7)):
        a = row["prompt"]
        options = [str(a + 1 - a % 3 + i) for i in range(3)]
        messages = ({"role": "user", "content": f"What is {a}+1?"},)
        want = score_by_transformers(talkers / "policy", messages, options)
        assert row["logp"] == pytest.approx(want, rel=1e-4, abs=1e-4)
        assert row["extracted"] == options[want.index(max(want))]
        assert row["position"] == a % 3, "as the data set gives them"
    found = results_of(run)
    assert found["eval/chance"] == pytest.approx(1 / 3), "of three options"
    for mode in modes:
        correct = sum(likeliest(row) == row["prompt"] % 3 for row in of_mode(rows, mode))
        assert found[f"eval/{mode}"] == pytest.approx(correct / 12)
        by_position = [found[f"eval/{mode}_at_{i}"] for i in (1, 2, 3)]
        assert found[f"eval/{mode}"] == pytest.approx(sum(by_position) / 3)
    assert "## By position of the correct option" in (tmp_path / "run" / "report.md").read_text()


def positions(rows):
    return [row["position"] for row in of_mode(rows, "likelihood_sum")]


def test_options_are_listed_in_the_order_given(talkers, tmp_path):
    over = {"task": CHOICE, "eval": {"by": "likelihood", "list_options": "given"}}
    _, rows = evaluate(talkers, tmp_path / "run", source=write_choices(tmp_path), **over)
    assert positions(rows) == [a % 3 for a in range(12)]


def test_listed_options_are_shuffled_by_seed_and_answered_both_ways(talkers, tmp_path):
    spec = {"by": "both", "list_options": True, "samples": 2}
    over = {"source": write_choices(tmp_path), "task": CHOICE}
    (_, a), (_, b) = (
        evaluate(talkers, tmp_path / name, seed=seed, eval=spec, **over)
        for name, seed in (("a", 0), ("b", 1))
    )
    assert positions(a) != positions(b)
    assert Counter(row["mode"] for row in a) == {
        "greedy": 12,
        "sampled": 24,
        "likelihood_sum": 12,
        "likelihood_per_byte": 12,
    }
    generated = {(row["prompt"], row["position"]) for row in a if "text" in row}
    assert generated == set(enumerate(positions(a))), "both ways see the same order"
    spec |= {"against": str(tmp_path / "a")}
    evaluate(talkers, tmp_path / "c", eval=spec, **over)
    with pytest.raises(ValueError, match="options in another order.*eval.list_options.* seed"):
        evaluate(talkers, tmp_path / "d", seed=1, eval=spec, **over)


def test_options_that_cannot_be_read_are_refused_before_anything_is_answered(talkers, tmp_path):
    source = Path(write_choices(tmp_path))
    wrong = {"prompt": "What is 1+1?", "answer": "3", "choices": ["1", "2", "3"]}
    source.write_text(source.read_text() + json.dumps(wrong) + "\n")
    over = {"source": str(source), "task": CHOICE}
    says = "prompt 12: answer '3' is none of 0, 1, 2. Set task.options.answer_is"
    with pytest.raises(ValueError, match=says):
        evaluate(talkers, tmp_path / "run", eval={"by": "both"}, **over)
    assert not (tmp_path / "run" / "predictions").exists()
    over["task"] = CHOICE | {"max_failed": 0.2}
    _, rows = evaluate(talkers, tmp_path / "run", **over)
    at = [row["position"] for row in of_mode(rows, "greedy")]
    assert at == [*(a % 3 for a in range(12)), None], "generated answers do without"
    assert rows[12]["graded"] is False or (rows[12]["error"] and rows[12]["outcome"] is None)


# --- ranks, and a killed evaluation


def identity(row):
    return row["mode"], row["prompt"], row["sample"], row.get("text"), row["correct"]


@pytest.mark.filterwarnings("ignore")
def test_two_ranks_are_one(talkers, tmp_path):
    over = {
        "task": CHOICE,
        "rollout": {"max_tokens": 8, "rows": 1},
        "accept": {"x": {"min": 0.0}},
        "eval": {"source": write_choices(tmp_path, 11), "by": "both", "samples": 2, "pass_at": [2]},
    }
    one = run_here(config(talkers, tmp_path / "one", "evaluate", **over))
    two = run_ranks(config(talkers, tmp_path / "two", "evaluate", **over))
    a, b = results_of(one), results_of(two)
    numbers = [k for k in a if isinstance(a[k], float) and k != "wall_s"]
    assert a.keys() == b.keys()
    assert all(a[k] == pytest.approx(b[k], rel=1e-4, abs=1e-5) for k in numbers)
    rows = predictions(tmp_path / "one"), predictions(tmp_path / "two")
    assert list(map(identity, rows[0])) == list(map(identity, rows[1]))


def without_time(event):
    return {key: value for key, value in event.items() if key != "wall_s"}


def test_a_killed_evaluation_goes_on(talkers, tmp_path, monkeypatch):
    over = {"rollout": {"max_tokens": 14, "rows": 2}, "on_existing_run": "resume"}
    whole, want = evaluate(talkers, tmp_path / "whole", **over)
    real, blocks, last = EmbeddedSampler.sample, [], [6]

    def sample(self, prompts, group, sampling):
        blocks.append((len(prompts), group))
        if len(blocks) == last[0]:
            raise KeyboardInterrupt
        return real(self, prompts, group, sampling)

    monkeypatch.setattr(EmbeddedSampler, "sample", sample)
    with pytest.raises(KeyboardInterrupt):
        evaluate(talkers, tmp_path / "run", **over)
    assert [p.name for p in (tmp_path / "run" / "predictions").iterdir()] == ["unfinished.jsonl"]
    assert blocks == [(8, 1)] * 3 + [(2, 3)] * 3, "blocks of 8 rows"
    blocks.clear()
    last[0] = 0  # no kill this time
    resumed, rows = evaluate(talkers, tmp_path / "run", **over)
    assert blocks == [(2, 3)] * 10, "two blocks of six answers were on disk, ten are left"
    assert rows == want
    assert without_time(results_of(resumed)) == without_time(results_of(whole))
