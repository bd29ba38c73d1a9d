"""Every option: its range, its error message, and that the shipped configurations load."""

import tomllib
from dataclasses import fields, is_dataclass, replace

import pytest

from reflux.trainer.config.loader import fill, to_toml
from reflux.trainer.config.roles import distill_roles
from reflux.trainer.config.schema import Config, sections
from reflux.trainer.config.sections import CalibrationSection, FrozenSection

CALIBRATE = {
    "phase": "calibrate",
    "folder": "r",
    "model": {"path": "m"},
    "proxy": {"path": "p"},
    "data": {"source": "d"},
    "task": {"name": "math"},
    "calibration": {"mode": "distillable"},
}
DISTILL = {
    "phase": "distill",
    "folder": "r",
    "model": {"path": "m"},
    "teacher": {"path": "t"},
    "data": {"source": "d"},
}
OFF_POLICY = {"on_policy": 0.5}


def calibrate(**tables) -> Config:
    return fill(Config, over(CALIBRATE, tables), "x.toml")


def distill(**tables) -> Config:
    return fill(Config, over(DISTILL, tables), "x.toml")


def over(low: dict, high: dict) -> dict:
    return low | {k: low.get(k, {}) | v if isinstance(v, dict) else v for k, v in high.items()}


def test_the_two_starting_points_of_this_file_are_accepted():
    assert (
        calibrate().calibration.mode == "distillable" and distill().distill.divergence == "reverse"
    )


@pytest.mark.parametrize(
    "wrong, says",
    [
        (
            {"calibration": {"strength": -1.0}},
            "calibration.strength = -1.0; want >= 0. The sign of eta is set by mode",
        ),
        (
            {"calibration": {"credit": "span", "score_norm": "per_byte"}},
            "Use score_norm = 'sum' or credit = 'sequence'",
        ),
        ({"calibration": {"credit": "span", "score_norm": "per_token"}}, "no sum over spans"),
        ({"calibration": {"span_clip": -1.0}}, "calibration.span_clip = -1.0; want >= 0"),
        ({"calibration": {"winsor": -3.0}}, "calibration.winsor"),
        ({"calibration": {"std_floor": -0.1}}, "calibration.std_floor"),
        ({"calibration": {"max_unaligned": 5.0}}, "calibration.max_unaligned = 5.0; want 0 to 1"),
        *[
            (
                {
                    "calibration": {
                        "proxies": ["q"],
                        "proxy_aggregate": how,
                        "credit": "prefix",
                        "score_norm": "sum",
                    }
                },
                f"proxy_aggregate = '{how}' with credit = 'prefix': which proxy counts depends on "
                "the whole text",
            )
            for how in ("min", "max")
        ],
        (
            {"calibration": {"mode": "undistillable"}, "reference": {"beta": 0.0}},
            "so nothing would be calibrated. Set reference.beta above 0 (0.04 is the default), or "
            "margin_guard = false",
        ),
        (
            {"task": {"name": "reward_model"}, "calibration": {"cal_gate": "skip_degenerate"}},
            "never equal, so no group would be skipped. Use 'scale_by_task_std' or 'none'",
        ),
        ({"reference": {"estimator": "k1_loss"}}, "its expected gradient is zero"),
        ({"reference": {"beta": -0.1}}, "reference.beta = -0.1; want >= 0"),
        ({"rollout": {"top_p": 0.9}}, "Set top_p = 1 and top_k = 0"),
        ({"rollout": {"top_k": 5}}, "Set top_p = 1 and top_k = 0"),
        ({"rollout": {"top_k": -1}}, "rollout.top_k = -1; want >= 0"),
        ({"rollout": {"top_p": 0.0}}, "rollout.top_p = 0.0; want 0 < top_p <= 1"),
        ({"rollout": {"temperature": 0.0}}, "Greedy rollouts of a prompt are all the same"),
        ({"rollout": {"group": 1}}, "rollout.group = 1; want >= 2"),
        ({"rollout": {"prompts": 0}}, "rollout.prompts = 0; want >= 1"),
        ({"rollout": {"max_tokens": 0}}, "rollout.max_tokens = 0"),
        ({"policy": {"clip": 0.0}}, "policy.clip = 0.0; want > 0"),
        ({"policy": {"epochs": 0}}, "policy.epochs = 0; want >= 1"),
        ({"policy": {"minibatches": 0}}, "policy.minibatches = 0; want >= 1"),
        (
            {"policy": {"minibatches": 3}, "rollout": {"prompts": 4}},
            "Use a multiple of 3, for instance 6",
        ),
        ({"guard": {"kl_budget": -0.1}}, "guard.kl_budget"),
        ({"proxy": {"path": ""}}, "needs a frozen proxy"),
        ({"task": {"name": ""}}, "needs a task reward"),
        ({"model": {"path": ""}}, "model.path is missing"),
        ({"data": {"source": ""}}, "data.source is missing"),
        ({"data": {"limit": 0}}, "data.limit = 0; want >= 1, or leave it out"),
        ({"eval": {"limit": -1}}, "eval.limit = -1"),
        ({"eval": {"every": -1}}, "eval.every = -1"),
        ({"log": {"samples_every": -1}}, "log.samples_every"),
        ({"batch": {"tokens": 0}}, "batch.tokens = 0; want >= 1"),
        ({"optim": {"lr": 0.0}}, "optim.lr = 0.0; want > 0"),
        ({"optim": {"betas": [0.9, 1.0]}}, "optim.betas = (0.9, 1.0)"),
        ({"steps": -1}, "steps = -1; want >= 0"),
        ({"folder": ""}, "folder = ''; want a folder of the run's own"),
        ({"folder": " "}, "folder = ' '; want"),
        (
            {"titan": {"trainin": {"seq_len": 8}}},
            "titan.trainin: no section of torchtitan's here, ",
        ),
        ({"titan": {"optimizer": {}}}, "titan.optimizer: no section of torchtitan's here. Known: "),
        ({"titan": {"training": 3}}, "titan.training = 3; want"),
        ({"seed": -1}, "seed = -1; want 0 to 2**32 - 1"),  # it is half of a 64-bit key
        ({"seed": 2**32}, "want 0 to 2**32 - 1"),
    ],
)
def test_calibrate_refuses(wrong, says):
    with pytest.raises(ValueError) as error:
        calibrate(**wrong)
    assert says in str(error.value) and str(error.value).startswith("x.toml: ")


