"""What stands in verl's place computes what verl computes, but for the tail and the rounding.

`make test-integrations` brings verl. V 30, K 6, D 16; 2 texts of 7 and 5 tokens.
"""

import importlib
import os
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from reflux.kernels.token_kl import token_kl
from reflux.trainer.integrations import verl_losses
from reflux.trainer.integrations.verl_losses import DIVERGENCES, LOSSES, FusedLinear, topk_outputs

V, K, T = 30, 6, 12
needs_verl = pytest.mark.skipif(
    os.environ.get("REFLUX_INTEGRATIONS") != "verl", reason="make test-integrations installs verl"
)


def logits(seed: int, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(T, V, generator=torch.Generator().manual_seed(seed))


def topk(logits_TV: torch.Tensor, k: int = K) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, log-probabilities), as a server of verl's answers."""
    logq_TK, ids_TK = logits_TV.log_softmax(1).topk(k, dim=1)
    return ids_TK, logq_TK


def with_tail(logits_TV: torch.Tensor, ids_TK: torch.Tensor, logq_TK: torch.Tensor):
    """log of K + 1 classes of both models in float64, by their definition."""
    logp_TV = logits_TV.double().log_softmax(1)
    rest_TV = torch.ones_like(logp_TV, dtype=torch.bool).scatter(1, ids_TK, False)
    tail_T1 = logp_TV.masked_fill(~rest_TV, -torch.inf).logsumexp(1, keepdim=True)
    own_TK = logp_TV.gather(1, ids_TK)
    tail_q_T1 = torch.log1p(-logq_TK.double().exp().sum(1, keepdim=True))
    return torch.cat([own_TK, tail_T1], 1), torch.cat([logq_TK.double(), tail_q_T1], 1)


def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.exp() * (a - b)).sum(1)


@pytest.mark.parametrize("divergence", DIVERGENCES.values())
def test_losses_and_gradients_are_those_of_k_plus_1_classes(divergence):
    (ids, logq), x = topk(logits(1)), logits(0).requires_grad_()
    upstream = torch.linspace(0, 1, T)
    out = topk_outputs(x, ids, logq, divergence)
    (got,) = torch.autograd.grad(out[LOSSES], x, upstream)
    y = x.detach().double().requires_grad_()
    p, q = with_tail(y, ids, logq)
    middle = ((p.exp() + q.exp()) / 2).log()
    want = {"forward": kl(q, p), "reverse": kl(p, q), "jsd": (kl(p, middle) + kl(q, middle)) / 2}
    torch.testing.assert_close(out[LOSSES].double(), want[divergence], atol=1e-5, rtol=1e-5)
    (grad,) = torch.autograd.grad(want[divergence], y, upstream.double())
    torch.testing.assert_close(got.double(), grad, atol=1e-6, rtol=1e-5)


def test_rows_that_verl_fills_up_and_teachers_that_are_certain_stay_finite():
    ids, logq = topk(logits(1))
    ids[3], logq[3] = 0, 0.0  # the last position of a text, and padding
    logq[4] = torch.tensor([0.0] + [-torch.inf] * (K - 1))
    x = logits(0).requires_grad_()
    out = topk_outputs(x, ids.int(), logq, "reverse")
    assert out[LOSSES][3] == 0 and out[LOSSES].isfinite().all() and out[LOSSES][4] > 1
    (grad,) = torch.autograd.grad(out[LOSSES].sum(), x)
    assert not grad[3].any() and grad[4].any() and grad.isfinite().all()


def test_logits_overwritten_before_the_backward_change_nothing():
    """verl's log-probabilities write their gradient into the logits (`inplace_backward`)."""
    ids, logq = topk(logits(1))
    grads = []
    for overwrite in (False, True):
        x = logits(0).requires_grad_()
        losses = topk_outputs(x, ids, logq, "forward")[LOSSES]
        if overwrite:
            x.data.fill_(3.0)
        grads += torch.autograd.grad(losses.sum(), x)
    assert torch.equal(*grads) and grads[0].any()


