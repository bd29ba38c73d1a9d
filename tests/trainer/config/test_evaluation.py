"""What [eval] and [accept] refuse, and that named tables are read, written and overridden like any
other.
"""

import tomllib

import pytest

from reflux.trainer.config.evaluation import AcceptSection
from reflux.trainer.config.loader import fill, load, to_toml
from reflux.trainer.config.schema import Config

EVALUATE = {
    "phase": "evaluate",
    "folder": "r",
    "model": {"path": "m"},
    "task": {"name": "multiple_choice"},
    "eval": {"source": "e"},
}
GATE = """phase = "evaluate"
folder = "r"
model.path = "m"
task.name = "exact"
eval.source = "e"
[accept.teacher]
metric = "greedy"
against = "runs/original"
max_drop = 0.02
[accept.student]
run = "runs/student"
against = "runs/baseline"
max_change = -0.5
"""


def evaluate(**over):
    return fill(
        Config,
        {
            **EVALUATE,
            **{k: EVALUATE.get(k, {}) | v if isinstance(v, dict) else v for k, v in over.items()},
        },
        "x.toml",
    )


@pytest.mark.parametrize(
    "table, says",
    [
        (
            {"pass_at": [2]},
            "eval.pass_at = [2] with samples = 1; want each k once, from 1 to samples",
        ),
        ({"pass_at": [0], "samples": 2}, "want each k once"),
        ({"pass_at": [2, 2], "samples": 2}, "want each k once"),
        ({"pass_at": [1], "by": "likelihood"}, "no answer is sampled. Set by = 'both'"),
        ({"by": "loglik"}, "want generation | likelihood | both"),
        ({"refusal": "("}, "eval.refusal = '('"),
        ({"samples": -1}, "eval.samples = -1; want >= 0"),
        ({"harness": "mmlu"}, "eval.harness = 'mmlu'; want a list of str"),
    ],
)
def test_eval_refuses(table, says):
    with pytest.raises(ValueError) as error:
        evaluate(eval=table)
    assert says in str(error.value) and str(error.value).startswith("x.toml: ")


@pytest.mark.parametrize(
    "rule, says",
    [
        (
            {},
            "accept.a.no threshold given; want exactly one of min, max, max_drop, min_change, "
            "max_change",
        ),
        ({"min": 0.1, "max": 0.2}, "min and max given; want exactly one"),
        ({"max_drop": 0.1}, "want a run folder for max_drop"),
        ({"min": 0.1, "against": "f"}, "none for min and max"),
        ({"max_drop": -0.1, "against": "f"}, "max_drop = -0.1; want >= 0"),
        ({"metric": "accuracy", "min": 0.1}, "metric = 'accuracy'; want sampled, greedy, pass@K"),
        ({"metric": "pass@0", "min": 0.1}, "pass@K"),
        (
            {"metric": "pass@2", "min": 0.1},
            "accept.a.metric = 'pass@2' is not measured; want greedy, sampled",
        ),
        ({"metric": "likelihood_sum", "min": 0.1}, "is not measured"),
        ({"min_change": 0.0, "against": "f"}, "want another number"),
        ({"min": "high"}, "accept.a.min = 'high'; want a finite float | none"),
        ({"mim": 0.1}, "unknown key accept.a.mim, did you mean accept.a.min?"),
    ],
)
def test_accept_refuses(rule, says):
    with pytest.raises(ValueError) as error:
        evaluate(accept={"a": rule})
    assert says in str(error.value) and str(error.value).startswith("x.toml: ")


@pytest.mark.parametrize("accept", [3, {"a": 3}, {"min": 0.5}])
def test_a_rule_is_a_named_table(accept):
    with pytest.raises(
        ValueError, match=r"x.toml: accept(\.a|\.min)? is a section; write its keys as"
    ):
        evaluate(accept=accept)


@pytest.mark.parametrize(
    "over, says",
    [
        (
            {"eval": {"by": "likelihood"}},
            "eval.by = 'likelihood' with task.name = 'exact': only 'multiple_choice' has options",
        ),
        ({"eval": {"list_options": True}}, "eval.list_options = true with task.name = 'exact'"),
        ({"eval": {"list_options": "given"}}, "eval.list_options = 'given' with task.name ="),
        (
            {"task": {"name": "reward_model"}, "eval": {"pass_at": [1]}},
            "which calls nothing correct or wrong",
        ),
        ({"eval": {"source": ""}}, "needs eval.source and task.name"),
    ],
)
def test_what_a_task_does_not_support_is_refused(over, says):
    with pytest.raises(ValueError) as error:
        evaluate(**({"task": {"name": "exact"}} | over))
    assert says in str(error.value)


def test_a_training_run_is_judged_by_a_run_of_its_own():
    train = {"phase": "distill", "teacher": {"path": "t"}, "data": {"source": "d"}}
    for over, says in (
        ({"accept": {"a": {"min": 0.1}}}, "accept.a with phase = 'distill'"),
        ({"eval": {"harness": ["mmlu"]}}, "eval.harness"),
    ):
        with pytest.raises(ValueError, match=says):
            evaluate(**train, **over)


def test_what_is_measured_can_be_named():
    spec = evaluate(eval={"by": "both", "samples": 4, "pass_at": [2, 4]}).eval
    assert spec.metrics == (
        "greedy",
        "sampled",
        "pass@2",
        "pass@4",
        "likelihood_sum",
        "likelihood_per_byte",
    )
    assert evaluate(eval={"by": "likelihood"}).eval.metrics == spec.metrics[-2:] and evaluate(
        eval={"samples": 0}
    ).eval.metrics == ("greedy",)


def test_named_tables_are_read_written_and_overridden(tmp_path):
    (tmp_path / "x.toml").write_text(GATE)
    cfg = load(tmp_path / "x.toml", ("accept.teacher.max_drop=0.05", "accept.third.min=0.3"))
    assert cfg.accept == {
        "teacher": AcceptSection(metric="greedy", against="runs/original", max_drop=0.05),
        "student": AcceptSection(run="runs/student", against="runs/baseline", max_change=-0.5),
        "third": AcceptSection(min=0.3),
    }
    assert fill(Config, tomllib.loads(to_toml(cfg)), "again") == cfg
    assert fill(cfg, {"accept": {"third": {"min": 0.4}}}, "--set").accept == cfg.accept | {
        "third": AcceptSection(min=0.4)
    }
    assert [rule.threshold for rule in cfg.accept.values()] == ["max_drop", "max_change", "min"]
