"""A folder that holds a run: asked about, resumed as the same experiment, left alone, never
overwritten.
"""

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest

from reflux.trainer.config.data import DataSection, EvalPartSection, PartSection
from reflux.trainer.config.distillation import DistillSection
from reflux.trainer.config.evaluation import EvalSection
from reflux.trainer.config.loader import load
from reflux.trainer.config.schema import Config
from reflux.trainer.config.sections import (
    FrozenSection,
    GuardSection,
    ModelSection,
    OptimSection,
    ReferenceSection,
    TaskSection,
    TeacherSection,
)
from reflux.trainer.runs import run_folder
from reflux.trainer.runs.run_folder import SEQ_LEN, save_config, settle

OTHER = {  # of a run without questions: each would give a guard another accuracy
    "samples": {"samples": 4},
    "limit": {"limit": 3},
    "list_options": {"list_options": "given"},
    "refusal": {"refusal": ""},
}


def config(folder, **changes) -> Config:
    base = Config(
        "distill",
        str(folder),
        steps=3,
        on_existing_run="resume",
        model=ModelSection("m"),
        teacher=TeacherSection("t"),
        data=DataSection("d"),
        titan={"training": {"seq_len": 64}, "checkpoint": {"interval": 5}},
    )
    return replace(base, **changes)


@pytest.fixture
def run(tmp_path):
    """A folder with a run in it."""
    cfg = config(tmp_path / "run")
    save_config(cfg)
    (tmp_path / "run" / "run.jsonl").write_text("{}\n")
    return cfg


@pytest.mark.parametrize("choice", ["ask", "resume", "fail", "new"])
def test_a_fresh_or_empty_folder_is_used_as_it_is(tmp_path, choice):
    cfg = config(tmp_path / "run", on_existing_run=choice)
    assert settle(cfg) == cfg and not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    assert settle(cfg) == cfg


def test_fail_says_what_the_choices_are(run):
    with pytest.raises(
        ValueError,
        match="holds a run already. Set on_existing_run = 'resume' to continue it, 'new'",
    ):
        settle(replace(run, on_existing_run="fail"))
    (Path(run.folder) / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a run already that has ended. Set on_existing"):
        settle(replace(run, on_existing_run="fail"))


def test_a_checkpoint_alone_is_a_run(tmp_path):
    (tmp_path / "run" / "checkpoint").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds a run already"):
        settle(config(tmp_path / "run", on_existing_run="fail"))


def test_new_never_uses_a_folder_that_exists(run, tmp_path):
    fresh = replace(run, on_existing_run="new", optim=OptimSection(lr=1.0))
    assert settle(fresh) == replace(fresh, folder=str(tmp_path / "run-2"))
    (tmp_path / "run-2").mkdir()
    (tmp_path / "run-3").write_text("a file")
    assert settle(fresh).folder == str(tmp_path / "run-4")
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"config.toml", "run.jsonl"}


def test_a_done_run_without_its_checkpoints_is_not_started_over(run, tmp_path):
    """Its export would be overwritten, and other cells of the matrix were made from that."""
    (tmp_path / "run" / run_folder.CHECKPOINTS_REMOVED).touch()
    with pytest.raises(ValueError, match="keep_checkpoints = false.* has removed the checkpoints"):
        settle(replace(run, steps=9))
    assert settle(replace(run, on_existing_run="new")).folder == str(tmp_path / "run-2")
    (tmp_path / "run" / "checkpoint").mkdir()  # put back from elsewhere
    assert settle(run) == run


def test_resume_may_go_on_longer_and_watch_more_closely(run):
    longer = replace(
        run,
        steps=9,
        guard=GuardSection(kl_budget=0.2),
        titan=run.titan | {"checkpoint": {"interval": 1}},
    )
    assert settle(run) == run and settle(longer) == longer


def test_a_resume_may_take_longer_rows_and_not_shorter_ones(run):
    """A run that met a prompt that is too long goes on with room for it, or without it."""
    longer = replace(run, titan={"training": {"seq_len": 4 * SEQ_LEN}})
    assert settle(longer) == longer
    assert settle(replace(run, data=replace(run.data, too_long="drop")))
    save_config(longer)
    with pytest.raises(ValueError, match="other values of training.seq_len"):
        settle(replace(run, titan={"training": {"seq_len": 4 * SEQ_LEN - 1}}))
    with pytest.raises(ValueError, match="other values of training.seq_len"):
        settle(replace(run, titan={}))


def test_the_length_of_rows_that_nobody_sets_is_torchtitans():
    from torchtitan.config import TrainingConfig

    assert TrainingConfig().seq_len == SEQ_LEN


