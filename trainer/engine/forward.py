"""The forward without the head; packed documents do not see each other.

Shapes: N rows, L row length, D hidden size.
"""

from torch import Tensor
from torchtitan.models.common.attention import FlexAttention

from .document_masks import document_mask
from .head import head_skipped, plain
from .hf_models import HFDecoder


def hidden_states(
    model,
    ids_NL: Tensor,
    positions_NL: Tensor,
    *,
    packed: bool = False,
    mask_NL: Tensor | None = None,
) -> Tensor:
    """The last hidden states [N, L, D], after the final norm and before the head, in the compute
    dtype. Collective.

    positions_NL: int64, 0, 1, ... within each document. packed: some row holds more than one
    document. mask_NL: bool, false for padding (on either side, of any position); its hidden states
    mean nothing.
    """
    if mask_NL is not None:
        # padding: documents of one token
        positions_NL, packed = positions_NL.masked_fill(~mask_NL, 0), True
    with head_skipped(model):
        if isinstance(model, HFDecoder):
            return model(ids_NL, positions=positions_NL, packed=packed)
        if isinstance(model.config.first_attention.inner_attention, FlexAttention.Config):
            masks = model.get_attention_masks(positions_NL)
        else:
            masks = document_mask(positions_NL, packed=packed)
        return plain(model(ids_NL, positions=positions_NL, attention_masks=masks))
