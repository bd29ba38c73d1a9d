"""transformers' Trainer (5.17 to 5.23) that distils: `compute_loss` from hidden states, no logits.

    from reflux.trainer.integrations.transformers_trainer import DistillTrainer

    trainer = DistillTrainer(student, arguments, train_dataset=data, teacher=teacher)
    trainer.train()

Alone or under DDP. Under FSDP2 the head must be called inside its module: see docs/kernels.md.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from reflux.kernels.linear_kl import linear_kl

LOGIT_ERROR = 0.03  # relative to the largest logit; bfloat16 keeps 8 bits of each summand


class Distils:
    """What a Trainer needs in front of it to distil: `set_teacher`, and the loss.

    loss = sum over labelled tokens of D(student, teacher) / their number, as Trainer counts it.
    """

    args: Any
    accelerator: Any
    model_accepts_loss_kwargs: bool

    def set_teacher(self, teacher: nn.Module, loss: dict[str, Any] | None = None) -> None:
        """teacher: a frozen causal model with the student's tokenizer, moved to the trainer's
        device. loss: options of `linear_kl`; divergence "reverse" where it names none.
        """
        self.teacher = teacher.to(self.args.device).eval().requires_grad_(False)
        self.loss_options = {"divergence": "reverse"} | (loss or {})
        self._proven = False  # that both models' logits are those of the loss
        # else tokens are counted per micro batch, and one with few of them weighs as one with many
        self.model_accepts_loss_kwargs = True

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        labels = inputs.pop("labels")
        # one row is projected by transformers; with a cache, packed texts would see each other
        inputs |= dict(output_hidden_states=True, logits_to_keep=1, use_cache=False)
        out = model(**inputs)  # through the wrapper: DDP must see a forward
        with torch.no_grad():
            teacher_out = self.teacher(**inputs)
        embeddings: Any = self.accelerator.unwrap_model(model), self.teacher
        x_TD, y_TE = (o.hidden_states[-1][:, :-1].flatten(0, 1) for o in (out, teacher_out))
        head, teacher_head = (m.get_output_embeddings() for m in embeddings)
        options = _logit_options("student", embeddings[0]) | _logit_options("teacher", self.teacher)
        options |= self.loss_options
        if not self._proven:
            _prove("student", out, head, options)
            _prove("teacher", teacher_out, teacher_head, options)
            self._proven = True
        scored_T = (labels[:, 1:] != -100).flatten()
        kl = linear_kl(
            x_TD,
            head.weight,
            y_TE,
            teacher_head.weight,
            weight=scored_T,
            student_bias=head.bias,
            teacher_bias=teacher_head.bias,
            **options,
        )
        loss = kl.total / self._count(scored_T, num_items_in_batch)
        return (loss, out) if return_outputs else loss

    def _count(self, scored_T: Tensor, num_items_in_batch: Tensor | int | None) -> Any:
        """Tokens that the loss is divided by: of all processes, where Trainer counts them so and
        DDP takes the mean of the gradients.
        """
        if num_items_in_batch is None:
            return scored_T.sum()
        across = self.args.average_tokens_across_devices
        return num_items_in_batch / (self.accelerator.num_processes if across else 1)


class DistillTrainer(Distils, Trainer):
    """A Trainer with a teacher.

    teacher: a frozen causal model with the student's tokenizer, moved to the trainer's device.
    divergence, beta, temperature, scale_t2 and the rest of `loss`: options of `linear_kl`. Soft
    caps and scales of logits are read from the models' configurations. ValueError, at the first
    batch, for a model whose logits are made in another way.
    """

    def __init__(self, *args: Any, teacher: nn.Module, loss: dict[str, Any] | None = None, **more):
        super().__init__(*args, **more)
        self.set_teacher(teacher, loss)


def _logit_options(side: str, model: Any) -> dict[str, Any]:
    """Soft cap (Gemma 2) and scale (Cohere, Granite, Falcon-H1) of a model's logits, as options."""
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None)
    scale = (scale or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return {f"{side}_logit_scale": float(scale), f"{side}_softcap": cap}


@torch.no_grad()
def _prove(side: str, out: Any, head: Any, options: dict[str, Any]) -> None:
    """ValueError unless the model's own logits of the last position are those of the loss."""
    theirs_BV = out.logits[:, -1].float()
    hidden_BD = out.hidden_states[-1][:, -1].float()
    bias = None if head.bias is None else head.bias.float()
    scale, cap = options[f"{side}_logit_scale"], options[f"{side}_softcap"]
    ours_BV = scale * nn.functional.linear(hidden_BD, head.weight.float(), bias)
    ours_BV = ours_BV if cap is None else cap * torch.tanh(ours_BV / cap)
    gap, size = float((ours_BV - theirs_BV).abs().max()), float(theirs_BV.abs().max())
    if not gap <= LOGIT_ERROR * max(size, 1.0):
        raise ValueError(
            f"the {side}'s logits are not those of its last hidden states and head: {gap:.3g} "
            f"apart, of {size:.3g} at most. Give {side}_logit_scale or {side}_softcap in `loss`, "
            "or distil it in a run of its own (docs/models.md)"
        )
