"""The chunk loop that every linear_* op shares: [rows, V] logits exist for one chunk of rows at a time.

Shapes: T tokens, C rows of one chunk, D hidden, V vocabulary (padded columns already cut off).
GEMMs accumulate and return fp32 (fp64 when given fp64): bf16 logits get a KL of 1e-2 wrong by 13 %.
"""
from collections.abc import Iterator

import torch
from torch import Tensor

from ._triton import require, runs_triton

CPU_CHUNK_BYTES = 4 * 2**20  # one [rows, V] buffer on a CPU; larger ones leave the caches and page-fault anew each call


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits and losses: fp32, or fp64 when given fp64."""
    return torch.promote_types(dtype, torch.float32)


def check_linear(op: str, hidden_TD: Tensor, head_VD: Tensor, vocab_size: int | None, temperature: float) -> int:
    """Refuse what cannot be a hidden state and its head. Returns the vocabulary size in use."""
    require(not hasattr(head_VD, "full_tensor"),
            f"{op}: the head is a sharded DTensor. Call the op inside the forward of the module that owns it, "
            "where fully_shard has gathered a plain tensor")
    require(hidden_TD.ndim == 2 and head_VD.ndim == 2 and hidden_TD.shape[1] == head_VD.shape[1],
            f"{op}: hidden is {list(hidden_TD.shape)} and head {list(head_VD.shape)}; want [T, D] and [V, D]. "
            "Flatten batch and time first: hidden.flatten(0, -2)")
    require(hidden_TD.dtype == head_VD.dtype and hidden_TD.is_floating_point(),
            f"{op}: hidden is {hidden_TD.dtype} and head {head_VD.dtype}; want one floating dtype. "
            "Cast one of them: hidden.to(head.dtype)")
    require(temperature > 0, f"{op}: temperature is {temperature}; want > 0. 0 means greedy: take the argmax")
    V = head_VD.shape[0] if vocab_size is None else vocab_size
    require(0 < V <= head_VD.shape[0],
            f"{op}: vocab_size is {V} and the head has {head_VD.shape[0]} rows; want 1 <= vocab_size <= rows")
    return V


def check_softcap(op: str, softcap: float | None) -> float:
    """0.0 stands for no cap inside the ops: a schema cannot branch on None in a kernel."""
    require(softcap is None or softcap > 0, f"{op}: softcap is {softcap}; want > 0, or None for no cap")
    return softcap or 0.0


def chunks(x: Tensor, V: int, buffers: int, workspace_mb: float) -> Iterator[slice]:
    """Row ranges of x whose `buffers` [rows, V] buffers fit workspace_mb MiB; always at least one row.

    Multiples of 128 rows where the budget allows, the tile height of a GEMM.
    """
    row_bytes = V * wide(x.dtype).itemsize
    rows = int(workspace_mb * 2**20) // (buffers * row_bytes)
    if not x.is_cuda:
        rows = min(rows, max(CPU_CHUNK_BYTES // row_bytes, 128))
    rows = max(1, rows - rows % 128 if rows >= 128 else rows)
    for start in range(0, x.shape[0], rows):
        yield slice(start, min(start + rows, x.shape[0]))


def project(hidden_CD: Tensor, head_VD: Tensor, softcap: float) -> Tensor:
    """logits [C, V] = hidden @ head.T, then softcap * tanh(logits / softcap) unless softcap is 0."""
    if hidden_CD.is_cuda and hidden_CD.dtype.itemsize == 2:
        logits_CV = torch.mm(hidden_CD, head_VD.t(), out_dtype=torch.float32)  # CUDA only: the CPU has no out_dtype
    else:
        dtype = wide(hidden_CD.dtype)
        logits_CV = hidden_CD.to(dtype) @ head_VD.to(dtype).t()
    return logits_CV.div_(softcap).tanh_().mul_(softcap) if softcap else logits_CV


def backproject(dlogits_CV: Tensor, hidden_CD: Tensor, head_VD: Tensor, dhidden_CD: Tensor | None,
                dhead_VD: Tensor | None) -> None:
    """dhidden = dlogits @ head and dhead += dlogits.T @ hidden, both in place; None skips one. dhead is fp32 or fp64."""
    on_tensor_cores = hidden_CD.is_cuda and hidden_CD.dtype.itemsize == 2
    d_CV = dlogits_CV.to(hidden_CD.dtype) if on_tensor_cores else dlogits_CV
    if dhidden_CD is not None:
        dhidden_CD.copy_(d_CV @ head_VD.to(d_CV.dtype))
    if dhead_VD is not None and on_tensor_cores:
        torch.addmm(dhead_VD, d_CV.t(), hidden_CD, out_dtype=torch.float32, out=dhead_VD)
    elif dhead_VD is not None:
        dhead_VD.addmm_(d_CV.t(), hidden_CD.to(d_CV.dtype))


def gradient_buffers(hidden_TD: Tensor, head_VD: Tensor, need_dhidden: bool, need_dhead: bool) -> tuple[Tensor, Tensor]:
    """dhidden like hidden, dhead zeroed in fp32 or fp64; an empty tensor where not needed."""
    dhidden_TD = hidden_TD.new_empty(hidden_TD.shape if need_dhidden else (0,))
    dhead_VD = hidden_TD.new_zeros(head_VD.shape if need_dhead else (0,), dtype=wide(head_VD.dtype))
    return dhidden_TD, dhead_VD


def needs_gradients(hidden_TD: Tensor, head_VD: Tensor, frozen_head: bool) -> tuple[bool, bool]:
    """A custom op cannot see needs_input_grad, so it is told."""
    on = torch.is_grad_enabled()
    return on and hidden_TD.requires_grad, on and head_VD.requires_grad and not frozen_head


def workspace_buffers(x: Tensor, with_kernel: int, with_torch: int) -> int:
    """How many [rows, V] buffers a chunk keeps alive: row kernels work in place, PyTorch makes temporaries."""
    return with_kernel if runs_triton(x) else with_torch
