"""The sections of report.md."""

import json

import pytest
from report_runs import add_runs, write_matrix

from reflux.trainer.studies import render as module
from reflux.trainer.studies.attack_report import build_report
from reflux.trainer.studies.render import SECTIONS, Section, Table, render


@pytest.fixture
def report(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "reflux.trainer.studies.attack_report.draw_figures", lambda *_: {"curves.png": "Curves"}
    )
    write_matrix(tmp_path, {"original": 0.5, "distillable": 0.6, "undistillable": 0.2}, start=0.1)
    add_runs(tmp_path, [({"role": "baseline", "attack": "sft"}, 0.4)])
    return build_report(tmp_path)


def test_a_report_is_its_sections_in_order(report):
    text = render(report)
    titles = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert titles == [
        "In plain words",
        "The rules, one by one",
        "Teachers",
        "Students",
        "Attacks on the undistillable teacher",
        "Attacks in detail",
        "Collapse or format failure",
        "Curves",
        "How it was made",
    ]
    assert text.startswith("# T\n\n## In plain words\n\nThe undistillable teacher")
    assert text.endswith("}\n```\n") and "\n\n\n" not in text


def test_a_section_is_one_function_and_one_entry(report, monkeypatch):
    def seeds(report):
        return Section("Seeds", "All of them.", items=tuple(report.head.seeds), notes=("a", "b"))

    table = Section("Table", table=Table(("x", "y"), (("1", "2"), ("3", ""))), code="c")
    sections = (seeds, lambda report: None, lambda report: table)
    monkeypatch.setattr(module, "SECTIONS", sections)
    assert render(report) == (
        "# T\n\n## Seeds\n\nAll of them.\n\n- 0\n- 1\n\na\n\nb\n"
        "\n## Table\n\n| x | y |\n|---|---|\n| 1 | 2 |\n| 3 |  |\n\n```\nc\n```\n"
    )


def test_tables_have_as_many_cells_as_their_heads(report):
    sections = [section for make in SECTIONS if (section := make(report))]
    tables = [section.table for section in sections if section.table]
    assert len(tables) == 4
    for table in tables:
        assert table.rows and {len(row) for row in table.rows} == {len(table.head)}


def test_numbers_of_the_tables(report):
    text = render(report)
    teacher = "| distillable | 0.910 +- 0.000 | 0.910 +- 0.000 | +1.0 [+1.0, +1.0] |"
    styles = "0.0300 | 75% / 91% | 25% / 92% | 0% / not measured |"
    assert f"{teacher} +1.0 [-0.4, +2.4] n 200 | {styles}" in text  # over seeds, over items
    assert "| task_only | not run |" in text
    student = "| kd | 0.500 +- 0.000 | not run | 0.600 +- 0.000 (+20% [+20%, +20%]) |"
    assert f"{student} 0.200 +- 0.000 (-60% [-60%, -60%]) | 0.500 / - / 0.600 / 0.200 |" in text
    assert "n = 2 seeds where a cell names no other" in text
    assert "Without a teacher, sft: 0.400 +- 0.000 sampled, 0.400 greedy." in text
    assert "| kd | 0 / 0 | 0 | 10 |" in text and "| 1.25 [" in text
    assert "![Curves](curves.png)" in text


def test_the_headline_of_several_attacks_and_what_they_share_are_printed(tmp_path, monkeypatch):
    """Of the original 0.5 from 0.1: 0.25, 0.75 and 0.5 of it; and 1.25, 2 and 1.5."""
    monkeypatch.setattr("reflux.trainer.studies.attack_report.draw_figures", lambda *_: {})
    write_matrix(tmp_path, {"original": 0.5, "distillable": 0.6, "undistillable": 0.2}, start=0.1)
    scores = {"most": (0.9, 0.4), "between": (0.7, 0.3)}
    runs = [
        ({"role": "student", "teacher": t, "attack": a, "start": "student"}, accuracy)
        for a, (high, low) in scores.items()
        for t, accuracy in (("original", 0.5), ("distillable", high), ("undistillable", low))
    ]
    add_runs(tmp_path, runs)
    plain, rules = render(build_report(tmp_path)).split("\n## ")[1:3]
    for line in (
        "largest distillability of the undistillable teacher over 3 attacks (1 = what the original "
        "gives): 0.75 [0.75, 0.75] (most; n = 2 seeds), mean over 3 attacks 0.50",
        "smallest distillability of the distillable teacher over 3 attacks (1 = what the original "
        "gives): 1.25 [1.25, 1.25] (kd; n = 2 seeds), mean over 3 attacks 1.58",
    ):
        assert f"Headline: {line}." in plain and f"- headline: {line}\n" in rules
    shared = "so they are no independent confirmations of each other\n"
    assert f"the attacks share teachers, student starts and prompts, {shared}" in rules


def test_the_end_says_how_the_runs_were_made(report):
    head = json.loads(render(report).split("```")[1])
    assert head["code"] == {"commit": "c0ffee"} and head["versions"] == {"torch": "2"}
    assert head["seeds"] == ["0", "1"] and head["commands"] == ["torchrun ..."] * 3 + ["..."]
    assert head["runs"] == 16 and head["run_seconds"] == 160
