"""What every linear_* op shares: the logits of a chunk of rows, and their gradient's way back.

    logits = softcap tanh(logit_scale (hidden @ head.T + bias) / softcap), no tanh if softcap is 0

[rows, V] logits exist for one chunk of rows at a time. GEMMs accumulate and return fp32 (fp64 when
given fp64): bf16 logits get a KL of 1e-2 wrong by 13 %.

Shapes: T tokens, C rows of a chunk, D hidden, V vocabulary (padded columns already cut off).
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ._parallel import VocabShard
from ._plan import MIB, WORKSPACE_MB, Plan, Work, plan_for, workspace_for
from ._triton import check_row_numbers, on_gpu, runs_triton

# one [rows, V] buffer on a CPU; larger ones leave the caches and page-fault anew each call
CPU_CHUNK_BYTES = 4 * 2**20
PAD = 64  # columns a row of logits is padded to: without it no 16-byte load exists at V = 151,669
FP16_MAX = 65504.0
Rows = slice | Tensor  # of a chunk: a range, or an int64 index when the caller chose rows


class Part(NamedTuple):
    """A chunk in its group; see `_plan.py`."""

    rows: Rows
    begin: int  # its first row within the group
    group: Rows | None  # all rows of the group, at its last chunk


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits and losses: fp32, or fp64 when given fp64."""
    return torch.promote_types(dtype, torch.float32)