@pytest.mark.parametrize(
    "change, named",
    [
        (dict(optim=OptimSection(lr=1.0)), ["optim.lr"]),
        (dict(seed=5), ["seed"]),
        (dict(model=ModelSection("other")), ["model.path"]),
        (
            dict(distill=DistillSection(beta=0.4), reference=ReferenceSection(beta=1.0)),
            ["distill.beta", "reference.beta"],
        ),
        (dict(data=DataSection("d", limit=3)), ["data.limit"]),
        *((dict(eval=EvalSection(**asks)), [f"eval.{name}"]) for name, asks in OTHER.items()),
        (dict(titan={"training": {"seq_len": 32}}), ["training.seq_len"]),
        (dict(data=DataSection("d", columns={"q": "question"})), ["data.columns.q"]),
    ],
)
def test_another_experiment_is_refused_with_the_keys_named(run, change, named):
    with pytest.raises(ValueError) as error:
        settle(replace(run, steps=99, **change))
    message = str(error.value)
    names = r" \(.* then, .* now\), ".join(map(re.escape, named))
    assert re.search(rf"was started with other values of {names} \(.* then, .* now\)\. ", message)
    assert "on_existing_run = 'new'" in message


@pytest.mark.parametrize(
    "table, section, part",
    [("data", DataSection, PartSection), ("eval", EvalSection, EvalPartSection)],
)
def test_parts_in_another_order_are_another_experiment(tmp_path, table, section, part):
    """Rows are numbered part by part: other prompts would be drawn, and answers be mixed up."""
    parts = {name: part(f"{name}.jsonl") for name in ("x", "y", "z")}
    cfg = config(tmp_path / "run", task=TaskSection("exact"))
    cfg = replace(cfg, **{table: section(parts=parts)})
    save_config(cfg)
    (tmp_path / "run" / "run.jsonl").write_text("{}\n")
    assert settle(cfg) == cfg
    turned = section(parts=dict(reversed(parts.items())))
    names = re.escape(f"{table}.parts (x before y before z then, z before y before x now)")
    with pytest.raises(ValueError, match=f"other values of {names}"):
        settle(replace(cfg, **{table: turned}))


@pytest.mark.parametrize("phase, refuses", [("distill", False), ("cache", True)])
def test_a_cache_keeps_the_rows_that_its_shards_count(tmp_path, phase, refuses):
    cfg = config(tmp_path / "run", phase=phase)
    save_config(cfg)
    (tmp_path / "run" / "run.jsonl").write_text("{}\n")
    changes = dict(data=DataSection("d", too_long="drop"), titan={"training": {"seq_len": 96}})
    for name, value in changes.items():
        changed = replace(cfg, **{name: value})
        if refuses:
            with pytest.raises(ValueError, match="data.too_long|training.seq_len"):
                settle(changed)
        else:
            assert settle(changed) == changed


def test_a_resume_may_ask_the_same_questions_more_often(run):
    """What the guards noted of the start, and all evaluations of the run, stay comparable."""
    asked = EvalSection("e", samples=4)
    run = replace(run, eval=asked, task=TaskSection("exact"))
    save_config(run)
    may = dict(every=5, at_start=False, pass_at=(2,), against="runs/a")
    assert settle(replace(run, eval=replace(asked, **may)))
    with pytest.raises(ValueError, match="eval.source.*phase = 'evaluate', on its export"):
        settle(replace(run, eval=replace(asked, source="harder")))


@pytest.mark.parametrize("phase, says", [("calibrate", True), ("evaluate", False)])
def test_another_accuracy_is_not_compared_with_that_of_the_start(tmp_path, phase, says):
    over = dict(task=TaskSection("exact"), eval=EvalSection("easy"), proxy=FrozenSection("p"))
    cfg = config(tmp_path / "run", phase=phase, **over)
    save_config(cfg)
    (tmp_path / "run" / "run.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="other values of eval.source") as error:
        settle(replace(cfg, eval=EvalSection("harder")))
    assert ("on its export" in str(error.value)) is says


def test_the_saved_configuration_repeats_the_run(run):
    assert load(f"{run.folder}/config.toml") == run


@pytest.mark.parametrize(
    "answer, outcome", [("r\n", "run"), ("New\n", "run-2"), ("\nwhat\nr\n", "run"), ("q\n", None)]
)
def test_ask(run, tmp_path, monkeypatch, answer, outcome):
    terminal = io.StringIO(answer)
    terminal.isatty = lambda: True
    monkeypatch.setattr(run_folder.sys, "stdin", terminal)
    monkeypatch.setenv("WORLD_SIZE", "1")
    cfg = replace(run, on_existing_run="ask")
    if outcome is None:
        with pytest.raises(ValueError, match="holds a run already"):
            settle(cfg)
    else:
        assert settle(cfg).folder == str(tmp_path / outcome)


@pytest.mark.parametrize("ranks, tty", [("2", True), ("1", False)])
def test_nobody_is_asked_where_nobody_answers(run, monkeypatch, ranks, tty):
    terminal = io.StringIO("r\n")
    terminal.isatty = lambda: tty
    monkeypatch.setattr(run_folder.sys, "stdin", terminal)
    monkeypatch.setenv("WORLD_SIZE", ranks)
    with pytest.raises(ValueError, match="holds a run already"):
        settle(replace(run, on_existing_run="ask"))


def test_a_run_of_a_version_that_took_what_is_refused_now_is_told_its_own_file(run):
    saved = Path(run.folder) / "config.toml"
    saved.write_text(saved.read_text() + "\n[no_such_section]\nx = 1\n")
    with pytest.raises(ValueError, match="change it in .*config.toml, too, then resume"):
        settle(replace(run, steps=99))
