"""Phase 2 on tiny models that answer: each way of teaching against its definition, and every option
with its effect.
"""

import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runs import config, run_here
from transformers import AutoModelForCausalLM

from reflux.kernels.teacher_topk import teacher_topk_ref
from reflux.tokenalign import vocab_map
from reflux.tokenalign.class_losses import class_kl, hybrid, partition_index, uld
from reflux.tokenalign.projection import Projection
from reflux.tokenalign.vocab_map import Vocabulary
from reflux.trainer.config.distillation import DistillSection
from reflux.trainer.data.chat import Chat
from reflux.trainer.distillation.phase import DistillPhase
from reflux.trainer.distillation.texts import TextSource

pytestmark = pytest.mark.usefixtures("titan_process")
GIVEN = {"source": "dataset", "on_policy": 0.0}
KL_KEYS = ("loss", "grad_norm")


@pytest.fixture
def seen(monkeypatch) -> dict[str, list]:
    """The texts and samples of every step."""
    calls: dict[str, list] = {"sample": [], "score": []}
    for name in calls:
        real = getattr(DistillPhase, name)

        def wrapped(self, *args, real=real, name=name):
            calls[name].append(real(self, *args))
            return calls[name][-1]

        monkeypatch.setattr(DistillPhase, name, wrapped)
    return calls


def logp_nV(folder, sample, prompt_ids=None) -> torch.Tensor:
    """Log-probabilities at the response's predictors, by transformers."""
    model, r = AutoModelForCausalLM.from_pretrained(folder), sample.rollout
    prompt = prompt_ids or r.prompt_ids
    with torch.no_grad():
        return (
            model(torch.tensor([prompt + r.ids]))
            .logits[0, len(prompt) - 1 : -1]
            .double()
            .log_softmax(-1)
        )


def mean_over_tokens(talkers, samples, loss_of) -> float:
    """What the first step's loss is by definition: sum over all response tokens, divided once."""
    total = 0.0
    for s in samples:
        prompt_ids = s.teacher_views[0].prompt_ids if any(s.teacher_views) else None
        student_nV = logp_nV(talkers / "policy", s)
        total += float(loss_of(student_nV, logp_nV(talkers / "teacher", s, prompt_ids), s))
    return total / sum(len(s.rollout.ids) for s in samples)


def nll_of(student_nV, _, sample):
    return -student_nV.gather(1, torch.tensor(sample.rollout.ids)[:, None]).sum()


def kl(p_nV, q_nV):
    return (p_nV.exp() * (p_nV - q_nV)).sum()


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
                    distill={"divergence": divergence, "tail": tail, "top_k": k},
                )
            )
            for tail, k in (("full", 0), ("bucket", 512))
        )
        for a, b in zip(full.steps, bucket.steps):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4) and a[
                "grad_norm"
            ] == pytest.approx(b["grad_norm"], rel=1e-3)
        assert bucket.steps[0]["teacher_mass"] == pytest.approx(1, abs=1e-5)


def test_bought_answers_are_the_same_texts_again_and_again(talkers, tmp_path, seen):
    run_here(
        config(
            talkers,
            tmp_path / "run",
            "distill",
            steps=3,
            rollout={"prompts": 3, "group": 2},
            distill={"objective": "nll", "on_policy": 0.0, "query_budget": 3},
        )
    )
    steps = [{t.rollout.ids for group in step for t in group} for step in seen["sample"]]
    assert steps[0] == steps[1] == steps[2]


def test_only_right_answers_are_bought(talkers, tmp_path, seen):
    run_here(
        config(
            talkers,
            tmp_path / "run",
            "distill",
            task={"name": "exact", "options": {"marker": "=>"}},
            rollout={"prompts": 3, "group": 4, "max_tokens": 14},
            distill={
                "objective": "nll",
                "on_policy": 0.0,
                "query_budget": 24,
                "correct_only": True,
            },
        )
    )
    texts = [t.rollout for step in seen["sample"] for group in step for t in group]
    assert texts and all(x.text.rpartition("=>")[2].strip() == x.prompt.answer for x in texts)


def test_no_right_answer_at_all_says_what_to_do(talkers, tmp_path):
    with pytest.raises(
        ValueError, match="none of the teacher's 2 answers is correct.*task.options"
    ):
        run_here(
            config(
                talkers,
                tmp_path / "run",
                "distill",
                task={"name": "exact", "options": {"marker": "never"}},
                distill={
                    "objective": "nll",
                    "on_policy": 0.0,
                    "query_budget": 2,
                    "correct_only": True,
                },
            )
        )


