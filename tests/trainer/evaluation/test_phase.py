"""Held-out answers in whole runs: the log says what the predictions hold, greedy answers never
change, the gate ends the process.
"""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from runs import REWARD_VOWELS, config, make_debug, run_here, run_ranks, write_data

from reflux.trainer.config import loader as config_file
from reflux.trainer.data.chat import Chat
from reflux.trainer.evaluation import phase as evaluation

pytestmark = pytest.mark.usefixtures("titan_process")
EXACT = {"name": "exact", "options": {"marker": "=>"}}
CHOICE = {"name": "multiple_choice", "options": {"answer_is": "index"}}
KINDS = ("wrong", "no_answer", "refused", "truncated")


def evaluate(talkers, folder, expect=0, **over):
    over["eval"] = {
        "source": over.pop("source", None) or str(write_data(folder.parent)),
        "samples": 3,
    } | over.get("eval", {})
    run = run_here(
        config(
            talkers, folder, "evaluate", **{"task": EXACT, "rollout": {"max_tokens": 14}} | over
        ),
        expect,
    )
    return run, predictions(folder)


def predictions(folder):
    files = list((Path(folder) / "predictions").iterdir())
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def found_by(run):
    return next(e for e in run.events if e["event"] == "eval")


def verdicts_of(run):
    return next(e for e in run.events if e["event"] == "accept")