def as_autocast(
    hidden_TD: Tensor, head_VD: Tensor, bias_V: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast as nn.Linear would: autocast does not reach into a custom op."""
    device = hidden_TD.device.type
    if not torch.is_autocast_enabled(device):
        return hidden_TD, head_VD, bias_V
    dtype = torch.get_autocast_dtype(device)

    def cast(x: Tensor) -> Tensor:
        return x if x.dtype == torch.float64 or not x.is_floating_point() else x.to(dtype)

    return cast(hidden_TD), cast(head_VD), None if bias_V is None else cast(bias_V)


def check_temperature(op: str, temperature: float) -> None:
    if not (temperature > 0):
        raise ValueError(
            f"{op}: temperature is {temperature}; want > 0. 0 means greedy: take the argmax"
        )


def check_linear(
    op: str,
    hidden_TD: Tensor,
    head_VD: Tensor,
    vocab_size: int | None,
    temperature: float,
    shard: VocabShard | None = None,
) -> int:
    """Refuse what is no hidden state and its head. Returns the size of the whole vocabulary."""
    if not (hidden_TD.ndim == 2 and head_VD.ndim == 2 and hidden_TD.shape[1] == head_VD.shape[1]):
        raise ValueError(
            f"{op}: hidden is {list(hidden_TD.shape)} and head {list(head_VD.shape)}; want [T, D] "
            "and [V, D]. Flatten batch and time first, hidden.flatten(0, -2); the head is the "
            "weight of a torch.nn.Linear(D, V), not its transpose"
        )
    if not (hidden_TD.dtype == head_VD.dtype and hidden_TD.is_floating_point()):
        raise ValueError(
            f"{op}: hidden is {hidden_TD.dtype} and head {head_VD.dtype}; want one floating dtype. "
            "Cast one of them: hidden.to(head.dtype)"
        )
    if hasattr(hidden_TD, "full_tensor"):
        raise ValueError(
            f"{op}: hidden is a DTensor; want the plain tensor. If it is replicated, as in front "
            "of a head sharded over the vocabulary, that is hidden.to_local()"
        )
    check_temperature(op, temperature)
    if not (shard is None or (vocab_size is not None and vocab_size > 0 and shard.start >= 0)):
        raise ValueError(
            f"{op}: a shard from row {getattr(shard, 'start', 0)} on and vocab_size {vocab_size}; "
            "want both >= 0 and vocab_size, the size of the whole vocabulary: all ranks must cut "
            "the same chunks of rows"
        )
    V = head_VD.shape[0] if vocab_size is None else vocab_size
    if not (shard is not None or 0 < V <= head_VD.shape[0]):
        raise ValueError(
            f"{op}: vocab_size is {V} and the head has {head_VD.shape[0]} rows; want 1 <= "
            "vocab_size <= rows"
        )
    return V


def check_softcap(op: str, softcap: float | None) -> float:
    """0.0 stands for no cap inside the ops: a schema cannot branch on None in a kernel."""
    if not (softcap is None or softcap > 0):
        raise ValueError(f"{op}: softcap is {softcap}; want > 0, or None for no cap")
    return softcap or 0.0


def check_logit_scale(op: str, logit_scale: float) -> float:
    if not (0 < logit_scale < float("inf")):
        raise ValueError(f"{op}: logit_scale is {logit_scale}; want > 0, 1 for none")
    return logit_scale


def check_bias(op: str, bias_V: Tensor | None, head_VD: Tensor) -> Tensor | None:
    if not (bias_V is None or (bias_V.shape == head_VD.shape[:1] and bias_V.is_floating_point())):
        raise ValueError(
            f"{op}: bias is {getattr(bias_V, 'dtype', None)} {list(getattr(bias_V, 'shape', []))} "
            f"for a head of {head_VD.shape[0]} rows; want floats, one a row"
        )
    return bias_V


def workspace_that_fits(
    device: torch.device | str,
    share: float = 0.25,
    tokens: int = 2**16,
    vocab: int = 2**18,
    dtype: torch.dtype = torch.bfloat16,
) -> int:
    """MiB for `workspace_mb` from the memory that is free now: `workspace_for` of _plan.py, 300 to
    4800; WORKSPACE_MB on a CPU, whose chunks are bound by its caches.

    tokens and vocab of the largest call: more than they can use is not taken. Ask once, when
    everything else is allocated, and keep the answer: it decides in which order the head's gradient
    is summed, so that two runs are equal only with equal sizes.
    """
    device = torch.device(device)
    cuda = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if cuda else 0
    fits = workspace_for(free, tokens, vocab, dtype.itemsize, share)
    return fits if cuda else WORKSPACE_MB


def check_rows(op: str, rows_M: Tensor | None, hidden_TD: Tensor) -> Tensor | None:
    """The rows to work on, int64 [M], or None. Values are read on a CPU: a GPU would wait."""
    if not (rows_M is None or (rows_M.ndim == 1 and rows_M.dtype in (torch.int32, torch.int64))):
        raise ValueError(
            f"{op}: rows is {getattr(rows_M, 'dtype', None)} {list(getattr(rows_M, 'shape', []))}; "
            "want distinct row numbers, int64 [M]. A mask becomes one by mask.nonzero()[:, 0], "
            "best where the batch is packed: on a GPU it waits"
        )
    if rows_M is not None:
        check_row_numbers(op, rows_M, hidden_TD.shape[0])
    return None if rows_M is None else rows_M.long()


def fold_scale(temperature: float, logit_scale: float, softcap: float) -> tuple[float, float]:
    """(factor of the logits, further factor of the gradients): under a cap, 1/T stays alone."""
    return (1 / temperature, logit_scale) if softcap else (logit_scale / temperature, 1.0)


def chunks(
    x: Tensor, V: int, buffers: float, workspace_mb: float, rows_M: Tensor | None = None
) -> Iterator[Rows]:
    """Row ranges of x, or parts of rows_M, whose `buffers` [rows, V] buffers fit workspace_mb MiB.

    Always at least one row; multiples of 128 rows where the budget allows, the tile height of a
    GEMM.
    """
    for part in parts(chunk_plan(x, V, buffers, workspace_mb), x, rows_M):
        yield part.rows


def chunk_plan(x: Tensor, V: int, buffers: float, workspace_mb: float) -> Plan:
    """The plan of `chunks`: every chunk is its own group."""
    row_bytes = V * wide(x.dtype).itemsize
    size = int(workspace_mb * MIB / (buffers * row_bytes))
    if not on_gpu(x):
        size = min(size, max(CPU_CHUNK_BYTES // row_bytes, 128))
    size = max(1, size - size % 128 if size >= 128 else size)
    return Plan(size, size)


def parts(plan: Plan, x: Tensor, rows_M: Tensor | None = None) -> Iterator[Part]:
    """The rows of x, or rows_M, chunk by chunk and group by group."""
    total = x.shape[0] if rows_M is None else rows_M.shape[0]
    for start in range(0, total, plan.chunk):
        stop = start + plan.chunk
        first = start - start % plan.group
        c, g = slice(start, stop), slice(first, stop)
        ends = stop >= total or stop % plan.group == 0
        if rows_M is None:
            yield Part(c, start - first, g if ends else None)
        else:
            yield Part(rows_M[c], start - first, rows_M[g] if ends else None)


def head_plan(
    x_TD: Tensor,
    V: int,
    blocks: tuple[float, float],
    teacher: int,
    need: tuple[bool, bool, bool],
    workspace_mb: float,
    rows_M: Tensor | None = None,
) -> Plan:
    """How a linear_* op cuts its rows. `plan_for` on tensor cores, whose 16-bit gradients have a
    block of their own; else they overwrite the logits, and a group is a chunk.

    blocks: [rows, V] blocks in the wide dtype alive at once beside the gradient, with kernels and
    with PyTorch alone. teacher: hidden size of the teacher whose logits are made, too; 0: none.
    need: of hidden, head and bias. V, the same on all ranks of a sharded vocabulary.
    """
    if not (on_tensor_cores(x_TD) and any(need)):
        return chunk_plan(x_TD, V, workspace_buffers(x_TD, *blocks), workspace_mb)
    total, item = x_TD.shape[0] if rows_M is None else rows_M.shape[0], x_TD.dtype.itemsize
    logits = math.ceil(4 * workspace_buffers(x_TD, *blocks))
    work = Work(total, max(V, 1), x_TD.shape[1], teacher, item, logits, item, *need[:2])
    return plan_for(work, int(workspace_mb * MIB))


def logits_ref(
    hidden_TD: Tensor,
    head_VD: Tensor,
    bias_V: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """The definition of logits [T, V] in every <op>_ref. fp32 arithmetic, or fp64 for fp64."""
    dtype = wide(hidden_TD.dtype)
    logits_TV = hidden_TD.to(dtype) @ head_VD[:vocab_size].to(dtype).t()
    logits_TV = logit_scale * (
        logits_TV if bias_V is None else logits_TV + bias_V[:vocab_size].to(dtype)
    )
    return softcap * torch.tanh(logits_TV / softcap) if softcap else logits_TV


def on_tensor_cores(x: Tensor) -> bool:
    """16-bit GEMMs with fp32 output exist on CUDA only; a CPU upcasts."""
    return on_gpu(x) and x.dtype.itemsize == 2


def project(
    hidden_CD: Tensor,
    head_VD: Tensor,
    softcap: float = 0.0,
    bias_V: Tensor | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """logits [C, V] in fp32 or fp64. Without a cap logit_scale is left to the caller: `fold_scale`.

    Where kernels run, rows lie PAD-aligned in memory, -inf from column V on: `padded` shows those.
    """
    (C, _), V, dtype = hidden_CD.shape, head_VD.shape[0], wide(hidden_CD.dtype)
    block = hidden_CD.new_empty(C, _width(hidden_CD, V), dtype=dtype)
    logits_CV = block[:, :V]
    # it reaches into a custom op and would round logits to 16 bits
    with torch.autocast(hidden_CD.device.type, enabled=False):
        if on_tensor_cores(hidden_CD):
            torch.mm(hidden_CD, head_VD.t(), out_dtype=torch.float32, out=logits_CV)
        else:
            torch.mm(hidden_CD.to(dtype), head_VD.to(dtype).t(), out=logits_CV)
    if bias_V is not None and bias_V.numel():
        logits_CV += bias_V
    if softcap:
        logits_CV.mul_(logit_scale / softcap).tanh_().mul_(softcap)
    block[:, V:] = -torch.inf
    return logits_CV


def _width(x: Tensor, V: int) -> int:
    return -(-max(V, 1) // PAD) * PAD if runs_triton(x) else V


def padded(block_CV: Tensor) -> Tensor:
    """A block of `project` or `gradient_block` with its pad columns, for row kernels.

    Width and stride are multiples of PAD; the pads are banned tokens, which change no sum. GEMMs
    take the block itself.
    """
    width = _width(block_CV, block_CV.shape[1])
    return (
        block_CV.as_strided((block_CV.shape[0], width), (width, 1))
        if width != block_CV.shape[1]
        else block_CV
    )


def padded_copy(x_CV: Tensor, block_CV: Tensor) -> Tensor:
    """x as `padded(block)` would show it, in the block's dtype; x itself where nothing differs."""
    width = _width(block_CV, x_CV.shape[1])
    if width == x_CV.shape[1]:
        return x_CV.to(block_CV.dtype)
    copy_CV = block_CV.new_full((len(x_CV), width), -torch.inf)
    copy_CV[:, : x_CV.shape[1]] = x_CV
    return copy_CV


def lift_for(x: Tensor, largest: float) -> float:
    """What dlogits carry as a factor until their GEMMs: a power of two in fp16, else 1.

    largest: a bound of |dlogits| at the largest weight. Unlifted, all below 6e-8 would be lost;
    lifted, 4e-12 for a bound of 4. Beyond the bound `narrow` cuts.
    """
    if not (on_tensor_cores(x) and x.dtype == torch.float16):
        return 1.0
    return 2.0 ** math.floor(math.log2(FP16_MAX / max(largest, 1e-3)))


def unit_above(sizes_T: Tensor, used_T: Tensor | None = None) -> Tensor:
    """The power of two [] at or above the largest finite size of the rows that are used; 1 without
    any. A row that is ignored, or not finite, says nothing about the others' size.
    """
    counts_T = sizes_T.isfinite() if used_T is None else sizes_T.isfinite() & used_T
    largest = torch.where(counts_T, sizes_T, 0.0).amax()
    return torch.where(largest > 0, torch.exp2(largest.log2().ceil()), 1.0)


def narrow(d_CV: Tensor, like: Tensor) -> Tensor:
    """d, in place, as it may be stored in the dtype of `like`: fp16 ends at 65504."""
    if like.dtype != torch.float16 or d_CV.dtype == torch.float16:
        return d_CV
    return torch.where(d_CV.isfinite(), d_CV.clamp(-FP16_MAX, FP16_MAX), d_CV)


def gradient_block(logits_CV: Tensor, hidden_CD: Tensor) -> Tensor:
    """Where a row kernel writes dlogits: over the logits, or beside them in bf16 for bf16 GEMMs."""
    if not (on_tensor_cores(hidden_CD) and hidden_CD.dtype == torch.bfloat16):
        return logits_CV
    C, V = logits_CV.shape
    return hidden_CD.new_empty(C, _width(hidden_CD, V))[:, :V]


def gradient_room(hidden_TD: Tensor, rows: int, V: int) -> Tensor:
    """[rows, V] for 16-bit dlogits on tensor cores, rows as `project` lays them; else empty."""
    if not (rows and on_tensor_cores(hidden_TD)):
        return hidden_TD.new_empty(0)
    return hidden_TD.new_empty(rows, _width(hidden_TD, V))


def backproject(
    dlogits_CV: Tensor,
    hidden_CD: Tensor,
    head_VD: Tensor,
    need_dhidden: bool,
    dhead_VD: Tensor | None,
    dbias_V: Tensor | None = None,
    lift: float = 1.0,
) -> Tensor | None:
    """dhidden [C, D] = d @ head, or None; adds d.T @ hidden to dhead, sum to dbias; d = dlogits /
    lift, a power of two. dhidden is fp32 if lifted, else like hidden.

    dhead and dbias are fp32 or fp64. 16-bit dlogits go through the GEMMs as they are, with fp32
    sums: bf16 ones as everywhere in training, fp16 ones lifted (`lift_for`), as a loss scale comes
    only in the backward. Others are multiplied in their own dtype.
    """
    d_CV, factor = dlogits_CV, 1 / lift
    if d_CV.dtype == torch.float32 and hidden_CD.dtype == torch.bfloat16:
        d_CV = gradient_block(dlogits_CV, hidden_CD)
        d_CV = d_CV if d_CV is dlogits_CV else d_CV.copy_(dlogits_CV)
    if dbias_V is not None:
        dbias_V.add_(dlogits_CV.sum(0, dtype=dbias_V.dtype), alpha=factor)
    # it reaches into a custom op and would round d to 16 bits
    with torch.autocast(hidden_CD.device.type, enabled=False):
        if d_CV.dtype.itemsize != 2:
            if dhead_VD is not None:
                dhead_VD.addmm_(d_CV.t(), hidden_CD.to(d_CV.dtype), alpha=factor)
            return (d_CV @ head_VD.to(d_CV.dtype)).to(hidden_CD.dtype) if need_dhidden else None
        if dhead_VD is not None:
            to = dhead_VD
            torch.addmm(to, d_CV.t(), hidden_CD, alpha=factor, out_dtype=torch.float32, out=to)
        if not need_dhidden:
            return None
        if lift == 1:
            return d_CV @ head_VD
        wide_CD = hidden_CD.new_empty(len(d_CV), head_VD.shape[1], dtype=torch.float32)
        torch.mm(d_CV, head_VD, out_dtype=torch.float32, out=wide_CD)
        return wide_CD.mul_(factor)


def gradient_buffers(
    hidden_TD: Tensor, head_VD: Tensor, need_dhidden: bool, need_dhead: bool
) -> tuple[Tensor, Tensor]:
    """Zeros: dhidden like hidden, dhead in fp32 or fp64; an empty tensor where not needed."""
    dhidden_TD = hidden_TD.new_zeros(hidden_TD.shape if need_dhidden else (0,))
    dhead_VD = hidden_TD.new_zeros(head_VD.shape if need_dhead else (0,), dtype=wide(head_VD.dtype))
    return dhidden_TD, dhead_VD


def needs_gradient(x: Tensor | None, frozen: bool = False) -> bool:
    """Does the op have to make x's gradient? A custom op cannot see needs_input_grad itself."""
    return x is not None and torch.is_grad_enabled() and x.requires_grad and not frozen


def needs_gradients(hidden_TD: Tensor, head_VD: Tensor, frozen_head: bool) -> tuple[bool, bool]:
    return needs_gradient(hidden_TD), needs_gradient(head_VD, frozen_head)


def workspace_buffers(x: Tensor, with_kernel: float, with_torch: float) -> float:
    """[rows, V] buffers of a chunk alive at once: kernels work in place, PyTorch needs copies."""
    return with_kernel if runs_triton(x) else with_torch
