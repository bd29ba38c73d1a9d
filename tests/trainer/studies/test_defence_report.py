"""Defences and the checks of A5, from runs whose numbers are known."""

import json

import pytest
from report_runs import write_matrix, write_run

from reflux.trainer.studies.attack_report import write_report
from reflux.trainer.studies.defence_report import check_lines, defence_rows, proxy_lines, proxy_rows
from reflux.trainer.studies.finished_runs import cost, load_finished_runs


def add(folder, cells, head=None, seeds="01"):
    """More runs into a matrix folder, one per seed of each."""
    matrix = json.loads((folder / "matrix.json").read_text())
    for labels, accuracy in cells:
        for seed in seeds:
            name = "-".join(filter(None, labels.values())).replace(" ", "_")
            cell = write_run(folder / f"{name}-{seed}", labels, accuracy, accuracy, seed=seed)
            log = folder / cell["folder"] / "run.jsonl"
            log.write_text(
                log.read_text()
                .replace('"config": {}', f'"config": {json.dumps(head or {})}')
                .replace('"eval/greedy"', f'"eval/likelihood_sum": {accuracy}, "eval/greedy"')
            )
            matrix["cells"].append(cell)
    (folder / "matrix.json").write_text(json.dumps(matrix))


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr("reflux.trainer.studies.attack_report.plot_all", lambda *_: {})


@pytest.fixture
def folder(tmp_path):
    write_matrix(tmp_path, {"original": 0.5, "distillable": 0.6, "undistillable": 0.2}, start=0.1)
    matrix = json.loads((tmp_path / "matrix.json").read_text())
    for cell in matrix["cells"]:
        if cell["labels"].get("attack") == "kd":
            cell["labels"]["attack"] = "seq_kd"
    (tmp_path / "matrix.json").write_text(json.dumps(matrix))
    return tmp_path


def test_defences_stand_beside_the_undefended_original(folder):
    add(
        folder,
        [
            ({"role": "defence", "defence": "poe"}, 0.7),
            ({"role": "student", "teacher": "original", "attack": "seq_kd", "defence": "poe"}, 0.3),
            ({"role": "student", "teacher": "original", "attack": "answers_only"}, 0.9),
        ],
    )
    rows = defence_rows(load_finished_runs(folder))
    assert list(rows) == ["none", "undistillable", "answers only, reasoning withheld", "poe"]
    # rewritten, as right as before
    assert rows["answers only, reasoning withheld"]["served"]["mean"] == pytest.approx(0.9)
    assert rows["poe"]["served"]["mean"] == pytest.approx(0.7) and rows["poe"]["student"][
        "mean"
    ] == pytest.approx(0.3)
    assert rows["poe"]["change"]["mean"] == pytest.approx(-0.4)
    assert rows["poe"]["score"]["mean"] == pytest.approx(0.5)  # (0.3 - 0.1) / (0.5 - 0.1)
    assert rows["none"]["served"]["mean"] == pytest.approx(0.9) and rows["none"]["student"][
        "mean"
    ] == pytest.approx(0.5)
    assert rows["answers only, reasoning withheld"]["change"]["mean"] == pytest.approx(0.8)
    write_report(folder)
    report = (folder / "report.md").read_text()
    assert "| poe | 0.700 +- 0.000 | 0.300 +- 0.000 | -40% | 0.50 [" in report
    found = json.loads((folder / "report.json").read_text())
    # the defended one is not among them
    assert found["students"]["seq_kd"]["original"]["sampled"]["mean"] == pytest.approx(0.5)


def test_without_another_defence_there_is_no_table(folder):
    write_report(folder)
    report = (folder / "report.md").read_text()
    assert (
        "## Other defences" in report
        and "| undistillable | 0.890" in report
        and "product" not in report
    )
    assert "## Attacks in detail" in report


@pytest.mark.parametrize("repaired, word", [(0.2, "survives"), (0.45, "does not survive")])
def test_a_drop_that_a_repair_brings_back_does_not_survive(folder, repaired, word):
    add(
        folder,
        [
            ({"role": "repair", "teacher": "original"}, 0.5),
            ({"role": "repair", "teacher": "undistillable"}, repaired),
        ],
        {"data": {"limit": 50}},
    )
    (line,) = check_lines(load_finished_runs(folder))
    assert (
        line.startswith("after 50 worked examples")
        and line.endswith(word)
        and f"{repaired:.3f}" in line
    )


@pytest.mark.parametrize("other, word", [(0.3, "lower, too"), (0.6, "not lower")])
def test_likelihood_agrees_or_does_not(folder, other, word):
    add(
        folder,
        [
            ({"role": "choices", "teacher": "original"}, 0.5),
            ({"role": "choices", "teacher": "undistillable"}, other),
        ],
    )
    (line,) = check_lines(load_finished_runs(folder))
    assert word in line and f"student of undistillable {other:.3f}" in line


