"""Hidden states at the predictor positions, with and without a graph, and the gradient of a loss
over micro-batches.

Shapes: N rows, L row length, T response tokens, D hidden size, V vocabulary.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from reflux.trainer.data.batch import Batch
from reflux.trainer.losses import HeadInputs
from reflux.trainer.phase import LossFunction, ReadableModel

from .agreement import is_first_rank
from .forward import hidden_states
from .head import head_weight, logit_scale, logit_softcap
from .lora import SHOWN, adapted_layers
from .ranks import RankGroup
from .torchtitan_host import RefluxTrainer

log = logging.getLogger(__name__)


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
    model: Any = trainer.model_parts[0]
    sums: dict[str, Tensor] = {"loss": torch.zeros((), device=trainer.device)}
    every = getattr(trainer.config.training, "sync_every_microbatch", True)
    for i, batch in enumerate(b.to(trainer.device) for b in batches):
        # else the ranks keep whole gradients, and reduce their sum with the last batch
        model.set_requires_gradient_sync(every or i == len(batches) - 1)
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
    if not trainer.knows_idle_adapters and any(batch.tokens for batch in batches):
        trainer.knows_idle_adapters = True
        _warn_of_idle_adapters(model)
    return sums


def _warn_of_idle_adapters(model: nn.Module) -> None:
    """Some of transformers' models read `weight` of a linear layer and do not call the layer."""
    idle = [layer.lora_name for layer in adapted_layers(model) if layer.lora_B.grad is None]
    if idle and is_first_rank():
        more = f" and {len(idle) - SHOWN} more" if idle[SHOWN:] else ""
        log.warning(
            "lora: %d adapters got no gradient in the first update, for the forward does not pass "
            "through these layers: %s%s. They train nothing; leave them out of lora.targets",
            len(idle),
            ", ".join(idle[:SHOWN]),
            more,
        )


def _combined(name: str, before: Tensor, value: Tensor) -> Tensor:
    return torch.maximum(before, value) if name.startswith("max/") else before + value


@dataclass(frozen=True)
class Update:
    """One optimizer update, as all ranks know it."""

    totals: Mapping[str, float]  # sums over its tokens; of metrics named "max/...", maxima
    grad_norm: float  # before clipping
    tokens: float


def totals(ranks: RankGroup, sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Sums over ranks, and maxima over ranks, in two reductions. Collective."""
    names = sorted(sums)
    maxima = [n for n in names if n.startswith("max/")]
    added = [n for n in names if not n.startswith("max/")]
    summed = ranks.reduce([sums[n] for n in added], dist.ReduceOp.SUM)
    highest = ranks.reduce([sums[n] for n in maxima], dist.ReduceOp.MAX)
    return dict(zip(added, summed)) | dict(zip(maxima, highest))


def epoch_means(updates: Sequence[Update]) -> dict[str, float]:
    """Sums / tokens and maxima over the updates of an epoch; `grad_norm` is their mean."""
    tokens = sum(u.tokens for u in updates)
    means = {}
    for name in updates[0].totals:
        values = [u.totals[name] for u in updates]
        means[name] = max(values) if name.startswith("max/") else sum(values) / max(tokens, 1.0)
    norms = [u.grad_norm for u in updates]
    return means | {"grad_norm": sum(norms) / len(norms), "tokens": tokens}


def dumped(batches: Sequence[Batch], stats: Mapping[str, float], path: Path) -> str:
    """Saves the batches of an update that was not made. Returns what became of them, in words."""
    try:
        torch.save({"batches": [vars(b) for b in batches], "stats": stats}, path)
    except (OSError, RuntimeError) as error:  # the latter is what torch makes of a full disk
        path.unlink(missing_ok=True)
        return f"could not be saved ({error})"
    return f"is saved in {path}"
