"""Defences and the checks of A5, from runs whose numbers are known."""

import json

import pytest
from report_runs import add_runs, write_matrix

from reflux.trainer.runs.stats import over_seeds
from reflux.trainer.studies.attack_report import build_report, write_report
from reflux.trainer.studies.defence_report import (
    check_lines,
    defence_results,
    proxy_lines,
    proxy_results,
)
from reflux.trainer.studies.finished_runs import load_finished_runs
from reflux.trainer.studies.results import CalibratedByProxy, ProxyResult

EXAMPLES = {"data": {"limit": 50}}
SEEDS = "012"  # fewer give no verdict


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    monkeypatch.setattr("reflux.trainer.studies.attack_report.draw_figures", lambda *_: {})


@pytest.fixture
def folder(tmp_path):
    scores = {"original": 0.5, "distillable": 0.6, "undistillable": 0.2}
    write_matrix(tmp_path, scores, start=0.1, seeds=SEEDS)
    matrix = json.loads((tmp_path / "matrix.json").read_text())
    for cell in matrix["cells"]:
        if cell["labels"].get("attack") == "kd":
            cell["labels"]["attack"] = "seq_kd"
    (tmp_path / "matrix.json").write_text(json.dumps(matrix))
    return tmp_path


def student(teacher, attack="seq_kd", **labels):
    return {"role": "student", "teacher": teacher, "attack": attack} | labels


def test_defences_stand_beside_the_undefended_original(folder):
    add_runs(
        folder,
        [
            ({"role": "defence", "defence": "poe"}, 0.7),
            (student("original", defence="poe"), 0.3),
            (student("original", "answers_only"), 0.9),
        ],
        seeds=SEEDS,
    )
    results = defence_results(load_finished_runs(folder))
    assert list(results) == ["none", "undistillable", "answers only, reasoning withheld", "poe"]
    assert results["poe"].price.mean == pytest.approx(0.2)
    none, rewritten, poe = (
        results["none"],
        results["answers only, reasoning withheld"],
        results["poe"],
    )
    assert rewritten.served.mean == pytest.approx(0.9)  # as correct as before
    assert rewritten.change.mean == pytest.approx(0.8)
    assert poe.served.mean == pytest.approx(0.7) and poe.student.mean == pytest.approx(0.3)
    assert poe.change.mean == pytest.approx(-0.4)
    assert poe.score.mean == pytest.approx(0.5)  # (0.3 - 0.1) / (0.5 - 0.1)
    assert none.served.mean == pytest.approx(0.9) and none.student.mean == pytest.approx(0.5)
    write_report(folder)
    markdown = (folder / "report.md").read_text()
    assert "| poe | 0.700 +- 0.000 | 0.300 +- 0.000 | -40% [-40%, -40%] | 0.50 [" in markdown
    assert "| task_only | not run |" in markdown  # the control, as long as no run is there
    report = json.loads((folder / "report.json").read_text())
    # the defended one is not among them
    original = report["students"]["seq_kd"]["original"]["sampled"]
    assert original["mean"] == pytest.approx(0.5)


def test_the_undistillable_teacher_is_a_defence(folder):
    write_report(folder)
    markdown = (folder / "report.md").read_text()
    assert "## Other defences" in markdown and "| undistillable | 0.890" in markdown
    assert "product" not in markdown


def test_text_at_another_temperature_is_served_at_its_own_accuracy(folder):
    """The attack seq_kd_cold is the student of it. Without a run of role `defence` the price is
    unknown, not the model's.
    """
    add_runs(folder, [(student("original", "seq_kd_cold"), 0.2)], seeds=SEEDS)
    assert defence_results(load_finished_runs(folder))["temperature 0.5"].served.n == 0
    effect = "halves (or more) what students take (0.500 to 0.200, -60% [-60%, -60%])"
    move = "an attacker's own move, too"
    sentence = f'Serving "temperature 0.5" ({move}) {effect}, at a price not measured.'
    assert sentence in build_report(folder).conclusion
    add_runs(folder, [({"role": "defence", "defence": "temperature 0.5"}, 0.7)], seeds=SEEDS)
    cold = defence_results(load_finished_runs(folder))["temperature 0.5"]
    assert cold.served.mean == pytest.approx(0.7) and cold.student.mean == pytest.approx(0.2)
    price = "-60%]), at +20.0 [+20.0, +20.0] points of served accuracy."
    assert price in build_report(folder).conclusion


