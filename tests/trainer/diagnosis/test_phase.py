"""The phase `diagnose` on small models: the files agree with each other, and a model has no trap
with itself.
"""

import json
import re
from collections import Counter

import numpy as np
import pytest
from runs import config, run_here, run_ranks, write_data

from reflux.trainer.diagnosis.continuations import Continuations

pytestmark = [pytest.mark.usefixtures("titan_process"), pytest.mark.filterwarnings("ignore")]
TASK = {
    "task": {"name": "small_tasks:is_even"},
    "data": {"limit": 5},
    "rollout": {"max_tokens": 12},
}


def diagnose(talkers, folder, run=run_here, **over):
    options = {
        "prefixes": ["dataset", "teacher", "student"],
        "student_texts": 4,
        "heatmap_texts": 3,
    } | over.pop("diagnose", {})
    log = run(config(talkers, folder, "diagnose", diagnose=options, **TASK | over))
    rows = [json.loads(line) for line in (folder / "tokens.jsonl").read_text().splitlines()]
    return log, json.loads((folder / "diagnosis.json").read_text()), rows


def test_the_files_agree_with_each_other(talkers, tmp_path):
    log, diagnosis, rows = diagnose(talkers, tmp_path / "run")
    by_source = {
        w: [r for r in rows if r["sampled_by"] == w] for w in ("dataset", "teacher", "student")
    }
    assert {w: len(v) for w, v in by_source.items()} == {"dataset": 5, "teacher": 10, "student": 20}
    for w, texts in by_source.items():
        tokens = sum(len(r["ids"]) for r in texts)
        assert diagnosis["texts"][w] == {"texts": len(texts), "prompts": 5, "tokens": tokens}
        for d in ("forward", "reverse"):
            total = sum(sum(r[f"kl_{d}"]) for r in texts)
            mean = diagnosis["grid"][d][w]["per_token"]["mean"]
            assert mean == pytest.approx(total / tokens, rel=1e-4) and total > 0
    assert all(
        len(r["ids"]) == len(r["kl_forward"]) == len(r["student_logp"]) == len(r["pieces"])
        for r in rows
    )
    for r in rows:  # pieces spell the text, up to the stop token and characters cut in half
        assert r["text"].startswith("".join(r["pieces"][:3])) or "\ufffd" in "".join(r["pieces"])
    assert_bands(diagnosis, by_source)
    outside = [x for r in by_source["student"] for x in r["outside_nucleus"]]
    assert 0 < sum(outside) < len(outside)
    off_nucleus = diagnosis["symptoms"]["off_nucleus"]
    assert off_nucleus == pytest.approx(sum(outside) / len(outside))
    size = [
        abs(a - b)
        for r in by_source["teacher"]
        for a, b in zip(r["student_logp"], r["teacher_logp"])
    ]
    log_ratio = diagnosis["off_policy"]["log_ratio"]
    assert log_ratio["mean"]["mean"] == pytest.approx(sum(size) / len(size), abs=1e-5)
    assert log_ratio["max"] == pytest.approx(max(size), abs=1e-5)
    assert_symptoms_and_gap(diagnosis, by_source)
    gradient = diagnosis["off_policy"]["gradient"]
    # the data set has one text a prompt
    assert gradient["batches"] == 5 and gradient["texts_of_each"] == 5
    for w, texts in by_source.items():
        first = {r["prompt"]: len(r["ids"]) for r in reversed(texts)}
        assert gradient["tokens"][w] == sum(first.values())
        assert gradient["reverse"][w]["plain"] > 0 and gradient["reverse"][w]["unbiased"]["n"] == 5
    event = next(e for e in log.events if e["event"] == "eval")
    assert event["diagnose/tail_noise"] == pytest.approx(diagnosis["verdict"][0]["mean"])
    assert log.steps == [] and log.summary is not None
    assert not (tmp_path / "run" / "export").exists()