@pytest.mark.parametrize(
    "right",
    [
        *[
            {"calibration": {"mode": "undistillable"} | more, "reference": {"beta": 0.0}}
            for more in ({"margin_guard": False}, {"denominator": "reference"}, {"strength": 0.0})
        ],
        {"calibration": {"mode": "distillable"}, "reference": {"beta": 0.0}},
        *[
            {"calibration": {"proxies": ["q"], "credit": "prefix", "score_norm": "sum"} | more}
            for more in ({}, {"proxy_aggregate": "row", "proxy_route": "who"})
        ],
        {"calibration": {"proxies": ["q"], "proxy_aggregate": "min"}},
    ],
)
def test_calibrate_accepts(right):
    calibrate(**right)


PLAIN = {"objective": "span", "allow_biased": True}


@pytest.mark.parametrize(
    "rollout", [{"temperature": 0.5}, {"top_p": 0.9}, {"top_k": 5}], ids=lambda r: next(iter(r))
)
def test_spans_take_texts_of_the_teachers_own_distribution(rollout):
    """Where the teacher samples them; of others it says its own log-probabilities."""
    for mixed in (0.0, 0.5):
        with pytest.raises(ValueError, match="'span' with rollout.temp.*the student would learn"):
            distill(rollout=rollout, distill=PLAIN | {"on_policy": mixed})
    distill(rollout=rollout, distill=PLAIN | {"on_policy": 1.0})
    distill(rollout=rollout, distill=PLAIN | {"on_policy": 0.0, "source": "dataset"})