@pytest.mark.parametrize(
    "repaired, seeds, word",
    [
        (0.2, SEEDS, "the drop survives"),
        (0.45, SEEDS, "does not survive"),
        (0.2, "01", "inconclusive: whether the drop survives"),
    ],
)
def test_a_drop_that_a_repair_brings_back_does_not_survive(folder, repaired, seeds, word):
    accuracies = {"original": 0.5, "undistillable": repaired}
    runs = [({"role": "repair", "teacher": t}, a) for t, a in accuracies.items()]
    add_runs(folder, runs, EXAMPLES, seeds)
    (line,) = check_lines(load_finished_runs(folder))
    assert line.startswith("after 50 worked examples") and line.endswith(word)
    assert f"{repaired:.3f}" in line


@pytest.mark.parametrize(
    "other, seeds, word",
    [
        (0.3, SEEDS, "is lower, too"),
        (0.6, SEEDS, "is not lower: generation and likelihood disagree"),
        (0.3, "01", "is lower in the mean, inconclusive over seeds"),
    ],
)
def test_likelihood_agrees_or_does_not(folder, other, seeds, word):
    accuracies = {"original": 0.5, "undistillable": other}
    runs = [({"role": "choices", "teacher": t}, a) for t, a in accuracies.items()]
    add_runs(folder, runs, seeds=seeds)
    (line,) = check_lines(load_finished_runs(folder))
    assert word in line and f"student of undistillable {other:.3f}" in line


def test_a_repair_that_leaves_the_original_nothing_is_not_compared(folder):
    runs = [({"role": "repair", "teacher": t}, 0.0) for t in ("original", "undistillable")]
    add_runs(folder, runs, EXAMPLES)
    (line,) = check_lines(load_finished_runs(folder))
    assert "nan" not in line and "the original's have no correct answer" in line
    assert line.endswith("not known whether the drop survives")


@pytest.mark.parametrize("order", [("a", "b", "c"), ("c", "b", "a"), ("b", "a", "c")])
def test_a_proxy_without_a_number_does_not_decide_the_range(order):
    def estimate(mean):
        return over_seeds([mean])

    def proxy(mean):
        modes = {"distillable": CalibratedByProxy(estimate(0.9), {"seq_kd": estimate(mean)})}
        return ProxyResult(estimate(0.5), modes)

    means = {"a": float("nan"), "b": 0.25, "c": 0.75}
    (line,) = proxy_lines({name: proxy(means[name]) for name in order})
    assert "from 0.25 (b) to 0.75 (c), a range of means of 0.50 over 2 proxies" in line


def test_likelihoods_of_different_seeds_are_not_compared(folder):
    for seed, teacher in (("0", "original"), ("1", "undistillable")):
        add_runs(folder, [({"role": "choices", "teacher": teacher}, 0.5)], seeds=seed)
    (line,) = check_lines(load_finished_runs(folder))
    assert line.endswith("is not compared: no seed has both")


def test_a_difference_within_the_interval_over_seeds_is_inconclusive(folder):
    """By seed 0.5 -> 0.45 and 0.5 -> 0: lower by 0.275 in the mean, with an interval of two seeds
    that holds 0.
    """

    def add(teacher, accuracy, seeds):
        runs = [({"role": role, "teacher": teacher}, accuracy) for role in ("choices", "repair")]
        add_runs(folder, runs, EXAMPLES, seeds=seeds)

    add("original", 0.5, "01")
    add("undistillable", 0.45, "0")
    add("undistillable", 0.0, "1")
    repair, choices = check_lines(load_finished_runs(folder))
    assert repair.endswith("-100%, +517%], n = 2 seeds): inconclusive: whether the drop survives")
    assert "is lower in the mean, inconclusive over seeds (difference -0.275 [" in choices