def assert_bands(diagnosis, by_source):
    """Frequencies counted again, from the ids in tokens.jsonl: over all texts for the ranks, over a
    divergence's own for its fractions.
    """
    count = Counter(i for texts in by_source.values() for r in texts for i in r["ids"])
    rank = {i: k for k, (i, _) in enumerate(sorted(count.items(), key=lambda x: (-x[1], x[0])))}
    for d, source in (("forward", "teacher"), ("reverse", "student")):
        bands, ids = diagnosis["tail"][d]["bands"], [i for r in by_source[source] for i in r["ids"]]
        frequency = bands["top 10"]["frequency"]
        assert frequency == pytest.approx(sum(rank[i] < 10 for i in ids) / len(ids))
        never_seen = bands["never seen"]
        assert never_seen["frequency"] == 0 and never_seen["lift"] is None
        assert never_seen["fraction"] > 0
        for key in ("fraction", "fraction_at_10", "frequency"):
            assert sum(b[key] for b in bands.values()) == pytest.approx(1.0)


def assert_symptoms_and_gap(diagnosis, by_source):
    correct = {
        w: {i: [r["correct"] for r in by_source[w] if r["prompt"] == i] for i in range(5)}
        for w in ("student", "teacher")
    }
    solved = [i for i in range(5) if any(correct["teacher"][i])]
    solved_by_teacher = diagnosis["gap"]["on_solved_by_teacher"]
    by_student = sum(any(correct["student"][i]) for i in solved)
    assert solved_by_teacher["pass_at_n"]["mean"] == pytest.approx(by_student / len(solved))
    assert solved_by_teacher["n"] == 4
    sampling = diagnosis["symptoms"]["sampling"]
    greedy, sampled = sampling["greedy"]["mean"], sampling["sampled"]["mean"]
    assert sampled == pytest.approx(sum(map(sum, correct["student"].values())) / 20)
    assert sampling["gap"]["mean"] == pytest.approx(greedy - sampled)
    own_error = diagnosis["symptoms"]["own_error"]
    assert own_error["texts"] >= 1 and 0 <= own_error["correct_after"]["mean"] <= 1
    # a function that returns a bool does not say what the answer was
    assert "format_breaks" not in diagnosis["symptoms"]


def test_the_report_shows_what_was_measured(talkers, tmp_path):
    _, diagnosis, _ = diagnose(talkers, tmp_path / "run")
    report = (tmp_path / "run" / "report.md").read_text()
    for trap in diagnosis["verdict"]:
        assert trap["trap"] in report and trap["advice"] in report
        assert f"{trap['mean']:.3f}" in report
    for name in re.findall(r"\]\(([^)]+)\)", report):
        assert (tmp_path / "run" / name).stat().st_size > 1000, name
    assert "None" not in report and "{" not in report and "they are missing" not in report
    assert "failed_grades" not in diagnosis and "grader failed" not in report
    for words in (
        "classes by frequency",
        "never seen",
        "signal to noise of the gradient, KL reverse, texts by the student (5 micro-batches",
        "student's texts - teacher's",
        "log-ratio of the teacher's tokens",
        "student's pass@4",
        "bits per byte",
        "top-p 0.999",
        "accuracy greedy - at temperature 1",
        "correct after half of its own wrong text",
    ):
        assert words in report, words
    assert "signal to noise" in diagnosis["verdict"][1]["advice"]


def test_a_model_has_nothing_to_learn_from_itself(talkers, tmp_path):
    over = {"teacher": {"path": str(talkers / "policy")}}
    _, diagnosis, rows = diagnose(talkers, tmp_path / "run", **over)
    assert max(max(map(abs, r["kl_forward"] + r["kl_reverse"])) for r in rows) < 1e-9
    assert all(
        a == pytest.approx(b, abs=1e-4)
        for r in rows
        for a, b in zip(r["student_logp"], r["teacher_logp"])
    )
    gap = diagnosis["gap"]
    assert gap["overlap"]["mean"] == 1.0 and abs(gap["entropy_gap"]["mean"]) < 1e-9
    effective = diagnosis["off_policy"]["effective_samples"]["whole"]["mean"]
    assert effective == pytest.approx(1.0, abs=1e-3)


