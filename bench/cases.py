"""The one list of ops that are timed: shapes, inputs, the work that cannot be avoided, baselines.

A case's floor is max(bytes / bandwidth, flop / rate) with the rates of an H200: 4.3 TB/s copied, 790 TFLOP/s in bf16.
Shapes: T tokens, V vocabulary, D student hidden, E teacher hidden, K kept ids, S spans.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from reflux.kernels.align_spans import align_spans, align_spans_ref
from reflux.kernels.bucket_kl import bucket_kl, bucket_kl_ref
from reflux.kernels.class_logprob import class_logprob, class_logprob_ref, class_map
from reflux.kernels.linear_kl import linear_kl, linear_kl_ref
from reflux.kernels.linear_logprob import linear_logprob, linear_logprob_ref
from reflux.kernels.linear_nll import linear_nll, linear_nll_ref
from reflux.kernels.linear_topk_kl import linear_topk_kl, linear_topk_kl_ref
from reflux.kernels.renormalised_topk_kl import renormalised_topk_kl, renormalised_topk_kl_ref
from reflux.kernels.span_sum import span_sum, span_sum_ref
from reflux.kernels.teacher_topk import teacher_topk, teacher_topk_ref
from reflux.kernels.token_kl import token_kl, token_kl_ref
from reflux.kernels.token_logprob import token_logprob, token_logprob_ref
from reflux.kernels.topk_tail_kl import topk_tail_kl, topk_tail_kl_ref

BANDWIDTH, FLOPS = 4.3e12, 790e12  # B/s, FLOP/s


@dataclass(frozen=True)
class Shape:
    T: int
    V: int
    D: int
    E: int
    K: int = 64


QWEN = Shape(T=8192, V=151_936, D=2048, E=4096)
GEMMA = Shape(T=8192, V=262_144, D=2048, E=4096)
TINY = Shape(T=12, V=96, D=16, E=24, K=8)


@dataclass(frozen=True)
class Case:
    shape: Shape
    bytes: int  # that any implementation must move
    flop: int  # of the GEMMs that the algorithm needs
    ours: Callable[[], object]
    baselines: dict[str, Callable[[], object]]

    @property
    def floor_ms(self) -> float:
        return max(self.bytes / BANDWIDTH, self.flop / FLOPS) * 1e3


def _randn(*shape: int, device: str, grad: bool = False) -> Tensor:
    return torch.randn(*shape, device=device, dtype=torch.bfloat16).requires_grad_(grad)


def _with_backward(fn: Callable[..., tuple], *args, **options) -> Callable[[], object]:
    """Forward, then backward from the first output; gradients are dropped so that every round does the same work."""
    def step() -> None:
        for x in args:
            x.grad = None
        fn(*args, **options)[0].sum().backward()
    return step


def _pair(fn, ref, args, **options) -> tuple[Callable[[], object], dict[str, Callable[[], object]]]:
    return _with_backward(fn, *args, **options), {
        "torch": _with_backward(ref, *args, **options),
        "torch.compile": _with_backward(torch.compile(ref), *args, **options)}


def _linear(s: Shape, device: str) -> tuple[Tensor, ...]:
    return (_randn(s.T, s.D, device=device, grad=True), _randn(s.V, s.D, device=device, grad=True),
            _randn(s.T, s.E, device=device), _randn(s.V, s.E, device=device))


def _span_sum(s: Shape, device: str) -> Case:
    x_T = torch.randn(s.T, device=device, requires_grad=True)
    span_T = torch.arange(s.T, device=device) // 3
    ours, baselines = _pair(lambda x, i: (span_sum(x, i, s.T),), lambda x, i: (span_sum_ref(x, i, s.T),), (x_T, span_T))
    return Case(s, 2 * (4 + 8 + 4) * s.T, 0, ours, baselines)


def _token_logprob(s: Shape, device: str) -> Case:
    args = _randn(s.T, s.V, device=device, grad=True), torch.randint(s.V, (s.T,), device=device)
    return Case(s, 6 * s.T * s.V, 0, *_pair(token_logprob, token_logprob_ref, args))


def _token_kl(s: Shape, device: str) -> Case:
    args = _randn(s.T, s.V, device=device, grad=True), _randn(s.T, s.V, device=device)
    return Case(s, 10 * s.T * s.V, 0, *_pair(token_kl, token_kl_ref, args))


def _linear_logprob(s: Shape, device: str) -> Case:
    x_TD, w_VD, _, _ = _linear(s, device)
    args = x_TD, w_VD, torch.randint(s.V, (s.T,), device=device)
    return Case(s, 0, 4 * 2 * s.T * s.V * s.D, *_pair(linear_logprob, linear_logprob_ref, args))


def _linear_nll(s: Shape, device: str) -> Case:
    x_TD, w_VD, _, _ = _linear(s, device)
    args = x_TD, w_VD, torch.randint(s.V, (s.T,), device=device)
    return Case(s, 0, 3 * 2 * s.T * s.V * s.D, *_pair(linear_nll, linear_nll_ref, args))


def _linear_kl(s: Shape, device: str) -> Case:
    return Case(s, 0, 2 * s.T * s.V * (3 * s.D + s.E), *_pair(linear_kl, linear_kl_ref, _linear(s, device)))


def _linear_topk_kl(s: Shape, device: str) -> Case:
    x_TD, w_VD, *teacher = _linear(s, device)
    args = x_TD, w_VD, *teacher_topk(*teacher, s.K)
    return Case(s, 0, 2 * s.T * s.V * 3 * s.D, *_pair(linear_topk_kl, linear_topk_kl_ref, args))


def _topk_tail_kl(s: Shape, device: str) -> Case:
    kept = teacher_topk(_randn(s.T, s.E, device=device), _randn(s.V, s.E, device=device), s.K)
    args = _randn(s.T, s.V, device=device, grad=True), *kept
    return Case(s, 6 * s.T * s.V, 0, *_pair(topk_tail_kl, topk_tail_kl_ref, args))


def _renormalised_topk_kl(s: Shape, device: str) -> Case:
    x_TD, w_VD, *teacher = _linear(s, device)
    kept = teacher_topk(*teacher, s.K)
    args = x_TD, w_VD, kept.ids, kept.logp
    return Case(s, 3 * 2 * s.T * s.K * s.D, 0, *_pair(renormalised_topk_kl, renormalised_topk_kl_ref, args))


def _teacher_topk(s: Shape, device: str) -> Case:
    _, _, x_TE, w_VE = _linear(s, device)
    return Case(s, 0, 2 * s.T * s.V * s.E, lambda: teacher_topk(x_TE, w_VE, s.K),
                {"torch": lambda: teacher_topk_ref(x_TE, w_VE, s.K)})


def _first_bytes(V: int, device: str):
    """257 classes of very different sizes, as first bytes have: half of the ids in one of them."""
    class_V = torch.where(torch.rand(V) < 0.5, 32, torch.randint(257, (V,)))
    class_V[:257] = torch.arange(257)[:V]
    return class_map(class_V, 257).to(device)


def _class_logprob(s: Shape, device: str) -> Case:
    x_TD, w_VD, _, _ = _linear(s, device)
    classes = _first_bytes(s.V, device)
    ours, baselines = _pair(lambda *a: (class_logprob(*a, classes),), lambda *a: (class_logprob_ref(*a, classes),), (x_TD, w_VD))
    return Case(s, 0, 4 * 2 * s.T * s.V * s.D, ours, baselines)


def _bucket_kl(s: Shape, device: str) -> Case:
    classes = _first_bytes(s.V, device)

    def on_classes(op):
        return lambda x, w, y, v: op(x, w, classes, y, v, classes)

    return Case(s, 0, 2 * s.T * s.V * (3 * s.D + s.E), *_pair(on_classes(bucket_kl), on_classes(bucket_kl_ref), _linear(s, device)))


def _align_spans(s: Shape, device: str) -> Case:
    lens = [torch.randint(1, 6, (8, s.T // 8 or 1), device=device) for _ in "ab"]
    masks = [torch.ones_like(x, dtype=torch.bool) for x in lens]
    return Case(s, 2 * 3 * 8 * s.T, 0, lambda: align_spans(*lens, *masks), {"torch": lambda: align_spans_ref(*lens, *masks)})


OPS: dict[str, Callable[[Shape, str], Case]] = {
    "span_sum": _span_sum, "token_logprob": _token_logprob, "token_kl": _token_kl, "linear_logprob": _linear_logprob,
    "linear_nll": _linear_nll,
    "linear_kl": _linear_kl, "linear_topk_kl": _linear_topk_kl, "teacher_topk": _teacher_topk,
    "topk_tail_kl": _topk_tail_kl, "renormalised_topk_kl": _renormalised_topk_kl,
    "class_logprob": _class_logprob, "bucket_kl": _bucket_kl, "align_spans": _align_spans}
