"""Phase 2 on tiny models that answer: every objective against its definition, every option with its
effect.
"""

import math

import numpy as np
import pytest
import torch
from distillation_cases import GIVEN, KL_KEYS, kl, logp_nV, mean_over_tokens
from runs import config, run_here, write_data

from reflux.trainer.data.chat import Chat
from reflux.trainer.data.prompts import load_prompts
from reflux.trainer.distillation.phase import DistillPhase

pytestmark = pytest.mark.usefixtures("titan_process")


def nll_of(student_nV, _, sample):
    return -student_nV.gather(1, torch.tensor(sample.rollout.ids)[:, None]).sum()


def mixture(a_nV, b_nV, weight: float):
    return torch.logaddexp(a_nV + math.log(weight), b_nV + math.log(1 - weight))


def jsd(s, t, _, beta=0.3):
    m = mixture(t, s, beta)
    return beta * kl(t, m) + (1 - beta) * kl(s, m)


def bucket(s, t, _, k=5):
    """Forward KL on the teacher's top k and one tail bucket."""
    top, ids = t.topk(k, -1)
    mine = s.gather(1, ids)
    tail_t, tail_s = (torch.log1p(-x.exp().sum(1)) for x in (top, mine))
    return (top.exp() * (top - mine)).sum() + (tail_t.exp() * (tail_t - tail_s)).sum()


def renorm(s, t, _, k=5):
    top, ids = t.topk(k, -1)
    return kl(top.log_softmax(-1), s.gather(1, ids).log_softmax(-1))


def student_bucket(s, t, _, k=5):
    """Reverse KL on the student's own top k and one tail bucket."""
    mine, ids = s.topk(k, -1)
    theirs = t.gather(1, ids)
    tail_s, tail_t = (torch.log1p(-x.exp().sum(1)) for x in (mine, theirs))
    return (mine.exp() * (mine - theirs)).sum() + (tail_s.exp() * (tail_s - tail_t)).sum()


def union_bucket(s, t, _, k=5):
    """Reverse KL on both models' top k and one tail bucket."""
    total = 0.0
    for p, q in zip(s, t):
        ids = torch.unique(torch.cat([p.topk(k).indices, q.topk(k).indices]))
        tail_p, tail_q = (torch.log1p(-x[ids].exp().sum()) for x in (p, q))
        total += (p[ids].exp() * (p[ids] - q[ids])).sum() + tail_p.exp() * (tail_p - tail_q)
    return total


def sampled(s, t, sample, n=7):
    """Cross-entropy of the student at n tokens drawn from the teacher by inverse CDF."""
    cdf = t.exp().cumsum(-1)
    uniform = torch.from_numpy(sample.teacher_views[0].uniform)
    drawn = torch.searchsorted(cdf, uniform * cdf[:, -1:], right=True)
    return -s.gather(1, drawn).sum() / n


DEFINITIONS = {
    "sft": (GIVEN | {"objective": "nll"}, nll_of),
    "seq_kd": ({"objective": "nll", "on_policy": 0.0}, nll_of),
    "kd_forward": (GIVEN | {"divergence": "forward"}, lambda s, t, _: kl(t, s)),
    "kd_on_teacher_texts": ({"divergence": "forward", "on_policy": 0.0}, lambda s, t, _: kl(t, s)),
    "gkd_reverse": ({"divergence": "reverse"}, lambda s, t, _: kl(s, t)),
    "gkd_jsd": ({"divergence": "jsd", "beta": 0.3}, jsd),
    "skew_forward": (
        {"divergence": "skew_forward", "beta": 0.9},
        lambda s, t, _: kl(t, mixture(t, s, 0.9)),
    ),
    "gkd_mixed": ({"divergence": "forward", "on_policy": 0.5}, lambda s, t, _: kl(t, s)),
    "bucket": ({"divergence": "forward", "tail": "bucket", "top_k": 5}, bucket),
    "renorm": ({"divergence": "forward", "tail": "renorm", "top_k": 5}, renorm),
    "student_support": ({"tail": "bucket", "top_k": 5, "support": "student"}, student_bucket),
    "union_support": ({"tail": "bucket", "top_k": 5, "support": "union"}, union_bucket),
    "sampled": ({"divergence": "forward", "tail": "sampled", "top_k": 7}, sampled),
    "kd_plus_nll": (
        GIVEN | {"divergence": "forward", "nll_weight": 0.7},
        lambda s, t, x: kl(t, s) + 0.7 * nll_of(s, t, x),
    ),
}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_the_first_loss_is_its_definition_over_the_global_token_count(
    talkers, tmp_path, seen, name
):
    options, loss_of = DEFINITIONS[name]
    run = run_here(
        config(
            talkers,
            tmp_path / "run",
            "distill",
            steps=1,
            distill=options,
            rollout={"prompts": 4, "group": 2},
        )
    )
    want = mean_over_tokens(talkers, seen["score"][0], loss_of)
    assert run.steps[0]["loss"] == pytest.approx(want, rel=2e-5)
    samplers = {t.sampled_by for step in seen["sample"] for group in step for t in group}
    assert samplers == {
        "sft": {"dataset"},
        "kd_forward": {"dataset"},
        "kd_plus_nll": {"dataset"},
        "seq_kd": {"teacher"},
        "kd_on_teacher_texts": {"teacher"},
        "gkd_mixed": {"teacher", "student"},
    }.get(name, {"student"})


