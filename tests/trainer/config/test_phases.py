"""The table of phases: everything the program knows of a phase comes from its line there."""

import os

import pytest
from assets import free_port
from runs import config

from reflux.trainer.config.loader import fill, load, to_toml
from reflux.trainer.config.phases import PHASES, PhaseSpec, pair_of, roles, spec_of
from reflux.trainer.config.roles import another
from reflux.trainer.config.schema import Config
from reflux.trainer.config.sections import FrozenSection
from reflux.trainer.loop import train
from reflux.trainer.preflight.check import examine
from reflux.trainer.preflight.dry_run import plan
from reflux.trainer.preflight.report import has_errors
from reflux.trainer.runs.logger import load_run
from reflux.trainer.runs.model_card import Measured, Outcome, model_card

EVERYTHING = {  # enough for every phase
    "folder": "r",
    "model": {"path": "m"},
    "teacher": {"path": "t"},
    "proxy": {"path": "p"},
    "data": {"source": "d"},
    "eval": {"source": "e"},
    "task": {"name": "math"},
}


class Toy:
    """A phase of one measurement."""

    exit_code = 0

    def __init__(self, cfg, engine):
        self.cfg, self.engine = cfg, engine

    def close_step(self, step, stats):
        return {"toy/vocab_size": self.engine.vocab_size}


@pytest.fixture
def toy(monkeypatch, talkers, tmp_path) -> Config:
    """A run of a phase that is one line in PHASES: its implementation."""
    monkeypatch.setitem(PHASES, "toy", PhaseSpec(f"{__name__}:Toy"))
    base = config(talkers, tmp_path / "run", "distill")
    file = tmp_path / "toy.toml"
    file.write_text(to_toml(base).replace('phase = "distill"', 'phase = "toy"'))
    return load(file, ("teacher.path=",))


def test_a_new_phase_is_one_line(toy):
    assert not toy.trains and not toy.needs_teacher and pair_of(toy) is None
    (own,) = roles(toy)
    assert (own.name, own.section, own.own, own.trained) == ("model", "model", True, False)
    assert "tags: [reflux, toy]" in model_card(
        toy, Measured({}), "A toy", "Made for a test.", Outcome(toy.steps)
    )
    report = plan(toy)
    assert not report.failed and [t.title for t in report.tables][0] == "models"


@pytest.mark.usefixtures("titan_process")
def test_a_new_phase_is_checked_and_run(toy):
    os.environ["MASTER_PORT"] = str(free_port())
    report = examine(toy)
    assert not has_errors(report.findings), report.findings
    assert any("sampler against trainer" in f.what for f in report.findings)
    os.environ["MASTER_PORT"] = str(free_port())
    assert train(toy) == 0
    (event,) = (e for e in load_run(toy.folder).events if e["event"] == "eval")
    assert event["toy/vocab_size"] == 512


@pytest.mark.parametrize("phase", PHASES)
def test_every_phase_has_an_implementation_and_roles(phase):
    cfg = fill(Config, EVERYTHING | {"phase": phase}, "x.toml")
    built = spec_of(phase).load()
    assert callable(built.close_step) and hasattr(built, "exit_code")
    assert all(hasattr(built, m) for m in ("sample", "score", "loss", "card")) or not cfg.trains
    own, *frozen = roles(cfg)
    assert own.own and own.name == spec_of(phase).model_role and own.trained == cfg.trains
    assert not any(role.own or role.trained for role in frozen)
    pair = pair_of(cfg)
    assert pair is None or {pair.sampled_by, pair.scored_by} <= {r.name for r in (own, *frozen)}


def test_an_unknown_phase_is_answered_with_the_nearest():
    with pytest.raises(ValueError) as error:
        fill(Config, EVERYTHING | {"phase": "distil"}, "x.toml")
    assert "x.toml: unknown phase 'distil', did you mean distill? Known: calib" in str(error.value)


def test_the_models_of_a_calibration():
    def names(**over):
        cfg = fill(Config, EVERYTHING | {"phase": "calibrate"} | over, "x.toml")
        return [role.name for role in roles(cfg)]

    on = {"mode": "distillable"}
    assert names() == ["policy", "reference"]
    assert names(calibration=on) == ["policy", "reference", "proxy"]
    assert names(calibration=on, reference={"beta": 0.0}) == ["policy", "proxy"]
    denominator = on | {"denominator": "reference"}
    assert "reference" in names(calibration=denominator, reference={"beta": 0.0})
    assert names(reference={"beta": 0.0}) == ["policy"]


def test_a_template_file_is_of_the_model_that_it_is_named_for():
    """Another model has other turns; arguments are for every template that reads them."""
    section = {"path": "t", "template": "t.jinja", "template_arguments": {"thinks": False}}

    def templates(phase, **over):
        cfg = fill(Config, EVERYTHING | {"phase": phase} | over, "x.toml")
        kept = [r for r in roles(cfg) if r.name.startswith(("teacher", "proxy"))]
        return [(r.model.path, r.model.template, dict(r.model.template_arguments)) for r in kept]

    want = [("t", "t.jinja", {"thinks": False}), ("u", "", {"thinks": False})]
    assert templates("distill", teacher=section, distill={"more_teachers": ["u"]}) == want
    calibration = {"mode": "distillable", "proxies": ["u"]}
    assert templates("calibrate", proxy=section, calibration=calibration) == want


def test_the_models_of_a_distillation_and_which_of_them_sample():
    def sampling(**over):
        cfg = fill(Config, EVERYTHING | {"phase": "distill"} | over, "x.toml")
        return {role.name: role.samples for role in roles(cfg)}

    no_eval = {"eval": {"source": ""}}
    assert sampling() == {"student": True, "teacher": False}
    mixed = {"on_policy": 0.5, "more_teachers": ["u"]}
    assert sampling(distill=mixed) == {"student": True, "teacher": True, "teacher 2": False}
    assert sampling(distill={"on_policy": 0.0}, **no_eval) == {"student": False, "teacher": True}
    sft = {"objective": "nll", "on_policy": 0.0, "source": "dataset"}
    assert sampling(distill=sft, **no_eval) == {"student": False}
    served = {"objective": "nll", "on_policy": 0.0}
    assert "defence proxy" in sampling(distill=served, defence={"proxy": "q"})


@pytest.mark.parametrize(
    "files, template",
    [
        ({"tokenizer_config.json": '{"chat_template": "{{ x }}"}'}, ""),
        ({"tokenizer_config.json": "{}", "chat_template.jinja": "{{ x }}"}, ""),
        ({"tokenizer_config.json": "{}"}, "mine.jinja"),
        ({}, ""),  # served, or of the hub
    ],
)
def test_a_further_model_renders_by_its_own_template_where_it_has_one(tmp_path, files, template):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    first = FrozenSection(path="first", template="mine.jinja")
    assert another(first, str(tmp_path)) == FrozenSection(path=str(tmp_path), template=template)
