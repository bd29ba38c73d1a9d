"""A log that survives killed processes, torn lines and resumes, and a console line."""

import io
import json
import math
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import reflux.trainer.runs.logger as module
from reflux.trainer.runs.logger import Record, load_run


def opened(folder, **options):
    defaults = dict(
        config={"seed": 3, "path": folder},
        command=["main.py", "x.toml"],
        total_steps=10,
        samples_every=2,
        quiet=True,
    )
    return Record(folder=folder, **{**defaults, **options})


def wrote(folder, steps, **options):
    with opened(folder, **options) as record:
        for step in steps:
            record(step, {"loss": 1 / step}, [{"text": f"sample {step}"}])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_reads_back(tmp_path):
    with opened(tmp_path) as record:
        record(
            1,
            {
                "loss": 1 / 3,
                "eta": "distillable 0.5",
                "t": torch.tensor(2.5),
                "n": np.float64(0.1),
                "count": 3,
            },
        )
        record.event("kl_budget", kl=0.11)
        record(2, {"loss": 0.25})
    run = load_run(tmp_path)
    assert [step["step"] for step in run.steps] == [1, 2]
    assert {k: v for k, v in run.steps[0].items() if k != "wall_s"} == {
        "step": 1,
        "loss": 1 / 3,
        "eta": "distillable 0.5",
        "t": 2.5,
        "n": 0.1,
        "count": 3,
    }
    assert [(e["event"], e["step"], e["kl"]) for e in run.events] == [("kl_budget", 1, 0.11)]
    assert (
        run.summary["step"] == 2
        and run.summary["events"] == {"kl_budget": 1}
        and run.summary["last"] == {"loss": 0.25}
    )
    assert run.summary["wall_s"] >= run.steps[1]["wall_s"] >= run.steps[0]["wall_s"] >= 0


def test_the_head_says_what_ran(tmp_path):
    wrote(tmp_path, [1])
    head = load_run(tmp_path).head
    assert head["command"] == ["main.py", "x.toml"] and head["config"] == {
        "seed": 3,
        "path": str(tmp_path),
    }
    assert (
        head["versions"]["torch"] == torch.__version__ and head["versions"]["python"] in sys.version
    )
    assert head["seeds"]["config"] == 3 and head["device"] and head["ranks"] >= 1


def test_the_head_names_the_commit_and_the_changes_on_top(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(
            ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words],
            check=True,
            capture_output=True,
        )

    file = tmp_path / "record.py"
    monkeypatch.setattr(module, "__file__", str(file))
    file.write_text("one\n")
    assert module._code_state() == (None, "")
    git("init")
    assert module._code_state() == (None, "")  # inside a checkout, but not tracked there
    git("add", "record.py")
    git("commit", "-m", "x")
    clean, diff = module._code_state()
    assert len(clean["commit"]) == 40 and not clean["dirty"] and diff == ""
    file.write_text("two\n")
    dirty, diff = module._code_state()
    assert (
        dirty["dirty"]
        and dirty["commit"] == clean["commit"]
        and dirty["diff_sha256"]
        and "+two" in diff
    )
    wrote(tmp_path / "run", [1])
    assert "+two" in (tmp_path / "run" / "code.diff").read_text()


@pytest.fixture
def fast_head(monkeypatch):
    monkeypatch.setattr(module, "_code_state", lambda: (None, ""))
    monkeypatch.setattr(module, "_versions", dict)


# the same patch serves every example
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=st.integers(1, 8), saved=st.integers(0, 8), torn=st.text(max_size=5))
def test_after_a_resume_there_is_one_line_a_step(fast_head, tmp_path_factory, first, saved, torn):
    folder, saved = tmp_path_factory.mktemp("run"), min(saved, first)
    wrote(folder, range(1, first + 1))
    with open(folder / "run.jsonl", "a") as file:
        file.write('{"step": 9' + torn.replace("\n", ""))
    wrote(folder, range(saved + 1, 11), resumed_step=saved)
    run = load_run(folder)
    assert [step["step"] for step in run.steps] == list(range(1, 11))
    assert [line["step"] for line in lines(folder / "samples.jsonl")] == [2, 4, 6, 8, 10]
    assert all(a["wall_s"] <= b["wall_s"] for a, b in zip(run.steps, run.steps[1:]))
    assert [(e["event"], e["step"], e["lines_cut"]) for e in run.events] == [
        ("resume", saved, first - saved)
    ]
    assert run.events[0]["head"]["command"] == ["main.py", "x.toml"]


