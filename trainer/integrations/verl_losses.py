"""verl 0.9.1 with our losses in the place of its own, on its FSDP strategies.

    export VERL_USE_EXTERNAL_MODULES=reflux.trainer.integrations.verl_plugin
    python -m verl.trainer.main_ppo distillation.distillation_loss.loss_mode=reflux_reverse_topk ...

Loss modes `reflux_forward_topk`, `reflux_reverse_topk` and `reflux_jsd_topk` (beta 0.5): the
divergence of student and teacher over the teacher's K tokens and a last class for all others, whose
mass is 1 - sum of the teacher's K probabilities, 2^-23 at least. 0 <= loss <= the divergence over
the whole vocabulary, equal at K = V.

verl's `forward_kl_topk` is the sum over the K tokens alone, which can be negative and is cut at 0,
where its gradient is 0 too; `log_prob_min_clamp` stops its gradient for tokens that the student
has made unlikely. Neither is here: the bound is the tail's.

FusedLinear stands in the place of verl's FusedLinearForPPO (`use_fused_kernels`, `impl_backend:
torch`): the same log-probabilities and entropies of hidden states, but logits are not rounded to
16 bits and dW is summed in float32.

Shapes: T tokens of a micro batch, K top-k ids, V vocabulary, D hidden.
"""

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from reflux.kernels.linear_logprob import linear_logprob
from reflux.kernels.teacher_topk import tail_of_rounded
from reflux.kernels.token_logprob import token_logprob
from reflux.kernels.topk_tail_kl import topk_tail_kl

VERSION = "0.9.1"  # whose private names these are
DIVERGENCES = {
    "reflux_forward_topk": "forward",
    "reflux_reverse_topk": "reverse",
    "reflux_jsd_topk": "jsd",
}
STRATEGIES = "fsdp", "fsdp2", "veomni"
LOSSES = "reflux_losses"  # verl's own key is left out: whoever finds that one did not run this loss
NO_DISTRIBUTION = 1 + 1e-3  # verl fills rows that are not scored with K log-probabilities of 0


class TopKLoss(torch.autograd.Function):
    """Divergence [T] of logits [T, V] from ids and log-probabilities [T, K] of the teacher.

    The gradient is made in the forward: verl's log-probabilities may overwrite the logits in their
    own backward, which comes first.
    """

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, ids_TK: Tensor, logq_TK: Tensor, divergence: str):
        mass_T = logq_TK.double().exp().sum(1)
        ids_TK = torch.where((mass_T <= NO_DISTRIBUTION)[:, None], ids_TK, -1)
        with torch.enable_grad():
            leaf_TV = logits_TV.detach().requires_grad_(ctx.needs_input_grad[0])
            out = topk_tail_kl(
                leaf_TV,
                ids_TK,
                logq_TK.float(),
                tail_of_rounded(logq_TK).float(),
                divergence=divergence,
            )
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(*torch.autograd.grad(out.total, leaf_TV))
        return out.kl.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g_T: Tensor):
        (d_TV,) = ctx.saved_tensors
        # in float32, though both may be 16 bits: g is 1 / tokens, whose rounding is a factor
        return torch.mul(d_TV, g_T.float()[:, None], out=torch.empty_like(d_TV)), None, None, None


def topk_outputs(
    logits_TV: Tensor, ids_TK: Tensor, logq_TK: Tensor, divergence: str
) -> dict[str, Tensor]:
    """The losses [T] and what verl logs beside them, each [T]: masses in the teacher's top-k, how
    many of it are in the student's, and the mean over these of q (log p - log q).
    """
    losses_T = TopKLoss.apply(logits_TV, ids_TK, logq_TK, divergence)
    with torch.no_grad():
        logp_TK = token_logprob(logits_TV, ids_TK).logp
        own_TK = logits_TV.topk(ids_TK.shape[1], dim=1).indices
        shared_TK = (ids_TK[:, :, None] == own_TK[:, None]).any(2)
        count_T = shared_TK.sum(1)
        advantage_TK = logq_TK.exp() * (logp_TK - logq_TK) * shared_TK
        return {
            LOSSES: losses_T,
            "student_mass": logp_TK.exp().sum(1),
            "teacher_mass": logq_TK.exp().sum(1),
            "overlap_count": count_T,
            "overlap_token_advantage": advantage_TK.sum(1) / count_T.clamp(min=1),
        }


