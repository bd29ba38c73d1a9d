"""The output head of a decoder, apart from the rest of its forward.

    head_skipped    inside, the model returns hidden states instead of logits
    head_weight     the [V, D] matrix, for a fused loss; open_head: for a forward alone
    logit_softcap, logit_scale
                    logits = cap * tanh(z / cap), z = scale * hidden @ head.T   (no cap: z)
    head_logits     the logits themselves

Why the head is an FSDP group of its own: torchtitan groups it with the final norm and runs it after
the root's forward. torch 2.11 does not support a group of which only a part ran (the norm's
backward reads freed memory), and a fused loss, which takes the head as a matrix, must gather the
head and nothing else.

`model` is one of torchtitan's decoders or an HFDecoder. Shapes: N rows, L row length, D hidden
size, V vocabulary.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def plain(x: Tensor) -> Tensor:
    """The whole of a tensor-parallel tensor; the gradient goes back to its shards."""
    return x.full_tensor() if isinstance(x, DTensor) else x


@contextlib.contextmanager
def head_skipped(model) -> Iterator[None]:
    before, model._skip_lm_head = model._skip_lm_head, True
    try:
        yield
    finally:
        model._skip_lm_head = before


def head_weight(model) -> Tensor:
    """Gathers the head's FSDP group. Its plain [V, D] weight, for a fused loss. Collective.

    The backward frees it again (see open_head for a forward alone). Under tensor parallelism the
    vocabulary shards are gathered too: every rank of a tensor-parallel group computes the same loss
    on the same rows.
    """
    if isinstance(model.lm_head, FSDPModule):
        model.lm_head.unshard()
    return plain(model.lm_head.weight)


@contextlib.contextmanager
def open_head(model) -> Iterator[Tensor]:
    """The plain [V, D] head weight, without gradient, held gathered inside. Collective on entry.

    A head that is open already stays open: the graph of a step needs it.
    """
    before = model.lm_head.weight
    head_VD = head_weight(model).detach()
    was_open = model.lm_head.weight is before  # gathering puts another parameter in its place
    try:
        yield head_VD
    finally:
        if isinstance(model.lm_head, FSDPModule) and not was_open:
            model.lm_head.reshard()


def head_rows(model) -> int:
    """V of the head, padding included."""
    return int(model.lm_head.weight.shape[0])


def logit_softcap(model) -> float | None:
    """The cap of cap * tanh(z / cap) on the logits (Gemma 2), or None."""
    return getattr(_hf_config(model), "final_logit_softcapping", None)


def logit_scale(model) -> float:
    """The factor on hidden @ head.T: Cohere's logit_scale, 1 / Granite's logits_scaling,
    Falcon-H1's lm_head_multiplier.
    """
    config = _hf_config(model)
    scale = (
        getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    )
    return scale / (getattr(config, "logits_scaling", None) or 1.0)


def head_logits(model, hidden_NLD: Tensor) -> Tensor:
    """Logits [N, L, V] in the compute dtype, by the model's own head module, scale and cap."""
    # a slice, such as the last position of each row, is no single product for torch: it expands the
    # head to [N, D, V], which in bfloat16 on a CPU is a copy for every row
    logits_NLV = plain(model.lm_head(hidden_NLD.contiguous()))
    scale, cap = logit_scale(model), logit_softcap(model)
    if scale != 1.0:
        logits_NLV = logits_NLV * scale
    return logits_NLV if cap is None else torch.tanh(logits_NLV / cap) * cap


def _hf_config(model):
    """transformers' config of an HFDecoder's text; None of a native model, which has no scale or
    cap.
    """
    config = getattr(getattr(model, "hf", None), "config", None)
    return None if config is None else config.get_text_config()
