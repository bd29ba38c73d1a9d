"""How much of the student's gradient is signal? The same weights, the same prompts, texts sampled
by one model or another.

G_b, b = 1 ... B, is the gradient of the token KL (of two tokenizers: of the next byte's KL) summed
over micro-batch b, in the last block and the head, S = sum G_b.
    plain     |S / B|^2 / ((1 / B) sum |G_b - S / B|^2): signal to noise of one micro-batch's
              gradient
    unbiased  (|S / B|^2 - v / B) / v,  v = (1 / (B - 1)) sum |G_b - S / B|^2: numerator and
              denominator are unbiased, without what the noise adds to the length of a mean. About 0
              where there is no signal (plain: 1 / (B - 1)), below 0 by chance; 1 / unbiased is the
              noise scale of arXiv:1812.06162 in micro-batches
Both are ratios: how sums are normalised does not matter, how much a micro-batch holds does. So
sources are compared on the same number of texts of the same prompts, and a prompt is never split:
its texts are not independent.

Why two passes: with |G_b|^2 and G_b . S every sum without one micro-batch is known
(|S - G_b|^2 = |S|^2 - 2 G_b . S + |G_b|^2), which is all that a jackknife needs, exactly. It costs
every gradient twice and memory for one sum; B gradients of a large head would not fit, and a random
sketch of them depends on how they are sharded.

Shapes: B micro-batches.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from reflux.trainer.config.distillation import DistillSection
from reflux.trainer.data.batch import Batch, Sample, TeacherView, pack
from reflux.trainer.losses import HeadInputs, Loss, distill_kl
from reflux.trainer.phase import Advance, Engine, FrozenModel, LossFunction
from reflux.trainer.runs.progress import ignore
from reflux.trainer.runs.stats import Estimate, jackknife

from .measure import SampledBy, TokenStats
from .metrics import DIVERGENCES, Divergence

# sampled by -> groups of texts, a micro-batch each
Groups = Mapping[SampledBy, Sequence[Sequence[TokenStats]]]
OFF_POLICY: tuple[SampledBy, ...] = ("teacher", "dataset")  # the first that has texts is compared


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


@dataclass(frozen=True)
class SignalToNoise:
    """Of one micro-batch's gradient; both formulas above."""

    unbiased: Estimate
    plain: float


@dataclass(frozen=True)
class OnMinusOff:
    """Unbiased signal to noise on the student's texts - that on the texts of `off`, with the
    interval of paired micro-batches.
    """

    mean: float
    std: float
    low: float
    high: float
    n: int
    off: SampledBy


@dataclass(frozen=True)
class GradientComparison:
    """Of one divergence; None where there are no texts."""

    student: SignalToNoise | None = None
    teacher: SignalToNoise | None = None
    dataset: SignalToNoise | None = None
    on_minus_off: OnMinusOff | None = None

    def of(self, source: SampledBy) -> SignalToNoise | None:
        return {"student": self.student, "teacher": self.teacher, "dataset": self.dataset}[source]


@dataclass(frozen=True)
class GradientNoise:
    """Signal to noise of the gradient, and what was compared."""

    forward: GradientComparison
    reverse: GradientComparison
    batches: int
    texts_of_each: int
    tokens: dict[SampledBy, int]

    def of(self, divergence: Divergence) -> GradientComparison:
        return self.forward if divergence == "forward" else self.reverse


def signal_to_noise(
    sum_square: float, squares: float, count: int, *, unbiased: bool = True
) -> float:
    """From |S|^2, sum |G_b|^2 and B (formulas above). NaN for fewer than two micro-batches, or
    where all gradients are equal.
    """
    if count < 2:
        return float("nan")
    mean_square = sum_square / count**2
    variance = squares / count - mean_square
    if variance <= 0:
        return float("nan")
    v = variance * count / (count - 1)
    return (mean_square - v / count) / v if unbiased else mean_square / variance


def compare_gradients(moments: Mapping[SampledBy, Moments]) -> GradientComparison:
    """Signal to noise by source, and student - other source; 95 % jackknife intervals over
    micro-batches, deleted in pairs.
    """
    whole = {w: signal_to_noise(*m.all()) for w, m in moments.items()}
    parts = {
        w: [signal_to_noise(*m.without(b)) for b in range(len(m.square_B))]
        for w, m in moments.items()
    }
    ratios = {
        w: SignalToNoise(jackknife(whole[w], parts[w]), signal_to_noise(*m.all(), unbiased=False))
        for w, m in moments.items()
    }
    off = next((w for w in OFF_POLICY if w in moments), None)
    difference = None
    if off and "student" in moments:
        parts_of_difference = [a - b for a, b in zip(parts["student"], parts[off], strict=True)]
        e = jackknife(whole["student"] - whole[off], parts_of_difference)
        difference = OnMinusOff(e.mean, e.std, e.low, e.high, e.n, off)
    return GradientComparison(
        ratios.get("student"), ratios.get("teacher"), ratios.get("dataset"), difference
    )


