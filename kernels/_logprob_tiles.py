"""Statistics of log-probability straight from hidden states: logits that never leave the chip.

A program makes a tile of logits, hidden @ head.T with fp32 sums, and keeps of each of its rows

    top      = max_v x[v]
    total    = sum_v exp(x[v] - top)
    weighted = sum_v exp(x[v] - top) (x[v] - top), if the entropy is asked for

over the tile's columns, and the logits x of the targets among them; `merge_tiles` then goes over
the tiles of a row in their order. x is what `Head.logits` and `logprob_stats` make of a product:
bias, logit_scale, soft cap, 1 / temperature. No atomics: two runs give the same bits.

Programs stay and take tile after tile, GROUP blocks of rows by all columns: within a group the rows
change fastest, so that a tile of the head is read from memory once and the group's hidden states
stay in the cache. Operands come by tensor descriptors (TMA) where the GPU has them and the layout
allows, else by masked loads.

The result of 16-bit operands differs from that of `project` and `logprob_rows` by the order of
fp32 sums. Memory: 12 bytes a row and tile, where logits take 4 a row and column.

Shapes: T tokens, C rows of a chunk, N tiles of columns, D hidden, V vocabulary, K candidates.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import _triton
from ._chunks import Rows, head_plan, padded
from ._divergence import exp_diff
from ._head import Head
from ._logprob_rows import logprob_rows, merge_slices
from ._plan import MIB, TILE, Plan
from ._triton import INTERPRET, LAUNCH, Described, launch, runs_triton, tl, triton

MERGE_ROWS, MERGE_TILES = 32, 32  # a merging program's
FIRST_WITH_TMA = 9  # compute capability


class Tiles(NamedTuple):
    """How `head_tiles` is launched."""

    rows: int
    columns: int
    depth: int  # of D at once
    group: int  # blocks of rows whose hidden states the cache holds
    warps: int
    stages: int
    flatten: bool = False  # one loop over tiles and depth: loads of the next tile in the epilogue
    programs: int = 1  # a multiprocessor: the products of one hide the epilogue of another


# none of them timed yet: no spills, in the shared memory of sm_90 and sm_100, of sm_80
HOPPER, AMPERE = Tiles(128, 256, 64, 16, 8, 4, True), Tiles(128, 128, 64, 16, 8, 3)
TILES: Tiles | None = None  # instead of both, for tests and sweeps
DESCRIPTORS = True  # where they are possible


@triton.jit
def _row_major(tile, T, V, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    # (block of rows, block of columns) of a tile
    blocks = tl.cdiv(T, BLOCK_M)
    of_group = GROUP * tl.cdiv(V, BLOCK_N)
    first = tile // of_group * GROUP
    height = tl.minimum(blocks - first, GROUP)
    return first + tile % of_group % height, tile % of_group // height


@triton.jit
def _product(
    hidden,
    head,
    first_t,
    first_v,
    stride_t,
    stride_d,
    stride_v,
    stride_w,
    T,
    V,
    D,
    TMA: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # hidden @ head.T of the rows and columns from first_t, first_v on; zeros beyond T and V
    t, v = first_t + tl.arange(0, BLOCK_M), first_v + tl.arange(0, BLOCK_N)
    x = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first_d in range(0, D, BLOCK_D):
        if TMA:
            a = hidden.load([first_t, first_d])
            b = head.load([first_v, first_d])
        else:
            d = first_d + tl.arange(0, BLOCK_D)
            # V=262k times D=8k overflows int32
            at_a = t.to(tl.int64)[:, None] * stride_t + d[None, :] * stride_d
            at_b = v.to(tl.int64)[:, None] * stride_v + d[None, :] * stride_w
            a = tl.load(hidden + at_a, mask=(t < T)[:, None] & (d < D)[None, :], other=0.0)
            b = tl.load(head + at_b, mask=(v < V)[:, None] & (d < D)[None, :], other=0.0)
        if UPCAST:  # the interpreter multiplies bf16 wrongly
            a, b = a.to(tl.float32), b.to(tl.float32)
        x = tl.dot(a, b.T, x)
    return x


@triton.jit
def _tanh(y):
    # absolute error 1e-7: what is left of a soft cap of 30 is the rounding of a logit of 30
    e = tl.exp(-2.0 * tl.abs(y))
    size = (1.0 - e) / (1.0 + e)
    return tl.where(y < 0, -size, size)


@triton.jit
def _halves(x):
    return x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def _logits(x, bias, v, V, inv_temp, into_cap, cap, CAPPED: tl.constexpr):
    # of products x in columns v
    if bias is not None:
        x += tl.load(bias + v, mask=v < V, other=0.0).to(tl.float32)[None, :]
    if CAPPED:
        x = _tanh(x * into_cap) * cap
    return tl.where((v < V)[None, :], x * inv_temp, float("-inf"))


@triton.jit
def _keep_chosen(x, target, chosen, t, v, first, T, K, WIDTH: tl.constexpr):
    # the logits of rows' targets among columns first .. first + WIDTH, which are v
    at = t.to(tl.int64) * K
    for k in range(0, K):
        y = tl.load(target + at + k, mask=t < T, other=-1)
        mine = (y >= first) & (y < first + WIDTH)
        if tl.max(mine.to(tl.int32), 0) > 0:
            x_k = tl.sum(tl.where(v[None, :] == y[:, None], x, 0.0), 1)
            tl.store(chosen + at + k, x_k, mask=mine)


@triton.jit
def _merged(m, s, w, m_n, s_n, w_n, ENTROPY: tl.constexpr):
    # (max, sum of e = exp(x - max), sum of e (x - max)) of two sets of columns
    m_new = tl.maximum(m, m_n)
    old, new = exp_diff(m, m_new), exp_diff(m_n, m_new)
    if ENTROPY:
        w = tl.where(old > 0, old * (w + s * (m - m_new)), 0.0)
        w += tl.where(new > 0, new * (w_n + s_n * (m_n - m_new)), 0.0)
    return m_new, s * old + s_n * new, w


@triton.jit
def _tile_statistics(
    x,
    bias,
    target,
    chosen,
    t,
    first_v,
    T,
    V,
    K,
    inv_temp,
    into_cap,
    cap,
    ENTROPY: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # max and sums of a tile's rows, their targets' logits stored; by quarters, because registers do
    # not hold a whole tile and what is made of it
    left, right = _halves(x)
    x_0, x_1 = _halves(left)
    x_2, x_3 = _halves(right)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    s = tl.zeros((BLOCK_M,), tl.float32)
    w = tl.zeros((BLOCK_M,), tl.float32)
    for part in tl.static_range(4):
        first = first_v + part * (BLOCK_N // 4)
        v = first + tl.arange(0, BLOCK_N // 4)
        x = (x_0, x_1, x_2, x_3)[part]
        x = _logits(x, bias, v, V, inv_temp, into_cap, cap, CAPPED)
        _keep_chosen(x, target, chosen, t, v, first, T, K, BLOCK_N // 4)
        m_n = tl.max(x, 1)
        x -= tl.where(m_n == float("-inf"), 0.0, m_n)[:, None]
        e = tl.exp(x)
        w_n = tl.sum(tl.where(e > 0, e * x, 0.0), 1) if ENTROPY else w
        m, s, w = _merged(m, s, w, m_n, tl.sum(e, 1), w_n, ENTROPY)
    return m, s, w


@triton.jit
def head_tiles(
    hidden,
    head,
    bias,
    target,
    chosen,
    top,
    total,
    weighted,
    stride_t,
    stride_d,
    stride_v,
    stride_w,
    T,
    V,
    D,
    K,
    inv_temp,
    into_cap,
    cap,
    ENTROPY: tl.constexpr,
    CAPPED: tl.constexpr,
    TMA: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    tiles = tl.cdiv(T, BLOCK_M) * tl.cdiv(V, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        block_m, block_n = _row_major(tile, T, V, BLOCK_M, BLOCK_N, GROUP)
        t, first_v = block_m * BLOCK_M + tl.arange(0, BLOCK_M), block_n * BLOCK_N
        x = _product(
            hidden,
            head,
            block_m * BLOCK_M,
            first_v,
            stride_t,
            stride_d,
            stride_v,
            stride_w,
            T,
            V,
            D,
            TMA,
            UPCAST,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
        )
        m, s, w = _tile_statistics(
            x,
            bias,
            target,
            chosen,
            t,
            first_v,
            T,
            V,
            K,
            inv_temp,
            into_cap,
            cap,
            ENTROPY,
            CAPPED,
            BLOCK_M,
            BLOCK_N,
        )
        at = block_n.to(tl.int64) * T + t
        tl.store(top + at, m, mask=t < T)
        tl.store(total + at, s, mask=t < T)
        if ENTROPY:
            tl.store(weighted + at, w, mask=t < T)


@triton.jit
def merge_tiles(
    top,
    total,
    weighted,
    row_top,
    row_total,
    row_weighted,
    T,
    N,
    ENTROPY: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    # [N, T] statistics of tiles to those of rows; lane i of a row takes tiles i, i + STEP ...
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m = tl.full((STEP, ROWS), float("-inf"), tl.float32)
    s = tl.zeros((STEP, ROWS), tl.float32)
    w = tl.zeros((STEP, ROWS), tl.float32)
    for first in range(0, N, STEP):
        n = first + tl.arange(0, STEP)
        at = n.to(tl.int64)[:, None] * T + t[None, :]
        live = (n < N)[:, None] & (t < T)[None, :]
        m_n = tl.load(top + at, mask=live, other=float("-inf"))
        s_n = tl.load(total + at, mask=live, other=0.0)
        w_n = tl.load(weighted + at, mask=live, other=0.0) if ENTROPY else w
        m, s, w = _merged(m, s, w, m_n, s_n, w_n, ENTROPY)
    M = tl.max(m, 0)
    scale = exp_diff(m, M[None, :])
    tl.store(row_top + t, M, mask=t < T)
    tl.store(row_total + t, tl.sum(s * scale, 0), mask=t < T)
    if ENTROPY:
        w = tl.where(scale > 0, scale * (w + s * (m - M[None, :])), 0.0)
        tl.store(row_weighted + t, tl.sum(w, 0), mask=t < T)


def statistics_plan(
    hidden_TD: Tensor,
    V: int,
    blocks: tuple[int, int],
    need: tuple[bool, bool, bool],
    workspace_mb: float,
    rows_M: Tensor | None,
) -> tuple[bool, Plan]:
    """(whether `chunk_statistics` uses tiles, how to cut the rows). The arguments of `head_plan`.

    Tiles if REFLUX_KERNELS_FUSED=1 says so, where kernels run, for 16-bit operands, and if nobody
    needs a gradient that is made from the logits.
    """
    half = hidden_TD.dtype.itemsize == 2
    if _triton.FUSED and runs_triton(hidden_TD) and half and not any(need):
        return True, tile_plan(hidden_TD, V, workspace_mb)
    return False, head_plan(hidden_TD, V, blocks, 0, need, workspace_mb, rows_M)


def chunk_statistics(
    fused: bool,
    head: Head,
    c: Rows,
    target_CK: Tensor,
    temperature: float,
    entropy: bool,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The logits of a chunk, empty if fused, and what `logprob_rows` gives for them."""
    if fused:
        found = logprob_tiles(head, c, target_CK, temperature, entropy, group)
        return head.hidden_TD.new_empty(0), *found
    logits_CV, (scale, _) = head.logits(c), head.scales(temperature)
    return logits_CV, *logprob_rows(padded(logits_CV), target_CK, scale, entropy, group)


