"""The two copies against the derivative that they stand for, by autograd in float64."""

import json

import pytest
import torch
from runs import write_data

from reflux.trainer.data.chat import Chat
from reflux.trainer.studies.antidistillation import loss_gradient, main, move
from reflux.trainer.studies.worked_answers import batches, load_answers, load_model


def directional_derivatives(model, gradient, ids, tokens):
    """<g, grad log p(token | ids)> of each token, by autograd."""
    found = []
    for token in tokens:
        model.zero_grad()
        model(torch.tensor([ids])).logits[0, -1].log_softmax(0)[token].backward()
        parts = [(gradient[n] * p.grad).sum() for n, p in model.named_parameters() if n in gradient]
        found.append(float(sum(parts)))
    return torch.tensor(found, dtype=torch.float64)


def test_the_difference_of_the_copies_is_the_derivative_along_the_gradient(talkers, tmp_path):
    """Central differences: the error falls ninefold with epsilon / 3, above what the norms, which
    compute in float32 whatever the model, leave.
    """
    source = str(talkers / "policy")
    model = load_model(source).double()
    answers = load_answers(write_data(tmp_path), Chat(source), limit=6)
    _, gradient = loss_gradient(model, answers)
    ids, tokens = answers[0].prompt_ids + answers[0].response_ids[:2], list(range(0, 200, 17))
    want = directional_derivatives(model, gradient, ids, tokens)
    errors = []
    for epsilon in (3e-2, 1e-2):
        logp = []
        for step in (epsilon, -2 * epsilon):
            move(model, gradient, step)
            with torch.no_grad():
                logp.append(model(torch.tensor([ids])).logits[0, -1].log_softmax(0)[tokens])
        move(model, gradient, epsilon)  # back
        errors.append(float(((logp[0] - logp[1]) / (2 * epsilon) - want).abs().max()))
    assert want.abs().max() > 1e-2 and errors[1] < 2e-3 * float(want.abs().max())
    assert errors[1] < errors[0] / 5


def test_a_step_on_a_token_changes_the_loss_by_that_derivative(talkers, tmp_path):
    """What the penalty is for: ascending log p of a token by a small step moves the downstream loss
    by step times the derivative.
    """
    source = str(talkers / "policy")
    model = load_model(source).double()
    answers = load_answers(write_data(tmp_path), Chat(source), limit=6)
    _, gradient = loss_gradient(model, answers)
    ids, token = answers[0].prompt_ids, answers[0].response_ids[0]
    want = float(directional_derivatives(model, gradient, ids, [token]))
    learned = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    losses = []
    for step in (1e-3, -2e-3):
        move(model, learned, step)
        losses.append(loss_gradient(model, answers)[0])
    assert (losses[0] - losses[1]) / 2e-3 == pytest.approx(want, rel=2e-2)


def test_the_loss_is_the_mean_over_response_tokens(talkers, tmp_path, monkeypatch):
    source = str(talkers / "policy")
    model = load_model(source).double()
    answers = load_answers(write_data(tmp_path), Chat(source), limit=9)
    whole, gradient = loss_gradient(model, answers)
    with torch.no_grad():
        (batch,) = batches(answers, 9)
        logp_TV = batch.logits_of(model).log_softmax(1)
        assert whole == pytest.approx(
            -float(logp_TV.gather(1, batch.target_T[:, None]).mean()), rel=1e-9
        )
    monkeypatch.setattr("reflux.trainer.studies.antidistillation.ROWS", 2)
    parts, same = loss_gradient(model, answers)
    assert parts == pytest.approx(whole, rel=1e-9)
    assert all(torch.allclose(gradient[n], same[n], atol=1e-9) for n in gradient)


def test_the_program_writes_both_copies(talkers, tmp_path, capsys):
    source, data = str(talkers / "policy"), str(write_data(tmp_path))
    out = tmp_path / "copies"
    sets = ["--proxy", source, "--data", data, "--out", str(out), "--epsilon", "0.5"]
    assert main(sets) == 0
    about = json.loads((out / "antidistillation.json").read_text())
    assert about["epsilon"] == 0.5 and about["rows"] == 24 and about["gradient_norm"] > 0
    start, plus, minus = (
        load_model(p).state_dict() for p in (source, str(out / "plus"), str(out / "minus"))
    )
    for name in start:
        torch.testing.assert_close((plus[name] + minus[name]) / 2, start[name], atol=1e-5, rtol=0)
    assert any(not torch.equal(plus[n], start[n]) for n in start)
    (tmp_path / "other.jsonl").write_text(json.dumps({"question": "x"}) + "\n")
    for file, words in (
        ("other.jsonl", "want prompt and response"),
        ("none.jsonl", "No such file"),
    ):
        with pytest.raises(SystemExit):
            main([*sets[:3], str(tmp_path / file), *sets[4:]])
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*sets[:-1], "0"])