def test_wall_time_goes_on_after_a_resume(tmp_path):
    wrote(tmp_path, [1])
    path = tmp_path / "run.jsonl"
    path.write_text(re.sub(r'"wall_s": [\d.e-]+', '"wall_s": 1000.0', path.read_text()))
    wrote(tmp_path, [2], resumed_step=1)
    run = load_run(tmp_path)
    assert 1000 <= run.steps[1]["wall_s"] <= run.summary["wall_s"] < 1100


def test_a_resumed_run_knows_its_last_step_and_its_alarms(tmp_path):
    with opened(tmp_path) as record:
        for step in (1, 2, 3):
            record(step, {"loss": 1 / step})
            record.event("alarm", alarm="x", message=f"of step {step}")
    with opened(tmp_path, resumed_step=2) as record:
        assert record.last_metrics == {"loss": 0.5}
        assert list(record.alarms) == ["of step 1", "of step 2"]
    assert load_run(tmp_path).summary["last"] == {"loss": 0.5}


@pytest.mark.parametrize(
    "lost, words",
    [
        ([], ""),
        ([4], "no line of step 4, though"),
        ([1], "no line of step 1, though"),
        ([9], "no line of step 9, though"),  # the end of the file is lost
        ([2, 5, 6, 7, 9], "no line of step 2, 5 to 7, 9, though"),
        ([8, 9, 10], "no line of step 8 to 9, though"),  # step 10 is after the checkpoint
        (range(1, 10, 2), "no line of step 1, 3, 5, 7, 9, though"),
        (range(1, 10), "no line of step 1 to 9, though"),
    ],
)
def test_a_log_that_has_lost_lines_is_reported_by_a_resume(tmp_path, lost, words):
    wrote(tmp_path, range(1, 11))
    kept = [x for x in lines(tmp_path / "run.jsonl") if x.get("step") not in lost]
    (tmp_path / "run.jsonl").write_text("".join(json.dumps(x) + "\n" for x in kept))
    wrote(tmp_path, [10], resumed_step=9)
    told = [e["message"] for e in load_run(tmp_path).events if e["event"] == "log_incomplete"]
    assert len(told) == bool(words) and all(words in message for message in told)
    count = len([step for step in lost if step < 10])
    assert all(f"checkpoint of step 9: {count} of 9 lines were lost" in m for m in told)


def test_many_gaps_of_a_log_are_counted(tmp_path):
    wrote(tmp_path, range(2, 41, 2))
    wrote(tmp_path, [41], resumed_step=40)
    told = [e["message"] for e in load_run(tmp_path).events if e["event"] == "log_incomplete"]
    assert "step 1, 3, 5, 7, 9 and 15 more ranges" in told[0] and "20 of 40 lines" in told[0]


def test_the_summary_says_how_the_run_ended(tmp_path):
    with opened(tmp_path) as record:
        record.exit_code, record.stopped = 4, "KL"
    summary = load_run(tmp_path).summary
    assert (summary["exit_code"], summary["stopped"]) == (4, "KL")
    wrote(tmp_path, [])
    assert load_run(tmp_path).summary["stopped"] is None, "another end of the same run"


@pytest.mark.parametrize("text", ['{"step": 1, "wall_s": 0.1}\n', '{"text": "a sample"}\n'])
def test_another_file_in_the_place_of_the_log_is_not_continued(tmp_path, text):
    (tmp_path / "run.jsonl").write_text(text)
    with pytest.raises(ValueError, match="the first line is no head.*Put the file back"):
        with opened(tmp_path):
            pass
    assert (tmp_path / "run.jsonl").read_text() == text