def test_two_ranks_find_what_one_finds(talkers, tmp_path):
    _, one, rows = diagnose(talkers, tmp_path / "one")
    _, two, others = diagnose(talkers, tmp_path / "two", run=run_ranks)
    assert sorted(r["text"] for r in rows) == sorted(r["text"] for r in others)
    for d in ("forward", "reverse"):
        got, want = (x["grid"][d]["student"]["per_token"]["mean"] for x in (two, one))
        assert got == pytest.approx(want, rel=1e-5)
        got, want = (x["tail"][d]["bands"]["top 10"] for x in (two, one))
        assert got == pytest.approx(want, rel=1e-5)
        for w in ("student", "teacher", "on_minus_off"):
            got, want = (x["off_policy"]["gradient"][d][w] for x in (two, one))
            got, want = (x.get("unbiased", x) for x in (got, want))
            assert got["mean"] == pytest.approx(want["mean"], rel=1e-3, abs=1e-5)
            assert got["low"] == pytest.approx(want["low"], rel=1e-3)
    assert all(two["symptoms"][key] == one["symptoms"][key] for key in ("sampling", "own_error"))
    got, want = (x["gap"]["wrong_trace"]["pair"]["mean"] for x in (two, one))
    assert got == pytest.approx(want)


def test_without_a_task_there_is_no_gap_and_no_probe(talkers, tmp_path):
    folder = tmp_path / "run"
    run_here(
        config(
            talkers,
            folder,
            "diagnose",
            task={"name": ""},
            data={"limit": 2},
            diagnose={"student_texts": 2, "heatmap_texts": 0},
        )
    )
    rows = [json.loads(line) for line in (folder / "tokens.jsonl").read_text().splitlines()]
    diagnosis = json.loads((folder / "diagnosis.json").read_text())
    assert all(r["correct"] is None for r in rows)
    assert "wrong_trace" not in diagnosis["gap"] and "correction" not in diagnosis["symptoms"]
    assert not (folder / "heatmap.html").exists()


def test_graders_that_name_answers_give_votes_and_format_breaks(talkers, tmp_path):
    _, diagnosis, rows = diagnose(
        talkers,
        tmp_path / "run",
        task={"name": "exact", "options": {"marker": "=>"}},
        diagnose={"prefixes": ["student"], "gradient_batches": 0},
    )
    answered = [r for r in rows if r["answer"] is not None]
    assert answered and all(r["text"].rpartition("=>")[2].strip() == r["answer"] for r in answered)
    by_prompt = {
        i: Counter(r["answer"] for r in rows if r["prompt"] == i and r["answer"] is not None)
        for i in range(5)
    }
    votes = [max(c.values(), default=0) / 4 for c in by_prompt.values()]
    assert diagnosis["symptoms"]["vote_confidence"]["mean"] == pytest.approx(sum(votes) / 5)
    breaks = diagnosis["symptoms"]["format_breaks"]
    assert 0 <= breaks <= 1 - len(answered) / len(rows)
    assert "gradient" not in diagnosis["off_policy"]
    assert "votes as confidence" in (tmp_path / "run" / "report.md").read_text()


def test_finished_runs_of_the_pair_say_whether_training_was_stable(talkers, tmp_path):
    run = run_here(
        config(
            talkers,
            tmp_path / "distilled",
            "distill",
            eval={"source": str(write_data(tmp_path)), "limit": 2},
        )
    )
    _, diagnosis, _ = diagnose(
        talkers,
        tmp_path / "run",
        data={"limit": 2},
        diagnose={
            "runs": [str(tmp_path / "distilled")],
            "prefixes": ["dataset"],
            "correction": False,
        },
    )
    norms = [s["grad_norm"] for s in run.steps]
    stability = diagnosis["runs"]
    assert stability["runs"][0]["steps"] == 2
    assert stability["worst"] == pytest.approx(max(norms) / (sum(norms) / 2))
    assert stability["score"]["metric"] == "eval/sampled"
    assert str(tmp_path / "distilled") in (tmp_path / "run" / "report.md").read_text()


