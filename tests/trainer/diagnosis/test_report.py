"""The report of a diagnosis of hand-made token stats: only what was measured has a row, and its
plots.
"""

from dataclasses import replace

import pytest
from token_stats_cases import cross_tokenizer, student_diagnosis_cases, token_stats

from reflux.trainer.config.loader import fill
from reflux.trainer.config.schema import Config
from reflux.trainer.diagnosis.plots import plot_diagnosis
from reflux.trainer.diagnosis.report import estimate_text, render
from reflux.trainer.diagnosis.summary import diagnose_token_stats
from reflux.trainer.diagnosis.verdict import with_verdict
from reflux.trainer.runs.stats import Estimate


@pytest.fixture
def cfg():
    table = {
        "phase": "diagnose",
        "folder": "f",
        "model": {"path": "m"},
        "teacher": {"path": "t"},
        "data": {"source": "d"},
    }
    return fill(Config, table, "x.toml")


def sections(report):
    return [line[3:] for line in report.splitlines() if line.startswith("## ")]


def test_estimates_have_their_interval():
    assert estimate_text(Estimate(0.5, 0.1, 0.4, 0.6, 3)) == "0.500 [0.400, 0.600]"


def test_a_section_is_there_only_with_rows(cfg):
    diagnosis = with_verdict(diagnose_token_stats(student_diagnosis_cases(True, 4.0, True)))
    report = render(cfg, diagnosis, {"tail.png": "Tail"}, heatmap=True)
    assert report.startswith("# Diagnosis: student `m`, teacher `t`\n\n| trap |")
    assert sections(report) == [
        "KL by divergence and prefix",
        "Tail noise",
        "Off-policy instability",
        "Teacher-student gap",
        "Symptoms of the student",
    ]
    assert "\n\n![Tail](tail.png)\n\nSome texts" in report and report.endswith("method.md.\n")
    teacher_only = [replace(token_stats(i, "teacher"), band_n=None) for i in range(2)]
    report = render(cfg, with_verdict(diagnose_token_stats(teacher_only)), {}, heatmap=False)
    assert "Symptoms of the student" not in sections(report) and "heatmap" not in report
    assert "classes by frequency" not in report
    assert report.count("| not measured |") == 2 and "no texts by the student" in report


def test_blocks_are_one_blank_line_apart(cfg):
    diagnosis = with_verdict(diagnose_token_stats(student_diagnosis_cases(True, 4.0, True)))
    diagnosis = replace(diagnosis, cross_tokenizer=cross_tokenizer())
    report = render(cfg, diagnosis, {"a.png": "A"}, heatmap=True)
    assert "\n\n\n" not in report and "None" not in report
    paragraph = next(line for line in report.splitlines() if line.startswith("Two tokenizers"))
    for words in (
        "Two tokenizers (1.25 bytes a token of the student, 2.50 of the teacher).",
        "at 75.0% of 40 byte positions",
        "3.00% of the student's distribution is missing and 2.00% of the teacher's",
        "3 texts (2 by the student, 1 by the teacher) could not be compared at all",
        "0.500 [0.400, 0.600] on texts by the student.",
    ):
        assert words in paragraph, words


def test_every_plot_is_written(tmp_path):
    diagnosis = diagnose_token_stats(student_diagnosis_cases(True, 4.0, True))
    plots = plot_diagnosis(tmp_path, diagnosis)
    assert set(plots) == {"tail.png", "types.png", "positions.png"}
    for name in plots:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG"), name
