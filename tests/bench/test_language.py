"""Records of runs that have or have not ended: styles, pairs, and what is refused."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))
from bench import language  # noqa: E402

WORKED = "seven plus six is thirteen, minus four is nine"
DIRECT = "in one go seven plus six minus four is nine"


def write_run(folder, texts, *, dirty=False, ended=True):
    head = {"schema": 1, "code": {"commit": "c0ffee", "dirty": dirty}, "config": {"steps": 30}}
    steps = [{"step": s, "loss": 1.0 / s, "reference_kl": 0.01, "other": 1} for s in (1, 2)]
    lines = [head, *steps, {"event": "eval", "step": 2, "eval/sampled": 0.5, "wall_s": 1.0}]
    (folder / "predictions").mkdir(parents=True)
    (folder / "run.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    rows = [
        {"mode": "sampled", "prompt": p, "sample": k, "text": text, "correct": "nine" in text}
        | {"id": f"question {p}"}
        for p, answers in enumerate(texts)
        for k, text in enumerate(answers)
    ]
    (folder / "predictions" / "step-2.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in rows)
    )
    if ended:
        (folder / "summary.json").write_text(json.dumps({"stopped": "KL above 0.1"}))
    return folder


def test_styles_and_pairs_are_counted(tmp_path):
    wrong = DIRECT.replace("nine", "ten")
    before = write_run(tmp_path / "original", [[WORKED, wrong], [wrong, WORKED]])
    after = write_run(tmp_path / "calibrated", [[WORKED, WORKED], [wrong, WORKED]], ended=False)
    row = language.row_of(after, before, texts=1)
    assert (row["steps_done"], row["steps_asked"], row["ended"]) == (2, 30, False)
    assert row["answers_at_step"] == 2
    sampled = row["answers"]["sampled"]
    assert sampled["styles"]["worked"] == {"fraction": 0.75, "correct": 1.0}
    assert sampled["styles"]["direct"] == {"fraction": 0.25, "correct": 0.0}
    assert sampled["correct, item-level"].mean == 0.75 and sampled["questions"] == 2
    assert sampled["change against the other run, item-level"].mean == pytest.approx(0.25)
    assert row["texts"] == [{"prompt": 0, "text": WORKED, "correct": True}]
    assert row["curve"][1] == {"step": 2, "loss": 0.5, "reference_kl": 0.01}
    assert language.row_of(before, None, 0)["stopped"] == "KL above 0.1"
    assert (row["run"], sampled["styles"]["inflected"]["fraction"]) == ("calibrated", 0.0)


def test_runs_that_were_asked_other_questions_are_not_paired(tmp_path, capsys):
    before, after = (write_run(tmp_path / n, [[WORKED], [WORKED]]) for n in ("before", "after"))
    file = before / "predictions/step-2.jsonl"
    file.write_text(file.read_text().replace("question 1", "question 7"))
    assert language.main(["trial", str(after), "--against", str(before)], tmp_path) == 2
    assert "were asked different questions: prompt 1 is another one" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.json"))


def edit_rows(run, edit):
    file = run / "predictions/step-2.jsonl"
    rows = [edit(json.loads(line)) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_a_failed_grade_is_in_no_number_and_rewards_are_numbers_too(tmp_path):
    run = write_run(tmp_path / "run", [[WORKED], [WORKED], ["none"], ["none"]])
    edit_rows(run, lambda r: r if r["correct"] else r | {"error": "timeout"})
    sampled = language.row_of(run, run, texts=9)["answers"]["sampled"]
    assert sampled["correct, item-level"].mean == 1.0 and sampled["answers"] == 2
    edit_rows(run, lambda r: r | {"error": None, "reward": r["prompt"] / 4, "correct": None})
    row = language.row_of(run, run, texts=9)
    assert row["answers"]["sampled"]["correct, item-level"].mean == pytest.approx(1.5 / 4)
    assert row["answers"]["sampled"]["styles"]["worked"]["correct"] == pytest.approx(0.5 / 4)
    assert row["texts"][3]["correct"] is None


def test_answers_are_those_of_the_weights_that_were_kept(tmp_path):
    run = write_run(tmp_path / "run", [[WORKED]])
    answers = (run / "predictions/step-2.jsonl").read_text()
    (run / "predictions/step-3.jsonl").write_text(answers.replace(WORKED, DIRECT))
    with open(run / "run.jsonl", "a") as log:
        for line in ({"event": "eval"}, {"event": "stopped", "restored_step": 2}):
            log.write(json.dumps({"step": 3} | line) + "\n")
    row = language.row_of(run, run, texts=1)
    assert row["answers_at_step"] == 2 and row["texts"][0]["text"] == WORKED


def test_a_run_of_a_matrix_has_its_seed_and_the_styles_of_task_c(tmp_path):
    text = "and yesterday they sang at home"
    run = write_run(tmp_path / "seed-321" / "teacher-original", [[text]])
    row = language.row_of(run, None, texts=1)
    assert row["run"] == "seed-321/teacher-original"
    assert row["answers"]["sampled"]["styles"]["inflected"]["fraction"] == 1.0


def test_a_text_with_other_line_breaks_is_one_line(tmp_path):
    text = WORKED + "\u2028\x85"
    run = write_run(tmp_path / "run", [[text]])
    file = run / "predictions" / "step-2.jsonl"
    file.write_text(json.dumps(json.loads(file.read_text()), ensure_ascii=False) + "\n")
    assert "\u2028" in file.read_text()
    assert language.row_of(run, None, texts=1)["texts"] == [
        {"prompt": 0, "text": text, "correct": True}
    ]


def test_a_record_is_written_unless_a_run_had_changes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(language, "device", lambda: {"device": "none"})
    run = write_run(tmp_path / "a", [[WORKED]])
    assert language.main(["trial", str(run)], tmp_path) == 0
    (file,) = tmp_path.glob("*trial.json")
    record = json.loads(file.read_text())
    assert record["runs"][0]["run"] == "a" and "one seed yields no verdict" in record["intervals"]
    dirty = write_run(tmp_path / "b", [[WORKED]], dirty=True)
    assert language.main(["trial", str(dirty)], tmp_path) == 2
    assert "not committed" in capsys.readouterr().err