def deal(stats: Sequence[TokenStats], batches: int) -> dict[SampledBy, list[list[TokenStats]]]:
    """At most `batches` groups of texts by source: whole prompts, the same prompts and as many
    texts of each for every source.
    """
    texts: dict[SampledBy, dict[int, list[TokenStats]]] = {}
    for s in stats:
        texts.setdefault(s.sampled_by, {}).setdefault(s.prompt, []).append(s)
    if not texts:
        return {}
    shared = sorted(set.intersection(*(set(of_prompt) for of_prompt in texts.values())))
    each = min((len(of_prompt[i]) for of_prompt in texts.values() for i in shared), default=0)
    count = min(batches, len(shared))
    return {
        w: [[s for i in shared[b::count] for s in of_prompt[i][:each]] for b in range(count)]
        for w, of_prompt in texts.items()
    }


def gradients_of(groups: Groups) -> int:
    """How many gradients gradient_noise takes."""
    return 2 * len(DIVERGENCES) * sum(map(len, groups.values()))


def gradient_noise(
    engine: Engine,
    groups: Groups,
    loss_of: Callable[[Divergence], LossFunction],
    view_of: Callable[[TokenStats], TeacherView],
    *,
    tokens: int,
    joined: bool = False,
    advance: Advance = ignore,
) -> GradientNoise | None:
    """Both divergences' comparison; None for fewer than two groups. Collective.

    groups: of `deal`, from all ranks' stats, the same on every rank. loss_of: what is descended.
    view_of: a text as the teacher reads it. Weights do not move; gradients are cleared.
    """
    count = min(map(len, groups.values()), default=0)
    if count < 2:
        return None
    batches = {
        w: [_packed(engine, g, view_of, tokens, joined) for g in rows] for w, rows in groups.items()
    }
    compared = {}
    with last_block_only(engine.model) as parameters:
        for d in DIVERGENCES:
            loss = loss_of(d)
            compared[d] = compare_gradients(
                {w: _moments(engine, loss, parameters, b, advance) for w, b in batches.items()}
            )
    return GradientNoise(
        compared["forward"],
        compared["reverse"],
        batches=count,
        texts_of_each=sum(map(len, next(iter(groups.values())))),
        tokens={w: sum(len(s.rollout.ids) for g in rows for s in g) for w, rows in groups.items()},
    )


def token_divergence(engine: Engine, teacher: FrozenModel, divergence: Divergence) -> LossFunction:
    """The token KL of one vocabulary, as a loss of the student."""
    section = DistillSection(divergence=divergence)

    def loss(out: HeadInputs, batch: Batch) -> Loss:
        with engine.forward_no_grad(teacher, batch.for_teacher(), out.vocab_size) as other:
            return distill_kl(out, other, section)

    return loss


def _packed(
    engine: Engine,
    texts: Sequence[TokenStats],
    view_of: Callable[[TokenStats], TeacherView],
    tokens: int,
    joined: bool,
) -> list[Batch]:
    """This rank's part of a group."""
    samples = [
        Sample(s.rollout, teacher_views=(view_of(s),)) for s in texts[engine.rank :: engine.world]
    ]
    return pack(samples, tokens=tokens, seq_len=engine.seq_len, joined=joined)


def _moments(
    engine: Engine,
    loss: LossFunction,
    parameters: Sequence[nn.Parameter],
    groups: Sequence[Sequence[Batch]],
    advance: Advance,
) -> Moments:
    square, with_sum = [], []
    total: list[Tensor] = []
    try:
        for batches in groups:
            gradient = _gradient(engine, loss, parameters, batches)
            square.append(inner(gradient, gradient))
            if total:
                for s, g in zip(total, gradient, strict=True):
                    s.add_(g)
            else:
                total = [g.clone() for g in gradient]
            advance(1)
        for batches in groups:
            with_sum.append(inner(_gradient(engine, loss, parameters, batches), total))
            advance(1)
    finally:
        engine.clear_gradients()
    return Moments(np.array(square), np.array(with_sum))


def _gradient(
    engine: Engine,
    loss: LossFunction,
    parameters: Sequence[nn.Parameter],
    batches: Sequence[Batch],
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
    # a ModuleDict, or a plain dict of a Hugging Face model's blocks
    block = list(cast(Mapping[str, nn.Module], model.layers).values())[-1]
    head = model.get_submodule("lm_head")

    def set_grad(on: bool) -> Callable[..., None]:
        def hook(*_) -> None:
            torch.set_grad_enabled(on)

        return hook

    before = torch.is_grad_enabled()
    hooks = [
        model.register_forward_pre_hook(set_grad(False)),
        block.register_forward_pre_hook(set_grad(True)),
    ]
    try:
        yield [*block.parameters(), *head.parameters()]
    finally:
        torch.set_grad_enabled(before)
        for hook in hooks:
            hook.remove()