def test_an_upstream_gradient_is_not_rounded_to_the_logits_dtype():
    (ids, logq), x = topk(logits(1)), logits(0).bfloat16().requires_grad_()
    losses = topk_outputs(x, ids, logq, "forward")[LOSSES]
    (whole,) = torch.autograd.grad(losses, x, torch.ones(T), retain_graph=True)
    (part,) = torch.autograd.grad(losses, x, torch.full((T,), 1 / 510))
    torch.testing.assert_close(part, (whole.double() / 510).bfloat16(), rtol=0, atol=0)
    rounded = whole * torch.tensor(1 / 510).bfloat16()  # off by 0.004
    assert (part != rounded).float().mean() > 0.3
    with torch.no_grad():
        assert torch.equal(topk_outputs(x, ids, logq, "forward")[LOSSES], losses)


def test_fused_linear_is_the_log_softmax_of_its_logits():
    g = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(2, 6, 8, generator=g), torch.randn(V, 8, generator=g)
    ids = torch.randint(V, (2, 6), generator=g)
    logp, entropy = FusedLinear()(hidden, head, ids, temperature=0.7)
    want = (hidden @ head.t() / 0.7).log_softmax(2)
    torch.testing.assert_close(logp, want.gather(2, ids[..., None])[..., 0])
    torch.testing.assert_close(entropy, -(want.exp() * want).sum(2))


# against verl


@pytest.fixture
def losses():
    """verl's module with our modes in it."""
    verl_losses.register_distillation_losses()
    verl_losses.register_distillation_losses()  # a second plugin of the process changes nothing
    return importlib.import_module("verl.trainer.distillation.losses")


def actor(strategy: str = "fsdp"):
    from verl.workers.config import ActorConfig

    return ActorConfig(strategy=strategy, rollout_n=1, ppo_micro_batch_size_per_gpu=1)


def options(mode: str, k: int = K, **more):
    from verl.workers.config import DistillationConfig, DistillationLossConfig

    plain = dict(log_prob_min_clamp=None, loss_max_clamp=None, use_policy_gradient=False)
    chosen = plain | dict(use_task_rewards=False, topk=k) | more
    return DistillationConfig(distillation_loss=DistillationLossConfig(loss_mode=mode, **chosen))


def micro_batch(ids_TK: torch.Tensor, logq_TK: torch.Tensor):
    """Texts of 7 and 5 tokens, the last 4 and 3 of which are responses."""
    from tensordict import TensorDict
    from verl.utils import tensordict_utils

    def nested(*parts):
        return torch.nested.as_nested_tensor(list(parts), layout=torch.jagged)

    texts = torch.arange(12).split([7, 5])
    data = TensorDict(
        {
            "input_ids": nested(*texts),
            "prompts": nested(texts[0][:3], texts[1][:2]),
            "responses": nested(texts[0][3:], texts[1][2:]),
            "response_mask": nested(torch.tensor([1, 1, 0, 1]), torch.ones(3, dtype=torch.long)),
            "teacher_ids": nested(*ids_TK.split([7, 5])),
            "teacher_logprobs": nested(*logq_TK.split([7, 5])),
        },
        batch_size=2,
    )
    more = dict(dp_size=1, batch_num_tokens=6, global_batch_size=2)
    flags = dict(distillation_use_topk=True, distillation_only=True)
    tensordict_utils.assign_non_tensor(data, **more, **flags)
    return data


def through_the_engine(losses, config, ids_TK, logq_TK, x, strategy="fsdp"):
    """(loss, metrics, gradient in the logits), by the code of verl's FSDP engine and trainer."""
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead as Engine

    data, loss_fn = (
        micro_batch(ids_TK, logq_TK),
        partial(losses.distillation_ppo_loss, actor(strategy), config),
    )
    x = x.clone().requires_grad_()
    output_args = {
        "input_ids_rmpad_rolled": torch.zeros(T, dtype=torch.long),
        "temperature_rmpad": torch.ones(T),
        "pad_size": 0,
    }
    engine = SimpleNamespace(_gather_and_unpad_packed=lambda values, pad_size: values)
    model = SimpleNamespace(logits=1.0 * x[None])
    output = Engine.prepare_model_outputs(
        engine, model, output_args, data, partial(loss_fn, data_format="thd", model_output=None)
    )
    loss, metrics = loss_fn(model_output=output, data=data)
    return loss.detach(), metrics, *torch.autograd.grad(loss, x)


def plain(metrics: dict) -> dict:
    return {name: torch.as_tensor(getattr(m, "values", m)).float() for name, m in metrics.items()}


