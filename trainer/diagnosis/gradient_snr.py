"""How much of the student's gradient is signal? The same weights, the same prompts, texts of one
writer or another.

G_b, b = 1 ... B, is the gradient of the token KL summed over micro-batch b, in the last block and
the head, S = sum G_b.
    plain     |S / B|^2 / ((1 / B) sum |G_b - S / B|^2): signal to noise of one micro-batch's
              gradient
    unbiased  (|S / B|^2 - v / B) / v,  v = (1 / (B - 1)) sum |G_b - S / B|^2: numerator and
              denominator are unbiased, without what the noise adds to the length of a mean. About 0
              where there is no signal (plain: 1 / (B - 1)), below 0 by chance; 1 / unbiased is the
              noise scale of arXiv:1812.06162 in micro-batches
Both are ratios: how sums are normalised does not matter, how much a micro-batch holds does. So
writers are compared on the same number of texts of the same prompts, and a prompt is never split:
its texts are not independent.

Why two passes: with |G_b|^2 and G_b . S every sum without one micro-batch is known (|S - G_b|^2 =
|S|^2 - 2 G_b . S +
|G_b|^2), which is all that a jackknife needs, exactly. It costs every gradient twice and memory for
one sum; B gradients of a large head would not fit, and a random sketch of them depends on how they
are sharded.

Shapes: B micro-batches.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from reflux.trainer.config.distillation import DistillSection
from reflux.trainer.data.batch import Batch, Sample, TeacherView, pack
from reflux.trainer.data.chat import Chat
from reflux.trainer.losses import HeadInputs, Loss, distill_kl
from reflux.trainer.runs.progress import Advance, ignore
from reflux.trainer.runs.stats import jackknife

from .measure import DIRECTIONS, TokenStats


@dataclass(frozen=True, eq=False)
class Moments:
    """Inner products of the gradients of B micro-batches."""

    square_B: np.ndarray  # |G_b|^2
    with_sum_B: np.ndarray  # G_b . S; they add up to |S|^2

    def without(self, b: int) -> tuple[float, float, int]:
        """(|S|^2, sum |G|^2, B) of the other micro-batches."""
        whole, square, with_sum = self.with_sum_B.sum(), self.square_B[b], self.with_sum_B[b]
        return (
            float(whole - 2 * with_sum + square),
            float(self.square_B.sum() - square),
            len(self.square_B) - 1,
        )

    def all(self) -> tuple[float, float, int]:
        return float(self.with_sum_B.sum()), float(self.square_B.sum()), len(self.square_B)


def signal_to_noise(
    sum_square: float, squares: float, count: int, *, unbiased: bool = True
) -> float:
    """From |S|^2, sum |G_b|^2 and B (formulas above). NaN for fewer than two micro-batches, or
    without any spread.
    """
    if count < 2:
        return float("nan")
    mean_square = sum_square / count**2
    spread = squares / count - mean_square
    if spread <= 0:
        return float("nan")
    v = spread * count / (count - 1)
    return (mean_square - v / count) / v if unbiased else mean_square / spread


def compare_writers(moments: Mapping[str, Moments]) -> dict[str, Any]:
    """Signal to noise by writer, and student - other writer; 95 % jackknife intervals over
    micro-batches, deleted in pairs.
    """
    one = lambda m: signal_to_noise(*m.all())
    parts = {
        w: [signal_to_noise(*m.without(b)) for b in range(len(m.square_B))]
        for w, m in moments.items()
    }
    found: dict[str, Any] = {
        w: {
            "unbiased": jackknife(one(m), parts[w])._asdict(),
            "plain": signal_to_noise(*m.all(), unbiased=False),
        }
        for w, m in moments.items()
    }
    off = next((w for w in ("teacher", "dataset") if w in moments), None)
    if off and "student" in moments:
        apart = [a - b for a, b in zip(parts["student"], parts[off], strict=True)]
        found["on_minus_off"] = jackknife(
            one(moments["student"]) - one(moments[off]), apart
        )._asdict() | {"off": off}
    return found


def deal(readings: Sequence[TokenStats], batches: int) -> dict[str, list[list[TokenStats]]]:
    """Writer -> at most `batches` groups of texts: whole prompts, the same prompts and as many
    texts of each for every writer.
    """
    texts: dict[str, dict[int, list[TokenStats]]] = {}
    for r in readings:
        texts.setdefault(r.writer, {}).setdefault(r.rollout.prompt.index, []).append(r)
    shared = (
        sorted(set.intersection(*(set(of_prompt) for of_prompt in texts.values()))) if texts else []
    )
    each = min((len(of_prompt[i]) for of_prompt in texts.values() for i in shared), default=0)
    count = min(batches, len(shared))
    return {
        w: [[r for i in shared[b::count] for r in of_prompt[i][:each]] for b in range(count)]
        for w, of_prompt in texts.items()
    }


def gradients_of(groups: Mapping[str, Sequence]) -> int:
    """How many gradients gradient_noise takes."""
    return 2 * len(DIRECTIONS) * sum(map(len, groups.values()))


def gradient_noise(
    engine: Any,
    teacher: Any,
    groups: Mapping[str, Sequence[Sequence[TokenStats]]],
    chats: tuple[Chat, Chat],
    *,
    tokens: int,
    joined: bool = False,
    advance: Advance = ignore,
) -> dict[str, Any]:
    """Direction of the KL -> compare_writers, and what was compared; {} for fewer than two groups.
    Collective.

    groups: of `deal`, from all ranks' readings, the same on every rank. Weights do not move;
    gradients are cleared.
    """
    count = min(map(len, groups.values()), default=0)
    if count < 2:
        return {}
    found: dict[str, Any] = {d: {} for d in DIRECTIONS}
    with last_block_only(engine.model) as parameters:
        for d in DIRECTIONS:
            loss = _token_kl(engine, teacher, d)
            found[d] = compare_writers(
                {
                    w: _moments(
                        engine,
                        loss,
                        parameters,
                        [_packed(engine, g, chats[1], tokens, joined) for g in rows],
                        advance,
                    )
                    for w, rows in groups.items()
                }
            )
    total = {w: sum(len(r.rollout.ids) for g in rows for r in g) for w, rows in groups.items()}
    texts = sum(map(len, next(iter(groups.values()))))
    return found | {"batches": count, "texts_of_each": texts, "tokens": total}


def _token_kl(engine: Any, teacher: Any, direction: str) -> Callable[[HeadInputs, Batch], Loss]:
    spec = DistillSection(divergence=direction)

    def loss(out: HeadInputs, batch: Batch) -> Loss:
        with engine.forward_no_grad(teacher, batch.for_teacher(), out.vocab_size) as theirs:
            return distill_kl(out, theirs, spec)

    return loss


def _packed(
    engine: Any, texts: Sequence[TokenStats], teacher_chat: Chat, tokens: int, joined: bool
) -> list[Batch]:
    """This rank's part of a group."""
    mine = texts[engine.rank :: engine.world]
    samples = [
        Sample(
            r.rollout,
            teacher_views=(TeacherView(teacher_chat.prompt_ids(r.rollout.prompt.messages)),),
        )
        for r in mine
    ]
    return pack(samples, tokens=tokens, seq_len=engine.seq_len, joined=joined)