@pytest.mark.parametrize(
    "options",
    [
        {"divergence": d, "beta": 0.4}
        for d in ("forward", "reverse", "jsd", "skew_forward", "skew_reverse")
    ]
    + [
        {"tail": "bucket", "top_k": 7},
        {"tail": "renorm", "top_k": 7, "divergence": "forward"},
        {"temperature": 2.0},
    ],
    ids=str,
)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(talkers, tmp_path, options):
    run = run_here(
        config(
            talkers,
            tmp_path / "run",
            "distill",
            steps=1,
            distill=options,
            teacher={"path": str(talkers / "policy")},
        )
    )
    assert run.steps[0]["loss"] == pytest.approx(0, abs=2e-6) and run.steps[0][
        "grad_norm"
    ] == pytest.approx(0, abs=5e-5)


def test_keeping_the_whole_vocabulary_is_the_full_divergence(talkers, tmp_path):
    for divergence in ("forward", "reverse"):
        full, bucket = (
            run_here(
                config(
                    talkers,
                    tmp_path / f"{divergence}{k}",
                    "distill",
                    distill={"divergence": divergence, "tail": tail, "top_k": k, "measures": not k},
                )
            )
            for tail, k in (("full", 0), ("bucket", 512))
        )
        assert all(0 <= a["top1_agreement"] <= 1 and a["entropy"] > 0 for a in full.steps)
        for a, b in zip(full.steps, bucket.steps):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4) and a[
                "grad_norm"
            ] == pytest.approx(b["grad_norm"], rel=1e-3)
        assert bucket.steps[0]["teacher_mass"] == pytest.approx(1, abs=1e-5)


def test_several_teachers_are_their_weighted_mean(talkers, tmp_path):
    """On given texts, with a teacher of the student's tokenizer and one of another; texts of their
    own are drawn by weight.
    """

    def first(folder, path, **more):
        options = (
            {"objective": "class", "partition": "first_byte", "divergence": "forward"}
            | {"allow_biased": True}
            | GIVEN
            | more
        )
        return run_here(
            config(
                talkers,
                tmp_path / folder,
                "distill",
                steps=1,
                distill=options,
                rollout={"prompts": 4},
                teacher={"path": str(talkers / path), "dtype": "float32"},
            )
        ).steps[0]["loss"]

    one, other = first("one", "teacher"), first("other", "proxy")
    both = first("both", "teacher", more_teachers=[str(talkers / "proxy")])
    assert both == pytest.approx((one + other) / 2, rel=1e-4) and one != pytest.approx(
        other, rel=1e-2
    )
    weighted = first(
        "weighted", "teacher", more_teachers=[str(talkers / "proxy")], teacher_weights=[3.0, 1.0]
    )
    assert weighted == pytest.approx((3 * one + other) / 4, rel=1e-4)