@needs_verl
def test_with_the_whole_vocabulary_it_is_verls_loss(losses):
    (ids, logq), x = topk(logits(1), V), logits(0)
    want = through_the_engine(losses, options("forward_kl_topk", V), ids, logq, x)
    got = through_the_engine(losses, options("reflux_forward_topk", V), ids, logq, x)
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(plain(got[1]), plain(want[1]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got[2], want[2], atol=1e-6, rtol=1e-5)
    assert want[2].any() and want[0] > 0.1


@needs_verl
def test_of_k_tokens_it_is_verls_loss_and_the_tails_term(losses):
    (ids, logq), x = topk(logits(1)), logits(0)
    want = through_the_engine(losses, options("forward_kl_topk"), ids, logq, x)
    got = through_the_engine(losses, options("reflux_forward_topk"), ids, logq, x)
    for name in want[1].keys() - {"distillation/loss", "distillation/loss_min"}:
        if "loss" not in name:
            torch.testing.assert_close(plain(got[1])[name], plain(want[1])[name])
    y = x.double().requires_grad_()
    p, q = with_tail(y, ids, logq)
    mine = torch.zeros(T, dtype=torch.bool)
    mine[[2, 3, 5, 8, 9, 10]] = True  # the position before each scored token
    tail = (q[:, -1].exp() * (q - p)[:, -1])[mine].sum() / 6
    raw = kl(q, p)[mine].sum() / 6
    torch.testing.assert_close(got[0].double(), raw)
    in_support = (q.exp() * (q - p))[:, :-1].sum(1)[mine]
    torch.testing.assert_close(want[0].double(), in_support.clamp(min=0).sum() / 6)
    torch.testing.assert_close(raw - tail, in_support.sum() / 6)
    (grad,) = torch.autograd.grad(raw, y)
    torch.testing.assert_close(got[2].double(), grad, atol=1e-6, rtol=1e-5)


@needs_verl
def test_where_verl_stops_teaching_it_goes_on(losses):
    """A student that puts too much on the teacher's tokens, and one that has left them."""
    ids, logq = topk(logits(1))
    above = logits(1).scatter_add(1, ids, torch.full((T, K), 8.0))
    below = logits(1).scatter_add(1, ids, torch.full((T, K), -30.0))
    loss, _, grad = through_the_engine(losses, options("forward_kl_topk"), ids, logq, above)
    assert loss == 0 and not grad.any()  # the sum is negative, and cut
    loss, _, grad = through_the_engine(losses, options("reflux_forward_topk"), ids, logq, above)
    assert loss > 0.1 and (grad.gather(1, ids).sum(1)[[2, 3, 5, 8, 9, 10]] > 0).all()
    clamped = options("forward_kl_topk", log_prob_min_clamp=-10.0)
    loss, _, grad = through_the_engine(losses, clamped, ids, logq, below)
    assert loss > 1 and not grad.any()  # every log-probability is below the clamp
    loss, _, grad = through_the_engine(losses, options("reflux_forward_topk"), ids, logq, below)
    assert loss > 1 and (grad.gather(1, ids).sum(1)[[2, 3, 5, 8, 9, 10]] < 0).all()


@needs_verl
def test_modes_differ_and_a_mode_of_verls_stays_verls(losses):
    (ids, logq), x = topk(logits(1)), logits(0)
    got = {m: through_the_engine(losses, options(m), ids, logq, x)[0] for m in DIVERGENCES}
    assert len({float(x) for x in got.values()}) == 3
    same = through_the_engine(losses, options("reflux_jsd_topk"), *topk(x), x)
    assert abs(same[0]) < 1e-6 and same[2].abs().max() < 1e-6
    capped = options("reflux_forward_topk", loss_max_clamp=0.01)
    assert through_the_engine(losses, capped, ids, logq, x)[0] <= 0.01
    whole = token_kl(x, logits(1), divergence="reverse", weight=torch.zeros(T))
    assert (topk_outputs(x, ids, logq, "reverse")[LOSSES] <= whole.kl + 1e-5).all()


@needs_verl
def test_options_that_it_would_not_obey_are_refused(losses):
    (ids, logq), x = topk(logits(1)), logits(0)
    mode = "reflux_reverse_topk"
    for more, message in (
        (dict(use_policy_gradient=True), "expected gradient of 0"),
        (dict(log_prob_min_clamp=-10.0), "Set it to null"),
    ):
        with pytest.raises(ValueError, match=message):
            through_the_engine(losses, options(mode, **more), ids, logq, x)
    with pytest.raises(ValueError, match="Take verl's forward_kl_topk there"):
        through_the_engine(losses, options(mode), ids, logq, x, strategy="megatron")
    theirs = {"distillation_losses": torch.zeros(T)}  # by a fused kernel of VeOmni's
    with pytest.raises(ValueError, match="want use_fused_kernels=false"):
        losses.distillation_loss(actor(), options(mode), theirs, micro_batch(ids, logq))


@pytest.fixture
def theirs(monkeypatch):
    """verl's FusedLinearForPPO; ours is in its place, and theirs again afterwards."""
    place = importlib.import_module("verl.utils.experimental.torch_functional")
    found = place.FusedLinearForPPO
    monkeypatch.setattr(place, "FusedLinearForPPO", found)
    verl_losses.use_in_fused_kernels()
    verl_losses.use_in_fused_kernels()
    assert isinstance(place.FusedLinearForPPO(impl_backend="torch"), FusedLinear)
    assert isinstance(place.FusedLinearForPPO(impl_backend="liger"), found)
    return found


def graded(module, hidden, head, ids, **more):
    """(log-probabilities, entropies, gradients) of a sum with weights on both."""
    hidden, head = (x.clone().requires_grad_() for x in (hidden, head))
    logp, entropy = module(hidden, head, ids, **more)
    weight = torch.linspace(-1, 1, ids.numel()).view(ids.shape)
    total = (weight * logp).sum() + (0.3 * weight * entropy).sum()
    return logp.detach(), entropy.detach(), *torch.autograd.grad(total, (hidden, head))


def operands(shape, dtype=torch.float32):
    g = torch.Generator().manual_seed(3)
    hidden, head = torch.randn(*shape, 16, generator=g), torch.randn(V, 16, generator=g)
    return hidden.to(dtype), head.to(dtype), torch.randint(V, shape, generator=g)


@needs_verl
@pytest.mark.parametrize("shape", [(12,), (2, 6)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_fused_linear_is_verls(theirs, shape, temperature):
    args = operands(shape)
    want = graded(theirs(chunk_size=5), *args, temperature=temperature)
    got = graded(FusedLinear(), *args, temperature=temperature)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@needs_verl
def test_in_bfloat16_it_is_nearer_to_float64_than_verls_and_its_entropy_is_float32(theirs):
    args = operands((512,), torch.bfloat16)
    want = graded(theirs(), *(x.double() if x.is_floating_point() else x for x in args))
    far, near = graded(theirs(), *args), graded(FusedLinear(), *args)
    assert far[1].dtype == torch.bfloat16 and near[1].dtype == torch.float32
    for name, a, b, c in zip(("logp", "entropy", "dX", "dW"), near, far, want, strict=True):
        ours, verls = ((x.double() - c.double()).norm() for x in (a, b))
        assert ours < 0.8 * verls, f"{name}: {ours} is not below {verls}"


@needs_verl
def test_a_model_of_verls_calls_it(theirs):
    from transformers import LlamaConfig, LlamaForCausalLM
    from verl.models.transformers.monkey_patch import patch_forward_with_backends

    torch.manual_seed(0)
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)

    class Patched(LlamaForCausalLM):  # verl patches the class
        pass

    model = Patched(LlamaConfig(vocab_size=V, **small))
    ids = torch.arange(12).view(2, 6)
    want = (model(ids).logits / 0.8).log_softmax(2)
    patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend="torch")
    out = model(ids, temperature=0.8, return_dict=True)
    following = ids.roll(-1, 1)[..., None]
    torch.testing.assert_close(out.log_probs, want.gather(2, following)[..., 0])
    torch.testing.assert_close(out.entropy, -(want.exp() * want).sum(2))
    assert out.log_probs.requires_grad and out.entropy.dtype == torch.float32


@needs_verl
def test_another_version_is_named(monkeypatch):
    place = importlib.import_module("verl.trainer.distillation.losses")
    monkeypatch.delattr(place, "compute_topk_loss")
    with pytest.raises(ValueError, match="verl 0.9.1 has no .*compute_topk_loss; want verl 0.9.1"):
        verl_losses.register_distillation_losses()