def tiles_for(x: Tensor) -> Tiles:
    # sm_120 has descriptors, but 99 KB of shared memory, as sm_86 and sm_89: HOPPER wants 192
    return TILES or (AMPERE if x.is_cuda and _capability(x) not in (9, 10) else HOPPER)


def tile_plan(hidden_TD: Tensor, V: int, workspace_mb: float) -> Plan:
    """Chunks of rows whose statistics and gathered hidden states fit workspace_mb MiB."""
    (_, D), columns = hidden_TD.shape, tiles_for(hidden_TD).columns
    row_bytes = 12 * -(-max(V, 1) // columns) + hidden_TD.dtype.itemsize * D
    rows = max(1, int(workspace_mb * MIB / row_bytes))
    rows -= rows % TILE if rows >= TILE else 0
    return Plan(rows, rows)


def logprob_tiles(
    head: Head, c: Rows, target_CK: Tensor, temperature: float, entropy: bool, group: str = ""
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `logprob_rows` gives for `head.logits(c)`, which are never written."""
    x_CD, tiles = head.hidden_TD[c], tiles_for(head.hidden_TD)
    (C, K), V = target_CK.shape, len(head.head_VD)
    N = -(-V // tiles.columns)
    chosen_CK = x_CD.new_empty(C, K, dtype=torch.float32)
    stats = [
        x_CD.new_empty(N, C if wanted else 0, dtype=torch.float32)
        for wanted in (True, True, entropy)
    ]
    _launch_tiles(head, x_CD, target_CK, temperature, (chosen_CK, *stats), tiles)
    top_C, total_C, weighted_C = (
        x_CD.new_empty(n, dtype=torch.float32) for n in (C, C, C if entropy else 0)
    )
    launch(
        merge_tiles,
        (-(-C // MERGE_ROWS),),
        *stats,
        top_C,
        total_C,
        weighted_C,
        C,
        N,
        ENTROPY=entropy,
        ROWS=MERGE_ROWS,
        STEP=MERGE_TILES,
        **LAUNCH,
    )
    return merge_slices(chosen_CK, top_C, total_C, weighted_C, target_CK, group)


def _launch_tiles(
    head: Head,
    x_CD: Tensor,
    target_CK: Tensor,
    temperature: float,
    out: tuple[Tensor, ...],
    tiles: Tiles,
) -> None:
    """out: chosen [C, K]; top, total, weighted [N, C]."""
    (C, D), w_VD, bias_V = x_CD.shape, head.head_VD, head.bias_V
    blocks = -(-C // tiles.rows) * -(-len(w_VD) // tiles.columns)
    operands = (
        Described(x_CD, (tiles.rows, tiles.depth)),
        Described(w_VD, (tiles.columns, tiles.depth)),
    )
    tma = DESCRIPTORS and _has_tma(x_CD) and all(x.possible() for x in operands)
    scale, _ = head.scales(temperature)
    launch(
        head_tiles,
        (min(blocks, tiles.programs * _multiprocessors(x_CD)),),
        *(operands if tma else (x_CD, w_VD)),
        None if bias_V is None else bias_V.contiguous(),
        target_CK,
        *out,
        *x_CD.stride(),
        *w_VD.stride(),
        C,
        len(w_VD),
        D,
        target_CK.shape[1],
        scale,
        head.logit_scale / head.softcap if head.softcap else 1.0,
        head.softcap or 1.0,
        ENTROPY=out[-1].numel() > 0,
        CAPPED=head.softcap > 0,
        TMA=tma,
        UPCAST=INTERPRET,
        BLOCK_M=tiles.rows,
        BLOCK_N=tiles.columns,
        BLOCK_D=tiles.depth,
        GROUP=tiles.group,
        FLATTEN=tiles.flatten,
        **LAUNCH | {"num_warps": tiles.warps, "num_stages": tiles.stages},
    )


def _has_tma(x: Tensor) -> bool:
    return not x.is_cuda or _capability(x) >= FIRST_WITH_TMA


def _capability(x: Tensor) -> int:
    return torch.cuda.get_device_capability(x.device)[0]


def _multiprocessors(x: Tensor) -> int:
    """Of its device; a few where the interpreter runs the programs."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 3