def test_wrong_texts_are_left_out_of_a_step_and_the_step_still_runs(talkers, tmp_path, seen):
    """All of them wrong: no token, no update, no NaN."""
    run = run_here(
        config(
            talkers,
            tmp_path / "run",
            "distill",
            task={"name": "exact", "options": {"marker": "never"}},
            distill={"divergence": "forward", "on_policy": 0.0, "correct_only": True},
        )
    )
    assert seen["score"] == [[], []] and [s["tokens"] for s in run.steps] == [0, 0]
    assert all(
        s["passed_filter"] == 0 and s["loss"] == 0 and s["grad_norm"] == 0 for s in run.steps
    )


# across tokenizers


@pytest.mark.parametrize(
    "options",
    [{}, GIVEN, {"on_policy": 0.0}, {"on_policy": 0.5}],
    ids=["student", "dataset", "teacher", "mixed"],
)
def test_spans_carry_the_teachers_likelihood_whoever_wrote(talkers, tmp_path, seen, options):
    """Teacher and student of different tokenizers; by transformers: span sums of the teacher add up
    to its sequence score.
    """
    run = run_here(
        config(
            talkers,
            tmp_path / "run",
            "distill",
            steps=3,
            teacher={"path": str(talkers / "proxy")},
            rollout={"prompts": 4},
            distill={"objective": "span", **options},
        )
    )
    chat, model = (
        Chat(str(talkers / "proxy")),
        AutoModelForCausalLM.from_pretrained(talkers / "proxy"),
    )
    samples = [s for s in seen["score"][0] if s.rollout.ended and s.rollout.text]
    assert samples and run.steps[2]["loss"] != run.steps[0]["loss"]
    for s in samples[:4]:
        prompt, ids = chat.prompt_ids(s.rollout.prompt.messages), chat.encode(s.rollout.text)
        with torch.no_grad():
            logp = (
                model(torch.tensor([prompt + ids]))
                .logits[0, len(prompt) - 1 :]
                .double()
                .log_softmax(-1)
            )
        want = logp[:-1].gather(1, torch.tensor(ids)[:, None]).sum() + logp[
            -1, list(chat.stop_ids)
        ].logsumexp(0)
        # a teacher's own sample need not be its canonical encoding
        if not s.off_policy or options == GIVEN:
            assert np.sum(s.teacher_span_logp) == pytest.approx(want.item(), abs=1e-3)
        assert s.span.max() == len(s.teacher_span_logp) - 1 and len(s.span) == len(s.rollout.ids)


CLASS_LOSSES = {
    "first_byte": {"divergence": "forward"},
    "common": {"divergence": "jsd", "beta": 0.3},
    "prefix": {"divergence": "reverse"},
    "projection": {"divergence": "forward"},
    "uld": {},
    "hybrid": {"divergence": "forward", "temperature": 2.0, "scale_t2": True},
    "topk": {"divergence": "forward", "tail": "bucket", "top_k": 6},
}


def class_loss_of(student: Chat, teacher: Chat, kind: str, z_SV, u_SW, options) -> torch.Tensor:
    """The definition on whole logits, by the plain functions of reflux.tokenalign (their gradients
    are proven in their own tests).
    """
    sides = Vocabulary(student.table, student.stop_ids), Vocabulary(teacher.table, teacher.stop_ids)
    T = options.get("temperature", 1.0)
    given = {
        "divergence": options.get("divergence", "reverse"),
        "beta": options.get("beta", 0.5),
        "temperature": T,
    }
    if kind == "uld":
        return uld(z_SV, u_SW).sum()
    if kind == "topk":
        topk = teacher_topk_ref(u_SW, torch.eye(u_SW.shape[1], dtype=u_SW.dtype), 6)
        return class_kl(z_SV, topk, partition_index(vocab_map.common(*sides)), **given).sum()
    built = (
        Projection.build(*sides)
        if kind == "projection"
        else getattr(vocab_map, "common" if kind == "hybrid" else kind)(*sides)
    )
    loss = hybrid if kind == "hybrid" else class_kl
    return loss(z_SV, u_SW, partition_index(built), **given).sum() * (
        T**2 if options.get("scale_t2") else 1
    )


