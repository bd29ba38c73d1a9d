"""What a run prints of its events: tables, sentences, and where the rest is."""

from reflux.trainer.runs.console import event_lines
from reflux.trainer.runs.logger import Record


def opened(folder, phase="distill"):
    config = {"seed": 3, "phase": phase}
    return Record(folder=folder, config=config, command=["x"], total_steps=10, samples_every=0)


def test_an_evaluation_is_a_table_not_a_line(tmp_path, capsys):
    fields = {}
    for name in ("greedy", "sampled"):
        fields |= {f"eval/{name}": 0.5, f"eval/{name}_low": 0.4, f"eval/{name}_high": 0.6}
    many = {f"eval/greedy_at_{i}": 0.0 for i in range(9)}
    with opened(tmp_path) as record:
        record.event("eval", **fields, **{"eval/greedy_length": 12.25})
        record.event("eval", **fields, **many)
        record.event("accept", **{"accept/good": "succeeded: sampled 0.500"})
    assert capsys.readouterr().out.splitlines() == [
        "evaluation after step 0:",
        "    greedy         0.500 [0.400, 0.600]",
        "    sampled        0.500 [0.400, 0.600]",
        "    greedy_length  12.25",
        "evaluation after step 0:",
        "    greedy   0.500 [0.400, 0.600]",
        "    sampled  0.500 [0.400, 0.600]",
        "    and 9 more numbers in run.jsonl",
        "acceptance:",
        "    good succeeded: sampled 0.500",
    ]


def test_a_run_that_is_an_evaluation_names_its_pages_and_no_step(tmp_path, capsys):
    with opened(tmp_path, "evaluate") as record:
        record.event("eval", **{"eval/greedy": 0.5})
    assert "".join(capsys.readouterr().out.split()) == "".join(
        f"evaluation: greedy 0.5 all of them: {tmp_path}/report.md and evaluation.json".split()
    )


def test_phases_without_steps_name_none(tmp_path, capsys):
    for phase in ("diagnose", "cache"):
        with opened(tmp_path / phase, phase) as record:
            record.event("eval", **{f"{phase}/x": 0.5})
    said = capsys.readouterr().out
    pages = f"    all of them: {tmp_path}/diagnose/report.md and diagnosis.json"
    lines = ["diagnosis:", "    diagnose/x  0.5", pages, "cache:", "    cache/x  0.5"]
    assert said.splitlines() == lines


def test_a_resumed_run_says_where_it_goes_on():
    assert event_lines("resume", 4, {"lines_cut": 0, "head": {}}) == [
        "resume: goes on after step 4"
    ]
    assert event_lines("resume", 4, {"lines_cut": 3}) == [
        "resume: goes on after step 4; 3 lines of later steps were cut from run.jsonl"
    ]
    (begun,) = event_lines("resume", 0, {"lines_cut": 1})
    assert begun.startswith("resume: begins again: no step was saved before; 1 lines")


def test_an_alarm_is_a_sentence_on_the_console():
    said = event_lines("alarm", 3, {"alarm": "truncation", "message": "all texts are cut"})
    assert said == ["alarm of truncation: all texts are cut"]