@pytest.mark.parametrize("more", [{}, {"policy": {"max_is": 2.0}}])
def test_a_students_policy_gradient_has_the_samplers_ratios(more):
    trainer = {"rollout": {"old_logp": "trainer"}} | more
    with pytest.raises(ValueError, match="old_logp = 'trainer', policy.max_is.*Leave both out"):
        distill(distill={"objective": "policy_gradient", "on_policy": 1.0}, **trainer)
    distill(**trainer)  # without effect, but a base file may carry them


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"objective": "nll"}, "Set on_policy = 0, or objective = 'kl'"),
        ({"objective": "nll", "on_policy": 0.1}, "on_policy = 0.1"),
        ({"source": "dataset"}, "no response of the data is read. Set on_policy = 0"),
        (
            {"objective": "nll", "on_policy": 0.0, "temperature": 2.0},
            "temperature = 2.0 needs objective = 'kl'",
        ),
        ({"objective": "span", "temperature": 2.0}, "temperature = 2.0 needs objective = 'kl'"),
        (
            {"objective": "class", "partition": "prefix", "tail": "bucket", "top_k": 8},
            "only bounds these masses from below",
        ),
        (
            {"objective": "class", "partition": "common", "tail": "renorm", "top_k": 8},
            "what is not common belongs to the tail bucket. Use tail = 'bucket'",
        ),
        ({"more_teachers": ["b"], "teacher_weights": [1.0]}, "want one number > 0 for each"),
        ({"more_teachers": ["b"], "objective": "span"}, "takes one teacher"),
        (
            {"objective": "span", "tail": "bucket", "top_k": 8},
            "need objective = 'kl' or 'class', got 'span'",
        ),
        ({"tail": "bucket"}, "a truncated teacher needs both"),
        ({"top_k": 8}, "a truncated teacher needs both"),
        ({"tail": "bucket", "top_k": -8}, "distill.top_k = -8; want >= 0"),
        ({"tail": "renorm", "top_k": 1}, "is identically 0. Use tail = 'bucket'"),
        *[
            ({"tail": "drop", "top_k": 8, "divergence": d}, "can be lowered by moving mass out")
            for d in ("reverse", "jsd", "skew_forward", "skew_reverse")
        ],
        *[
            (
                {"divergence": d, "beta": b},
                "want 0 < beta < 1. The ends are divergence = 'forward' and 'reverse'",
            )
            for d in ("jsd", "skew_forward", "skew_reverse")
            for b in (0.0, 1.0, 1.5)
        ],
        ({"temperature": 0.0}, "distill.temperature = 0.0; want > 0"),
        ({"span_temperature": -1.0}, "distill.span_temperature"),
        ({"on_policy": 1.5}, "distill.on_policy = 1.5; want 0 to 1"),
        ({"nll_weight": -1.0, **OFF_POLICY}, "distill.nll_weight = -1.0; want >= 0"),
        ({"query_budget": -1, **OFF_POLICY}, "distill.query_budget = -1; want >= 0"),
        ({"correct_only": True, **OFF_POLICY}, "task.name is missing"),
    ],
)
def test_distill_refuses(wrong, says):
    with pytest.raises(ValueError) as error:
        distill(distill=wrong)
    assert says in str(error.value) and str(error.value).startswith("x.toml: ")


def test_a_reward_model_is_no_filter():
    with pytest.raises(ValueError, match="correct_only with task.name = 'reward_model'"):
        distill(distill={"correct_only": True, **OFF_POLICY}, task={"name": "reward_model"})


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"gradient_batches": 1}, "one gradient has no std"),
        ({"gradient_batches": -1}, "diagnose.gradient_batches = -1; want >= 0"),
        ({"runs": ["a", "a"]}, "want each folder once"),
        ({"prefixes": []}, "want one or more of dataset, teacher, student"),
    ],
)
def test_diagnose_refuses(wrong, says):
    with pytest.raises(ValueError, match="x.toml: ") as error:
        fill(Config, over(DISTILL, {"phase": "diagnose", "diagnose": wrong}), "x.toml")
    assert says in str(error.value)