@pytest.mark.parametrize("kind", CLASS_LOSSES)
@pytest.mark.parametrize(
    "texts", [{}, GIVEN, {"on_policy": 0.0}], ids=["student", "dataset", "teacher"]
)
def test_class_losses_compare_both_models_where_both_have_read_the_same_bytes(
    talkers, tmp_path, seen, kind, texts
):
    options = {"partition": "common" if kind == "topk" else kind} | CLASS_LOSSES[kind]
    run = run_here(
        config(
            talkers,
            tmp_path / "run",
            "distill",
            steps=1,
            rollout={"prompts": 2, "group": 2},
            teacher={"path": str(talkers / "proxy"), "dtype": "float32"},
            distill={"objective": "class"} | options | texts,
        )
    )
    chats = [Chat(str(talkers / name)) for name in ("policy", "proxy")]
    models = [AutoModelForCausalLM.from_pretrained(talkers / name) for name in ("policy", "proxy")]
    total, tokens, places = 0.0, 0, 0
    for s in seen["score"][0]:
        view, r = s.teacher_views[0], s.rollout
        logits = []
        for model, prompt, ids, place in zip(
            models,
            (r.prompt_ids, view.prompt_ids),
            (r.ids, view.ids),
            (view.student_positions, view.teacher_positions),
        ):
            with torch.no_grad():
                logits.append(
                    model(torch.tensor([prompt + ids]))
                    .logits[0, len(prompt) - 1 : -1]
                    .double()[place]
                )
        z_SV, u_SW = (x[:, : c.vocab_size] for x, c in zip(logits, chats))
        total += float(class_loss_of(*chats, kind, z_SV, u_SW, options))
        tokens, places = tokens + len(r.ids), places + len(view.student_positions)
    assert run.steps[0]["loss"] == pytest.approx(total / tokens, rel=1e-4)
    assert (
        run.steps[0]["aligned_positions"] == pytest.approx(places / tokens) and 0 < places <= tokens
    )


def test_classes_of_one_vocabulary_are_its_tokens_the_stop_included(talkers, tmp_path):
    """Every id a class of its own, every token a place: the class loss is the KL, step after
    step.
    """
    options = {"divergence": "forward", "on_policy": 0.0, "partition": "common"}
    runs = [
        run_here(
            config(
                talkers,
                tmp_path / objective,
                "distill",
                steps=3,
                distill=options | {"objective": objective},
            )
        )
        for objective in ("kl", "class")
    ]
    for kl, classes in zip(*(run.steps for run in runs)):
        assert classes["aligned_positions"] == 1 and all(
            classes[key] == pytest.approx(kl[key], rel=1e-3) for key in KL_KEYS
        )