def processed_logits(
    config: Any, distillation_config: Any, data: Any, student_logits: Tensor, data_format: str
) -> dict[str, Tensor]:
    """What verl's engine asks of logits [1, T, V]; each result [1, T]. ValueError: an option that
    this loss would not obey.
    """
    from verl.utils import ulysses

    options = distillation_config.distillation_loss
    _check(config.strategy, options)
    teacher = [data[key].values()[None] for key in ("teacher_ids", "teacher_logprobs")]
    if ulysses.get_ulysses_sequence_parallel_world_size() > 1:
        teacher = [ulysses.slice_input_tensor(x, dim=1) for x in teacher]
    ids_TK, logq_TK = (x[0] for x in teacher)
    outputs = topk_outputs(student_logits[0], ids_TK, logq_TK, DIVERGENCES[options.loss_mode])
    return {name: value[None] for name, value in outputs.items()}


def _check(strategy: str, options: Any) -> None:
    mode, clamp = options.loss_mode, options.log_prob_min_clamp
    if strategy not in STRATEGIES:
        raise ValueError(
            f"loss_mode {mode} with strategy {strategy!r}; want one of {STRATEGIES}: on others the "
            "logits are cut by vocabulary. Take verl's forward_kl_topk there"
        )
    if options.use_policy_gradient:
        raise ValueError(
            f"loss_mode {mode} with use_policy_gradient: an advantage that does not depend on the "
            "sampled token has an expected gradient of 0. Set use_policy_gradient=false"
        )
    if clamp is not None:
        raise ValueError(
            f"loss_mode {mode} with log_prob_min_clamp = {clamp}: a clamp stops the gradient of "
            "what the student has made unlikely, and the tail bounds the loss. Set it to null"
        )


def losses_of_responses(
    config: Any, distillation_config: Any, model_output: dict[str, Tensor], data: Any
) -> tuple[Tensor, dict[str, Any]]:
    """(losses [batch, response], verl's metrics), as verl's registry calls it. ValueError: the
    engine made no logits, or did not pass them on.
    """
    from verl.trainer.distillation import losses
    from verl.workers.utils.padding import no_padding_2_padding

    if LOSSES not in model_output:
        raise ValueError(
            f"loss_mode {distillation_config.distillation_loss.loss_mode} was not computed where "
            "the logits are: want use_fused_kernels=false, and reflux.trainer.integrations."
            "verl_plugin in VERL_USE_EXTERNAL_MODULES of the workers, too"
        )
    as_theirs = model_output | {"distillation_losses": model_output[LOSSES]}
    _, metrics = losses.compute_forward_kl_topk(config, distillation_config, as_theirs, data)
    return no_padding_2_padding(model_output[LOSSES], data), metrics


class FusedLinear(nn.Module):
    """(log-probability of input_ids, entropy), both float32 and of input_ids' shape, from hidden
    states [..., D] and the head [V, D]; in nats, at `temperature`.
    """

    def forward(
        self,
        hidden_states: Tensor,
        vocab_weights: Tensor,
        input_ids: Tensor,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        out = linear_logprob(
            hidden_states.flatten(0, -2),
            vocab_weights,
            input_ids.flatten(),
            temperature=float(temperature),
            entropy=True,
        )
        assert out.entropy is not None
        return out.logp.view(input_ids.shape), out.entropy.view(input_ids.shape)


def _module(name: str, *wanted: str) -> Any:
    """A module of verl's. ValueError: it has other names, as in another version."""
    import verl

    module = importlib.import_module(name)
    missing = [each for each in wanted if not hasattr(module, each)]
    if missing:
        raise ValueError(
            f"verl {verl.__version__} has no {name}.{missing[0]}; want verl {VERSION}, whose "
            "workers call it"
        )
    return module


def register_distillation_losses() -> None:
    """The loss modes, in every process that calls this once."""
    name = "verl.trainer.distillation.losses"
    losses = _module(name, "compute_topk_loss", "register_distillation_loss")
    if DIVERGENCES.keys() & losses.DISTILLATION_LOSS_REGISTRY.keys():
        return
    settings = losses.DistillationLossSettings(names=list(DIVERGENCES), use_topk=True)
    losses.register_distillation_loss(settings)(losses_of_responses)
    theirs = losses.compute_topk_loss

    def compute_topk_loss(config, distillation_config, *rest: Any, **more: Any) -> Any:
        ours = distillation_config.distillation_loss.loss_mode in DIVERGENCES
        return (processed_logits if ours else theirs)(config, distillation_config, *rest, **more)

    losses.compute_topk_loss = compute_topk_loss


def use_in_fused_kernels() -> None:
    """FusedLinear where verl's models take FusedLinearForPPO; its `liger` backend stays."""
    name = "FusedLinearForPPO"
    place = _module("verl.utils.experimental.torch_functional", name)
    theirs = getattr(place, name)
    if getattr(theirs, "made_by", "") == __name__:
        return

    def fused_linear(chunk_size: int = 512, impl_backend: str = "torch") -> nn.Module:
        return FusedLinear() if impl_backend == "torch" else theirs(chunk_size, impl_backend)

    fused_linear.made_by = __name__  # type: ignore[attr-defined]
    setattr(place, name, fused_linear)
