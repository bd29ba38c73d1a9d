"""torchtitan 0.3.0: a head and a loss in the place of ChunkedLossWrapper's, without logits.

    from reflux.trainer.integrations.torchtitan_loss import DistillHead, DistillLoss

    model config: lm_head=DistillHead.Config(...)      trainer config: loss=DistillLoss.Config(...)

Without tensor parallelism. torchtitan's Trainer passes `positions` to the loss and nothing else:
override `Trainer._forward_backward_body` to pass the teacher's hidden states, and its head as a
plain tensor, with them.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torchtitan.components.loss import ChunkedLossWrapper
from torchtitan.models.common.linear import Linear

from reflux.kernels.linear_kl import linear_kl


class DistillHead(Linear):
    """A head that makes logits, or, given a teacher, the loss: under FSDP2 its weight is gathered
    and plain only in here.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Linear.Config): ...

    def forward(
        self, hidden: Tensor, teacher: tuple[Tensor, Tensor] | None = None, **options: Any
    ) -> Tensor:
        """Logits; with (hidden [T, E], head [V, E]) of a teacher the total [] of linear_kl."""
        if teacher is None:
            return super().forward(hidden)
        return linear_kl(hidden, self.weight, *teacher, **options).total


# the Trainer calls set_lm_head on subclasses of this one only
class DistillLoss(ChunkedLossWrapper):
    """sum over labelled tokens of D(student, teacher), over global_valid_tokens where given.

    options: of linear_kl, such as beta and temperature.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ChunkedLossWrapper.Config):
        divergence: str = "reverse"
        options: dict[str, Any] = field(default_factory=dict)

    def __init__(self, config: Any, *, compile_config: Any = None):
        self.config = config
        self.lm_head: Any = None  # no inner loss, no chunks: the op has its own

    def __call__(
        self,
        pred: Tensor,
        labels: Tensor,
        global_valid_tokens: Tensor | None = None,
        *,
        teacher_hidden: Tensor,
        teacher_head: Tensor,
        **_: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """pred [batch, L, D]: hidden states, as for ChunkedLossWrapper; teacher's [batch, L, E]."""
        total = self.lm_head(
            pred.flatten(0, 1),
            (teacher_hidden.flatten(0, 1), teacher_head),
            divergence=self.config.divergence,
            weight=(labels != -100).flatten(),
            **self.config.options,
        )
        return total if global_valid_tokens is None else total / global_valid_tokens, {}