def test_several_teachers_are_their_weighted_mean(talkers, tmp_path):
    """On given texts, with a teacher of the student's tokenizer and one of another; texts of their
    own are drawn by weight.
    """

    def first(folder, path, **more):
        options = (
            {"objective": "class", "partition": "first_byte", "divergence": "forward"}
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


def test_each_teacher_writes_its_share_of_the_texts(talkers, tmp_path, seen):
    run_here(
        config(
            talkers,
            tmp_path / "run",
            "distill",
            steps=4,
            rollout={"prompts": 6, "group": 1},
            distill={
                "objective": "nll",
                "on_policy": 0.0,
                "more_teachers": [str(talkers / "proxy")],
                "teacher_weights": [1.0, 2.0],
            },
        )
    )
    teachers = [t.teacher for step in seen["sample"] for group in step for t in group]
    assert set(teachers) == {0, 1} and 24 * 0.4 < sum(teachers) < 24 * 0.95
    chat = Chat(str(talkers / "policy"))
    for sample, text in zip(
        (s for step in seen["score"] for s in step),
        (t for step in seen["sample"] for g in step for t in g),
    ):
        if text.teacher == 1:  # in the student's tokens, whoever wrote
            assert (
                sample.rollout.ids[:-1] == chat.encode(text.rollout.text) or not text.rollout.ended
            )


def test_an_attacker_may_rewrite_what_the_teacher_wrote(talkers, tmp_path, seen):
    run_here(
        config(
            talkers,
            tmp_path / "run",
            "distill",
            steps=2,
            rollout={"prompts": 4, "group": 3},
            distill={
                "objective": "nll",
                "on_policy": 0.0,
                "rewrite": "rewrites:shout",
                "dedup": True,
            },
        )
    )
    texts = [t.rollout for step in seen["sample"] for group in step for t in group]
    assert texts and all(
        x.text == x.text.upper() and any(c.isdigit() for c in x.text) for x in texts
    )
    chat = Chat(str(talkers / "teacher"))
    assert all(chat.decode(x.content_ids) == x.text for x in texts), (
        "the ids spell the text that is trained on"
    )
    for step in seen["sample"]:
        for group in step:
            assert len({t.rollout.text for t in group}) == len(group)


def test_of_bought_texts_too_a_rewrite_may_drop_all_of_a_prompts(talkers, tmp_path, seen):
    options = {"objective": "nll", "on_policy": 0.0, "query_budget": 8}
    run_here(
        config(
            talkers,
            tmp_path / "run",
            "distill",
            distill=options | {"rewrite": "rewrites:only_of_even_prompts"},
        )
    )
    texts = [t.rollout for step in seen["sample"] for group in step for t in group]
    assert texts and all(x.prompt.index % 2 == 0 for x in texts)
    with pytest.raises(ValueError, match="dropped all of the teacher's 8 answers"):
        run_here(
            config(
                talkers,
                tmp_path / "none",
                "distill",
                distill=options | {"rewrite": "rewrites:nothing"},
            )
        )


def test_a_rewrite_that_makes_texts_too_long_says_so(talkers, tmp_path):
    with pytest.raises(ValueError, match="rollout.max_tokens = 12"):
        run_here(
            config(
                talkers,
                tmp_path / "run",
                "distill",
                distill={"objective": "nll", "on_policy": 0.0, "rewrite": "rewrites:double"},
            )
        )


def test_another_vocabulary_is_refused_with_the_way_out(talkers, tmp_path):
    with pytest.raises(ValueError, match="different vocabularies.*'class' or 'span'"):
        run_here(
            config(talkers, tmp_path / "run", "distill", teacher={"path": str(talkers / "proxy")})
        )


def test_a_teacher_with_another_template_reads_its_own_prompt(talkers, tmp_path, seen):
    """T20: the same response ids behind the teacher's rendering; the loss is what transformers
    computes from it.
    """
    shutil.copytree(talkers / "teacher", tmp_path / "teacher")
    settings = tmp_path / "teacher" / "tokenizer_config.json"
    template = Path(tmp_path / "teacher" / "chat_template.jinja")
    (template if template.exists() else settings).write_text(
        (template if template.exists() else settings)
        .read_text()
        .replace("assistant: ", "Well, the answer is ")
    )
    run = run_here(
        config(
            talkers,
            tmp_path / "run",
            "distill",
            steps=1,
            teacher={"path": str(tmp_path / "teacher")},
            distill={"divergence": "forward"},
            rollout={"prompts": 4, "group": 2},
        )
    )
    assert all(
        s.teacher_views and s.teacher_views[0].prompt_ids != s.rollout.prompt_ids
        for s in seen["score"][0]
    )
    assert run.steps[0]["loss"] == pytest.approx(
        mean_over_tokens(talkers, seen["score"][0], lambda s, t, _: kl(t, s)), rel=2e-5
    )


# options


BASE = {
    "distill": {"divergence": "forward", "on_policy": 0.5},
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
        {"temperature": 2.0},
        {"source": "dataset"},
        {"on_policy": 1.0},
        {"nll_weight": 0.5},
        {"query_budget": 4},
    )
] + [
    (TOP, {"top_k": 9}),
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
        {"objective": "span", "on_policy": 0.5},
        {"objective": "class", "partition": "prefix", "on_policy": 0.5},
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


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_the_student_answers_its_share_of_every_step(share):
    """No step is left to luck: 10 prompts at 0.3 are 3, at any step; a fraction of a prompt is
    right on average.
    """
    source = object.__new__(TextSource)
    source.spec = DistillSection(on_policy=share)
    source.cfg = SimpleNamespace(seed=1, rollout=SimpleNamespace(prompts=10))
    assert {len(source._on_policy_slots(step)) for step in range(50)} == {round(10 * share)}
    source.cfg.rollout.prompts = 3
    counts = [len(source._on_policy_slots(step)) for step in range(400)]
    assert set(counts) <= {math.floor(3 * share), math.ceil(3 * share)} and np.mean(
        counts
    ) == pytest.approx(3 * share, abs=0.1)
    assert len({frozenset(source._on_policy_slots(step)) for step in range(40)}) > 1 or share in (
        0.0,
        1.0,
    )