def test_the_logged_likelihood_is_per_off_policy_token(talkers, tmp_path, seen):
    """Whatever share they have of all tokens; it was divided by all of them."""
    over = {"distill": {"on_policy": 0.5, "source": "dataset", "nll_weight": 0.5}}
    over["rollout"] = {"prompts": 4, "group": 2}
    (step,) = run_here(config(talkers, tmp_path / "run", "distill", steps=1, **over)).steps
    given = [s for s in seen["score"][0] if s.off_policy]
    tokens = sum(len(s.rollout.ids) for s in given)
    want = sum(nll_of(logp_nV(talkers / "policy", s), None, s) for s in given) / tokens
    assert 0 < step["off_policy"] < 1 and step["nll"] == pytest.approx(float(want), rel=1e-4)
    stats = {"nll": 0.0, "off_policy": 0.0, "epoch2/nll": 3.0, "epoch2/off_policy": 0.5}
    fields = DistillPhase.log_fields(None, stats)
    assert "nll" not in fields and fields["epoch2/nll"] == 6.0


BASE = {
    "distill": {"divergence": "forward", "on_policy": 0.5, "allow_biased": True},
    "rollout": {"prompts": 4, "group": 2, "max_tokens": 12},
}


TOP = {"tail": "bucket", "top_k": 8}


_base: dict = {}  # outcomes of what an option is compared with
OPTIONS = [
    ({}, o)
    for o in (
        {"objective": "nll", "on_policy": 0.0},
        {"divergence": "reverse"},
        {"divergence": "jsd"},
        {"divergence": "skew_reverse"},
        TOP,
        {"tail": "drop", "top_k": 8},
        {"tail": "renorm", "top_k": 8},
        {"tail": "sampled", "top_k": 8},
        {"temperature": 2.0},
        {"source": "dataset"},
        {"on_policy": 1.0},
        {"nll_weight": 0.5},
        {"query_budget": 4},
    )
] + [
    (TOP, {"top_k": 9}),
    (TOP, {"support": "student"}),
    (TOP, {"support": "union"}),
    ({"divergence": "jsd"}, {"beta": 0.2}),
    ({"divergence": "skew_forward", "beta": 0.5}, {"beta": 0.2}),
    ({"temperature": 2.0}, {"scale_t2": True}),
    ({"objective": "span"}, {"span_temperature": 10.0}),
    ({"objective": "span"}, {"nll_weight": 0.5}),
    ({"objective": "class"}, {"partition": "first_byte"}),
    ({"objective": "class", "partition": "common"}, TOP),
    ({"objective": "class"}, {"divergence": "reverse"}),
    ({}, {"more_teachers": ["PROXY"], "objective": "class"}),
    ({"objective": "class", "more_teachers": ["PROXY"]}, {"teacher_weights": [3.0, 1.0]}),
]


@pytest.mark.parametrize("under, option", OPTIONS, ids=str)
def test_every_option_changes_what_it_names(talkers, tmp_path, under, option):
    """T29."""

    def outcome(folder, **more):
        options = BASE["distill"] | under | more
        if "more_teachers" in options:
            options["more_teachers"] = [str(talkers / "proxy")]
        run = run_here(config(talkers, folder, "distill", steps=1, **BASE | {"distill": options}))
        return [run.steps[0][key] for key in KL_KEYS]

    if str(under) not in _base:
        _base[str(under)] = outcome(tmp_path / "base")
    assert not np.allclose(
        outcome(tmp_path / "run", **option), _base[str(under)], rtol=1e-5, atol=0
    ), f"{option} changed nothing"


@pytest.mark.parametrize(
    "over",
    [{"rollout": {"top_p": 0.5}}, {"rollout": {"top_k": 1}}, {"teacher": {"dtype": "bfloat16"}}],
    ids=str,
)
def test_options_of_other_tables_change_what_they_name(talkers, tmp_path, over):
    base = run_here(config(talkers, tmp_path / "a", "distill"))
    got = run_here(config(talkers, tmp_path / "b", "distill", **over))
    assert got.steps[0]["loss"] != pytest.approx(base.steps[0]["loss"], rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"on_policy": 0.5, "nll_weight": 0.5},
        {"divergence": "forward", "tail": "sampled", "top_k": 6},
        {"objective": "span", "on_policy": 0.5, "allow_biased": True},
        {"objective": "class", "partition": "prefix", "on_policy": 0.5, "allow_biased": True},
    ],
    ids=str,
)
def test_micro_batches_and_packing_change_no_number(talkers, tmp_path, options):
    """T10."""
    other = (
        {"teacher": {"path": str(talkers / "proxy"), "dtype": "float32"}}
        if "classes" in options
        else {}
    )
    runs = [
        run_here(
            config(talkers, tmp_path / str(k), "distill", distill=options, batch=batch, **other)
        )
        for k, batch in enumerate([{}, {"tokens": 1}, {"tokens": 97}, {"pack": True}])
    ]
    for other in runs[1:]:
        for a, b in zip(runs[0].steps, other.steps):
            for key in ("loss", "grad_norm"):
                assert a[key] == pytest.approx(b[key], rel=1e-5), key