def test_events_of_undone_steps_are_cut(tmp_path):
    with opened(tmp_path) as record:
        for step in (1, 2, 3):
            record(step, {})
            record.event("evaluation", accuracy=step)
    wrote(tmp_path, [3], resumed_step=2)
    run = load_run(tmp_path)
    assert [(e["event"], e["step"]) for e in run.events] == [
        ("evaluation", 1),
        ("evaluation", 2),
        ("resume", 2),
    ]
    assert run.summary["events"] == {"evaluation": 2, "resume": 1}


LOGGING = """
import sys
from reflux.trainer.runs.logger import Record
with Record(
    folder=sys.argv[1], config={}, command=[], total_steps=10**9, samples_every=1, quiet=True
) as record:
    for step in range(1, 10**9):
        record(step, {"loss": 1.0 / step, "note": "x" * 5000}, [{"text": "y"}])
        if step == 50:
            print("going", flush=True)
"""


def test_a_killed_process_loses_no_line_it_had_written(tmp_path):
    command = [sys.executable, "-c", LOGGING, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"going\n"
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    run = load_run(tmp_path)
    assert run.summary is None and len(run.steps) >= 50
    assert [step["step"] for step in run.steps] == list(range(1, len(run.steps) + 1))
    wrote(tmp_path, [41], resumed_step=40)
    assert [step["step"] for step in load_run(tmp_path).steps] == list(range(1, 42))


def test_a_torn_end_is_left_out_and_a_torn_middle_is_located(tmp_path):
    wrote(tmp_path, [1, 2])
    path = tmp_path / "run.jsonl"
    whole = path.read_bytes()
    for end in range(len(whole) - 10, len(whole)):
        path.write_bytes(whole[:end])
        assert [step["step"] for step in load_run(tmp_path).steps] == [1]
    path.write_bytes(whole.replace(b'{"step": 1', b'{"ste', 1))
    with pytest.raises(ValueError, match="run.jsonl, line 2"):
        load_run(tmp_path)


def test_an_interrupted_cut_leaves_the_old_log(tmp_path, monkeypatch):
    wrote(tmp_path, [1, 2, 3])
    before = (tmp_path / "run.jsonl").read_bytes()

    def crash(*_):
        raise OSError("power cut")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="power cut"):
        patch.setattr(os, "replace", crash)
        opened(tmp_path, resumed_step=1).__enter__()
    assert (tmp_path / "run.jsonl").read_bytes() == before


def test_a_summary_means_a_clean_end(tmp_path):
    wrote(tmp_path, [1, 2])
    assert load_run(tmp_path).summary
    with pytest.raises(RuntimeError), opened(tmp_path, resumed_step=2) as record:
        assert load_run(tmp_path).summary is None
        record(3, {})
        raise RuntimeError("out of memory")
    run = load_run(tmp_path)
    assert run.summary is None and run.events[-1]["error"] == "RuntimeError: out of memory"