@pytest.mark.parametrize(
    "right",
    [
        {"objective": "nll", "on_policy": 0.0},
        {"objective": "span", "allow_biased": True},
        {"divergence": "jsd", "beta": 0.1},
        {"divergence": "forward", "beta": 1.0},  # beta belongs to the mixtures alone
        {"tail": "drop", "top_k": 8, "divergence": "forward"},
        {"tail": "renorm", "top_k": 2},
        {"tail": "bucket", "top_k": 1},
        {"temperature": 2.0, "tail": "bucket", "top_k": 8},
        {"on_policy": 0.5, "query_budget": 5, "dedup": True, "rewrite": "m:f"},
        {"on_policy": 0.5, "nll_weight": 0.5},
        {"on_policy": 0.0, "source": "dataset", "nll_weight": 0.5},
    ],
)
def test_distill_accepts(right):
    distill(distill=right)


@pytest.mark.parametrize("section", [f.name for f in fields(Config) if is_dataclass(f.type)])
def test_no_float_may_be_nan_or_infinite(section):
    kind = next(f.type for f in fields(Config) if f.name == section)
    for f in fields(kind):
        for bad in (float("nan"), float("inf")) if f.type is float else ():
            with pytest.raises(ValueError, match=f"{section}.{f.name} = {bad}; want"):
                calibrate(**{section: {f.name: bad}})


@pytest.mark.parametrize(
    "tables, says",
    [
        (
            {"phase": "evaluate", "folder": "r", "model": {"path": "m"}},
            "needs eval.source and task.name",
        ),
        (
            {"phase": "distill", "folder": "r", "model": {"path": "m"}, "data": {"source": "d"}},
            "teacher.path is missing",
        ),
        ({**DISTILL, "eval": {"source": "e"}}, "task.name is missing"),
        (
            {"folder": "r"},
            "phase is missing; want calibrate | distill | diagnose | cache | evaluate",
        ),
        (
            {"phase": "distill"},
            "folder is missing; want a folder for the run, e.g. 'runs/mine'; ",
        ),
    ],
)
def test_a_phase_names_what_is_missing(tables, says):
    with pytest.raises(ValueError, match="x.toml: ") as error:
        fill(Config, tables, "x.toml")
    assert says in str(error.value)


def test_sft_on_given_text_needs_no_teacher_and_calibration_off_no_proxy():
    cfg = distill(
        teacher={"path": ""}, distill={"objective": "nll", "on_policy": 0.0, "source": "dataset"}
    )
    assert not cfg.needs_teacher
    assert calibrate(proxy={"path": ""}, calibration={"mode": "off"}).calibration.eta == 0


def test_a_teacher_that_is_not_loaded_is_for_one_teacher_of_a_distillation():
    served = {"path": "t", "source": "server", "servers": ["http://h:1"]}
    texts = {"objective": "nll", "on_policy": 0.0}
    (role,) = distill_roles(distill(teacher=served, distill=texts))
    assert role.elsewhere and role.probe is None and not role.samples
    for refused, says in (
        (lambda: distill(phase="diagnose", teacher=served), "'server' with phase = 'diagnose'"),
        (lambda: distill(teacher=served, distill={"more_teachers": ["u"]}), "for several teach"),
        (
            lambda: distill(
                teacher=served,
                distill=texts,
                defence={"temperature": 2.0},
            ),
            "defence.temperature = 2.0 with teacher.source = 'server'",
        ),
    ):
        with pytest.raises(ValueError, match="x.toml: ") as error:
            refused()
        assert says in str(error.value)
    with pytest.raises(ValueError, match="teacher is a FrozenSection; want a TeacherSection"):
        replace(distill(), teacher=FrozenSection("t"))


SERVER = {"engine": "server", "servers": ["http://h:1"]}
TEACHER_SERVER = {"source": "server", "servers": ["http://h:1"]}