def test_failed_grades_are_neither_right_nor_wrong(talkers, tmp_path):
    """They are told and counted, and every number is that of the other texts."""
    over = {
        "task": {"name": "small_tasks:fail_on_odd_lengths", "max_failed": 1.0},
        "diagnose": {"prefixes": ["student"], "gradient_batches": 0},
    }
    _, diagnosis, rows = diagnose(talkers, tmp_path / "run", **over)
    ended = [r for r in rows if "<stop>" in r["pieces"][-1] or len(r["ids"]) < 12]
    odd = [r for r in ended if len(r["text"]) % 2]
    graded = [r for r in rows if r["correct"] is not None]
    assert odd and len(graded) < len(rows)
    assert all(r["correct"] is None for r in odd)
    means = [
        np.mean([r["correct"] for r in graded if r["prompt"] == i])
        for i in {r["prompt"] for r in graded}
    ]
    confidence = diagnosis["symptoms"]["confidence"]
    assert confidence["accuracy"] == pytest.approx(np.mean([r["correct"] for r in graded]))
    if sampling := diagnosis["symptoms"].get("sampling"):
        assert sampling["sampled"]["n"] <= len(means)
    failed = diagnosis["failed_grades"]
    assert failed["failed"] >= len(odd) and failed["graded"] > failed["failed"]
    report = (tmp_path / "run" / "report.md").read_text()
    assert f"failed on {failed['failed']} of {failed['graded']} texts" in report
    assert "RuntimeError: an odd length" in report


def test_a_grader_that_fails_on_every_text_is_refused_before_anything_is_measured(
    talkers, tmp_path
):
    with pytest.raises(ValueError, match="failed on 30 of 30 texts.*no such column"):
        diagnose(
            talkers,
            tmp_path / "run",
            task={"name": "small_tasks:fail_always", "options": {"grade_truncated": True}},
            diagnose={"prefixes": ["student", "teacher"], "gradient_batches": 0},
        )
    assert not (tmp_path / "run" / "tokens.jsonl").exists()


def test_what_was_measured_is_there_where_a_probe_fails(talkers, tmp_path, monkeypatch):
    def fail(self, stage, stats):
        raise RuntimeError("no memory is left")

    monkeypatch.setattr(Continuations, "own_errors", fail)
    with pytest.raises(RuntimeError, match="no memory is left"):
        diagnose(talkers, tmp_path / "run", diagnose={"prefixes": ["student"]})
    found = json.loads((tmp_path / "run" / "diagnosis.json").read_text())
    assert found["texts"]["student"]["texts"] == 20 and found["gap"]["wrong_trace"]
    assert "own_error" not in found["symptoms"]
    assert len((tmp_path / "run" / "tokens.jsonl").read_text().splitlines()) == 20
    assert "continued texts and gradients: they are" in (tmp_path / "run" / "report.md").read_text()


def test_only_the_texts_of_parts_with_a_task_have_grades(talkers, tmp_path):
    data = str(write_data(tmp_path))
    graded = {"source": data, "limit": 3, "task": TASK["task"]}
    over = {
        "task": {"name": ""},
        "data": {"source": "", "parts": {"x": graded, "y": {"source": data, "limit": 2}}},
        "diagnose": {"prefixes": ["student"], "gradient_batches": 0, "correction": True},
    }
    _, diagnosis, rows = diagnose(talkers, tmp_path / "run", **over)
    rows_of_y = [r for r in rows if r["correct"] is None]
    assert len(rows) == 20 and {r["prompt"] for r in rows_of_y} == {3, 4}
    assert diagnosis["symptoms"]["confidence"] and "format_breaks" not in diagnosis["symptoms"]
