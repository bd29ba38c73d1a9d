"""The rival's loss by its definition, and what is tuned by it."""

import json

import pytest
import torch
from runs import write_data

from reflux.trainer.data.chat import Chat
from reflux.trainer.studies import doge
from reflux.trainer.studies.doge import DogeSettings, doge_loss, main, only_head, tune
from reflux.trainer.studies.worked_answers import load_answers, load_model


def test_the_loss_by_enumeration():
    """Three tokens of a vocabulary of two, class by class."""
    g = torch.Generator().manual_seed(0)
    t_TV, p_TV = (3 * torch.randn(3, 2, generator=g, dtype=torch.float64) for _ in range(2))
    target = torch.tensor([0, 1, 1])
    nll = kl = 0.0
    for i in range(3):
        plain = t_TV[i].exp() / t_TV[i].exp().sum()
        soft_t, soft_p = ((x[i] / 2).exp() / (x[i] / 2).exp().sum() for x in (t_TV, p_TV))
        nll -= float(plain[target[i]].log()) / 3
        kl += sum(float(soft_t[v] * (soft_t[v].log() - soft_p[v].log())) for v in range(2)) / 3
    loss = doge_loss(t_TV, p_TV, target, weight=0.3, temperature=2.0)
    assert float(loss.nll) == pytest.approx(nll) and float(loss.kl) == pytest.approx(kl)
    assert float(loss.total) == pytest.approx(nll - 0.3 * kl)


def test_the_gradient_is_the_teachers_alone_and_right():
    g = torch.Generator().manual_seed(1)
    t_TV, p_TV = (torch.randn(4, 5, generator=g, dtype=torch.float64) for _ in range(2))
    t_TV, p_TV, target = t_TV.requires_grad_(), p_TV.requires_grad_(), torch.tensor([0, 4, 2, 2])
    doge_loss(t_TV, p_TV, target, 0.7, 1.5).total.backward()
    assert p_TV.grad is None
    assert torch.autograd.gradcheck(
        lambda t: doge_loss(t, p_TV.detach(), target, 0.7, 1.5).total, (t_TV,)
    )


def test_heads_may_be_padded_beyond_the_ids_that_they_share():
    g = torch.Generator().manual_seed(2)
    t_TV, p_TV = (torch.randn(3, V, generator=g, dtype=torch.float64) for V in (5, 7))
    target = torch.tensor([0, 4, 2])
    short = doge_loss(t_TV, p_TV[:, :5], target, 0.3, 2.0)
    assert doge_loss(t_TV, p_TV, target, 0.3, 2.0).total == short.total
    wide = torch.cat([t_TV, torch.full((3, 2), -30.0, dtype=torch.float64)], 1)
    assert float(doge_loss(wide, p_TV[:, :5], target, 0.3, 2.0).total) == pytest.approx(
        float(short.total), abs=1e-9
    )


def test_only_the_head_moves_and_leaves_a_tied_embedding_alone(talkers, tmp_path):
    source = str(talkers / "policy")  # tied
    model, proxy = load_model(source), load_model(str(talkers / "teacher"))
    start = {n: p.detach().clone() for n, p in load_model(source).named_parameters()}
    answers = load_answers(write_data(tmp_path), Chat(source))
    losses = tune(model, proxy, answers, DogeSettings(weight=0.5, steps=9, rows=8, lr=3e-3))
    assert len(losses) == 9 and losses[-1].kl > losses[0].kl
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, start.get(n, p))]
    assert moved == []
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert not torch.equal(head, embedding) and not model.config.tie_word_embeddings


def test_an_untied_head_is_the_one_that_is_trained(talkers):
    model = load_model(str(talkers / "teacher"))
    head = only_head(model)
    assert head is model.get_output_embeddings().weight
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["lm_head.weight"]


def test_with_weight_0_it_learns_the_answers_and_with_more_it_leaves_the_proxy(talkers, tmp_path):
    source = str(talkers / "policy")
    proxy, answers = (
        load_model(str(talkers / "teacher")),
        load_answers(write_data(tmp_path), Chat(source)),
    )
    plain, away = (
        tune(load_model(source), proxy, answers, DogeSettings(weight=w, steps=12, rows=24, lr=3e-3))
        for w in (0.0, 1.0)
    )
    assert plain[-1].nll < plain[0].nll
    assert away[-1].kl > plain[-1].kl and away[-1].nll > plain[-1].nll


def test_the_program_writes_a_teacher(talkers, tmp_path, monkeypatch):
    data, out = str(write_data(tmp_path)), tmp_path / "out"
    roles = ["--teacher", str(talkers / "policy"), "--proxy", str(talkers / "teacher")]
    rest = ["--data", data, "--out", str(out), "--steps", "2"]
    assert main([*roles, *rest]) == 0
    about = json.loads((out / "doge.json").read_text())
    assert about["steps"] == 2 and about["last"]["kl"] > 0
    again = load_model(str(out))
    assert not torch.equal(
        again.get_output_embeddings().weight, again.get_input_embeddings().weight
    )
    with pytest.raises(SystemExit):  # another vocabulary
        main([*roles[:3], str(talkers / "proxy"), *rest])
    with pytest.raises(SystemExit):
        main([*roles, "--data", str(tmp_path / "missing.jsonl"), "--out", str(out)])
    with pytest.raises(ValueError, match="want >= 0"):
        doge.DogeSettings(weight=-1.0)
