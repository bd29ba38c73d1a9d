"""Cut two tokenizations of the same bytes into the smallest spans both can spell, batch by batch.

    boundary  a byte position where a token of at least one byte ends on both sides
    span      of a token: the number of boundaries at or before its start

So a token of no bytes goes with what follows it, at the very end with the last span. -1, outside
every span: masked tokens, and tokens past the last boundary where one side is longer. Lengths only:
it does not see the bytes.

A few tensor calls, no loop and no host sync: launch-bound at any size that occurs. Ids on a CPU are
aligned faster, and with their bytes compared, by tokenalign's native core.

Shapes: B rows, n and m (N and M) tokens of a row on side a and b.
"""

import torch
from torch import Tensor

from . import _triton

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def align_spans_ref(
    len_a_BN: Tensor, len_b_BM: Tensor, mask_a_BN: Tensor, mask_b_BM: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, token by token."""
    spans_a: list[list[int]] = []
    spans_b: list[list[int]] = []
    counts = []
    for row in zip(len_a_BN.tolist(), mask_a_BN.tolist(), len_b_BM.tolist(), mask_b_BM.tolist()):
        sides, ends = [], []
        for lengths, mask in (row[:2], row[2:]):
            starts, at = [], 0
            for length, counted in zip(lengths, mask):
                starts.append(at)
                at += length if counted else 0
            sides.append((starts, mask, at))
            ends.append({*starts, at} - {0})
        edges = sorted(ends[0] & ends[1])
        counts.append(len(edges))
        for spans, (starts, mask, total) in zip((spans_a, spans_b), sides):
            past = len(edges) - 1 if total == max(edges, default=0) else -1
            before = [sum(edge <= start for edge in edges) for start in starts]
            of_token = [past if k == len(edges) else k for k in before]
            spans.append([k if counted else -1 for k, counted in zip(of_token, mask)])
    span_a_BN, span_b_BM = (
        torch.tensor(spans, dtype=torch.long).reshape(like.shape).to(like.device)
        for spans, like in ((spans_a, len_a_BN), (spans_b, len_b_BM))
    )
    return span_a_BN, span_b_BM, torch.tensor(counts, dtype=torch.long, device=len_a_BN.device)


@torch.library.custom_op("reflux::align_spans", mutates_args=())
def _op(
    len_a_BN: Tensor, len_b_BM: Tensor, mask_a_BN: Tensor, mask_b_BM: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    len_a_BN, len_b_BM = len_a_BN.long() * mask_a_BN, len_b_BM.long() * mask_b_BM
    end_a_BN, end_b_BM = len_a_BN.cumsum(1), len_b_BM.cumsum(1)
    rows = len_a_BN.shape[0]
    if 0 in (len_a_BN.numel(), len_b_BM.numel()):
        return (
            torch.full_like(len_a_BN, -1),
            torch.full_like(len_b_BM, -1),
            len_a_BN.new_zeros(rows),
        )
    # Row r is shifted by r times more than the longest row, so the flattened ends are sorted and
    # one search serves all rows.
    longest = torch.maximum(end_a_BN[:, -1].max(), end_b_BM[:, -1].max())
    shift_B1 = torch.arange(rows, device=len_a_BN.device)[:, None] * (longest + 1)
    flat_a, flat_b = (end_a_BN + shift_B1).flatten(), (end_b_BM + shift_B1).flatten()

    def ends_on_both(ends: Tensor, others: Tensor, length: Tensor) -> Tensor:
        nearest = torch.searchsorted(others, ends).clamp(max=others.numel() - 1)
        return (others[nearest] == ends).view_as(length) & (length > 0)

    hit_a_BN = ends_on_both(flat_a, flat_b, len_a_BN)
    hit_b_BM = ends_on_both(flat_b, flat_a, len_b_BM)
    num_B1 = hit_a_BN.sum(1, keepdim=True)
    last_B1 = (end_a_BN * hit_a_BN).amax(1, keepdim=True)

    def spans(hit: Tensor, end: Tensor, mask: Tensor) -> Tensor:
        span = hit.long().cumsum(1) - hit.long()  # boundaries at or before the token's start
        past = torch.where(end[:, -1:] == last_B1, num_B1 - 1, -1)
        return torch.where(mask, torch.where(span == num_B1, past, span), -1)

    return (
        spans(hit_a_BN, end_a_BN, mask_a_BN),
        spans(hit_b_BM, end_b_BM, mask_b_BM),
        num_B1[:, 0].clone(),
    )


def _fake(len_a_BN, len_b_BM, mask_a_BN, mask_b_BM):
    shapes = len_a_BN.shape, len_b_BM.shape, len_a_BN.shape[:1]
    return tuple(len_a_BN.new_empty(shape, dtype=torch.long) for shape in shapes)


_op.register_fake(_fake)


def align_spans(
    len_a_BN: Tensor,
    len_b_BM: Tensor,
    mask_a_BN: Tensor | None = None,
    mask_b_BM: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """int64 span_a [B, n], span_b [B, m] and the number of spans of each row [B].

    len: integers >= 0, bytes of each token; mask: bool, False is padding or control, anywhere in a
    row and whatever its length says; None for all tokens. Row sums must stay below 2**63 / B.
    ValueError on shapes, dtypes or devices.
    """
    for side, length, mask in (("a", len_a_BN, mask_a_BN), ("b", len_b_BM, mask_b_BM)):
        if not (length.ndim == 2 and length.dtype in INTEGERS):
            raise ValueError(
                f"align_spans: len_{side} is {length.dtype} {list(length.shape)}; want integers "
                "[B, tokens], the bytes of each token"
            )
        if not (mask is None or (mask.shape == length.shape and mask.dtype == torch.bool)):
            raise ValueError(
                f"align_spans: mask_{side} is {getattr(mask, 'dtype', None)} "
                f"{list(getattr(mask, 'shape', []))} for lengths {list(length.shape)}; want bool "
                "of that shape, True for a token that counts"
            )
        if not (
            not _triton.DEBUG
            or not length.numel()
            or torch.compiler.is_compiling()
            or int(length.min()) >= 0
        ):
            raise ValueError(
                f"align_spans: len_{side} has negative lengths; these are lengths, not ends or "
                "differences of ends"
            )
    if not (len_a_BN.shape[0] == len_b_BM.shape[0] and len_a_BN.device == len_b_BM.device):
        raise ValueError(
            f"align_spans: {len_a_BN.shape[0]} rows on {len_a_BN.device} and {len_b_BM.shape[0]} "
            f"on {len_b_BM.device}; want row r of both sides to be one text, on one device"
        )
    masks = (
        torch.ones_like(x, dtype=torch.bool) if mask is None else mask
        for x, mask in ((len_a_BN, mask_a_BN), (len_b_BM, mask_b_BM))
    )
    return _op(len_a_BN, len_b_BM, *masks)