def write_proxies(folder):
    """Start 0.1, original 0.5. By seq_kd 0.6 and 0.2 from the default's teachers, 0.3 and 0.4 from
    another proxy's; by gkd_reverse no original.
    """
    deep = {"ablation": "deep", "start": "student"}
    add_runs(
        folder,
        [
            ({"role": "proxy"}, 0.3),
            ({"role": "proxy", "proxy": "deep"}, 0.8),
            ({"role": "proxy", "proxy": "unused"}, 0.8),
            ({"role": "teacher", "teacher": "distillable", "ablation": "deep"}, 0.85),
            ({"role": "teacher", "teacher": "undistillable", "ablation": "deep"}, 0.85),
            (student("distillable", **deep), 0.3),
            (student("undistillable", **deep), 0.4),
            (student("undistillable", "gkd_reverse", **deep), 0.4),
            (student("undistillable", **deep | {"ablation": "joint"}), 0.5),
        ],
        seeds=SEEDS,
    )


def test_distillability_by_proxy(folder):
    write_proxies(folder)
    results = proxy_results(load_finished_runs(folder))
    assert list(results) == ["default", "deep"]
    default, deep = results.values()
    assert default.accuracy.mean == pytest.approx(0.3)
    assert deep.accuracy.mean == pytest.approx(0.8)
    for proxy, mode, expected in (
        (default, "distillable", 1.25),
        (default, "undistillable", 0.25),
        (deep, "distillable", 0.5),
        (deep, "undistillable", 0.75),
    ):
        assert proxy.modes[mode].scores["seq_kd"].mean == pytest.approx(expected)
    assert deep.modes["undistillable"].teacher.mean == pytest.approx(0.85)
    assert "gkd_reverse" not in deep.modes["undistillable"].scores
    assert proxy_lines(results) == [
        "sensitivity to the proxy, distillable by seq_kd: distillability from 0.50 (deep) to 1.25 "
        "(default), a range of means of 0.75 over 2 proxies",
        "sensitivity to the proxy, undistillable by seq_kd: distillability from 0.25 (default) to "
        "0.75 (deep), a range of means of 0.50 over 2 proxies",
    ]


def test_the_report_has_a_section_on_proxies(folder):
    write_proxies(folder)
    text = write_report(folder)
    markdown = (folder / "report.md").read_text()
    lines = proxy_lines(proxy_results(load_finished_runs(folder)))
    assert lines[0] in text and "## Sensitivity to the proxy" in markdown
    assert "| deep | 0.800 +- 0.000 | 0.850 +- 0.000 | 0.50 [" in markdown
    assert "joint" not in markdown and "| none (eta = 0) |  | not run | not run |" in markdown
    report = json.loads((folder / "report.json").read_text())
    # the main teachers' only
    protected = report["students"]["seq_kd"]["undistillable"]["sampled"]
    assert protected["mean"] == pytest.approx(0.2)


def test_one_proxy_has_nothing_to_be_compared_with(folder):
    add_runs(folder, [({"role": "proxy"}, 0.3)])
    results = proxy_results(load_finished_runs(folder))
    assert list(results) == ["default"] and proxy_lines(results) == []
    write_report(folder)
    assert "Sensitivity" not in (folder / "report.md").read_text()


def test_other_attacks_on_a_defence_are_rows_of_their_own(folder):
    """Each is compared with the original's students by the same attack."""
    add_runs(
        folder,
        [
            ({"role": "defence", "defence": "poe"}, 0.7),
            (student("original", defence="poe"), 0.3),
            (student("original", "gkd", defence="poe"), 0.8),
            (student("original", "gkd"), 0.4),
        ],
        seeds=SEEDS,
    )
    results = defence_results(load_finished_runs(folder))
    assert list(results) == ["none", "undistillable", "poe", "poe, by gkd"]
    text, other = results["poe"], results["poe, by gkd"]
    assert (text.student.mean, text.student.n) == (pytest.approx(0.3), 3)
    assert (other.student.mean, other.student.n) == (pytest.approx(0.8), 3)
    assert text.change.mean == pytest.approx(-0.4) and other.change.mean == pytest.approx(1.0)
    assert 'Serving "poe, by gkd" raises what students take (0.400 to 0.800,' in (
        build_report(folder).conclusion
    )
