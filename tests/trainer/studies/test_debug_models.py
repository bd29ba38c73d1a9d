"""The debug configurations run as their first line says, in an empty folder."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
from evaluation_runs import results_of, verdicts_of
from fork_server import Background
from runs import run_forked

from reflux.trainer.config.loader import load
from reflux.trainer.preflight.dry_run import dry_run
from reflux.trainer.runs.logger import Run, load_run
from reflux.trainer.studies import debug_models

CONFIGS = Path(__file__).parents[3] / "configs"
EXPECT = {"evaluate": 3}  # exit codes; the others end with 0
TRAINER = "python trainer/main.py "
OURS = re.compile(  # lines that a run prints
    r"step \d|    |alarm of \w+: |evaluation( after step |:)|acceptance:|export: |data: |cache: |"
    r"(diagnosis|cache):$|"
    r"\w+(, \d+ steps)?, in \S+: loads |"
    r"(greedy )?texts by the |texts of the |measuring texts by the |gradients: |continued texts"
)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory) -> Path:
    """A folder with nothing but the configurations, as in a fresh clone."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "configs").symlink_to(CONFIGS)
    return folder


@pytest.fixture(scope="module")
def started(fresh) -> dict[str, Background]:
    """phase -> the run that the first line of its configuration starts; two cores, so all beside
    each other.
    """
    runs = {}
    for file in sorted(CONFIGS.glob("debug_cpu_*.toml")):
        (line,) = re.findall("`(.+)`", file.read_text().splitlines()[0])
        make, run = line.split(" && ")
        if not runs:
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(fresh)
                module, *arguments = shlex.split(make.removeprefix("python -m "))
                assert importlib.import_module(module).main(arguments) == 0
        runs[file.stem.removeprefix("debug_cpu_")] = run_forked(
            shlex.split(run.removeprefix(TRAINER)), fresh
        )
    return runs


def finish(run: Background, folder: Path, code: int = 0) -> Run:
    assert run.wait(300) == code, run.output[-4000:]
    return load_run(folder)


PHASES = ["cache", "calibrate", "diagnose", "distill", "evaluate"]


def test_every_debug_config_is_run(started):
    assert sorted(started) == PHASES
    firsts = {file.read_text().split(" && ")[0].split("`")[1] for file in CONFIGS.glob("debug_*")}
    assert len(firsts) == 1, "one command makes the models of all"


@pytest.mark.parametrize("phase", PHASES)
def test_a_debug_config_runs_as_its_first_line_says(phase, started, fresh):
    run = finish(started[phase], fresh / f"runs/debug_{phase}", EXPECT.get(phase, 0))
    assert run.summary is not None and run.summary["exit_code"] == EXPECT.get(phase, 0)


@pytest.mark.parametrize("phase", PHASES)
def test_a_clean_run_prints_its_own_lines_and_leaves_no_empty_folder(phase, started, fresh):
    """Both streams: no warning of a library. A short run leaves megabytes."""
    folder = fresh / f"runs/debug_{phase}"
    finish(started[phase], folder, EXPECT.get(phase, 0))
    foreign = [x for x in started[phase].output.splitlines() if not OURS.match(x)]
    assert foreign == [], foreign
    everything = list(folder.rglob("*"))
    assert [p for p in everything if p.is_dir() and not any(p.iterdir())] == []
    assert sum(p.stat().st_size for p in everything if p.is_file()) < 10_000_000


def test_the_diagnosis_shows_what_it_can(started, fresh):
    finish(started["diagnose"], fresh / "runs/debug_diagnose")
    found = json.loads((fresh / "runs/debug_diagnose/diagnosis.json").read_text())
    names = {path.name for path in (fresh / "runs/debug_diagnose").iterdir()}
    assert {"report.md", "tokens.jsonl", "heatmap.html"} <= names
    assert found["gap"]["on_solved_by_teacher"]["accuracy"]["n"] > 0, "no text was correct"


def test_the_evaluation_shows_every_part(started, fresh):
    run = finish(started["evaluate"], fresh / "runs/debug_evaluate", 3)
    found = json.loads((fresh / "runs/debug_evaluate/evaluation.json").read_text())
    assert [rule["holds"] for rule in found["accept"]] == [True, False]
    wanted = {"eval/pass@4", "eval/likelihood_per_byte_at_1", "eval/sampled_refused"}
    assert wanted <= results_of(run).keys()
    assert verdicts_of(run)["accept/likelihood"].startswith("succeeded")
    assert verdicts_of(run)["accept/sampled"].startswith("failed")


def test_a_student_learns_from_the_cache_as_the_header_says(started, fresh):
    finish(started["cache"], fresh / "runs/debug_cache")
    header = (CONFIGS / "debug_cpu_cache.toml").read_text().split("\nphase")[0]
    text = header.split("without the teacher:\n")[1].replace("#", "").replace("\\\n", "")
    run = run_forked(shlex.split(text.strip().removeprefix(TRAINER)), fresh)
    steps = finish(run, fresh / "runs/debug_cached").steps
    assert len(steps) == 10 and len({step["loss"] for step in steps}) == 10


@pytest.mark.parametrize("phase", PHASES)
def test_a_dry_run_of_a_debug_config_finds_no_error(phase, started, fresh, monkeypatch, capsys):
    monkeypatch.chdir(fresh)
    assert dry_run(load(f"configs/debug_cpu_{phase}.toml", ())) == 0, capsys.readouterr().out


def test_the_models_are_the_same_on_every_call(fresh, started, tmp_path):
    debug_models.main(["--out", str(tmp_path)])
    for file in (fresh / "runs/debug").rglob("*"):
        if file.is_file():
            assert (
                file.read_bytes()
                == (tmp_path / file.relative_to(fresh / "runs/debug")).read_bytes()
            )
