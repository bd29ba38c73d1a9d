"""What teachers of other templates and tokenizers say of a text."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from distillation_cases import GIVEN, KL_KEYS, kl, mean_over_tokens
from runs import config, run_here, with_other_stop
from transformers import AutoModelForCausalLM

from reflux.kernels.teacher_topk import teacher_topk_ref
from reflux.tokenalign import vocab_map
from reflux.tokenalign.class_losses import class_kl, hybrid, partition_index, uld
from reflux.tokenalign.projection import Projection
from reflux.tokenalign.vocab_map import Vocabulary
from reflux.trainer.data.batch import Prompt, Rollout
from reflux.trainer.data.chat import Chat
from reflux.trainer.distillation.phase import DistillPhase
from reflux.trainer.distillation.targets import Targets
from reflux.trainer.distillation.texts import Text
from reflux.trainer.engine.metrics import MetricSums
from reflux.trainer.phase import TextScore

pytestmark = pytest.mark.usefixtures("titan_process")


@pytest.mark.parametrize("objective", ["nll", "class"])
def test_no_student_learns_half_a_character(talkers, objective):
    """The teacher's text is cut inside the euro sign: the student is taught none of its bytes, and
    no U+FFFD, which nobody wrote.
    """
    student, teacher = (Chat(str(talkers / name)) for name in ("policy", "proxy"))
    ids = teacher.encode("ok \u20ac")[:-1]
    assert teacher.decode(ids) == "ok \ufffd"
    prompt = Prompt(0, ({"role": "user", "content": "q"},))
    rollout = Rollout(prompt, (1,), ids, (0.0,) * len(ids), 0.0, teacher.decode(ids), False)
    spec, other = SimpleNamespace(objective=objective), SimpleNamespace(shares_ids=False)
    other.chat = teacher
    targets = Targets(spec, student, [other])
    (sample,) = targets.samples([Text(rollout, "teacher")], MetricSums())
    assert sample.rollout.ids == student.encode("ok ") and sample.rollout.text == "ok "
    if objective == "class":
        assert sample.teacher_views[0].ids == teacher.encode("ok ")


@pytest.mark.parametrize("objective", ["nll", "byte", "class", "span"])
def test_a_text_ends_with_a_stop_that_the_student_knows(talkers, tmp_path, objective):
    """It would learn to write the teacher's, at which it does not stop, and go on."""
    student = Chat(str(talkers / "policy"))
    teacher = Chat(str(with_other_stop(talkers / "teacher", tmp_path / "teacher")))
    words, prompt = student.encode("1+2 is"), Prompt(0, ({"role": "user", "content": "q"},))
    ids, logp = (*words, teacher.stop_id), (-1.0,) * (len(words) + 1)
    ended = Rollout(prompt, (1,), ids, logp, -0.5, "1+2 is", True)
    cut = replace(ended, ids=words, logp=logp[:-1], ended=False)
    known = replace(ended, ids=(*words, student.stop_id))
    other = SimpleNamespace(chat=teacher, shares_ids=True, kept_rows=lambda rollout: None)
    other.score_texts = list  # of no text: all are the teacher's own
    targets = Targets(SimpleNamespace(objective=objective), student, [other])
    samples = targets.samples([Text(r, "teacher") for r in (ended, cut, known)], MetricSums())
    own = (*words, student.stop_id)
    assert [s.rollout.ids for s in samples] == [own, words, own]
    if objective in ("byte", "class"):
        read = [s.teacher_views[0].ids for s in samples]
        assert read[:2] == [(*words, teacher.stop_id), words]


@pytest.mark.parametrize("teachers", [1, 2])
def test_token_by_token_another_stop_is_refused(talkers, tmp_path, teachers):
    other = str(with_other_stop(talkers / "teacher", tmp_path / "teacher"))
    paths = [str(talkers / "teacher"), other][-teachers:]
    over = {"teacher": {"path": paths[0]}, "distill": {"more_teachers": paths[1:]}}
    with pytest.raises(ValueError, match="would learn to write .*, and to go on: it stops at"):
        run_here(config(talkers, tmp_path / "run", "distill", **over))


@pytest.mark.parametrize("objective", ["byte", "class", "span", "policy_gradient"])
def test_a_text_that_the_teacher_has_no_positions_for_is_unaligned(talkers, objective):
    """Read beyond them it would end the run, or teach what the teacher never learned."""
    student, teacher = (Chat(str(talkers / name)) for name in ("policy", "proxy"))
    prompt = Prompt(0, ({"role": "user", "content": "q"},))
    rollouts = [
        Rollout(
            prompt, student.prompt_ids(prompt.messages), ids, (0.0,) * len(ids), 0.0, text, True
        )
        for text in ("1+2", "1+2 is => 3")
        for ids in [(*student.encode(text), student.stop_id)]
    ]
    other = SimpleNamespace(chat=teacher, shares_ids=False, kept_rows=lambda rollout: None)
    other.score_texts = lambda jobs, spaces=None: [
        TextScore(np.zeros(len(ids)), 0.0, None) for _, ids in jobs
    ]
    targets = Targets(SimpleNamespace(objective=objective), student, [other])
    needed = len(teacher.prompt_ids(prompt.messages)) + len(teacher.encode(rollouts[1].text))
    for room, left in ((needed, 2), (needed - 1, 1)):
        teacher.positions, sums = room, MetricSums()
        samples = targets.samples([Text(r, "student") for r in rollouts], sums)
        assert [s.rollout.text for s in samples] == [r.text for r in rollouts][:left]
        assert sums.sums["unaligned"] == [2.0 - left, 2.0] and targets.too_long[0] == 2 - left
    engine = SimpleNamespace(sum=float)
    spec = SimpleNamespace(objective=objective)
    phase = SimpleNamespace(spec=spec, engine=engine, teachers=[other], targets=targets)
    DistillPhase._check_room(phase, 2)  # half of the texts
    with pytest.raises(
        ValueError, match=f"100% of the texts .* than the {needed - 1} positions of"
    ):
        DistillPhase._check_room(phase, 1)


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
            distill={"objective": "span", "allow_biased": True, **options},
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
            distill={"objective": "class", "allow_biased": True} | options | texts,
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
    options |= {"allow_biased": True}  # with one vocabulary it is not
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
    for token, classes in zip(*(run.steps for run in runs)):
        assert classes["aligned_positions"] == 1 and all(
            classes[key] == pytest.approx(token[key], rel=1e-3) for key in KL_KEYS
        )


def test_another_vocabulary_is_refused_with_the_way_out(talkers, tmp_path):
    with pytest.raises(ValueError, match="different vocabularies.*'byte'"):
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