@pytest.mark.parametrize(
    "build, says",
    [
        (lambda: calibrate(rollout={"engine": "server"}), "engine = 'server' with servers = []"),
        (lambda: calibrate(rollout={"servers": ["http://h:1"]}), "or neither"),
        (lambda: calibrate(rollout=SERVER | {"servers": ["h:1"]}), "'h:1'; want http://host:port"),
        (lambda: calibrate(rollout=SERVER | {"servers": ["http://h"]}), "want http://host:port"),
        (lambda: calibrate(rollout=SERVER | {"servers": ["http://h:x"]}), "want http://host:port"),
        (lambda: calibrate(rollout=SERVER | {"servers": ["http://h:1"] * 2}), "each address once"),
        (lambda: calibrate(rollout=SERVER | {"tensor_parallel": 2}), "A server has its own"),
        (lambda: calibrate(rollout=SERVER | {"overlap": 2}), "overlap = 2; want 0 or 1"),
        (lambda: calibrate(rollout={"overlap": 1}), "it samples on the device that trains"),
        (lambda: calibrate(rollout={"engine": "vllm", "overlap": 1}), "on the device that trains"),
        (
            lambda: calibrate(rollout=SERVER | {"overlap": 1, "old_logp": "trainer"}),
            "ratios need the behaviour policy",
        ),
        (lambda: calibrate(rollout={"gpu_memory_fraction": 0.0}), "want 0 < gpu_memory_fraction"),
        (lambda: calibrate(policy={"max_is": 2.0}), "Set rollout.old_logp = 'trainer'"),
        (lambda: calibrate(policy={"max_is": 0.5}), "max_is = 0.5; want 0 (off) or >= 1"),
        (
            lambda: distill(
                rollout={"engine": "vllm"},
                distill={"objective": "nll", "on_policy": 0.0},
                defence={"temperature": 2.0},
            ),
            "Use rollout.engine = 'embedded'",
        ),
        (lambda: distill(teacher={"source": "server"}), "source = 'server' with servers = []"),
        (lambda: distill(teacher=TEACHER_SERVER), "distill.tail = 'full' with teacher.source"),
        (
            lambda: distill(
                teacher=TEACHER_SERVER,
                distill={"tail": "bucket", "top_k": 4, "temperature": 2.0},
            ),
            "the tail at another is not known",
        ),
        (
            lambda: distill(
                teacher=TEACHER_SERVER, distill={"objective": "span", "allow_biased": True}
            ),
            "more than a server answers",
        ),
        *(
            (
                lambda objective=objective: distill(
                    teacher=TEACHER_SERVER, distill={"objective": objective, "allow_biased": True}
                ),
                f"distill.objective = '{objective}' with teacher.source = 'server'",
            )
            for objective in ("byte", "class", "policy_gradient")
        ),
        *(
            (
                lambda support=support: distill(
                    teacher=TEACHER_SERVER,
                    distill={"tail": "bucket", "top_k": 4, "support": support},
                ),
                f"distill.support = '{support}' with teacher.source = 'server'",
            )
            for support in ("student", "union")
        ),
    ],
)
def test_what_an_engine_cannot_do_is_refused(build, says):
    with pytest.raises(ValueError, match="x.toml: ") as error:
        build()
    assert says in str(error.value)


def test_the_mode_sets_the_sign_of_eta():
    eta = {
        mode: CalibrationSection(mode=mode, strength=0.3).eta
        for mode in ("off", "distillable", "undistillable")
    }
    assert eta == {"off": 0.0, "distillable": 0.3, "undistillable": -0.3}


def test_every_option_but_what_must_be_chosen_has_a_default():
    given = {f.name for f in fields(Config) if f.name in ("phase", "folder")}
    cfg = distill()
    assert given == {"phase", "folder"} and set(sections()) >= {f.name for f in fields(cfg)} - {
        "titan",
        "origins",
    }


@pytest.mark.parametrize(
    "phase, over, lr",
    [
        ("calibrate", {}, 1e-6),
        ("calibrate", {"lora": {"rank": 4}}, 1e-5),
        ("distill", {}, 1e-5),
        ("distill", {"lora": {"rank": 4}}, 1e-5),
        ("distill", {"optim": {"lr": 3e-4}}, 3e-4),
    ],
)
def test_the_rate_that_is_left_out_is_that_of_the_phase(phase, over, lr):
    made = (calibrate if phase == "calibrate" else distill)(**over)
    assert made.optim.lr == lr
    assert fill(Config, tomllib.loads(to_toml(made)), "x.toml").optim.lr == lr, "read back"
    with pytest.raises(ValueError, match="optim.lr = 0"):
        distill(optim={"lr": 0.0})