def test_a_teachers_text_that_is_too_long_in_the_students_tokens_ends_no_run(
    talkers, tmp_path, seen
):
    """A row holds the prompt and eleven tokens of text; the teacher, of another tokenizer, writes
    texts of up to eleven of its own, which can be more here.
    """
    chat = Chat(str(talkers / "policy"))
    prompts = load_prompts(str(write_data(tmp_path)))
    longest = max(len(chat.prompt_ids(p.messages)) for p in prompts)
    run = run_here(
        config(
            talkers,
            tmp_path / "run",
            "distill",
            steps=4,
            teacher={"path": str(talkers / "proxy"), "dtype": "float32"},
            training={"seq_len": longest + 10, "mixed_precision_param": "float32"},
            rollout={"prompts": 6, "group": 4, "max_tokens": 11, "temperature": 3.0},
            distill={"objective": "nll", "on_policy": 0.0},
        )
    )
    left_out = [s["too_long"] for s in run.steps]
    assert any(0 < x < 1 for x in left_out), left_out
    for samples, share in zip(seen["score"], left_out):
        rows = [len(s.rollout.prompt_ids) + len(s.rollout.ids) for s in samples]
        assert max(rows) <= longest + 11 and len(rows) == round((1 - share) * 24)


def test_a_failed_grade_is_no_reward_of_the_students_texts(talkers, tmp_path, monkeypatch):
    """Texts of an even number of bytes have 1.0, those of an odd number fail."""

    def grade(prompt, text):
        return 1.0 / (1 - len(text.encode()) % 2)

    monkeypatch.setattr("small_tasks.fail_always", grade)
    run = run_here(
        config(
            talkers,
            tmp_path / "run",
            "distill",
            steps=1,
            task={
                "name": "small_tasks:fail_always",
                "options": {"isolate": False, "grade_truncated": True},
                "max_failed": 1.0,
            },
            rollout={"prompts": 6, "group": 4, "max_tokens": 11, "temperature": 3.0},
            distill={"on_policy": 1.0},
        )
    )
    (step,) = run.steps
    assert 0 < step["grader_error"] < 1 and step["reward/task"] == 1.0


def test_texts_of_a_part_without_a_task_are_learned_from_and_not_graded(talkers, tmp_path, seen):
    """Only the part x has a task, by which every text is right."""
    data = str(write_data(tmp_path))
    parts = {"x": {"source": data, "task": {"name": "small_tasks:is_right"}}}
    parts["x"]["task"]["options"] = {"grade_truncated": True}
    mixture = {"source": "", "parts": parts | {"y": {"source": data}}}
    over = {"data": mixture, "task": {"name": ""}, "rollout": {"prompts": 4}, "steps": 1}
    run = run_here(config(talkers, tmp_path / "run", "distill", **over, distill={"on_policy": 1.0}))
    (step,) = run.steps
    assert step["reward/task"] == 1.0 and step["grader_error"] == 0.0
    assert {s.rollout.prompt.part for s in seen["score"][0]} == {"x", "y"}


def test_questions_with_a_task_beside_data_without_one(talkers, tmp_path):
    questions = {"source": str(write_data(tmp_path)), "limit": 3}
    questions["task"] = {"name": "small_tasks:is_right"}
    over = {"task": {"name": ""}, "distill": {"on_policy": 1.0}, "steps": 1}
    over["eval"] = {"parts": {"q": questions}, "samples": 0}
    run = run_here(config(talkers, tmp_path / "run", "distill", **over))
    assert "reward/task" not in run.steps[0]
    assert any("eval/greedy" in e for e in run.events)
