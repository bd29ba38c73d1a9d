"""The one list of ops that are timed: shapes, inputs, unavoidable work, goals, peers.

A case's floor is bytes / bandwidth + flop / rate with what an H200 gives: 4.3 TB/s copied, 790
TFLOP/s in bf16; GEMMs and row sweeps of one chunk follow each other, so they add. Times are of
forward and backward unless the name says forward.

Shapes: T tokens, V vocabulary, D student hidden, E teacher hidden, K topk ids.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from unittest.mock import patch

import torch
from torch import Tensor

from reflux.kernels import _triton
from reflux.kernels._classes import class_map
from reflux.kernels.align_spans import align_spans, align_spans_ref
from reflux.kernels.bucket_kl import bucket_kl, bucket_kl_ref
from reflux.kernels.class_logprob import class_logprob, class_logprob_ref
from reflux.kernels.linear_dense_kl import linear_dense_kl, linear_dense_kl_ref
from reflux.kernels.linear_kl import linear_kl, linear_kl_ref
from reflux.kernels.linear_logprob import linear_logprob, linear_logprob_ref
from reflux.kernels.linear_nll import linear_nll, linear_nll_ref
from reflux.kernels.linear_topk_kl import linear_topk_kl, linear_topk_kl_ref
from reflux.kernels.renormalised_topk_kl import renormalised_topk_kl, renormalised_topk_kl_ref
from reflux.kernels.span_sum import span_sum, span_sum_ref
from reflux.kernels.teacher_sample import teacher_sample
from reflux.kernels.teacher_topk import teacher_topk, teacher_topk_ref
from reflux.kernels.token_kl import token_kl, token_kl_ref
from reflux.kernels.token_logprob import token_logprob, token_logprob_ref
from reflux.kernels.topk_tail_kl import topk_tail_kl, topk_tail_kl_ref

from . import peers

BANDWIDTH, FLOPS = 4.3e12, 790e12  # B/s, FLOP/s
Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Shape:
    name: str
    T: int
    V: int
    D: int
    E: int
    K: int = 64
    dtype: str = "bfloat16"


QWEN = Shape("qwen", T=8192, V=151_936, D=2048, E=4096)
GEMMA = Shape("gemma", T=8192, V=262_144, D=2048, E=4096)
TINY = Shape("tiny", T=12, V=96, D=16, E=24, K=8)
# for a record of a CPU: narrow, so that most of the time is what the ops differ in
CPU = Shape("cpu", T=2048, V=32_000, D=128, E=128, dtype="float32")


def at_tokens(shape: Shape, T: int) -> Shape:
    return replace(shape, name=f"{shape.name} T={T}", T=T)


@dataclass(frozen=True)
class Case:
    """`ours` and every peer are called with `args` and return a scalar; leaves get gradients."""

    shape: Shape
    args: tuple
    ours: Loss
    peers: dict[str, Loss]
    bytes: int = 0  # that any implementation must move besides the GEMMs' operands
    flop: int = 0  # of the GEMMs that the algorithm needs
    backward: bool = True
    goal_ms: float | None = None  # at QWEN, on one H200
    goal_mib: float | None = None  # peak above inputs and returned gradients
    compare: bool = True  # do the peers return the same number?
    peer_args: dict[str, tuple] = field(default_factory=dict)  # where a peer wants another layout

    @property
    def floor_ms(self) -> float:
        return (self.bytes / BANDWIDTH + self.flop / FLOPS) * 1e3

    def step(self, name: str) -> Callable[[], Tensor]:
        """One timed call of "ours" or of a peer, without gradients of the round before."""
        fn = self.ours if name == "ours" else self.peers[name]
        args = self.peer_args.get(name, self.args)
        leaves = [x for x in args if isinstance(x, Tensor) and x.requires_grad]

        def run() -> Tensor:
            for x in leaves:
                x.grad = None
            loss = fn(*args)
            if self.backward:
                loss.backward()
            return loss.detach()

        return run

    @property
    def gradient_mib(self) -> float:
        """What the caller gets back and keeps: it is no cost of an implementation."""
        if not self.backward:
            return 0.0
        return sum(x.nbytes for x in self.args if isinstance(x, Tensor) and x.requires_grad) / 2**20


def _randn(s: Shape, *shape: int, device: str, grad: bool = False, scale: float = 1.0) -> Tensor:
    dtype = getattr(torch, s.dtype)
    return (torch.randn(*shape, device=device, dtype=dtype) * scale).requires_grad_(grad)


def _student(s: Shape, device: str) -> tuple[Tensor, Tensor]:
    return _randn(s, s.T, s.D, device=device, grad=True), _randn(
        s, s.V, s.D, device=device, grad=True, scale=s.D**-0.5
    )


def _teacher(s: Shape, device: str) -> tuple[Tensor, Tensor]:
    return _randn(s, s.T, s.E, device=device), _randn(s, s.V, s.E, device=device, scale=s.E**-0.5)


def _targets(s: Shape, device: str) -> Tensor:
    return torch.randint(s.V, (s.T,), device=device)


def _with_compile(ours: Loss) -> dict[str, Loss]:
    return {"torch": ours, "torch.compile": peers.compiled(ours)}


def _optional(peer_losses: dict[str, Loss | None]) -> dict[str, Loss]:
    return {name: fn for name, fn in peer_losses.items() if fn is not None}


def _linear_kl(s: Shape, device: str, divergence: str = "forward") -> Case:
    options, beta = ({"divergence": divergence}, 0.5 if divergence == "jsd" else None)
    peer_losses = _with_compile(lambda *args: linear_kl_ref(*args, **options).total)
    peer_losses["chunked"] = lambda *args: peers.chunked_kl(*args, beta=beta)
    if trl := peers.trl().get("linear_kl"):
        peer_losses["trl"] = lambda *args: trl(*args, beta or 0.0)
    if divergence == "jsd":
        peer_losses |= _optional(
            {
                "liger": peers.liger().get("linear_kl jsd"),
                "liger chunked": peers.liger().get("linear_kl jsd chunked"),
            }
        )
    return Case(
        s,
        (*_student(s, device), *_teacher(s, device)),
        lambda *args: linear_kl(*args, **options).total,
        peer_losses,
        bytes=(10 if divergence == "forward" else 14) * s.T * s.V,
        flop=2 * s.T * s.V * (3 * s.D + s.E),
        goal_ms=43,
        goal_mib=2560,
    )


def _linear_dense_kl(s: Shape, device: str) -> Case:
    return Case(
        s,
        (*_student(s, device), _randn(s, s.T, s.V, device=device)),
        lambda *args: linear_dense_kl(*args).total,
        _with_compile(lambda *args: linear_dense_kl_ref(*args).total),
        bytes=12 * s.T * s.V,
        flop=2 * s.T * s.V * 3 * s.D,
    )


def _linear_topk_kl(s: Shape, device: str) -> Case:
    topk = teacher_topk(*_teacher(s, device), s.K)
    peer_losses = _with_compile(lambda *args: linear_topk_kl_ref(*args).total) | {
        "chunked": peers.chunked_topk_kl
    }
    return Case(
        s,
        (*_student(s, device), *topk),
        lambda *args: linear_topk_kl(*args).total,
        peer_losses,
        bytes=10 * s.T * s.V,
        flop=2 * s.T * s.V * 3 * s.D,
        goal_ms=25,
        goal_mib=2560,
    )


def _renormalised_topk_kl(s: Shape, device: str) -> Case:
    ids_TK, logp_TK, _ = teacher_topk(*_teacher(s, device), s.K)
    peer_losses = _with_compile(lambda *args: renormalised_topk_kl_ref(*args).total)
    peer_losses["head GEMM"] = lambda x, w, i, q: linear_topk_kl(x, w, i, q, tail="renorm").total
    return Case(
        s,
        (*_student(s, device), ids_TK, logp_TK),
        lambda *args: renormalised_topk_kl(*args).total,
        peer_losses,
        bytes=3 * s.T * s.K * s.D * 2,
        goal_ms=5,
        goal_mib=1300,
    )


def _topk_tail_kl(s: Shape, device: str) -> Case:
    topk = teacher_topk(*_teacher(s, device), s.K)
    args = _randn(s, s.T, s.V, device=device, grad=True), *topk
    return Case(
        s,
        args,
        lambda *args: topk_tail_kl(*args).total,
        _with_compile(lambda *args: topk_tail_kl_ref(*args).total),
        bytes=6 * s.T * s.V,
    )


def _token_kl(s: Shape, device: str) -> Case:
    peer_losses = _with_compile(lambda *args: token_kl_ref(*args).total) | _optional(
        {"liger": peers.liger().get("token_kl")}
    )
    return Case(
        s,
        (_randn(s, s.T, s.V, device=device, grad=True), _randn(s, s.T, s.V, device=device)),
        lambda *args: token_kl(*args).total,
        peer_losses,
        bytes=10 * s.T * s.V,
        goal_ms=3.6,
    )


def _token_logprob(s: Shape, device: str, backward: bool = True) -> Case:
    logits_PV, target_T = _randn(s, s.T + 1, s.V, device=device), _targets(s, device)
    args = logits_PV[: s.T].requires_grad_(backward), target_T
    peer_losses = _with_compile(lambda *args: token_logprob_ref(*args).logp.sum())
    if not backward and (liger := peers.liger().get("token_logprob")):
        peer_losses["liger"] = liger
    return Case(
        s,
        args,
        lambda *args: token_logprob(*args).logp.sum(),
        peer_losses,
        bytes=(6 if backward else 2) * s.T * s.V,
        backward=backward,
        peer_args={"liger": (logits_PV, target_T)},
    )


def _linear_logprob(s: Shape, device: str, backward: bool = True) -> Case:
    s = replace(s, D=s.E)  # the goal is stated for the larger hidden size
    x_TD, w_VD = _student(s, device)
    args = (x_TD, w_VD) if backward else (x_TD.detach(), w_VD.detach())
    peer_losses = _with_compile(lambda *args: linear_logprob_ref(*args).logp.sum())
    peer_losses["chunked"] = lambda *args: -peers.chunked_nll(*args)
    peer_losses |= _optional({"trl": peers.trl().get("linear_logprob")})
    return Case(
        s,
        (*args, _targets(s, device)),
        lambda *args: linear_logprob(*args).logp.sum(),
        peer_losses,
        bytes=(10 if backward else 4) * s.T * s.V,
        flop=(4 if backward else 1) * 2 * s.T * s.V * s.D,
        backward=backward,
        goal_ms=62 if backward else 15,
    )


def _fused_logprob(s: Shape, device: str) -> Case:
    """Forward by tiles whose logits stay on the chip, against forward through chunks of logits."""

    def through(fused: bool) -> Loss:
        def loss(*args):
            with patch.object(_triton, "FUSED", fused):
                return linear_logprob(*args).logp.sum()

        return loss

    case = _linear_logprob(s, device, backward=False)
    peer_losses = {"torch": case.peers["torch"], "through logits": through(False)}
    return replace(case, ours=through(True), peers=peer_losses, bytes=0)


def _linear_nll(s: Shape, device: str) -> Case:
    peer_losses = (
        _with_compile(lambda *args: linear_nll_ref(*args).total)
        | {"chunked": peers.chunked_nll}
        | _optional(
            {
                "liger": peers.liger().get("linear_nll"),
                "torch linear_cross_entropy": peers.linear_cross_entropy(),
            }
        )
    )
    return Case(
        s,
        (*_student(s, device), _targets(s, device)),
        lambda *args: linear_nll(*args).total,
        peer_losses,
        bytes=10 * s.T * s.V,
        flop=3 * 2 * s.T * s.V * s.D,
    )


def _teacher_topk(s: Shape, device: str) -> Case:
    return Case(
        s,
        (*_teacher(s, device), s.K),
        lambda *args: teacher_topk(*args).tail.sum(),
        {"torch": lambda *args: teacher_topk_ref(*args).tail.sum()},
        bytes=8 * s.T * s.V,
        flop=2 * s.T * s.V * s.E,
        backward=False,
    )


def _teacher_sample(s: Shape, device: str) -> Case:
    def multinomial(x, w, n):
        return torch.multinomial((x @ w.t()).float().softmax(-1), n, replacement=True).sum()

    return Case(
        s,
        (*_teacher(s, device), s.K),
        lambda *args: teacher_sample(*args).ids.sum(),
        {"torch": multinomial},
        bytes=8 * s.T * s.V,
        flop=2 * s.T * s.V * s.E,
        backward=False,
        compare=False,
    )


def _first_byte_like(s: Shape, device: str):
    """257 classes of very different sizes, as first bytes are; fewer for few ids; none empty."""
    num = min(257, s.V)
    class_V = torch.multinomial(
        torch.arange(1, num + 1).double().reciprocal(), s.V, replacement=True
    )
    class_V[:num] = torch.arange(num)
    return class_map(class_V, num).to(device)


def _bucket_kl(s: Shape, device: str) -> Case:
    classes = _first_byte_like(s, device)
    x_TE, w_VE = _teacher(s, device)
    args = *_student(s, device), classes, x_TE, w_VE, classes
    return Case(
        s,
        args,
        lambda *args: bucket_kl(*args).total,
        {"torch": lambda *args: bucket_kl_ref(*args).total},
        bytes=14 * s.T * s.V,
        flop=2 * s.T * s.V * (3 * s.D + s.E),
    )


def _class_logprob(s: Shape, device: str) -> Case:
    return Case(
        s,
        (*_student(s, device), _first_byte_like(s, device)),
        lambda *args: class_logprob(*args).sum(),
        {"torch": lambda *args: class_logprob_ref(*args).sum()},
        bytes=14 * s.T * s.V,
        flop=4 * 2 * s.T * s.V * s.D,
    )


def _span_sum(s: Shape, device: str) -> Case:
    x_T = torch.randn(s.T, device=device, requires_grad=True)
    return Case(
        s,
        (x_T, torch.arange(s.T, device=device) // 3, s.T),
        lambda *args: span_sum(*args).sum(),
        _with_compile(lambda *args: span_sum_ref(*args).sum()),
        bytes=2 * (4 + 8 + 4) * s.T,
    )


def _align_spans(s: Shape, device: str) -> Case:
    rows = max(1, 64 * s.T // 8192)
    len_a, len_b = (torch.randint(1, 8, (rows, s.T), device=device) for _ in range(2))
    live = torch.ones(rows, s.T, dtype=torch.bool, device=device)
    loop = {} if device == "cuda" else {"loop": lambda *args: align_spans_ref(*args)[2].sum()}
    return Case(
        s,
        (len_a, len_b, live, live),
        lambda *args: align_spans(*args)[2].sum(),
        loop,
        bytes=2 * rows * s.T * 32,
        backward=False,
    )


OPS: dict[str, dict[str, Callable[[Shape, str], Case]]] = {  # op -> variant -> case
    "linear_kl": {"forward": _linear_kl, "jsd": lambda s, d: _linear_kl(s, d, "jsd")},
    "linear_dense_kl": {"forward": _linear_dense_kl},
    "linear_topk_kl": {"bucket": _linear_topk_kl},
    "renormalised_topk_kl": {"": _renormalised_topk_kl},
    "topk_tail_kl": {"bucket": _topk_tail_kl},
    "token_kl": {"forward": _token_kl},
    "linear_logprob": {
        "": _linear_logprob,
        "forward only": lambda s, d: _linear_logprob(s, d, backward=False),
        "forward only fused": _fused_logprob,
    },
    "linear_nll": {"": _linear_nll},
    "token_logprob": {
        "": _token_logprob,
        "forward only": lambda s, d: _token_logprob(s, d, backward=False),
    },
    "teacher_topk": {"": _teacher_topk},
    "teacher_sample": {"": _teacher_sample},
    "bucket_kl": {"257 classes": _bucket_kl},
    "class_logprob": {"257 classes": _class_logprob},
    "span_sum": {"": _span_sum},
    "align_spans": {"": _align_spans},
}