def write_choices(folder, count=12):
    path = folder / "choices.jsonl"
    rows = [
        {
            "prompt": f"What is {a}+1?",
            "answer": str(a % 3),
            "choices": [str(a + 1 - a % 3 + i) for i in range(3)],
        }
        for a in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_logged_metrics_are_those_of_the_predictions(talkers, tmp_path):
    run, rows = evaluate(
        talkers, tmp_path / "run", eval={"pass_at": [1, 2, 3], "refusal": "is => 5"}
    )
    found = found_by(run)
    for mode, count in (("greedy", 24), ("sampled", 72)):
        mine = [row for row in rows if row["mode"] == mode]
        mean = lambda values, n=count: pytest.approx(sum(values) / n)
        assert len(mine) == count == len({(row["prompt"], row["sample"]) for row in mine})
        assert (
            found[f"eval/{mode}"] == mean([row["correct"] for row in mine])
            and found[f"eval/{mode}_low"] < found[f"eval/{mode}"]
        )
        assert found[f"eval/{mode}_length"] == mean([row["tokens"] for row in mine])
        outcomes = Counter(row["outcome"] for row in mine)
        assert [found[f"eval/{mode}_{kind}"] for kind in KINDS] == [
            mean([outcomes[kind]]) for kind in KINDS
        ]
        assert found[f"eval/{mode}"] + sum(
            found[f"eval/{mode}_{kind}"] for kind in KINDS
        ) == pytest.approx(1)
        for row in mine:
            right = (
                row["ended"]
                and row["text"].rpartition("=>")[1] != ""
                and row["text"].rpartition("=>")[2].strip() == row["answer"]
            )
            assert row["correct"] == right and row["nll"] >= 0
    sampled = Counter(row["outcome"] for row in rows if row["mode"] == "sampled")
    assert all(sampled[kind] for kind in ("right", *KINDS)), (
        f"{sampled}: every kind occurs, or nothing is tested"
    )
    right = Counter(row["prompt"] for row in rows if row["mode"] == "sampled" and row["correct"])
    assert found["eval/pass@3"] == pytest.approx(len(right) / 24) and found[
        "eval/pass@1"
    ] == pytest.approx(found["eval/sampled"])
    assert found["eval/pass@2"] == pytest.approx(
        sum({0: 0, 1: 2 / 3, 2: 1, 3: 1}[right[p]] for p in range(24)) / 24
    )
    assert (
        0 < found["eval/sampled"] < 1
        and run.steps == []
        and not (tmp_path / "run" / "export").exists()
    )
    saved = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert (
        saved["metrics"]["sampled"]["low"] == found["eval/sampled_low"]
        and "# Evaluation of" in (tmp_path / "run" / "report.md").read_text()
    )


def test_greedy_answers_are_the_same_for_any_seed_and_sampled_ones_are_not(talkers, tmp_path):
    (_, a), (_, b), (_, c) = (
        evaluate(talkers, tmp_path / name, **over)
        for name, over in (("a", {}), ("b", {"seed": 7}), ("c", {"eval": {"at_start": False}}))
    )
    text = lambda rows, mode: [row["text"] for row in rows if row["mode"] == mode]
    assert text(a, "greedy") == text(b, "greedy") == text(c, "greedy") and text(
        a, "sampled"
    ) == text(c, "sampled")
    assert text(a, "sampled") != text(b, "sampled")


def test_training_evaluates_when_it_is_due(talkers, tmp_path):
    over = {"task": EXACT, "steps": 5, "rollout": {"max_tokens": 14}}
    source = str(write_data(tmp_path))
    run = run_here(
        config(
            talkers,
            tmp_path / "run",
            "distill",
            **over,
            eval={"source": source, "every": 2, "samples": 0, "limit": 4},
        )
    )
    assert [e["step"] for e in run.events if e["event"] == "eval"] == [0, 2, 4, 5]
    assert sorted(p.name for p in (tmp_path / "run" / "predictions").iterdir()) == [
        f"step-{n}.jsonl" for n in (0, 2, 4, 5)
    ]
    assert (
        not any("eval/sampled" in e for e in run.events)
        and not (tmp_path / "run" / "evaluation.json").exists()
    )
    late = run_here(
        config(
            talkers,
            tmp_path / "late",
            "distill",
            **over,
            eval={
                "source": source,
                "at_start": False,
                "limit": 4,
                "against": str(tmp_path / "run"),
                "samples": 0,
            },
        )
    )
    (last,) = [e for e in late.events if e["event"] == "eval"]
    assert last["step"] == 5 and last["eval/greedy_difference"] == 0 and last["eval/greedy_p"] == 1
    bare = run_here(config(talkers, tmp_path / "bare", "distill", **over))
    strip = lambda run: [(s["loss"], s["grad_norm"]) for s in run.steps]
    assert strip(run) == strip(late) == strip(bare), "looking must not change what is learned"


def test_rewards_are_averaged_where_nothing_is_right_or_wrong(talkers, tmp_path):
    run, rows = evaluate(talkers, tmp_path / "run", task={"name": REWARD_VOWELS})
    found = found_by(run)
    assert found["eval/greedy"] == pytest.approx(
        sum(r["reward"] for r in rows if r["mode"] == "greedy") / 24
    )
    assert (
        found["eval/sampled_low"] < found["eval/sampled"] < found["eval/sampled_high"]
        and "eval/greedy_wrong" not in found
    )
    assert 0 < found["eval/sampled_truncated"] < 1


def test_a_grader_that_names_no_answers_misses_none(talkers, tmp_path):
    found = found_by(evaluate(talkers, tmp_path / "run", task={"name": "runs:is_even"})[0])
    assert found["eval/sampled_no_answer"] == 0 < found["eval/sampled_wrong"]


# --- against another run, and the gate


def test_against_itself_and_against_another_model(talkers, tmp_path):
    base, theirs = evaluate(talkers, tmp_path / "base", eval={"pass_at": [2]})
    same, _ = evaluate(
        talkers, tmp_path / "same", eval={"pass_at": [2], "against": str(tmp_path / "base")}
    )
    for metric in ("greedy", "sampled", "pass@2"):
        assert [
            found_by(same)[f"eval/{metric}_{part}"]
            for part in ("difference", "difference_low", "difference_high", "change")
        ] == [0.0] * 4
    other, ours = evaluate(
        talkers,
        tmp_path / "other",
        eval={"against": str(tmp_path / "base")},
        model={"path": str(talkers / "teacher")},
    )
    found, key = found_by(other), lambda r: (r["mode"], r["prompt"], r["sample"])
    pairs = [
        (r["correct"], b["correct"])
        for r, b in zip(sorted(ours, key=key), sorted(theirs, key=key))
        if r["mode"] == "sampled"
    ]
    gap = sum(a - b for a, b in pairs)
    assert found["eval/sampled_difference"] == pytest.approx(gap / 72) != 0
    assert found["eval/sampled_change"] == pytest.approx(gap / sum(b for _, b in pairs))
    assert found["eval/sampled_difference_low"] < gap / 72 < found["eval/sampled_difference_high"]
    assert (
        found["eval/sampled_change_low"]
        < found["eval/sampled_change"]
        < found["eval/sampled_change_high"]
        and 0 < found["eval/sampled_p"] <= 1
    )


def test_other_prompts_are_refused_before_anything_is_answered(talkers, tmp_path):
    evaluate(talkers, tmp_path / "base", eval={"limit": 4})
    for over, says in (
        ({"limit": 5}, "the same eval.source, eval.split, eval.limit and eval.samples"),
        ({"limit": 4, "samples": 2}, "same prompts and samples"),
    ):
        with pytest.raises(ValueError, match=says):
            evaluate(talkers, tmp_path / "run", eval=over | {"against": str(tmp_path / "base")})
    (tmp_path / "data.jsonl").rename(tmp_path / "old.jsonl")
    turned = [json.loads(line) for line in (tmp_path / "old.jsonl").read_text().splitlines()][::-1]
    (tmp_path / "turned.jsonl").write_text("".join(json.dumps(row) + "\n" for row in turned))
    with pytest.raises(ValueError, match="prompt 0 is another question there"):
        evaluate(
            talkers,
            tmp_path / "run",
            source=str(tmp_path / "turned.jsonl"),
            eval={"limit": 4, "against": str(tmp_path / "base")},
        )
    assert not (tmp_path / "run" / "predictions").exists()


def test_the_gate_ends_with_0_or_3_and_says_why(talkers, tmp_path):
    evaluate(talkers, tmp_path / "base", eval={"limit": 8})
    kept = {"teacher": {"metric": "greedy", "against": str(tmp_path / "base"), "max_drop": 0.02}}
    run, _ = evaluate(talkers, tmp_path / "same", eval={"limit": 8}, accept=kept)
    assert verdicts_of(run)["accept/teacher"].startswith("holds: greedy")
    student = {"run": str(tmp_path / "same"), "against": str(tmp_path / "base"), "min_change": 0.15}
    run, _ = evaluate(
        talkers, tmp_path / "both", 3, eval={"limit": 8}, accept=kept | {"student": student}
    )
    assert verdicts_of(run)["accept/teacher"].startswith("holds") and run.summary is not None, (
        "the run itself ended well"
    )
    assert "want at least +15%, 15% missing" in verdicts_of(run)["accept/student"]
    assert "**student** does NOT hold: sampled" in (tmp_path / "both" / "report.md").read_text()
    assert json.loads((tmp_path / "both" / "evaluation.json").read_text())["accepted"] is False


def test_the_gate_of_a_process(talkers, tmp_path):
    from reflux.trainer import main

    for name, least, code in (("low", 0.0, 0), ("high", 1.0, 3)):
        cfg = config(
            talkers,
            tmp_path / name,
            "evaluate",
            task=EXACT,
            rollout={"max_tokens": 4},
            accept={"x": {"min": least}},
            eval={"source": str(write_data(tmp_path)), "limit": 2},
        )
        (tmp_path / "x.toml").write_text(config_file.to_toml(cfg))
        assert main.main(["--config", str(tmp_path / "x.toml")]) == code


# --- options


def score_by_transformers(folder, messages, texts):
    from transformers import AutoModelForCausalLM

    chat, model = Chat(str(folder)), AutoModelForCausalLM.from_pretrained(folder)
    before, scores = chat.prompt_ids(messages), []
    for text in texts:
        ids = chat.encode(text)
        with torch.no_grad():
            logp = model(torch.tensor([before + ids])).logits[0].log_softmax(-1)
        scores.append(sum(float(logp[len(before) + i - 1, token]) for i, token in enumerate(ids)))
    return scores


def test_options_by_likelihood(talkers, tmp_path):
    run, rows = evaluate(
        talkers,
        tmp_path / "run",
        source=write_choices(tmp_path),
        task=CHOICE,
        eval={"by": "likelihood"},
    )
    assert {row["mode"] for row in rows} == {"likelihood_sum", "likelihood_per_byte"} and len(
        rows
    ) == 24
    for row in (r for r in rows if r["mode"] == "likelihood_sum" and r["prompt"] in (0, 7)):
        a = row["prompt"]
        texts = [str(a + 1 - a % 3 + i) for i in range(3)]
        want = score_by_transformers(
            talkers / "policy", ({"role": "user", "content": f"What is {a}+1?"},), texts
        )
        assert (
            row["logp"] == pytest.approx(want, rel=1e-4, abs=1e-4)
            and row["extracted"] == texts[want.index(max(want))]
        )
        assert row["position"] == a % 3, "as the data set gives them"
    found = found_by(run)
    best = lambda row: max(
        range(3),
        key=lambda i: (
            row["logp"][i] / (row["bytes"][i] if row["mode"] == "likelihood_per_byte" else 1)
        ),
    )
    for mode in ("likelihood_sum", "likelihood_per_byte"):
        mine = [r for r in rows if r["mode"] == mode]
        assert found[f"eval/{mode}"] == pytest.approx(
            sum(best(r) == r["prompt"] % 3 for r in mine) / 12
        )
        assert found[f"eval/{mode}"] == pytest.approx(
            sum(found[f"eval/{mode}_at_{i}"] for i in (1, 2, 3)) / 3
        )
    assert "## By place of the right option" in (tmp_path / "run" / "report.md").read_text()


def test_listed_options_are_shuffled_by_seed_and_answered_both_ways(talkers, tmp_path):
    over = {
        "source": write_choices(tmp_path),
        "task": CHOICE,
        "eval": {"by": "both", "list_options": True, "samples": 2},
    }
    (_, a), (_, b) = (
        evaluate(talkers, tmp_path / name, seed=seed, **over) for name, seed in (("a", 0), ("b", 1))
    )
    place = lambda rows: [r["position"] for r in rows if r["mode"] == "likelihood_sum"]
    assert place(a) != place(b) and Counter(r["mode"] for r in a) == {
        "greedy": 12,
        "sampled": 24,
        "likelihood_sum": 12,
        "likelihood_per_byte": 12,
    }
    assert {(r["prompt"], r["position"]) for r in a if "text" in r} == set(enumerate(place(a))), (
        "both ways see the same order"
    )
    # the same questions
    evaluate(
        talkers,
        tmp_path / "c",
        seed=1,
        **over | {"eval": over["eval"] | {"against": str(tmp_path / "a")}},
    )


def test_options_that_cannot_be_read_are_told_before_anything_is_answered(talkers, tmp_path):
    source = Path(write_choices(tmp_path))
    source.write_text(
        source.read_text()
        + json.dumps({"prompt": "What is 1+1?", "answer": "3", "choices": ["1", "2", "3"]})
        + "\n"
    )
    with pytest.raises(
        ValueError, match="prompt 12: answer '3' is none of 0, 1, 2. Set task.options.answer_is"
    ):
        evaluate(talkers, tmp_path / "run", source=str(source), task=CHOICE, eval={"by": "both"})
    assert not (tmp_path / "run" / "predictions").exists()
    _, rows = evaluate(talkers, tmp_path / "run", source=str(source), task=CHOICE)
    assert [r["position"] for r in rows if r["mode"] == "greedy"] == [
        *(a % 3 for a in range(12)),
        None,
    ], "generated answers do without"
    assert rows[12]["error"] and rows[12]["outcome"] in ("wrong", "truncated")


# --- ranks, and a killed evaluation


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
    a, b = found_by(one), found_by(two)
    assert a.keys() == b.keys() and all(
        a[k] == pytest.approx(b[k], rel=1e-4, abs=1e-5)
        for k in a
        if isinstance(a[k], float) and k != "wall_s"
    )
    key = lambda r: (r["mode"], r["prompt"], r["sample"], r.get("text"), r["correct"])
    assert list(map(key, predictions(tmp_path / "one"))) == list(
        map(key, predictions(tmp_path / "two"))
    )


def test_a_killed_evaluation_goes_on(talkers, tmp_path, monkeypatch):
    over = {"rollout": {"max_tokens": 14, "rows": 2}, "on_existing_run": "resume"}
    whole, want = evaluate(talkers, tmp_path / "whole", **over)
    real, asked = evaluation.generate, []

    def kill_later(decode, chat, prompts, count, sampling):
        asked.append((len(prompts), count))
        if len(asked) == 6:
            raise KeyboardInterrupt
        return real(decode, chat, prompts, count, sampling)

    monkeypatch.setattr(evaluation, "generate", kill_later)
    with pytest.raises(KeyboardInterrupt):
        evaluate(talkers, tmp_path / "run", **over)
    assert [p.name for p in (tmp_path / "run" / "predictions").iterdir()] == ["unfinished.jsonl"]
    assert asked == [(8, 1)] * 3 + [(2, 3)] * 3, "blocks of 8 rows"
    asked.clear()
    asked.extend([None] * 10)  # no kill this time
    resumed, rows = evaluate(talkers, tmp_path / "run", **over)
    assert asked[10:] == [(2, 3)] * 10 and rows == want, (
        "two blocks of six answers were kept, ten are left"
    )
    assert {k: v for k, v in found_by(resumed).items() if k != "wall_s"} == {
        k: v for k, v in found_by(whole).items() if k != "wall_s"
    }


def test_the_debug_config_shows_every_part(tmp_path, monkeypatch):
    make_debug(tmp_path / "runs" / "debug")
    monkeypatch.chdir(tmp_path)
    run = run_here(
        config_file.load(
            Path(evaluation.__file__).parents[2] / "configs" / "debug_cpu_evaluate.toml",
            ("log.quiet=true",),
        ),
        3,
    )
    found, said = found_by(run), verdicts_of(run)
    assert {"eval/pass@4", "eval/likelihood_per_byte_at_1", "eval/sampled_refused"} <= found.keys()
    assert said["accept/likelihood"].startswith("holds") and said["accept/sampled"].startswith(
        "does NOT hold"
    )
