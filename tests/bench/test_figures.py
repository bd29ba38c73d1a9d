"""The pictures of the documentation come from records, all of them, and say from which."""

import json
import re
from pathlib import Path

import pytest

from bench import figures

ROOT = Path(__file__).parents[2]
RECORD = json.loads((figures.RECORDS / figures.REPORT).read_text())


def test_no_picture_is_stale_and_none_is_drawn_by_nothing(capsys):
    assert figures.main(["--check"]) == 0, capsys.readouterr().out + "python -m bench.figures"


def test_every_picture_of_the_pages_has_a_record_and_a_draw_function():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    shown = {n for p in pages for n in re.findall(r"\]\([^)]*figures/([\w.]+)\)", p.read_text())}
    assert shown == set(figures.PICTURES) | set(figures.examples()), "shown, and nothing else"
    for picture in figures.PICTURES.values():
        assert (figures.RECORDS / picture.record).is_file() and callable(picture.draw)


@pytest.mark.parametrize("name", figures.PICTURES)
def test_the_same_record_gives_the_same_file(name, tmp_path):
    once = figures.draw(name, tmp_path).read_bytes()
    assert figures.texts(tmp_path / name)["Source"] == figures.source(name)
    assert figures.draw(name, tmp_path).read_bytes() == once
    committed = figures.FOLDER / name
    if figures.texts(committed)["Software"] == figures.texts(tmp_path / name)["Software"]:
        assert committed.read_bytes() == once, f"{name}: run python -m bench.figures"


def test_bars_are_the_numbers_of_the_record():
    ax = figures.students(RECORD, ("seq_kd", "kd_top1")).axes[0]
    heights = [p.get_height() for p in ax.patches if not p.get_hatch()]
    report = RECORD["report"]["students"]
    said = [
        report[a][t]["sampled"]["mean"]
        for t in figures.TEACHERS
        for a in ("seq_kd", "kd_top1")
        if t in report[a]
    ]
    assert heights == pytest.approx(said), "teachers one after the other"
    assert [t.get_text() for t in ax.texts] == ["not run"], "no control arm of kd_top1"
    labels = ax.get_legend_handles_labels()[1]
    assert labels[1] == "students at the start (0.03)" and labels[2].startswith("chance: not meas")
    points = [n for c in ax.collections if (n := len(c.get_offsets())) > 1]
    assert points == [3] * len(said), "a point for each seed"


def test_every_eta_has_its_label_and_what_was_not_measured_is_no_point():
    figure = figures.eta_sweep(RECORD)
    etas = [p["eta"] for p in RECORD["knob"]["points"]]
    for ax in figure.axes:
        assert [float(t.get_text()) for t in ax.get_xticklabels()] == etas
    reward = figure.axes[2]
    assert [t.get_text() for t in reward.texts] == ["not measured"]


def test_an_unknown_picture_and_a_stale_one_are_named(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        figures.main(["studnets.png"])
    assert ended.value.code == 2 and "no picture studnets.png; want students" in (
        capsys.readouterr().err
    )
    (tmp_path / "strange.png").write_bytes((figures.FOLDER / "styles.png").read_bytes())
    (tmp_path / "styles.png").write_bytes((figures.FOLDER / "students.png").read_bytes())
    monkeypatch.setattr(figures, "FOLDER", tmp_path)
    monkeypatch.setattr(figures, "source", lambda name: f"today's {name}")
    assert figures.main(["--check"]) == 1
    said = capsys.readouterr().out.split()
    assert {"strange.png:", "styles.png:", "eta_sweep.png:"} <= set(said)


def test_a_record_without_runs_of_the_start_takes_it_from_the_attacks():
    record = json.loads((figures.RECORDS / figures.LANGUAGE).read_text())
    runs = [r for r in record["report"]["runs"] if r.get("attack") == "seq_kd"]
    start = sum(r["at_start"] for r in runs) / len(runs)
    ax = figures.students(record, figures.LANGUAGE_ATTACKS).axes[0]
    labels = ax.get_legend_handles_labels()[1]
    assert f"students at the start ({start:.2f})" in labels and start > 0.3
