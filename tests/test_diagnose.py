"""The phase `diagnose` on small models: what lies on disk agrees with itself, and a model has no trap with itself."""
import json
import re

import pytest
from runs import config, run_here, run_ranks

pytestmark = [pytest.mark.usefixtures("titan_process"), pytest.mark.filterwarnings("ignore")]
TASK = {"task": {"name": "runs:is_even"}, "data": {"limit": 5}, "rollout": {"max_tokens": 12}}


def diagnose(talkers, folder, run=run_here, **over):
    options = {"prefixes": ["dataset", "teacher", "student"], "student_texts": 4, "heat": 3} | over.pop("diagnose", {})
    log = run(config(talkers, folder, "diagnose", diagnose=options, **TASK, **over))
    rows = [json.loads(line) for line in (folder / "tokens.jsonl").read_text().splitlines()]
    return log, json.loads((folder / "diagnosis.json").read_text()), rows


def test_the_files_agree_with_each_other(talkers, tmp_path):
    log, found, rows = diagnose(talkers, tmp_path / "run")
    by_writer = {w: [r for r in rows if r["writer"] == w] for w in ("dataset", "teacher", "student")}
    assert {w: len(v) for w, v in by_writer.items()} == {"dataset": 5, "teacher": 10, "student": 20}
    for w, texts in by_writer.items():
        tokens = sum(len(r["ids"]) for r in texts)
        assert found["texts"][w] == {"texts": len(texts), "prompts": 5, "tokens": tokens}
        for d in ("forward", "reverse"):
            total = sum(sum(r[f"kl_{d}"]) for r in texts)
            assert found["grid"][d][w]["per_token"]["mean"] == pytest.approx(total / tokens, rel=1e-4) and total > 0
    assert all(len(r["ids"]) == len(r["kl_forward"]) == len(r["student_logp"]) == len(r["pieces"]) for r in rows)
    for r in rows:  # pieces spell the text, up to the stop token and characters cut in half
        assert r["text"].startswith("".join(r["pieces"][:3])) or "\ufffd" in "".join(r["pieces"])
    event = next(e for e in log.events if e["event"] == "eval")
    assert event["diagnose/tail_noise"] == pytest.approx(found["verdict"][0]["mean"])
    assert log.steps == [] and not (tmp_path / "run" / "export").exists() and log.summary is not None


def test_the_report_shows_what_was_measured(talkers, tmp_path):
    _, found, _ = diagnose(talkers, tmp_path / "run")
    report = (tmp_path / "run" / "report.md").read_text()
    for trap in found["verdict"]:
        assert trap["trap"] in report and trap["advice"] in report and f"{trap['mean']:.3f}" in report
    for name in re.findall(r"\]\(([^)]+)\)", report):
        assert (tmp_path / "run" / name).stat().st_size > 1000, name
    assert "None" not in report and "{" not in report


def test_a_model_has_nothing_to_learn_from_itself(talkers, tmp_path):
    over = {"teacher": {"path": str(talkers / "policy")}}
    _, found, rows = diagnose(talkers, tmp_path / "run", **over)
    assert max(max(map(abs, r["kl_forward"] + r["kl_reverse"])) for r in rows) < 1e-9
    assert all(a == pytest.approx(b, abs=1e-4) for r in rows for a, b in zip(r["student_logp"], r["teacher_logp"]))
    assert found["gap"]["overlap"]["mean"] == 1.0 and abs(found["gap"]["entropy_gap"]["mean"]) < 1e-9
    assert found["off_policy"]["effective_samples"]["whole"]["mean"] == pytest.approx(1.0, abs=1e-3)


def test_two_ranks_find_what_one_finds(talkers, tmp_path):
    _, one, rows = diagnose(talkers, tmp_path / "one")
    _, two, others = diagnose(talkers, tmp_path / "two", run=run_ranks)
    assert sorted(r["text"] for r in rows) == sorted(r["text"] for r in others)
    for d in ("forward", "reverse"):
        assert two["grid"][d]["student"]["per_token"]["mean"] == pytest.approx(one["grid"][d]["student"]["per_token"]["mean"], rel=1e-5)
    assert two["gap"]["wrong_trace"]["pair"]["mean"] == pytest.approx(one["gap"]["wrong_trace"]["pair"]["mean"])


def test_without_a_task_there_is_no_gap_and_no_probe(talkers, tmp_path):
    folder = tmp_path / "run"
    run_here(config(talkers, folder, "diagnose", task={"name": ""}, data={"limit": 2}, diagnose={"student_texts": 2, "heat": 0}))
    rows = [json.loads(line) for line in (folder / "tokens.jsonl").read_text().splitlines()]
    found = json.loads((folder / "diagnosis.json").read_text())
    assert all(r["right"] is None for r in rows) and "wrong_trace" not in found["gap"] and "correction" not in found["symptoms"]
    assert not (folder / "heat.html").exists()


def test_the_correction_probe_cuts_right_texts(talkers, tmp_path):
    """The talkers answer "a+b is => c": every right text holds digits to break."""
    cfg = config(talkers, tmp_path / "run", "diagnose", task={"name": "exact", "options": {"marker": "=>"}}, rollout={"max_tokens": 16},
                 diagnose={"prefixes": ["dataset"]}, data={"limit": 4})
    run_here(cfg)
    probe = json.loads((tmp_path / "run" / "diagnosis.json").read_text())["symptoms"]["correction"]
    assert 1 <= probe["cuts"] <= 12 and 0 <= probe["right_after_error"] <= 1
    assert probe["student_gain"] != probe["teacher_gain"]