def test_likelihoods_of_different_seeds_are_not_compared(folder):
    for seed, teacher in (("0", "original"), ("1", "undistillable")):
        add(folder, [({"role": "choices", "teacher": teacher}, 0.5)], seeds=seed)
    (line,) = check_lines(load_finished_runs(folder))
    assert line.endswith("is not compared: no seed has both")


def test_a_difference_within_the_spread_over_seeds_is_called_open(folder):
    """By seed 0.5 -> 0.45 and 0.5 -> 0: lower by 0.275 in the mean, with an interval of two seeds
    that holds 0.
    """
    add(
        folder,
        [({"role": role, "teacher": "original"}, 0.5) for role in ("choices", "repair")],
        {"data": {"limit": 50}},
    )
    for seed, accuracy in (("0", 0.45), ("1", 0.0)):
        add(
            folder,
            [
                ({"role": role, "teacher": "undistillable"}, accuracy)
                for role in ("choices", "repair")
            ],
            {"data": {"limit": 50}},
            seeds=seed,
        )
    repair, choices = check_lines(load_finished_runs(folder))
    assert repair.endswith(
        "the drop survives in the mean; the spread over seeds allows no difference"
    ), repair
    assert choices.endswith("is lower in the mean; the spread over seeds allows no difference"), (
        choices
    )


@pytest.mark.parametrize(
    "distill, written, read",
    [
        ({"objective": "nll", "source": "teacher", "on_policy": 0.0, "query_budget": 30}, 60, 0),
        ({"objective": "nll", "source": "teacher", "on_policy": 0.0, "query_budget": 0}, 80, 0),
        ({"objective": "kl", "source": "teacher", "on_policy": 0.25, "query_budget": 0}, 60, 80),
        ({"objective": "kl", "source": "dataset", "on_policy": 0.0, "query_budget": 0}, 0, 80),
        ({"objective": "span", "source": "teacher", "on_policy": 0.0, "query_budget": 0}, 80, 0),
    ],
)
def test_what_an_attack_asks_of_its_teacher(folder, distill, written, read):
    add(
        folder,
        [({"role": "student", "teacher": "original", "attack": "x"}, 0.5)],
        {"steps": 10, "rollout": {"prompts": 4, "group": 2}, "distill": distill},
    )
    (entry, _) = [e for e in load_finished_runs(folder) if e.labels.get("attack") == "x"]
    # texts of 9 tokens
    assert cost(entry) == {
        "written": written,
        "read": read,
        "tokens": 9 * (written + read),
        "seconds": 10.0,
    }


@pytest.mark.parametrize(
    "distill, written, read",
    [
        # bought is bought, also what is never read
        ({"objective": "kl", "source": "teacher", "on_policy": 0.5, "query_budget": 300}, 600, 80),
        ({"objective": "span", "source": "teacher", "on_policy": 0.25, "query_budget": 0}, 60, 20),
        ({"objective": "span", "source": "dataset", "on_policy": 0.0, "query_budget": 0}, 0, 80),
    ],
)
def test_what_a_mixed_attack_asks_of_its_teacher(folder, distill, written, read):
    test_what_an_attack_asks_of_its_teacher(folder, distill, written, read)


def test_runs_that_only_scored_options_do_not_stop_the_report(folder):
    """What phase = "evaluate" with eval.by = "likelihood" logs: neither sampled nor greedy."""
    add(
        folder,
        [
            ({"role": "choices", "teacher": "original"}, 0.5),
            ({"role": "choices", "teacher": "undistillable"}, 0.25),
        ],
    )
    for log in folder.glob("choices*/run.jsonl"):
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        rows = [
            {k: v for k, v in r.items() if k not in ("eval/sampled", "eval/greedy")}
            for r in rows
            if "loss" not in r
        ]
        log.write_text("".join(json.dumps(r) + "\n" for r in rows))
        rows = [
            {
                "mode": "likelihood_sum",
                "prompt": i,
                "sample": 0,
                "correct": True,
                "logp": [-1.0] * 4,
            }
            for i in range(3)
        ]
        (log.parent / "predictions/step-3.jsonl").write_text(
            "".join(json.dumps(r) + "\n" for r in rows)
        )
    assert (
        "student of original 0.500, student of undistillable 0.250 (chance 0.25)"
        in write_report(folder)
    )
    rows = [
        r
        for r in json.loads((folder / "report.json").read_text())["runs"]
        if r["role"] == "choices"
    ]
    assert (
        len(rows) == 4
        and {r["likelihood_sum"] for r in rows} == {0.5, 0.25}
        and "sampled" not in rows[0]
    )


