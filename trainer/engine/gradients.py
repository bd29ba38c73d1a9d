"""Hidden states at the predictor positions, with and without a graph, and the gradient of a loss
over micro-batches.

Shapes: N rows, L row length, T response tokens, D hidden size, V vocabulary.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from reflux.trainer.data.batch import Batch
from reflux.trainer.losses import HeadInputs
from reflux.trainer.phase import LossFunction, ReadableModel

from .forward import hidden_states
from .head import head_weight, logit_scale, logit_softcap
from .ranks import RankGroup
from .torchtitan_host import RefluxTrainer


def head_inputs(
    model: nn.Module, hidden_NLD: Tensor, batch: Batch, head_VD: Tensor, vocab_size: int
) -> HeadInputs:
    """Hidden states at the batch's predictor positions, [T, D], with the model's logit scale in
    them, and the head.
    """
    hidden_TD = hidden_NLD.flatten(0, 1)[batch.row_T]
    scale = logit_scale(model)
    if scale != 1.0:
        hidden_TD = hidden_TD * scale
    return HeadInputs(hidden_TD, head_VD, logit_softcap(model), vocab_size)


@contextlib.contextmanager
def forward_no_grad(model: ReadableModel, batch: Batch, vocab_size: int) -> Iterator[HeadInputs]:
    """Head inputs without a graph; the head is held gathered inside. Collective."""
    with torch.no_grad():
        hidden_NLD = model.hidden(batch.input_NL, batch.position_NL, batch.packed)
    with model.open_head() as head_VD:
        yield head_inputs(
            model.model, hidden_NLD, batch, head_VD, min(vocab_size, head_VD.shape[0])
        )


def accumulate_gradients(
    trainer: RefluxTrainer,
    batches: Sequence[Batch],
    loss: LossFunction,
    *,
    vocab_size: int,
    tokens: float,
) -> dict[str, Tensor]:
    """Adds the gradient of (sum of losses) / tokens to `.grad`. Collective: every rank brings the
    same number of batches.

    Returns this rank's plain sums of loss and metrics; of metrics named "max/...", the maxima.
    """
    model = trainer.model_parts[0]
    sums: dict[str, Tensor] = {"loss": torch.zeros((), device=trainer.device)}
    for batch in (b.to(trainer.device) for b in batches):
        with trainer.train_context():
            hidden_NLD = hidden_states(
                model, batch.input_NL, batch.position_NL, packed=batch.packed
            )
            out = head_inputs(model, hidden_NLD, batch, head_weight(model), vocab_size)
            total, metrics = loss(out, batch)
            # an empty batch still runs the collectives
            (total / tokens + 0.0 * hidden_NLD.float().sum()).backward()
        for name, value in (metrics | {"loss": total.detach()}).items():
            sums[name] = _combined(name, sums[name], value) if name in sums else value
    return sums


def _combined(name: str, before: Tensor, value: Tensor) -> Tensor:
    return torch.maximum(before, value) if name.startswith("max/") else before + value


def token_means(ranks: RankGroup, sums: Mapping[str, Tensor], tokens: float) -> dict[str, float]:
    """Sums over ranks / tokens, and maxima over ranks, in two reductions. Collective."""
    names = sorted(sums)
    maxima = [n for n in names if n.startswith("max/")]
    added = [n for n in names if not n.startswith("max/")]
    totals = ranks.reduce([sums[n] for n in added], dist.ReduceOp.SUM)
    highest = ranks.reduce([sums[n] for n in maxima], dist.ReduceOp.MAX)
    return {n: v / tokens for n, v in zip(added, totals)} | dict(zip(maxima, highest))
