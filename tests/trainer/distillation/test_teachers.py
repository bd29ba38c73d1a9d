"""Class losses that a pair of vocabularies cannot have; fused ones equal the plain form."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from runs import config
from vocab_pairs import table_of

from reflux.tokenalign.class_losses import class_kl
from reflux.tokenalign.linear_rows import linear_rows
from reflux.trainer.config.distillation import DistillSection
from reflux.trainer.data.chat import Chat
from reflux.trainer.distillation.teachers import (
    ClassLoss,
    _class_loss,
    has_biased_fixed_point,
    load_teachers,
)
from reflux.trainer.losses import HeadInputs


def load(student_pieces, teacher_pieces, **options) -> ClassLoss:
    return _class_loss(
        DistillSection(objective="class", on_policy=0.0, allow_biased=True, **options),
        chat_of(*student_pieces),
        chat_of(*teacher_pieces),
        SimpleNamespace(vocab_size=len(student_pieces) + 2, device="cpu"),
    )


def chat_of(*pieces):
    table = table_of(pieces, controls=2)
    return SimpleNamespace(table=table, stop_ids=(len(pieces),), vocab_size=len(table))


@pytest.mark.parametrize(
    "source",
    [
        {},
        {"source": "server", "servers": ["http://localhost:1"]},
        {"source": "cache", "cache": "no folder: nothing is read before"},
    ],
    ids=["local", "server", "cache"],
)
def test_token_by_token_needs_one_vocabulary_wherever_the_teacher_is(talkers, tmp_path, source):
    """Its ids would mean other words; nothing is loaded, asked or read before."""
    cfg = config(
        talkers,
        tmp_path / "run",
        "distill",
        teacher={"path": str(talkers / "proxy"), **source},
        distill={"on_policy": 0.0, "divergence": "forward", "tail": "bucket", "top_k": 4},
    )
    with pytest.raises(ValueError, match="different vocabularies.*'kl' compares token by token"):
        load_teachers(cfg, None, Chat.of(cfg.model))


def test_a_student_that_merges_is_refused_before_a_teacher_is_loaded(talkers, tmp_path):
    """Both have learned merges: where the student's tokens end depends on what follows."""
    cfg = config(
        talkers,
        tmp_path / "run",
        "distill",
        teacher={"path": str(talkers / "proxy")},
        distill={"objective": "class", "on_policy": 0.0, "divergence": "forward"},
    )
    chat = Chat(str(talkers / "policy"))
    with pytest.raises(
        ValueError, match="different vocabularies.*begins with.*allow_biased = true"
    ):
        load_teachers(cfg, None, chat)
    allowed = replace(cfg.distill, allow_biased=True)
    with pytest.raises(AttributeError):  # it goes on to the engine
        load_teachers(replace(cfg, distill=allowed), None, chat)
    other, same = (SimpleNamespace(shares_ids=same) for same in (False, True))
    assert has_biased_fixed_point(allowed, chat, [same, other])
    assert not has_biased_fixed_point(allowed, chat, [same])
    letters = chat_of(b"a", b"b")
    assert not has_biased_fixed_point(cfg.distill, letters, [other])
    assert has_biased_fixed_point(replace(allowed, divergence="jsd"), letters, [other])
    assert has_biased_fixed_point(replace(allowed, objective="span"), letters, [other])
    assert not has_biased_fixed_point(replace(allowed, objective="nll"), chat, [other])


@pytest.mark.parametrize("partition", ["common", "hybrid"])
def test_a_student_whose_tail_bucket_is_control_ids_is_not_sent_there(partition):
    """The student's tail bucket has only <0> for the teacher's "ab"; with a piece it may."""
    with pytest.raises(
        ValueError,
        match=r"1 tokens that the student lacks, such as b'ab'.*1 control ids.*"
        r"partition = 'prefix'",
    ):
        load([b"a", b"b"], [b"a", b"b", b"ab"], partition=partition)
    for pieces in ([b"a", b"b", b"bb"], [b"a", b"b", b"ab"]):
        assert load(pieces, [b"a", b"b", b"ab"], partition=partition).partition is not None


def test_a_reverse_kl_that_no_student_could_lower_is_refused():
    """The student's "b" is in a class without a teacher id: KL(P || Q) is infinite in every row."""
    with pytest.raises(ValueError, match="student has 1 classes of tokens that the teacher has no"):
        load([b"a", b"b"], [b"a"], partition="first_byte", divergence="reverse")
    assert load([b"a", b"b"], [b"a"], partition="first_byte", divergence="forward").partition


@pytest.mark.parametrize("partition", ["first_byte", "common", "prefix"])
@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 2e-6), (torch.float64, 1e-13)])
def test_the_fused_loss_is_the_plain_one_up_to_rounding(partition, dtype, rounding):
    """Value and gradients of a run, by kernels.bucket_kl and by linear_rows on class_kl."""
    pieces = [bytes([a, b]) for a in b"abcd" for b in b"abcd"] + [bytes([b]) for b in b"abcd"]
    loss = load(
        [*pieces, b"abc"],
        [*pieces[3:], b"dcb"],
        partition=partition,
        divergence="forward",
        temperature=2.0,
        scale_t2=True,
    )
    g = torch.Generator().manual_seed(0)
    student, teacher = (
        HeadInputs(
            torch.randn(40, 8, generator=g, dtype=dtype).requires_grad_(),
            torch.randn(num_ids + 3, 8, generator=g, dtype=dtype).requires_grad_(),
            softcap,
            num_ids,
        )
        for num_ids, softcap in ((len(pieces) + 3, None), (len(pieces), 5.0))
    )
    total, metrics = loss(student, teacher)
    plain = linear_rows(
        partial(class_kl, partition=loss.partition, temperature=2.0), student, teacher
    )
    assert total.item() == pytest.approx(4 * plain.total.item(), rel=rounding)
    assert metrics["kl"].item() == pytest.approx(plain.kl.sum().item(), rel=rounding)
    assert metrics["aligned_positions"] == 40
    leaves = student.hidden_TD, student.head_VD
    for a, b in zip(
        torch.autograd.grad(total, leaves),
        torch.autograd.grad(4 * plain.total, leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=rounding * 10, atol=rounding * 10)
