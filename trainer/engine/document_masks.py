"""Attention masks of rows that hold several documents.

Shapes: N rows, L row length.
"""

import torch
from torch import Tensor
from transformers import PreTrainedConfig

# transformers reads document ends off the positions, but not in these families
TAKE_MASKS = ("gpt_oss", "afmoe", "qwen2_vl_text", "qwen2_5_vl_text")


def document_mask(positions_NL: Tensor, *, packed: bool) -> Tensor | None:
    """bool [N, 1, L, L], true where query i may see key j: j <= i and both in one document. None
    unless packed.

    A document starts wherever a position is 0. Padding with position 0 makes one-token documents,
    so that no softmax row is empty. The caller knows `packed`; looking would be a host sync.
    """
    if not packed:
        return None
    document_NL = (positions_NL == 0).cumsum(1)
    L = positions_NL.shape[1]
    causal_LL = torch.ones(L, L, dtype=torch.bool, device=positions_NL.device).tril()
    return ((document_NL[:, :, None] == document_NL[:, None, :]) & causal_LL)[:, None]


def masks_by_layer_type(
    config: PreTrainedConfig, positions_NL: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Masks of packed rows as the families of TAKE_MASKS take them, [N, 1, L, L]: bool, or terms of
    the scores in `dtype` for eager attention.
    """
    full = document_mask(positions_NL, packed=True)
    assert full is not None
    masks = {"full_attention": full}
    if window := getattr(config, "sliding_window", None):
        index_L = torch.arange(positions_NL.shape[1], device=positions_NL.device)
        masks["sliding_attention"] = full & (index_L[:, None] - index_L < window)
    if config._attn_implementation != "eager":
        return masks
    low = torch.finfo(dtype).min
    return {kind: (~mask).to(dtype) * low for kind, mask in masks.items()}