def test_text_at_another_temperature_is_served_at_its_own_accuracy(folder):
    """The attack seq_kd_cold is the student of it; without a run of role `defence` the price is
    unknown, not the model's.
    """
    add(folder, [({"role": "student", "teacher": "original", "attack": "seq_kd_cold"}, 0.2)])
    assert defence_rows(load_finished_runs(folder))["temperature 0.5"]["served"]["n"] == 0
    write_report(folder)
    assert (
        'Serving "temperature 0.5" (an attacker\'s own move, too) halves (or more) what students take (0.500 to 0.200), at a price not measured.'
        in (folder / "report.md").read_text()
    )
    add(folder, [({"role": "defence", "defence": "temperature 0.5"}, 0.7)])
    row = defence_rows(load_finished_runs(folder))["temperature 0.5"]
    assert row["served"]["mean"] == pytest.approx(0.7) and row["student"]["mean"] == pytest.approx(
        0.2
    )
    write_report(folder)
    assert (
        "(0.500 to 0.200), at 20.0 points of served accuracy." in (folder / "report.md").read_text()
    )


def test_students_of_what_is_served_are_in_no_curve_of_the_original(folder, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "reflux.trainer.studies.attack_report.plot_all",
        lambda folder, entries, found: seen.extend(entries) or {},
    )
    add(
        folder,
        [({"role": "student", "teacher": "original", "attack": "seq_kd", "defence": "poe"}, 0.3)],
    )
    write_report(folder)
    assert seen and not any("defence" in e.labels for e in seen)


def write_proxies(folder):
    """Start 0.1, original 0.5. By seq_kd 0.6 and 0.2 from the default's teachers, 0.3 and 0.4 from
    another proxy's; by gkd_reverse no original.
    """
    add(
        folder,
        [
            ({"role": "proxy"}, 0.3),
            ({"role": "proxy", "proxy": "deep"}, 0.8),
            ({"role": "proxy", "proxy": "unused"}, 0.8),
            *(
                ({"role": "teacher", "teacher": m, "ablation": "deep"}, 0.85)
                for m in ("distillable", "undistillable")
            ),
            (
                {
                    "role": "student",
                    "teacher": "distillable",
                    "attack": "seq_kd",
                    "ablation": "deep",
                    "start": "student",
                },
                0.3,
            ),
            (
                {
                    "role": "student",
                    "teacher": "undistillable",
                    "attack": "seq_kd",
                    "ablation": "deep",
                    "start": "student",
                },
                0.4,
            ),
            (
                {
                    "role": "student",
                    "teacher": "undistillable",
                    "attack": "gkd_reverse",
                    "ablation": "deep",
                    "start": "student",
                },
                0.4,
            ),
            (
                {
                    "role": "student",
                    "teacher": "undistillable",
                    "attack": "seq_kd",
                    "ablation": "joint",
                    "start": "student",
                },
                0.5,
            ),
        ],
    )


def test_what_the_score_owes_to_the_proxy(folder):
    write_proxies(folder)
    rows = proxy_rows(load_finished_runs(folder))
    assert list(rows) == ["default", "deep"] and rows["deep"]["accuracy"]["mean"] == pytest.approx(
        0.8
    )
    assert rows["default"]["accuracy"]["mean"] == pytest.approx(0.3)
    score = lambda name, mode: rows[name]["modes"][mode]["scores"]["seq_kd"]["mean"]
    assert score("default", "distillable") == pytest.approx(1.25) and score(
        "default", "undistillable"
    ) == pytest.approx(0.25)
    assert score("deep", "distillable") == pytest.approx(0.5) and score(
        "deep", "undistillable"
    ) == pytest.approx(0.75)
    assert rows["deep"]["modes"]["undistillable"]["teacher"]["mean"] == pytest.approx(0.85)
    assert "gkd_reverse" not in rows["deep"]["modes"]["undistillable"]["scores"]
    assert proxy_lines(rows) == [
        "sensitivity to the proxy, distillable by seq_kd: distillability from 0.50 (deep) to 1.25 "
        "(default), a range of 0.75 over 2 proxies",
        "sensitivity to the proxy, undistillable by seq_kd: distillability from 0.25 (default) to "
        "0.75 (deep), a range of 0.50 over 2 proxies",
    ]
    text = write_report(folder)
    report = (folder / "report.md").read_text()
    assert proxy_lines(rows)[0] in text and "## Sensitivity to the proxy" in report
    assert "| deep | 0.800 +- 0.000 | 0.850 +- 0.000 | 0.50 [" in report and "joint" not in report
    found = json.loads((folder / "report.json").read_text())
    # the main teachers' only
    assert found["students"]["seq_kd"]["undistillable"]["sampled"]["mean"] == pytest.approx(0.2)


def test_one_proxy_has_nothing_to_be_compared_with(folder):
    add(folder, [({"role": "proxy"}, 0.3)])
    rows = proxy_rows(load_finished_runs(folder))
    assert list(rows) == ["default"] and proxy_lines(rows) == []
    write_report(folder)
    assert "Sensitivity" not in (folder / "report.md").read_text()
