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


class DistillTrainer(Trainer):
    """loss = sum over labelled tokens of D(student, teacher) / their number, as Trainer counts it.

    teacher: a frozen causal model with the student's tokenizer, moved to the trainer's device.
    divergence, beta, temperature, scale_t2 and the rest of `loss`: options of `linear_kl`.
    """

    def __init__(self, *args: Any, teacher: nn.Module, loss: dict[str, Any] | None = None, **more):
        super().__init__(*args, **more)
        self.teacher = teacher.to(self.args.device).eval().requires_grad_(False)
        self.loss_options = {"divergence": "reverse"} | (loss or {})

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        labels = inputs.pop("labels")
        # the last row only is projected by transformers
        inputs |= dict(output_hidden_states=True, logits_to_keep=1)
        out = model(**inputs)  # through the wrapper: DDP must see a forward
        with torch.no_grad():
            teacher_out = self.teacher(**inputs)
        embeddings: Any = self.accelerator.unwrap_model(model), self.teacher
        x_TD, y_TE = (o.hidden_states[-1][:, :-1].flatten(0, 1) for o in (out, teacher_out))
        head, teacher_head = (m.get_output_embeddings() for m in embeddings)
        scored_T = (labels[:, 1:] != -100).flatten()
        kl = linear_kl(
            x_TD,
            head.weight,
            y_TE,
            teacher_head.weight,
            weight=scored_T,
            student_bias=head.bias,
            teacher_bias=teacher_head.bias,
            **self.loss_options,
        )
        count: Any = scored_T.sum()
        if num_items_in_batch is not None:
            count = num_items_in_batch / self.accelerator.num_processes
        loss = kl.total / count
        return (loss, out) if return_outputs else loss
