"""The head as a matrix: the model's own logits and gradients."""

import pytest
import torch
from assets import make_trainer, save_model
from engine_cases import head_product, load_frozen, positions, random_ids, reference_logits

from reflux.trainer.engine.decoding import gathered, kv_decoder
from reflux.trainer.engine.forward import hidden_states
from reflux.trainer.engine.head import head_logits, head_weight


@pytest.mark.parametrize(
    "kind, config",
    [
        ("gemma2", dict(head_dim=16, final_logit_softcapping=3.0, sliding_window=8)),
        ("cohere", dict(logit_scale=0.25, head_dim=16)),
        ("granite", dict(logits_scaling=4.0)),
    ],
)
def test_cap_and_scale_of_the_logits_are_known_outside_the_model(host, tmp_path, kind, config):
    save_model(tmp_path, kind, **config)
    frozen = load_frozen(host, tmp_path)
    ids_NL = random_ids(2, 12)
    hidden_NLD = frozen.hidden(ids_NL, positions(12, rows=2))
    want_NLV = reference_logits(tmp_path, ids_NL)
    assert (head_product(frozen.model, hidden_NLD) - want_NLV).abs().max() <= 1e-5
    with frozen.open_head() as head_VD:
        bare = hidden_NLD @ head_VD.T
    assert (bare - want_NLV).abs().max() > 0.1, "cap or scale changed nothing: the test is blind"


@pytest.mark.parametrize(
    "name, backend", [("qwen3", "native"), ("qwen3_tied", "native"), ("qwen3_tied", "hf")]
)
def test_gradients_through_the_head_matrix_are_those_of_the_head_module(
    assets, host, tmp_path, name, backend
):
    trainer = make_trainer(assets / name, tmp_path, backend=backend)
    model, ids_NL, positions_NL = trainer.model_parts[0], random_ids(2, 16), positions(16, rows=2)

    def gradients(matrix: bool):
        trainer.optimizers.zero_grad()
        hidden_NLD = hidden_states(model, ids_NL, positions_NL)
        logits = hidden_NLD @ head_weight(model).T if matrix else head_logits(model, hidden_NLD)
        torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), ids_NL[:, 1:].flatten()
        ).backward()
        return {key: weight.grad.full_tensor().clone() for key, weight in model.named_parameters()}

    want, got = gradients(False), gradients(True)
    assert got.keys() == want.keys() and len(got) > 20
    for key in want:
        assert torch.allclose(got[key], want[key], atol=1e-6, rtol=1e-5), key
    # decoding between two steps leaves training alone
    with gathered(model), kv_decoder(model) as step:
        step(ids_NL, positions_NL, torch.ones(2, 16, dtype=torch.bool), True)
        assert not model.training
    again = gradients(True)
    assert model.training and all(torch.equal(again[key], got[key]) for key in got)
    trainer.close()