def _moments(
    engine: Any,
    loss: Callable,
    parameters: Sequence[nn.Parameter],
    groups: Sequence[Sequence[Batch]],
    advance: Advance,
) -> Moments:
    square, with_sum, total = [], [], None
    try:
        for batches in groups:
            gradient = _gradient(engine, loss, parameters, batches)
            square.append(inner(gradient, gradient))
            total = (
                [g.clone() for g in gradient]
                if total is None
                else [s.add_(g) for s, g in zip(total, gradient, strict=True)]
            )
            advance(1)
        for batches in groups:
            with_sum.append(inner(_gradient(engine, loss, parameters, batches), total))
            advance(1)
    finally:
        engine.clear_gradients()
    return Moments(np.array(square), np.array(with_sum))


def _gradient(
    engine: Any, loss: Callable, parameters: Sequence[nn.Parameter], batches: Sequence[Batch]
) -> list[Tensor]:
    engine.backward(batches, loss)
    return [p.grad for p in parameters if p.grad is not None]


def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Inner product over all entries of all tensors, in float64, whatever their sharding.
    Collective.
    """
    sums = [(x * y).sum(dtype=torch.float64) for x, y in zip(a, b, strict=True)]
    return float(sum(s.full_tensor() if isinstance(s, DTensor) else s for s in sums))


@contextlib.contextmanager
def last_block_only(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Inside, a forward builds its graph from the last block on: no activations of the others.
    Yields its and the head's weights.

    A tied head has the gradient of its own use only, not of the embedding's.
    """
    block = list(model.layers.values())[-1]

    def turn(on: bool) -> Callable:
        def hook(*_) -> None:
            torch.set_grad_enabled(on)

        return hook

    before, hooks = (
        torch.is_grad_enabled(),
        [model.register_forward_pre_hook(turn(False)), block.register_forward_pre_hook(turn(True))],
    )
    try:
        yield [*block.parameters(), *model.lm_head.parameters()]
    finally:
        torch.set_grad_enabled(before)
        for hook in hooks:
            hook.remove()
