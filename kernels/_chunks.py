"""What every linear_* op shares: logits of a head, chunk of rows by chunk of rows, and their way back.

    logits = softcap tanh(logit_scale (hidden @ head.T + bias) / softcap), or without the tanh if softcap is 0

[rows, V] logits exist for one chunk of rows at a time. GEMMs accumulate and return fp32 (fp64 when given fp64): bf16
logits get a KL of 1e-2 wrong by 13 %.

Shapes: T tokens, C rows of a chunk, D hidden, V vocabulary (padded columns already cut off).
"""
from collections.abc import Iterator

import torch
from torch import Tensor

from ._parallel import VocabShard
from ._triton import check_ids, require, runs_triton

CPU_CHUNK_BYTES = 4 * 2**20  # one [rows, V] buffer on a CPU; larger ones leave the caches and page-fault anew each call
Rows = slice | Tensor  # of a chunk: a range, or an int64 index when the caller chose rows


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits and losses: fp32, or fp64 when given fp64."""
    return torch.promote_types(dtype, torch.float32)


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What nn.Linear would see: autocast does not reach a custom op, so its operands are cast in front of it."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def check_linear(op: str, hidden_TD: Tensor, head_VD: Tensor, vocab_size: int | None, temperature: float,
                 shard: VocabShard | None = None) -> int:
    """Refuse what cannot be a hidden state and its head. Returns the vocabulary size in use, of all slices together."""
    require(hidden_TD.ndim == 2 and head_VD.ndim == 2 and hidden_TD.shape[1] == head_VD.shape[1],
            f"{op}: hidden is {list(hidden_TD.shape)} and head {list(head_VD.shape)}; want [T, D] and [V, D]. "
            "Flatten batch and time first: hidden.flatten(0, -2)")
    require(hidden_TD.dtype == head_VD.dtype and hidden_TD.is_floating_point(),
            f"{op}: hidden is {hidden_TD.dtype} and head {head_VD.dtype}; want one floating dtype. "
            "Cast one of them: hidden.to(head.dtype)")
    require(not hasattr(hidden_TD, "full_tensor"),
            f"{op}: hidden is a DTensor; want the plain tensor. If it is replicated, as in front of a head sharded over "
            "the vocabulary, that is hidden.to_local()")
    require(temperature > 0, f"{op}: temperature is {temperature}; want > 0. 0 means greedy: take the argmax")
    require(shard is None or (vocab_size is not None and vocab_size > 0 and shard.start >= 0),
            f"{op}: a shard from row {getattr(shard, 'start', 0)} on and vocab_size {vocab_size}; want both >= 0 and "
            "vocab_size, the size of the whole vocabulary: all ranks must cut the same chunks of rows")
    V = head_VD.shape[0] if vocab_size is None else vocab_size
    require(shard is not None or 0 < V <= head_VD.shape[0],
            f"{op}: vocab_size is {V} and the head has {head_VD.shape[0]} rows; want 1 <= vocab_size <= rows")
    return V


def check_softcap(op: str, softcap: float | None) -> float:
    """0.0 stands for no cap inside the ops: a schema cannot branch on None in a kernel."""
    require(softcap is None or softcap > 0, f"{op}: softcap is {softcap}; want > 0, or None for no cap")
    return softcap or 0.0


def check_rows(op: str, rows_M: Tensor | None, hidden_TD: Tensor) -> Tensor | None:
    """The rows to work on, int64 [M], or None for all of them. Their values are not read: that would sync."""
    require(rows_M is None or (rows_M.ndim == 1 and rows_M.dtype in (torch.int32, torch.int64)),
            f"{op}: rows is {getattr(rows_M, 'dtype', None)} {list(getattr(rows_M, 'shape', []))}; want distinct row numbers, "
            "int64 [M]. A mask becomes one by mask.nonzero()[:, 0], best where the batch is packed: on a GPU it waits")
    if rows_M is not None:
        check_ids(f"{op} (rows)", rows_M, hidden_TD.shape[0])
    return None if rows_M is None else rows_M.long()


def fold_scale(temperature: float, logit_scale: float, softcap: float) -> tuple[float, float]:
    """(what logits are multiplied by, what gradients are multiplied by besides): a cap keeps the scale from joining 1/T."""
    return (1 / temperature, logit_scale) if softcap else (logit_scale / temperature, 1.0)


def chunks(x: Tensor, V: int, buffers: int, workspace_mb: float, rows_M: Tensor | None = None) -> Iterator[Rows]:
    """Row ranges of x, or parts of rows if given, whose `buffers` [rows, V] buffers fit workspace_mb MiB.

    Always at least one row; multiples of 128 rows where the budget allows, the tile height of a GEMM.
    """
    row_bytes = V * wide(x.dtype).itemsize
    size = int(workspace_mb * 2**20) // (buffers * row_bytes)
    if not x.is_cuda:
        size = min(size, max(CPU_CHUNK_BYTES // row_bytes, 128))
    size = max(1, size - size % 128 if size >= 128 else size)
    total = x.shape[0] if rows_M is None else rows_M.shape[0]
    for start in range(0, total, size):
        c = slice(start, min(start + size, total))
        yield c if rows_M is None else rows_M[c]


def on_tensor_cores(x: Tensor) -> bool:
    """16-bit GEMMs with fp32 output exist on CUDA only; a CPU upcasts."""
    return x.is_cuda and x.dtype.itemsize == 2


def project(hidden_CD: Tensor, head_VD: Tensor, softcap: float = 0.0, bias_V: Tensor | None = None,
            logit_scale: float = 1.0) -> Tensor:
    """logits [C, V] in fp32 or fp64. Without a cap logit_scale is left to the caller (`fold_scale`)."""
    if on_tensor_cores(hidden_CD):
        logits_CV = torch.mm(hidden_CD, head_VD.t(), out_dtype=torch.float32)
    else:
        dtype = wide(hidden_CD.dtype)
        logits_CV = hidden_CD.to(dtype) @ head_VD.to(dtype).t()
    if bias_V is not None and bias_V.numel():
        logits_CV += bias_V
    return logits_CV.mul_(logit_scale / softcap).tanh_().mul_(softcap) if softcap else logits_CV


def backproject(dlogits_CV: Tensor, hidden_CD: Tensor, head_VD: Tensor, need_dhidden: bool, dhead_VD: Tensor | None,
                dbias_V: Tensor | None = None) -> Tensor | None:
    """dhidden [C, D] = dlogits @ head, or None; dhead += dlogits.T @ hidden and dbias += sum dlogits, both fp32 or fp64.

    bf16 gradients go through the GEMMs in bf16, as everywhere in training. fp16 ones would lose all below 6e-8 to it
    (a loss scale comes only in the backward), so those are multiplied in fp32.
    """
    in_bf16 = on_tensor_cores(hidden_CD) and hidden_CD.dtype == torch.bfloat16
    d_CV = dlogits_CV.to(torch.bfloat16) if in_bf16 else dlogits_CV
    if dbias_V is not None:
        dbias_V += dlogits_CV.sum(0)
    if dhead_VD is not None and in_bf16:
        torch.addmm(dhead_VD, d_CV.t(), hidden_CD, out_dtype=torch.float32, out=dhead_VD)
    elif dhead_VD is not None:
        dhead_VD.addmm_(d_CV.t(), hidden_CD.to(d_CV.dtype))
    return (d_CV @ head_VD.to(d_CV.dtype)).to(hidden_CD.dtype) if need_dhidden else None


def gradient_buffers(hidden_TD: Tensor, head_VD: Tensor, need_dhidden: bool, need_dhead: bool) -> tuple[Tensor, Tensor]:
    """Zeros: dhidden like hidden, dhead in fp32 or fp64; an empty tensor where not needed."""
    dhidden_TD = hidden_TD.new_zeros(hidden_TD.shape if need_dhidden else (0,))
    dhead_VD = hidden_TD.new_zeros(head_VD.shape if need_dhead else (0,), dtype=wide(head_VD.dtype))
    return dhidden_TD, dhead_VD


def needs_gradients(hidden_TD: Tensor, head_VD: Tensor, frozen_head: bool) -> tuple[bool, bool]:
    """A custom op cannot see needs_input_grad, so it is told."""
    on = torch.is_grad_enabled()
    return on and hidden_TD.requires_grad, on and head_VD.requires_grad and not frozen_head


def workspace_buffers(x: Tensor, with_kernel: int, with_torch: int) -> int:
    """How many [rows, V] buffers a chunk keeps alive: row kernels work in place, PyTorch makes temporaries."""
    return with_kernel if runs_triton(x) else with_torch