def test_what_is_not_finite_is_valid_json_and_reads_back(tmp_path):
    with opened(tmp_path) as record:
        record(1, {"a": math.nan, "b": -math.inf, "c": torch.tensor(math.inf), "d": "half \ud83d"})
    text = (tmp_path / "run.jsonl").read_text()
    assert [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    step = load_run(tmp_path).steps[0]
    assert math.isnan(step["a"]) and step["b"] == -math.inf and step["c"] == math.inf


def test_other_ranks_write_nothing(tmp_path, capsys):
    with opened(tmp_path / "none", is_main=False, quiet=False) as record:
        record(1, {"loss": 1.0}, [{"text": "a"}])
        record.event("x")
    assert not (tmp_path / "none").exists() and capsys.readouterr().out == ""


def test_steps_go_forward_and_reserved_names_are_errors(tmp_path):
    with opened(tmp_path, resumed_step=4) as record:
        for step in (4, 3):
            with pytest.raises(ValueError, match="after step 4"):
                record(step, {})
        with pytest.raises(ValueError, match="named event, step"):
            record(5, {"step": 1, "event": 2})


def test_the_console_line(tmp_path, capsys):
    metrics = {
        "loss": 0.123456,
        "loss/reference": 0.01,
        "reward/task": 0.5,
        "reward/cal": -0.25,
        "eta": "distillable 0.5",
        "reference_kl": 0.0123,
        "length": 101.4,
        "truncated": 0.031,
        "tokens_per_s": 12345.6,
        "memory_gib": 3.21,
        "secret": 1,
    }
    with opened(tmp_path, quiet=False) as record:
        record(3, metrics)
        record(4, {"loss": 1.0}, [{"prompt": "[red]2+2[/red]", "text": "4\n" * 500 + "end"}] * 3)
        record.event("kl_budget", kl=0.123456)
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(
        "step 3/10 | loss 0.1235 | reference 0.0100 | task 0.500 | cal -0.250 | "
        "eta distillable 0.5 | reference KL 0.0123 | length 101 | truncated 3.1% | "
        "tok/s 12,346 | mem 3.2 GiB | left 0 s"
    )
    assert out[2] == "    prompt: [red]2+2[/red]" and out[3].endswith("end") and len(out[3]) < 300
    assert len(out) == 2 + 2 * 2 + 1 and out[-1] == "kl_budget: kl 0.1235"
    assert len(lines(tmp_path / "samples.jsonl")) == 3
    assert not any("\x1b" in line for line in out)


def test_a_terminal_gets_the_same_words(tmp_path, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with opened(tmp_path, quiet=False) as record:
        record(1, {"eta": "off"})
    assert "step 1/10 | eta off | left" in re.sub("\x1b\\[[0-9;]*m", "", terminal.getvalue())


def test_time_left_is_the_median_step_times_the_steps_left(tmp_path, capsys, monkeypatch):
    clock = iter([0.0, *(t for s in range(1, 4) for t in [s * 60.0] * 2), *[999.0] * 9])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    with opened(tmp_path, quiet=False, total_steps=103) as record:
        for step in (1, 2, 3):
            record(step, {})
    assert [line.split("left ")[1] for line in capsys.readouterr().out.splitlines()] == [
        "1h 42m",
        "1h 41m",
        "1h 40m",
    ]


def test_a_tracker_sees_every_step_and_cannot_end_the_run(tmp_path, caplog):
    seen = []

    def tracker(step, metrics):
        seen.append((step, metrics["loss"]))
        raise ConnectionError("down")

    wrote(tmp_path, [1, 2], on_numbers=tracker)
    assert seen == [(1, 1.0), (2, 0.5)] and "ConnectionError: down" in caplog.text
    assert load_run(tmp_path).summary


def test_a_tracker_sees_evaluations_of_their_own_step(tmp_path):
    """Their numbers; alarms, verdicts and texts are none."""
    seen = []
    with opened(tmp_path, on_numbers=lambda *of: seen.append(of)) as record:
        record(2, {"loss": 1.0, "why": "words"})
        record.event("eval", **{"eval/accuracy": np.float32(0.5), "eval/worst": "words"})
        record.event("accept", **{"accept/better": "failed", "accept/by": 1.0})
        record.event("eval", step=1, **{"eval/accuracy": 0.25})
    assert seen == [
        (2, {"loss": 1.0}),
        (2, {"eval/accuracy": 0.5}),
        (1, {"eval/accuracy": 0.25}),
    ]


def test_a_folder_without_a_run_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no run.jsonl"):
        load_run(tmp_path)
    (tmp_path / "run.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(ValueError, match="no head"):
        load_run(tmp_path)


def test_a_sampled_text_cannot_steer_the_terminal(tmp_path, capsys):
    with opened(tmp_path, quiet=False) as record:
        record(2, {}, [{"text": "a\nb\x1b[31m\r c\x85 \u2028 é"}])
    shown = capsys.readouterr().out.split("\n")[1]
    assert shown == "    text: a\\nb\\x1b[31m\\r c\\x85 \\u2028 é"
