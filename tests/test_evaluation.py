"""Held-out accuracy: what the log says is what the predictions file holds, and greedy answers never change."""
import json

import pytest
from runs import config, run_here, write_data

pytestmark = pytest.mark.usefixtures("titan_process")
EXACT = {"name": "exact", "options": {"marker": "=>"}}


def evaluate(talkers, folder, **over):
    source = str(write_data(folder.parent))
    run = run_here(config(talkers, folder, "evaluate", task=EXACT, eval={"source": source, "samples": 3} | over.pop("eval", {}),
                          rollout={"max_tokens": 14}, **over))
    files = list((folder / "predictions").iterdir())
    return run, [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_the_logged_metrics_are_those_of_the_predictions(talkers, tmp_path):
    run, rows = evaluate(talkers, tmp_path / "run")
    found = next(e for e in run.events if e["event"] == "eval")
    for mode, count in (("greedy", 24), ("sampled", 72)):
        mine = [row for row in rows if row["mode"] == mode]
        mean = lambda values, n=count: pytest.approx(sum(values) / n)
        assert len(mine) == count == len({(row["prompt"], row["sample"]) for row in mine})
        assert found[f"eval/{mode}"] == mean([row["correct"] for row in mine])
        assert found[f"eval/{mode}_truncated"] == mean([not row["ended"] for row in mine])
        assert found[f"eval/{mode}_length"] == mean([row["tokens"] for row in mine])
        assert found[f"eval/{mode}_no_answer"] == mean([row["extracted"] is None for row in mine])
        for row in mine:
            right = row["ended"] and row["text"].rpartition("=>")[1] != "" and row["text"].rpartition("=>")[2].strip() == row["answer"]
            assert row["correct"] == right and row["nll"] >= 0
    assert 0 < found["eval/sampled"] < 1 and run.steps == [] and not (tmp_path / "run" / "export").exists()


def test_greedy_answers_are_the_same_for_any_seed_and_sampled_ones_are_not(talkers, tmp_path):
    (_, a), (_, b), (_, c) = (evaluate(talkers, tmp_path / name, **over) for name, over in (
        ("a", {}), ("b", {"seed": 7}), ("c", {"eval": {"at_start": False}})))
    text = lambda rows, mode: [row["text"] for row in rows if row["mode"] == mode]
    assert text(a, "greedy") == text(b, "greedy") == text(c, "greedy") and text(a, "sampled") == text(c, "sampled")
    assert text(a, "sampled") != text(b, "sampled")


def test_training_evaluates_when_it_is_due(talkers, tmp_path):
    over = {"task": EXACT, "steps": 5, "rollout": {"max_tokens": 14}}
    source = str(write_data(tmp_path))
    run = run_here(config(talkers, tmp_path / "run", "distill", **over, eval={"source": source, "every": 2, "samples": 0, "limit": 4}))
    assert [e["step"] for e in run.events if e["event"] == "eval"] == [0, 2, 4, 5]
    assert sorted(p.name for p in (tmp_path / "run" / "predictions").iterdir()) == [f"step-{n}.jsonl" for n in (0, 2, 4, 5)]
    assert not any("eval/sampled" in e for e in run.events)
    late = run_here(config(talkers, tmp_path / "late", "distill", **over, eval={"source": source, "at_start": False, "limit": 4}))
    assert [e["step"] for e in late.events if e["event"] == "eval"] == [5]
    bare = run_here(config(talkers, tmp_path / "bare", "distill", **over))
    strip = lambda run: [(s["loss"], s["grad_norm"]) for s in run.steps]
    assert strip(run) == strip(late) == strip(bare), "looking must not change what is learned"
